"""The command line: what it prints, its exit codes, and that it is quick to say what it can do."""

from __future__ import annotations

import functools
import io
import json
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sllm_vllm.checkpoint.core.layout import TensorSpec
from sllm_vllm.checkpoint.core.manifest import MANIFEST_NAME, Layout, Source
from sllm_vllm.checkpoint.reader import Checkpoint, open_checkpoint
from sllm_vllm.checkpoint.repository import CheckpointKey, CheckpointRepository
from sllm_vllm.checkpoint.writer import write_partition
from sllm_vllm.cli import main as cli
from sllm_vllm.config import CHUNK_NBYTES_DEFAULT
from sllm_vllm.convert import parent as conversion
from sllm_vllm.convert.parent import BytesDone, Converted, ConvertRequest, Event, StageBegun
from sllm_vllm.loader.limits import LIMITS_NAME
from sllm_vllm.units import KIB
from tests.conftest import ModelDir
from tests.support.cases import every_case
from tests.support.vllm_server import vllm_server
from tests.support.waiting import DEADLINE_S

SCRIPT = Path(sys.executable).with_name("sllm-vllm")

Run = Callable[..., tuple[int, str, str]]


class Bytes:
    """A tensor to write, without torch."""

    def __init__(self, name: str, content: bytes) -> None:
        self.spec = TensorSpec(name, "uint8", (len(content),), 1, len(content))
        self._content = content

    def pieces(self, nbytes_max: int) -> Iterator[memoryview]:
        for start in range(0, len(self._content), nbytes_max):
            yield memoryview(self._content)[start : start + nbytes_max]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SLLM_STORE_DIR", str(tmp_path / "store"))
    return tmp_path / "store"


@pytest.fixture
def checkpoint(store: Path) -> Checkpoint:
    """Two partitions of one small and one large tensor each."""
    layout = Layout(
        model_class="vllm.model_executor.models.llama.LlamaForCausalLM",
        dtype="bfloat16",
        tensor_parallel_size=2,
        num_partitions=2,
        device_type="cpu",
        vllm_version="1.2.3",
        config_digest="0",
    )
    key = CheckpointKey(Source(model="/models/tiny", fingerprint="f"), layout)
    staging = CheckpointRepository(store).stage(key, 4 * KIB)
    for rank in range(2):
        tensors = [Bytes("large", bytes(range(256)) * 64), Bytes("small", b"abc")]
        staging.commit(write_partition(staging.path, rank, tensors, chunk_nbytes=4 * KIB))
    assert staging.publish()
    return open_checkpoint(staging.target)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Call the entry point in this process; returns exit code, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sllm-vllm", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.run_command()
        captured = capsys.readouterr()
        code = caught.value.code
        return code if isinstance(code, int) else 0 if code is None else 1, captured.out, captured.err

    return call


def flip_bit(file: Path, offset: int) -> None:
    raw = bytearray(file.read_bytes())
    raw[offset] ^= 1
    file.write_bytes(raw)


def modules_after(*arguments: str) -> set[str]:
    """What a run of the command has imported, in the end."""
    command = f"import sys; sys.argv[1:] = {arguments!r}; from sllm_vllm.cli import main as cli"
    script = f"{command}\ntry: cli.main()\nfinally: print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout
    return set(done.stderr.split())


def test_help_loads_neither_torch_nor_vllm() -> None:
    assert {"torch", "vllm", "numpy", "pydantic"} & modules_after("--help") == set()


@pytest.mark.parametrize("command", ["list", "inspect", "verify"])
def test_what_reads_only_the_disk_loads_neither_torch_nor_vllm(checkpoint: Checkpoint, command: str) -> None:
    arguments = [command] if command == "list" else [command, str(checkpoint.path)]
    assert {"torch", "vllm"} & modules_after(*arguments) == set()


@every_case(
    "arguments",
    [
        ("convert",),
        ("convert", "model", "--chunk-bytes", "5000"),
        ("convert", "model", "--tensor-parallel-size", "0"),
        ("export", "x", "--to", "gguf", "--out", "y"),
        ("verify", "--fast", "x"),
    ],
)
def test_wrong_usage_is_exit_code_2(run: Run, arguments: tuple[str, ...]) -> None:
    code, _, err = run(*arguments)
    assert code == 2
    assert "Usage:" in err


