"""What the estimator learned, through a file and back; and files that are none."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from sllm_vllm.router.core.estimator import Estimator
from sllm_vllm.router.core.facts import ModelSpec, PrefillSample, StartSample, Tier
from sllm_vllm.router.state import estimates as estimates_file
from sllm_vllm.router.state.estimates import read_estimates, write_record

SPEC = ModelSpec("meta/tiny")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "estimates.json"


def taught() -> Estimator:
    estimator = Estimator()
    for seconds in (1.0, 1.5, 2.0):
        estimator.observe_start(
            StartSample(SPEC.name, "local", True, Tier.DISK, 1 << 30, process_s=seconds, init_s=7.0, weights_s=3.0)
        )
    estimator.observe_prefill(PrefillSample(SPEC.name, "local", 100, 0.25))
    estimator.observe_stop(SPEC.name, "local", 0.5)
    return estimator


def test_what_was_learned_comes_back(path: Path) -> None:
    estimator = taught()
    write_record(path, estimator.to_record())
    found = read_estimates(path)
    assert found.to_record() == estimator.to_record()
    estimate = found.estimate_start(SPEC, "local", Tier.DISK, is_warm=True, prompt_tokens=100)
    assert estimate == estimator.estimate_start(SPEC, "local", Tier.DISK, is_warm=True, prompt_tokens=100)
    assert estimate.total_s != Estimator().estimate_start(SPEC, "local", Tier.DISK, is_warm=True).total_s


def test_the_file_is_its_users_alone_and_nothing_else_is_left(path: Path) -> None:
    path.write_text("old")
    path.chmod(0o644)
    write_record(path, taught().to_record())
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(path.parent.iterdir()) == [path]


def test_without_a_file_nothing_is_known_and_nothing_is_said(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert read_estimates(path).to_record() == Estimator().to_record()
    assert caplog.records == []


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"\xff", b"[" * 100_000, b"null", b"[]", b'{"version": 99, "tables": {}}', b'{"version": 1}'],
    ids=["empty", "broken", "bytes", "deep", "null", "list", "newer", "bare"],
)
def test_a_file_that_is_none_teaches_nothing(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    assert read_estimates(path).to_record() == Estimator().to_record()


def test_a_file_that_can_not_be_read_is_told_of(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path.mkdir()
    assert read_estimates(path).to_record() == Estimator().to_record()
    assert "event=estimates_lost" in caplog.text


def test_a_file_that_is_too_large_is_not_read(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_record(path, taught().to_record())
    monkeypatch.setattr(estimates_file, "NBYTES_MAX", 10)
    assert read_estimates(path).to_record() == Estimator().to_record()
    assert "larger than 10 bytes" in caplog.text


def test_a_write_that_fails_leaves_the_old_file(path: Path) -> None:
    write_record(path, taught().to_record())
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_record(path, {"tables": object()})
    assert (path.read_bytes(), list(path.parent.iterdir())) == (before, [path])


def test_what_a_process_left_half_written_is_replaced(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.getpid", lambda: 1)
    (path.parent / f"{path.name}.1").write_text("half")
    write_record(path, taught().to_record())
    assert json.loads(path.read_text())["version"] == 1


def test_a_folder_that_is_not_there_is_the_callers_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_record(tmp_path / "none" / "estimates.json", taught().to_record())
