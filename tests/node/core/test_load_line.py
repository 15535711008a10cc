"""The loader's report is found in a log line, and in no other line."""

from __future__ import annotations

from sllm_vllm.node.core.load_line import LINE_MAX, read_load_line
from tests.support.cases import every_case

REPORT = "outcome=loaded rank=0 source=host bytes=1024 wait_s=0.001 weights_s=0.5 total_s=1.25"
FIELDS = {
    "outcome": "loaded",
    "source": "host",
    "bytes": "1024",
    "total_s": "1.25",
    "weights_s": "0.5",
    "wait_s": "0.001",
}


@every_case("before", ["", "(Worker pid=7) INFO 11-20 12:47:08 [vllm_loader.py:99] ", "\x1b[0;36m(x)\x1b[0m "])
def test_the_fields_that_others_learn_from_are_kept(before: str) -> None:
    assert read_load_line(f"{before}event=load_model {REPORT}") == FIELDS


@every_case(
    "line",
    [
        "",
        "event=load_model",
        "event=load_models outcome=loaded",
        "INFO Loading weights took 0.02 seconds",
        "event=load_model nothing that is a field",
        "event=load_model rank=0 other=1",
        "x" * LINE_MAX + f"event=load_model {REPORT}",
    ],
)
def test_any_other_line_says_nothing(line: str) -> None:
    assert read_load_line(line) == {}


def test_only_the_beginning_of_a_long_line_is_looked_at() -> None:
    line = f"event=load_model {REPORT} {'x' * LINE_MAX} checkpoint=late"
    assert read_load_line(line) == FIELDS


def test_of_a_field_that_is_there_twice_the_last_counts() -> None:
    assert read_load_line("event=load_model outcome=loaded outcome=fallback") == {"outcome": "fallback"}
