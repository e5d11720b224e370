"""Requests that a replica took with it when it died, sent once more: for the HTTP proxies of Ray Serve.

Ray Serve tries again by itself only what no replica has begun; a request under way on one that dies is answered 500.
Reranking changes nothing, so that a second try is harmless. The proxies take this in when the environment in which Ray
starts has

    RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=jaxrank.server.on_ray.retry:middleware
"""

from __future__ import annotations

import logging

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxrank.server.errors import Unavailable

TRIES = 3
"""Of one request. More would let a request that kills its replica kill more of them."""

KEPT_BYTES = 40_000_000
"""Largest body that is kept for another try: the largest that the server takes unless told otherwise."""

log = logging.getLogger("ray.serve")


def middleware() -> list[Middleware]:
    """What Ray Serve's HTTP proxies put around themselves."""
    return [Middleware(Retry)]


class Retry:
    """Asks `app`, a proxy, again when it ends without an answer, as it does when a replica dies.

    Answers are held until their first body, with which a replica's part is done: a replica that dies between the two
    has not answered. The proxy repeats the X-Request-Id that a replica has written already; one goes out.
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
    """What a client sends, kept for more than one reader, one after the other."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._messages: list[Message] = []
        self._bytes = 0
        self.whole = True  # whether all of it is kept
        self.ended = False  # the client has left

    def reader(self) -> Receive:
        """What receives everything from the beginning on."""
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
    """What a client is sent, from its first body on."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._start: Message | None = None
        self.begun = False

    def forget(self) -> None:
        """Drop a beginning that no body followed."""
        self._start = None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = {**message, "headers": _one_request_id(message["headers"])}
            return
        if self._start is not None:
            self.begun = True
            start, self._start = self._start, None
            await self._send(start)
        await self._send(message)


def _one_request_id(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """The headers with the first X-Request-Id alone: the application's, which its log has."""
    first = next((pair for pair in headers if pair[0].lower() == b"x-request-id"), None)
    return [pair for pair in headers if pair[0].lower() != b"x-request-id" or pair is first]
