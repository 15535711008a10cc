"""The front end's half of a resume: it processes the owned tokens as if the engine had just sent them. Hooks vLLM.

Everything a front end knows about a request (detokenizer, stop strings, logprobs, tool and reasoning parsers, usage) is
a function of the outputs it has seen. So the same code that built this state at the source rebuilds it here. The router
drops what the client has already received.
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
    """Outputs of a replay, held so that they are delivered one by one, before later outputs.

    Stock vLLM would merge them into one output, and some parsers of tool calls don't find in one large step what they
    find in the steps that the source made. Belongs to the request's collector, in the front end's event loop.

    Args:
        collector: vLLM's ``RequestOutputCollector`` of the request.
        step: tokens per delivered output; 0 for all in one.
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
        """Hold the outputs that are put into the collector during the block."""
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
        return None if self._held else self._stock_nowait()  # a caller that gets None awaits `get`

    async def _get(self) -> Any:
        if not self._held:
            return await self._stock_get()
        await asyncio.sleep(0)  # let other requests run: a long replay is many outputs
        return self._held.popleft()


def replay(processor: Any, state: Any, choice: OwnedChoice, *, held: HeldOutputs | None) -> None:
    """Process a choice's tokens. Afterwards ``state`` is what it was at the source, or has ended as it did there.

    Raises:
        ResumeRefused: the choice should have ended, but has not; the core would get more tokens than it can take.
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
    """Put a choice's tokens into the request that goes to the core.

    For a choice that has ended already, the core instead gets a request for one token, which ends at once. Copies the
    sampling parameters, because the request's other choices may share them.

    Args:
        is_open: whether the choice has more to generate.
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
            return  # the choice has ended, by its finish reason or a stop string
    # vLLM then counts a time to first token, and no inter-token latency since the last replayed one.
    state.is_prefilling = True


def _add_logprobs(logprobs: Any, choice: OwnedChoice, index: int) -> None:
    from vllm.logprobs import Logprob

    assert choice.logprobs is not None
    entries = choice.logprobs[index]
    logprobs.logprobs.append({token: Logprob(value, rank, text) for token, value, rank, text in entries})
    logprobs.cumulative_logprob += entries[0][1]
