"""Frames become patches, with the order and the numbers of transformers' image and video processors for Qwen3-VL."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jaxrank.errors import CheckpointError, RequestError, UnsupportedError
from jaxrank.media.grid import PATCH_LADDER
from jaxrank.media.images import Frames, Limits, Preprocessing, image_frames
from jaxrank.media.video import video_frames
from jaxrank.types import Patches


def image_patches(
    source: bytes | Image.Image, settings: Preprocessing | None = None, limits: Limits | None = None
) -> Patches:
    """Return the patches of an image: an encoded one (PNG, JPEG, WebP, GIF), or Pillow's.

    It is decoded in this process. For bytes that you do not trust, use jaxrank.media.decoding.

    Raises:
        MediaError: the image cannot be decoded.
    """
    settings = settings or Preprocessing()
    return cut(image_frames(source, settings, limits or Limits()), settings)


def video_patches(
    source: bytes | Sequence[bytes | Image.Image],
    settings: Preprocessing | None = None,
    limits: Limits | None = None,
    list_fps: float = 2.0,
) -> Patches:
    """Return the patches of a video: a file (MP4, MOV, WebM), or its frames as images, list_fps a second.

    It is decoded in this process, as in image_patches.

    Raises:
        MediaError: the video cannot be decoded.
    """
    settings = settings or Preprocessing()
    return cut(video_frames(source, settings, limits or Limits(), list_fps), settings)


def cut(frames: Frames, settings: Preprocessing) -> Patches:
    """Return the frames' patches, normalised. Each patch has 3 * temporal_patch_size * patch_size**2 values.

    A step that has too few frames repeats its last one. In the same way the one frame of a still image fills a step.
    """
    step, merge, patch = settings.temporal_patch_size, settings.merge_size, settings.patch_size
    pixels = frames.pixels
    if missing := -len(pixels) % step:
        pixels = np.concatenate([pixels, np.repeat(pixels[-1:], missing, axis=0)])
    steps, rows, columns = len(pixels) // step, pixels.shape[1] // patch, pixels.shape[2] // patch
    blocks = pixels.reshape(steps, step, rows // merge, merge, patch, columns // merge, merge, patch, 3)
    # The axes become (step, block row, block column, row, column of the patch in the block; channel, frame, pixel row,
    # pixel column).
    blocks = blocks.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(steps * rows * columns, 3, -1)
    out = np.empty(blocks.shape, np.float32)
    for channel, values in enumerate(_normalised(settings)):
        out[:, channel] = values[blocks[:, channel]]
    return Patches(out.reshape(len(out), -1), (steps, rows, columns), frames.seconds)


def _normalised(settings: Preprocessing) -> np.ndarray:
    """Return float32 [3, 256]: the normalised value for each value of a byte.

    Steps and precision are those of transformers.
    """
    rescaled = (np.arange(256) * (1 / 255)).astype(np.float32)
    mean, std = (np.array(values, np.float32)[:, None] for values in (settings.mean, settings.std))
    return (rescaled - mean) / std


CHANGEABLE = ("min_pixels", "max_pixels", "fps", "min_frames", "max_frames", "min_frame_pixels", "max_frame_pixels",
              "video_pixels")  # fmt: skip
"""The fields of Preprocessing that are a choice and not fixed by the model."""


def changed(settings: Preprocessing, changes: Mapping[str, int | float]) -> Preprocessing:
    """Return the settings with other sizes and sampling.

    Args:
        settings: the settings.
        changes: values by names of CHANGEABLE.

    Raises:
        RequestError: a name is not in CHANGEABLE, or a value is not possible.
    """
    for name, value in changes.items():
        if name not in CHANGEABLE:
            raise RequestError(f"{name} is no size that can be chosen; those are {', '.join(CHANGEABLE)}")
        if isinstance(value, bool) or not (0 < value < math.inf and (name == "fps" or float(value).is_integer())):
            raise RequestError(
                f"{name} is {value}; it must be a {'number' if name == 'fps' else 'whole number'} above 0"
            )
    made = replace(settings, **{name: value if name == "fps" else int(value) for name, value in changes.items()})
    most = PATCH_LADDER[-1] * made.patch_size**2
    # A frame cannot be shrunk below min_frame_pixels (see video.video_size); this is for all steps.
    steps = -(-max(made.min_frames, made.max_frames) // made.temporal_patch_size)
    for small, large, named in (
        (made.factor**2, made.min_pixels, "min_pixels"),
        (made.factor**2, made.min_frame_pixels, "min_frame_pixels"),
        (made.min_pixels, made.max_pixels, "max_pixels"),
        (made.min_frame_pixels, made.max_frame_pixels, "max_frame_pixels"),
        (made.min_frames, made.max_frames, "max_frames"),
    ):
        if large < small:
            raise RequestError(f"{named} is {large}; it must be at least {small}")
    for name, value in (("max_pixels", made.max_pixels), ("video_pixels", made.video_pixels)):
        if value > most:
            raise RequestError(f"{name} is {value}; the vision tower takes at most {most}")
    if steps * made.min_frame_pixels * 1.05 > most:
        raise RequestError(
            f"max_frames is {made.max_frames}, of at least {made.min_frame_pixels} pixels each (min_frame_pixels); the "
            f"vision tower takes at most {most} pixels in all, {made.temporal_patch_size} frames counting as one"
        )
    return made


def read_preprocessing(folder: str | Path, changes: Mapping[str, int | float] | None = None) -> Preprocessing:
    """Read the settings of a model.

    Patches, mean and std come from its files, sizes and sampling from the publisher's script.

    The files are config.json, preprocessor_config.json, video_preprocessor_config.json and processor_config.json. Each
    may be missing.

    Args:
        folder: the model's folder.
        changes: see `changed`.

    Raises:
        CheckpointError: a file cannot be read, or files contradict each other.
        UnsupportedError: the files ask for processing that is not implemented.
        RequestError: a change is not possible.
    """
    found: dict[str, Any] = {}
    for name, file, part in _places(Path(folder)):
        _refuse_unknown(name, part)
        for key, field in _FIELDS.items():
            if part.get(key) is None:
                continue
            value = tuple(part[key]) if isinstance(part[key], list) else part[key]
            if found.setdefault(field, value) != value:
                raise CheckpointError(
                    f"{file}: {key} is {value}, but another file of the model says {found[field]}. Make them agree."
                )
    return changed(Preprocessing(**found), changes) if changes else Preprocessing(**found)


_FIELDS = {
    "patch_size": "patch_size",
    "temporal_patch_size": "temporal_patch_size",
    "merge_size": "merge_size",
    "spatial_merge_size": "merge_size",
    "image_mean": "mean",
    "image_std": "std",
}
_EXPECTED = {
    "do_resize": (True,),
    "do_rescale": (True,),
    "do_normalize": (True,),
    "do_convert_rgb": (True,),
    "resample": (3,),
    "rescale_factor": (1 / 255,),
    "in_channels": (3,),
}


def _places(folder: Path) -> list[tuple[str, Path, dict[str, Any]]]:
    """Return what the files of a model say about images and videos: (name for messages, file, settings)."""
    read: list[tuple[str, Path, dict[str, Any]]] = []
    inner = {"config.json": ["vision_config"], "processor_config.json": ["image_processor", "video_processor"]}
    for name in ("config.json", "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"):
        file = folder / name
        if not file.is_file():
            continue
        try:
            content = json.loads(file.read_text("utf-8"))
            parts = [content.get(key) or {} for key in inner[name]] if name in inner else [content]
            read += [(name, file, dict(part)) for part in parts]
        except (OSError, ValueError, AttributeError, TypeError):
            raise CheckpointError(f"{file} is not a JSON object in UTF-8. Fetch the model again.") from None
    return read


def _refuse_unknown(name: str, part: dict[str, Any]) -> None:
    for key, allowed in _EXPECTED.items():
        value = part.get(key)
        if value is not None and value not in allowed:
            raise UnsupportedError(f"{name}: {key} is {value}; jaxrank implements {allowed[0]} only.")
