"""Attention over packed rows for NVIDIA's Hopper (compute capability 9.0), in Pallas through Mosaic GPU, in bfloat16.

It uses the same list of tiles as Triton, with larger key tiles. The kernel (mosaic_kernel.py) uses what only Hopper
has: wgmma, TMA, and warpgroups with different tasks. Triton's kernel computes the other cases with the same tiles:
other dtypes, float32 among them, and heads wider than 128.

The interpreted body runs in JAX's interpreter for GPUs. It runs warpgroups as threads, with barriers, shared memory and
the TMA's copies, and can look for races between them. It cannot see some faults that hardware would show:

- A wait for wgmma may be missing, because its products are there at once.
- A swizzle or layout may be wrong, because it has no meaning there (the compiler checks layouts).
- The sum of wgmma in registers, and its left operand there, are not used. A separate sum and shared memory take their
  place.
- The number of registers and all times are not known.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrank.kernels import triton
from jaxrank.types import Layout

AVAILABLE = jax.__version_info__ >= (0, 11, 2)
"""Whether the installed JAX has what the kernel and its interpreter need."""
TILE, KEY_TILE, STAGES = 128, 128, 2
"""The most rows of a query tile, the rows of a key tile, and the number of key tiles in shared memory at a time."""
UNIT, WIDEST = 64, 128
"""Heads are padded to multiples of UNIT, one row of swizzled shared memory. Buffers of heads wider than WIDEST do
not fit."""


def tile_size(rows: int) -> int:
    """Return the rows of a query tile.

    For few rows, such as scored ones, they are only as many as one warpgroup computes.
    """
    return TILE // 2 if rows <= TILE // 2 else TILE


def key_tile_size(keys: int) -> int:
    """Return the keys of a key tile, for any number of keys."""
    return KEY_TILE


def attention(
    q: Float[Array, "R N H"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    layout: Layout,
    *,
    scale: float,
    tiles: tuple[int, int] | None = None,
    stages: int = STAGES,
    interpret: Any = False,
) -> Float[Array, "R N H"]:
    """Compute attention. Heads that are no multiple of 64 are padded, and so are rows and keys that are no whole tiles.

    Values must be finite, even those of keys that no row sees, because a row takes 0 times the values of a tile's other
    keys.

    Args:
        q: the queries.
        k: the keys.
        v: the values.
        layout: the layout.
        scale: the factor of the scores.
        tiles: rows of a query tile and of a key tile, each 64 or 128, if the layout was not made with the sizes above.
        stages: the number of key tiles in shared memory at a time.
        interpret: True, or the interpreter's parameters (plgpu.InterpretGPUParams).

    Raises:
        ValueError: the layout was made for another implementation or call.
    """
    rows, _, size = q.shape
    keys = len(k)
    height, width = tiles or (tile_size(rows), key_tile_size(keys))
    if layout.tiles.shape != (-(-rows // height) * -(-keys // width),):
        raise ValueError("attention: the layout was made for another implementation or call; see make_layout")
    if q.dtype != jnp.bfloat16 or size > WIDEST:
        return triton.attention(q, k, v, layout, scale=scale, interpret=bool(interpret), tiles=(height, width))
    from jaxrank.kernels import mosaic_kernel  # not before, because the import takes a fifth of a second

    q = jnp.pad(q, ((0, -rows % height), (0, 0), (0, -size % UNIT)))
    k, v = (jnp.pad(x, ((0, -keys % width), (0, 0), (0, -size % UNIT))) for x in (k, v))
    spans = jnp.pad(jnp.asarray(layout.spans), ((0, -rows % height), (0, 0)))
    out = mosaic_kernel.attention(
        *(q, k, v, spans, jnp.asarray(layout.tiles), jnp.asarray(layout.starts)),
        tiles=(height, width),
        stages=stages,
        scale=scale,
        interpret=interpret,
    )
    return out[:rows, :, :size]
