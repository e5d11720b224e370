"""The nouns of jaxrank, and the one legend of its dimension letters.

    T  tokens in a packed row            N  attention (query) heads     F  feed-forward width
    S  pairs that a row has slots for    K  key/value heads             V  vocabulary
    D  model width                       H  size of one head            I  attention tiles
    R  query rows of an attention call (T, or S in the last layer)      C  tile classes
    B  query rows of one tile            W  keys of one tile            G  query heads a key/value head (N / K)

The same letters are used in annotations, einsum strings and comments.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jaxtyping import Int32

ArrayLike = jax.Array | np.ndarray


NO_PREFIX = np.zeros(0, np.int32)


@dataclass(frozen=True)
class Encoded:
    """One tokenised (query, document) pair, not padded.

    tokens: int32 [length], the pair's own tokens. score_at: which of them the score is read from. dropped: how many
    tokens of query and document truncation removed. prefix: int32 [length], tokens that stand before the own ones and
    are the same in other pairs, with which they may share one computation; for causal models alone.
    """

    tokens: Int32[np.ndarray, " length"]
    score_at: int = 0
    dropped: int = 0
    prefix: Int32[np.ndarray, " prefix"] = field(default_factory=lambda: NO_PREFIX)

    def __len__(self) -> int:
        """All its tokens, the shared ones included."""
        return len(self.prefix) + len(self.tokens)


@dataclass(frozen=True)
class Ranked:
    """One line of a ranking: the document's place in the input, its score, and the document."""

    index: int
    score: float
    document: str


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Layout:
    """Who may look at whom in a packed row, and the same as a list of tiles to compute.

    spans[r] = (a0, a1, b0, b1): query row r sees the keys [a0, a1) and [b0, b1) of the row. An empty pair of spans
    marks filler, whose attention output is 0. tiles and starts are made for one kind of attention body:

    XLA (jaxrank.kernels.tiles): tiles[i] = (q0, r0, r1, a0, an, b0, bn): rows [q0, q0 + B) are computed, [r0, r1) of
    them are written, against the keys [a0, a0 + an) and [b0, b0 + bn). Tiles are sorted by class, class c holding
    [starts[c], starts[c + 1]). A class fixes the static tile size (B, W).
    Pallas (jaxrank.kernels.grid): tiles[i] is a (query tile, key tile) of a fixed grid, and [starts[t], starts[t + 1])
    are those of query tile t.
    """

    spans: Int32[ArrayLike, "R 4"]
    tiles: Int32[ArrayLike, "I 7"] | Int32[ArrayLike, " I"]
    starts: Int32[ArrayLike, " starts"]

    @property
    def used(self) -> Int32[ArrayLike, ""]:
        """How many keys any row sees: the row's tokens, without the filler behind them."""
        return self.spans.max()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Packed:
    """One row of T tokens holding whole pairs side by side, with static shapes; filler at the end.

    tokens, positions: int32 [T], positions counted from 0 within a pair, from the start of its prefix if it has one.
    score_at: int32 [S], the row index of each pair's scored token (0 in unused slots). layout rules attention among
    the T tokens, score_layout that of the S scored tokens over the same keys.
    """

    tokens: Int32[ArrayLike, " T"]
    positions: Int32[ArrayLike, " T"]
    score_at: Int32[ArrayLike, " S"]
    layout: Layout
    score_layout: Layout


Config = dict[str, Any]
"""A parsed config.json."""
