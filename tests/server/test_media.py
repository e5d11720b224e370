"""A request's media: each once, in bounds, with the part that is to blame, and no longer than somebody waits."""

from __future__ import annotations

import asyncio
import base64
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np
import pytest

from jaxrank.errors import JaxrankError, MediaError
from jaxrank.media.decoding import Decoder
from jaxrank.media.images import Kind
from jaxrank.media.patches import image_patches, video_patches
from jaxrank.server.media.fetch import Fetcher, MediaAccess
from jaxrank.server.media.loading import MediaLoader, MediaPart
from jaxrank.types import Patches
from tests.media import encoded, photo
from tests.server.web import Web, answer, drip, web


class FakeDecoder:
    """Patches that hold the number of bytes they come from. b"bad" is refused, b"bug" fails."""

    def __init__(self, workers: int = 2) -> None:
        self.workers = workers
        self.seen: list[tuple[Kind, Any]] = []
        self.gate = threading.Event()
        self.gate.set()

    def decode(self, kind: Kind, data: bytes | Sequence[bytes]) -> Patches:
        self.seen.append((kind, data))
        self.gate.wait(10)
        if data == b"bad":
            raise MediaError("damaged", "damaged; send another")
        if data == b"bug":
            raise JaxrankError("a process does not start")
        return Patches(np.zeros((len(data), 25), np.float32), (1, 1, len(data)))


def data_url(content: bytes) -> str:
    return "data:;base64," + base64.b64encode(content).decode()


def image(source: str | bytes) -> MediaPart:
    return MediaPart("image", source if isinstance(source, str) else data_url(source))


def running(
    work: Callable[[MediaLoader, FakeDecoder, Web], Awaitable[None]], decoder: FakeDecoder | None = None, **access: Any
) -> None:
    """Run `work` with a loader, a decoder and a web site."""
    decoder = decoder or FakeDecoder()

    async def around() -> None:
        pages = {"a": answer(b"aaa"), "b": answer(b"bb"), "same": answer(b"aaa"), "drip": drip(1000, 0.02)}
        async with web(**pages) as site, Fetcher(MediaAccess(private=True, **access)) as fetcher:
            loader = MediaLoader(fetcher, decoder)
            try:
                await work(loader, decoder, site)
            finally:
                decoder.gate.set()
                loader.close()

    asyncio.run(around())


async def refused(loader: MediaLoader, *parts: MediaPart) -> tuple[str, int | None]:
    with pytest.raises(MediaError) as caught:
        await loader.load(parts)
    return caught.value.code, caught.value.index


class TestLoading:
    def test_each_once(self) -> None:
        async def work(loader: MediaLoader, decoder: FakeDecoder, site: Web) -> None:
            parts = [image(site.url + path) for path in ("/a", "/b", "/a", "/same")] + [image(b"aaa")]
            parts.append(MediaPart("video", site.url + "/a"))
            parts.append(MediaPart("video", (site.url + "/a", site.url + "/b", site.url + "/a")))
            got = await loader.load(parts)
            assert [patches.grid[2] for patches in got] == [3, 2, 3, 3, 3, 3, 3]
            assert got[0] is got[2] is got[3] is got[4]
            assert sorted(line.split()[1] for line in site.asked) == ["/a", "/b", "/same"]
            assert sorted(map(str, decoder.seen)) == sorted(
                map(str, [("image", b"aaa"), ("image", b"bb"), ("video", b"aaa"), ("video", [b"aaa", b"bb", b"aaa"])])
            )
            assert await loader.load([]) == []

        running(work)

    def test_for_real(self) -> None:
        picture = encoded(photo(64, 96), "JPEG")
        frames = [encoded(photo(64, 64, seed=i)) for i in range(2)]

        async def work() -> None:
            with Decoder(workers=1) as decoder:
                async with web(x=answer(picture)) as site, Fetcher(MediaAccess(private=True)) as fetcher:
                    loader = MediaLoader(fetcher, decoder)
                    got = await loader.load(
                        [image(site.url + "/x"), MediaPart("video", tuple(map(data_url, frames))), image(picture)]
                    )
                    loader.close()
            np.testing.assert_array_equal(got[0].pixels, image_patches(picture).pixels)
            np.testing.assert_array_equal(got[1].pixels, video_patches(frames).pixels)
            assert got[2] is got[0]

        asyncio.run(work())

    def test_side_by_side_within_bounds(self) -> None:
        async def work(loader: MediaLoader, decoder: FakeDecoder, site: Web) -> None:
            most = 0
            site.pages = {f"/{i}": drip(10, 0.01) for i in range(12)}
            load = asyncio.create_task(loader.load([image(f"{site.url}/{i}") for i in range(12)]))
            while not load.done():
                most = max(most, site.open)
                await asyncio.sleep(0.005)
            assert most == 3
            assert len(load.result()) == 12

        running(work, at_once=3)


