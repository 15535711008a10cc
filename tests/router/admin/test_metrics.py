"""`/metrics` of the router: what a scrape says, after real decisions, and how much it may say."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import get_args

import pytest
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from sllm_vllm import __version__
from sllm_vllm.metrics import SERIES_MAX, RouterMetric
from sllm_vllm.router.admin.metrics import registry_of
from sllm_vllm.router.config.keys import digest_of
from sllm_vllm.router.config.sections import ModelConfig
from sllm_vllm.router.controller import Controller
from sllm_vllm.router.core.events import ModelDeleted, ModelDeployed
from sllm_vllm.router.core.facts import RequestFacts
from sllm_vllm.router.counts import Counts
from sllm_vllm.router.gate import How, Outcome, Rejected, Ticket
from tests.support.cases import every_case
from tests.support.fake_gate import until
from tests.support.fake_node import ServedAdmin, serving_admin
from tests.support.waiting import DEADLINE_S

MODEL = "meta/tiny"
Samples = dict[tuple[str, ...], float]
SCRAPE = {"authorization": "Bearer scrape"}


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[ServedAdmin]:
    async with serving_admin(tmp_path) as served:
        yield served


def parsed(text: str) -> Samples:
    """Values by name and labels' values."""
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def scrape(served: ServedAdmin) -> Samples:
    answer = await served.ask("GET", "/metrics")
    assert (answer.status, answer.headers["content-type"].partition(";")[0]) == (200, "text/plain")
    return parsed(answer.text)


async def test_every_metric_is_there_from_the_start(served: ServedAdmin) -> None:
    text = (await served.ask("GET", "/metrics")).text
    for metric in RouterMetric:
        assert f"# HELP {metric.value.name} {metric.value.help}" in text
    found = parsed(text)
    assert found["sllm_router_info", __version__] == 1
    assert (found["sllm_router_slots", "local"], found["sllm_router_free_slots", "local"]) == (2, 2)
    assert found["sllm_router_starts_total", "ready"] == 0


async def test_a_start_and_a_request(served: ServedAdmin) -> None:
    await served.deploy(MODEL)
    await served.answer_request(MODEL)
    found = await scrape(served)
    expected = {
        ("sllm_router_models",): 1,
        ("sllm_router_free_slots", "local"): 1,
        ("sllm_router_replicas", MODEL, "ready"): 1,
        ("sllm_router_replicas", MODEL, "ordered"): 0,
        ("sllm_router_starts_total", "ready"): 1,
        ("sllm_router_start_seconds_count", "warm"): 1,
        ("sllm_router_start_seconds_bucket", "+Inf", "warm"): 1,
        ("sllm_router_start_seconds_count", "cold"): 0,
        ("sllm_router_requests_total", MODEL, "done"): 1,
        ("vllm:num_requests_running", MODEL): 0,
        ("vllm:num_requests_waiting", MODEL): 0,
        ("vllm:prompt_tokens_total", MODEL): 10,
        ("vllm:generation_tokens_total", MODEL): 5,
    }
    assert {key: found.get(key) for key in expected} == expected
    prediction = served.controller.core.scaling.predictions[MODEL]
    assert prediction.actual is not None
    assert found["sllm_router_last_start_predicted_seconds", MODEL] == prediction.expected.total_s
    assert found["sllm_router_last_start_actual_seconds", MODEL] == prediction.actual.total_s


async def test_a_model_that_had_no_request_has_series_of_zero(served: ServedAdmin) -> None:
    await served.deploy(MODEL)
    found = await scrape(served)
    expected = [
        *(("sllm_router_requests_total", MODEL, how) for how in get_args(How)),
        ("vllm:prompt_tokens_total", MODEL),
        ("vllm:generation_tokens_total", MODEL),
        ("vllm:time_to_first_token_seconds_count", MODEL),
        ("vllm:e2e_request_latency_seconds_count", MODEL),
        ("vllm:request_queue_time_seconds_count", MODEL),
        ("sllm_router_replicas", MODEL, "ready"),
        ("sllm_router_start_failures", MODEL),
        ("sllm_router_rejections_total", "queue_full"),
        ("sllm_router_connections_refused_total",),
        ("sllm_router_slow_clients_total",),
    ]
    assert {key: found.get(key) for key in expected} == dict.fromkeys(expected, 0)


def test_times_of_requests_count_from_their_arrival() -> None:
    counts = Counts()
    counts.note(ModelDeployed(ModelConfig(name=MODEL).spec(1)), [], 0.0)
    ticket = Ticket("r-1", "a", MODEL, url="http://127.0.0.1:1", api_key="", attempt=1)
    counts.note_outcome(ticket, Outcome("done", 200, 0.5, 3.0, 1, 1, waited_s=20.0))
    counts.note_outcome(ticket, Outcome("timeout", None, None, 4.0, None, None, waited_s=1.0))
    assert counts.queue_wait_s[MODEL].total == 21.0
    assert counts.ttft_s[MODEL].total == 20.5
    assert counts.duration_s[MODEL].total == 28.0


