"""Attention over packed rows for NVIDIA GPUs, in Pallas through Triton: one program for each (query tile, head).

A program loops over its query tile's part of the tile list with a running maximum and sum (Dao et al. 2022). The length
of the loop comes from the list, so the cost follows the sum of squared lengths. docs/performance.md says what the
compiler makes of it for an H100, and why the sizes are these.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from jaxrank.kernels.grid import key_tile
from jaxrank.types import Layout

TILE, KEY_TILE = 128, 64
"""The most rows of a query tile and of a key tile. float32 keys are read half a tile at a time."""
WARPS = 8
MASKED = -1e30


def tile_size(rows: int, most: int = TILE) -> int:
    """Return the rows of a query tile: TILE, or the next power of 2 for a shorter array, because Triton allows no
    others."""
    return min(most, max(16, 1 << (rows - 1).bit_length()))


def key_tile_size(keys: int) -> int:
    """Return the keys of a key tile in the same way."""
    return tile_size(keys, KEY_TILE)


def attention(
    q: Float[Array, "R N H"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    layout: Layout,
    *,
    scale: float,
    interpret: bool = False,
    tiles: tuple[int, int] | None = None,
) -> Float[Array, "R N H"]:
    """Compute attention. Head sizes that are no power of 2 are padded, and so are rows and keys that are no whole
    tiles.

    Args:
        q: the queries.
        k: the keys.
        v: the values.
        layout: the layout.
        scale: the factor of the scores.
        interpret: whether the kernel runs in Pallas's interpreter.
        tiles: rows of a query tile and of a key tile, powers of 2, if the layout was not made with the sizes above.
    """
    rows, heads, size = q.shape
    keys, kv_heads, _ = k.shape
    height, width = tiles or (tile_size(rows), key_tile_size(keys))
    wide = max(16, 1 << (size - 1).bit_length())
    q = jnp.pad(q, ((0, -rows % height), (0, 0), (0, wide - size)))
    k, v = (jnp.pad(x, ((0, -keys % width), (0, 0), (0, wide - size))) for x in (k, v))
    spans = jnp.pad(jnp.asarray(layout.spans), ((0, -rows % height), (0, 0)))
    one_head = pl.BlockSpec((height, None, wide), lambda tile, head: (tile, head, 0))
    all_keys = pl.BlockSpec((k.shape[0], None, wide), lambda tile, head: (0, lax.rem(head, kv_heads), 0))
    whole = pl.BlockSpec(None, None)
    out = pl.pallas_call(
        functools.partial(_kernel, width=width, scale=scale, interpret=interpret),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid=(q.shape[0] // height, heads),
        in_specs=[whole, whole, pl.BlockSpec((height, 4), lambda tile, head: (tile, 0)), one_head, all_keys, all_keys],
        out_specs=one_head,
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=1 if q.dtype == jnp.float32 else 3),
        interpret=interpret,
        name="packed_attention",
    )(jnp.asarray(layout.tiles), jnp.asarray(layout.starts), spans, q, k, v)
    return out[:rows, :, :size]


def _kernel(items, starts, spans, q, k, v, out, *, width: int, scale: float, interpret: bool):
    """Compute one query tile of one head."""
    tile = pl.program_id(0)
    height, wide = q.shape
    query = q[...]
    a0, a1, b0, b1 = (spans[:, i][:, None] for i in range(4))
    exp2 = jnp.exp2 if interpret else _exp2
    piece, precision = width, None
    if q.dtype == jnp.float32:
        # Three TF32 products keep float32 to about 1e-6. One product would keep 10 bits, and FMAs would spill.
        piece = max(16, min(width, KEY_TILE) // 2)
        precision = lax.Precision.HIGHEST if interpret else lax.DotAlgorithmPreset.TF32_TF32_F32_X3

    def within(keys: Array, start: Array, end: Array) -> Array:
        """Return start <= keys < end, in one comparison: a key before the start is a large number without a sign."""
        return (keys - start).astype(jnp.uint32) < (end - start).astype(jnp.uint32)

    def some_keys(first: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        highest, total, sums = carry
        keys = first + jnp.arange(piece)[None, :]
        scores = plgpu.dot(query, k[pl.ds(first, piece), :].T, precision=precision) * (scale * math.log2(math.e))
        scores = jnp.where(within(keys, a0, a1) | within(keys, b0, b1), scores, MASKED)
        higher = jnp.maximum(highest, scores.max(1))
        weights = exp2(scores - higher[:, None])
        shrink = exp2(highest - higher)
        drawn = plgpu.dot(weights.astype(v.dtype), v[pl.ds(first, piece), :], precision=precision)
        return higher, total * shrink + weights.sum(1), sums * shrink[:, None] + drawn

    step = min(width, KEY_TILE)
    steps = width // step

    def one_step(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        first = key_tile(items[lax.div(i, steps)]) * width + lax.rem(i, steps) * step
        for at in range(0, step, piece):
            carry = some_keys(first + at, carry)
        return carry

    none = jnp.zeros(height, jnp.float32)
    # The maximum starts below all scores but above MASKED. So MASKED weighs 0 even in a row that has seen no key yet.
    carry = (none + MASKED / 2, none, jnp.zeros((height, wide), jnp.float32))
    _, total, sums = lax.fori_loop(starts[tile] * steps, starts[tile + 1] * steps, one_step, carry)
    out[...] = (sums / jnp.where(total > 0, total, 1.0)[:, None]).astype(out.dtype)


def _exp2(x: Array) -> Array:
    """Return 2**x in one instruction. jnp.exp2 uses three more for results below 2**-126, which are 0 here."""
    [power] = plgpu.elementwise_inline_asm(
        "ex2.approx.ftz.f32 $0, $1;",
        args=[x],
        constraints="=f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, x.dtype)],
    )
    return power
