"""What the configuration says of moves, and between which engines requests may move."""

from __future__ import annotations

from sllm_vllm.router.config.sections import ModelConfig, RouterConfig
from sllm_vllm.router.config.settings import MigrationSection
from tests.support.cases import every_case


def model(**fields: object) -> ModelConfig:
    """A model of a configuration."""
    return RouterConfig.model_validate({"models": [{"name": "m", **fields}]}).models[0]


@every_case(
    "changed, is_same",
    [
        ({"engine_arguments": ["--dtype", "float16"]}, True),
        ({"engine_arguments": {"dtype": "float16", "max-num-seqs": 8}}, True),
        ({"engine_arguments": ["--max_num_seqs=8", "--dtype=float16", "--gpu-memory-utilization", 0.5]}, True),
        ({"engine_arguments": ["--dtype", "float32"]}, False),
        ({"engine_arguments": ["--dtype", "float16", "--kv-cache-dtype", "fp8"]}, False),
        ({"engine_arguments": ["--dtype", "float16"], "revision": "v2"}, False),
        ({"engine_arguments": ["--dtype", "float16"], "environment": {"VLLM_USE_V2": 1}}, False),
    ],
)
def test_requests_move_between_engines_that_differ_in_nothing_that_answers(
    changed: dict[str, object], is_same: bool
) -> None:
    before, after = model(engine_arguments=["--dtype=float16"]), model(**changed)
    assert (before.spec(0).lineage == after.spec(0).lineage) is is_same


def test_moves_are_bounded_by_the_configuration_and_can_be_switched_off() -> None:
    config = RouterConfig.model_validate({"migration": {"rounds_max": 3, "round_pause": "2s", "switch_timeout": 4}})
    assert config.ingress_settings(()).moves == MigrationSection(rounds_max=3, round_pause=2.0, switch_timeout=4.0)
    assert config.node_config().migration is True
    off = RouterConfig.model_validate({"migration": {"enabled": False}})
    assert off.ingress_settings(()).moves is None
    assert off.node_config().migration is False
