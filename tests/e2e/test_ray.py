"""Three nodes of a real Ray cluster, four models on real vLLM behind Ray Serve; what can die is killed under load."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

pytest.importorskip("ray")

from benchmarks.ray.cluster import sections_of
from tests.conftest import ModelDir
from tests.support.ray_bench import RayBench, ray_bench
from tests.support.router_process import Cut, is_alive
from tests.support.vllm_server import SERVER_ENVIRONMENT
from tests.support.waiting import wait_until

pytestmark = pytest.mark.e2e_long

NODES = ("a", "b", "c")
MODELS = ("llama", "opt", "qwen2", "gpt2")
START_MAX_S = 400.0
"""Of a request that a cold engine is started for, on a busy machine."""
TOKENS = 1900
"""Of a stream that something is killed under."""
MEANWHILE = 4
"""Requests to each model while something is dead."""


@pytest.fixture(scope="module")
def bench(model_dir: ModelDir, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayBench]:
    """Two places a node, two ingresses; warm parents are ready."""
    directory = tmp_path_factory.mktemp("ray")
    variables = {**SERVER_ENVIRONMENT, "HF_HUB_OFFLINE": "1"}
    del variables["VLLM_CPU_KVCACHE_SPACE"]  # the agent's own share counts
    with ray_bench(directory, *NODES, environment=variables) as bench:
        bench.answer_s_max = START_MAX_S
        arguments = {"enforce-eager": True, "max-model-len": 2048}
        bench.deploy(
            sections_of(
                directory,
                {name: {"source": str(model_dir(name))} for name in MODELS},
                node={"kv_memory": "64MiB"},
                ray={"ingress_min": 2, "ingress_max": 2},
                defaults={"engine_arguments": arguments, "keep_alive": 3600, "queue_timeout": START_MAX_S},
            )
        )
        bench.wait_for_nodes(*NODES)
        wait_until(lambda: all(bench.agent(node).report().warm.pid for node in NODES), "warm parents")
        yield bench


@pytest.fixture(scope="module")
def said(bench: RayBench) -> dict[str, str]:
    """What each model says to a prompt that is always the same; every one has an engine then."""
    return {model: ask(bench, model) for model in MODELS}


@pytest.fixture(scope="module")
def told(bench: RayBench, said: dict[str, str]) -> dict[str, str]:
    """The same, of a long answer."""
    return {model: LongAnswer(bench, model).outcome() for model in said}


def ask(bench: RayBench, model: str) -> str:
    answer = bench.router.post(model, max_tokens=16, temperature=0)
    assert answer.status == 200, answer
    text: str = answer.body["choices"][0]["text"]
    return text


def wait_for_end(bench: RayBench, model: str) -> None:
    wait_until(lambda: not bench.replicas(model), f"the end of {model}")


class LongAnswer:
    """A stream of many tokens, from when its first one has come."""

    def __init__(self, bench: RayBench, model: str) -> None:
        self._stream = bench.router.streaming(model, max_tokens=TOKENS, ignore_eos=True, temperature=0)
        self._parts = [text_of(self._stream.event())]

    def outcome(self) -> str:
        """Its whole text; or the code of its error, or "cut". Asserts that nothing follows the end."""
        try:
            for event in iter(self._stream.event, None):
                if event == "[DONE]":
                    assert self._stream.rest() == []
                    return "".join(self._parts)
                if "error" in event:
                    assert self._stream.rest() == []
                    return str(event["error"]["code"])
                self._parts.append(text_of(event))
        except Cut:
            return "cut"
        return "ended without an end"


def begin(bench: RayBench, models: Sequence[str]) -> list[tuple[str, LongAnswer]]:
    """One of each, all at once: when the last has begun, the first is not to have ended."""
    with ThreadPoolExecutor(len(models)) as pool:
        return list(zip(models, pool.map(lambda model: LongAnswer(bench, model), models), strict=True))


def text_of(event: dict[str, Any]) -> str:
    return "".join(choice["text"] for choice in event["choices"])


def assert_all_is_well(bench: RayBench, said: dict[str, str]) -> None:
    """Every node is there and warm, every model answers as ever, nothing is held twice, no place is taken for ever."""
    bench.wait_for_nodes(*bench.nodes)
    assert {model: ask(bench, model) for model in MODELS} == said
    bench.assert_nothing_is_held_twice()
    wait_until(lambda: bench.router.num_ongoing() == 0, "all places to be free")


@contextlib.contextmanager
def load(bench: RayBench, *, may_fail: bool = False) -> Iterator[dict[str, LongAnswer]]:
    """A long stream of every model, and plain requests that come meanwhile: all are answered, or get a clean error."""
    answers = dict(begin(bench, MODELS))
    asked = {"max_tokens": 16, "temperature": 0}
    with ThreadPoolExecutor(len(MODELS)) as pool:
        meanwhile = [bench.router.post_later(pool, model, **asked) for model in MODELS for _ in range(MEANWHILE)]
        yield answers
        statuses = {one.result().status for one in meanwhile}
    assert statuses <= ({200, 500, 502, 503} if may_fail else {200}), statuses
    assert 200 in statuses


def test_four_models_answer_and_the_agents_hold_every_processor(bench: RayBench, said: dict[str, str]) -> None:
    assert_all_is_well(bench, said)
    assert len({one["report"]["pid"] for one in bench.replicas()}) == len(MODELS)


def test_a_second_start_goes_where_the_checkpoint_is(bench: RayBench, said: dict[str, str]) -> None:
    num_local = 0
    for model in MODELS:
        (first,) = bench.nodes_of(model)
        for replica in bench.replicas(model):
            assert bench.router.admin(f"replicas/{replica['id']}/drain", "POST").status == 202
        wait_for_end(bench, model)
        plans = bench.router.admin(f"explain/{model}").body["plans"]
        (best,) = (plan for plan in plans if plan["is_best"])
        there = next(plan for plan in plans if plan["node"] == first)
        assert there["tier"] != "REMOTE"
        assert {plan["tier"] for plan in plans if plan["node"] != first} == {"REMOTE"}
        assert best is there or best["total_s"] < there["total_s"] - 0.1, plans
        assert ask(bench, model) == said[model]
        assert bench.nodes_of(model) == {best["node"]}
        num_local += best is there
    assert num_local


def test_a_start_elsewhere_pulls_the_checkpoint_from_its_node(bench: RayBench, said: dict[str, str]) -> None:
    (first,) = bench.nodes_of("qwen2")
    assert bench.router.admin(f"nodes/{first}/drain", "POST").status == 202
    wait_for_end(bench, "qwen2")
    assert ask(bench, "qwen2") == said["qwen2"]
    (second,) = bench.nodes_of("qwen2")
    start = next(
        one.start for one in bench.agent(second).report().replicas if one.model.endswith("qwen2-tiny-bfloat16-0")
    )
    assert start is not None
    assert start.load["outcome"] == "loaded", start.load
    assert bench.router.admin(f"nodes/{first}/undrain", "POST").status == 200


def test_a_controller_that_is_killed_costs_nothing(bench: RayBench, said: dict[str, str], told: dict[str, str]) -> None:
    before = {one["id"] for one in bench.replicas()}
    with load(bench) as answers:
        bench.kill_controller()
    assert {model: one.outcome() for model, one in answers.items()} == told
    assert_all_is_well(bench, said)
    assert before <= {one["id"] for one in bench.replicas()}


def test_an_agent_that_is_killed_costs_the_streams_of_its_engines(
    bench: RayBench, said: dict[str, str], told: dict[str, str]
) -> None:
    (node,) = bench.nodes_of("llama")
    lost = {model for model in MODELS if bench.nodes_of(model) == {node}}
    pids = [one["report"]["pid"] for one in bench.replicas() if one["node"] == node]
    with load(bench) as answers:
        bench.kill_agent(node)
    outcomes = {model: one.outcome() for model, one in answers.items()}
    assert {model: outcomes[model] for model in MODELS if model not in lost} == {
        model: told[model] for model in MODELS if model not in lost
    }
    assert all(outcomes[model] in (told[model], "engine_failed") for model in lost)  # most go on elsewhere
    wait_until(lambda: not any(map(is_alive, pids)), "its engines' end")
    assert_all_is_well(bench, said)


def test_an_ingress_that_is_killed_costs_its_own_streams(
    bench: RayBench, said: dict[str, str], told: dict[str, str]
) -> None:
    answers = begin(bench, (*MODELS, *MODELS))
    bench.kill_ingress()
    outcomes = [(model, one.outcome()) for model, one in answers]
    assert all(outcome in (told[model], "cut") for model, outcome in outcomes)
    assert_all_is_well(bench, said)


def test_a_node_that_is_lost_costs_the_streams_of_its_engines_and_another_may_come(
    bench: RayBench, said: dict[str, str], told: dict[str, str]
) -> None:
    (node,) = bench.nodes_of("llama")
    with load(bench, may_fail=True) as answers:  # of an ingress that was there, too
        bench.kill_node(node)
    outcomes = {model: one.outcome() for model, one in answers.items()}
    assert outcomes["llama"] in (told["llama"], "engine_failed", "cut")
    assert all(outcomes[model] in (told[model], "engine_failed", "cut") for model in MODELS)
    bench.add_node("d")
    assert_all_is_well(bench, said)
