"""Named clusters to simulate. Figures that were not measured state what they are derived from. Pure."""

from __future__ import annotations

from dataclasses import replace

from sllm_vllm.errors import ConfigError
from sllm_vllm.simulate.hardware import FaultRates, HardwareCluster, ModelClass, NodeClass, Serving
from sllm_vllm.simulate.workload import GSM8K, Lengths, Traffic
from sllm_vllm.units import GIB

A40_BPS = 0.7 * 696e9
"""Bytes of weights read a second in decode: assumed 70 % of the 696 GB/s in the A40's data sheet."""
A40_FLOPS = 0.4 * 149.7e12
"""In prefill: assumed 40 % of the dense BF16 rate in the data sheet."""


def opt(name: str, params: float, accelerators: int) -> ModelClass:
    """An OPT with ``params`` parameters, fp16, on A40s: 2 bytes of weights read a token, 2 FLOPs a token and parameter.

    Process and init are assumed: ServerlessLLM's evaluation keeps processes ready and counts only the load; a process
    that is not ready imports for 6 s.
    """
    return ModelClass(
        name=name,
        nbytes=int(2 * params),
        accelerators=accelerators,
        process_warm_s=0.1,
        process_cold_s=6.0,
        init_s=0.3,
        prefill_rate=accelerators * A40_FLOPS / (2 * params),
        tpot_s=2 * params / (accelerators * A40_BPS),
    )


OPT_67 = opt("opt-6.7b", 6.7e9, 1)
OPT_13 = opt("opt-13b", 13e9, 1)
OPT_30 = opt("opt-30b", 30e9, 2)
"""60 GB of weights need two of the A40's 48 GB."""

A40_NODE = NodeClass(
    num_slots=4,
    host_nbytes=400 * GIB,  # of 512 GB of DRAM; the rest is assumed to be the system's and the engines'
    disk_nbytes=2_000 * 10**9,  # one 2 TB NVMe, the paper's
    remote_bps=1.25e9,  # 10 Gbps Ethernet, the paper's
    disk_bps=6.0e9,  # one PCIe 4 NVMe read in large blocks; assumed near its link
    host_bps=24.0e9,  # pinned memory over PCIe 4 x16; assumed near its link
)

PAPER = HardwareCluster(
    name="paper",
    num_nodes=4,
    node=A40_NODE,
    models=((OPT_67, 32), (OPT_13, 16), (OPT_30, 8)),  # 1.3 TB in all, so every node's disk holds every model
    traffic=Traffic(rate=1.4, lengths=GSM8K),  # the highest rate of the paper's figures
    failures=FaultRates(),
)
"""ServerlessLLM's second testbed and its mix of models, as described in the secondary literature.

All policies share the hardware, ServerlessLLM's loader (a load takes bytes over the slowest hop, one load at a time on
a node), and its caches: every disk holds every model, and a node's memory keeps what was loaded there and evicts the
least recently used. They differ in where a model starts, which replicas make room for it, and how long it stays. The
paper reports 1.27 to 1.95 times better P99 at 1.4 requests a second. Our sources do not say which figure belongs to
which baseline, or whether all sizes ran together: here they do, requested in proportion to rank ** -0.5.
"""

IN_MEMORY = replace(
    PAPER, name="paper-in-memory", node=replace(A40_NODE, host_nbytes=A40_NODE.disk_nbytes), is_in_memory=True
)
"""A bound: the same cluster, but no start reads a disk. Placement and caching can't reduce the waits that remain."""

H100_NODE = NodeClass(
    num_slots=8,
    host_nbytes=1024 * GIB,
    disk_nbytes=4_000 * 10**9,
    remote_bps=5.0e9,  # 50 Gbps to an object store, assumed
    disk_bps=20.0e9,  # as ServerlessLLM's repository reports for its H100 machine (65.5 GB in 3.2 s)
    host_bps=50.0e9,  # 65.5 GB in 1.25 s from memory, the same source
)
H100_8B = ModelClass(
    name="8b",
    nbytes=16 * 10**9,
    accelerators=1,
    process_warm_s=0.5,
    process_cold_s=10.0,
    init_s=1.5,
    prefill_rate=25_000.0,  # 16 GFLOPs a token at 40 % of 989 TFLOPS
    tpot_s=0.0068,  # 16 GB at 70 % of 3.35 TB/s
)
H100_32B = replace(
    H100_8B, name="32b", nbytes=65 * 10**9, accelerators=2, prefill_rate=12_000.0, tpot_s=0.0139, init_s=3.0
)
BIG = HardwareCluster(
    name="big",
    num_nodes=1000,
    node=H100_NODE,
    models=((H100_8B, 8000), (H100_32B, 2000)),
    traffic=Traffic(rate=1000.0, exponent=0.9, lengths=GSM8K),
    failures=FaultRates(),
    on_disk=8,  # nodes that have a model at first; the others fetch it
)

SMALL = ModelClass(
    name="small",
    nbytes=int(1.9 * GIB),  # README: what its test model needs at least
    accelerators=1,
    process_warm_s=0.5,  # process and init: 0.9 s together, measured here on a CPU with processes kept warm
    process_cold_s=12.0,  # imports of vLLM on two cores, rounded
    init_s=0.4,
    prefill_rate=400.0,  # two cores, assumed
    tpot_s=0.08,  # the same
    batch_slowdown=0.2,  # the same: decode leaves a CPU little to spare
)
HERE = HardwareCluster(
    name="here",
    num_nodes=1,
    node=NodeClass(
        num_slots=2,
        host_nbytes=4 * GIB,  # room for two of the three models
        disk_nbytes=64 * GIB,
        remote_bps=0.1e9,
        disk_bps=1.5e9,
        host_bps=4.0e9,
    ),
    models=((SMALL, 3),),
    traffic=Traffic(rate=0.1, cv=4.0, lengths=Lengths(prompt_mean=40.0, output_mean=40.0)),
    failures=FaultRates(),
    serving=Serving(max_replicas=2),
)

PRESETS = {cluster.name: cluster for cluster in (PAPER, IN_MEMORY, BIG, HERE)}


def preset(name: str) -> HardwareCluster:
    """A cluster by its name.

    Raises:
        ConfigError: there is none of this name.
    """
    if name not in PRESETS:
        raise ConfigError(f"there is no preset {name!r}; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
