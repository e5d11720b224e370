"""Sends traces to an OpenTelemetry collector over OTLP/HTTP, if the extra `otel` is installed.

A request's span has one child for each stage: tokenise, media, queue, score, answer. It continues the trace of a
`traceparent` header. No attribute has text of a request.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from starlette.types import Scope

from jaxrank.errors import RequestError
from jaxrank.version import __version__

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

NAMES = {"wait": "queue"}


class Tracing:
    """Traces requests with its own tracer, not with the process's tracer.

    Args:
        endpoint: The URL that traces are posted to, such as http://localhost:4318/v1/traces.

    Raises:
        RequestError: OpenTelemetry is not installed, or the endpoint is not a URL.
    """

    def __init__(self, endpoint: str) -> None:
        if not endpoint.startswith(("http://", "https://")):
            raise RequestError("--otlp-endpoint must be a URL such as http://localhost:4318/v1/traces")
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError:
            raise RequestError("--otlp-endpoint needs OpenTelemetry: pip install 'jaxrank[otel]'") from None
        resource = Resource.create({"service.name": "jaxrank", "service.version": __version__})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint, timeout=5)))
        self._tracer = self._provider.get_tracer("jaxrank", __version__)

    def begin(self, scope: Scope, request_id: str) -> RequestSpan:
        """Return the span of a request that has just come."""
        return RequestSpan(self._tracer, scope, request_id)

    def close(self) -> None:
        """Send the remaining traces, for a few seconds at most, and end. It blocks."""
        self._provider.force_flush(5000)
        self._provider.shutdown()


class RequestSpan:
    """The span of one request, from its headers to its answer."""

    def __init__(self, tracer: Tracer, scope: Scope, request_id: str) -> None:
        from opentelemetry.trace import SpanKind, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        self._tracer = tracer
        # stages use perf_counter, and spans use nanoseconds since 1970
        self._offset = time.time_ns() - int(time.perf_counter() * 1e9)
        attributes: dict[str, Any] = {"http.request.method": scope["method"], "jaxrank.request_id": request_id}
        self._span = tracer.start_span(
            "request", TraceContextTextMapPropagator().extract(headers), SpanKind.SERVER, attributes
        )
        self._context = set_span_in_context(self._span)

    def stage(self, name: str, begin: float, end: float) -> None:
        """Add a stage that is over. Times are by time.perf_counter()."""
        start, stop = (int(moment * 1e9) + self._offset for moment in (begin, end))
        self._tracer.start_span(NAMES.get(name, name), self._context, start_time=start).end(stop)

    def finish(self, status: int, dialect: str) -> None:
        """End the span, because the request is answered."""
        from opentelemetry.trace import StatusCode

        self._span.set_attributes({"http.response.status_code": status, "jaxrank.dialect": dialect})
        if status >= 500:
            self._span.set_status(StatusCode.ERROR)
        self._span.end()
