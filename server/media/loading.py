"""Loads the images and videos of one request, in parallel and within limits. Equal ones are loaded once."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import ParamSpec, Protocol, TypeVar

from jaxrank.errors import MediaError
from jaxrank.media.images import Kind
from jaxrank.server.media.fetch import Fetcher, MediaAccess
from jaxrank.types import Patches

T = TypeVar("T")
P = ParamSpec("P")


@dataclass(frozen=True)
class MediaPart:
    """An image or video that a request names.

    Args:
        kind: Image or video.
        source: Its address. For a video listed by its frames, the addresses of the images.
    """

    kind: Kind
    source: str | tuple[str, ...]

    @property
    def addresses(self) -> tuple[str, ...]:
        """All addresses of the part."""
        return (self.source,) if isinstance(self.source, str) else self.source


class PatchDecoder(Protocol):
    """The part of jaxrank.media.decoding.Decoder that the loader uses."""

    @property
    def workers(self) -> int: ...
    def decode(self, kind: Kind, data: bytes | Sequence[bytes]) -> Patches: ...


class MediaLoader:
    """Loads the media of requests, with one fetcher and one decoder. For one event loop.

    It closes neither of the two, because their creator owns them.

    Args:
        fetcher: Fetches the bytes.
        decoder: Makes patches of the bytes.
        count: Called with "fetched" or "decoded", and with the number of bytes.
    """

    def __init__(
        self, fetcher: Fetcher, decoder: PatchDecoder, count: Callable[[str, int], None] = lambda step, size: None
    ) -> None:
        self.count = count
        self.access = fetcher.access
        self.fetcher = fetcher
        self._decode = decoder.decode
        # as many threads as can decode: more would wait in the decoder, where they cannot be cancelled
        self._threads = ThreadPoolExecutor(decoder.workers, thread_name_prefix="jaxrank-decode")

    def close(self) -> None:
        """Accept no more work. Decoding that has begun ends by itself."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def load(self, parts: Sequence[MediaPart]) -> list[Patches]:
        """Return the patches of every part. Equal parts share one object.

        The number of parts and their addresses are checked before the first byte is read. At an error, the rest of the
        work is cancelled, as it is when the caller is cancelled.

        Args:
            parts: The images and videos of one request.

        Raises:
            MediaError: A part is refused. Its index is that of the part.
        """
        if sum(len(part.addresses) for part in parts) > self.access.max_items:
            raise self.access.refusal("too_many_items")
        for index, part in enumerate(parts):
            try:
                for address in part.addresses:
                    self.fetcher.check(address)
            except MediaError as error:
                raise MediaError(error.code, str(error), index) from None
        try:
            async with asyncio.TaskGroup() as group:
                request = _Request(self, group)
                tasks = [group.create_task(request.part(index, part)) for index, part in enumerate(parts)]
        except BaseExceptionGroup as failed:
            raise _first(failed) from None
        return [task.result() for task in tasks]

    async def decode(self, kind: Kind, data: bytes | Sequence[bytes]) -> Patches:
        """Decode on a thread. Work that is cancelled before its turn is never decoded.

        Raises:
            MediaError: The data cannot be decoded.
        """
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._decode, kind, data)


class _Request:
    """The work under way for one request, by address and by content."""

    def __init__(self, loader: MediaLoader, group: asyncio.TaskGroup) -> None:
        self.loader = loader
        self.group = group
        self.fetched: dict[str, asyncio.Task[tuple[bytes, bytes] | MediaError]] = {}
        self.decoded: dict[object, asyncio.Task[Patches | MediaError]] = {}
        self.slots = asyncio.Semaphore(loader.access.at_once)
        self.take = _Budget(loader.access, "too_many_request_bytes", loader.access.max_request_bytes)
        self.take_patches = _Budget(loader.access, "too_many_patch_bytes", loader.access.max_patch_bytes)

    async def part(self, index: int, part: MediaPart) -> Patches:
        """Return the patches of one part.

        Raises:
            MediaError: The part is refused. Its index is `index`.
        """
        try:
            found = [_value(await fetch) for fetch in [self._fetch(address) for address in part.addresses]]
            single = isinstance(part.source, str)
            key = (part.kind, single, *(digest for _, digest in found))
            if key not in self.decoded:
                data = found[0][0] if single else [content for content, _ in found]
                self.decoded[key] = self.group.create_task(_caught(self._decoded, part.kind, data))
            return _value(await self.decoded[key])
        except MediaError as error:
            raise MediaError(error.code, str(error), index) from None

    def _fetch(self, address: str) -> asyncio.Task[tuple[bytes, bytes] | MediaError]:
        if address not in self.fetched:
            self.fetched[address] = self.group.create_task(_caught(self._fetched, address))
        return self.fetched[address]

    async def _fetched(self, address: str) -> tuple[bytes, bytes]:
        """Return the content and its hash."""
        async with self.slots:
            content = await self.loader.fetcher.fetch(address, self.take)
            self.loader.count("fetched", len(content))
            return content, await asyncio.to_thread(lambda: hashlib.sha256(content).digest())

    async def _decoded(self, kind: Kind, data: bytes | list[bytes]) -> Patches:
        patches = await self.loader.decode(kind, data)
        self.loader.count("decoded", patches.pixels.nbytes)
        self.take_patches(patches.pixels.nbytes)
        return patches


class _Budget:
    """Counts bytes, and refuses bytes beyond the limit."""

    def __init__(self, access: MediaAccess, code: str, most: int) -> None:
        self.access = access
        self.code = code
        self.left = most

    def __call__(self, size: int) -> None:
        self.left -= size
        if self.left < 0:
            raise self.access.refusal(self.code)


async def _caught(work: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T | MediaError:
    """Return a refusal as a value, so that each part that waits for it can report its own index."""
    try:
        return await work(*args, **kwargs)
    except MediaError as error:
        return error


def _value(outcome: T | MediaError) -> T:
    if isinstance(outcome, MediaError):
        raise outcome
    return outcome


def _first(failed: BaseExceptionGroup) -> BaseException:
    """Return the error to report: an unforeseen one if there is any, else the refusal of the earliest part."""
    errors = list(failed.exceptions)
    unforeseen = [error for error in errors if not isinstance(error, MediaError)]
    refusals = [error for error in errors if isinstance(error, MediaError)]
    return unforeseen[0] if unforeseen else min(refusals, key=lambda error: error.index or 0)
