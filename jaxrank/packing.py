"""From encoded pairs to packed rows: whole pairs side by side in one row of T tokens, T from a short ladder.

A row has no padding between pairs; only the step from its tokens to the next bucket is filler.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxrank.kernels import make_layout
from jaxrank.types import Encoded, Packed

LADDER = tuple(step * 2**power for power in range(7, 16) for step in (1, 1.5))
"""128, 192, 256, 384, ... tokens: doubling, with a step between that halves the filler of a row's end."""


def slots(tokens: int) -> int:
    """S, the pairs that a row of T tokens has slots for: pairs of 16 tokens on average still fill a row."""
    return max(8, tokens // 16)


def buckets(row_tokens: int, max_length: int, *, long_steps: bool = True) -> list[int]:
    """The row lengths T to compile: the ladder up to the usual row, and on to the longest single pair.

    Without long_steps there is one bucket above the usual row: enough where filler costs no time.
    """
    ladder = [int(t) for t in LADDER]
    usual, top = (next(t for t in ladder if t >= tokens) for tokens in (row_tokens, max(row_tokens, max_length)))
    return [t for t in ladder if t <= usual or t == top or (long_steps and t < top)]


def plan(lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """Which pairs share a row: first fit, longest first; `row_tokens` tokens and slots(row_tokens) pairs at most.

    A pair longer than row_tokens has a row of its own. Returns lists of indices into `lengths`, rows with the longest
    pairs first. First fit decreasing wastes at most 2/9 of the rows (Johnson 1973), in practice a few tokens.
    """
    most = slots(row_tokens)
    rows: list[list[int]] = []
    room = np.zeros(len(lengths), np.int64)
    for index in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        fits = np.flatnonzero(room[: len(rows)] >= lengths[index])
        if len(fits):
            row = int(fits[0])
            rows[row].append(index)
            room[row] -= lengths[index]
            if len(rows[row]) == most:
                room[row] = 0
        else:
            room[len(rows)] = max(row_tokens - lengths[index], 0)
            rows.append([index])
    return rows


def pack(pairs: Sequence[Encoded], tokens: int) -> Packed:
    """One row of `tokens` tokens holding `pairs` in order, pair i scored in slot i; ValueError if they do not fit."""
    used, most = sum(map(len, pairs)), slots(tokens)
    if used > tokens or len(pairs) > most:
        raise ValueError(f"{len(pairs)} pairs of {used} tokens do not fit a row of {tokens} tokens and {most} pairs")
    row = np.zeros(tokens, np.int32)
    positions = np.zeros(tokens, np.int32)
    spans = np.zeros((tokens, 4), np.int32)
    score_at = np.zeros(most, np.int32)
    score_spans = np.zeros((most, 4), np.int32)
    start = 0
    for slot, pair in enumerate(pairs):
        end = start + len(pair)
        row[start:end] = pair.tokens
        positions[start:end] = np.arange(len(pair))
        spans[start:end, 2:] = start, end
        score_at[slot] = start + pair.score_at
        score_spans[slot] = spans[score_at[slot]]
        start = end
    return Packed(row, positions, score_at, make_layout(spans, tokens), make_layout(score_spans, tokens))


def bucket_of(lengths: int, count: int, ladder: Sequence[int]) -> int:
    """The smallest bucket that holds `count` pairs of `lengths` tokens in all."""
    for tokens in ladder:
        if lengths <= tokens and count <= slots(tokens):
            return tokens
    raise ValueError(f"{count} pairs of {lengths} tokens fit no bucket of {list(ladder)}")
