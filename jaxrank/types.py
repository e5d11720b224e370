"""The shared types of jaxrank, and the only list of its dimension letters.

    T  tokens in a packed row            N  attention (query) heads     F  feed-forward width
    S  pairs that a row has slots for    K  key/value heads             V  vocabulary
    D  model width                       H  size of one head            I  attention tiles
    R  query rows of an attention call (T, or S in the last layer)      C  tile classes
    B  query rows of one tile            W  keys of one tile            G  query heads a key/value head (N / K)
    P  patches in a packed row           E  values of a patch           U  feature vectors of a media token

Annotations, einsum strings and comments use the same letters.
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
    """One image, or the sampled frames of one video, cut into patches for the vision tower.

    An object is equal only to itself.

    Attributes:
        pixels: normalised values, in the order of transformers' image processor. The blocks of merge x merge patches
            that become one token stand together.
        grid: the number of patches in time, height and width.
        seconds: for a video, the time of each step of the grid. It is empty for an image.
    """

    pixels: Float32[np.ndarray, "P E"]
    grid: tuple[int, int, int]
    seconds: tuple[float, ...] = ()


@dataclass(frozen=True)
class Media:
    """The images and videos in a run of tokens.

    Attributes:
        patches: the images and videos.
        at: the indices of the tokens that stand for them, in the order of their patches.
        positions: the position of every token of the run by time, height and width, counted from the start of the
            prompt.
    """

    patches: tuple[Patches, ...]
    at: Int32[np.ndarray, " M"]
    positions: Int32[np.ndarray, "3 length"]


class Window(NamedTuple):
    """The part of its document that a pair holds: the characters [start, stop) of the text, as code points.

    Attributes:
        start: the first character.
        stop: the character after the last one.
        number: the number of this window in its document, from 0. The windows of a document follow each other.
    """

    start: int
    stop: int
    number: int = 0


@dataclass(frozen=True)
class Encoded:
    """One tokenised (query, document) pair, without padding.

    Attributes:
        tokens: the pair's own tokens.
        score_at: the index of the token that the score is read from.
        dropped: the number of tokens of query and document that truncation removed.
        prefix: the tokens before the own ones that other pairs have too. Such pairs may share one computation of them.
            Only causal models have a prefix.
        media: the images and videos among the own tokens. It is None in pairs of text alone.
        prefix_media: the images and videos among the tokens of the prefix. It is None in pairs of text alone.
        window: the part of its document that this pair has, where long documents are split. It is None for the only
            pair of a document.
    """

    tokens: Int32[np.ndarray, " length"]
    score_at: int = 0
    dropped: int = 0
    prefix: Int32[np.ndarray, " prefix"] = field(default_factory=lambda: NO_PREFIX)
    media: Media | None = None
    prefix_media: Media | None = None
    window: Window | None = None

    def __len__(self) -> int:
        """Return the number of all its tokens, the shared ones included."""
        return len(self.prefix) + len(self.tokens)

    @property
    def prefix_key(self) -> bytes:
        """Bytes that are equal for pairs with the same prefix and the very same images and videos in it.

        The key is empty for a pair without a prefix.
        """
        seen = () if self.prefix_media is None else map(id, self.prefix_media.patches)
        return self.prefix.tobytes() + b"".join(one.to_bytes(8, "little") for one in seen)


@dataclass(frozen=True)
class Work:
    """What scoring has computed so far.

    Attributes:
        rows: the number of packed rows.
        row_tokens: the number of tokens in them, filler included.
        computed_tokens: the same without filler.
        pair_tokens: the number of tokens of the pairs in them. A shared prefix counts once for each pair.
    """

    rows: int = 0
    row_tokens: int = 0
    computed_tokens: int = 0
    pair_tokens: int = 0

    def plus(self, row_tokens: int, computed_tokens: int, pair_tokens: int) -> Work:
        """Return these counts with one row more."""
        return Work(
            self.rows + 1,
            self.row_tokens + row_tokens,
            self.computed_tokens + computed_tokens,
            self.pair_tokens + pair_tokens,
        )


@dataclass(frozen=True)
class Ranked:
    """One line of a ranking.

    Attributes:
        index: the document's place in the input.
        score: the document's score.
        document: the document as it was given.
        window: where long documents are split, the characters [start, stop) of the text that the score is of. They
            cover the whole text if it fits. It is None where documents are not split.
    """

    index: int
    score: float
    document: Any
    window: tuple[int, int] | None = None


class AttentionShape(NamedTuple):
    """The shape of a model's attention.

    Attributes:
        heads: the number of query heads, N.
        kv_heads: the number of key/value heads, K.
        size: the size of a head, H.
        norm_rotary: whether queries and keys go through kernels.norm_rotary.
    """

    heads: int
    kv_heads: int
    size: int
    norm_rotary: bool = False


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Columns:
    """Heads that lie side by side in a wider array [T, C].

    They are its columns from first * size to (first + heads) * size.
    """

    array: Any
    first: int = field(metadata={"static": True})
    heads: int = field(metadata={"static": True})
    size: int = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape [T, heads, H] that the array of these heads alone would have."""
        return len(self.array), self.heads, self.size

    @property
    def dtype(self) -> Any:
        return self.array.dtype

    def alone(self) -> jax.Array:
        """Return the array [T, heads, H] of these heads."""
        columns = self.array[:, self.first * self.size : (self.first + self.heads) * self.size]
        return columns.reshape(self.shape)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Layout:
    """Which keys each query row of a packed row may see, and the same as a list of tiles to compute.

    spans[r] = (a0, a1, b0, b1) means that query row r sees the keys [a0, a1) and [b0, b1) of the row. An empty pair of
    spans marks filler, whose attention output is 0. `tiles` and `starts` are made for one kind of attention body:

    - XLA (jaxrank.kernels.tiles): tiles[i] = (q0, r0, r1, a0, an, b0, bn). The rows [q0, q0 + B) are computed against
      the keys [a0, a0 + an) and [b0, b0 + bn). Of these rows, [r0, r1) are written. Tiles are sorted by class: class c
      holds [starts[c], starts[c + 1]). A class fixes the static tile size (B, W).
    - Pallas (jaxrank.kernels.grid): tiles[i] is a (query tile, key tile) of a fixed grid. [starts[t], starts[t + 1])
      are the tiles of query tile t.
    """

    spans: Int32[ArrayLike, "R 4"]
    tiles: Int32[ArrayLike, "I 7"] | Int32[ArrayLike, " I"]
    starts: Int32[ArrayLike, " starts"]

    @property
    def used(self) -> Int32[ArrayLike, ""]:
        """The number of keys that any row sees: the tokens of the row without the filler at its end."""
        return self.spans.max()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MediaTokens:
    """Which tokens of a row stand for images or video, and what the vision tower computed for them.

    Attributes:
        here: whether a token stands for an image or video.
        features: features[t, 0] is the embedding of token t. features[t, 1:] is added to it after the first text
            layers. All are zero where `here` is false.
    """

    here: Bool[ArrayLike, " T"]
    features: Float[ArrayLike, "T U D"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Packed:
    """One row of T tokens that holds whole pairs side by side, with static shapes and filler at the end.

    Attributes:
        tokens: the token ids.
        positions: positions counted from 0 within a pair, from the start of its prefix if it has one. In rows with
            media they are by time, height and width.
        score_at: the row index of each pair's scored token. It is 0 in unused slots.
        layout: the attention among the T tokens.
        score_layout: the attention of the S scored tokens over the same keys.
        media: the row's images and videos. It is None in rows of text alone.
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
    """Patches of several images and video steps side by side, with static shapes and filler at the end.

    Attributes:
        pixels: the values of the patches.
        corners: the four entries of the learned position table around a patch.
        weights: the shares of these four entries.
        positions: the row and column of the patch in its image, for rotary embedding.
        layout: a patch sees the patches of its own image or video step.
    """

    pixels: Float32[ArrayLike, "P E"]
    corners: Int32[ArrayLike, "P 4"]
    weights: Float32[ArrayLike, "P 4"]
    positions: Int32[ArrayLike, "P 2"]
    layout: Layout


Config = dict[str, Any]
"""A parsed config.json."""