def test_inspect_as_json(run: Run, checkpoint: Checkpoint) -> None:
    code, out, _ = run("inspect", checkpoint.path.name, "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["path"] == str(checkpoint.path)
    assert facts["source"]["model"] == "/models/tiny"
    assert facts["layout"]["tensor_parallel_size"] == 2
    assert facts["nbytes"] == checkpoint.manifest.nbytes
    assert [partition["tensors"] for partition in facts["partitions"]] == [2, 2]
    assert facts["dtypes"] == [{"dtype": "uint8", "tensors": 4, "nbytes": 2 * (256 * 64 + 3)}]
    assert [(tensor["rank"], tensor["name"]) for tensor in facts["largest_tensors"]] == [
        (0, "large"),
        (1, "large"),
        (0, "small"),
        (1, "small"),
    ]


def test_inspect_for_people_takes_a_directory(run: Run, checkpoint: Checkpoint) -> None:
    code, out, _ = run("inspect", checkpoint.path)
    assert code == 0
    for expected in ("/models/tiny", "LlamaForCausalLM", "partitions/rank-00001.safetensors", "16.00 KiB", "large"):
        assert expected in out


def test_verify_tells_bytes_and_rate(run: Run, checkpoint: Checkpoint) -> None:
    code, out, _ = run("verify", checkpoint.path.name)
    assert code == 0
    assert re.fullmatch(rf"sound: {re.escape(str(checkpoint.path))} \(\S+ KiB, \S+ GB/s\)\n", out)


def test_verify_names_the_tensors_of_the_first_bad_chunk(run: Run, checkpoint: Checkpoint) -> None:
    record = checkpoint.manifest.partitions[1]
    flip_bit(checkpoint.path / record.path, record.header_nbytes + 256 * 64)
    code, out, err = run("verify", checkpoint.path)
    assert (code, out) == (1, "")
    assert len(err.splitlines()) == 1
    assert re.search(r"rank-00001\.safetensors: chunk 4 differs from its checksum \(tensors: '?small'?\)", err)


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_a_missing_checkpoint_is_one_line(run: Run, store: Path, command: str) -> None:
    code, out, err = run(command, "nothing")
    assert (code, out) == (1, "")
    assert err.startswith(f"sllm-vllm: {store}/nothing: ")
    assert len(err.splitlines()) == 1


def test_list_shows_broken_checkpoints_too(run: Run, checkpoint: Checkpoint, store: Path) -> None:
    (store / "broken").mkdir()
    (store / "broken" / MANIFEST_NAME).write_text("{")
    code, out, _ = run("list", "--json")
    broken, sound = json.loads(out)
    assert code == 0
    assert (broken["name"], sound["name"]) == ("broken", checkpoint.path.name)
    assert "not valid JSON" in broken["error"]
    assert (sound["error"], sound["nbytes"]) == (None, checkpoint.manifest.nbytes)
    _, out, _ = run("list")
    assert re.search(r"^broken .*  broken: .*not valid JSON", out, re.MULTILINE)
    told = r"\S+ KiB  bfloat16 tp=2 vllm=1.2.3 +\S+ s  never +/models/tiny$"
    assert re.search(rf"^{checkpoint.path.name} +{told}", out, re.MULTILINE)
    assert re.search(r"^2 checkpoints, \S+ KiB$", out, re.MULTILINE)


def test_list_tells_when_a_checkpoint_was_used(run: Run, checkpoint: Checkpoint, store: Path) -> None:
    CheckpointRepository(store).note_use(checkpoint.path.name)
    _, out, _ = run("list", "--json")
    (entry,) = json.loads(out)
    assert 0 <= entry["unused_s"] <= entry["age_s"] + 1 < 600
    assert re.search(r"  \S+ s ago  ", run("list")[1])


def test_prune_asks_first_and_says_why(run: Run, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    name = checkpoint.path.name
    _, out, _ = run("prune", "--dry-run")
    assert re.search(rf"^{name} .* it is for vLLM 1.2.3, installed is ", out, re.MULTILINE)
    assert "would be removed: 1 checkpoints (" in out
    monkeypatch.setattr(sys, "stdin", io.StringIO("n\n"))
    assert run("prune")[0] == 1
    assert checkpoint.path.exists()
    code, out, _ = run("prune", "--yes", "--json")
    assert (code, [item["name"] for item in json.loads(out)["checkpoints"]]) == (0, [name])
    assert not checkpoint.path.exists()
    assert run("prune", "--yes")[1] == "removed: 0 checkpoints (0 B)\n"


def test_list_sees_that_a_partition_is_missing(run: Run, checkpoint: Checkpoint) -> None:
    (checkpoint.path / checkpoint.manifest.partitions[0].path).unlink()
    _, out, _ = run("list", "--json")
    assert "rank-00000.safetensors: there is no such file" in json.loads(out)[0]["error"]


def test_list_of_an_empty_store(run: Run, store: Path) -> None:
    assert run("list") == (0, f"no checkpoints in {store}\n", "")
    assert run("list", "--json") == (0, "[]\n", "")


def test_rm_asks_first(run: Run, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("n\ny\n"))
    code, _, _ = run("rm", checkpoint.path.name)
    assert code == 1
    assert checkpoint.path.exists()
    code, out, _ = run("rm", checkpoint.path.name)
    assert code == 0
    assert f"removed: {checkpoint.path.name} (" in out
    assert not checkpoint.path.exists()


def test_rm_removes_a_broken_checkpoint(run: Run, store: Path) -> None:
    (store / "broken").mkdir(parents=True)
    (store / "broken" / MANIFEST_NAME).write_text("{")
    assert run("rm", "broken", "--yes")[0] == 0
    assert not (store / "broken").exists()


def test_rm_of_nothing_is_one_line(run: Run, store: Path) -> None:
    code, _, err = run("rm", "nothing", "--yes", "--store-dir", store)
    assert code == 1
    assert err == f"sllm-vllm: {store}/nothing: there is no such checkpoint; see `sllm-vllm list`\n"


@pytest.mark.parametrize("command", ["rm", "inspect", "verify"])
def test_a_name_that_is_spelled_wrongly_is_answered_with_the_nearest(
    run: Run, checkpoint: Checkpoint, command: str
) -> None:
    """Before anything is asked."""
    code, out, err = run(command, checkpoint.path.name.replace("tiny", "tinny"))
    assert (code, out) == (1, "")
    assert err.endswith(f": there is no such checkpoint; did you mean {checkpoint.path.name}?\n")


def test_rm_where_nobody_can_answer(run: Run, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    code, _, err = run("rm", checkpoint.path.name)
    assert (code, "--yes" in err) == (2, True)
    assert checkpoint.path.exists()


def test_export_of_two_ranks_says_why_not(run: Run, checkpoint: Checkpoint, tmp_path: Path) -> None:
    (checkpoint.path / "config.json").write_text("{}")
    code, out, err = run("export", checkpoint.path, "--to", "safetensors", "--out", tmp_path / "out")
    assert (code, out) == (1, "")
    assert "it is sharded over 2 ranks" in err
    assert len(err.splitlines()) == 1


def test_the_system_s_own_errors_are_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(root: Path) -> None:
        raise PermissionError(13, "Permission denied", "/secret")

    monkeypatch.setattr(cli, "_repository", refuse)
    assert run("list") == (1, "", "sllm-vllm: /secret: Permission denied\n")


def test_convert_of_nothing_is_one_line(run: Run, store: Path) -> None:
    code, out, err = run("convert", "/nowhere")
    assert (code, out) == (1, "")
    assert err == "sllm-vllm: /nowhere: there is no such directory; give a model's directory or its name on the Hub\n"


@pytest.mark.parametrize(
    ("options", "serve"),
    [
        ((), "vllm serve some/model --load-format sllm"),
        (
            ("--tensor-parallel-size", 2, "--dtype", "float16", "--quantization", "fp8", "--trust-remote-code"),
            "vllm serve some/model --load-format sllm --tensor-parallel-size 2 --dtype float16 --quantization fp8 "
            "--trust-remote-code",
        ),
        (
            ("--revision", "main", "--store-dir", "/elsewhere"),
            "vllm serve some/model --load-format sllm --revision main "
            """--model-loader-extra-config '{"store_dir": "/elsewhere"}'""",
        ),
        (("--out", "/a/model", "--revision", "main"), "vllm serve PATH --load-format sllm"),
    ],
)
def test_convert_says_how_to_serve(
    run: Run, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], serve: str
) -> None:
    requests: list[ConvertRequest] = []

    def convert(request: ConvertRequest, on_event: Callable[[Event], None]) -> Converted:
        requests.append(request)
        for rank in range(request.tensor_parallel_size):
            on_event(StageBegun(rank, "read", None))
            on_event(BytesDone(rank, 10))
        return Converted(checkpoint.path, ("written",), None if request.dtype == "auto" else request.dtype)

    monkeypatch.setattr(conversion, "convert_model", convert)
    code, out, err = run("convert", "some/model", *options, "--chunk-bytes", 8192)
    assert (code, err) == (0, "")
    assert out.splitlines()[0].startswith(f"converted: {checkpoint.path} (")
    assert out.splitlines()[1] == f"to serve it: {serve.replace('PATH', str(checkpoint.path))}"
    assert (requests[0].model, requests[0].chunk_nbytes) == ("some/model", 8192)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_convert_ends_its_ranks_when_it_is_told_to(tmp_path: Path, number: signal.Signals, code: int) -> None:
    """The rank is held where it imports vLLM, by a module of that name which never returns."""
    (tmp_path / "model").mkdir()
    (tmp_path / "vllm").mkdir()
    os.mkfifo(tmp_path / "rank")
    (tmp_path / "vllm" / "__init__.py").write_text(
        f"import os, signal\nopen({str(tmp_path / 'rank')!r}, 'w').write(str(os.getpid()))\nsignal.pause()\n"
    )
    (tmp_path / "tmp").mkdir()
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "TMPDIR": str(tmp_path / "tmp")}
    command: list[str | Path] = [SCRIPT, "convert", tmp_path / "model", "--store-dir", tmp_path / "store"]
    # A shell gives what it runs in the background an ignored SIGINT, which children inherit.
    heeding = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, preexec_fn=heeding)
    rank = os.pidfd_open(int((tmp_path / "rank").read_text()))
    try:
        process.send_signal(number)
        _, err = process.communicate(timeout=DEADLINE_S)
        ended, _, _ = select.select([rank], [], [], DEADLINE_S)
    finally:
        os.close(rank)
    assert (process.returncode, ended) == (code, [rank])
    assert "Traceback" not in err
    assert list((tmp_path / "tmp").iterdir()) == []


