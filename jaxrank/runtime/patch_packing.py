"""From images and video to rows of patches for the vision tower (numpy, on the host).

A row holds whole images and videos side by side, with P patches from a short ladder. An image is one segment, and so is
each temporal step of a video. The patches of a segment see only each other. The tower's output for a row is split again
into one part for each item.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32

from jaxrank.kernels import make_layout
from jaxrank.media.grid import PATCH_LADDER, Grid, tokens_of
from jaxrank.types import Patches, PatchRow

USUAL_PATCHES = 8192
"""Small images share a row up to this number of patches."""


def patch_bucket(patches: int, ladder: Sequence[int] = PATCH_LADDER) -> int:
    """Return the smallest size that holds so many patches.

    Raises:
        ValueError: no size holds them.
    """
    for size in ladder:
        if patches <= size:
            return size
    raise ValueError(f"{patches} patches fit no row of {list(ladder)}; shrink the image, or sample fewer frames")


def plan_patches(media: Sequence[Patches], row_patches: int = USUAL_PATCHES) -> list[list[int]]:
    """Choose which media share a row: first fit, largest first. Media larger than row_patches have a row of their own.

    Returns:
        Lists of indices into `media`.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(media)), key=lambda i: -len(media[i].pixels)):
        patches = len(media[i].pixels)
        row = next((row for row, left in enumerate(room) if left >= patches), None)
        if row is None:
            row = len(rows)
            rows.append([])
            room.append(row_patches)
        rows[row].append(i)
        room[row] -= patches
    return rows


def pack_patches(
    media: Sequence[Patches], patches: int, *, values: int, merge: int, side: int, implementation: str | None = None
) -> PatchRow:
    """Pack `media` in order into one row of `patches` patches, with filler behind them.

    Args:
        media: the images and videos.
        patches: the length of the row.
        values: E, the number of values of a patch.
        merge: the number of patches of a token, in each direction.
        side: the number of rows and of columns of the learned position table.
        implementation: the attention body that the layout is for. None is as in kernels.pick.

    Raises:
        ValueError: the media do not fit the row, or their pixels do not fit their grid.
    """
    pixels = np.zeros((patches, values), np.float32)
    corners = np.zeros((patches, 4), np.int32)
    weights = np.zeros((patches, 4), np.float32)
    positions = np.zeros((patches, 2), np.int32)
    spans = np.zeros((patches, 4), np.int32)
    used = sum(len(one.pixels) for one in media)
    if used > patches or patches % merge**2:
        raise ValueError(f"{used} patches do not fit a row of {patches}, which must be a multiple of {merge**2}")
    at = 0
    for one in media:
        steps, height, width = one.grid
        if one.pixels.shape != (steps * height * width, values) or height % merge or width % merge:
            raise ValueError(
                f"media of grid {one.grid} have pixels {one.pixels.shape}; want [time * height * width, {values}], "
                f"height and width in multiples of {merge}"
            )
        pixels[at : at + len(one.pixels)] = one.pixels
        places = block_order(height, width, merge)
        inside = between(places, (height, width), side)
        for _ in range(steps):
            end = at + height * width
            positions[at:end] = places
            corners[at:end], weights[at:end] = inside
            spans[at:end, 2:] = at, end
            at = end
    return PatchRow(pixels, corners, weights, positions, make_layout(spans, patches, implementation))


def block_order(height: int, width: int, merge: int) -> Int32[np.ndarray, "P 2"]:
    """Return the row and column of every patch of an image, in the order of image processors: in blocks of merge x
    merge."""
    places = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), -1).astype(np.int32)
    blocks = places.reshape(height // merge, merge, width // merge, merge, 2)
    return blocks.transpose(0, 2, 1, 3, 4).reshape(-1, 2)


def between(
    places: Int32[np.ndarray, "P 2"], size: tuple[int, int], side: int
) -> tuple[Int32[np.ndarray, "P 4"], Float32[np.ndarray, "P 4"]]:
    """Return the four entries of a side x side table around each patch, and their shares.

    This is bilinear interpolation that puts the corners of the image on the corners of the table.
    """
    at = places.astype(np.float32) * np.float32(side - 1) / np.maximum(np.array(size, np.float32) - 1, 1)
    low = at.astype(np.int32)
    high = np.minimum(low + 1, side - 1)
    share = at - low
    rows = ((low[:, 0], 1 - share[:, 0]), (high[:, 0], share[:, 0]))
    columns = ((low[:, 1], 1 - share[:, 1]), (high[:, 1], share[:, 1]))
    corners = [row * side + column for row, _ in rows for column, _ in columns]
    weights = [of_row * of_column for _, of_row in rows for _, of_column in columns]
    return np.stack(corners, 1).astype(np.int32), np.stack(weights, 1).astype(np.float32)


def cut_features(features: Any, grids: Sequence[Grid], merge: int) -> list[Any]:
    """Split the tower's output for a row into one array for each item.

    Args:
        features: an array [P / merge^2, U, D] of any array type.

    Returns:
        One array [tokens, U, D] for each image or video.
    """
    ends = np.cumsum([tokens_of(grid, merge) for grid in grids])
    return [features[end - tokens_of(grid, merge) : end] for grid, end in zip(grids, ends.tolist(), strict=True)]