async def test_a_key_for_scrapes_opens_the_metrics_alone(served: ServedAdmin) -> None:
    served.admin.set_scrape_keys([digest_of("scrape")])
    assert (await served.ask("GET", "/metrics", headers=SCRAPE)).status == 200
    assert (await served.ask("GET", "/metrics", headers={"authorization": "Bearer wrong"})).status == 401
    assert (await served.ask("GET", "/sllm/v1/models", headers=SCRAPE)).status == 401
    assert (await served.ask("GET", "/metrics")).status == 200
    served.admin.set_keys([])
    assert (await served.ask("GET", "/metrics", headers=SCRAPE)).status == 200
    assert (await served.ask("GET", "/sllm/v1/models", headers=SCRAPE)).status == 403


async def test_what_runs_and_what_waits(served: ServedAdmin) -> None:
    await served.deploy(MODEL, ongoing_max=1)
    await asyncio.wait_for(served.controller.acquire(RequestFacts("r-1", MODEL)), DEADLINE_S)
    second = asyncio.create_task(served.controller.acquire(RequestFacts("r-2", MODEL)))
    await until(lambda: served.controller.core.queues.waiting(MODEL), "the second one's place in the queue")
    found = await scrape(served)
    assert (found["vllm:num_requests_running", MODEL], found["vllm:num_requests_waiting", MODEL]) == (1, 1)
    second.cancel()
    await asyncio.wait({second})


async def test_refusals_and_failed_starts(served: ServedAdmin) -> None:
    with pytest.raises(Rejected):
        await served.controller.acquire(RequestFacts("r-1", "nobody"))
    served.node.refusal = "no slot is free"
    await served.deploy(MODEL, min_replicas=1)
    await until(lambda: served.controller.core.models[MODEL].back_off.num_failures, "a failed start")
    found = await scrape(served)
    assert found["sllm_router_rejections_total", "unknown_model"] == 1
    assert found["sllm_router_starts_total", "failed"] >= 1
    assert found["sllm_router_start_failures", MODEL] >= 1
    assert ("sllm_router_start_failures", "other") not in found


async def test_a_start_that_was_called_off(served: ServedAdmin) -> None:
    served.node.may_be_ready.clear()
    await served.deploy(MODEL, min_replicas=1)
    replica = await served.replica(MODEL, "ordered")
    served.controller.delete(MODEL)
    await until(lambda: replica not in served.controller.core.cluster.replicas, "its end")
    assert (await scrape(served))["sllm_router_starts_total", "called_off"] == 1


async def test_a_deleted_model_has_no_series(served: ServedAdmin) -> None:
    await served.deploy(MODEL)
    await served.answer_request(MODEL)
    served.controller.delete(MODEL)
    found = await scrape(served)
    assert [key for key in found if MODEL in key] == []
    await served.deploy(MODEL)
    assert (await scrape(served))["sllm_router_requests_total", MODEL, "done"] == 0  # it counts anew


async def test_many_models_have_a_bounded_number_of_series(tmp_path: Path) -> None:
    controller = Controller(waiting_max=100, directory=tmp_path)
    await controller.start()
    for number in range(SERIES_MAX + 10):
        controller.deploy(ModelConfig(name=f"m-{number:05}"))
    busy = f"m-{SERIES_MAX + 9:05}"
    waiting = asyncio.create_task(controller.acquire(RequestFacts("r-1", busy)))
    await until(lambda: controller.core.queues.waiting(busy), "its place in the queue")
    found = parsed(generate_latest(await registry_of(controller)).decode())
    shown = [key[1] for key in found if key[0] == "vllm:num_requests_waiting"]
    assert len(shown) == SERIES_MAX
    assert busy in shown
    assert found[("sllm_router_models",)] == SERIES_MAX + 10
    waiting.cancel()
    await asyncio.wait({waiting})
    await controller.close()


def test_what_ends_after_its_model_is_counted_without_a_name() -> None:
    counts = Counts()
    counts.note(ModelDeleted(MODEL), [], 0.0)
    ticket = Ticket("r-1", "a", MODEL, url="http://127.0.0.1:1", api_key="", attempt=1)
    counts.note_outcome(ticket, Outcome("client_left", None, None, seconds=1.0, prompt_tokens=None, output_tokens=None))
    assert counts.requests == {("", "client_left"): 1}


@every_case("metric", list(RouterMetric))
def test_a_name_says_its_unit(metric: RouterMetric) -> None:
    record = metric.value
    assert record.name.startswith(("sllm_router_", "vllm:"))
    assert (record.unit == "seconds") == record.name.endswith("_seconds")
    assert not (record.is_counter and record.buckets)


def test_names_are_distinct() -> None:
    names = [metric.value.name for metric in RouterMetric]
    assert len(set(names)) == len(names)
