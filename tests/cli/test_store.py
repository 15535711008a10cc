"""The commands `store …` against a scripted daemon: a thread with a real Unix socket and canned answers."""

from __future__ import annotations

import configparser
import contextlib
import itertools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from sllm_vllm.cli import main as cli
from sllm_vllm.config import StoreConfig
from sllm_vllm.store import calibrate
from sllm_vllm.store.calibrate import MeasurePlan, read_calibration
from sllm_vllm.store.protocol import Order, RefusedReply, StoreReply
from sllm_vllm.units import GIB, KIB, MIB
from tests.support.cases import every_case
from tests.support.scripted_daemon import EMPTY, STATUS, ScriptedDaemon

CONFIGS = Path(__file__).resolve().parents[2] / "configs"

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SLLM_STORE_DIR", str(tmp_path / "store"))
    monkeypatch.delenv("SLLM_STORE_SOCKET", raising=False)
    monkeypatch.setenv("COLUMNS", "100")
    (tmp_path / "store" / ".store").mkdir(parents=True)
    return tmp_path / "store"


@pytest.fixture
def daemon(store: Path) -> Iterator[ScriptedDaemon]:
    with contextlib.closing(ScriptedDaemon(store / ".store" / "socket")) as daemon:
        yield daemon


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Call the entry point in this process; returns exit code, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sllm-vllm", "store", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.run_command()
        captured = capsys.readouterr()
        code = caught.value.code
        return code if isinstance(code, int) else 0 if code is None else 1, captured.out, captured.err

    return call


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch, store: Path) -> list[StoreConfig]:
    """What `serve` hands to the daemon, which is none here."""
    configs: list[StoreConfig] = []

    def serve(config: StoreConfig) -> int:
        configs.append(config)
        return 0

    module = ModuleType("sllm_vllm.store.daemon")
    monkeypatch.setattr(module, "serve", serve, raising=False)
    monkeypatch.setitem(sys.modules, "sllm_vllm.store.daemon", module)
    return configs


def test_status_shows_names_whole(run: Run, daemon: ScriptedDaemon) -> None:
    daemon.answer = StoreReply(data=STATUS)
    code, out, err = run("status")
    assert (code, err) == (0, "")
    for expected in (
        "pid 4242",
        "up 2.0 h",
        "1 of 3 spans were in memory (33%)",
        "s3://bucket/x",
        "2.00 GB/s",
        "12.5 s",
    ):
        assert expected in out
    names = [re.escape(entry["name"]) for entry in STATUS["checkpoints"][:2]]
    assert all(re.search(rf"^{name} +[01] +140\.00 GiB +71%", out, re.MULTILINE) for name in names)
    assert re.search(r"^on-disk-alone +- +0 B +-  +DISK +0 +-", out, re.MULTILINE)
    assert re.search(r"^123456 .* 4194304  map +10000 +10000 +10000  3\.5 s", out, re.MULTILINE)
    assert daemon.orders == [Order(order="status")]


def test_status_of_an_idle_store(run: Run, daemon: ScriptedDaemon) -> None:
    daemon.answer = StoreReply(data=EMPTY)
    code, out, _ = run("status")
    assert code == 0
    assert "no checkpoints" in out
    assert "no leases" in out
    assert "0 of 0 spans were in memory (-)" in out


def test_status_as_json_is_what_the_daemon_says(run: Run, daemon: ScriptedDaemon) -> None:
    daemon.answer = StoreReply(data=STATUS)
    code, out, _ = run("status", "--json")
    assert (code, json.loads(out)) == (0, STATUS)


@pytest.mark.parametrize(
    ("arguments", "order", "told"),
    [
        (("prefetch", "m"), Order(order="prefetch", checkpoint="m"), "prefetching: m"),
        (("prefetch", "m", "--wait"), Order(order="prefetch", checkpoint="m", wait=True), "prefetched: m"),
        (("evict", "m"), Order(order="evict", checkpoint="m"), "evicted: m"),
        (("pin", "m"), Order(order="pin", checkpoint="m"), "pinned: m"),
        (("unpin", "m"), Order(order="unpin", checkpoint="m"), "unpinned: m"),
        (("stop",), Order(order="stop"), "stopping: SOCKET"),
    ],
)
def test_an_order_is_given(
    run: Run, daemon: ScriptedDaemon, arguments: tuple[str, ...], order: Order, told: str
) -> None:
    daemon.answer = StoreReply(data={"resident_nbytes": 3 * MIB})
    code, out, err = run(*arguments)
    expected = f"{told.replace('SOCKET', str(daemon.path))} (resident 3.00 MiB)\n"
    assert (code, out, err) == (0, expected, "")
    assert daemon.orders == [order]


