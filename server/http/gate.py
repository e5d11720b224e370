"""The gate of every scoring request: it reads the body, holds a queue place, and watches the deadline and the client.

The gate bounds the memory of all requests together. It counts the bytes of their bodies while they arrive, and the
queue limits its requests and tokens.
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
"""Bodies up to this size are read even if they will be refused, because they show the dialect."""


@dataclass(frozen=True)
class GateLimits:
    """The limits of a gate.

    Args:
        max_body_bytes: Most bytes in the body of one request.
        max_queue_bytes: Most bytes in the bodies of all requests that are under way.
        body_timeout_s: Seconds for a body to arrive.
        request_timeout_s: Seconds from there to the answer. A request may ask for less.
    """

    max_body_bytes: int
    max_queue_bytes: int
    body_timeout_s: float
    request_timeout_s: float


class Gate:
    """Admits requests, and ends them when their time is up. For one event loop.

    Args:
        scheduler: It scores the requests, and its queue admits them.
        limits: The limits of the gate.
    """

    def __init__(self, scheduler: Scheduler, limits: GateLimits) -> None:
        self.scheduler = scheduler
        self.limits = limits
        self.bytes = 0  # in the bodies of requests that are under way
        self._leashes: set[Leash] = set()

    @contextlib.asynccontextmanager
    async def enter(self, request: Request) -> AsyncIterator[bytes]:
        """Read the request's body and hold its place in the queue. The block makes the answer.

        The place is free again as soon as the block ends, also by an error.

        Args:
            request: The request.

        Returns:
            A context manager, which yields the body.

        Raises:
            Refusal: The request cannot be accepted.
            Expired: Its time is up. This can be raised in the block too.
            Closing: The server's time is up. This can be raised in the block too.
            ClientGone: Its client has left. This can be raised in the block too.
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
                    request.state.body = body  # shows the dialect for a refusal
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
        """Refuse a request that would be refused anyway. Called before its body is read, and after.

        Raises:
            Refusal: The model is not ready, or the queue has no room.
        """
        scheduler = self.scheduler
        if not scheduler.ready and not scheduler.failed and not scheduler.stopping:
            raise NotReady
        scheduler.check_room()

    def _timeout_s(self, request: Request) -> float:
        """Return the server's timeout, or the shorter one of the header X-Request-Timeout.

        Raises:
            Malformed: The header is not a number of seconds above 0.
        """
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
        """Accept no new requests, and wait until all accepted ones are answered.

        Args:
            grace_s: Seconds to wait. The requests that are left after that are answered 503.
        """
        self.scheduler.refuse_new()
        end = asyncio.get_running_loop().time() + grace_s
        while self._leashes and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.02)
        for leash in list(self._leashes):
            leash.cut(Closing())
