"""Attention in float64 on the host, written apart from every body, and spans to try it on."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

CHUNK = 128
"""Query rows at a time: no array is T x T."""


def reference(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, spans: np.ndarray, scale: float, rows: np.ndarray
) -> np.ndarray:
    """[len(rows), N, H]: softmax attention of those rows of q, which must see some key. Query head n looks at key head
    n mod K."""
    out = np.zeros((len(rows), *q.shape[1:]))
    kv_heads, size = k.shape[1:]
    groups = q.shape[1] // kv_heads
    for first in range(0, len(rows), CHUNK):
        some = rows[first : first + CHUNK]
        a0, a1, b0, b1 = spans[some].T.astype(np.int64)
        seen = [np.arange(lo[hi > lo].min(), hi.max()) for lo, hi in ((a0, a1), (b0, b1)) if (hi > lo).any()]
        at = np.unique(np.concatenate(seen))
        allowed = (at >= a0[:, None]) & (at < a1[:, None]) | (at >= b0[:, None]) & (at < b1[:, None])
        query = q[some].astype(np.float64).reshape(len(some), groups, kv_heads, size).transpose(2, 1, 0, 3)
        key, value = (x[at].astype(np.float64).transpose(1, 0, 2) for x in (k, v))
        scores = query @ key[:, None].transpose(0, 1, 3, 2) * scale
        scores = np.where(allowed, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        drawn = weights @ value[:, None] / weights.sum(-1, keepdims=True)
        out[first : first + CHUNK] = drawn.transpose(2, 1, 0, 3).reshape(len(some), *q.shape[1:])
    return out


def filled(spans: np.ndarray) -> np.ndarray:
    """Whether a row sees any key."""
    return (spans[:, 1] > spans[:, 0]) | (spans[:, 3] > spans[:, 2])


class Star(NamedTuple):
    """A prefix, which may be empty, and the lengths of the documents that follow it."""

    prefix: int
    lengths: list[int]
    causal: bool


def spans_of(total: int, stars: list[Star]) -> np.ndarray:
    """Spans of a row of `total` tokens that holds the stars side by side, with filler behind them."""
    spans = np.zeros((total, 4), np.int32)
    end = 0
    for star in stars:
        head = (end, end + star.prefix)
        for i, length in enumerate([star.prefix, *star.lengths]):
            rows = np.arange(end, end + length)
            spans[rows, :2] = head if i else 0
            spans[rows, 2] = end
            spans[rows, 3] = rows + 1 if star.causal else end + length
            end += length
    assert end < total, "every case has filler"
    return spans


def cases(total: int, long: int, slots: int) -> dict[str, np.ndarray]:
    """Spans by name: all kinds of rows that models attend in. total: tokens of a usual row. long: of a long one.
    slots: scored rows."""
    part, piece = total // 16, long // 16
    lengths = [3, part + 1, 1, part, 4 * part - 1, 2 * part + 5, 1, 7, 5 * part]
    stars = spans_of(
        total,
        [Star(part // 2, [10, 2 * part, 7], True), Star(2 * part + 2, [3 * part, 1, part // 2 + 1], True)],
    )
    scored = np.flatnonzero(filled(stars))[:: max(1, total // slots)][: slots - 3]
    return {
        "bidirectional": spans_of(total, [Star(0, lengths, False)]),
        "causal": spans_of(total, [Star(0, lengths, True)]),
        "star": stars,
        "long": spans_of(long, [Star(0, [10 * piece], False), Star(piece, [3 * piece, piece // 2 - 5], True)]),
        "score rows": np.concatenate([stars[scored], np.zeros((slots - len(scored), 4), np.int32)]),
    }