def test_an_order_goes_to_the_socket_that_is_named(run: Run, daemon: ScriptedDaemon, tmp_path: Path) -> None:
    assert run("pin", "m", "--store-dir", tmp_path / "elsewhere")[0] == 1
    assert run("pin", "m", "--store-dir", tmp_path / "elsewhere", "--socket", daemon.path)[0] == 0
    assert len(daemon.orders) == 1


def test_a_refused_order_is_one_line(run: Run, daemon: ScriptedDaemon) -> None:
    daemon.answer = RefusedReply(error="CheckpointMissing", path="/s/m", problem="there is none", mend="convert it")
    assert run("prefetch", "m") == (1, "", "sllm-vllm: /s/m: there is none; convert it\n")


def test_without_a_daemon_an_order_fails_in_one_line(run: Run, store: Path) -> None:
    code, out, err = run("status")
    assert (code, out) == (1, "")
    assert err.startswith(f"sllm-vllm: {store}/.store/socket: no daemon of the store: ")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("name", ["", "x" * 5000, "a\nb", "a\udc80"])
def test_a_name_that_can_be_none_is_wrong_usage(run: Run, daemon: ScriptedDaemon, name: str) -> None:
    code, _, err = run("pin", name)
    assert (code, len(err.splitlines())) == (2, 1)
    assert daemon.orders == []


def test_serve_hands_its_options_to_the_daemon(run: Run, served: list[StoreConfig], tmp_path: Path) -> None:
    options = "--memory 1GiB --disk 200GB --slot-size 4MiB --remote s3://a --remote hf://b --policy lru --readers 2"
    more = "--writers 3 --downloads 4 --no-prefault --no-pause-fills --metrics-port 0"
    paths = ("--store-dir", tmp_path, "--socket", tmp_path / "s")
    assert run("serve", *options.split(), *more.split(), *paths) == (0, "", "")
    assert served == [
        StoreConfig(
            store_dir=tmp_path,
            socket=tmp_path / "s",
            memory_bytes=GIB,
            disk_bytes=200 * 10**9,
            slot_bytes=4 * MIB,
            remotes=("s3://a", "hf://b"),
            policy="lru",
            readers=2,
            writers=3,
            downloads=4,
            prefault=False,
            pause_fills=False,
            metrics_port=0,
        )
    ]


def test_serve_without_options_uses_the_defaults(run: Run, served: list[StoreConfig], store: Path) -> None:
    assert run("serve")[0] == 0
    assert served == [StoreConfig(store_dir=store)]


def test_serve_takes_a_file_and_options_override_it(run: Run, served: list[StoreConfig], tmp_path: Path) -> None:
    file = tmp_path / "store.json"
    file.write_text(json.dumps({"memory_bytes": "1GiB", "policy": "lru", "prefault": False, "stall_s": 7}))
    assert run("serve", "--config", file, "--policy", "cost", "--store-dir", tmp_path)[0] == 0
    assert served == [StoreConfig(store_dir=tmp_path, memory_bytes=GIB, prefault=False, stall_s=7)]


@every_case(
    "arguments, said",
    [
        (("--memory", "much"), "'much' is not a number of bytes"),
        (("--memory", "1KiB"), "--memory: must be at least 2097152"),
        (("--memory", "9" * 400), "sllm-vllm: "),
        (("--memory", "2MiB"), "are less than one slot"),
        (("--slot-size", "5000"), "--slot-size: "),
        (("--policy", "fifo"), "--policy: must be "),
        (("--readers", "0"), "--readers: must be at least 1"),
        (("--metrics-port", "70000"), "--metrics-port: must be at most 65535"),
        (("--config", "/nowhere.json"), "/nowhere.json: No such file"),
    ],
)
def test_a_wrong_setting_is_one_line_and_exit_code_2(
    run: Run, served: list[StoreConfig], arguments: tuple[str, ...], said: str
) -> None:
    code, out, err = run("serve", *arguments)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert said in err
    assert served == []


