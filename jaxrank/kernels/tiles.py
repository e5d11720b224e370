"""From spans to the list of attention tiles (numpy, on the host).

The time is proportional to rows and tiles, and never to T x T. A tile is a run of query rows and the one or two runs of
keys that those rows may see. Tiles start at document borders, not at multiples of the tile size. So a document of 190
tokens costs one 192 x 192 tile.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from jaxtyping import Int32

from jaxrank.types import Layout

WINDOWS = (128, 192, 256, 384, 512, 1024)
"""The key counts W of the tile classes. Their steps are fine at the lengths of documents.

Tiles with more keys are computed W keys at a time.
"""

SCORE_WINDOWS = (256, 1024)

LONG_ROW = 2048
"""Longer rows go through attention a few heads at a time where memory is saved (see models.layers.save_memory)."""

TOKEN_MERGE = 128
SCORE_MERGE = 512


def classes(keys: int, rows: int) -> list[tuple[int, int]]:
    """Return the tile classes (B, W) of an attention call of `rows` query rows over `keys` keys, smallest first.

    A tile of the last class has any number of keys, and a tile of the others at most W. If rows equals keys, tiles are
    square up to 256, and larger ones have at most 256 x 384 elements. This keeps one tile's float32 scores at 6 MB with
    16 heads. All scratch memory of a layer must stay under 32 MB on CPU (see reranker.default_row_tokens). In rows of
    over LONG_ROW keys, a few heads at a time, tiles may have 512 x 512.

    The S scored rows of the last layer go in tiles of 8. They cost little, so they have fewer classes. Each class takes
    time to compile, and memory, in every bucket.
    """
    most = min(keys, WINDOWS[-1])
    if rows != keys:
        return [(min(8, rows), w) for w in (*(w for w in SCORE_WINDOWS if w < most), most)]
    elements = 512 * 512 if keys > LONG_ROW else 256 * 384
    return [(min(w, elements // w), w) for w in (*(w for w in WINDOWS if w < most), most)]


def max_tiles(keys: int, rows: int) -> int:
    """Return an upper bound on the number of tiles, from the shapes alone."""
    return rows if rows != keys else max(4, rows // 16)


def _runs(spans: np.ndarray) -> list[tuple[int, int]]:
    """Return runs of rows that belong to one document (same a-span and start of b-span), without filler."""
    filled = (spans[:, 1] > spans[:, 0]) | (spans[:, 3] > spans[:, 2])
    key = np.column_stack([spans[:, :3], filled])
    edges = np.flatnonzero(np.any(key[1:] != key[:-1], axis=1)) + 1
    bounds = [0, *edges.tolist(), len(spans)]
    return [(s, e) for s, e in pairwise(bounds) if filled[s]]


def _windows(spans: np.ndarray) -> tuple[int, int, int, int]:
    """Return (a0, an, b0, bn): the keys that any of these rows sees, as two runs that do not overlap."""
    runs: list[tuple[int, int]] = []
    for lo, hi in ((spans[:, 0], spans[:, 1]), (spans[:, 2], spans[:, 3])):
        seen = hi > lo
        if seen.any():
            runs.append((int(lo[seen].min()), int(hi[seen].max())))
    if len(runs) == 2 and runs[0][0] <= runs[1][1] and runs[1][0] <= runs[0][1]:
        runs = [(min(runs[0][0], runs[1][0]), max(runs[0][1], runs[1][1]))]
    (a0, a1), (b0, b1) = runs if len(runs) == 2 else ((0, 0), runs[0])
    return a0, a1 - a0, b0, b1 - b0


def make_layout(spans: Int32[np.ndarray, "R 4"], keys: int) -> Layout:
    """Return the layout of an attention call: `spans` over a row of `keys` keys, with its tile list.

    Neighbouring documents share a tile while their rows and keys stay few: TOKEN_MERGE for a row's own tokens,
    SCORE_MERGE for the few scored rows. A document larger than its class's B rows is cut.
    """
    rows = len(spans)
    kinds = classes(keys, rows)
    windows = np.array([w for _, w in kinds])
    merge = TOKEN_MERGE if rows == keys else SCORE_MERGE
    found: list[tuple[int, tuple[int, ...]]] = []

    def emit(start: int, end: int) -> None:
        a0, an, b0, bn = _windows(spans[start:end])
        kind = min(int(np.searchsorted(windows, an + bn)), len(kinds) - 1)
        height = kinds[kind][0]
        if end - start > height:
            for s in range(start, end, height):
                emit(s, min(s + height, end))
            return
        found.append((kind, (min(start, rows - height), start, end, a0, an, b0, bn)))

    group: tuple[int, int] | None = None
    for start, end in _runs(spans):
        if group is not None and group[1] == start and end - group[0] <= kinds[0][0]:
            _, an, _, bn = _windows(spans[group[0] : end])
            if an + bn <= merge:
                group = (group[0], end)
                continue
        if group is not None:
            emit(*group)
        group = (start, end)
    if group is not None:
        emit(*group)

    found.sort(key=lambda item: item[0])
    tiles = np.zeros((max_tiles(keys, rows), 7), np.int32)
    if found:
        tiles[: len(found)] = [tile for _, tile in found]
    starts = np.searchsorted([kind for kind, _ in found], np.arange(len(kinds) + 1)).astype(np.int32)
    return Layout(spans=spans, tiles=tiles, starts=starts)
