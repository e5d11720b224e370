"""Decoding in processes of their own: the same patches, and whatever happens to a process costs one item."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxrank.errors import JaxrankError, MediaError
from jaxrank.media import decoding
from jaxrank.media.decoding import Decoder
from jaxrank.media.images import REASONS, Limits
from jaxrank.media.patches import image_patches, video_patches
from tests.media import clip, encoded, photo, png_header

SMALL = encoded(photo(64, 64))


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    with Decoder() as decoder:
        yield decoder


SLOW = [encoded(photo(2000, 1500), "JPEG")] * 64
"""A video that takes seconds to decode."""


def pids(decoder: Decoder) -> list[int]:
    return [worker.process.pid for worker in decoder._running]


def refused(work: Callable[[], object]) -> str:
    with pytest.raises(MediaError) as caught:
        work()
    assert caught.value.code in REASONS
    return caught.value.code


class TestResults:
    def test_images(self, decoder: Decoder) -> None:
        data = encoded(photo(300, 200), "JPEG")
        got, expected = decoder.decode("image", data), image_patches(data)
        assert got.grid == expected.grid
        np.testing.assert_array_equal(got.pixels, expected.pixels)

    def test_videos(self, decoder: Decoder) -> None:
        frames = [encoded(photo(64, 64, seed=i)) for i in range(3)]
        for source in (clip(90), frames):
            got, expected = decoder.decode("video", source), video_patches(source)
            assert (got.grid, got.seconds) == (expected.grid, expected.seconds)
            np.testing.assert_array_equal(got.pixels, expected.pixels)

    def test_refusals(self, decoder: Decoder) -> None:
        before = pids(decoder)
        assert refused(lambda: decoder.decode("image", png_header(50_000, 50_000))) == "too_many_pixels"
        assert refused(lambda: decoder.decode("image", b"<html>")) == "not_an_image"
        assert refused(lambda: decoder.decode("image", b"")) == "empty"
        assert refused(lambda: decoder.decode("video", [])) == "no_frames"
        assert refused(lambda: decoder.decode("video", [SMALL] * 257)) == "too_many_listed"
        assert pids(decoder) == before

    def test_side_by_side(self) -> None:
        data = [encoded(photo(64 + 32 * i, 64, seed=i)) for i in range(12)]
        with Decoder(workers=2) as decoder, ThreadPoolExecutor(6) as threads:
            for source, got in zip(data, threads.map(lambda item: decoder.decode("image", item), data), strict=True):
                np.testing.assert_array_equal(got.pixels, image_patches(source).pixels)
            assert 1 <= len(pids(decoder)) <= 2


class TestFailures:
    def test_killed_between_items(self) -> None:
        with Decoder(workers=1) as decoder:
            decoder.decode("image", SMALL)
            (first,) = pids(decoder)
            os.kill(first, signal.SIGKILL)
            next(iter(decoder._running)).process.wait()
            decoder.decode("image", SMALL)
            assert pids(decoder) != [first]

    def test_killed_at_work(self) -> None:
        with Decoder(workers=1) as decoder, ThreadPoolExecutor(2) as threads:
            decoder.decode("image", SMALL)
            (first,) = pids(decoder)
            victim = threads.submit(decoder.decode, "video", SLOW)
            time.sleep(0.3)
            next_one = threads.submit(decoder.decode, "image", SMALL)
            os.kill(first, signal.SIGKILL)
            assert refused(victim.result) == "failed"
            np.testing.assert_array_equal(next_one.result().pixels, image_patches(SMALL).pixels)
            assert len(pids(decoder)) == 1

    def test_too_slow(self) -> None:
        with Decoder(limits=Limits(seconds=0.4), workers=1) as decoder:
            started = time.perf_counter()
            decoder.decode("image", SMALL)
            assert refused(lambda: decoder.decode("video", SLOW)) == "too_slow"
            assert time.perf_counter() - started < 20
            decoder.decode("image", SMALL)

    def test_too_much_memory(self) -> None:
        with Decoder(limits=Limits(memory=600 * 2**20), workers=1) as decoder:
            decoder.decode("image", SMALL)
            (first,) = pids(decoder)
            large = encoded(Image.new("RGBA", (6000, 6000)))
            assert refused(lambda: decoder.decode("image", large)) == "failed"
            decoder.decode("image", SMALL)
            assert pids(decoder) == [first]

    def test_processor_time(self) -> None:
        """Where the clock does not stop a process, the system does."""
        with Decoder(limits=Limits(seconds=0.5), workers=1) as decoder:
            decoder.decode("image", SMALL)
            limits = Path(f"/proc/{pids(decoder)[0]}/limits").read_text()
        (line,) = [line for line in limits.splitlines() if line.startswith("Max cpu time")]
        assert 1 <= int(line.split()[3]) <= 5

    @pytest.mark.parametrize(
        "answer",
        [
            '{"shape": [1, 64, 64], "seconds": []}',
            '{"shape": [100000, 100000, 100000, 3], "seconds": []}',
            '{"shape": [-1, -1, 1, 3], "seconds": []}',
            '{"shape": [1, 32, 32, 3], "seconds": "x"}',
            '{"shape": [1, 32, 32, 3], "seconds": []}',
            "{}",
            '{"refused": "at 0x7fff5fbff8c0"}',
            "[]",
            "{",
        ],
    )
    def test_a_process_taken_over(self, monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
        script = (
            "import struct, sys\n"
            "for text in ('{}', sys.argv[1]):\n"
            "    sys.stdout.buffer.write(struct.pack('<I', len(text)) + text.encode())\n"
        )
        monkeypatch.setattr(decoding, "_command", lambda *_: [sys.executable, "-c", script, answer])
        with Decoder(workers=1) as decoder:
            assert refused(lambda: decoder.decode("image", SMALL)) == "failed"
            assert pids(decoder) == []

    def test_does_not_start(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(decoding, "_command", lambda *_: [sys.executable, "-c", "1 / 0"])
        with Decoder() as decoder, pytest.raises(JaxrankError, match="does not start") as caught:
            decoder.decode("image", SMALL)
        assert not isinstance(caught.value, MediaError)


class TestProcess:
    def test_knows_no_secrets(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        with Decoder(workers=1) as decoder:
            decoder.decode("image", SMALL)
            (pid,) = pids(decoder)
            assert b"hf_secret" not in Path(f"/proc/{pid}/environ").read_bytes()
            assert os.getpgid(pid) != os.getpgid(0)  # Ctrl-C does not reach it

    def test_ends_with_its_parent(self) -> None:
        decoder = Decoder(workers=1)
        decoder.decode("image", SMALL)
        (worker,) = decoder._running
        worker.sink.close()
        assert worker.process.wait(10) == 0
        decoder.close()

    def test_close(self) -> None:
        decoder = Decoder(workers=1)
        decoder.decode("image", SMALL)
        (worker,) = decoder._running
        outcome: list[BaseException] = []

        def work() -> None:
            with contextlib.suppress(MediaError):
                try:
                    decoder.decode("video", SLOW)
                except JaxrankError as error:
                    outcome.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        time.sleep(0.3)
        decoder.close()
        thread.join(10)
        assert worker.process.poll() is not None
        assert [str(error) for error in outcome] == [decoding.CLOSED]
        with pytest.raises(JaxrankError, match="closed"):
            decoder.decode("image", SMALL)
