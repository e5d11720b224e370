"""What may end a request before its answer: its client leaves, its time is up, or the server's time is up."""

from __future__ import annotations

import asyncio
from types import TracebackType

from starlette.types import Receive

from jaxrank.server.errors import ClientGone


class Leash:
    """A block of one task that others can end, by raising an error of their choice in it: `with Leash() as leash:`.

    Call its methods on the event loop's thread only.
    """

    def __init__(self) -> None:
        self._reason: Exception | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._watch: asyncio.Task[None] | None = None

    def __enter__(self) -> Leash:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        return self

    def cut(self, reason: Exception) -> None:
        """End the block, which then raises `reason`. The first reason counts. The block's own task must not call it."""
        if self._reason is None:
            self._reason = reason
            self._task.cancel()

    def cut_after(self, seconds: float, reason: Exception) -> None:
        """End the block with `reason` after that many seconds, if it is not over by then."""
        self._timer = asyncio.get_running_loop().call_later(seconds, self.cut, reason)

    def cut_when_gone(self, receive: Receive) -> None:
        """End the block with ClientGone when the client closes the connection. The body must have been read before."""
        self._watch = asyncio.create_task(_gone(receive))
        self._watch.add_done_callback(lambda watch: None if watch.cancelled() else self.cut(ClientGone()))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._watch is not None:
            self._watch.cancel()
        # as asyncio.timeout does: a cancellation by others goes on
        if self._reason is not None and not self._task.uncancel():
            raise self._reason from None


async def _gone(receive: Receive) -> None:
    """Return when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
