"""The metrics that Prometheus reads: names, meanings, and how they are read off the server's state.

Nothing is counted here, so nothing on the way of the data knows of it: a scrape takes one sample on the event loop.
What each metric means is its help text; docs/observability.md lists them. prometheus_client is loaded if needed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from threading import Thread
from typing import TYPE_CHECKING

from modelaverage.errors import Reason
from modelaverage.missing import Missing
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.seen.observations import PHASES, Histogram
from ps_server.seen.sample import MetricsSample

if TYPE_CHECKING:
    from prometheus_client.core import Metric

__all__ = ["MetricsError", "serve_metrics"]

_SAMPLE_TIMEOUT_S = 5.0
# Clients choose worker ids: only this many counted workers are shown, the most recently heard of.
_MAX_WORKERS_SHOWN = 1000


class MetricsError(Exception):
    """Metrics cannot be served at this address."""


def serve_metrics(host: str, port: int, sample: Callable[[], MetricsSample]) -> tuple[int, Callable[[], None]]:
    """Serves /metrics on a thread of its own. To be called on the event loop, where ``sample`` will be called too.

    Returns:
        The port (``port`` 0 takes a free one), and what ends it.

    Raises:
        MetricsError: nothing can listen there.
    """
    from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector, start_http_server

    registry = CollectorRegistry()
    for collector in (ProcessCollector, PlatformCollector, GCCollector):
        collector(registry=registry)
    registry.register(_Collector(sample, asyncio.get_running_loop()))
    try:
        server, _ = start_http_server(port, host, registry)
    except (OSError, UnicodeError, OverflowError) as error:
        raise MetricsError(getattr(error, "strerror", None) or str(error)) from None

    def end() -> None:
        # The thread looks every half second whether it is to end; nobody has to wait for that.
        Thread(target=server.shutdown, daemon=True).start()
        server.server_close()

    return server.server_port, end


class _Collector:
    """What prometheus_client asks, in its own thread, at every scrape."""

    def __init__(self, sample: Callable[[], MetricsSample], loop: asyncio.AbstractEventLoop) -> None:
        self._sample = sample
        self._loop = loop

    def describe(self) -> Iterable[Metric]:
        """Nothing: the registry need not sample the server to know the names."""
        return []

    def collect(self) -> Iterable[Metric]:
        """All metrics of this moment; none, which leaves a gap, if the event loop has no time for it or has ended."""
        found: futures.Future[list[Metric]] = futures.Future()

        def on_the_loop() -> None:
            try:
                found.set_result(list(_metrics(self._sample())))
            except Exception as error:
                found.set_exception(error)

        try:
            self._loop.call_soon_threadsafe(on_the_loop)
        except RuntimeError:  # it is closed
            return []
        try:
            return found.result(_SAMPLE_TIMEOUT_S)
        except futures.TimeoutError:
            return []


def _metrics(sample: MetricsSample) -> Iterator[Metric]:
    from prometheus_client.core import CounterMetricFamily as Counter
    from prometheus_client.core import GaugeMetricFamily as Gauge

    status, seen, traffic = sample.status, sample.observations, sample.traffic

    def counter(name: str, meaning: str, value: float) -> Metric:
        return Counter(f"modelaverage_{name}", meaning, value)

    def gauge(name: str, meaning: str, value: float) -> Metric:
        return Gauge(f"modelaverage_{name}", meaning, value)

    phases = Gauge("modelaverage_phase", "1 for what the server is doing, 0 for all else.", labels=("phase",))
    for name, number in pb.Phase.items():
        if number != pb.PHASE_UNSPECIFIED:
            phases.add_metric((name.removeprefix("PHASE_").lower(),), status.phase == number)
    yield phases
    yield gauge("global_step", "Rounds completed, from the initial step on.", status.global_step)
    yield gauge("num_workers", "How many workers a round is for.", status.num_workers)
    yield gauge("min_workers", "How many workers a round needs at least.", status.min_workers)
    yield gauge("connected_workers", "Workers with a push open now.", status.connected_workers)
    missing = Missing.told(status).count
    yield gauge("missing_workers", "Workers whose pushes the round in progress waits for.", missing)
    yield gauge(
        "round_age_seconds", "Since the first push of the round in progress; 0 if there is none.", status.round_age_s
    )
    yield gauge("model_size_bytes", "The center variables, without padding.", status.model_size_bytes)

    yield counter("rounds", "Rounds committed.", seen.rounds_committed)
    yield counter("rounds_restarted", "Rounds that were started over.", status.rounds_restarted)
    yield counter("rounds_without_all", "Rounds committed without a worker.", status.rounds_without_all)
    yield counter("stale_pushes", "Pushes that were answered STALE.", status.stale_pushes)
    yield counter("retried_pushes", "Headers of pushes that the server had seen before.", status.pushes_retried)
    refused = Counter("modelaverage_refused_calls", "Calls that were refused, by reason.", labels=("reason",))
    for reason in Reason:  # those without a refusal too: a rate needs the 0 that it grows from
        refused.add_metric((reason.name,), seen.refused[reason.name])
    yield refused

    yield _histogram("round_seconds", "From a round's first push header to its commit.", [({}, seen.round_s)])
    yield _histogram(
        "round_phase_seconds",
        "A committed round's seconds: waiting, receiving, averaging up to its commit; then sending.",
        [({"phase": phase}, seen.phase_s[phase]) for phase in PHASES],
    )

    yield counter("received_bytes", "Bytes of fragments received, however they came.", traffic.received_bytes)
    yield counter("sent_bytes", "Bytes of fragments sent, however they went.", traffic.sent_bytes)
    yield counter("received_raw_bytes", "What received_bytes would be without compression.", traffic.received_raw_bytes)
    yield counter("sent_raw_bytes", "What sent_bytes would be without compression.", traffic.sent_raw_bytes)
    yield counter("shared_memory_bytes", "How many of both were in shared memory.", traffic.shared_bytes)
    yield counter("received_fragments", "Fragments of pushes that came into an average.", seen.fragments_received)
    yield counter("sent_fragments", "Fragments of averages sent, once for each worker.", seen.fragments_sent)

    yield _histogram("checkpoint_seconds", "From a commit to its checkpoint's file.", [({}, seen.checkpoint_s)])
    yield counter("checkpoint_failures", "Checkpoints not written, or not made durable.", seen.checkpoint_failures)
    writing = "Since the server began to write the checkpoint that is being written; 0 if there is none."
    yield gauge("checkpoint_writing_seconds", writing, status.checkpoint_writing_s)
    if status.HasField("checkpoint_age_s"):
        yield gauge("checkpoint_age_seconds", "Since the newest checkpoint was written.", status.checkpoint_age_s)
        yield gauge("checkpoint_global_step", "The step of the newest checkpoint.", status.checkpoint_step)
    yield from _workers(sample)


def _workers(sample: MetricsSample) -> Iterator[Metric]:
    from prometheus_client.core import CounterMetricFamily as Counter
    from prometheus_client.core import GaugeMetricFamily as Gauge
    from prometheus_client.core import SummaryMetricFamily as Summary

    labels = ("worker",)
    lateness = Summary(
        "modelaverage_barrier_lateness_seconds",
        "From a round's first whole push to this worker's, over all rounds that counted it.",
        labels=labels,
    )
    nonfinite = Counter("modelaverage_nonfinite_values", "NaN and infinite values that it pushed.", labels=labels)
    seen = Gauge("modelaverage_worker_last_seen_age_seconds", "Since the worker was last heard from.", labels=labels)
    step = Gauge("modelaverage_worker_local_step", "Its count of optimizer steps, at its last push.", labels=labels)
    loss = Gauge("modelaverage_worker_loss", "The loss that it reported with its last push, if it did.", labels=labels)
    counted = {worker.worker_id: worker for worker in sample.status.workers if worker.pushes_counted}
    for worker_id in [name for name in sample.lateness_sum_s if name in counted][-_MAX_WORKERS_SHOWN:]:
        worker = counted[worker_id]
        lateness.add_metric((worker_id,), worker.pushes_counted, sample.lateness_sum_s[worker_id])
        nonfinite.add_metric((worker_id,), worker.nonfinite_values)
        seen.add_metric((worker_id,), worker.last_seen_age_s)
        step.add_metric((worker_id,), worker.local_step)
        if worker.HasField("loss"):
            loss.add_metric((worker_id,), worker.loss)
    yield from (lateness, nonfinite, seen, step, loss)


def _histogram(name: str, meaning: str, lines: Iterable[tuple[dict[str, str], Histogram]]) -> Metric:
    from prometheus_client.core import HistogramMetricFamily

    lines = list(lines)
    family = HistogramMetricFamily(f"modelaverage_{name}", meaning, labels=tuple(lines[0][0]))
    for labels, histogram in lines:
        bounds = [*(str(float(bound_s)) for bound_s in histogram.bounds_s), "+Inf"]
        up_to, total = [], 0
        for bound, count in zip(bounds, histogram.counts, strict=True):
            total += count
            up_to.append((bound, total))
        family.add_metric(tuple(labels.values()), up_to, histogram.sum_s)
    return family
