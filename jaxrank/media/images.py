"""Images become small frames: settings, limits, formats by content, upright RGB, resizing. Nothing here uses JAX.

The input is either encoded, as bytes, or already decoded, as Pillow images. The output is `Frames`: bytes of the size
that the model sees. jaxrank.media.video makes them from video, and jaxrank.media.patches cuts them. Untrusted bytes
belong in jaxrank.media.decoding, which decodes in a process of its own.

Sources: the sizes are those of the publisher's script (qwen3_vl_reranker.py with qwen_vl_utils). The pixels are those
of transformers' Qwen2VLImageProcessorPil, except for 16-bit grey. It is scaled here and clipped there.
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
    """How the model needs images and video. The defaults are those of the publisher's script.

    Attributes:
        patch_size: the pixels of a patch, in each direction.
        temporal_patch_size: the frames in a patch. So many frames are one step.
        merge_size: the patches, in each direction, that become one token.
        mean: the mean of each channel, of values from 0 to 1.
        std: the standard deviation of each channel, of values from 0 to 1.
        min_pixels: the least pixels of an image.
        max_pixels: the most pixels of an image.
        fps: the frames that are taken from each second of a video.
        min_frames: the least frames that are taken from a whole video.
        max_frames: the most frames that are taken from a whole video.
        min_frame_pixels: the least pixels of a frame of a video.
        max_frame_pixels: the most pixels of a frame of a video.
        video_pixels: the pixels of all steps of a video together.
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
        """The sides of what the model sees are multiples of this number of pixels."""
        return self.patch_size * self.merge_size


@dataclass(frozen=True)
class Limits:
    """What is refused before it costs much. Each limit holds for one image or video.

    `seconds` and `memory` hold only in the processes of jaxrank.media.decoding.

    Attributes:
        max_bytes: the bytes of the file.
        max_pixels: the pixels of an image. Pillow's own limit of 89,478,485 stays.
        max_frame_pixels: the pixels of a frame of an encoded video.
        max_seconds: the seconds of an encoded video, before sampling.
        max_frames: the frames of an encoded video, before sampling.
        max_listed: the images of a video that is given as a list.
        seconds: the seconds of decoding by the clock, and twice as many of processor time.
        memory: the bytes of address space.
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
        """Return the error for one of REASONS."""
        return MediaError(code, REASONS[code].format(self))


MAX_RATIO = 200
"""The largest ratio of the longest side to the shortest, as in the publisher's script and transformers."""

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
    """An image (one frame) or the sampled frames of a video, in the size that the model sees.

    Attributes:
        pixels: uint8 [frames, height, width, 3], RGB.
        seconds: for a video, the time of each step of temporal_patch_size frames. If the last step is short, the last
            frame counts again. It is empty for an image.
    """

    pixels: UInt8[np.ndarray, "frames height width 3"]
    seconds: tuple[float, ...] = ()


def image_frames(source: bytes | Image.Image, settings: Preprocessing, limits: Limits) -> Frames:
    """Decode and resize an image. An encoded one is PNG, JPEG, WebP or GIF (its first picture).

    Raises:
        MediaError: the image cannot be decoded, or a limit refuses it.
    """
    image = upright(decode_image(source, limits) if isinstance(source, bytes) else source, limits)
    size = fit(image.height, image.width, settings.factor, settings.min_pixels, settings.max_pixels)
    return Frames(resize(image, size)[None])


def fit(height: int, width: int, factor: int, least: int, most: int) -> tuple[int, int]:
    """Return the nearest height and width that are multiples of `factor` and have `least` to `most` pixels.

    This is smartresize of transformers for Qwen2-VL.

    Raises:
        MediaError: the longer side is more than MAX_RATIO times the shorter one.
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
"""Pillow's name of a format, and the bytes that the file must have, with their places."""


def decode_image(data: bytes, limits: Limits) -> Image.Image:
    """Return Pillow's image of an encoded one. Its size is checked before it is decoded.

    Raises:
        MediaError: the image cannot be decoded, or a limit refuses it.
    """
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
    except Exception:  # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error, zlib.error
        raise limits.refusal("damaged") from None
    return image


def check_bytes(data: bytes, limits: Limits) -> None:
    """Check the number of bytes of a file.

    Raises:
        MediaError: there are no bytes, or too many.
    """
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
    """Return the image in RGB, turned as its EXIF data say. Transparent parts become white.

    Raises:
        MediaError: a limit refuses the image, or it is damaged.
    """
    _check_size(image, limits)
    try:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):  # Pillow would clip at 255, and nearly all would become white
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
    """Return uint8 [height, width, 3] of an RGB image.

    Args:
        image: the image.
        size: the new height and width.
    """
    return np.asarray(image.resize((size[1], size[0]), Image.Resampling.BICUBIC))
