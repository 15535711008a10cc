"""The router's state as Prometheus metrics. For each scrape, reads the controller on its loop, in slices."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from itertools import accumulate
from typing import get_args

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from sllm_vllm import __version__
from sllm_vllm.metrics import REQUEST_BUCKETS, SERIES_MAX, RouterMetric
from sllm_vllm.router.controller import Controller
from sllm_vllm.router.core.cluster import ReplicaState
from sllm_vllm.router.core.events import Refusal
from sllm_vllm.router.counts import Histogram
from sllm_vllm.router.gate import How
from sllm_vllm.router.pauses import in_slices

Sample = tuple[RouterMetric, tuple[str, ...], float]
_HISTOGRAMS = {metric for metric in RouterMetric if metric.value.buckets}


async def registry_of(controller: Controller) -> CollectorRegistry:
    """Return a snapshot of all metrics, read in slices. It may be formatted on any thread."""
    registry = CollectorRegistry()
    registry.register(_Snapshot([family async for family in _families(controller)]))
    return registry


class _Snapshot(Collector):
    def __init__(self, families: Iterable[Family]) -> None:
        self._families = families

    def collect(self) -> Iterable[Family]:
        return self._families


async def _families(controller: Controller) -> AsyncIterator[Family]:
    """Yield one family per metric, even if it has no samples now."""
    counts, models = controller.counts, _exported_models(controller)
    plain = {metric: _family(metric) for metric in RouterMetric if metric not in _HISTOGRAMS}
    async for metric, labels, value in in_slices(_samples(controller, models)):
        plain[metric].add_metric(labels, value)
    for family in plain.values():
        yield family
    yield await _histogram(RouterMetric.START_SECONDS, [((kind,), one) for kind, one in counts.start_s.items()])
    yield await _histogram(RouterMetric.MOVE_HELD_SECONDS, [((), counts.held_s)])
    yield await _histogram(RouterMetric.TTFT, _by_model(counts.ttft_s, models))
    yield await _histogram(RouterMetric.DURATION, _by_model(counts.duration_s, models))
    yield await _histogram(RouterMetric.QUEUE_WAIT, _by_model(counts.queue_wait_s, models))


def _by_model(
    histograms: Mapping[str, Histogram], models: Iterable[str]
) -> Iterator[tuple[tuple[str, ...], Histogram]]:
    """Yield each of these models' labels and histogram; an empty one for a model without requests."""
    empty = Histogram(REQUEST_BUCKETS)
    for model in models:
        yield (model,), histograms.get(model, empty)


def _family(metric: RouterMetric) -> CounterMetricFamily | GaugeMetricFamily:
    record = metric.value
    kind = CounterMetricFamily if record.is_counter else GaugeMetricFamily
    return kind(record.name, record.help, labels=record.labels)


async def _histogram(
    metric: RouterMetric, histograms: Iterable[tuple[tuple[str, ...], Histogram]]
) -> HistogramMetricFamily:
    """Return the family of a histogram metric. ``histograms``: label values, and the histogram for them."""
    record = metric.value
    family = HistogramMetricFamily(record.name, record.help, labels=record.labels)
    async for labels, histogram in in_slices(histograms):
        bounds = [*(str(bound) for bound in histogram.bounds), "+Inf"]
        buckets = list(zip(bounds, map(float, accumulate(histogram.counts)), strict=True))
        family.add_metric(labels, buckets, histogram.total)
    return family


def _samples(controller: Controller, models: list[str]) -> Iterator[Sample]:
    yield RouterMetric.INFO, (__version__,), 1
    yield RouterMetric.MODELS, (), len(controller.models)
    for node in list(controller.core.cluster.nodes.values()):  # copied, because it may change between slices
        yield RouterMetric.SLOTS, (node.id,), node.num_slots
        yield RouterMetric.FREE_SLOTS, (node.id,), node.num_free
    for outcome in ("ready", "failed", "called_off"):
        yield RouterMetric.STARTS, (outcome,), controller.counts.starts[outcome]
    for outcome in ("moved", "not_moved"):
        yield RouterMetric.MOVES, (outcome,), controller.counts.moves[outcome]
    yield RouterMetric.MOVE_TOKENS, (), controller.counts.num_filled
    for refusal in Refusal:
        reason = refusal.name.lower()
        yield RouterMetric.REJECTIONS, (reason,), controller.counts.rejections[reason]
    clients = controller.counts.clients
    yield RouterMetric.CONNECTIONS, (), clients.num_open
    yield RouterMetric.CONNECTIONS_REFUSED, (), clients.num_refused
    yield RouterMetric.SLOW_CLIENTS, (), clients.num_slow
    yield from _counted(controller, models)
    for model in models:
        if model in controller.core.models:  # it was not deleted meanwhile
            yield from _model_samples(controller, model)


def _exported_models(controller: Controller) -> list[str]:
    """Return all deployed models; if there are too many, those that have, or had, the most requests."""
    models, queues, counts = controller.core.models, controller.core.queues, controller.counts
    if len(models) <= SERIES_MAX:
        return list(models)
    answered: Counter[str] = Counter()
    for (model, _), num in counts.requests.items():
        answered[model] += num

    def rank(model: str) -> tuple[int, int, str]:
        return -models[model].num_ongoing - queues.waiting(model), -answered[model], model

    return sorted(models, key=rank)[:SERIES_MAX]


def _counted(controller: Controller, models: list[str]) -> Iterator[Sample]:
    counts = controller.counts
    unnamed = [""] if any(not model for model, _ in counts.requests) else []
    for model in (*models, *unnamed):
        for outcome in get_args(How):
            yield RouterMetric.REQUESTS, (model, outcome), counts.requests[model, outcome]
        yield RouterMetric.PROMPT_TOKENS, (model,), counts.tokens[model, "prompt"]
        yield RouterMetric.OUTPUT_TOKENS, (model,), counts.tokens[model, "output"]


def _model_samples(controller: Controller, model: str) -> Iterator[Sample]:
    core = controller.core
    state = core.models[model]
    yield RouterMetric.RUNNING, (model,), state.num_ongoing
    yield RouterMetric.WAITING, (model,), core.queues.waiting(model)
    by_state = Counter(replica.state for replica in core.cluster.replicas_of(model))
    for one in ReplicaState:
        yield RouterMetric.REPLICAS, (model, one.value), by_state[one]
    yield RouterMetric.START_FAILURES, (model,), state.back_off.num_failures
    prediction = core.scaling.predictions.get(model)
    if prediction is not None and prediction.actual is not None:
        yield RouterMetric.PREDICTED, (model,), prediction.expected.total_s
        yield RouterMetric.ACTUAL, (model,), prediction.actual.total_s
