"""The front end's half of a resume: it works through the owned tokens as if the engine had just sent them. Hooks vLLM.

Everything a front end knows of a request (detokenizer, stop strings, logprobs, tool and reasoning parsers, usage) is a
function of the outputs it has seen, so it is rebuilt by the same code that built it at the source. The router drops
what the client has already got.
"""

from __future__ import annotations

import asyncio
import copy
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sllm_vllm.engine.resume import RESUME_KEY, OwnedChoice, ResumeRefused, handed_over


class HeldOutputs:
    """Outputs of a replay, handed out one by one before what comes later.

    Stock vLLM would merge them into one, and not every parser of tool calls finds in one large step what it finds in
    the steps the source made. Owned by the request's collector, in the front end's event loop.
    """

    def __init__(self, collector: Any, step: int) -> None:
        self._held: deque[Any] = deque()
        self._collector = collector
        self._step = step
        self._num_put = 0
        self._stock_nowait = collector.get_nowait
        self._stock_get = collector.get

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """What is put meanwhile is held."""
        self._num_put = 0
        self._collector.put = self._put
        try:
            yield
        finally:
            del self._collector.put
        self._collector.get_nowait, self._collector.get = self._get_nowait, self._get

    def _put(self, output: Any) -> None:
        begins = self._num_put % self._step == 0 if self._step else self._num_put == 0
        self._num_put += 1
        if begins:
            self._held.append(output)
        else:
            self._held[-1].add(output, aggregate=self._collector.aggregate)

    def _get_nowait(self) -> Any:
        return None if self._held else self._stock_nowait()  # whoever gets nothing calls `get`

    async def _get(self) -> Any:
        if not self._held:
            return await self._stock_get()
        await asyncio.sleep(0)  # others have their turn: a long replay is many outputs
        return self._held.popleft()


def replay(processor: Any, state: Any, choice: OwnedChoice, *, held: HeldOutputs | None) -> None:
    """Work through a choice's tokens; afterwards ``state`` is what it was at the source, or has ended as it did.

    Raises:
        ResumeRefused: it was said to have ended, and has not: the core would be given more tokens than it can take.
    """
    if held is None:
        _process(processor, state, choice)
    else:
        with held.collecting():
            _process(processor, state, choice)
    if choice.finish_reason is not None and state.request_id in processor.request_states:
        stop = f"its stop string {choice.stop_reason!r} is not in its text"
        raise ResumeRefused(f"choice {state.request_index} is said to have ended, and {stop}")


def hand_to_core(request: Any, choice: OwnedChoice, *, is_open: bool) -> None:
    """Give the core's copy of a request its tokens; a choice that has ended already gets the least that ends at once.

    The parameters may be shared with other choices of the request.
    """
    request.sampling_params = params = copy.copy(request.sampling_params)
    rest = {key: value for key, value in (params.extra_args or {}).items() if key != RESUME_KEY}
    if is_open:
        params.extra_args = {**rest, RESUME_KEY: handed_over(choice.token_ids)} if choice.token_ids else rest or None
        return
    params.extra_args = rest or None
    params.max_tokens, params.min_tokens = 1, 0


def _process(processor: Any, state: Any, choice: OwnedChoice) -> None:
    from vllm.v1.engine import EngineCoreOutput, FinishReason

    last = len(choice.token_ids) - 1
    for index, token in enumerate(choice.token_ids):
        output = EngineCoreOutput(request_id=state.request_id, new_token_ids=[token])
        if index == last and choice.finish_reason is not None and not isinstance(choice.stop_reason, str):
            output.finish_reason = FinishReason[choice.finish_reason.upper()]
            output.stop_reason = choice.stop_reason
        if choice.logprobs is not None and state.logprobs_processor.logprobs is not None:
            _add_logprobs(state.logprobs_processor, choice, index)
        processor.process_outputs([output])
        if state.request_id not in processor.request_states:
            return  # it ended, by a stop string if by nothing that was carried along
    state.is_prefilling = True  # so that time to first token is counted, and no pause since the last one


def _add_logprobs(logprobs: Any, choice: OwnedChoice, index: int) -> None:
    from vllm.logprobs import Logprob

    assert choice.logprobs is not None
    entries = choice.logprobs[index]
    logprobs.logprobs.append({token: Logprob(value, rank, text) for token, value, rank, text in entries})
    logprobs.cumulative_logprob += entries[0][1]
