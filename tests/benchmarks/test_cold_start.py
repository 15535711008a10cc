"""The cold-start benchmark without an engine: phases, rows, verdicts, tables, lines of JSON, pictures, arguments."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from benchmarks.cold_start import __main__ as cold_start
from benchmarks.cold_start import cycles as cold_start_cycles
from benchmarks.cold_start.cycles import Cycle, cycles_table_of, cycles_verdict, growth_of
from benchmarks.cold_start.engine import ENGINE_ARGUMENTS, LogFollower, session_cpu_s
from benchmarks.cold_start.memory import Memory, memory_table_of
from benchmarks.cold_start.plot import COLORS, draw, groups_of, merged, read_lines, title_of
from benchmarks.cold_start.report import (
    FIRST_TOKEN,
    PHASE_NAMES,
    REST,
    WAYS,
    Case,
    Start,
    Tier,
    Tokens,
    Way,
    phases_of,
    phases_table_of,
    rows_of,
    table_of,
    verdicts_of,
    ways_in_turn,
)
from benchmarks.cold_start.run import files_of
from benchmarks.common.machine import machine
from sllm_vllm.node.core.phases import StartPhase
from sllm_vllm.units import MIB
from tests.support.cases import every_case

TOKENS: Tokens = (((1, 2), (3, 4)),)
LLAMA = Case("llama", "tiny", "disk warm")


def start(way: Way, first_token_s: float, *, case: Case = LLAMA, tokens: Tokens = TOKENS, number: int = 1) -> Start:
    healthy_s = first_token_s - 0.1
    return Start(
        case=case,
        way=way,
        round=number,
        healthy_s=healthy_s,
        first_token_s=first_token_s,
        phases=phases_of({"imports": healthy_s / 2, "workers": healthy_s / 4}, healthy_s, first_token_s),
        disturbance=0.01 * number,
        tokens=tokens,
        load={"outcome": "loaded"} if way != "stock" else {},
    )


def starts(*, stock: float = 20.0, warm: float = 1.0) -> list[Start]:
    """Three rounds, each way a little faster and slower than its middle."""
    middles: dict[Way, float] = {"stock": stock, "cold": 18.0, "warm": warm}
    return [
        start(way, middles[way] * (1 + delta), number=number)
        for number, delta in ((1, 0.05), (2, -0.05), (3, 0.0))
        for way in ways_in_turn(WAYS, number)
    ]


def printed(table: Table) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


# ------------------------------------------------------------------------------------------------------------ phases


def test_phases_add_up_to_the_first_token() -> None:
    phases = phases_of({"process": 0.1, "imports": 10.0, "ready": 0.0}, 12.0, 12.5)
    assert phases == pytest.approx({"process": 0.1, "imports": 10.0, REST: 1.9, FIRST_TOKEN: 0.5})
    assert sum(phases.values()) == pytest.approx(12.5)


def test_phases_that_claim_more_than_there_was_leave_no_negative_rest() -> None:
    phases = phases_of({"imports": 12.2}, 12.0, 12.5)
    assert phases == pytest.approx({"imports": 12.2, REST: 0.0, FIRST_TOKEN: 0.3})


def test_every_phase_of_a_start_has_a_name_and_a_colour() -> None:
    assert set(PHASE_NAMES) == {phase.name.lower() for phase in StartPhase} - {"ready"} | {REST, FIRST_TOKEN}
    assert set(COLORS) == set(PHASE_NAMES)


def test_log_that_grows_is_split_into_phases(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("INFO something\n")
    follower = LogFollower(log, 0.0)
    follower.read()
    with log.open("a") as file:
        file.write("INFO Initializing a V1 LLM engi")
        file.flush()
        follower.read()
        assert follower.phases.phase is StartPhase.IMPORTS  # the line is not whole yet
        file.write("ne\n3 %\rStarting to load model x\n")
    follower.read()
    assert set(follower.finish(1e9)) == {"process", "imports", "workers", "weights"}


# -------------------------------------------------------------------------------------------------- rounds and rows


def test_each_way_is_first_in_its_turn() -> None:
    assert [ways_in_turn(WAYS, number)[0] for number in (1, 2, 3, 4)] == ["stock", "cold", "warm", "stock"]
    assert all(sorted(ways_in_turn(WAYS, number)) == sorted(WAYS) for number in (1, 2, 3))


def test_row_has_the_spread_of_each_way_and_the_ratio_of_the_medians() -> None:
    (row,) = rows_of(starts())
    assert list(row.cells) == list(WAYS)
    stock, warm = row.cells["stock"].first_token, row.cells["warm"].first_token
    assert (stock.min_s, stock.median_s, stock.max_s) == (19.0, 20.0, 21.0)
    assert (warm.median_s, row.cells["warm"].rounds, row.cells["warm"].disturbance) == (1.0, 3, 0.03)
    assert row.ratio == 20.0


def test_row_without_a_stock_start_has_no_ratio() -> None:
    (row,) = rows_of([start("warm", 1.0, case=Case("llama", "tiny", "store"))])
    assert row.ratio is None
    assert "store" in printed(table_of([row]))


def test_cases_are_rows_of_their_own() -> None:
    tiers: tuple[Tier, ...] = ("disk warm", "disk cold")
    rows = rows_of([start("warm", 1.0, case=Case("opt", "tiny", tier)) for tier in tiers])
    assert [row.case.tier for row in rows] == list(tiers)


def test_tables_tell_medians_and_spread() -> None:
    rows = rows_of(starts())
    text = printed(table_of(rows))
    assert "llama tiny, disk warm" in text
    assert "20.0 [19.0–21.0]" in text
    assert "1.00 [0.95–1.05]" in text
    phases = printed(phases_table_of(rows))
    assert "importing" in phases
    assert "9.95" in phases  # half of stock's 19.9 s to healthy


# ---------------------------------------------------------------------------------------------------------- verdicts


@every_case(
    "stock, warm, expected",
    [
        (20.0, 1.5, [True, True, True]),
        (20.0, 1.6, [False, True, True]),
        (12.0, 1.0, [True, True, True]),
        (11.9, 1.0, [True, False, True]),
    ],
)
def test_verdicts_hold_medians_against_their_bounds(stock: float, warm: float, expected: list[bool]) -> None:
    assert [verdict.is_met for verdict in verdicts_of(starts(stock=stock, warm=warm))] == expected


def test_large_models_have_only_the_verdict_of_the_tokens() -> None:
    large = Case("llama", "1.2GB", "disk warm")
    (verdict,) = verdicts_of([start("stock", 20.0, case=large), start("warm", 9.0, case=large)])
    assert verdict.is_met
    assert "2 answers of 2 starts" in verdict.figures


def test_one_other_token_is_told_with_its_start() -> None:
    other = start("warm", 1.0, case=Case("llama", "tiny", "store"), tokens=(((1, 2), (3, 5)),), number=2)
    verdict = verdicts_of([*starts(), other])[-1]
    assert not verdict.is_met
    assert "llama tiny, store, warm, round 2 from llama tiny, disk warm, stock, round 1" in verdict.figures


def test_other_architectures_may_answer_otherwise() -> None:
    other = start("warm", 1.0, case=Case("opt", "tiny", "disk warm"), tokens=(((1, 2), (9, 9)),))
    assert verdicts_of([*starts(), other])[-1].is_met


# ----------------------------------------------------------------------------------------------------- lines of JSON


def test_lines_of_json_say_everything() -> None:
    found = starts()
    line = json.loads(json.dumps(found[0].as_json()))
    assert (line["kind"], line["way"], line["round"], line["tier"]) == ("start", "stock", 1, "disk warm")
    assert sum(line["phases"].values()) == pytest.approx(line["first_token_s"])
    row = json.loads(json.dumps(rows_of(found)[0].as_json()))
    assert (row["kind"], row["architecture"], row["stock_over_warm"]) == ("row", "llama", 20.0)
    assert row["ways"]["warm"]["first_token_s"] == {"min": 0.95, "median": 1.0, "max": 1.05}


def test_equal_tokens_have_equal_digests() -> None:
    one, same = start("stock", 20.0).as_json(), start("warm", 1.0).as_json()
    other = start("warm", 1.0, tokens=(((1, 2), (3, 5)),)).as_json()
    assert one["tokens"] == same["tokens"] != other["tokens"]


def test_machine_tells_versions_and_arguments() -> None:
    line = json.loads(json.dumps(machine(arguments=ENGINE_ARGUMENTS)))
    assert line["kind"] == "machine"
    assert line["cpus"] == os.cpu_count()
    assert "--enforce-eager" in line["arguments"]


# ---------------------------------------------------------------------------------------------------------- pictures


def test_picture_is_drawn_from_the_lines_of_an_earlier_run(tmp_path: Path) -> None:
    lines = [machine(arguments=ENGINE_ARGUMENTS), *(row.as_json() for row in rows_of(starts()))]
    (tmp_path / "run.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    read = read_lines(tmp_path / "run.jsonl")
    assert "CPUs" in title_of(read)
    ((name, bars),) = groups_of(read)
    assert (name, [bar[0] for bar in bars]) == ("llama tiny\ndisk warm", list(WAYS))
    draw(read, tmp_path / "new" / "run.png")
    assert (tmp_path / "new" / "run.png").read_bytes().startswith(b"\x89PNG")


def test_phases_that_are_small_everywhere_are_merged_and_none_of_their_time_is_lost() -> None:
    phases: Mapping[str, float] = {"imports": 10.0, "init": 0.01, "weights": 0.02, REST: 0.5, FIRST_TOKEN: 0.05}
    fast: Mapping[str, float] = {"imports": 0.5, "weights": 0.5, FIRST_TOKEN: 0.1}
    bars = merged([("stock", phases, 10.58), ("warm", fast, 1.1)])
    assert list(bars[0][1]) == ["imports", "weights", REST, FIRST_TOKEN]
    assert bars[0][1][REST] == pytest.approx(0.51)
    for (_, shown, _), whole in zip(bars, (phases, fast), strict=True):
        assert sum(shown.values()) == pytest.approx(sum(whole.values()))


def test_drawing_is_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opt = Case("opt", "1.2GB", "store")
    rows = rows_of([*starts(), start("warm", 2.0, case=opt)])
    file, picture = tmp_path / "run.jsonl", tmp_path / "run.png"
    file.write_text("".join(f"{json.dumps(row.as_json())}\n" for row in rows))
    monkeypatch.setattr(sys, "argv", ["cold_start", "--draw", str(file), "--png", str(picture)])
    assert cold_start.main() == 0
    assert picture.exists()


# --------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--tiers", "disk warm,tape"], "unknown: tape; known: disk warm, disk cold, store"),
        (["--architectures", "lama"], "unknown: lama"),
        (["--rounds", "0"], "1 round at least"),
        (["--no-starts"], "nothing is left to do"),
        (["--draw", "x"], "--png says where to"),
    ],
)
def test_wrong_arguments_are_told(
    words: list[str], problem: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["cold_start", *words])
    with pytest.raises(SystemExit):
        cold_start.main()
    assert problem in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- cycles and memory


def cycle(number: int, **fields: int) -> Cycle:
    counts = dict.fromkeys(cold_start_cycles.COUNTS, 10) | {"left_processes": 0}
    memories = dict.fromkeys(cold_start_cycles.MEMORIES, 500 * MIB)
    return Cycle(**{"number": number, **counts, **memories, **fields})


def test_what_grows_before_it_has_settled_does_not_count() -> None:
    cycles = [cycle(number, descriptors=10 + min(number, 5)) for number in range(1, 51)]
    assert growth_of(cycles) == []
    verdict = cycles_verdict(cycles)
    assert (verdict.is_met, verdict.figures) == (True, "cycles 5 to 50")


@every_case(
    "fields",
    [{"descriptors": 11}, {"parent_threads": 11}, {"shm_entries": 11}, {"parent_pss_nbytes": 511 * MIB}],
)
def test_what_grows_afterwards_is_told(fields: dict[str, int]) -> None:
    cycles = [*(cycle(number) for number in range(1, 10)), cycle(10, **fields)]
    (grown,) = growth_of(cycles)
    assert grown.startswith(next(iter(fields)))
    assert not cycles_verdict(cycles).is_met


def test_memory_may_grow_a_little() -> None:
    cycles = [*(cycle(number) for number in range(1, 10)), cycle(10, parent_rss_nbytes=509 * MIB)]
    assert growth_of(cycles) == []


def test_a_process_that_any_cycle_left_is_told() -> None:
    cycles = [cycle(1), cycle(2, left_processes=1), *(cycle(number) for number in range(3, 8))]
    assert growth_of(cycles) == ["cycle 2 left 1 processes"]


def test_cycles_table_shows_some_and_the_last() -> None:
    text = printed(cycles_table_of([cycle(number) for number in range(1, 13)]))
    assert [line.split()[0] for line in text.splitlines() if line.split()[:1] and line.split()[0].isdigit()] == [
        *("1", "5", "10", "12")
    ]


def test_listening_port_of_a_child_is_counted() -> None:
    before = cold_start_cycles._num_listening(os.getpid())
    script = "import socket, sys; s = socket.create_server(('127.0.0.1', 0)); print('on', flush=True); sys.stdin.read()"
    with (
        socket.create_server(("127.0.0.1", 0)),
        subprocess.Popen(
            [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as child,
    ):
        assert child.stdout is not None
        assert child.stdout.readline() == "on\n"
        assert cold_start_cycles._num_listening(os.getpid()) == before + 2
        child.communicate()
    assert cold_start_cycles._num_listening(os.getpid()) == before


def test_figures_of_this_process_can_be_measured() -> None:
    found = cold_start_cycles._measure(1, os.getsid(0), os.getpid())
    assert found.left_processes >= 1
    assert found.descriptors >= 3
    assert found.parent_rss_nbytes > MIB
    assert dataclasses.asdict(found).items() <= found.as_json().items()


def test_memory_is_added_up() -> None:
    memory = Memory("llama-tiny", "warm parent, 2 engines", 300 * MIB, (200 * MIB, 100 * MIB))
    assert memory.as_json()["sum_nbytes"] == 600 * MIB
    assert "200 + 100" in printed(memory_table_of([memory]))


# ---------------------------------------------------------------------------------------------------------- machine


def test_processor_time_of_a_session_is_that_of_all_its_processes() -> None:
    script = "x = sum(i * i for i in range(3_000_000)); print('done', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "done\n"
        assert session_cpu_s(child.pid) > 0
        child.communicate("\n")
    assert session_cpu_s(child.pid) == 0


def test_files_of_directories_are_found_below_them(tmp_path: Path) -> None:
    for name in ("a/one", "b/c/two"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert [path.name for path in files_of(tmp_path / "a", tmp_path / "b")] == ["one", "two"]
