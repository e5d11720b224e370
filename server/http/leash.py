"""What may end a request before its answer: the client leaves, its time is up, the server's time is up."""

from __future__ import annotations

import asyncio
from types import TracebackType

from starlette.types import Receive

from jaxrank.server.errors import ClientGone


class Leash:
    """A block of one task that others can end, by raising an error of their choice in it; `with Leash() as leash:`.

    All of it is for the event loop's thread.
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
        """End the block: `reason` is raised from it. The first reason counts. Not for the block's own task."""
        if self._reason is None:
            self._reason = reason
            self._task.cancel()

    def cut_after(self, seconds: float, reason: Exception) -> None:
        """The same in that many seconds, if the block is not over then."""
        self._timer = asyncio.get_running_loop().call_later(seconds, self.cut, reason)

    def cut_when_gone(self, receive: Receive) -> None:
        """The same, with ClientGone, when the client closes the connection. Its body must have been read."""
        self._watch = asyncio.create_task(_gone(receive))
        self._watch.add_done_callback(lambda watch: None if watch.cancelled() else self.cut(ClientGone()))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._watch is not None:
            self._watch.cancel()
        # as asyncio.timeout does: a cancellation that is none of ours goes on
        if self._reason is not None and not self._task.uncancel():
            raise self._reason from None


async def _gone(receive: Receive) -> None:
    """Return when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
