"""Sends requests once more if their replica died: for the HTTP proxies of Ray Serve.

Ray Serve itself repeats only requests that no replica has begun. A request under way on a replica that dies is answered
500. Reranking changes nothing, so a second try is harmless. The proxies use this middleware if Ray starts in an
environment with

    RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=jaxrank.server.on_ray.retry:middleware
"""

from __future__ import annotations

import logging

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxrank.server.errors import Unavailable

TRIES = 3
"""Most tries of one request. With more, a request that kills its replica could kill more of them."""

KEPT_BYTES = 40_000_000
"""Largest body, in bytes, that is kept for another try. It is the server's largest default limit."""

log = logging.getLogger("ray.serve")


def middleware() -> list[Middleware]:
    """Return the middleware for Ray Serve's HTTP proxies."""
    return [Middleware(Retry)]


class Retry:
    """Calls `app`, a proxy, again if it ends without an answer, as it does when a replica dies.

    The start of an answer is held back until its first body, because a replica's part ends there. A replica that dies
    between the two has not answered. The proxy repeats an X-Request-Id that a replica has already written, so only one
    goes out.

    Args:
        app: The proxy.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request, answer = Kept(receive), Held(send)
        for left in reversed(range(TRIES)):
            answer.forget()
            await self.app(scope, request.reader(), answer.send)
            if answer.begun or request.ended:
                return
            log.warning("a replica ended before its answer; %d more tries", left if request.whole else 0)
            if not request.whole:
                break
        refusal = Unavailable("The replicas that had this request have ended. Try again in 5 s.", 5)
        await refusal.response()(scope, receive, send)


class Kept:
    """Keeps what a client sends for several readers, one after the other."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._messages: list[Message] = []
        self._bytes = 0
        self.whole = True  # whether all of it is kept
        self.ended = False  # whether the client has left

    def reader(self) -> Receive:
        """Return a callable that receives everything from the beginning."""
        before = iter(list(self._messages))

        async def receive() -> Message:
            for message in before:
                return message
            message = await self._receive()
            if message["type"] != "http.request":
                self.ended = True
                return message
            self._bytes += len(message.get("body", b""))
            if self._bytes > KEPT_BYTES:
                self.whole = False
                self._messages.clear()
            elif self.whole:
                self._messages.append(message)
            return message

        return receive


class Held:
    """Holds back what a client is sent, until its first body."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._start: Message | None = None
        self.begun = False

    def forget(self) -> None:
        """Drop the start of an answer that no body followed."""
        self._start = None

    async def send(self, message: Message) -> None:
        """Hold back the start of an answer, and send it with the first body."""
        if message["type"] == "http.response.start":
            self._start = {**message, "headers": _one_request_id(message["headers"])}
            return
        if self._start is not None:
            self.begun = True
            start, self._start = self._start, None
            await self._send(start)
        await self._send(message)


def _one_request_id(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Return the headers with only the first X-Request-Id. It is the application's, which its log has."""
    first = next((pair for pair in headers if pair[0].lower() == b"x-request-id"), None)
    return [pair for pair in headers if pair[0].lower() != b"x-request-id" or pair is first]
