"""Tables: whole away from a terminal, one line a row on one, identifiers never cut."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

from sllm_vllm.cli.engines import REPLICA_CUT
from sllm_vllm.cli.output import cell_width, table_lines
from tests.support.cases import every_case
from tests.support.waiting import DEADLINE_S

LONG = "/data/models/an-organisation/" + "a-model-with-a-long-name-" * 4 + "instruct"
ID = "a-model-with-a-long-name-3f2a9c"
PROBLEM = "it exited with status 1: No module named 'torchvision'; see the log"
ROW: dict[str, object] = {"id": ID, "model": LONG, "slots": 2, "reason": PROBLEM}


def test_away_from_a_terminal_nothing_is_cut() -> None:
    header, line = table_lines([ROW], width=None, cut=REPLICA_CUT)
    assert header.split() == ["id", "model", "slots", "reason"]
    assert line == f"{ID}  {LONG}      2  {PROBLEM}"


@every_case("width", [60, 80, 120, 250])
def test_on_a_terminal_a_row_is_one_line_with_its_whole_id(width: int) -> None:
    header, line = table_lines([ROW, {**ROW, "model": "short", "reason": ""}], width=width, cut=REPLICA_CUT)[:2]
    assert max(len(header), len(line)) <= width
    assert line.startswith(f"{ID}  ")
    if width < 250:
        assert "…" in line
        assert "instruct" in line or width == 60


def test_an_id_is_not_cut_where_nothing_fits() -> None:
    (_, line) = table_lines([ROW], width=20, cut=REPLICA_CUT)
    assert ID in line
    assert len(line) < 80


def test_names_of_two_cells_a_character_are_counted_so() -> None:
    first, second = table_lines([{" ": "模型模型", "  ": "b"}, {" ": "a", "  ": "b"}], width=None)
    assert cell_width(first) == cell_width(second)
    assert cell_width(table_lines([{"model": "模型" * 40}], width=21, cut=("model",))[1]) <= 21


def test_numbers_stand_to_the_right_and_nothing_is_a_dash() -> None:
    assert table_lines([{"n": 1, "x": None}, {"n": 10, "x": "b"}], width=None) == [" n  x", " 1  -", "10  b"]
    assert table_lines([], width=None) == []


def test_a_real_terminal_of_eighty_columns() -> None:
    """Rows as a process prints them to a pseudo terminal: no line is folded."""
    script = f"from sllm_vllm.cli.output import print_table; print_table('t', [{ROW!r}], cut={REPLICA_CUT!r})"
    ours, theirs = pty.openpty()
    try:
        environment = {key: value for key, value in os.environ.items() if key != "LINES"} | {"COLUMNS": "80"}
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, stdout=theirs, env=environment, timeout=DEADLINE_S, check=False)
        printed = os.read(ours, 65536).decode()
    finally:
        os.close(ours)
        os.close(theirs)
    title, _, line = printed.splitlines()
    assert (done.returncode, title) == (0, "\x1b[1mt\x1b[0m")
    assert len(line) <= 80
    assert ID in line
