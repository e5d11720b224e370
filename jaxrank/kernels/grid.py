"""From spans to pairs of (query tile, key tile) on a fixed grid, for the Pallas kernels (numpy, on the host).

Only pairs in which any row sees any key are listed, so attention's cost follows the sum of squared lengths; a query
tile of nothing but filler has one pair, or its output would never be written. Time goes with rows and pairs of tiles,
never with T x T.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Int32

from jaxrank.types import Layout

FIRST, LAST = 1, 2
"""Bits of an item: the first and the last key tile of its query tile. Above them 14 bits of each tile's number."""


def make_grid(
    spans: Int32[np.ndarray, "R 4"],
    keys: int,
    tile_size: Callable[[int], int],
    key_tile_size: Callable[[int], int] | None = None,
) -> Layout:
    """The layout of an attention call over `keys` keys, tiles[i] being a packed (query tile, key tile, last, first).

    tile_size: rows of a query tile, for an array of that many rows; the last tile may reach beyond the array.
    key_tile_size: the same of a key tile, if it differs.
    Items are sorted by query tile, then key tile; starts[t] is the first item of query tile t, and the last of starts
    their number. There is room for every pair, so that shapes depend on those of the call alone.
    """
    rows = len(spans)
    height, width = tile_size(rows), (key_tile_size or tile_size)(keys)
    down, across = -(-rows // height), -(-keys // width)
    tile_of_row = np.arange(rows) // height * (across + 1)
    edges = np.zeros(down * (across + 1), np.int64)
    for lo, hi in ((spans[:, 0], spans[:, 1]), (spans[:, 2], spans[:, 3])):
        seen = hi > lo
        edges += np.bincount(tile_of_row[seen] + lo[seen] // width, minlength=len(edges))
        edges -= np.bincount(tile_of_row[seen] + (hi[seen] - 1) // width + 1, minlength=len(edges))
    hit = np.cumsum(edges.reshape(down, across + 1), 1)[:, :across] > 0
    hit[~hit.any(1), 0] = True
    query_tile, key_tile = np.nonzero(hit)
    starts = np.concatenate([[0], np.cumsum(hit.sum(1))]).astype(np.int32)
    items = query_tile << 16 | key_tile << 2
    items[starts[:-1]] |= FIRST
    items[starts[1:] - 1] |= LAST
    tiles = np.zeros(down * across, np.int32)
    tiles[: len(items)] = items
    return Layout(spans=spans, tiles=tiles, starts=starts)
