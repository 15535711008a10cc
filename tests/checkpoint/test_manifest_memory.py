"""What reading a manifest from elsewhere costs in memory, measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from sllm_vllm.checkpoint.core.manifest import parse_manifest
from sllm_vllm.config import MANIFEST_MARKS_MAX, MANIFEST_NBYTES_MAX
from sllm_vllm.units import MIB
from tests.support.cases import every_case

GROWTH_NBYTES_MAX = 400 * MIB
"""256 MiB were seen: a text of 32 MiB with one wide character, four bytes for each, twice for a moment."""
_CHILD = """
import re, sys
from pathlib import Path
from sllm_vllm.checkpoint.core.manifest import parse_manifest
from sllm_vllm.errors import CheckpointInvalid

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

raw = Path(sys.argv[1]).read_bytes()
Path("/proc/self/clear_refs").write_text("5")
before = peak()
try:
    parse_manifest(raw, "it")
except CheckpointInvalid:
    print(peak() - before)
"""
HEAD: dict[str, object] = {
    "format": "sllm-checkpoint",
    "version": 1,
    "created_by": "x",
    "source": {"model": "m", "fingerprint": "f"},
    "layout": dict.fromkeys(("model_class", "dtype", "device_type", "vllm_version", "config_digest"), "x"),
    "chunk_nbytes": 16 * MIB,
}
PARTITION: dict[str, object] = {
    "rank": 0,
    "path": "partitions/rank-00000.safetensors",
    "nbytes": 4097,
    "header_nbytes": 4096,
    "header_checksum": "0" * 16,
}


def hostile(kind: str) -> bytes:
    """As large as the limits allow, in bytes or in values."""
    num = MANIFEST_MARKS_MAX // 2 - 100
    content: str = {
        "text": lambda: '"\N{GRINNING FACE}' + "a" * (MANIFEST_NBYTES_MAX - 2000) + '"',
        "objects": lambda: "[" + ",".join(["{}"] * num) + "]",
        "fields": lambda: "{" + ",".join(f'"{index:x}":{index + 999}' for index in range(num)) + "}",
        "records": lambda: "[" + ",".join(f'{{"{index:x}":{index}}}' for index in range(num // 2)) + "]",
        "more objects": lambda: "[" + ",".join(["{}"] * (MANIFEST_NBYTES_MAX // 3 - 1000)) + "]",
    }[kind]()
    return f'{json.dumps(HEAD)[:-1]},"x":{content}}}'.encode()


def hostile_tensors() -> bytes:
    """Each of them lacks every field: an error a field was kept."""
    tensors = ",".join(["{}"] * (MANIFEST_MARKS_MAX // 2 - 100))
    partition = f'{json.dumps(PARTITION)[:-1]},"chunks":[],"tensors":[{tensors}]}}'
    return f'{json.dumps(HEAD)[:-1]},"partitions":[{partition}]}}'.encode()


@every_case("kind", ["text", "objects", "fields", "records", "more objects", "tensors"])
def test_no_manifest_costs_more_than_a_few_hundred_megabytes(tmp_path: Path, kind: str) -> None:
    raw = hostile_tensors() if kind == "tensors" else hostile(kind)
    assert len(raw) <= MANIFEST_NBYTES_MAX
    (tmp_path / "manifest").write_bytes(raw)
    command = [sys.executable, "-c", _CHILD, str(tmp_path / "manifest")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    assert int(done.stdout) < GROWTH_NBYTES_MAX


def test_the_manifest_of_a_terabyte_is_far_from_the_limits() -> None:
    """100,000 tensors with names as long as those of experts that were not fused, in chunks of 16 MiB."""
    num_tensors, nbytes = 100_000, 10_000_128
    tensors = [
        {
            "name": f"model.layers.{index // 800}.mlp.experts.{index % 256}.down_proj.weight_{index % 800}",
            "dtype": "bfloat16",
            "shape": [nbytes // 512, 256],
            "offset": index * (nbytes // 512 * 512),
            "nbytes": nbytes // 512 * 512,
            "aliases": [],
        }
        for index in range(num_tensors)
    ]
    data_nbytes = num_tensors * (nbytes // 512 * 512)
    assert data_nbytes > 0.99e12
    chunks = ["0123456789abcdef"] * -(-data_nbytes // (16 * MIB))
    partition = {**PARTITION, "header_nbytes": 16 * MIB, "nbytes": 16 * MIB + data_nbytes, "chunks": chunks}
    raw = json.dumps({**HEAD, "partitions": [{**partition, "tensors": tensors}]}).encode()
    assert len(parse_manifest(raw, "it").partitions[0].tensors) == num_tensors
    assert len(raw) < 0.7 * MANIFEST_NBYTES_MAX
