"""The worker's half: seeds by position, and a stock worker wherever nothing can be resumed."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from sllm_vllm.engine.hook_points import HookMissing
from sllm_vllm.engine.position_random import step_seed
from sllm_vllm.engine.resume import RESUME_KEY, handed_over
from sllm_vllm.engine.worker_hooks import hook_request_states, hook_runner
from tests.support.cases import every_case


class State:
    """Stands in for vLLM's CachedRequestState."""

    num_computed_tokens = 3

    def __init__(self, generator: Any, output_token_ids: list[int], sampling_params: Any) -> None:
        self.generator, self.output_token_ids, self.sampling_params = generator, output_token_ids, sampling_params
        self.__post_init__()

    def __post_init__(self) -> None:
        pass


class Runner:
    """Stands in for vLLM's GPUModelRunner."""

    def __init__(self, speculative_config: Any = None, **requests: Any) -> None:
        self.speculative_config, self.requests = speculative_config, requests

    def _update_states(self, scheduler_output: Any) -> str:
        del scheduler_output
        return "updated"

    def _get_prompt_logprobs_dict(self, hidden_states: Any, num_scheduled_tokens: Any) -> Any:
        del num_scheduled_tokens
        return hidden_states


def hooked_state(seed: int | None, carried: Any = None) -> Any:
    module: Any = ModuleType("gpu_input_batch")
    module.CachedRequestState = type("CachedRequestState", (State,), {})
    hook_request_states(module)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    params = SimpleNamespace(seed=seed, extra_args=carried and {RESUME_KEY: carried})
    return module.CachedRequestState(generator, [], params)


def hooked_runner(speculative_config: Any = None, **requests: Any) -> Any:
    module: Any = ModuleType("gpu_model_runner")
    module.GPUModelRunner = type("GPUModelRunner", (Runner,), {})
    hook_runner(module)
    return module.GPUModelRunner(speculative_config, **requests)


def drawn(generator: torch.Generator) -> list[float]:
    return [float(value) for value in torch.rand(4, generator=generator)]


@every_case("carried, owned", [(handed_over([5, 6]), [5, 6]), ([5, 6], []), ("[5, 6]", []), (None, [])])
def test_a_worker_takes_what_its_core_has_checked(carried: Any, owned: list[int]) -> None:
    state = hooked_state(None, carried)
    assert (state.output_token_ids, state.generator) == (owned, None)


def test_a_step_draws_by_seed_and_position() -> None:
    state = hooked_state(7)
    step = SimpleNamespace(num_scheduled_tokens={"r": 2})
    assert hooked_runner(r=state)._update_states(step) == "updated"
    assert drawn(state.generator) == drawn(torch.Generator().manual_seed(step_seed(7, 5)))


def test_where_the_engine_speculates_all_is_stock() -> None:
    state, logprobs = hooked_state(7), {"r": "of the prompt"}
    runner = hooked_runner("a draft", r=state)
    assert runner._update_states(SimpleNamespace(num_scheduled_tokens={"r": 2})) == "updated"
    assert drawn(state.generator) == drawn(torch.Generator().manual_seed(7))
    assert runner._get_prompt_logprobs_dict(logprobs, {}) is logprobs


def test_where_the_runner_is_not_hooked_draws_are_stock() -> None:
    assert drawn(hooked_state(7).generator) == drawn(torch.Generator().manual_seed(7))


@every_case("missing", ["_update_states", "_get_prompt_logprobs_dict"])
def test_a_runner_that_lacks_a_point_is_left_as_it_is(missing: str) -> None:
    module: Any = ModuleType("gpu_model_runner")
    module.GPUModelRunner = type("GPUModelRunner", (Runner,), {missing: None})
    before = dict(vars(module.GPUModelRunner))
    with pytest.raises(HookMissing, match=missing):
        hook_runner(module)
    assert dict(vars(module.GPUModelRunner)) == before
