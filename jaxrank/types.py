"""The nouns of jaxrank, and the one legend of its dimension letters.

    T  tokens in a packed row            N  attention (query) heads     F  feed-forward width
    S  pairs that a row has slots for    K  key/value heads             V  vocabulary
    D  model width                       H  size of one head            I  attention tiles
    R  query rows of an attention call (T, or S in the last layer)      C  tile classes
    B  query rows of one tile            W  keys of one tile            G  query heads a key/value head (N / K)
    P  patches in a packed row           E  values of a patch           U  feature vectors of a media token

The same letters are used in annotations, einsum strings and comments.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Float32, Int32

ArrayLike = jax.Array | np.ndarray


NO_PREFIX = np.zeros(0, np.int32)


@dataclass(frozen=True, eq=False)
class Patches:
    """One image, or the sampled frames of one video, cut into patches for the vision tower. Equal only to itself.

    pixels: float32 [P, E], normalised, in the order of transformers' image processor: blocks of merge x merge patches
    that become one token stand together. grid: patches in time, height and width. seconds: for a video the time of
    each step of the grid, empty for an image.
    """

    pixels: Float32[np.ndarray, "P E"]
    grid: tuple[int, int, int]
    seconds: tuple[float, ...] = ()


@dataclass(frozen=True)
class Media:
    """Images and videos in a run of tokens.

    at: int32 [M], which of the tokens stand for them, in the order of their patches. positions: int32 [3, length], of
    all tokens of the run by time, height and width, counted from the start of the prompt.
    """

    patches: tuple[Patches, ...]
    at: Int32[np.ndarray, " M"]
    positions: Int32[np.ndarray, "3 length"]


class Window(NamedTuple):
    """What of its document a pair holds: the characters [start, stop) of the text, as code points.

    number: which of the document's windows it is, from 0; those of one document follow each other.
    """

    start: int
    stop: int
    number: int = 0


@dataclass(frozen=True)
class Encoded:
    """One tokenised (query, document) pair, not padded.

    tokens: int32 [length], the pair's own tokens. score_at: which of them the score is read from. dropped: how many
    tokens of query and document truncation removed. prefix: int32 [length], tokens that stand before the own ones and
    are the same in other pairs, with which they may share one computation; for causal models alone. media,
    prefix_media: the images and videos among the own tokens and among the prefix's; both None in pairs of text alone.
    window: where long documents are split, what this pair has of its document; None for the only pair of a document.
    """

    tokens: Int32[np.ndarray, " length"]
    score_at: int = 0
    dropped: int = 0
    prefix: Int32[np.ndarray, " prefix"] = field(default_factory=lambda: NO_PREFIX)
    media: Media | None = None
    prefix_media: Media | None = None
    window: Window | None = None

    def __len__(self) -> int:
        """All its tokens, the shared ones included."""
        return len(self.prefix) + len(self.tokens)

    @property
    def prefix_key(self) -> bytes:
        """Equal for pairs of the same prefix, its very images and videos included; empty without one."""
        seen = () if self.prefix_media is None else map(id, self.prefix_media.patches)
        return self.prefix.tobytes() + b"".join(one.to_bytes(8, "little") for one in seen)


@dataclass(frozen=True)
class Work:
    """What scoring has computed so far.

    rows: packed rows. row_tokens: their tokens, filler included. computed_tokens: the same without filler. pair_tokens:
    tokens of the pairs in them, a prefix that they share counted for every one.
    """

    rows: int = 0
    row_tokens: int = 0
    computed_tokens: int = 0
    pair_tokens: int = 0

    def plus(self, row_tokens: int, computed_tokens: int, pair_tokens: int) -> Work:
        """The same and one row more."""
        return Work(
            self.rows + 1,
            self.row_tokens + row_tokens,
            self.computed_tokens + computed_tokens,
            self.pair_tokens + pair_tokens,
        )


@dataclass(frozen=True)
class Ranked:
    """One line of a ranking: the document's place in the input, its score, and the document as it was given.

    window: where long documents were split, the characters [start, stop) of the text that the score is of, the whole
    text's if it fits; else None.
    """

    index: int
    score: float
    document: Any
    window: tuple[int, int] | None = None


class AttentionShape(NamedTuple):
    """A model's attention: query heads N, key/value heads K, head size H, and whether queries and keys go through
    kernels.norm_rotary."""

    heads: int
    kv_heads: int
    size: int
    norm_rotary: bool = False


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Columns:
    """Heads that lie side by side in a wider array [T, C]: its columns first * size to (first + heads) * size."""

    array: Any
    first: int = field(metadata={"static": True})
    heads: int = field(metadata={"static": True})
    size: int = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int, int]:
        """[T, heads, H], as the array of these heads alone."""
        return len(self.array), self.heads, self.size

    @property
    def dtype(self) -> Any:
        return self.array.dtype

    def alone(self) -> jax.Array:
        """The array [T, heads, H] of these heads."""
        columns = self.array[:, self.first * self.size : (self.first + self.heads) * self.size]
        return columns.reshape(self.shape)


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
class MediaTokens:
    """Which tokens of a row stand for images or video, and what the vision tower made of them.

    features[t, 0] is token t's embedding, features[t, 1:] what is added to it after the first text layers; all zero
    where `here` is false.
    """

    here: Bool[ArrayLike, " T"]
    features: Float[ArrayLike, "T U D"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Packed:
    """One row of T tokens holding whole pairs side by side, with static shapes; filler at the end.

    tokens, positions: int32 [T], positions counted from 0 within a pair, from the start of its prefix if it has one;
    in rows with media [3, T], by time, height and width. score_at: int32 [S], the row index of each pair's scored token
    (0 in unused slots). layout rules attention among the T tokens, score_layout that of the S scored tokens over the
    same keys. media: None in rows of text alone.
    """

    tokens: Int32[ArrayLike, " T"]
    positions: Int32[ArrayLike, " T"] | Int32[ArrayLike, "3 T"]
    score_at: Int32[ArrayLike, " S"]
    layout: Layout
    score_layout: Layout
    media: MediaTokens | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PatchRow:
    """Patches of several images and video steps side by side, with static shapes; filler at the end.

    corners, weights: the four entries of the learned position table between which a patch lies, and their shares.
    positions: row and column of the patch in its image, for rotary embedding. layout: a patch sees the patches of its
    own image or video step.
    """

    pixels: Float32[ArrayLike, "P E"]
    corners: Int32[ArrayLike, "P 4"]
    weights: Float32[ArrayLike, "P 4"]
    positions: Int32[ArrayLike, "P 2"]
    layout: Layout


Config = dict[str, Any]
"""A parsed config.json."""
