"""Images become small frames: settings, limits, formats told by content, upright RGB, resizing. Without JAX.

What comes in is either encoded, as bytes, or already decoded, as Pillow images. What goes out are `Frames`, bytes of
the size that the model looks at. jaxrank.media.video makes them of video, jaxrank.media.patches cuts them up. Untrusted
bytes belong in jaxrank.media.decoding, which decodes in a process of its own.

Sources: sizes are those of the publisher's script (qwen3_vl_reranker.py with qwen_vl_utils), pixels those of
transformers' Qwen2VLImageProcessorPil, but for 16-bit grey, which is scaled here and clipped there.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from jaxrank.errors import MediaError

Kind = Literal["image", "video"]


@dataclass(frozen=True)
class Preprocessing:
    """What the model wants to see. The defaults are the publisher's script's.

    patch_size: pixels, both ways. temporal_patch_size: frames in a patch. merge_size: patches, both ways, that become
    one token. mean, std: by channel, of values from 0 to 1. min_pixels, max_pixels: of an image. For video: fps, how
    many frames are taken of a second; min_frames, max_frames, of the whole; min_frame_pixels, max_frame_pixels, of a
    frame; video_pixels, of all steps together, a step being temporal_patch_size frames.
    """

    patch_size: int = 16
    temporal_patch_size: int = 2
    merge_size: int = 2
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    min_pixels: int = 4 * 32 * 32
    max_pixels: int = 1800 * 32 * 32
    fps: float = 1.0
    min_frames: int = 4
    max_frames: int = 64
    min_frame_pixels: int = 128 * 32 * 32
    max_frame_pixels: int = 768 * 32 * 32
    video_pixels: int = 7680 * 32 * 32

    @property
    def factor(self) -> int:
        """Sides of what the model sees are multiples of so many pixels."""
        return self.patch_size * self.merge_size


@dataclass(frozen=True)
class Limits:
    """What is refused before it costs much. Every one holds for one image or video.

    max_bytes: of the file. max_pixels: of an image; Pillow's own limit of 89,478,485 stays. max_frame_pixels: of a
    frame of an encoded video. max_seconds, max_frames: of an encoded video, before sampling. max_listed: images of a
    video given as a list. seconds: of decoding, by the clock, and twice that by the processor; memory: bytes of
    address space; both hold where jaxrank.media.decoding decodes, in its processes.
    """

    max_bytes: int = 20_000_000
    max_pixels: int = 40_000_000
    max_frame_pixels: int = 4096 * 2304
    max_seconds: float = 600.0
    max_frames: int = 36_000
    max_listed: int = 256
    seconds: float = 20.0
    memory: int = 2 * 2**30

    def refusal(self, code: str) -> MediaError:
        """The error for one of REASONS."""
        return MediaError(code, REASONS[code].format(self))


MAX_RATIO = 200
"""Longest side to shortest, as the publisher's script and transformers have it."""

REASONS = {
    "empty": "empty: not one byte came",
    "too_many_bytes": "larger than {0.max_bytes:,} bytes; send a smaller file",
    "not_an_image": "not an image of a kind that is taken; send PNG, JPEG, WebP or GIF",
    "not_a_video": "not a video of a kind that is taken; send MP4, MOV or WebM with H.264, H.265, VP8, VP9 or AV1",
    "too_many_pixels": "an image of more than {0.max_pixels:,} pixels; send a smaller one",
    "too_many_frame_pixels": "a video of more than {0.max_frame_pixels:,} pixels a frame; send a smaller one",
    "too_narrow": f"more than {MAX_RATIO} times as long as it is wide; cut it",
    "damaged": "damaged or cut short; send the whole file",
    "no_frames": "a video without a picture in it",
    "too_long": "a video of more than {0.max_seconds:g} seconds; cut it",
    "too_many_frames": "a video of more than {0.max_frames:,} frames; cut it or lower its frame rate",
    "too_many_listed": "a video of more than {0.max_listed:,} images; send fewer",
    "different_sizes": "a video of images of different sizes; make them one size",
    "too_slow": "more work than {0.seconds:g} seconds of decoding; send a smaller file",
    "failed": "too much for the decoder, or damaged; send a smaller file",
    "no_video": "a video, and this installation reads only images; pip install 'jaxrank[video]'",
}
"""All that can be wrong with a file, by code."""


