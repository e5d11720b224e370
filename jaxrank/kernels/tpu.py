"""Attention over packed rows for TPU, in Pallas: one grid step for each listed (query tile, key tile), for all heads.

The softmax goes over a query tile's key tiles with a running maximum and sum (Milakov and Gimelshein 2018, Dao et al.
2022). The arrays q, k and v are read as the projections write them, [T, heads * H], so nothing is transposed. The
number of steps is a traced scalar: one program works for all mixes of lengths.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from jaxrank.kernels.grid import FIRST, LAST, key_tile, query_tile
from jaxrank.types import Columns, Layout

TILES = (256, 128)
LANES = 128
MASKED, FLOOR = -1e30, -1e29
VMEM_BYTES = 64 << 20


def tile_size(rows: int) -> int:
    """Return the rows of a tile: 256 if they divide the array, else 128. The array is then padded to whole tiles.

    Tiles may not be smaller. The compilers for v5e and v6e fail on tiles of 24 to 64 rows whose heads share lanes
    (libtpu 0.0.42).
    """
    return next((size for size in TILES if rows % size == 0), TILES[-1])


def attention(
    q: Float[Array, "R N H"] | Columns,
    k: Float[Array, "T K H"] | Columns,
    v: Float[Array, "T K H"] | Columns,
    layout: Layout,
    *,
    scale: float,
    interpret: bool = False,
) -> Float[Array, "R N H"]:
    """Compute attention.

    Heads narrower than 128 lanes share a block of lanes if every query head has its own keys and 128 / H is whole.
    Others are padded to 128. Columns are read in place if nothing is padded.
    """
    rows, heads, size = q.shape
    keys, kv_heads, _ = k.shape
    if size % LANES and not (heads == kv_heads and LANES % size == 0 and heads * size % LANES == 0):
        wide = -(-size // LANES) * LANES
        q, k, v = (jnp.pad(_alone(x), ((0, 0), (0, 0), (0, wide - size))) for x in (q, k, v))
        return attention(q, k, v, layout, scale=scale, interpret=interpret)[..., :size]
    height, width = tile_size(rows), tile_size(keys)
    spans = _pad_rows(jnp.asarray(layout.spans), height)
    (q, query_at), (k, key_at), (v, value_at) = (
        _in_columns(x, tile) for x, tile in ((q, height), (k, width), (v, width))
    )
    wide, narrow = heads * size, kv_heads * size
    query_block = pl.BlockSpec((height, wide), lambda i, items: (query_tile(items[i]), query_at))
    out_block = pl.BlockSpec((height, wide), lambda i, items: (query_tile(items[i]), 0))
    spans_block = pl.BlockSpec((height, 4), lambda i, items: (query_tile(items[i]), 0))
    key_block, value_block = (
        pl.BlockSpec((width, narrow), lambda i, items, at=at: (key_tile(items[i]), at)) for at in (key_at, value_at)
    )
    out = pl.pallas_call(
        functools.partial(_kernel, size=size, kv_heads=kv_heads, scale=scale),
        out_shape=jax.ShapeDtypeStruct((len(spans), wide), q.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(jnp.asarray(layout.starts)[-1],),
            in_specs=[spans_block, query_block, key_block, value_block],
            out_specs=out_block,
            scratch_shapes=[
                pltpu.VMEM((heads, height, LANES), jnp.float32),
                pltpu.VMEM((heads, height, LANES), jnp.float32),
                pltpu.VMEM((height, wide), jnp.float32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=VMEM_BYTES),
        interpret=interpret,
        name="packed_attention",
    )(jnp.asarray(layout.tiles), spans, q, k, v)
    return out[:rows].reshape(rows, heads, size)


def _alone(x: Array | Columns) -> Array:
    return x.alone() if isinstance(x, Columns) else x


def _in_columns(x: Array | Columns, tile: int) -> tuple[Float[Array, "T C"], int]:
    """Return an array of whole tiles of rows, and the number of its block of columns that holds the heads.

    The blocks are as wide as the heads.
    """
    if isinstance(x, Columns) and len(x.array) % tile == 0 and x.first % x.heads == 0:
        return x.array, x.first // x.heads
    return _pad_rows(_alone(x).reshape(x.shape[0], -1), tile), 0


def _pad_rows(x: Array, tile: int) -> Array:
    """Add zeros behind the last row, up to whole tiles.

    A block that reaches beyond an array would hold undefined values.
    """
    return jnp.pad(x, ((0, -len(x) % tile), (0, 0)))


def _kernel(items, spans, q, k, v, out, highest, total, sums, *, size: int, kv_heads: int, scale: float):
    """Compute one (query tile, key tile).

    highest and total, [N, B, 128], hold a row's running maximum and sum in every lane. sums, [B, N * H], hold the
    weighted values so far.
    """
    item = items[pl.program_id(0)]
    width = k.shape[0]
    keys = key_tile(item) * width + lax.broadcasted_iota(jnp.int32, (1, width), 1)
    a0, a1, b0, b1 = (spans[:, i : i + 1] for i in range(4))
    allowed = ((keys >= a0) & (keys < a1)) | ((keys >= b0) & (keys < b1))
    block = max(size, LANES)
    lane = lax.broadcasted_iota(jnp.int32, (1, block), 1)

    def step(first: bool) -> None:
        for head in range(q.shape[1] // size):
            at = head * size // block * block
            kv_at = head % kv_heads * size // block * block
            query, mine = q[:, at : at + block], None
            if size < block:  # the other heads of this block of lanes count as zeros
                place = head * size - at
                mine = (lane >= place) & (lane < place + size)
                query = jnp.where(mine, query, jnp.zeros_like(query))
            scores = lax.dot_general(
                query, k[:, kv_at : kv_at + block], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
            )
            scores = jnp.where(allowed, scores * (scale * math.log2(math.e)), MASKED)
            # The maximum is not below FLOOR. Otherwise a row that sees nothing here would count every key as 1.
            most = jnp.broadcast_to(scores.max(1, keepdims=True), (len(query), LANES))
            most = jnp.maximum(FLOOR if first else highest[head], most)
            weights = jnp.exp2(scores - jnp.tile(most, (1, width // LANES)))
            weighed = jnp.broadcast_to(weights.sum(1, keepdims=True), (len(query), LANES))
            drawn = lax.dot_general(
                weights.astype(v.dtype),
                v[:, kv_at : kv_at + block],
                (((1,), (0,)), ((), ())),
                preferred_element_type=jnp.float32,
            )
            if not first:
                shrink = jnp.exp2(highest[head] - most)
                weighed += total[head] * shrink
                drawn += sums[:, at : at + block] * shrink
            highest[head] = most
            total[head] = weighed
            sums[:, at : at + block] = drawn if mine is None else jnp.where(mine, drawn, sums[:, at : at + block])

    pl.when(item & FIRST != 0)(lambda: step(first=True))
    pl.when(item & FIRST == 0)(lambda: step(first=False))

    @pl.when(item & LAST != 0)
    def _():
        for head in range(q.shape[1] // size):
            at = head * size // block * block
            weighed = total[head]
            mean = sums[:, at : at + block] / jnp.where(weighed > 0, weighed, 1.0)
            if size < block:
                place = head * size - at
                mine = (lane >= place) & (lane < place + size)
                mean = jnp.where(mine, mean, 0.0 if place == 0 else out[:, at : at + block].astype(jnp.float32))
            out[:, at : at + block] = mean.astype(out.dtype)
