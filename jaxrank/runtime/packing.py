"""From encoded pairs to packed rows: whole pairs side by side in one row of T tokens, T from a short ladder.

There is no padding between the pairs of a row. Only the tokens between the last pair and the end of the bucket are
filler. A causal model computes the shared prefix of a request's pairs once in each row.
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
"""The row lengths in tokens: 128, 192, 256, 384, ... They double, with one step in between, which halves the filler."""


@dataclass(frozen=True)
class Features:
    """The vision tower's features of images and videos: one array [tokens, U, D] for each, on the host.

    Attributes:
        shape: (U, D).
        dtype: the dtype of the features.
    """

    shape: tuple[int, int]
    dtype: DTypeLike
    of: Mapping[Patches, Float[np.ndarray, "tokens U D"]] = field(default_factory=dict)

    def none(self, tokens: int) -> MediaTokens:
        """Return the features of a row that has no media yet."""
        return MediaTokens(np.zeros(tokens, bool), np.zeros((tokens, *self.shape), self.dtype))


def slots(tokens: int) -> int:
    """Return S, the number of pairs that a row of T tokens has slots for. A row of pairs of 16 tokens is still full."""
    return max(8, tokens // 16)


def buckets(row_tokens: int, max_length: int, *, long_steps: bool = True) -> list[int]:
    """Return the row lengths T to compile: the ladder up to the usual row, and on to the longest single pair.

    Without long_steps there is one bucket above the usual row. That is enough where filler costs no time.
    """
    ladder = [int(t) for t in LADDER]
    usual, top = (next(t for t in ladder if t >= tokens) for tokens in (row_tokens, max(row_tokens, max_length)))
    return [t for t in ladder if t <= usual or t == top or (long_steps and t < top)]


def media_buckets(usual: Sequence[int]) -> list[int]:
    """Return the row lengths for rows with images and video: all but the smallest ones.

    Few such rows would be so short. In this way a model has fewer than 40 programs, its vision tower's included, at any
    row_tokens and max_length.
    """
    return [tokens for tokens in usual if tokens >= 256] or [*usual][-1:]


def plan(pairs: Sequence[Encoded], row_tokens: int) -> list[list[int]]:
    """Choose which pairs share a row: first fit, longest first.

    Pairs with one prefix stay together. All of them go into the first row that has room for them all. If there is none,
    they go one by one, first into rows that have their prefix already. A row counts a prefix once. A pair longer than
    row_tokens has a row of its own.

    First fit decreasing wastes at most 2/9 of the rows (Johnson 1973). In practice it wastes a few tokens.

    Args:
        pairs: the pairs.
        row_tokens: the most tokens of a row. It takes at most slots(row_tokens) pairs.

    Returns:
        Lists of indices into `pairs`, the largest row first.
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
    """Return the number of tokens that the pairs take in a row, with every prefix counted once."""
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
    """Pack `pairs` in order into one row of `tokens` tokens. Pair i is scored in slot i.

    A prefix stands once, before the first pair that has it. Each of its pairs sees the prefix and itself.

    Args:
        pairs: the pairs.
        tokens: the length of the row.
        causal: whether a token sees only itself and what stands before it in its pair. Otherwise it sees the whole
            pair, which then can have no prefix.
        implementation: the attention body that the layouts are for. None is as in kernels.pick.
        features: the features of the pairs' images and videos. If they are given, the row has a place for them, even if
            it holds no media.

    Raises:
        ValueError: the pairs do not fit the row, media have no features, or a pair that is not causal has a prefix.
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
        """Put tokens at the end of the row, after the tokens of their prefix, and return where they begin."""
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
    """Return the smallest bucket that holds `count` pairs of `lengths` tokens in all.

    Raises:
        ValueError: no bucket holds them.
    """
    for tokens in ladder:
        if lengths <= tokens and count <= slots(tokens):
            return tokens
    raise ValueError(f"{count} pairs of {lengths} tokens fit no bucket of {list(ladder)}")
