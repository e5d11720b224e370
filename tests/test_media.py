"""Images and video to patches: against transformers where it has the step, and what has to be refused."""

from __future__ import annotations

import contextlib
import io
import json
import random
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

from jaxrank.errors import CheckpointError, MediaError, RequestError, UnsupportedError
from jaxrank.media.grid import PATCH_LADDER
from jaxrank.media.images import REASONS, Frames, Limits, Preprocessing, fit
from jaxrank.media.patches import changed, cut, image_patches, read_preprocessing, video_patches
from jaxrank.media.video import sample, step_seconds, video_frames, video_size
from tests.media import clip, encoded, lasting, photo, png_header, sound, turned

SETTINGS = Preprocessing()
LIMITS = Limits()


def theirs(image: Image.Image, **changes: Any) -> tuple[np.ndarray, tuple[int, ...]]:
    """What transformers makes of an image."""
    settings: dict[str, Any] = {
        "patch_size": 16,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "size": {"shortest_edge": 4 * 32 * 32, "longest_edge": 1800 * 32 * 32},
    }
    out = Qwen2VLImageProcessorPil(**settings | changes)(image, return_tensors="np")
    return out["pixel_values"], tuple(out["image_grid_thw"][0])


def refused(source: Any, kind: str = "image", limits: Limits = LIMITS) -> str:
    """The code with which a source is refused."""
    read = image_patches if kind == "image" else video_patches
    with pytest.raises(MediaError) as caught:
        read(source, SETTINGS, limits)
    assert str(caught.value) == REASONS[caught.value.code].format(limits)
    assert caught.value.__context__ is None or caught.value.__suppress_context__  # nothing of the decoder's in it
    return caught.value.code


class TestImages:
    @pytest.mark.parametrize(
        "size", [(640, 480), (33, 77), (1, 1), (10, 10), (1, 200), (4000, 20), (10, 2000), (31, 33), (1700, 1500)]
    )
    def test_equals_transformers(self, size: tuple[int, int]) -> None:
        image = photo(*size)
        pixels, grid = theirs(image)
        ours = image_patches(image)
        assert ours.grid == grid
        assert ours.seconds == ()
        assert ours.pixels.dtype == np.float32
        np.testing.assert_array_equal(ours.pixels, pixels)

    @pytest.mark.parametrize("mode", ["L", "RGBA", "LA", "P", "PA", "CMYK", "1", "YCbCr", "HSV", "RGBX"])
    def test_modes(self, mode: str) -> None:
        image = photo(90, 70)
        if mode in ("RGBA", "LA"):
            image.putalpha(photo(90, 70, seed=1).convert("L"))
        image = image.convert("P").convert(mode) if mode == "PA" else image.convert(mode)
        np.testing.assert_array_equal(image_patches(image).pixels, theirs(image)[0])

    def test_transparency_is_white(self) -> None:
        clear = Image.new("RGBA", (64, 64), (10, 20, 30, 0))
        palette = Image.new("P", (64, 64), 3)
        palette.putpalette([7] * 768)
        for image in (clear, Image.open(io.BytesIO(encoded(palette, transparency=3)))):
            assert (image_patches(image).pixels == 1).all()

    def test_other_numbers(self) -> None:
        image, mean, std = photo(100, 60), (0.4, 0.5, 0.6), (0.2, 0.3, 0.1)
        settings = Preprocessing(patch_size=4, mean=mean, std=std, min_pixels=8 * 8, max_pixels=3000)
        size = {"shortest_edge": 8 * 8, "longest_edge": 3000}
        pixels, grid = theirs(image, patch_size=4, image_mean=list(mean), image_std=list(std), size=size)
        ours = image_patches(image, settings)
        assert ours.grid == grid
        np.testing.assert_array_equal(ours.pixels, pixels)

    def test_sizes_equal_transformers(self) -> None:
        draw = random.Random(0)
        for _ in range(3000):
            height, width = (int(10 ** draw.uniform(0, 4)) for _ in range(2))
            try:
                expected = smart_resize(height, width, 32, SETTINGS.min_pixels, SETTINGS.max_pixels)
            except ValueError:
                with pytest.raises(MediaError):
                    fit(height, width, 32, SETTINGS.min_pixels, SETTINGS.max_pixels)
            else:
                assert fit(height, width, 32, SETTINGS.min_pixels, SETTINGS.max_pixels) == expected

    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
    def test_encoded(self, kind: str) -> None:
        data = encoded(photo(80, 50), kind)
        np.testing.assert_array_equal(image_patches(data).pixels, theirs(Image.open(io.BytesIO(data)))[0])

    def test_first_picture_of_many(self) -> None:
        first, second = photo(64, 64), photo(64, 64, seed=1)
        for kind, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {})):
            data = encoded(first, kind, save_all=True, append_images=[second], **options)
            alone = encoded(first, kind, **options)
            np.testing.assert_array_equal(image_patches(data).pixels, image_patches(alone).pixels)

    def test_exif_turns(self) -> None:
        image = photo(96, 64)
        exif = Image.Exif()
        exif[0x0112] = 6
        data = encoded(image, "PNG", exif=exif)
        expected = image.transpose(Image.Transpose.ROTATE_270)
        np.testing.assert_array_equal(image_patches(data).pixels, image_patches(expected).pixels)

    def test_16_bits_are_scaled(self) -> None:
        grey = np.asarray(photo(64, 64).convert("L"))
        deep = Image.fromarray(grey.astype(np.uint16) << 8 | 0x7F)
        expected = image_patches(Image.fromarray(grey)).pixels
        np.testing.assert_array_equal(image_patches(deep).pixels, expected)
        np.testing.assert_array_equal(image_patches(encoded(deep)).pixels, expected)