@dataclass(frozen=True)
class Frames:
    """An image (one frame) or the sampled frames of a video, of the size that the model sees.

    pixels: uint8 [frames, height, width, 3], RGB. seconds: of a video the time of each step of temporal_patch_size
    frames, the last frame counting again where the last step is short; empty for an image.
    """

    pixels: UInt8[np.ndarray, "frames height width 3"]
    seconds: tuple[float, ...] = ()


def image_frames(source: bytes | Image.Image, settings: Preprocessing, limits: Limits) -> Frames:
    """An image, PNG, JPEG, WebP or GIF (its first picture) where it is encoded. Raises MediaError."""
    image = upright(decode_image(source, limits) if isinstance(source, bytes) else source, limits)
    size = fit(image.height, image.width, settings.factor, settings.min_pixels, settings.max_pixels)
    return Frames(resize(image, size)[None])


def fit(height: int, width: int, factor: int, least: int, most: int) -> tuple[int, int]:
    """The height and width, multiples of `factor`, nearest to the given ones with `least` to `most` pixels.

    As transformers' smartresize for Qwen2-VL. Raises MediaError for images longer than MAX_RATIO times their width.
    """
    if max(height, width) > MAX_RATIO * min(height, width):
        raise MediaError("too_narrow", REASONS["too_narrow"])
    sides = [round(side / factor) * factor for side in (height, width)]
    if sides[0] * sides[1] > most:
        shrink = math.sqrt(height * width / most)
        sides = [max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width)]
    elif sides[0] * sides[1] < least:
        grow = math.sqrt(least / (height * width))
        sides = [math.ceil(side * grow / factor) * factor for side in (height, width)]
    return sides[0], sides[1]


IMAGE_MAGIC = {
    "PNG": [(0, b"\x89PNG\r\n\x1a\n")],
    "JPEG": [(0, b"\xff\xd8\xff")],
    "GIF": [(0, b"GIF8")],
    "WEBP": [(0, b"RIFF"), (8, b"WEBP")],
}
"""Pillow's name of a format, and what has to stand where in the file."""


def decode_image(data: bytes, limits: Limits) -> Image.Image:
    """Pillow's image of an encoded one, its size checked before it is decoded. Raises MediaError."""
    check_bytes(data, limits)
    names = [name for name, marks in IMAGE_MAGIC.items() if all(data.startswith(m, at) for at, m in marks)]
    if not names:
        raise limits.refusal("not_an_image")
    try:
        image = Image.open(io.BytesIO(data), formats=names)
        _check_size(image, limits)
        image.load()
    except MediaError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise limits.refusal("too_many_pixels") from None
    except MemoryError:
        raise limits.refusal("failed") from None
    except Exception:  # Pillow's plugins raise what comes: OSError, SyntaxError, ValueError, struct.error, zlib.error
        raise limits.refusal("damaged") from None
    return image


def check_bytes(data: bytes, limits: Limits) -> None:
    """Raise MediaError for no bytes, or too many."""
    if not data:
        raise limits.refusal("empty")
    if len(data) > limits.max_bytes:
        raise limits.refusal("too_many_bytes")


def _check_size(image: Image.Image, limits: Limits) -> None:
    if image.width * image.height > limits.max_pixels:
        raise limits.refusal("too_many_pixels")
    if max(image.size) > MAX_RATIO * min(image.size):
        raise limits.refusal("too_narrow")


def upright(image: Image.Image, limits: Limits) -> Image.Image:
    """The image turned as its EXIF data say, in RGB, what is transparent over white."""
    _check_size(image, limits)
    try:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):  # Pillow would clip at 255, and leave nearly all of it white
            return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
        return image if image.mode == "RGB" else image.convert("RGB")
    except MemoryError:
        raise limits.refusal("failed") from None
    except Exception:  # damaged EXIF data and palettes; a user's image may be read from its file only now
        raise limits.refusal("damaged") from None


def resize(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """uint8 [height, width, 3] of an RGB image; size: height and width."""
    return np.asarray(image.resize((size[1], size[0]), Image.Resampling.BICUBIC))
