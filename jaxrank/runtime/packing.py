"""From encoded pairs to packed rows: whole pairs side by side in one row of T tokens, T from a short ladder.

A row has no padding between pairs; only the step from its tokens to the next bucket is filler. What the pairs of a
request share as a prefix, a causal model computes once a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float

from jaxrank.kernels import make_layout
from jaxrank.types import Encoded, Media, MediaTokens, Packed, Patches

LADDER = tuple(step * 2**power for power in range(7, 16) for step in (1, 1.5))
"""128, 192, 256, 384, ... tokens: doubling, with a step between that halves the filler of a row's end."""


@dataclass(frozen=True)
class Features:
    """What the vision tower made of images and videos: [tokens, U, D] of each, on the host.

    shape: (U, D). dtype: of the features.
    """

    shape: tuple[int, int]
    dtype: DTypeLike
    of: Mapping[Patches, Float[np.ndarray, "tokens U D"]] = field(default_factory=dict)

    def none(self, tokens: int) -> MediaTokens:
        """Those of a row that has no media yet."""
        return MediaTokens(np.zeros(tokens, bool), np.zeros((tokens, *self.shape), self.dtype))


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


def media_buckets(usual: Sequence[int]) -> list[int]:
    """Those of the row lengths that rows with images and video come in: without the smallest, which few of them would
    be, so that all programs of a model, its vision tower's included, are less than 40 at any row_tokens and max_length.
    """
    return [tokens for tokens in usual if tokens >= 256] or [*usual][-1:]


def plan(pairs: Sequence[Encoded], row_tokens: int) -> list[list[int]]:
    """Which pairs share a row: first fit, longest first; `row_tokens` tokens and slots(row_tokens) pairs at most.

    Pairs with one prefix go together: all of them into the first row that holds them, or else one by one, first into
    rows that have their prefix already; a row counts a prefix once. A pair longer than row_tokens has a row of its
    own. Returns lists of indices into `pairs`, the largest first. First fit decreasing wastes at most 2/9 of the rows
    (Johnson 1973), in practice a few tokens.
    """
    most = slots(row_tokens)
    rows: list[list[int]] = []
    room = np.zeros(len(pairs), np.int64)

    def put(row: int | None, indices: list[int], tokens: int) -> int:
        if row is None:
            row = len(rows)
            rows.append([])
            room[row] = row_tokens
        rows[row] += indices
        room[row] = max(room[row] - tokens, 0) if len(rows[row]) < most else 0
        return row

    def first_fit(tokens: int, count: int) -> int | None:
        for row in np.flatnonzero(room[: len(rows)] >= tokens).tolist():
            if len(rows[row]) + count <= most:
                return row
        return None

    groups: dict[bytes | int, list[int]] = {}
    for i, pair in enumerate(pairs):
        groups.setdefault(pair.prefix_key or i, []).append(i)
    sizes = {key: row_size([pairs[i] for i in group]) for key, group in groups.items()}
    for key in sorted(groups, key=lambda key: -sizes[key]):
        group = sorted(groups[key], key=lambda i: -len(pairs[i].tokens))
        if len(group) == 1 or (sizes[key] <= row_tokens and len(group) <= most):
            put(first_fit(sizes[key], len(group)), group, sizes[key])
            continue
        mine: list[int] = []
        for i in group:
            own = len(pairs[i].tokens)
            row = next((row for row in mine if room[row] >= own), None)
            if row is not None:
                put(row, [i], own)
            else:
                mine.append(put(first_fit(len(pairs[i]), 1), [i], len(pairs[i])))
    return rows


def row_size(pairs: Sequence[Encoded]) -> int:
    """How many tokens of a row the pairs take, every prefix counted once."""
    prefixes = {pair.prefix_key: len(pair.prefix) for pair in pairs}
    return sum(len(pair.tokens) for pair in pairs) + sum(prefixes.values())


def pack(
    pairs: Sequence[Encoded],
    tokens: int,
    *,
    causal: bool = False,
    implementation: str | None = None,
    features: Features | None = None,
) -> Packed:
    """One row of `tokens` tokens holding `pairs` in order, pair i scored in slot i; ValueError if they do not fit.

    A prefix stands once, before the first pair that has it: a star, whose pairs see it and themselves. causal: tokens
    see what stands before them in their pair, and themselves; otherwise the whole pair, which can have no prefix.
    implementation: of the attention that the layouts are for; None as in kernels.pick. features: of the pairs'
    images and videos; a row has place for them where it is given, be there any or not.
    """
    used, most = row_size(pairs), slots(tokens)
    if used > tokens or len(pairs) > most:
        raise ValueError(f"{len(pairs)} pairs of {used} tokens do not fit a row of {tokens} tokens and {most} pairs")
    row = np.zeros(tokens, np.int32)
    positions = np.zeros((3, tokens), np.int32)
    spans = np.zeros((tokens, 4), np.int32)
    score_at = np.zeros(most, np.int32)
    score_spans = np.zeros((most, 4), np.int32)
    media = None if features is None else features.none(tokens)
    end = 0

    def lay(ids: np.ndarray, prefix: tuple[int, int], mine: Media | None) -> int:
        """Put tokens at the end of what there is, after the tokens of their prefix; where they begin."""
        nonlocal end
        start, end = end, end + len(ids)
        row[start:end] = ids
        positions[:, start:end] = np.arange(len(ids)) + prefix[1] - prefix[0] if mine is None else mine.positions
        spans[start:end, :2] = prefix
        spans[start:end, 2] = start
        spans[start:end, 3] = np.arange(start, end) + 1 if causal else end
        if mine is not None and mine.patches:
            if features is None or media is None:
                raise ValueError("pairs with images or videos need their features")
            media.here[start + mine.at] = True
            media.features[start + mine.at] = np.concatenate([features.of[one] for one in mine.patches])
        return start

    prefixes = {b"": (0, 0)}
    for slot, pair in enumerate(pairs):
        key = pair.prefix_key
        if key not in prefixes:
            if not causal:
                raise ValueError("pairs of a model that looks both ways cannot share a prefix")
            prefixes[key] = (lay(pair.prefix, (0, 0), pair.prefix_media), end)
        score_at[slot] = lay(pair.tokens, prefixes[key], pair.media) + pair.score_at
        score_spans[slot] = spans[score_at[slot]]
    layout, score_layout = (make_layout(rows, tokens, implementation) for rows in (spans, score_spans))
    return Packed(row, positions if media else positions[0], score_at, layout, score_layout, media)


def bucket_of(lengths: int, count: int, ladder: Sequence[int]) -> int:
    """The smallest bucket that holds `count` pairs of `lengths` tokens in all."""
    for tokens in ladder:
        if lengths <= tokens and count <= slots(tokens):
            return tokens
    raise ValueError(f"{count} pairs of {lengths} tokens fit no bucket of {list(ladder)}")
