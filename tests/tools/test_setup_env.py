"""tools/setup_env.py: the wheels it writes, the metadata it mends, and what it does with an environment it finds."""

from __future__ import annotations

import csv
import sys
import zipfile
from pathlib import Path

import pytest

from tools import setup_env

WRONG, RIGHT = "cp312-cp312-linux_x86_64", "cp38-abi3-manylinux_2_28_x86_64"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project of one locked package, whose set-up has one step: it writes a file into `.venv`."""
    (tmp_path / "lock").write_text("some-package==1.2 ; sys_platform == 'linux'\nother==3\n")
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "x"\n[build-system]\nrequires = []\n')
    venv = tmp_path / ".venv"
    monkeypatch.setattr(setup_env, "ROOT", tmp_path)
    monkeypatch.setattr(setup_env, "LOCK", tmp_path / "lock")
    monkeypatch.setattr(setup_env, "PYPROJECT", tmp_path / "pyproject.toml")
    monkeypatch.setattr(setup_env, "VENV", venv)
    monkeypatch.setattr(setup_env, "PYTHON", venv / "bin" / "python")
    monkeypatch.setattr(setup_env, "READY", venv / ".ready")
    monkeypatch.setattr(setup_env, "UNFINISHED", venv / ".unfinished")
    monkeypatch.setattr(setup_env, "STEPS", (("step", lambda: (venv / "made").touch()),))
    return tmp_path


def installed(folder: Path, tag: str) -> Path:
    """A `.dist-info` as an installer leaves it."""
    wheel = setup_env.write_metadata_wheel(folder, "thing", "1.0")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    info = folder / "thing-1.0.dist-info"
    (info / "WHEEL").write_text((info / "WHEEL").read_text().replace("py3-none-any", tag))
    return info


def test_metadata_wheel_holds_metadata_alone_and_a_true_record(tmp_path: Path) -> None:
    wheel = setup_env.write_metadata_wheel(tmp_path, "thing", "1.0+none", requires=["other==2"])
    with zipfile.ZipFile(wheel) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    info = "thing-1.0+none.dist-info"
    assert set(files) == {f"{info}/METADATA", f"{info}/WHEEL", f"{info}/RECORD"}
    assert b"Requires-Dist: other==2\n" in files[f"{info}/METADATA"]
    for name, *digest in csv.reader(files[f"{info}/RECORD"].decode().splitlines()):
        assert tuple(digest) == (("", "") if name.endswith("RECORD") else setup_env.digest(files[name]))


def test_wrong_tag_is_mended_with_its_record(tmp_path: Path) -> None:
    info = installed(tmp_path, WRONG)
    assert setup_env.mend_wheel_tag(info, WRONG, RIGHT)
    assert f"Tag: {RIGHT}\n" in (info / "WHEEL").read_text()
    rows = {name: tuple(digest) for name, *digest in csv.reader((info / "RECORD").read_text().splitlines())}
    assert rows["thing-1.0.dist-info/WHEEL"] == setup_env.digest((info / "WHEEL").read_bytes())
    assert len(rows) == 3


def test_right_tag_is_left_alone(tmp_path: Path) -> None:
    info = installed(tmp_path, RIGHT)
    before = (info / "WHEEL").stat().st_mtime_ns
    assert not setup_env.mend_wheel_tag(info, WRONG, RIGHT)
    assert (info / "WHEEL").stat().st_mtime_ns == before


def test_mending_leaves_a_hard_linked_cache_alone(tmp_path: Path) -> None:
    info = installed(tmp_path, WRONG)
    (tmp_path / "cached").hardlink_to(info / "WHEEL")
    setup_env.mend_wheel_tag(info, WRONG, RIGHT)
    assert WRONG in (tmp_path / "cached").read_text()


def test_pinned_reads_the_version_without_its_marker(root: Path) -> None:
    assert setup_env.pinned("some-package") == "1.2"
    with pytest.raises(setup_env.SetupError, match="no line for absent"):
        setup_env.pinned("absent")


def test_second_set_up_does_nothing(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup_env.set_up()
    (root / ".venv" / "made").unlink()
    capsys.readouterr()
    setup_env.set_up()
    assert capsys.readouterr().out == ""
    assert not (root / ".venv" / "made").exists()


def test_interrupted_set_up_starts_from_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        (root / ".venv" / "half").touch()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(setup_env, "STEPS", (("broken off", interrupt),))
        assert setup_env.main([]) == 130
    assert not (root / ".venv" / ".ready").exists()
    assert setup_env.main([]) == 0
    assert not (root / ".venv" / "half").exists()
    assert not (root / ".venv" / ".unfinished").exists()


def test_changed_project_updates_in_place(root: Path) -> None:
    setup_env.set_up()
    (root / ".venv" / "kept").touch()
    (root / "pyproject.toml").write_text('[project]\nname = "y"\n[build-system]\nrequires = []\n')
    (root / ".venv" / "made").unlink()
    setup_env.set_up()
    assert (root / ".venv" / "made").exists()
    assert (root / ".venv" / "kept").exists()


def test_changed_lock_rebuilds(root: Path) -> None:
    setup_env.set_up()
    (root / ".venv" / "stale").touch()
    (root / "lock").write_text("other==4\n")
    setup_env.set_up()
    assert not (root / ".venv" / "stale").exists()


def test_environment_of_someone_else_is_not_touched(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / ".venv" / "bin").mkdir(parents=True)
    assert setup_env.main([]) == 1
    assert "did not make" in capsys.readouterr().err
    assert [path.name for path in (root / ".venv").iterdir()] == ["bin"]


def test_second_way_is_tried_when_the_first_fails() -> None:
    def fail() -> None:
        raise setup_env.SetupError("first said this")

    done: list[str] = []
    setup_env.either(fail, lambda: done.append("second"), failure="neither")
    assert done == ["second"]
    with pytest.raises(setup_env.SetupError, match=r"neither\n  first said this\n  first said this"):
        setup_env.either(fail, fail, failure="neither")


def test_failed_command_shows_its_last_lines() -> None:
    script = "import sys; print('\\n'.join(map(str, range(99)))); sys.exit(3)"
    with pytest.raises(setup_env.SetupError, match="ended with status 3") as caught:
        setup_env.run([sys.executable, "-c", script], "counting")
    assert str(caught.value).splitlines()[-1].strip() == "98"
    assert len(str(caught.value).splitlines()) == 1 + setup_env.OUTPUT_LINES_MAX
