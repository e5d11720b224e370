"""Bytes and connections: reading a body within limits, noticing that a client left, the outermost layer of the app."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
import traceback
import uuid
from collections.abc import AsyncIterator
from urllib.parse import quote

from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxrank.server.errors import ClientGone, Malformed, Refusal, TooLarge, internal_error

log = logging.getLogger(__name__)
access = logging.getLogger("jaxrank.access")

PROBES = ("/health", "/ready")
"""What load balancers ask every second: logged at level DEBUG."""

_REQUEST_ID = re.compile(rb"[!-~]{1,128}")


class SlowBody(Refusal):
    """A body that does not arrive in time."""

    status = 408
    type = "RequestTimeout"


async def read_body(request: Request, limit: int, timeout_s: float) -> bytes:
    """The request's body. Raises TooLarge, SlowBody, Malformed (content type) or ClientGone.

    A body over the limit is read on for a while and thrown away, because most clients send all of it before they
    look for an answer and would otherwise see a broken connection.
    """
    _check_headers(request)
    declared = request.headers.get("content-length", "")
    size = int(declared) if declared.isdecimal() else 0
    if size > limit and "expect" in request.headers:
        raise _too_large(limit)  # the client asked first and has sent nothing
    chunks: list[bytes] = []
    received = 0
    try:
        async with asyncio.timeout(timeout_s):
            async for chunk in request.stream():
                received += len(chunk)
                if max(received, size) <= limit:
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
    return b"".join(chunks)


_GRACE_BYTES = 32_000_000


def _too_large(limit: int) -> TooLarge:
    return TooLarge(
        f"The body is larger than {limit} bytes. Send less in one request, or raise the server's max_body_bytes.",
        headers={"Connection": "close"},
    )


def _check_headers(request: Request) -> None:
    """Raise Malformed unless the headers announce plain JSON."""
    content_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if content_type != "application/json":
        raise Malformed("The Content-Type must be application/json.")
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise Malformed("The Content-Encoding must be identity: send the body uncompressed.")


@contextlib.asynccontextmanager
async def while_connected(request: Request) -> AsyncIterator[None]:
    """Cancel the block when the client closes the connection. Raises ClientGone then. The body must have been read."""
    task = asyncio.current_task()
    assert task is not None
    gone = False

    def leave(_: asyncio.Task[None]) -> None:
        nonlocal gone
        gone = True
        task.cancel()

    watch = asyncio.create_task(_gone(request.receive))
    watch.add_done_callback(leave)
    try:
        yield
    except asyncio.CancelledError:
        if gone and not task.uncancel():
            raise ClientGone from None
        raise
    finally:
        watch.remove_done_callback(leave)
        watch.cancel()


async def _gone(receive: Receive) -> None:
    """Return when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


class Envelope:
    """The outermost layer: a request id on every answer, one line in the access log, nothing unforeseen gets out.

    A client's own X-Request-Id is kept when it is 1 to 128 printable ASCII characters. The access log is the logger
    jaxrank.access, one line a request, without a query string and with the path escaped and cut; probes at DEBUG.
    """

    def __init__(self, app: ASGIApp, access_log: bool = True) -> None:
        self.app = app
        self.access_log = access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        request_id = _request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id.decode()
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
            status = 499  # as nginx logs it; there is nobody to send it to
        except Exception as error:
            _log_crash(request_id, error)
            if not status:
                await internal_error(request_id.decode())(scope, receive, stamped)
        finally:
            if self.access_log:
                _log_access(scope, status, time.perf_counter() - started, request_id)


def _request_id(scope: Scope) -> bytes:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
            return value
    return uuid.uuid4().hex.encode()


def _log_crash(request_id: bytes, error: Exception) -> None:
    """Log where and of what type an unforeseen error was. Its text may quote the request, so it is left out."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    log.error("request %s: unforeseen %s\n%s", request_id.decode(), type(error).__name__, frames)


def _log_access(scope: Scope, status: int, seconds: float, request_id: bytes) -> None:
    client = (scope.get("client") or ("-",))[0]
    path = quote(scope["path"])[:80]
    level = logging.DEBUG if path in PROBES else logging.INFO
    access.log(
        level, "%s %s %s %d %.1fms %s", client, scope["method"], path, status, seconds * 1000, request_id.decode()
    )