class TestRefusedImages:
    @pytest.mark.parametrize("size", [(1, 4000), (4000, 1), (1, 201)])
    def test_too_narrow(self, size: tuple[int, int]) -> None:
        with pytest.raises(ValueError, match="aspect ratio"):
            theirs(Image.new("RGB", size))
        assert refused(Image.new("RGB", size)) == "too_narrow"
        assert refused(encoded(Image.new("RGB", size))) == "too_narrow"

    @pytest.mark.parametrize("side", [7000, 9500, 14000, 50_000])
    def test_bombs(self, side: int) -> None:
        # more than our limit, than Pillow warns of, and than it refuses
        assert refused(png_header(side, side)) == "too_many_pixels"

    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
    def test_cut_short(self, kind: str) -> None:
        data = encoded(photo(200, 200), kind)
        assert refused(data[: len(data) // 2]) == "damaged"
        assert refused(data[:20]) == "damaged"

    @pytest.mark.parametrize(
        "data",
        [
            b'<svg xmlns="http://www.w3.org/2000/svg" width="10" height="10"/>',
            b"<!DOCTYPE html><html><body>photo.jpg</body></html>",
            b"GIF",
            b"\x00" * 100,
            b"%PDF-1.7",
            b"II*\x00" + b"\x00" * 100,
            b"RIFF\x00\x00\x00\x00AVI ",
        ],
    )
    def test_other_kinds(self, data: bytes) -> None:
        assert refused(data) == "not_an_image"

    @pytest.mark.parametrize("kind", ["BMP", "TIFF", "PPM", "JPEG2000", "AVIF"])
    def test_kinds_that_pillow_reads(self, kind: str) -> None:
        try:
            data = encoded(photo(64, 64), kind)
        except (KeyError, OSError):
            pytest.skip(f"this Pillow does not write {kind}")
        assert refused(data) == "not_an_image"

    def test_bytes(self) -> None:
        data = encoded(photo(64, 64))
        assert refused(b"") == "empty"
        assert refused(data, limits=Limits(max_bytes=len(data) - 1)) == "too_many_bytes"
        image_patches(data, SETTINGS, Limits(max_bytes=len(data)))

    def test_pixels_of_pillow_images(self) -> None:
        assert refused(Image.new("L", (100, 101)), limits=Limits(max_pixels=10_000)) == "too_many_pixels"


class TestVideo:
    @pytest.mark.parametrize(
        "kind, codec, gop",
        [("mp4", "libx264", 12), ("mp4", "libx264", 300), ("mov", "mpeg4", 12), ("webm", "libvpx", 30),
         ("webm", "libvpx-vp9", 12)],
    )  # fmt: skip
    @pytest.mark.parametrize("frames", [1, 3, 61, 300])
    def test_files(self, kind: str, codec: str, gop: int, frames: int) -> None:
        got = video_frames(clip(frames, kind=kind, codec=codec, gop=gop), SETTINGS, LIMITS)
        chosen = sample(frames, 30, SETTINGS)
        assert len(got.pixels) == len(chosen) == {1: 1, 3: 2, 61: 4, 300: 10}[frames]
        assert got.pixels.shape[1:] == (320, 448, 3)  # the fewest pixels that a frame may have
        expected = [number * 255 // max(frames - 1, 1) for number in chosen]
        assert got.pixels.mean((1, 2, 3)) == pytest.approx(expected, abs=6)
        indices = list(chosen)  # transformers adds to the list that it is given
        their_times: Any = Qwen3VLProcessor._calculate_timestamps
        assert got.seconds == pytest.approx(their_times(None, indices, 30, 2))
        assert len(got.seconds) == video_patches(clip(frames)).grid[0]

    def test_many_frames(self) -> None:
        got = video_frames(clip(200, fps=2, gop=50), SETTINGS, LIMITS)
        assert len(got.pixels) == 64
        assert got.seconds[-1] == pytest.approx((sample(200, 2, SETTINGS)[-2] / 2 + 99.5) / 2)
        assert np.diff(got.pixels.mean((1, 2, 3))) == pytest.approx(255 / 63, abs=3)

    def test_sampling(self) -> None:
        assert sample(300, 30, SETTINGS) == np.linspace(0, 299, 10).round().tolist()
        assert len(sample(3600, 30, SETTINGS)) == 64
        assert len(sample(339, 30, SETTINGS)) == 10  # 11.3 seconds, whole steps
        assert sample(1, 30, SETTINGS) == [0]
        assert sample(2, 0.001, SETTINGS) == [0, 1]
        assert len(sample(1000, 30, replace(SETTINGS, max_frames=7, fps=2))) == 6
        assert len(sample(1000, 30, replace(SETTINGS, max_frames=1))) == 2  # one step at least

    def test_budget(self) -> None:
        for frames in (1, 2, 4, 20, 21, 40, 64):
            for height, width in ((1080, 1920), (4000, 30), (360, 640), (64, 96)):
                sides = video_size(height, width, frames, SETTINGS)
                tokens = sides[0] * sides[1] // 1024
                assert tokens <= 768
                assert (frames + 1) // 2 * tokens <= 7680
                assert tokens >= 128 or max(height, width) > 100 * min(height, width)
        assert video_size(1080, 1920, 64, SETTINGS) == (352, 640)
        assert video_size(1080, 1920, 10, SETTINGS) == (640, 1152)

    def test_order_of_patches(self) -> None:
        rng = np.random.default_rng(0)
        pixels = rng.integers(0, 256, (5, 64, 96, 3), np.uint8)
        ours = cut(Frames(pixels, (0.0, 1.0, 2.0)), SETTINGS)
        tensor = torch.from_numpy(pixels).permute(0, 3, 1, 2)[None].to(torch.float64)
        their_patchify: Any = Qwen3VLVideoProcessor.patchify
        patches, *grid = their_patchify(None, tensor, patch_size=16, merge_size=2, temporal_patch_size=2)
        assert ours.grid == tuple(grid) == (3, 4, 6)
        np.testing.assert_allclose(ours.pixels, patches[0].numpy() / 127.5 - 1, atol=1e-6)

    def test_lists(self) -> None:
        images = [photo(128, 96, seed=i) for i in range(3)]
        got = video_frames([images[0], encoded(images[1]), images[2]], SETTINGS, LIMITS)
        assert got.seconds == step_seconds([0, 0.5, 1.0], 2) == (0.25, 1.0)
        size = (got.pixels.shape[2], got.pixels.shape[1])
        for image, frame in zip(images, got.pixels, strict=True):
            np.testing.assert_array_equal(frame, np.asarray(image.resize(size, Image.Resampling.BICUBIC)))
        assert video_patches(images).grid == (2, size[1] // 16, size[0] // 16)
        assert video_frames(images, SETTINGS, LIMITS, list_fps=1.0).seconds == (0.5, 2.0)

    def test_long_lists(self) -> None:
        images = [Image.new("L", (32, 32), i) for i in range(100)]
        got = video_frames(images, SETTINGS, LIMITS)
        assert got.pixels[:, 0, 0, 0].tolist() == np.linspace(0, 99, 64, dtype=int).tolist()

    def test_turned(self) -> None:
        half = np.zeros((96, 64, 3), np.uint8)
        half[:, 32:] = 255  # white on the right, which is below once it is turned clockwise
        video = clip(4, size=(64, 96), draw=lambda number: half)
        flat = video_frames(video, SETTINGS, LIMITS).pixels
        got = video_frames(turned(video), SETTINGS, LIMITS).pixels
        assert got.shape[1:3] == flat.shape[2:0:-1]
        middle = got.shape[1] // 2
        assert got[:, : middle - 20].mean() < 20 < 235 < got[:, middle + 20 :].mean()

    def test_cover_pictures_are_not_the_video(self) -> None:
        file = io.BytesIO()
        with av.open(file, "w", format="mov") as container:
            streams: list[Any] = [container.add_stream(codec, rate=1) for codec in ("mjpeg", "libx264")]
            for stream, pixel_format in zip(streams, ("yuvj420p", "yuv420p"), strict=True):
                stream.width = stream.height = 64
                stream.pix_fmt = pixel_format
            for stream, grey in zip(streams, (0, 255), strict=True):
                picture = av.VideoFrame.from_ndarray(np.full((64, 64, 3), grey, np.uint8), format="rgb24")
                container.mux([*stream.encode(picture), *stream.encode()])
        assert video_frames(file.getvalue(), SETTINGS, LIMITS).pixels.min() > 200

    def test_titles_in_any_encoding(self) -> None:
        video = clip(4)
        assert b"a title" in video
        video_patches(video.replace(b"a title", b"caf\xe9 \xff\xfe"))

    def test_without_pyav(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "av", None)
        assert refused(b"\x00\x00\x00\x18ftypisom", "video") == "no_video"
        video_patches([photo(32, 32)])


class TestRefusedVideo:
    def test_cut_short(self, tmp_path: Path) -> None:
        data = clip(60)  # what says where the frames are comes last
        assert refused(data[: len(data) // 2], "video") == "damaged"
        first = clip(60, folder=tmp_path, movflags="faststart")
        video_patches(first)
        assert refused(first[: len(first) * 3 // 4], "video") == "damaged"
        with av.open(io.BytesIO(first), mode="r") as container:
            ends = [(packet.pos or 0) + packet.size for packet in container.demux(video=0) if packet.size]
        assert refused(first[: ends[40]], "video") == "damaged"  # where one frame ends and the next is missing

    def test_no_frames(self) -> None:
        assert refused(sound(), "video") == "no_frames"
        assert refused([], "video") == "no_frames"

    def test_too_long(self) -> None:
        for video in (clip(4), clip(4, kind="webm", codec="libvpx")):
            assert refused(lasting(video, 36_000), "video") == "too_long"
        assert refused(clip(4, fps=1), "video", Limits(max_seconds=2)) == "too_long"
        video_patches(clip(4, fps=1), limits=Limits(max_seconds=5))

    def test_too_much(self) -> None:
        assert refused(clip(30), "video", Limits(max_frames=29)) == "too_many_frames"
        assert refused(clip(4), "video", Limits(max_frame_pixels=96 * 64 - 1)) == "too_many_frame_pixels"
        assert refused([photo(32, 32)] * 3, "video", Limits(max_listed=2)) == "too_many_listed"
        assert refused(clip(4), "video", Limits(max_bytes=100)) == "too_many_bytes"
        assert refused(b"", "video") == "empty"

    def test_lists(self) -> None:
        assert refused([photo(32, 32), photo(32, 64)], "video") == "different_sizes"
        assert refused([photo(32, 32), b"<html>"], "video") == "not_an_image"

    @pytest.mark.parametrize(
        "data",
        [
            b"#EXTM3U\n#EXT-X-TARGETDURATION:1\nfile:///etc/passwd\n",
            b"ffconcat version 1.0\nfile /etc/passwd\n",
            b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic",
            b"\x1a\x45\xdf\xa3\x01\x00\x00\x00\x00\x00\x00\x23\x42\x82\x88matroska",
            b"<html>video.mp4</html>",
            b"RIFF\x00\x00\x00\x00AVI LIST",
        ],
    )
    def test_other_kinds(self, data: bytes) -> None:
        assert refused(data, "video") == "not_a_video"
        assert refused(data + b"\x00" * 1000, "video") == "not_a_video"

    def test_other_codecs(self) -> None:
        assert refused(clip(2, kind="mov", codec="rawvideo"), "video") == "not_a_video"

    def test_images_are_no_video_and_back(self) -> None:
        assert refused(encoded(photo(32, 32)), "video") == "not_a_video"
        assert refused(clip(2)) == "not_an_image"

    @pytest.mark.parametrize("kind, codec", [("mp4", "libx264"), ("webm", "libvpx-vp9")])
    def test_noise_in_the_file(self, kind: str, codec: str) -> None:
        """Whatever is broken, it is read or refused."""
        data = clip(20, kind=kind, codec=codec)
        rng = np.random.default_rng(0)
        for _ in range(30):
            broken = np.frombuffer(data, np.uint8).copy()
            broken[rng.integers(16, len(data), 20)] = rng.integers(0, 256, 20)
            with contextlib.suppress(MediaError):
                video_patches(broken.tobytes())


class TestSettings:
    def write(self, folder: Path, **files: Any) -> None:
        for name, content in files.items():
            (folder / f"{name}.json").write_text(json.dumps(content))

    def test_defaults(self, tmp_path: Path) -> None:
        assert read_preprocessing(tmp_path) == Preprocessing()

    def test_files(self, tmp_path: Path) -> None:
        self.write(
            tmp_path,
            config={"vision_config": {"patch_size": 14, "spatial_merge_size": 4, "temporal_patch_size": 3}},
            preprocessor_config={"patch_size": 14, "image_mean": [0.1, 0.2, 0.3], "max_pixels": 1, "resample": 3},
            video_preprocessor_config={"image_std": [0.4, 0.5, 0.6], "fps": 2, "size": {"longest_edge": 1}},
        )
        expected = Preprocessing(14, 3, 4, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), max_pixels=5000)
        changes = {"max_pixels": 5000, "video_pixels": 10**6, "min_frame_pixels": 4096}
        expected = replace(expected, video_pixels=10**6, min_frame_pixels=4096)
        assert read_preprocessing(tmp_path, changes) == expected

    @pytest.mark.parametrize(
        "changes, message",
        [
            ({"patch_size": 8}, "patch_size is no size that can be chosen; those are min_pixels, max_pixels, fps"),
            ({"fps": 0}, "fps is 0; it must be a number above 0"),
            ({"fps": float("nan")}, "fps is nan; it must be a number above 0"),
            ({"max_frames": 2.5}, "max_frames is 2.5; it must be a whole number above 0"),
            ({"max_pixels": True}, "max_pixels is True; it must be a whole number"),
            ({"max_pixels": float("inf")}, "max_pixels is inf; it must be a whole number"),
            ({"min_pixels": 1000}, "min_pixels is 1000; it must be at least 1024"),
            ({"max_pixels": 4000}, "max_pixels is 4000; it must be at least 4096"),
            ({"max_pixels": 10**7}, "max_pixels is 10000000; the vision tower takes at most 7864320"),
            ({"video_pixels": 10**7}, "video_pixels is 10000000; the vision tower takes at most 7864320"),
            ({"max_frames": 3}, "max_frames is 3; it must be at least 4"),
            ({"max_frames": 768}, "max_frames is 768, of at least 131072 pixels each"),
        ],
    )
    def test_changes_that_cannot_be(self, tmp_path: Path, changes: dict[str, float], message: str) -> None:
        with pytest.raises(RequestError, match=re.escape(message)):
            read_preprocessing(tmp_path, changes)

    def test_the_largest_media_fit_a_row(self) -> None:
        """With the most that may be chosen, a picture and a video of any shape have a place in the tower's rows."""
        settings = changed(Preprocessing(), {"max_pixels": 7864320, "max_frames": 114, "fps": 30})
        for width, height in ((4000, 3000), (6000, 31), (1234, 5678)):
            assert len(image_patches(photo(width, height), settings).pixels) <= PATCH_LADDER[-1]
        for width, height in ((640, 480), (2000, 1000), (96, 3000)):
            size = video_size(height, width, 114, settings)
            assert size[0] * size[1] // 256 * 57 <= PATCH_LADDER[-1]

    def test_one_file_for_all(self, tmp_path: Path) -> None:
        self.write(tmp_path, processor_config={"image_processor": {"patch_size": 8}, "video_processor": {}})
        assert read_preprocessing(tmp_path).patch_size == 8

    def test_contradiction(self, tmp_path: Path) -> None:
        self.write(tmp_path, preprocessor_config={"patch_size": 16}, video_preprocessor_config={"patch_size": 14})
        with pytest.raises(CheckpointError, match="patch_size is 14"):
            read_preprocessing(tmp_path)

    def test_unknown(self, tmp_path: Path) -> None:
        self.write(tmp_path, preprocessor_config={"resample": 2})
        with pytest.raises(UnsupportedError, match="resample is 2"):
            read_preprocessing(tmp_path)

    @pytest.mark.parametrize("text", ["{", "[1]", "\xff"])
    def test_not_json(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "preprocessor_config.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(CheckpointError, match="not a JSON object"):
            read_preprocessing(tmp_path)
