"""From spans to pairs of (query tile, key tile) on a fixed grid, for the Pallas kernels (numpy, on the host).

The list holds only pairs in which any row sees any key. So the cost of attention follows the sum of squared lengths. A
query tile that holds only filler has one pair, because its output would never be written otherwise. The time of this
function grows with rows and pairs of tiles, never with T x T.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int32, Int64

from jaxrank.types import Layout

FIRST, LAST, FULL = 1, 2, -1 << 31
"""The bits of an item of the list.

FIRST marks the first key tile of its query tile, and LAST the last one. FULL means that every row sees every key, so no
mask is needed. It is the sign bit: such items are below 0. Between these bits are 14 bits of each tile's number.
"""


def query_tile(item: Array) -> Array:
    """Return the number of an item's query tile, inside a kernel.

    Shifts and masks are safe there, and division is not.
    """
    return lax.shift_right_logical(item, 16) & 0x3FFF


def key_tile(item: Array) -> Array:
    """Return the number of an item's key tile."""
    return lax.shift_right_logical(item, 2) & 0x3FFF


def make_grid(
    spans: Int32[np.ndarray, "R 4"],
    keys: int,
    tile_size: Callable[[int], int],
    key_tile_size: Callable[[int], int] | None = None,
) -> Layout:
    """Return the layout of an attention call over `keys` keys. tiles[i] packs (full, query tile, key tile, last,
    first).

    Items are sorted by query tile, then by key tile. starts[t] is the first item of query tile t, and the last of
    starts is the number of items. There is room for every pair, so the shapes depend only on the shapes of the call.

    Args:
        spans: the spans of the query rows.
        keys: the number of keys.
        tile_size: a function from the rows of an array to the rows of a query tile. The last tile may reach beyond the
            array.
        key_tile_size: the same for a key tile, if it differs.
    """
    rows = len(spans)
    height, width = tile_size(rows), (key_tile_size or tile_size)(keys)
    down, across = -(-rows // height), -(-keys // width)
    first_pair = np.repeat(np.arange(down) * (across + 1), height)[:rows]
    edges = np.zeros(down * (across + 1), np.int64)
    columns = np.ascontiguousarray(spans.T)
    for lo, hi in (columns[:2], columns[2:]):
        seen = hi > lo
        edges += np.bincount((first_pair + lo // width)[seen], minlength=len(edges))
        edges -= np.bincount((first_pair + (hi - 1) // width + 1)[seen], minlength=len(edges))
    hit = np.cumsum(edges.reshape(down, across + 1), 1)[:, :across] > 0
    hit[~hit.any(1), 0] = True
    query_tiles, key_tiles = np.nonzero(hit)
    starts = np.concatenate([[0], np.cumsum(hit.sum(1))]).astype(np.int32)
    items = query_tiles << 16 | key_tiles << 2
    items[starts[:-1]] |= FIRST
    items[starts[1:] - 1] |= LAST
    items[_is_full(columns, np.arange(0, rows, height), query_tiles, key_tiles * width, width)] |= FULL
    tiles = np.zeros(down * across, np.int32)
    tiles[: len(items)] = items
    return Layout(spans=spans, tiles=tiles, starts=starts)


def _is_full(
    columns: Int32[np.ndarray, "4 R"],
    first_rows: Int64[np.ndarray, " tiles"],
    query_tiles: Int64[np.ndarray, " I"],
    first_keys: Int64[np.ndarray, " I"],
    width: int,
) -> Bool[np.ndarray, " I"]:
    """Return for which pairs of tiles every row of the array sees every key.

    A row of filler sees no key. Rows beyond the array do not count, because nothing reads their results. The spans are
    intersected over the rows of a query tile, the first spans and the second ones separately. A pair that rows see
    through different spans may be missed. Its mask is then applied without need.
    """
    a0, a1, b0, b1 = columns
    alone = a1 <= a0
    joined = alone | (a1 == b0)  # these are one span, for example where a prefix ends at the document
    full = np.zeros(len(query_tiles), bool)
    for lo, hi in ((np.where(alone, b0, a0), np.where(joined, b1, a1)), (b0, b1)):
        lo, hi = np.maximum.reduceat(lo, first_rows), np.minimum.reduceat(hi, first_rows)
        full |= (lo[query_tiles] <= first_keys) & (first_keys + width <= hi[query_tiles])
    return full