def sllm_vllm(*arguments: object) -> str:
    done = subprocess.run([SCRIPT, *map(str, arguments)], capture_output=True, text=True, check=True)
    return str(done.stdout)


@pytest.mark.e2e_long
def test_convert_verify_export_and_convert_back(model_dir: ModelDir, tmp_path: Path) -> None:
    """A whole round as a user makes it: what comes back has the same tensors, byte for byte."""
    first, second, third = tmp_path / "first", tmp_path / "second", tmp_path / "third"
    told = sllm_vllm("convert", model_dir(), "--out", first)
    assert re.search(rf"^converted: {first} \(\S+ MiB\)$", told, re.MULTILINE)
    assert sllm_vllm("convert", model_dir(), "--out", first).startswith(f"already converted: {first} (")
    assert sllm_vllm("verify", first).startswith("sound: ")
    assert "39 tensors" in sllm_vllm("export", first, "--to", "tensorizer", "--out", second)
    sllm_vllm("convert", second, "--out", third)
    ours, theirs = (directory / "partitions" / "rank-00000.safetensors" for directory in (first, third))
    assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.e2e_long
def test_vllm_serves_what_was_converted(model_dir: ModelDir, tmp_path: Path) -> None:
    """The same greedy tokens from a directory without the source's weights as from the source."""
    out = tmp_path / "out"
    sllm_vllm("convert", model_dir("qwen3"), "--out", out)
    assert not list(out.glob("*.safetensors"))
    report = tmp_path / "report.json"
    extra = json.dumps({"store_dir": str(tmp_path / "store"), "report_path": str(report)})
    with vllm_server(out, tmp_path, "--load-format", "sllm", "--model-loader-extra-config", extra) as ours:
        tokens = ours.tokens("a b c", temperature=0)
    facts = json.loads(report.read_text())
    assert (facts["outcome"], facts["checkpoint"]) == ("loaded", str(out))
    with vllm_server(model_dir("qwen3"), tmp_path) as stock:
        assert tokens == stock.tokens("a b c", temperature=0)


def test_calibrate_measures_every_hop_and_keeps_it_for_the_store(run: Run, checkpoint: Checkpoint, store: Path) -> None:
    staging = CheckpointRepository(store).stage(
        CheckpointKey(Source(model="large", fingerprint="f"), checkpoint.manifest.layout), CHUNK_NBYTES_DEFAULT
    )
    for rank in range(2):
        tensors = [Bytes("weight", bytes(CHUNK_NBYTES_DEFAULT))]
        staging.commit(write_partition(staging.path, rank, tensors, chunk_nbytes=CHUNK_NBYTES_DEFAULT))
    staging.publish()
    code, out, _ = run("calibrate", staging.target)
    assert code == 0
    assert {"read_disk", "read_cache", "verify"} <= set(out.split())
    assert (store / LIMITS_NAME).exists()


def test_calibrate_refuses_what_is_smaller_than_a_chunk(run: Run, checkpoint: Checkpoint) -> None:
    code, _, err = run("calibrate", checkpoint.path)
    assert code == 1
    assert "smaller than a chunk" in err
