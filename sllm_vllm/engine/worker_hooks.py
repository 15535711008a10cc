"""The worker's half of a resume, for runner V1: owned tokens, and random draws keyed by position. Hooks vLLM.

Runner V2 needs neither: the scheduler passes it all tokens of a request, and it hashes seed and position itself.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from sllm_vllm.engine.hook_points import require, require_type
from sllm_vllm.engine.resume import owned_tokens


def worker_installs() -> dict[str, Any]:
    """Hooks by the module of vLLM that they are installed into."""
    return {
        "vllm.v1.worker.gpu_input_batch": hook_request_states,
        "vllm.v1.worker.gpu_model_runner": hook_runner,
    }


def hook_request_states(module: ModuleType) -> None:
    """Give the worker's state of a request its owned tokens, and a generator that can be seeded for each step."""
    states: Any = require_type(module, "CachedRequestState")
    require(states, "__init__", "generator", "output_token_ids", "sampling_params")
    stock = require(states, "__post_init__")

    def post_init(self: Any) -> None:
        from sllm_vllm.engine.position_random import PositionGenerator

        stock(self)
        if self.generator is not None:
            self.generator = PositionGenerator.replacing(self.generator)
        if not self.output_token_ids:
            self.output_token_ids.extend(owned_tokens(getattr(self.sampling_params, "extra_args", None)))

    states.__post_init__ = post_init


def hook_runner(module: ModuleType) -> None:
    """Before each step, seed each seeded request's generator for the position that the step samples."""
    runners: Any = require_type(module, "GPUModelRunner")
    stock = require(runners, "_update_states", "scheduler_output")
    hold = _prompt_logprobs_held(runners)

    def update_states(self: Any, scheduler_output: Any) -> Any:
        result = stock(self, scheduler_output)
        if self.speculative_config is not None:
            return result  # such engines resume nothing, and a step may sample several positions
        for request_id, num_tokens in scheduler_output.num_scheduled_tokens.items():
            state = self.requests[request_id]
            if state.generator is not None:
                state.generator.seed_step(state.sampling_params.seed, state.num_computed_tokens + num_tokens)
        return result

    runners._update_states = update_states
    runners._get_prompt_logprobs_dict = hold


def _prompt_logprobs_held(runners: Any) -> Any:
    """Hold a prompt's logprobs back until the step that samples, as the scheduler expects of every output.

    In stock vLLM they come with the step that ends the prompt. The prefill of a resumed request may take more steps
    after that one, and the engine would fail an assertion.
    """
    stock = require(runners, "_get_prompt_logprobs_dict", "hidden_states", "num_scheduled_tokens")

    def samples(self: Any, request_id: str) -> bool:
        return not self.discard_request_mask.np[self.input_batch.req_id_to_index[request_id]]

    def get_prompt_logprobs_dict(self: Any, hidden_states: Any, num_scheduled_tokens: Any) -> Any:
        found: Any = stock(self, hidden_states, num_scheduled_tokens)
        held = self.__dict__.get("sllm_prompt_logprobs")
        if self.speculative_config is not None or (not found and not held):
            return found
        waiting = {id_: one for id_, one in {**(held or {}), **found}.items() if id_ in self.requests}
        ready = {id_: one for id_, one in waiting.items() if id_ in num_scheduled_tokens and samples(self, id_)}
        self.sllm_prompt_logprobs = {id_: one for id_, one in waiting.items() if id_ not in ready}
        return ready

    return get_prompt_logprobs_dict
