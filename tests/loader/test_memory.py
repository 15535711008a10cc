"""A load needs one copy of the model, not two: the peak is measured by the kernel in a process of its own."""

from __future__ import annotations

import re
from pathlib import Path

from sllm_vllm.units import MIB
from tests.conftest import ModelDir
from tests.loader.test_bit_identity import wait_until_written
from tests.support.vllm_fill import Fill, engine_config, join_model_parallel, load_model, run_ranks

OVERHEAD_NBYTES_MAX = 256 * MIB


def memory_nbytes(field: str) -> int:
    """A field of this process's status, in bytes; `VmRSS` is resident now, `VmHWM` the peak since it was reset."""
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def peak_nbytes_of_load(fill: Fill) -> int:
    """What the whole of ``load_model`` adds to resident memory at its highest; run in a fresh process."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import get_model_loader

    config = engine_config(fill)
    join_model_parallel(config)
    loader = get_model_loader(config.load_config)
    Path("/proc/self/clear_refs").write_text("5")
    before = memory_nbytes("VmRSS")
    with set_current_vllm_config(config):
        loader.load_model(vllm_config=config, model_config=config.model_config)
    assert fill.load_format == "auto" or loader.report.outcome == "loaded"
    return memory_nbytes("VmHWM") - before


def test_peak_is_one_copy_of_the_model(model_dir: ModelDir, tmp_path: Path) -> None:
    model = model_dir("llama", size="0.5GB")
    fill = Fill(model, load_format="sllm", extra_config={"store_dir": str(tmp_path), "verify": "always"})
    load_model(fill)
    wait_until_written()
    (peak_nbytes,) = run_ranks(peak_nbytes_of_load, 1, fill)
    model_nbytes = (model / "model.safetensors").stat().st_size
    print(f"peak {peak_nbytes / MIB:.0f} MiB for a model of {model_nbytes / MIB:.0f} MiB")
    assert model_nbytes * 0.8 < peak_nbytes <= model_nbytes + OVERHEAD_NBYTES_MAX
