"""What is read out of a vLLM command line: tables of argvs, and that no list of words makes it fail."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from sllm_vllm.store.start_hint import TENSOR_PARALLEL_SIZE_MAX, WORD_NBYTES_MAX, StartHint, plan_hint
from tests.support.cases import every_case

EXTRA = "--model-loader-extra-config"


def hint_of(line: str, *more: str) -> StartHint | None:
    return plan_hint([*line.split(), *more])


@every_case(
    "line, hint",
    [
        ("vllm serve m --load-format sllm", StartHint("m", 1)),
        ("vllm serve m --load-format=sllm", StartHint("m", 1)),
        ("vllm serve m --load_format sllm", StartHint("m", 1)),
        ("vllm serve m --load-format auto --load-format sllm", StartHint("m", 1)),
        ("vllm serve --model m --load-format sllm", StartHint("m", 1)),
        ("vllm serve --load-format sllm --model=m", StartHint("m", 1)),
        ("api_server.py --model org/m --load-format sllm", StartHint("org/m", 1)),
        ("vllm serve m --load-format sllm --tensor-parallel-size 2", StartHint("m", 2)),
        ("vllm serve m --load-format sllm --tensor_parallel_size=2", StartHint("m", 2)),
        ("vllm serve m --load-format sllm -tp 4 --port 8000", StartHint("m", 4)),
        ("vllm serve m --load-format sllm -tp=4", StartHint("m", 4)),
        ("vllm serve m --load-format sllm -tp many", StartHint("m", None)),
        ("vllm serve m --load-format sllm -tp 0", StartHint("m", None)),
        (f"vllm serve m --load-format sllm -tp {TENSOR_PARALLEL_SIZE_MAX + 1}", StartHint("m", None)),
        (f"vllm serve m --load-format sllm -tp {'9' * 5000}", StartHint("m", None)),
        ("vllm serve m --load-format sllm -tp", StartHint("m", None)),
        (f"vllm serve m --load-format sllm {EXTRA}.store_dir /s", StartHint("m", 1, "/s")),
        (f"vllm serve m --load-format sllm {EXTRA}.store_dir=/s", StartHint("m", 1, "/s")),
        (f"vllm serve m --load-format sllm {EXTRA}.store true", StartHint("m", 1)),
    ],
)
def test_a_hint_is_read(line: str, hint: StartHint) -> None:
    assert hint_of(line) == hint


@every_case(
    "line",
    [
        "",
        "vllm",
        "vllm serve",
        "vllm serve m",
        "vllm serve m --load-format",
        "vllm serve m --load-format auto",
        "vllm serve m --load-format sllm --load-format auto",
        "vllm serve --load-format sllm",
        "vllm bench m --load-format sllm",
        "vllm serve --config file.yaml",
        f"vllm serve m --load-format sllm {EXTRA}.store false",
        f"vllm serve m --load-format sllm {EXTRA}",
        f"vllm serve m --load-format sllm {EXTRA} {{",
        f"vllm serve m --load-format sllm {EXTRA} []",
        f"vllm serve {'m' * (WORD_NBYTES_MAX + 1)} --load-format sllm",
        "vllm serve m\udc80 --load-format sllm",
    ],
)
def test_no_hint_is_due(line: str) -> None:
    assert hint_of(line) is None


@every_case(
    "extra, hint",
    [
        ({}, StartHint("m", 1)),
        ({"store_dir": "/s", "threads": 8}, StartHint("m", 1, "/s")),
        ({"store": True}, StartHint("m", 1)),
        ({"store": False}, None),
        ({"store": []}, StartHint("m", 1)),
        ({"store_dir": ""}, None),
        ({"store_dir": 3}, None),
        ({"store_dir": "/s\0"}, None),
        ({"store_dir": "/\udc80"}, None),
    ],
)
def test_the_loader_s_settings_are_heeded(extra: dict[str, object], hint: StartHint | None) -> None:
    line = "vllm serve m --load-format sllm"
    assert hint_of(line, EXTRA, json.dumps(extra)) == hint
    assert hint_of(line, f"{EXTRA}={json.dumps(extra)}") == hint


def test_deeply_nested_settings_are_no_hint() -> None:
    assert hint_of("vllm serve m --load-format sllm", EXTRA, "[" * 100_000) is None


words = st.text() | st.sampled_from(["vllm", "serve", "--load-format", "sllm", "--model", "-tp", EXTRA, "{}", "=", "."])


@given(st.lists(words))
def test_no_list_of_words_makes_it_fail(argv: list[str]) -> None:
    assert plan_hint(argv) is None or "--load-format" in " ".join(argv).replace("_", "-")


@given(st.lists(words), st.text())
def test_no_settings_make_it_fail(rest: list[str], extra: str) -> None:
    plan_hint(["vllm", "serve", "m", "--load-format=sllm", f"{EXTRA}={extra}", *rest])
