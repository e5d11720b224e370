"""Bytes and connections: reads a body within limits, and wraps the application in its outermost layer."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import traceback
import uuid
from collections.abc import Callable
from urllib.parse import quote

from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxrank.server.errors import ClientGone, LargeHead, Malformed, SlowBody, TooLarge, internal_error
from jaxrank.server.observe.metrics import Metrics, Stages
from jaxrank.server.observe.tracing import Tracing

log = logging.getLogger(__name__)
access = logging.getLogger("jaxrank.access")

PROBES = ("/health", "/ready", "/metrics")
"""Load balancers and Prometheus request these all the time. They are logged at level DEBUG."""

LARGE_BYTES = 500_000
"""Bodies of at least this size, and their answers, are put together in threads.

New memory of several megabytes takes tens of milliseconds, which the event loop does not have.
"""

_REQUEST_ID = re.compile(rb"[!-~]{1,128}")


async def read_body(
    request: Request, limit: int, timeout_s: float, take: Callable[[int], None] = lambda size: None
) -> bytes:
    """Return the request's body.

    A body over the limit is read on for a while and dropped. Most clients send all of it before they look for an
    answer, and would otherwise see a broken connection.

    Args:
        request: The request.
        limit: Most bytes in the body.
        timeout_s: Seconds for the body to arrive.
        take: Called with the size of every piece, in bytes, before the piece is kept. Its errors are passed on.

    Raises:
        ClientGone: The client has left.
        Malformed: The headers do not announce uncompressed JSON.
        SlowBody: The body does not arrive in time.
        TooLarge: The body is over the limit.
    """
    _check_headers(request)
    declared = request.headers.get("content-length", "")
    size = int(declared) if declared.isdecimal() else 0
    if size > limit and "expect" in request.headers:
        raise _too_large(limit)  # the client waits for a go-ahead and has sent nothing
    chunks: list[bytes] = []
    received = 0
    try:
        async with asyncio.timeout(timeout_s):
            async for chunk in request.stream():
                received += len(chunk)
                if max(received, size) <= limit:
                    take(len(chunk))
                    chunks.append(chunk)
                else:
                    chunks.clear()
                if received > limit + _GRACE_BYTES:
                    break
    except TimeoutError:
        raise SlowBody(f"The body did not arrive within {timeout_s:g} s.", headers={"Connection": "close"}) from None
    except ClientDisconnect:
        raise ClientGone from None
    if max(received, size) > limit:
        raise _too_large(limit)
    if received < LARGE_BYTES:
        return b"".join(chunks)
    return await asyncio.to_thread(b"".join, chunks)


_GRACE_BYTES = 32_000_000


def _too_large(limit: int) -> TooLarge:
    return TooLarge(
        f"The body is larger than {limit} bytes. Send less in one request, or raise the server's max_body_bytes.",
        headers={"Connection": "close"},
    )


def _check_headers(request: Request) -> None:
    """Check that the headers announce plain JSON.

    Raises:
        Malformed: They do not.
    """
    content_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if content_type != "application/json":
        raise Malformed("The Content-Type must be application/json.")
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise Malformed("The Content-Encoding must be identity: send the body uncompressed.")


class HeadLimits:
    """A dependency of every route that limits the headers.

    Args:
        max_headers: Most headers in one request.
        max_bytes: Most bytes of the headers and the address together.
    """

    def __init__(self, max_headers: int, max_bytes: int) -> None:
        self.max_headers = max_headers
        self.max_bytes = max_bytes

    async def __call__(self, request: Request) -> None:
        """Let the request pass, or refuse it.

        Raises:
            LargeHead: There are too many headers, or too many bytes.
        """
        scope = request.scope
        headers = scope["headers"]
        size = len(scope["raw_path"] or b"") + len(scope["query_string"])
        size += sum(len(name) + len(value) for name, value in headers)
        if len(headers) > self.max_headers or size > self.max_bytes:
            raise LargeHead(
                f"The request's address and headers are too large. Send at most {self.max_headers} headers and "
                f"{self.max_bytes} bytes.",
                headers={"Connection": "close"},
            )


class Envelope:
    """The outermost layer of the application. No unforeseen error gets past it.

    Every answer gets a request id, one line in the access log, one count in the metrics, and one span in the traces. A
    client's own X-Request-Id is kept if it is 1 to 128 printable ASCII characters.

    The access log is the logger jaxrank.access, with one line a request. The line has no query string, and its path is
    escaped and cut. Probes are logged at DEBUG.

    If a route has set state["dialect"], it labels a request that scores.

    Args:
        app: The application inside this middleware.
        metrics: Counts the requests.
        tracing: Where requests are traced. None for no traces.
        access_log: Whether there is an access log.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        tracing: Tracing | None = None,
        access_log: bool = True,
    ) -> None:
        self.app = app
        self.metrics = metrics
        self.tracing = tracing
        self.access_log = access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        request_id = _request_id(scope)
        span = None if self.tracing is None else self.tracing.begin(scope, request_id.decode())
        state = scope.setdefault("state", {})
        state |= {"request_id": request_id.decode(), "stages": Stages(self.metrics, span)}
        status = 0

        async def stamped(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id)]
            await send(message)

        try:
            await self.app(scope, receive, stamped)
        except ClientGone:
            status = 499  # as nginx logs it; no client is left to receive it
        except Exception as error:
            _log_crash(request_id, error)
            if not status:
                await internal_error(request_id.decode())(scope, receive, stamped)
        finally:
            seconds, dialect = time.perf_counter() - started, state.get("dialect", "none")
            self.metrics.request(dialect, status, seconds)
            if span is not None:
                span.finish(status, dialect)
            if self.access_log:
                _log_access(scope, status, seconds, request_id, dialect)


def _request_id(scope: Scope) -> bytes:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
            return value
    return uuid.uuid4().hex.encode()


def _log_crash(request_id: bytes, error: Exception) -> None:
    """Log the place and the type of an unforeseen error. Its text may quote the request, so it is left out."""
    identity = request_id.decode()
    frames = "".join(traceback.format_tb(error.__traceback__))
    fields = {"request_id": identity}
    log.error("request %s: unforeseen %s\n%s", identity, type(error).__name__, frames, extra={"fields": fields})


def _log_access(scope: Scope, status: int, seconds: float, request_id: bytes, dialect: str) -> None:
    client = (scope.get("client") or ("-",))[0]
    path = quote(scope["path"])[:80]
    level = logging.DEBUG if path in PROBES else logging.INFO
    if access.isEnabledFor(level):
        milliseconds, identity = round(seconds * 1000, 1), request_id.decode()
        fields = {
            "request_id": identity, "client": client, "method": scope["method"], "path": path, "status": status,
            "ms": milliseconds, "dialect": dialect,
        }  # fmt: skip
        line = (client, scope["method"], path, status, milliseconds, identity)
        access.log(level, "%s %s %s %d %.1fms %s", *line, extra={"fields": fields})
