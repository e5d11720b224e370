"""Untrusted images and video are decoded in a few processes of their own, with limits on memory and time.

Decoders are large C libraries with a history; what takes one over, crashes it or keeps it busy costs one item and one
process, which is replaced. The process is jaxrank.media.decoding_child. It answers small frames as plain bytes; cutting
them into patches, eight times as many bytes, is done here.
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
"""Seconds that a process may take to start."""


class Decoder:
    """Turns encoded images and video into patches, in at most `workers` processes, started when they are needed.

    Thread-safe: calls beyond `workers` wait for a free process.
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
        self._free: queue.LifoQueue[_Worker | None] = queue.LifoQueue()  # the last used first: its pages are warm
        for _ in range(workers):
            self._free.put(None)

    def decode(self, kind: Kind, data: bytes | Sequence[bytes]) -> Patches:
        """The patches of one image, or of one video: a file, or a list of encoded images that are its frames.

        Blocks; raises MediaError for what cannot be decoded, JaxrankError where decoding itself does not work.
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
                self._drop(worker)  # died between two items, of which neither is to blame
                worker = None
            worker = worker or self._start()
            header, pixels = worker.ask({"kind": kind, "sizes": list(map(len, parts)), "listed": listed}, parts)
        except BaseException as error:  # an interrupted exchange, too, leaves the pipes in an unknown state
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
    """The process ended, or answered nonsense, and cannot be used any more. late: it was stopped for its time."""

    def __init__(self, late: bool) -> None:
        self.late = late


class _Worker:
    """One decoding process and its pipes. For one thread at a time."""

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
        """Raises _Died."""
        self._exchange(START_S, {}, [])

    def ask(self, header: dict[str, Any], parts: Sequence[bytes]) -> tuple[dict[str, Any], np.ndarray | None]:
        """The answer's header, and the pixels unless they were refused. Raises _Died."""
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
            self.process.kill()  # which ends whatever reads or writes below

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
        """The pixels behind the header. Neither is trusted. Raises ValueError, KeyError, TypeError or EOFError."""
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
"""Bytes of frames that are taken from a process: far more than any settings lead to."""


def _command(settings: Preprocessing, limits: Limits) -> list[str]:
    """How a process is started: with this very package, whatever the working directory holds."""
    start = "import sys; sys.path.insert(0, sys.argv.pop(1)); from jaxrank.media.decoding_child import main; main()"
    told = json.dumps({"settings": asdict(settings), "limits": asdict(limits)})
    return [sys.executable, "-P", "-c", start, str(Path(__file__).resolve().parents[2]), told]


def _environment() -> dict[str, str]:
    """What finds Python and its libraries, and no more: keys and tokens are not for it."""
    names = ("LD_LIBRARY_PATH", "PATH", "PYTHONHOME", "PYTHONPATH", "SYSTEMROOT")
    kept = {name: os.environ[name] for name in names if name in os.environ}
    return kept | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}  # a thread takes address space