class TestRefusals:
    def test_says_which(self) -> None:
        async def work(loader: MediaLoader, decoder: FakeDecoder, site: Web) -> None:
            good = image(b"good")
            assert await refused(loader, good, image(site.url + "/gone"), good) == ("unreachable", 1)
            assert await refused(loader, good, good, image(b"bad"), image(b"bad")) == ("damaged", 2)
            video = MediaPart("video", (data_url(b"good"), site.url + "/gone"))
            assert await refused(loader, image(site.url + "/drip"), video) == ("unreachable", 1)

        running(work)

    def test_before_anything_is_read(self) -> None:
        async def work(loader: MediaLoader, decoder: FakeDecoder, site: Web) -> None:
            here = image(site.url + "/a")
            assert await refused(loader, here, here, here, here) == ("too_many_items", None)
            assert await refused(loader, here, MediaPart("video", (site.url + "/b",) * 3)) == ("too_many_items", None)
            assert await refused(loader, here, here, image("ftp://x/")) == ("bad_address", 2)
            assert await refused(loader, here, image("/etc/passwd")) == ("no_files", 1)
            assert await refused(loader, here, image(b"x" * 101)) == ("too_many_bytes", 1)
            assert site.asked == []
            assert decoder.seen == []
            assert len(await loader.load([here, here, here])) == 3

        running(work, max_items=3, max_bytes=100)

    def test_all_together(self) -> None:
        async def work(loader: MediaLoader, decoder: FakeDecoder, site: Web) -> None:
            parts = [image(bytes([65 + i]) * 30) for i in range(3)]
            assert (await refused(loader, *parts))[0] == "too_many_request_bytes"
            assert len(await loader.load(parts[:2] * 5)) == 10  # what is there twice counts once
            site.pages = {f"/{i}": answer(bytes([65 + i]) * 30) for i in range(3)}
            assert (await refused(loader, *[image(f"{site.url}/{i}") for i in range(3)]))[0] == "too_many_request_bytes"

        running(work, max_request_bytes=80)

    def test_patches_together(self) -> None:
        async def work(loader: MediaLoader, decoder: FakeDecoder, site: Web) -> None:
            parts = [image(bytes([65 + i]) * 10) for i in range(3)]  # 1,000 bytes of patches each
            assert (await refused(loader, *parts))[0] == "too_many_patch_bytes"
            assert len(await loader.load(parts[:2])) == 2

        running(work, max_patch_bytes=2500)

    def test_unforeseen(self) -> None:
        async def work(loader: MediaLoader, decoder: FakeDecoder, site: Web) -> None:
            with pytest.raises(JaxrankError, match="does not start") as caught:
                await loader.load([image(b"bug"), image(b"good")])
            assert not isinstance(caught.value, MediaError)

        running(work)


class TestGivingUp:
    def test_cancelled_while_fetching(self) -> None:
        async def work(loader: MediaLoader, decoder: FakeDecoder, site: Web) -> None:
            load = asyncio.create_task(loader.load([image(site.url + "/drip")]))
            await _until(lambda: site.open)
            load.cancel()
            with pytest.raises(asyncio.CancelledError):
                await load
            await _until(lambda: not site.open)
            assert decoder.seen == []

        running(work)

    def test_cancelled_while_decoding(self) -> None:
        """What is being decoded ends by itself; what waits for its turn is never decoded."""

        async def work(loader: MediaLoader, decoder: FakeDecoder, site: Web) -> None:
            decoder.gate.clear()
            load = asyncio.create_task(loader.load([image(b"x" * i) for i in range(1, 9)]))
            await _until(lambda: len(decoder.seen) == 2)
            await asyncio.sleep(0.05)
            load.cancel()
            with pytest.raises(asyncio.CancelledError):
                await load
            decoder.gate.set()
            assert len(await loader.load([image(b"after")])) == 1
            assert len(decoder.seen) == 3

        running(work)

    def test_one_refusal_ends_the_rest(self) -> None:
        async def work(loader: MediaLoader, decoder: FakeDecoder, site: Web) -> None:
            started = time.perf_counter()
            assert await refused(loader, image(site.url + "/drip"), image(b"bad")) == ("damaged", 1)
            assert time.perf_counter() - started < 5
            await _until(lambda: not site.open)

        running(work)


async def _until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)
