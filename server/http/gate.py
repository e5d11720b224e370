"""What every scoring request passes: room for its body, a place in the queue, its deadline, its client's presence.

Memory is bounded here: of all requests together by the bytes of their bodies, which are counted while they arrive, and
by the queue's requests and tokens.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator
from dataclasses import dataclass

from starlette.requests import Request

from jaxrank.server.errors import Closing, Expired, Malformed, NotReady, Overloaded
from jaxrank.server.http.leash import Leash
from jaxrank.server.http.transport import read_body
from jaxrank.server.scheduler import Scheduler

SMALL_BYTES = 65_536
"""Bodies up to this size are read even where they are to be refused: they tell in which dialect."""


@dataclass(frozen=True)
class GateLimits:
    """max_body_bytes: of one request. max_queue_bytes: of all that are under way. body_timeout_s: for a body to arrive.
    request_timeout_s: from there to the answer; a request may ask for less."""

    max_body_bytes: int
    max_queue_bytes: int
    body_timeout_s: float
    request_timeout_s: float


class Gate:
    """Lets requests in, and out again when their time is up. For one event loop."""

    def __init__(self, scheduler: Scheduler, limits: GateLimits) -> None:
        self.scheduler = scheduler
        self.limits = limits
        self.bytes = 0  # of the bodies of requests that are under way
        self._leashes: set[Leash] = set()

    @contextlib.asynccontextmanager
    async def enter(self, request: Request) -> AsyncIterator[bytes]:
        """Read the request's body and hold its place; the block is for making the answer.

        Raises Refusal when the request cannot be taken, and, out of the block too, Expired when its time is up, Closing
        when the server's is, ClientGone when its client has left. The place is free again as soon as that happens.
        """
        timeout_s = self._timeout_s(request)
        size = request.headers.get("content-length", "")
        if not size.isdecimal() or int(size) > SMALL_BYTES:
            self._refuse_early()
        held = 0

        def take(size: int) -> None:
            nonlocal held
            if self.bytes + size > self.limits.max_queue_bytes and self.bytes > held:
                raise Overloaded(self.scheduler.retry_after())
            held += size
            self.bytes += size

        try:
            with Leash() as leash:
                self._leashes.add(leash)
                try:
                    body = await read_body(request, self.limits.max_body_bytes, self.limits.body_timeout_s, take)
                    request.state.body = body  # tells in which dialect to refuse
                    leash.cut_after(timeout_s, Expired(timeout_s))
                    leash.cut_when_gone(request.receive)
                    self._refuse_early()
                    with self.scheduler.admit():
                        yield body
                finally:
                    self._leashes.discard(leash)
        finally:
            self.bytes -= held

    def _refuse_early(self) -> None:
        """Raise Refusal for what would be refused anyway, before a body is read and after."""
        scheduler = self.scheduler
        if not scheduler.ready and not scheduler.failed and not scheduler.stopping:
            raise NotReady
        scheduler.check_room()

    def _timeout_s(self, request: Request) -> float:
        """The server's timeout, or the shorter one of the header X-Request-Timeout. Raises Malformed."""
        given = request.headers.get("x-request-timeout")
        if given is None:
            return self.limits.request_timeout_s
        try:
            seconds = float(given)
        except ValueError:
            seconds = math.nan
        if not seconds > 0:
            raise Malformed("The header X-Request-Timeout must be a number of seconds above 0, such as 2.5.")
        return min(seconds, self.limits.request_timeout_s)

    async def empty(self, grace_s: float) -> None:
        """Take nothing new, and wait until all that was taken is answered; after `grace_s` the rest is answered 503."""
        self.scheduler.refuse_new()
        end = asyncio.get_running_loop().time() + grace_s
        while self._leashes and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.02)
        for leash in list(self._leashes):
            leash.cut(Closing())
