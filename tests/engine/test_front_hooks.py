"""The front end's hooks in vLLM's own output processor: what can't go on leaves nothing behind."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from sllm_vllm.engine.front_hooks import hook_generate, hook_outputs
from sllm_vllm.engine.hook_points import HookPoints
from sllm_vllm.engine.resume import RESUME_KEY, OwnedChoice, Resume, digest_tokens, handed_over, sign_resume
from tests.support.cases import every_case


@pytest.fixture
def processor() -> Any:
    """One of a subclass, since hooks change a class for the whole process."""
    from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector

    module: Any = ModuleType("output_processor")
    module.OutputProcessor = type("OutputProcessor", (OutputProcessor,), {})
    module.RequestOutputCollector = RequestOutputCollector
    hook_outputs(module)
    return module.OutputProcessor(None, log_stats=False)


def add(processor: Any, carried: Any) -> Any:
    """Add a request of one choice, as ``AsyncLLM`` does."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.output_processor import RequestOutputCollector

    kind = RequestOutputKind.DELTA
    params = SamplingParams(max_tokens=10, output_kind=kind, detokenize=False, extra_args={RESUME_KEY: carried})
    request = EngineCoreRequest(
        request_id="r-1",
        prompt_token_ids=[1, 2, 3],
        mm_features=None,
        sampling_params=params,
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
        external_req_id="r",
    )
    processor.add_request(request, None, None, 0, RequestOutputCollector(kind, "r-1"))
    return request


def is_empty(processor: Any) -> bool:
    return not processor.request_states and not processor.external_req_ids


def owning_choice(**ending: Any) -> Resume:
    return Resume("digest", (OwnedChoice((5, 6), None, **ending),))


def test_an_open_choice_is_replayed_and_handed_over(processor: Any) -> None:
    request = add(processor, owning_choice())
    assert request.sampling_params.extra_args == {RESUME_KEY: handed_over([5, 6])}
    assert processor.request_states["r-1"].detokenizer.num_output_tokens() == 2
    assert processor.request_states["r-1"].sllm_request is request


def test_cached_tokens_are_those_that_the_first_engine_found(processor: Any) -> None:
    """vLLM has a field for them since 0.27; before, what this engine finds would replace them."""
    from vllm.v1.engine import EngineCoreOutput
    from vllm.v1.metrics.stats import PrefillStats

    add(processor, replace(owning_choice(), num_cached_tokens=2))
    state = processor.request_states["r-1"]
    found = PrefillStats(num_prompt_tokens=5, num_cached_tokens=5)
    processor.process_outputs([EngineCoreOutput("r-1", [7], prefill_stats=found)])
    assert state.num_cached_tokens == 2


def test_a_choice_that_has_ended_ends(processor: Any) -> None:
    request = add(processor, owning_choice(finish_reason="length"))
    assert request.sampling_params.extra_args is None
    assert is_empty(processor)


def test_a_choice_said_to_have_ended_that_goes_on_is_refused(processor: Any) -> None:
    """It would reach the core with more tokens than it may have, and the worker would die of them."""
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match="stop string 'never'"):
        add(processor, owning_choice(finish_reason="stop", stop_reason="never"))
    assert is_empty(processor)


@pytest.mark.parametrize("carried", [[5, 6], "text"])
def test_what_nobody_checked_is_refused(processor: Any, carried: Any) -> None:
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match="over HTTP alone"):
        add(processor, carried)
    assert is_empty(processor)


def test_a_replay_that_fails_leaves_no_state(processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(outputs: Any) -> None:
        raise RuntimeError(f"{len(outputs)} output can't be worked through")

    monkeypatch.setattr(processor, "process_outputs", fail)
    with pytest.raises(RuntimeError, match="1 output"):
        add(processor, owning_choice())
    assert is_empty(processor)


def engine_with(points: HookPoints) -> Any:
    """Of a vLLM whose ``generate`` gives back the parameters that it got."""

    class AsyncLLM:
        def __init__(self) -> None:
            model = SimpleNamespace(max_model_len=64, get_vocab_size=lambda: 32)
            self.vllm_config = SimpleNamespace(model_config=model, speculative_config=None, kv_transfer_config=None)

        def generate(self, prompt: Any, sampling_params: Any, request_id: str) -> Any:
            del prompt, request_id
            return sampling_params

    module: Any = ModuleType("async_llm")
    module.AsyncLLM = AsyncLLM
    hook_generate(module, points)
    return AsyncLLM()


def resumed(engine: Any) -> bool:
    """Ask for a request that owns two tokens, as it comes over HTTP; whether the engine is told of them."""
    from vllm.sampling_params import SamplingParams

    prompt = [1, 2, 3]
    carried = Resume(digest_tokens(prompt), (OwnedChoice((5, 6)),))
    engine.sllm_resume_keys = ("key",)
    signed = sign_resume(carried.to_json(), key="key", request="r")
    params = SamplingParams(max_tokens=10, extra_args={RESUME_KEY: signed})
    asked = engine.generate({"type": "token", "prompt_token_ids": prompt}, params, "r")
    return bool(asked.extra_args[RESUME_KEY] == carried)


def test_a_request_is_resumed_before_the_trial_has_ended() -> None:
    """Nothing waits for the trial: it would have to run beside the request then."""
    assert resumed(engine_with(HookPoints()))


def test_where_a_hook_is_missing_it_is_refused_before_the_trial_too() -> None:
    from vllm.exceptions import VLLMValidationError

    points = HookPoints()
    engine = engine_with(points)
    points.problems.append("a module: there is no such function")
    with pytest.raises(VLLMValidationError, match="can't resume: a module"):
        resumed(engine)


@every_case("key", ["another", ""])
def test_a_resume_that_the_router_has_not_signed_is_refused(key: str) -> None:
    """A client may write the key into its body: it would make the engine say that it said anything."""
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import SamplingParams

    engine = engine_with(HookPoints())
    engine.sllm_resume_keys = ("key",)
    text = Resume(digest_tokens([1, 2, 3]), (OwnedChoice((5, 6)),)).to_json()
    for carried in (text, sign_resume(text, key=key, request="r"), sign_resume(text, key="key", request="r2")):
        params = SamplingParams(max_tokens=10, extra_args={RESUME_KEY: carried})
        with pytest.raises(VLLMValidationError, match="signed"):
            engine.generate({"type": "token", "prompt_token_ids": [1, 2, 3]}, params, "r")
