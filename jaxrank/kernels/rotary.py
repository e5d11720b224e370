"""QK-norm and rotary embedding of the queries or keys of all heads: in XLA, and in one pass in Pallas for TPU.

On TPU, XLA's form takes as long as attention. The arrays [R, N, H] and [R, N * H] have different layouts in memory, and
XLA copies between the two. The kernel reads what the projections write, [R, N * H], and writes what attention reads.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32

from jaxrank.types import ArrayLike, Columns

LANES = 128
ROWS = 256


class Rotary(NamedTuple):
    """The tables by which every layer turns its queries and keys: cosine and sine of position times frequency.

    Column i holds frequency i mod H/2. The sine of the first half is negated, because `turn` needs it so.
    """

    cos: Float32[Array, "R H"]
    sin: Float32[Array, "R H"]


def rotary(
    positions: Int32[ArrayLike, " R"] | Int32[ArrayLike, "3 R"],
    head_size: int,
    theta: float,
    sections: tuple[int, ...] = (),
) -> Rotary:
    """Return the rotary tables for frequencies theta^(-2i/H) (Su et al. 2021, "RoFormer").

    Positions may be by time, height and width (interleaved M-RoPE, Qwen Team 2025, "Qwen3-VL Technical Report"). Then
    frequency i turns by height where i mod 3 is 1, and by width where it is 2. This holds as far as the axis's share of
    the frequencies in `sections` goes. All other frequencies turn by time. Three equal positions are the same as one
    position.
    """
    frequencies = (theta ** (-np.arange(0, head_size, 2) / head_size)).astype(np.float32)
    places = jnp.asarray(positions).astype(jnp.float32)
    if places.ndim == 1:
        return tables(places[:, None] * frequencies)
    axis = np.zeros(head_size // 2, np.int32)
    for i in (1, 2):
        axis[i : 3 * sections[i] : 3] = i
    return tables(places[axis].T * frequencies)


def grid_rotary(positions: Int32[ArrayLike, "R 2"], head_size: int, theta: float) -> Rotary:
    """Return rotary tables in two dimensions, for vision towers.

    There are H/4 frequencies theta^(-4i/H). They turn the first quarter of a head's dimensions by row and the second by
    column, each with its partner H/2 further.
    """
    frequencies = (theta ** (-np.arange(0, head_size, 4) / head_size)).astype(np.float32)
    angles = jnp.asarray(positions).astype(jnp.float32)[:, :, None] * frequencies
    return tables(angles.reshape(len(positions), head_size // 2))


def tables(angles: Float32[Array, "R half"]) -> Rotary:
    """Return the tables of angles for dimensions i and i + H/2."""
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return Rotary(jnp.concatenate([cos, cos], 1), jnp.concatenate([-sin, sin], 1))


def turn(x: Float32[Array, "R N H"], by: Rotary) -> Float32[Array, "R N H"]:
    """Turn dimensions i and i + H/2 of every head by the angle i of the row.

    It works half by half, because XLA takes five times as long on CPU with jnp.roll.
    """
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = (table[:, None, x.shape[2] // 2 :] for table in by)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def xla(
    x: Float[Array, "R N H"], scale: Float32[Array, " H"], by: Rotary, *, eps: float, dtype: DTypeLike
) -> Float[Array, "R N H"]:
    """Compute the norm and then the turn. XLA makes them one on CPU."""
    x = x.astype(jnp.float32)
    return turn(x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + eps) * scale, by).astype(dtype)


def gpu(
    x: Float[Array, "R N H"], scale: Float32[Array, " H"], by: Rotary, *, eps: float, dtype: DTypeLike
) -> Float[Array, "R N H"]:
    """Compute the same as `xla` in two passes over x.

    Without the barrier, XLA's GPU backend writes the normalised x in float32 and reads it again to turn it.
    """
    x = x.astype(jnp.float32)
    inverse = lax.optimization_barrier(lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + eps))
    return turn(x * inverse * scale, by).astype(dtype)


def tpu(
    x: Float[Array, "R N H"] | Columns,
    scale: Float32[Array, " H"],
    by: Rotary,
    *,
    eps: float,
    dtype: DTypeLike,
    interpret: bool = False,
) -> Float[Array, "R N H"]:
    """Compute the same as `xla` in Pallas. Columns are read in place.

    Heads that are no whole blocks of lanes go through XLA. No published model has such heads.
    """
    rows, heads, size = x.shape
    if isinstance(x, Columns) and (size % LANES or x.first % heads):
        x = x.alone()
    array, at = (x.array, x.first // heads) if isinstance(x, Columns) else (x, 0)
    if size % LANES:
        return xla(array, scale, by, eps=eps, dtype=dtype)
    height = min(ROWS, rows)  # The last block may reach beyond the array. Rows do not mix, and those rows are not kept.
    all_heads = pl.BlockSpec((height, heads * size), lambda i: (i, at))
    out_heads = pl.BlockSpec((height, heads * size), lambda i: (i, 0))
    table = pl.BlockSpec((height, size), lambda i: (i, 0))
    out = pl.pallas_call(
        functools.partial(_kernel, eps=eps),
        out_shape=jax.ShapeDtypeStruct((rows, heads * size), dtype),
        grid=(pl.cdiv(rows, height),),
        in_specs=[all_heads, pl.BlockSpec((1, size), lambda i: (0, 0)), table, table],
        out_specs=out_heads,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        interpret=interpret,
        name="norm_rotary",
    )(array.reshape(rows, -1), scale[None], by.cos, by.sin)
    return out.reshape(rows, heads, size)


def _kernel(x, scale, cos, sin, out, *, eps: float):
    """Compute a block of rows, head by head."""
    size = cos.shape[1]
    for at in range(0, out.shape[1], size):
        y = x[:, at : at + size].astype(jnp.float32)
        y = y * lax.rsqrt(jnp.square(y).mean(1, keepdims=True) + eps) * scale[...]
        out[:, at : at + size] = (y * cos[...] + pltpu.roll(y, size // 2, 1) * sin[...]).astype(out.dtype)
