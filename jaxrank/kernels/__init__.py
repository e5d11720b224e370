"""Attention over packed rows: one public function, checked and dispatched here."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxrank.kernels import xla
from jaxrank.kernels.tiles import LONG_ROW, make_layout, max_tiles
from jaxrank.types import Layout

__all__ = ["IMPLEMENTATIONS", "LONG_ROW", "attention", "make_layout", "max_tiles", "operand_dtype"]

IMPLEMENTATIONS: dict[str, Callable[..., Array]] = {"tiled": xla.tiled, "dense": xla.dense}


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
    N must be a multiple of K (grouped-query attention). `implementation` names one of IMPLEMENTATIONS;
    None takes "tiled".
    """
    if q.shape[1] % k.shape[1] or k.shape != v.shape or q.shape[2] != k.shape[2]:
        raise ValueError(
            f"attention: got q {q.shape}, k {k.shape}, v {v.shape}; want [R, N, H], [T, K, H], [T, K, H], N % K == 0"
        )
    name = implementation or "tiled"
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"attention: implementation {name!r} is unknown; one of {sorted(IMPLEMENTATIONS)}")
    return IMPLEMENTATIONS[name](q, k, v, layout, scale=scale)


def operand_dtype(dtype: DTypeLike) -> DTypeLike:
    """What to pass q, k and v of a model in `dtype` as: float32 on CPU, where XLA would convert every bfloat16 tile."""
    return jnp.float32 if jax.default_backend() == "cpu" else dtype
