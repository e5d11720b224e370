"""Rows of patches and positions of media tokens, against transformers' own functions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen3VLConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

from jaxrank.kernels import IMPLEMENTATIONS
from jaxrank.media.grid import PATCH_LADDER, Grid, mrope_positions, tokens_of
from jaxrank.runtime.patch_packing import cut_features, pack_patches, patch_bucket, plan_patches
from jaxrank.types import Patches

GRIDS: list[Grid] = [(1, 4, 6), (3, 6, 4), (1, 2, 20), (1, 90, 80), (1, 2, 2), (2, 48, 48)]


def media(*grids: Grid, values: int = 8) -> list[Patches]:
    rng = np.random.default_rng(0)
    return [Patches(rng.normal(size=(t * h * w, values)).astype(np.float32), (t, h, w)) for t, h, w in grids]


class TestRows:
    @pytest.mark.parametrize("side", [6, 48])
    def test_places_as_published(self, side: int) -> None:
        row = pack_patches(media(*GRIDS), 16384, values=8, merge=2, side=side)
        grids = torch.tensor(GRIDS)
        used = int(grids.prod(-1).sum())
        indices, weights = get_vision_interpolation_indices_and_weights(
            grids, num_grid_per_side=side, align_corners=True, spatial_merge_size=2
        )
        assert np.array_equal(row.positions[:used], get_vision_position_ids(grids, 2).numpy())
        table = np.random.default_rng(1).normal(size=(side**2, 5))
        mine, theirs = (
            (table[corners] * shares[..., None]).sum(1)
            for corners, shares in ((row.corners[:used], row.weights[:used]), (indices.numpy(), weights.numpy()))
        )
        assert np.abs(mine - theirs).max() < 1e-6

    def test_segments(self) -> None:
        """An image is one; every step of a video is one; filler sees nothing."""
        row = pack_patches(media((1, 4, 6), (3, 2, 4), (1, 2, 2)), 64, values=8, merge=2, side=6)
        edges = [0, 24, 32, 40, 48, 52]
        for start, end in pairwise(edges):
            assert np.array_equal(row.layout.spans[start:end], [[0, 0, start, end]] * (end - start))
        assert not np.any(row.layout.spans[52:])
        assert not np.any(row.pixels[52:])
        assert row.layout.used == 52

    def test_pixels_in_order(self) -> None:
        some = media((1, 4, 6), (3, 2, 4))
        row = pack_patches(some, 64, values=8, merge=2, side=6)
        assert np.array_equal(row.pixels[:48], np.concatenate([one.pixels for one in some]))

    def test_an_empty_row(self) -> None:
        row = pack_patches([], 1024, values=8, merge=2, side=6)
        assert row.pixels.shape == (1024, 8)
        assert row.layout.used == 0

    @pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
    def test_shapes_do_not_depend_on_what_is_in_the_row(self, implementation: str) -> None:
        rows = (
            pack_patches(some, 1024, values=8, merge=2, side=6, implementation=implementation)
            for some in ([], media((1, 2, 2)), media(*[(1, 2, 2)] * 256), media((1, 32, 32)))
        )
        assert len({tuple(np.shape(leaf) for leaf in (r.pixels, r.layout.tiles, r.layout.starts)) for r in rows}) == 1

    @pytest.mark.parametrize(
        "grids, patches, message",
        [
            ([(1, 4, 6), (1, 8, 8)], 64, "88 patches do not fit a row of 64"),
            ([(1, 4, 6)], 62, "must be a multiple of 4"),
            ([(1, 3, 8)], 64, r"media of grid \(1, 3, 8\) have pixels \(24, 8\); want .* in multiples of 2"),
        ],
    )
    def test_refused(self, grids: list[Grid], patches: int, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            pack_patches(media(*grids), patches, values=8, merge=2, side=6)

    def test_pixels_that_do_not_fit_their_grid(self) -> None:
        [one] = media((1, 4, 6))
        with pytest.raises(ValueError, match=r"media of grid \(1, 4, 4\) have pixels \(24, 8\)"):
            pack_patches([Patches(one.pixels, (1, 4, 4))], 64, values=8, merge=2, side=6)


class TestPlan:
    def test_every_medium_once_and_no_row_too_full(self) -> None:
        rng = np.random.default_rng(2)
        some = [
            Patches(np.zeros((4 * int(n), 1), np.float32), (1, 2, 2 * int(n)))
            for n in [*rng.integers(1, 250, 60), 2000]
        ]
        rows = plan_patches(some, 1024)
        assert sorted(i for row in rows for i in row) == list(range(61))
        sizes = [sum(len(some[i].pixels) for i in row) for row in rows]
        assert sizes.count(8000) == 1
        assert all(size <= 1024 for size in sizes if size != 8000)
        most_rows = 1 + -(-sum(size for size in sizes if size != 8000) * 11 // (1024 * 9))
        assert len(rows) <= most_rows + 1, "first fit decreasing takes at most 11/9 of the best, and one"

    def test_buckets(self) -> None:
        assert [patch_bucket(n) for n in (0, 1024, 1028, 7200, 7680 * 4)] == [1024, 1024, 4096, 8192, 30720]
        with pytest.raises(ValueError, match=r"30724 patches fit no row of .*; shrink the image"):
            patch_bucket(30724)

    def test_every_size_is_whole_tiles(self) -> None:
        assert all(size % 256 == 0 for size in PATCH_LADDER)


def test_features_are_cut_by_media() -> None:
    grids: list[Grid] = [(1, 4, 6), (3, 6, 4), (1, 2, 2)]
    features = np.random.default_rng(3).normal(size=(64, 3, 5))
    first, second, third = cut_features(features, grids, 2)
    assert [len(first), len(second), len(third)] == [tokens_of(grid, 2) for grid in grids] == [6, 18, 1]
    assert np.array_equal(np.concatenate([first, second, third]), features[:25])


Part = int | Grid


def published(parts: Sequence[Part]) -> tuple[np.ndarray, np.ndarray]:
    """Which tokens stand for media (0 none, 1 image, 2 video), and transformers' positions. Grids of several steps are
    videos: each step has text before it and a mark on either side, as Qwen3VLProcessor writes them."""
    kinds: list[int] = []
    for part in parts:
        if isinstance(part, int):
            kinds += [0] * part
        else:
            steps, height, width = part
            lead, kind = (6, 2) if steps > 1 else (1, 1)
            kinds += ([0] * lead + [kind] * (height * width // 4) + [0]) * steps
    grids = [part for part in parts if not isinstance(part, int)]
    some: dict[str, Any] = {
        "image_grid_thw": [grid for grid in grids if grid[0] == 1],
        "video_grid_thw": [grid for grid in grids if grid[0] > 1],
    }
    ids = torch.tensor([kinds])
    model: Any = SimpleNamespace(config=Qwen3VLConfig(text_config={}, vision_config={}))
    model.get_vision_position_ids = lambda *args, **kwargs: Qwen3VLModel.get_vision_position_ids(model, *args, **kwargs)
    index: Any = Qwen3VLModel.get_rope_index
    positions, _ = index(
        model, ids, ids, **{name: torch.tensor(grids) if grids else None for name, grids in some.items()}
    )
    return np.array(kinds), positions[:, 0].numpy()


CASES: dict[str, list[Part]] = {
    "text": [20],
    "an image": [5, (1, 4, 6), 7],
    "wide and tall images": [3, (1, 2, 20), (1, 30, 4), 2],
    "a video": [4, (3, 6, 4), 9],
    "images and videos in any order": [1, (1, 2, 2), (2, 8, 4), 5, (1, 10, 6), (4, 2, 6), (1, 4, 4), 1],
    "ends in media": [2, (1, 4, 4)],
}


class TestPositions:
    @pytest.mark.parametrize("parts", CASES.values(), ids=CASES)
    def test_as_published(self, parts: list[Part]) -> None:
        kinds, want = published(parts)
        grids = [part for part in parts if not isinstance(part, int)]
        positions, after = mrope_positions(kinds > 0, grids, merge=2)
        assert np.array_equal(positions, want)
        assert after == want.max() + 1

    @pytest.mark.parametrize("parts", CASES.values(), ids=CASES)
    def test_in_two_pieces(self, parts: list[Part]) -> None:
        """A prefix, and what goes on behind it."""
        prefix: list[Part] = [6, (1, 6, 2), 2]
        kinds, want = published([*prefix, *parts])
        length = len(published(prefix)[0])
        first, after = mrope_positions(kinds[:length] > 0, [(1, 6, 2)], merge=2)
        grids = [part for part in parts if not isinstance(part, int)]
        second, _ = mrope_positions(kinds[length:] > 0, grids, merge=2, start=after)
        assert np.array_equal(np.concatenate([first, second], 1), want)

    def test_nothing(self) -> None:
        positions, after = mrope_positions(np.zeros(0, bool), [], merge=2, start=7)
        assert positions.shape == (3, 0)
        assert after == 7

    def test_media_without_text_between(self) -> None:
        positions, after = mrope_positions(np.ones(7, bool), [(1, 4, 6), (1, 2, 2)], merge=2)
        assert positions[:, -1].tolist() == [3, 3, 3]
        assert after == 4

    def test_tokens_that_do_not_fit_the_grids(self) -> None:
        with pytest.raises(ValueError, match=r"5 tokens stand for media, their grids .* need 6"):
            mrope_positions(np.ones(5, bool), [(1, 4, 6)], merge=2)
        with pytest.raises(ValueError, match="the 2 x 3 media tokens from token 0 on are interrupted by text"):
            mrope_positions(np.array([1, 1, 1, 0, 1, 1, 1], bool), [(1, 4, 6)], merge=2)
