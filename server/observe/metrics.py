"""The metrics that a server offers to Prometheus. Each application has one registry, and nothing is global.

docs/operations.md has the table of names, units and meanings.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from time import perf_counter
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from jaxrank.runtime.attention import Choice
from jaxrank.server.scheduler import BatchReport, Scheduler
from jaxrank.types import Work

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_STALLS = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 5)
_FILLS = tuple(tenth / 10 for tenth in range(1, 11))

_TICK_S = 0.02


class Metrics:
    """The metrics of one application. Its methods may be called on any thread."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._requests = Counter(
            "jaxrank_requests", "Answered requests.", ["dialect", "status"], registry=self.registry
        )
        self._seconds = Histogram(
            "jaxrank_request_seconds", "Seconds of a scoring request, from its headers to its answer.", ["dialect"],
            buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        self._stages = Histogram(
            "jaxrank_stage_seconds", "Seconds of a request in one stage.", ["stage"],
            buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        self._refusals = Counter(
            "jaxrank_refusals", "Requests that were refused, by reason.", ["reason"], registry=self.registry
        )
        self._media = Counter(
            "jaxrank_media", "Images and videos fetched and decoded.", ["step"], registry=self.registry
        )
        self._media_bytes = Counter(
            "jaxrank_media_bytes", "Bytes of them, as fetched and as decoded.", ["step"], registry=self.registry
        )
        self._fill = Histogram(
            "jaxrank_batch_fill_ratio", "Tokens of a batch by the most that one takes.",
            buckets=_FILLS, registry=self.registry,
        )  # fmt: skip
        self._batch_seconds = Histogram(
            "jaxrank_batch_seconds", "Seconds of a batch on the device.", buckets=_SECONDS, registry=self.registry
        )
        self._pairs = Counter("jaxrank_scored_pairs", "Pairs that were scored.", registry=self.registry)
        self._failed = Counter("jaxrank_failed_pairs", "Pairs that could not be scored.", registry=self.registry)
        self._stalls = Histogram(
            "jaxrank_event_loop_stall_seconds", f"How late a timer of {_TICK_S * 1000:g} ms was.",
            buckets=_STALLS, registry=self.registry,
        )  # fmt: skip

    def request(self, dialect: str, status: int, seconds: float) -> None:
        """Count an answered request.

        Args:
            dialect: The dialect. "none" for a request that scores nothing.
            status: The HTTP status. 499 if the client had left.
            seconds: The time from its headers to its answer.
        """
        self._requests.labels(dialect, str(status)).inc()
        if dialect != "none":
            self._seconds.labels(dialect).observe(seconds)

    def stage(self, name: str, seconds: float) -> None:
        """Count a stage of a request.

        Args:
            name: One of wait, tokenise, media, score, answer.
            seconds: The time that it took.
        """
        self._stages.labels(name).observe(seconds)

    def refusal(self, reason: str) -> None:
        """Count a refused request.

        Args:
            reason: The name of a class in errors.py, or the reason why a connection was refused.
        """
        self._refusals.labels(reason).inc()

    def media(self, step: str, size: int) -> None:
        """Count an image, video or frame that was fetched or decoded.

        Args:
            step: "fetched" or "decoded".
            size: Its bytes.
        """
        self._media.labels(step).inc()
        self._media_bytes.labels(step).inc(size)

    def batch(self, report: BatchReport) -> None:
        """Count a batch, whether it was scored or failed."""
        self._fill.observe(report.fill)
        self._batch_seconds.observe(report.seconds)
        self._pairs.inc(report.pairs - report.failed_pairs)
        self._failed.inc(report.failed_pairs)

    def watch(
        self,
        scheduler: Scheduler,
        work: Callable[[], Work],
        compilations: Callable[[], int],
        attention: Callable[[], Mapping[str, Choice]],
    ) -> None:
        """Show the current state of a queue and a model too, whenever the metrics are read. Call it once.

        Args:
            scheduler: The queue.
            work: Returns what the device has computed.
            compilations: Returns the number of programs that were compiled since the warm-up.
            attention: Returns the attention implementations, by part of the model.
        """
        self.registry.register(_State(scheduler, work, compilations, attention))

    async def watch_event_loop(self) -> None:
        """Measure how long the event loop is blocked, until cancelled."""
        while True:
            before = perf_counter()
            await asyncio.sleep(_TICK_S)
            self._stalls.observe(max(0.0, perf_counter() - before - _TICK_S))

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class _State(Collector):
    """The metrics that other objects count."""

    def __init__(
        self,
        scheduler: Scheduler,
        work: Callable[[], Work],
        compilations: Callable[[], int],
        attention: Callable[[], Mapping[str, Choice]],
    ) -> None:
        self.scheduler = scheduler
        self.work = work
        self.compilations = compilations
        self.attention = attention

    def collect(self) -> Iterable[Metric]:
        scheduler, work = self.scheduler, self.work()
        compiled = self.compilations() if scheduler.ready else 0
        ready = scheduler.ready and not scheduler.stopping and not scheduler.failing
        yield GaugeMetricFamily("jaxrank_ready", "1 while GET /ready answers 200.", ready)
        yield GaugeMetricFamily("jaxrank_queue_requests", "Requests accepted and not answered.", scheduler.requests)
        yield GaugeMetricFamily("jaxrank_queue_tokens", "Tokens accepted and not scored.", scheduler.tokens)
        yield GaugeMetricFamily("jaxrank_drain_tokens_per_second", "Tokens scored a second, smoothed.", scheduler.rate)
        yield GaugeMetricFamily("jaxrank_compilations_after_ready", "Anything but 0 is a bug.", compiled)
        yield CounterMetricFamily("jaxrank_rows", "Rows that the device computed.", work.rows)
        yield CounterMetricFamily("jaxrank_row_tokens", "Tokens of those rows, filler included.", work.row_tokens)
        yield CounterMetricFamily("jaxrank_computed_tokens", "The same without filler.", work.computed_tokens)
        yield CounterMetricFamily(
            "jaxrank_pair_tokens", "Tokens of the scored pairs, shared ones counted for every pair.", work.pair_tokens
        )
        bodies = InfoMetricFamily(
            "jaxrank_attention", "The attention body in use, and those that failed on this device.", labels=["part"]
        )
        for part, choice in self.attention().items():
            failed = ",".join(one.implementation for one in choice.failed)
            bodies.add_metric([part], {"implementation": choice.implementation, "fallback_from": failed})
        yield bodies


class Span(Protocol):
    """A traced request. See jaxrank.server.observe.tracing."""

    def stage(self, name: str, begin: float, end: float) -> None: ...
    def finish(self, status: int, dialect: str) -> None: ...


class Stages:
    """Notes the time of each stage of one request, in the metrics, and in its trace if it has one.

    Args:
        metrics: The metrics.
        span: The request's trace. None for no trace.
    """

    def __init__(self, metrics: Metrics, span: Span | None = None) -> None:
        self.metrics = metrics
        self.span = span

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time a block as a stage."""
        begin = perf_counter()
        try:
            yield
        finally:
            self.add(name, begin, perf_counter())

    def add(self, name: str, begin: float, end: float) -> None:
        """Note a stage that is over.

        Args:
            name: The name of the stage.
            begin: When it began, by time.perf_counter().
            end: When it ended, by time.perf_counter().
        """
        self.metrics.stage(name, end - begin)
        if self.span is not None:
            self.span.stage(name, begin, end)
