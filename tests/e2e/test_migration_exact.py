"""Requests that are moved between two real engines while their clients read give what they would have given unmoved."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence

import pytest
import pytest_asyncio

from tests.conftest import ModelDir
from tests.e2e.move_bench import MoveBench, move_bench
from tests.e2e.resume_cases import CASES, SAMPLE, SEEDED, completion
from tests.e2e.resumed import Answer, compare
from tests.e2e.test_resume_exact import with_marks

ARGUMENTS = (
    *("--max-model-len", "1024", "--dtype", "float32", "--block-size", "32", "--max-num-seqs", "16"),
    *("--reasoning-parser", "deepseek_r1", "--tool-call-parser", "hermes", "--enable-auto-tool-choice"),
)
SWITCHES = (1, 2, 17, 50, -1)
"""Tokens that a client has when the move is ordered; -1: some before the last, so that the switch comes at the end."""
LAST = 10
TRIES = 3
"""Of a request that ends before it is moved, which is likelier on a busy machine."""
ENDED_FIRST = "it ended first"
NUM_MOVES = 20
APART = 45
"""Tokens from one order to the next; some random ones more or less."""
NUM_OTHERS = 8


Case = tuple[str, int, bool]
"""Of requests, the tokens at which the move is ordered, whether it is streamed."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bench(model_dir: ModelDir, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[MoveBench]:
    directory = tmp_path_factory.mktemp("moves")
    model = with_marks(model_dir("llama", dtype="float32"), directory / "model")
    async with move_bench(directory, model, *ARGUMENTS) as made:
        yield made


async def problems_of(bench: MoveBench, cases: Sequence[Case]) -> dict[Case, str]:
    """What differs in moved answers, or why one was not moved; empty where it was, and nothing differs."""
    wholes: dict[tuple[str, bool], Answer] = {}
    found: dict[Case, str] = {}
    for name, at, stream in cases:
        path, body = CASES[name][0], {**CASES[name][1], "stream": stream}
        if (name, stream) not in wholes:
            wholes[name, stream] = await bench.whole(path, body)
        whole = wholes[name, stream]
        longest = max(map(len, whole.token_ids))
        at_tokens = max(0, longest - LAST) if at < 0 else min(at, max(0, longest - LAST))
        for _ in range(TRIES):
            moved, id_ = await bench.moved(path, body, [at_tokens])
            problem = differs(whole, moved)
            if problem and differs(await bench.whole(path, body), whole):
                problem += " AND THE UNMOVED ANSWER DIFFERS FROM ITSELF"
            problem = problem or ("" if bench.gate.of(bench.gate.moves, id_) else why_not(bench, id_))
            found[name, at, stream] = problem
            if problem != ENDED_FIRST:
                break
    return found


def differs(whole: Answer, moved: Answer) -> str:
    """Each engine looks into its own prefix cache first, so cached tokens are not the same on both."""
    for one in (whole, moved):
        ((one.usage or {}).get("prompt_tokens_details") or {}).pop("cached_tokens", None)
    try:
        compare(whole, moved)
    except AssertionError as problem:
        return f"differs: {problem} {whole.token_ids} {moved.token_ids} {whole.usage} {moved.usage}"[:4000]
    return ""


def why_not(bench: MoveBench, id_: str) -> str:
    return "; ".join(bench.gate.of(bench.gate.refusals, id_)) or ENDED_FIRST


def is_wrong(problem: str) -> bool:
    """A request that its source has answered first, or that was refused, is answered right, too."""
    return problem.startswith("differs")


@pytest.mark.e2e
@pytest.mark.asyncio(loop_scope="module")
async def test_a_sample_of_requests_is_moved_unnoticed(bench: MoveBench) -> None:
    """One test, not forty: each worker of the test run would start engines of its own."""
    sample = [*(case for case in SAMPLE if case[0] in CASES), ("eos", 17, True)]
    assert len(sample) == 40
    told = await problems_of(bench, sample)
    assert {case: problem for case, problem in told.items() if is_wrong(problem)} == {}
    stayed = {case: problem for case, problem in told.items() if problem}
    assert len(stayed) <= 0.2 * len(sample), stayed


@pytest.mark.e2e_long
@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", list(CASES))
async def test_every_request_is_moved_unnoticed(bench: MoveBench, name: str, stream: bool) -> None:
    told = await problems_of(bench, [(name, at, stream) for at in SWITCHES])
    assert {case: problem for case, problem in told.items() if is_wrong(problem)} == {}
    assert any(not problem for problem in told.values()), told


@pytest.mark.e2e_long
@pytest.mark.asyncio(loop_scope="module")
async def test_a_stream_that_moves_twenty_times_beside_eight_others_is_the_same(bench: MoveBench) -> None:
    chance = random.Random(7)
    path, body = completion(stream=True, max_tokens=NUM_MOVES * APART, **SEEDED)
    whole = await bench.whole(path, body)
    at = [number * APART + chance.randint(1, APART // 3) for number in range(NUM_MOVES)]
    load = [
        asyncio.create_task(
            asyncio.to_thread(bench.routed.ask, path, {**body, "temperature": 1.0, "seed": 100 + number})
        )
        for number in range(NUM_OTHERS)
    ]
    moved, id_ = await bench.moved(path, body, at)
    for one in load:
        one.cancel()
    assert moved.choices[0].parts == whole.choices[0].parts
    assert moved.token_ids == whole.token_ids
    assert len(bench.gate.of(bench.gate.moves, id_)) == NUM_MOVES, bench.gate.of(bench.gate.refusals, id_)
