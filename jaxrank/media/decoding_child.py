"""The decoding process. It limits itself, then reads encoded media and writes frames until its input ends.

It imports neither JAX nor any part of the server, and it answers with plain bytes. If a file takes the process over
through a bug in a decoder, it must not reach the parent through an unpickled object.

A message has the same form in both directions. First come four bytes with the length of a JSON header, then the header,
and then the bytes that the header announces.

    to it    {"kind": "image" or "video", "sizes": [bytes of each part], "listed": whether the parts are frames}
    from it  {}, once, when it is ready
             {"shape": [frames, height, width, 3], "seconds": [...]} and the pixels, or {"refused": a code of REASONS}
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import struct
import sys
import time
import warnings
from typing import Any, BinaryIO

from PIL import Image

from jaxrank.errors import MediaError
from jaxrank.media.images import Frames, Limits, Preprocessing, image_frames
from jaxrank.media.video import video_frames


def main() -> None:
    """Serve until the end of standard input. The one argument is JSON: {"settings": ..., "limits": ...}."""
    told = json.loads(sys.argv[1])
    settings, limits = Preprocessing(**told["settings"]), Limits(**told["limits"])
    source, sink = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # output of libraries must not get between the messages
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    with contextlib.suppress(ImportError):
        import av.logging  # import it before the limits hold

        av.logging.set_level(None)
    _limit(resource.RLIMIT_AS, limits.memory)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_FSIZE, 0)
    send(sink, {})
    while (header := receive(source)) is not None:
        _limit(resource.RLIMIT_CPU, math.ceil(time.process_time() + 2 * limits.seconds))
        parts = [source.read(size) for size in header["sizes"]]
        try:
            frames = _decode(header, parts, settings, limits)
        except MediaError as error:
            send(sink, {"refused": error.code})
        except Exception:  # a bug of ours or of a decoder; its text does not leave this process
            send(sink, {"refused": "failed"})
        else:
            send(sink, {"shape": frames.pixels.shape, "seconds": frames.seconds}, frames.pixels.data)
            del frames


def send(sink: BinaryIO, header: dict[str, Any], *parts: bytes | memoryview) -> None:
    """Write one message."""
    text = json.dumps(header).encode()
    sink.write(struct.pack("<I", len(text)) + text)
    for part in parts:
        sink.write(part)
    sink.flush()


def receive(source: BinaryIO) -> dict[str, Any] | None:
    """Return the header of the next message, or None at the end.

    Raises:
        EOFError: the input ended inside a message.
        ValueError: the header is not valid.
    """
    length = source.read(4)
    if not length:
        return None
    size = struct.unpack("<I", length)[0] if len(length) == 4 else MOST_HEADER + 1
    text = source.read(size) if size <= MOST_HEADER else b""
    if len(text) != size:
        raise EOFError("a message was cut short")
    header = json.loads(text)
    if not isinstance(header, dict):
        raise ValueError("a header is an object")
    return header


MOST_HEADER = 2**16


def _decode(header: dict[str, Any], parts: list[bytes], settings: Preprocessing, limits: Limits) -> Frames:
    if header["kind"] == "image":
        return image_frames(parts[0], settings, limits)
    return video_frames(parts if header["listed"] else parts[0], settings, limits)


def _limit(what: int, most: int) -> None:
    """Lower a limit of this process, if the system has it."""
    hard = resource.getrlimit(what)[1]
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(what, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


if __name__ == "__main__":
    main()
