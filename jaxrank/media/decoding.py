"""Untrusted images and video are decoded in a few processes of their own, with limits on memory and time.

Decoders are large C libraries in which faults have been found before. A file that takes over, crashes or blocks a
decoder costs one item and one process, which is replaced. The process is jaxrank.media.decoding_child. It answers with
small frames as plain bytes. The patches take eight times as many bytes, so they are cut here.
"""

from __future__ import annotations

import json
import math
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from jaxrank.errors import JaxrankError
from jaxrank.media.decoding_child import receive, send
from jaxrank.media.images import REASONS, Frames, Kind, Limits, Preprocessing
from jaxrank.media.patches import cut
from jaxrank.types import Patches

CLOSED = "the decoder is closed; make another one"
START_S = 60.0
"""The seconds that a process may take to start."""


class Decoder:
    """Turn encoded images and video into patches, in at most `workers` processes.

    They are started when they are needed.

    The class is thread-safe: calls beyond `workers` wait for a free process.

    Args:
        settings: how the model needs images and video.
        limits: what is refused.
        workers: the most processes.
    """

    def __init__(
        self, settings: Preprocessing | None = None, limits: Limits | None = None, *, workers: int = 2
    ) -> None:
        self.settings = settings or Preprocessing()
        self.limits = limits or Limits()
        self.workers = workers
        self._command = _command(self.settings, self.limits)
        self._closed = False
        self._running: set[_Worker] = set()
        self._lock = threading.Lock()
        self._free: queue.LifoQueue[_Worker | None] = queue.LifoQueue()  # the last used first, since its memory is warm
        for _ in range(workers):
            self._free.put(None)

    def decode(self, kind: Kind, data: bytes | Sequence[bytes]) -> Patches:
        """Return the patches of one image or one video. The call blocks.

        Args:
            kind: whether the data are an image or a video.
            data: a file, or a list of encoded images that are the frames of a video.

        Raises:
            MediaError: the data cannot be decoded.
            JaxrankError: decoding itself does not work.
        """
        listed = not isinstance(data, bytes)
        parts = list(data) if listed else [cast(bytes, data)]
        if listed and len(parts) > self.limits.max_listed:
            raise self.limits.refusal("too_many_listed")
        if any(len(part) > self.limits.max_bytes for part in parts):
            raise self.limits.refusal("too_many_bytes")
        worker = self._free.get()
        try:
            if worker is not None and worker.process.poll() is not None:
                self._drop(worker)  # it died between two items, and neither is the cause
                worker = None
            worker = worker or self._start()
            header, pixels = worker.ask({"kind": kind, "sizes": list(map(len, parts)), "listed": listed}, parts)
        except BaseException as error:  # an interrupted exchange leaves the pipes in an unknown state too
            if worker is not None:
                self._drop(worker)
                worker = None
            if isinstance(error, _Died) and not self._closed:
                raise self.limits.refusal("too_slow" if error.late else "failed") from None
            if isinstance(error, _Died):
                raise JaxrankError(CLOSED) from None
            raise
        finally:
            self._free.put(worker)
        if pixels is None:
            raise self.limits.refusal(header["refused"])
        return cut(Frames(pixels, tuple(header["seconds"])), self.settings)

    def close(self) -> None:
        """End the processes. Calls in progress fail."""
        with self._lock:
            self._closed = True
            running = list(self._running)
        for worker in running:
            self._drop(worker)

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> _Worker:
        with self._lock:
            if self._closed:
                raise JaxrankError(CLOSED)
            worker = _Worker(self._command, self.limits.seconds)
            self._running.add(worker)
        try:
            worker.wait_until_ready()
        except _Died:
            self._drop(worker)
            raise JaxrankError(
                "the process that decodes images and video does not start; max memory may be too low. Run this to see: "
                """`python -m jaxrank.media.decoding_child '{"settings": {}, "limits": {}}'`"""
            ) from None
        return worker

    def _drop(self, worker: _Worker) -> None:
        worker.stop()
        with self._lock:
            self._running.discard(worker)


