"""Tests once, after an engine's start and on its own model, whether it resumes requests exactly.

Two short requests are generated whole, then resumed. They hardly depend on what the model computes. One bans a pair of
tokens, so that the next token depends on the last output token alone. The other samples at the highest temperature, so
that its tokens depend on the random numbers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from sllm_vllm.engine.movable import why_engine_unable
from sllm_vllm.engine.resume import RESUME_KEY, OwnedChoice, Resume, digest_tokens, sign_resume

TEST_MAX_S = 120.0
_PROMPT = (3, 4)
_PAIR = (5, 6)
_NUM_TOKENS = 6
_NUM_OWNED = 3
_HOTTEST = 2.0
_BAD_WORDS = "_bad_words_token_ids"


async def why_unable(engine: Any) -> str:
    """Why this engine can't resume requests; empty if it can."""
    points = getattr(engine, "sllm_points", None)
    if points is None:
        return "nothing is hooked: SLLM_MIGRATION is not 1, or the plugin is not loaded"
    if points.problems:
        return str(points.problems[0])
    if engine._client_count > 1:
        return "there are several API servers, and each knows of its own requests alone"
    if reason := why_engine_unable(engine.vllm_config):
        return reason
    try:
        async with asyncio.timeout(TEST_MAX_S):
            return await _try_all(engine)
    except Exception as error:  # top of a run loop: whatever a vLLM version raises, the engine keeps serving
        return f"the trial failed: {type(error).__name__}: {error}"


async def _try_all(engine: Any) -> str:
    problems = await engine.engine_core.call_utility_async("sllm_hook_problems")
    if problems:
        return f"engine core: {problems[0]}"
    if not await _resumes(engine, "pair", _banned_pair()):
        return "output tokens that a request brought were not counted"
    for seed in (1, 2):  # one seed may fail by chance, by a tie between two draws; two seeds don't
        if await _resumes(engine, f"seed-{seed}", {"temperature": _HOTTEST, "seed": seed}):
            return ""
    return "a seeded request went on with other random numbers"


def _banned_pair() -> dict[str, Any]:
    first, second = _PAIR
    bias = {first: 100.0, second: 0.0}
    return {"temperature": 0.0, "logit_bias": bias, "allowed_token_ids": list(_PAIR), _BAD_WORDS: [[first, first]]}


async def _resumes(engine: Any, name: str, sampling: dict[str, Any]) -> bool:
    """Whether a request that owns an answer's first tokens returns the whole answer again, with the same end."""
    whole = await _answer(engine, f"sllm-self-test-{name}", sampling)
    if len(whole) != _NUM_TOKENS or (_BAD_WORDS in sampling and set(whole) != set(_PAIR)):
        return False  # the test itself does not work: with the pair banned, the two tokens must alternate
    resume = Resume(digest_tokens(_PROMPT), (OwnedChoice(tuple(whole[:_NUM_OWNED])),))
    return await _answer(engine, f"sllm-self-test-{name}-resumed", sampling, resume=resume) == whole


def _signed(engine: Any, resume: Resume, id_: str) -> str:
    return sign_resume(resume.to_json(), key=engine.sllm_resume_keys[0], request=id_)


async def _answer(engine: Any, id_: str, sampling: dict[str, Any], *, resume: Resume | None = None) -> Sequence[int]:
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    arguments = {key: value for key, value in sampling.items() if key != _BAD_WORDS}
    params = SamplingParams(
        max_tokens=_NUM_TOKENS,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args={RESUME_KEY: _signed(engine, resume, id_)} if resume is not None else None,
        **arguments,
    )
    if _BAD_WORDS in sampling:  # vLLM's parameters take bad words as text only
        params._bad_words_token_ids = sampling[_BAD_WORDS]
    found: Sequence[int] = ()
    async for output in engine.generate({"type": "token", "prompt_token_ids": list(_PROMPT)}, params, id_):
        found = list(output.outputs[0].token_ids)
    return found
