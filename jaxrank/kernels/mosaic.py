"""Attention over packed rows for NVIDIA's Hopper (compute capability 9.0), in Pallas through Mosaic GPU, in bfloat16.

The same list of tiles as for Triton, with larger key tiles, and a kernel (mosaic_kernel.py) made of what only Hopper
has: wgmma, TMA, and warpgroups with different parts. What it is not made for, Triton's kernel does with the same tiles:
other dtypes, float32 among them, and heads wider than 128.

The interpreted one runs in JAX's interpreter for GPUs, which plays warpgroups as threads, with barriers, shared memory
and the TMA's copies, and can look for races between them. It cannot see some faults that hardware would show:
- a missing wait for wgmma, whose products are there at once;
- a wrong swizzle or layout, which mean nothing to it (the compiler checks layouts);
- the adding up of wgmma in registers, and its left operand there: it gets a sum of its own and shared memory instead;
- how many registers there are, and the time anything takes.
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
"""Rows of a query tile at most and of a key tile, and how many key tiles are in shared memory at a time."""
UNIT, WIDEST = 64, 128
"""Heads are padded to multiples of UNIT, one row of swizzled shared memory; buffers of wider ones do not fit."""


def tile_size(rows: int) -> int:
    """Rows of a query tile: of few rows, as those that are scored, only as many as one warpgroup computes."""
    return TILE // 2 if rows <= TILE // 2 else TILE


def key_tile_size(keys: int) -> int:
    """The same of a key tile, whatever the number of keys."""
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
    """Heads that are no multiple of 64, and rows and keys that are no whole tiles, are padded.

    Values must be finite, those of keys that no row sees too: a row takes 0 times the values of a tile's other keys.
    tiles: rows of a query tile and of a key tile, each 64 or 128, where the layout was not made with the sizes above.
    stages: key tiles in shared memory at a time. interpret: True, or the interpreter's parameters
    (plgpu.InterpretGPUParams).
    """
    rows, _, size = q.shape
    keys = len(k)
    height, width = tiles or (tile_size(rows), key_tile_size(keys))
    if layout.tiles.shape != (-(-rows // height) * -(-keys // width),):
        raise ValueError("attention: the layout was made for another implementation or call; see make_layout")
    if q.dtype != jnp.bfloat16 or size > WIDEST:
        return triton.attention(q, k, v, layout, scale=scale, interpret=bool(interpret), tiles=(height, width))
    from jaxrank.kernels import mosaic_kernel  # not before: importing Mosaic GPU takes a fifth of a second

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
