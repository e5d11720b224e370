"""Attention over packed rows, and what stands before it: public functions, checked and dispatched here.

rotary.py   QK-norm and rotary embedding, for XLA and Pallas
tiles.py    spans -> tiles at document borders, for XLA
xla.py      tiled, for CPU; dense, the oracle, for any backend
grid.py     spans -> (query tile, key tile) pairs, for Pallas
tpu.py      Pallas for TPU
triton.py   Pallas for NVIDIA GPUs, through Triton
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32

from jaxrank.kernels import rotary, tiles, tpu, triton, xla
from jaxrank.kernels.grid import make_grid
from jaxrank.kernels.rotary import Rotary
from jaxrank.kernels.tiles import LONG_ROW
from jaxrank.types import Layout

__all__ = [
    "IMPLEMENTATIONS", "LONG_ROW", "attention", "is_for_cpu", "is_for_tpu", "make_layout", "norm_rotary",
    "operand_dtype",
]  # fmt: skip


class Implementation(NamedTuple):
    """An attention body, what makes its tile list from spans and the number of keys, and the body of norm_rotary.

    platform: the JAX backend that it runs on; None for any.
    """

    body: Callable[..., Array]
    make_layout: Callable[[np.ndarray, int], Layout]
    norm_rotary: Callable[..., Array] = rotary.xla
    platform: str | None = None


_TPU_GRID = partial(make_grid, tile_size=tpu.tile_size)
_TRITON_GRID = partial(make_grid, tile_size=triton.tile_size, key_tile_size=triton.key_tile_size)

IMPLEMENTATIONS = {
    "tiled": Implementation(xla.tiled, tiles.make_layout),
    "dense": Implementation(xla.dense, tiles.make_layout),
    "tpu": Implementation(tpu.attention, _TPU_GRID, rotary.tpu, platform="tpu"),
    "tpu-interpreted": Implementation(
        partial(tpu.attention, interpret=True), _TPU_GRID, partial(rotary.tpu, interpret=True)
    ),
    "triton": Implementation(triton.attention, _TRITON_GRID, platform="gpu"),
    "triton-interpreted": Implementation(partial(triton.attention, interpret=True), _TRITON_GRID),
}
"""By name; the interpreted ones run anywhere, slowly, and are for tests."""


def pick(implementation: str | None) -> Implementation:
    """The one of that name, or for None the default device's: Pallas on TPU, XLA elsewhere.

    On NVIDIA GPUs, too, until "triton" has been measured on one.
    """
    name = implementation or {"tpu": "tpu"}.get(jax.default_backend(), "tiled")
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"attention: implementation {name!r} is unknown; one of {sorted(IMPLEMENTATIONS)}")
    return IMPLEMENTATIONS[name]


def make_layout(spans: Int32[np.ndarray, "R 4"], keys: int, implementation: str | None = None) -> Layout:
    """The layout of an attention call of len(spans) query rows over `keys` keys, for that implementation."""
    return pick(implementation).make_layout(spans, keys)


def attention(
    q: Float[Array, "R N H"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    layout: Layout,
    *,
    scale: float,
    implementation: str | None = None,
) -> Float[Array, "R N H"]:
    """Softmax attention of R query rows over a packed row of T keys, as `layout` allows.

    The result has q's dtype; products, softmax and sums are float32. Rows whose spans are empty give 0.
    N must be a multiple of K (grouped-query attention). `implementation` names one of IMPLEMENTATIONS, None is the
    default device's; `layout` must have been made for the same.
    """
    if q.shape[1] % k.shape[1] or k.shape != v.shape or q.shape[2] != k.shape[2]:
        raise ValueError(
            f"attention: got q {q.shape}, k {k.shape}, v {v.shape}; want [R, N, H], [T, K, H], [T, K, H], N % K == 0"
        )
    chosen = pick(implementation)
    if (layout.tiles.ndim == 1) != (chosen.make_layout is not tiles.make_layout):
        raise ValueError("attention: the layout was made for another implementation; see make_layout")
    return chosen.body(q, k, v, layout, scale=scale)


def norm_rotary(
    x: Float[Array, "R N H"],
    scale: Float32[Array, " H"],
    by: Rotary,
    *,
    eps: float,
    dtype: DTypeLike,
    implementation: str | None = None,
) -> Float[Array, "R N H"]:
    """Every head over its root mean square (eps under the root) and times scale, then dimensions i and i + H/2 turned
    by the angle i of the row: queries and keys as Qwen3 attends with them. Computed in float32; the result is in
    dtype.
    """
    if x.shape[2:] != scale.shape or not x.shape[::2] == by.cos.shape == by.sin.shape:
        raise ValueError(
            f"norm_rotary: got x {x.shape}, scale {scale.shape}, tables {by.cos.shape}, {by.sin.shape}; "
            "want [R, N, H], [H], [R, H], [R, H]"
        )
    return pick(implementation).norm_rotary(x, scale, by, eps=eps, dtype=dtype)


def is_for_cpu(implementation: str | None) -> bool:
    """Whether that implementation runs on CPU. By its name, since a CPU may compile for a TPU."""
    return jax.default_backend() == "cpu" and pick(implementation).body in (xla.tiled, xla.dense)


def is_for_tpu(implementation: str | None) -> bool:
    """Whether that implementation runs on TPU."""
    return pick(implementation).body is tpu.attention


def operand_dtype(dtype: DTypeLike, implementation: str | None) -> DTypeLike:
    """What to pass q, k and v of a model in `dtype` as: float32 on CPU, where XLA would convert every bfloat16 tile."""
    return jnp.float32 if is_for_cpu(implementation) else dtype