@pytest.mark.parametrize("content", ["{", "[]", '{"memory": 1}', '{"memory_bytes": {}}', "[" * 100_000])
def test_a_wrong_file_is_one_line_and_exit_code_2(
    run: Run, served: list[StoreConfig], tmp_path: Path, content: str
) -> None:
    file = tmp_path / "store.json"
    file.write_text(content)
    code, out, err = run("serve", "--config", file)
    assert (code, out, len(err.splitlines()), served) == (2, "", 1, [])


def test_calibrate_says_what_it_chose_and_that_a_daemon_disturbs(
    run: Run, daemon: ScriptedDaemon, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def small_plan() -> MeasurePlan:
        chunks = {"read_chunks": (4 * KIB,), "write_chunk": 4 * KIB}
        return MeasurePlan(sample_nbytes=64 * KIB, read_depths=(1, 2), write_depths=(1,), **chunks)  # type: ignore[arg-type]

    monkeypatch.setattr(calibrate, "MeasurePlan", small_plan)
    code, out, err = run("calibrate")
    kept = read_calibration(store / ".store")
    assert kept is not None
    assert (code, err.count("\n")) == (0, 1)
    assert "distort" in err
    assert out.splitlines()[0].startswith("read: a temporary file")
    assert out.splitlines()[-1] == f"chosen: readers {kept.readers}, writers {kept.writers}"
    assert len(re.findall(r"^(read|write) .* GB/s +\d+%", out, re.MULTILINE)) == 3


def test_calibrate_refuses_a_file_that_is_too_small(run: Run, store: Path, tmp_path: Path) -> None:
    (tmp_path / "small").write_bytes(b"x")
    code, _, err = run("calibrate", "--file", tmp_path / "small")
    assert (code, len(err.splitlines())) == (1, 1)
    assert "must be a file of at least" in err


def options_of(text: str) -> set[str]:
    return set(re.findall(r"--[a-z][a-z-]+", text))


@pytest.fixture(scope="module")
def unit() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, strict=False, delimiters=("=",))
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read_string((CONFIGS / "sllm-store.service").read_text())
    return parser


def test_the_unit_s_command_is_one_that_serve_knows(run: Run, unit: configparser.ConfigParser) -> None:
    command = unit["Service"]["ExecStart"]
    assert command.split()[1:3] == ["store", "serve"]
    _, out, _ = run("serve", "--help")
    assert options_of(command)
    assert options_of(command) <= options_of(out)


def test_the_unit_lets_the_daemon_have_its_pool(unit: configparser.ConfigParser) -> None:
    """It mounts a tmpfs in a namespace of its own, and locks memory."""
    service = unit["Service"]
    assert {"user", "mnt"} <= set(service["RestrictNamespaces"].split())
    assert service["LimitMEMLOCK"] == "infinity"
    assert service["KillMode"] == "mixed"


def test_the_unit_is_one_that_systemd_understands(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze here")
    text = (CONFIGS / "sllm-store.service").read_text()
    unit = tmp_path / "sllm-store.service"
    unit.write_text(re.sub(r"(?m)^(Exec\w+=)\S+", rf"\1{sys.executable}", text))  # it must be there
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    assert [line for line in done.stderr.splitlines() if "sllm-store" in line] == []


def test_the_example_file_is_one_that_serve_takes(run: Run, served: list[StoreConfig]) -> None:
    assert run("serve", "--config", CONFIGS / "sllm-store.json") == (0, "", "")
    assert set(json.loads((CONFIGS / "sllm-store.json").read_text())) <= set(StoreConfig.model_fields)
    assert served[0].memory_bytes == 16 * GIB


def test_help_loads_nothing_that_takes_long() -> None:
    names = ["serve", "status", "prefetch", "evict", "pin", "unpin", "stop", "calibrate"]
    script = (
        "import sys; from sllm_vllm.cli.main import main\ntry: main()\nfinally: print(*sys.modules, file=sys.stderr)"
    )
    command = [sys.executable, "-c", script, "store", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert {"torch", "numpy", "prometheus_client", "sllm_vllm.config"} & set(done.stderr.split()) == set()
    assert all(name in done.stdout for name in itertools.chain(names, ["--help"]))
