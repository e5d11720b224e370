"""Images and videos for tests, drawn and encoded on the spot, whole and broken."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture with large smooth shapes and fine noise, as photographs have them."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8)).resize((width, height), 3)
    noise = rng.normal(0, 12, (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(coarse) + noise, 0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """The file of an image."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that says how large it is, and has hardly anything in it."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + body + chunk(b"IEND", b"")


def clip(
    frames: int = 60,
    fps: int = 30,
    size: tuple[int, int] = (96, 64),
    kind: str = "mp4",
    codec: str = "libx264",
    gop: int = 12,
    folder: Path | None = None,
    draw: Callable[[int], np.ndarray] | None = None,
    **options: str,
) -> bytes:
    """A video that turns from black to white, evenly, so that a frame's brightness tells its number.

    folder: where to write it, for the options that need a file. draw: another picture, uint8 [height, width, 3].
    """
    buffer = folder / f"clip.{kind}" if folder else io.BytesIO()
    with av.open(buffer, "w", format=kind, options=options) as container:
        container.metadata["title"] = "a title"
        stream: Any = container.add_stream(codec, rate=fps)
        stream.width, stream.height = size
        stream.pix_fmt, stream.gop_size = "yuv420p", gop
        for number in range(frames):
            grey = np.full((size[1], size[0], 3), number * 255 // max(frames - 1, 1), np.uint8)
            picture = draw(number) if draw else grey
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return buffer.read_bytes() if isinstance(buffer, Path) else buffer.getvalue()


def sound() -> bytes:
    """An MP4 without a picture."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream: Any = container.add_stream("aac", rate=48000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 48000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def lasting(video: bytes, seconds: int) -> bytes:
    """An MP4 or WebM whose headers say that it lasts so long."""
    out = bytearray(video)
    if (at := out.find(b"\x44\x89\x88")) >= 0:
        struct.pack_into(">d", out, at + 3, seconds * 1000)  # WebM counts in milliseconds
        return bytes(out)
    for box in (b"mvhd", b"mdhd"):
        start = out.index(box) + 4  # version and flags, created, modified, then units a second and how many
        (scale,) = struct.unpack_from(">I", out, start + 12)
        struct.pack_into(">I", out, start + 16, scale * seconds)
    start = out.index(b"stts") + 4  # version and flags, runs, then frames and units a frame of each
    struct.pack_into(">I", out, start + 12, scale * seconds // struct.unpack_from(">I", out, start + 8)[0])
    return bytes(out)


def turned(video: bytes) -> bytes:
    """An MP4 that is to be shown turned by 90 degrees clockwise, as telephones write it."""
    out = bytearray(video)
    start = out.index(b"tkhd") + 4 + 40
    struct.pack_into(">9i", out, start, 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    return bytes(out)
