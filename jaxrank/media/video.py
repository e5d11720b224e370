"""Video becomes small frames: one file through PyAV, or a list of images. Nothing here uses JAX.

The sampling and the sizes come from the publisher's script (qwen3_vl_reranker.py) with qwen_vl_utils. The times come
from transformers' Qwen3VLProcessor.
"""

from __future__ import annotations

import bisect
import io
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from jaxrank.errors import MediaError
from jaxrank.media.images import Frames, Limits, Preprocessing, check_bytes, decode_image, fit, resize, upright

if TYPE_CHECKING:
    import av
    import av.container
    import av.video.stream


def video_frames(
    source: bytes | Sequence[bytes | Image.Image], settings: Preprocessing, limits: Limits, list_fps: float = 2.0
) -> Frames:
    """Decode, sample and resize a video.

    Args:
        source: a file (MP4, MOV, WebM), or the frames of the video as images of one size.
        settings: how the model needs video.
        limits: what is refused.
        list_fps: the images of a list for each second. The publisher's script takes 2.

    Raises:
        MediaError: the video cannot be decoded, or a limit refuses it.
    """
    if isinstance(source, bytes):
        return _decode_video(source, settings, limits)
    if not source:
        raise limits.refusal("no_frames")
    if len(source) > limits.max_listed:
        raise limits.refusal("too_many_listed")
    count = min(len(source), settings.max_frames)
    chosen = [source[i] for i in np.linspace(0, len(source) - 1, count).astype(int)]
    pixels: list[np.ndarray] = []
    first = size = (0, 0)
    for item in chosen:
        image = upright(decode_image(item, limits) if isinstance(item, bytes) else item, limits)
        if not pixels:
            first, size = image.size, video_size(image.height, image.width, count, settings)
        if image.size != first:
            raise limits.refusal("different_sizes")
        pixels.append(resize(image, size))
    times = [i / list_fps for i in range(count)]
    return Frames(np.stack(pixels), step_seconds(times, settings.temporal_patch_size))


def video_size(height: int, width: int, frames: int, settings: Preprocessing) -> tuple[int, int]:
    """Return the height and width of each of `frames` frames. All steps share the whole budget, as in qwen_vl_utils.

    Raises:
        MediaError: the frames are too narrow (see images.fit).
    """
    frames += -frames % settings.temporal_patch_size
    share = settings.video_pixels / frames * settings.temporal_patch_size
    most = max(min(settings.max_frame_pixels, share), int(settings.min_frame_pixels * 1.05))
    return fit(height, width, settings.factor, settings.min_frame_pixels, int(most))


