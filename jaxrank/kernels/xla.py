"""Attention in plain XLA: `dense` is the reference, and `tiled` runs everywhere at a cost that follows the tiles."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from jaxrank.kernels.tiles import classes
from jaxrank.types import Layout

MASKED = -1e30
"""The score of a masked key. It is finite, so a row without any key gives weights that can be zeroed, and no NaN."""


def _allowed(spans: Int32[Array, "B 4"], keys: Int32[Array, " W"]) -> Bool[Array, "B W"]:
    a0, a1, b0, b1 = (spans[:, i, None] for i in range(4))
    return ((keys >= a0) & (keys < a1)) | ((keys >= b0) & (keys < b1))


def _softmax_rows(scores: Float[Array, "K GB W"], allowed: Bool[Array, "GB W"]) -> tuple[Array, Array]:
    """Return unnormalised weights [K, GB, W] and their sums [K, GB, 1], float32. Rows without keys give 0 and 1."""
    scores = jnp.where(allowed, scores, MASKED)
    weights = jnp.where(allowed, jnp.exp(scores - scores.max(-1, keepdims=True)), 0.0)
    total = weights.sum(-1, keepdims=True)
    return weights, jnp.where(total > 0, total, 1.0)


def dense(
    q: Float[Array, "R N H"], k: Float[Array, "T K H"], v: Float[Array, "T K H"], layout: Layout, *, scale: float
) -> Float[Array, "R N H"]:
    """Compute every row against every key with a mask, with R x T memory.

    It is the reference, and right for any spans.
    """
    rows, heads, size = q.shape
    groups = heads // k.shape[1]
    allowed = _allowed(jnp.asarray(layout.spans), jnp.arange(k.shape[0]))
    grouped = q.reshape(rows, groups, k.shape[1], size)
    scores = jnp.einsum("RGKH,TKH->KGRT", grouped, k, preferred_element_type=jnp.float32) * scale
    weights, total = _softmax_rows(scores.reshape(k.shape[1], groups * rows, -1), jnp.tile(allowed, (groups, 1)))
    weights = (weights / total).reshape(scores.shape)
    out = jnp.einsum("KGRT,TKH->RGKH", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return out.reshape(q.shape).astype(q.dtype)


def tiled(
    q: Float[Array, "R N H"], k: Float[Array, "T K H"], v: Float[Array, "T K H"], layout: Layout, *, scale: float
) -> Float[Array, "R N H"]:
    """Compute attention in one loop for each tile class, over the layout's tile list.

    The rows of a tile are read with heads first, so that a tile is one batched product. The gather copies them in any
    case, and to transpose whole arrays before would take longer. A tile with more keys than its class's width is
    computed in pieces, with the running maximum and sum of Milakov and Gimelshein 2018.

    The output takes the place of q in the loops' carry, in float32. For a bfloat16 update of the carried buffer, XLA's
    CPU backend would make a float32 copy of all of it.
    """
    rows, heads, size = q.shape
    keys, kv_heads, _ = k.shape
    groups = heads // kv_heads
    spans, tiles, starts = jnp.asarray(layout.spans), jnp.asarray(layout.tiles), jnp.asarray(layout.starts)

    def one_class(height: int, window: int, any_keys: bool):
        def body(i: Array, out: Array) -> Array:
            q0, r0, r1, a0, an, b0, bn = tiles[i]
            old = jax.lax.dynamic_slice_in_dim(out, q0, height, 0)
            query = old.astype(q.dtype).reshape(height, groups, kv_heads, size)
            query = query.transpose(2, 1, 0, 3).reshape(kv_heads, groups * height, size)
            mine = jax.lax.dynamic_slice_in_dim(spans, q0, height, 0)

            def piece(p: Array | int, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
                highest, total, sums = carry
                slots = p * window + jnp.arange(window)
                at = jnp.clip(jnp.where(slots < an, a0 + slots, b0 + slots - an), 0, keys - 1)
                key, value = (jnp.take(x, at, axis=0, mode="clip").transpose(1, 0, 2) for x in (k, v))
                allowed = jnp.tile(_allowed(mine, at) & (slots < an + bn), (groups, 1))
                scores = jnp.einsum("KBH,KWH->KBW", query, key, preferred_element_type=jnp.float32) * scale
                scores = jnp.where(allowed, scores, MASKED)
                higher = jnp.maximum(highest, scores.max(-1, keepdims=True))
                weights = jnp.where(allowed, jnp.exp(scores - higher), 0.0)
                shrink = jnp.exp(highest - higher)
                weighted = jnp.einsum(
                    "KBW,KWH->KBH", weights.astype(v.dtype), value, preferred_element_type=jnp.float32
                )
                return higher, total * shrink + weights.sum(-1, keepdims=True), sums * shrink + weighted

            none = jnp.zeros((*query.shape[:2], 1), jnp.float32)
            carry = (none + MASKED, none, jnp.zeros(query.shape, jnp.float32))
            pieces = (an + bn + window - 1) // window
            _, total, sums = jax.lax.fori_loop(0, pieces, piece, carry) if any_keys else piece(0, carry)
            new = (sums / jnp.where(total > 0, total, 1.0)).reshape(kv_heads, groups, height, size)
            new = new.transpose(2, 1, 0, 3).reshape(height, heads, size)
            row = q0 + jnp.arange(height)
            kept = ((row >= r0) & (row < r1))[:, None, None]
            return jax.lax.dynamic_update_slice_in_dim(out, jnp.where(kept, new, old), q0, 0)

        return body

    out = q.astype(jnp.float32)
    kinds = classes(keys, rows)
    for c, (height, window) in enumerate(kinds):
        any_keys = c == len(kinds) - 1 and keys > window
        out = jax.lax.fori_loop(starts[c], starts[c + 1], one_class(height, window, any_keys), out)
    filled = (spans[:, 1] > spans[:, 0]) | (spans[:, 3] > spans[:, 2])
    return jnp.where(filled[:, None, None], out, 0.0).astype(q.dtype)
