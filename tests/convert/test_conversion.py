"""Watching the ranks of a conversion: however they or their parent end, nobody is left behind and we are told why."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from sllm_vllm.checkpoint.core.manifest import MANIFEST_NAME
from sllm_vllm.convert.model_files import workplace
from sllm_vllm.convert.parent import (
    ConvertRequest,
    RankJob,
    RanksFailed,
    convert_model,
    started_ranks,
    watch_ranks,
)
from sllm_vllm.errors import ConfigError, SllmError, WriteError, WriterBusy
from tests.support.waiting import DEADLINE_S

LONELY_RANK = """
import sys
import tempfile
from pathlib import Path
from sllm_vllm.convert.parent import ConvertRequest, RankJob, started_ranks

root = Path(sys.argv[1])
request = ConvertRequest(model=str(root), store_dir=root, tensor_parallel_size=2)
with started_ranks([RankJob(request, 0, root, root, None)]) as running:
    print(running[0].process.pid, flush=True)
    sys.stdin.read()
"""


def lonely_job(root: Path) -> RankJob:
    """Rank 0 of two; without the other one it would wait for many minutes."""
    request = ConvertRequest(model=str(root), store_dir=root, tensor_parallel_size=2)
    return RankJob(request, 0, root, root, None)


def test_no_rank_outlives_an_interrupt(tmp_path: Path) -> None:
    with contextlib.suppress(KeyboardInterrupt), started_ranks([lonely_job(tmp_path)]) as running:
        assert running[0].process.is_alive()
        raise KeyboardInterrupt
    assert running[0].process.exitcode == -signal.SIGKILL


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="this system has no pidfd")
def test_no_rank_outlives_a_parent_that_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LONELY_RANK, str(tmp_path)]
    parent = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert parent.stdin is not None
    assert parent.stdout is not None
    with parent.stdin, parent.stdout:
        rank = os.pidfd_open(int(parent.stdout.readline()))
        try:
            parent.kill()
            parent.wait()
            ended, _, _ = select.select([rank], [], [], DEADLINE_S)
        finally:
            os.close(rank)
    assert ended == [rank]


def test_a_rank_that_is_killed_is_told_of(tmp_path: Path) -> None:
    with started_ranks([lonely_job(tmp_path)]) as running:
        assert running[0].process.pid is not None
        os.kill(running[0].process.pid, signal.SIGKILL)
        with pytest.raises(RanksFailed, match=r"rank 0 was killed by SIGKILL \(out of memory\?\)"):
            watch_ranks(running, lambda event: None)


def test_a_rank_that_fails_says_why_and_where_more_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of vLLM's name, found first by the rank, fails in vLLM's stead."""
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("print('printed')\nraise ValueError('it\\nfailed')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(SllmError) as caught:
        convert_model(ConvertRequest(model="some/model", store_dir=tmp_path / "store"))
    reason, _, log = str(caught.value).partition("; the whole story: ")
    assert reason == "some/model: rank 0 failed: ValueError: it failed"
    assert "printed" in Path(log).read_text()
    assert "Traceback" in Path(log).read_text()


@pytest.mark.parametrize("model", ["/nowhere", "./nowhere", "~/nowhere-at-all"])
def test_a_directory_that_is_not_there(tmp_path: Path, model: str) -> None:
    with pytest.raises(ConfigError, match="there is no such directory"):
        convert_model(ConvertRequest(model=model, store_dir=tmp_path))


def test_a_checkpoint_is_no_source(tmp_path: Path) -> None:
    (tmp_path / MANIFEST_NAME).touch()
    with pytest.raises(ConfigError, match="it is a checkpoint already"):
        convert_model(ConvertRequest(model=str(tmp_path), store_dir=tmp_path))


def test_out_that_holds_something_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "diary").touch()
    with pytest.raises(WriteError, match="it exists and is not empty"):
        convert_model(ConvertRequest(model="any/model", store_dir=tmp_path, out=tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_out_that_is_being_made_is_refused(tmp_path: Path) -> None:
    with workplace(tmp_path / "out", "converting"), pytest.raises(WriterBusy):
        convert_model(ConvertRequest(model="any/model", store_dir=tmp_path, out=tmp_path / "out"))