class _Died(Exception):
    """The process ended or gave an invalid answer, and cannot be used any more.

    Attributes:
        late: whether it was stopped because it took too long.
    """

    def __init__(self, late: bool) -> None:
        self.late = late


class _Worker:
    """One decoding process and its pipes. Only one thread may use it at a time."""

    def __init__(self, command: Sequence[str], seconds: float) -> None:
        self.seconds = seconds
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=_environment(),
            start_new_session=True,  # Ctrl-C is for the parent, which may have work to finish
        )
        self.sink = cast(BinaryIO, self.process.stdin)
        self.source = cast(BinaryIO, self.process.stdout)

    def wait_until_ready(self) -> None:
        """Wait until the process is ready.

        Raises:
            _Died: the process did not start.
        """
        self._exchange(START_S, {}, [])

    def ask(self, header: dict[str, Any], parts: Sequence[bytes]) -> tuple[dict[str, Any], np.ndarray | None]:
        """Send one item, and return the answer's header and the pixels. They are None if the item was refused.

        Raises:
            _Died: the process cannot be used any more.
        """
        return self._exchange(self.seconds, header, parts)

    def stop(self) -> None:
        """End the process and close its pipes."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.sink, self.source):
            with suppress(OSError):
                pipe.close()

    def _exchange(
        self, seconds: float, header: dict[str, Any], parts: Sequence[bytes]
    ) -> tuple[dict[str, Any], np.ndarray | None]:
        late = threading.Event()

        def expire() -> None:
            late.set()
            self.process.kill()  # this ends every read and write below

        timer = threading.Timer(seconds, expire)
        timer.daemon = True
        timer.start()
        try:
            if header:
                send(self.sink, header, *parts)
            answer = receive(self.source)
            if answer is None:
                raise EOFError
            return answer, self._pixels(answer) if header else None
        except (OSError, EOFError, ValueError, KeyError, TypeError):
            raise _Died(late.is_set()) from None
        finally:
            timer.cancel()
            timer.join()
            if late.is_set():
                raise _Died(late=True)

    def _pixels(self, answer: dict[str, Any]) -> np.ndarray | None:
        """Read the pixels behind the header, and check both.

        Raises:
            ValueError: the header or the pixels are not valid. KeyError, TypeError and EOFError mean the same.
        """
        if "refused" in answer:
            if answer["refused"] not in REASONS:
                raise ValueError
            return None
        shape = [int(side) for side in answer["shape"]]
        answer["seconds"] = [float(second) for second in answer["seconds"]]
        if len(shape) != 4 or shape[3] != 3 or min(shape) < 1 or math.prod(shape) > MOST_PIXELS:
            raise ValueError
        pixels = np.empty(shape, np.uint8)
        if cast(Any, self.source).readinto(pixels.data.cast("B")) != pixels.size:
            raise EOFError
        return pixels


MOST_PIXELS = 2**30
"""The most bytes of frames that are accepted from a process. No settings give nearly as many."""


def _command(settings: Preprocessing, limits: Limits) -> list[str]:
    """Return the command that starts a process with this very package, whatever the working directory holds."""
    start = "import sys; sys.path.insert(0, sys.argv.pop(1)); from jaxrank.media.decoding_child import main; main()"
    told = json.dumps({"settings": asdict(settings), "limits": asdict(limits)})
    return [sys.executable, "-P", "-c", start, str(Path(__file__).resolve().parents[2]), told]


def _environment() -> dict[str, str]:
    """Return the variables that Python and its libraries need to be found. Keys and tokens are left out."""
    names = ("LD_LIBRARY_PATH", "PATH", "PYTHONHOME", "PYTHONPATH", "SYSTEMROOT")
    kept = {name: os.environ[name] for name in names if name in os.environ}
    return kept | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}  # each thread takes address space
