"""The worker's half of a resume, for runner V1: owned tokens and position-keyed draws. Hooks vLLM.

Runner V2 needs neither: the scheduler hands it all tokens of a request, and it hashes seed and position itself.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from sllm_vllm.engine.hook_points import require, require_type
from sllm_vllm.engine.resume import owned_tokens


def worker_installs() -> dict[str, Any]:
    """What to install into which module of vLLM."""
    return {
        "vllm.v1.worker.gpu_input_batch": hook_request_states,
        "vllm.v1.worker.gpu_model_runner": hook_runner,
    }


def hook_request_states(module: ModuleType) -> None:
    """Give the worker's picture of a request its owned tokens, and a generator that can be seeded step by step."""
    states: Any = require_type(module, "CachedRequestState")
    require(states, "__init__", "generator", "output_token_ids", "sampling_params")
    stock = require(states, "__post_init__")

    def post_init(self: Any) -> None:
        from sllm_vllm.engine.position_random import PositionGenerator

        stock(self)
        if self.generator is not None:
            self.generator = PositionGenerator(device=self.generator.device)
        if not self.output_token_ids:
            self.output_token_ids.extend(owned_tokens(getattr(self.sampling_params, "extra_args", None)))

    states.__post_init__ = post_init


def hook_runner(module: ModuleType) -> None:
    """Seed each seeded request's generator for the position that the step at hand samples."""
    runners: Any = require_type(module, "GPUModelRunner")
    stock = require(runners, "_update_states", "scheduler_output")

    def update_states(self: Any, scheduler_output: Any) -> Any:
        result = stock(self, scheduler_output)
        for request_id, num_tokens in scheduler_output.num_scheduled_tokens.items():
            state = self.requests[request_id]
            if state.generator is not None:
                state.generator.seed_step(state.sampling_params.seed, state.num_computed_tokens + num_tokens)
        return result

    runners._update_states = update_states