def sample(total: int, fps: float, settings: Preprocessing) -> list[int]:
    """Return which of `total` frames are taken, if there are `fps` frames a second.

    They are evenly spread and make whole steps, as in qwen_vl_utils. Of a video shorter than a step, all are taken.
    """
    step = settings.temporal_patch_size
    least, most = math.ceil(settings.min_frames / step) * step, max(settings.max_frames // step, 1) * step
    count = math.floor(min(max(total / fps * settings.fps, least), most, total) / step) * step
    return np.linspace(0, total - 1, count or total).round().astype(int).tolist()


def step_seconds(times: Sequence[float], step: int) -> tuple[float, ...]:
    """Return the middle between the first and the last time of each step.

    transformers' Qwen3VLProcessor writes it into the prompt in the same way.
    """
    padded = [*times, *[times[-1]] * (-len(times) % step)]
    return tuple((padded[i] + padded[i + step - 1]) / 2 for i in range(0, len(padded), step))


VIDEO_CODECS = frozenset({"h264", "hevc", "vp8", "vp9", "av1", "mpeg4"})


def _decode_video(data: bytes, settings: Preprocessing, limits: Limits) -> Frames:
    try:
        import av
        import av.error
    except ImportError:
        raise limits.refusal("no_video") from None
    check_bytes(data, limits)
    # The demuxer is named, because guessing would also try playlists, which open further files.
    options: dict[str, Any] = {"mode": "r", "format": _demuxer(data, limits)}
    if int(av.__version__.split(".")[0]) < 19:  # newer versions always do so
        options["metadata_errors"] = "ignore"  # titles need not be UTF-8
    try:
        with av.open(io.BytesIO(data), **options) as container:
            return _read_video(container, settings, limits)
    except MediaError:
        raise
    except (av.error.FFmpegError, ValueError, OverflowError, EOFError):
        raise limits.refusal("damaged") from None


def _demuxer(data: bytes, limits: Limits) -> str:
    """Return FFmpeg's name of the demuxer for the container, by the first bytes."""
    if data.startswith(b"\x1a\x45\xdf\xa3") and b"webm" in data[:64]:
        return "matroska"
    # Still images and sound have brands in the same container.
    if data[4:8] == b"ftyp" and data[8:12] not in (b"heic", b"heix", b"mif1", b"msf1", b"avif", b"avis", b"M4A "):
        return "mov"
    if data[4:8] in (b"moov", b"mdat", b"wide", b"free", b"skip"):  # QuickTime files from before there was ftyp
        return "mov"
    raise limits.refusal("not_a_video")


def _read_video(container: av.container.InputContainer, settings: Preprocessing, limits: Limits) -> Frames:
    if not container.streams.video:
        raise limits.refusal("no_frames")
    stream = next(filter(_is_taken, container.streams.video), None)  # there may also be a cover picture
    if stream is None:
        raise limits.refusal("not_a_video")
    context = stream.codec_context
    if context.width * context.height > limits.max_frame_pixels:
        raise limits.refusal("too_many_frame_pixels")
    context.options = {"max_pixels": str(limits.max_frame_pixels)}  # for frames that are larger than the header says
    context.thread_count = 2
    stream.thread_type = "AUTO"
    shown, keys, fps = _scan(container, stream, limits)
    chosen = sample(len(shown), fps, settings)
    pixels: list[np.ndarray] = []
    size = None
    for image in _pick(container, stream, [shown[i] for i in chosen], keys):
        if image.width * image.height > limits.max_frame_pixels:
            raise limits.refusal("too_many_frame_pixels")
        size = size or video_size(image.height, image.width, len(chosen), settings)
        pixels.append(resize(image, size))
    if len(pixels) < len(chosen):
        raise limits.refusal("damaged")
    return Frames(np.stack(pixels), step_seconds([i / fps for i in chosen], settings.temporal_patch_size))


def _is_taken(stream: av.video.stream.VideoStream) -> bool:
    context = stream.codec_context  # None for codecs that FFmpeg does not know; PyAV's types do not say so
    return context is not None and context.codec.canonical_name in VIDEO_CODECS


def _scan(
    container: av.container.InputContainer, stream: av.video.stream.VideoStream, limits: Limits
) -> tuple[list[int], list[int], float]:
    """Read through the file without decoding.

    Returns:
        The times of all frames, in order, the times of key frames, in order, and the frames a second.
    """
    base = float(stream.time_base or 0)
    header = max((container.duration or 0) / 1e6, (stream.duration or 0) * base)
    if header > limits.max_seconds:
        raise limits.refusal("too_long")
    shown: list[int] = []
    keys: list[int] = []
    packets = 0
    for packet in container.demux(stream):
        if packet.size == 0 or packet.pts is None:
            continue  # this packet marks the end
        packets += 1
        if packets > limits.max_frames:
            raise limits.refusal("too_many_frames")
        if not packet.is_discard:
            shown.append(packet.pts)
            if packet.is_keyframe:
                keys.append(packet.pts)
    if packets < stream.frames:
        raise limits.refusal("damaged")
    if not shown:
        raise limits.refusal("no_frames")
    shown.sort()
    span = (shown[-1] - shown[0]) * base
    fps = float(stream.average_rate or 0) or (max(len(shown) - 1, 1) / span if span else 1.0)
    if max(span, len(shown) / fps) > limits.max_seconds:
        raise limits.refusal("too_long")
    return shown, sorted({shown[0], *keys}), fps


def _pick(
    container: av.container.InputContainer, stream: av.video.stream.VideoStream, wanted: Sequence[int], keys: list[int]
) -> Iterator[Image.Image]:
    """Yield the frames shown at the times `wanted`, upright. These times are in order.

    The function skips frames that none of the wanted ones depends on.
    """
    frames: Iterator[av.VideoFrame] = iter(())
    current = following = None  # the frame that is shown, and the one after it
    for time in wanted:
        key = keys[bisect.bisect_right(keys, time) - 1]
        if current is None or (following is not None and key > (following.pts or 0)):
            container.seek(key, stream=stream)
            frames = container.decode(stream)
            current, following = None, next(frames, None)
        while following is not None and (current is None or (following.pts or 0) <= time):
            current, following = following, next(frames, None)
        if current is None:
            return
        yield _turn(current.to_image(), current.rotation)


def _turn(image: Image.Image, degrees: int) -> Image.Image:
    """Return the image turned counter-clockwise, by a multiple of 90 degrees as cameras write it."""
    turns = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}
    way = turns.get(degrees % 360)
    return image if way is None else image.transpose(way)
