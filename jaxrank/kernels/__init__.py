"""Attention over packed rows, and the norm and rotary embedding before it.

Public functions are checked and dispatched here.

rotary.py   QK-norm and rotary embedding, for XLA and Pallas
tiles.py    spans -> tiles at document borders, for XLA
xla.py      tiled, for CPU; dense, the reference, for any backend
grid.py     spans -> (query tile, key tile) pairs, for Pallas
tpu.py      Pallas for TPU
triton.py   Pallas for NVIDIA GPUs, through Triton
mosaic.py   Pallas for NVIDIA's Hopper, through Mosaic GPU; mosaic_kernel.py holds the kernel
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32

from jaxrank.kernels import mosaic, rotary, tiles, tpu, triton, xla
from jaxrank.kernels.grid import make_grid
from jaxrank.kernels.rotary import Rotary
from jaxrank.kernels.tiles import LONG_ROW
from jaxrank.types import Columns, Layout

__all__ = [
    "IMPLEMENTATIONS", "LONG_ROW", "attention", "default_line", "heads_of", "is_for_cpu", "is_for_gpu", "is_for_tpu",
    "line", "make_layout", "norm_rotary", "operand_dtype",
]  # fmt: skip


class Implementation(NamedTuple):
    """An attention body and what belongs to it.

    Attributes:
        body: the attention body.
        make_layout: a function that makes its tile list from spans and the number of keys.
        norm_rotary: the body of norm_rotary.
        platform: the JAX backend that it runs on. None is for any.
        takes_columns: whether both bodies read Columns in place. Other bodies get copies.
    """

    body: Callable[..., Array]
    make_layout: Callable[[np.ndarray, int], Layout]
    norm_rotary: Callable[..., Array] = rotary.xla
    platform: str | None = None
    takes_columns: bool = False


_TPU_GRID = partial(make_grid, tile_size=tpu.tile_size)
_TRITON_GRID = partial(make_grid, tile_size=triton.tile_size, key_tile_size=triton.key_tile_size)
_MOSAIC_GRID = partial(make_grid, tile_size=mosaic.tile_size, key_tile_size=mosaic.key_tile_size)

IMPLEMENTATIONS = {
    "tiled": Implementation(xla.tiled, tiles.make_layout),
    "dense": Implementation(xla.dense, tiles.make_layout),
    "tpu": Implementation(tpu.attention, _TPU_GRID, rotary.tpu, platform="tpu", takes_columns=True),
    "tpu-interpreted": Implementation(
        partial(tpu.attention, interpret=True),
        _TPU_GRID,
        partial(rotary.tpu, interpret=True),
        takes_columns=True,
    ),
    "triton": Implementation(triton.attention, _TRITON_GRID, rotary.gpu, platform="gpu"),
    "triton-interpreted": Implementation(partial(triton.attention, interpret=True), _TRITON_GRID, rotary.gpu),
}
if mosaic.AVAILABLE:
    IMPLEMENTATIONS |= {
        "mosaic": Implementation(mosaic.attention, _MOSAIC_GRID, rotary.gpu, platform="gpu"),
        "mosaic-interpreted": Implementation(partial(mosaic.attention, interpret=True), _MOSAIC_GRID, rotary.gpu),
    }
"""The attention bodies by name.

The interpreted ones run anywhere, slowly, and are for tests. Those of Mosaic exist from jax 0.11.2 on.
"""


def line(platform: str, capability: str, dtype: DTypeLike, names: Collection[str]) -> tuple[str, ...]:
    """Return the attention bodies for a kind of device, the fastest first. The last is "tiled", which runs everywhere.

    Args:
        platform: "cpu", "gpu" or "tpu".
        capability: the compute capability of an NVIDIA GPU, such as "9.0". GPUs of other makers have none, or a name.
        dtype: the dtype of q, k and v.
        names: the implementations that exist. Others are left out.
    """
    found = re.fullmatch(r"(\d+)\.(\d+)", capability) if platform == "gpu" else None
    compute = (int(found[1]), int(found[2])) if found else (0, 0)
    fast = ["tpu"] if platform == "tpu" else []
    if compute == (9, 0) and jnp.dtype(dtype) == jnp.bfloat16:  # Hopper's own instructions work in bfloat16 only
        fast.append("mosaic")
    if compute >= (8, 0):
        fast.append("triton")
    return (*(name for name in fast if name in names), "tiled")


def default_line(dtype: DTypeLike) -> tuple[str, ...]:
    """Return the line for the default device. `dtype` is that of q, k and v."""
    capability = getattr(jax.local_devices()[0], "compute_capability", "")
    return line(jax.default_backend(), str(capability), dtype, IMPLEMENTATIONS)


def pick(implementation: str | None) -> Implementation:
    """Return the implementation of that name. None is the first in the default device's line that takes every dtype.

    Raises:
        ValueError: the name is unknown.
    """
    name = implementation or default_line(jnp.float32)[0]
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"attention: implementation {name!r} is unknown; one of {sorted(IMPLEMENTATIONS)}")
    return IMPLEMENTATIONS[name]


def make_layout(spans: Int32[np.ndarray, "R 4"], keys: int, implementation: str | None = None) -> Layout:
    """Return the layout of an attention call of len(spans) query rows over `keys` keys, for that implementation.

    Raises:
        ValueError: the implementation is unknown.
    """
    return pick(implementation).make_layout(spans, keys)


def attention(
    q: Float[Array, "R N H"] | Columns,
    k: Float[Array, "T K H"] | Columns,
    v: Float[Array, "T K H"] | Columns,
    layout: Layout,
    *,
    scale: float,
    implementation: str | None = None,
) -> Float[Array, "R N H"]:
    """Compute softmax attention of R query rows over a packed row of T keys, as `layout` allows.

    Products, softmax and sums are float32. N must be a multiple of K (grouped-query attention): query head n uses key
    head n mod K.

    Args:
        q: the queries.
        k: the keys.
        v: the values.
        layout: which keys each row sees. It must be made for the same implementation.
        scale: the factor of the scores.
        implementation: one of IMPLEMENTATIONS. None is as in `pick`.

    Returns:
        The result in q's dtype. Rows with empty spans give 0.

    Raises:
        ValueError: the shapes do not match, or the layout was made for another implementation.
    """
    if q.shape[1] % k.shape[1] or k.shape != v.shape or q.shape[2] != k.shape[2]:
        raise ValueError(
            f"attention: got q {q.shape}, k {k.shape}, v {v.shape}; want [R, N, H], [T, K, H], [T, K, H], N % K == 0"
        )
    chosen = pick(implementation)
    alike = chosen.make_layout(np.zeros((q.shape[0], 4), np.int32), k.shape[0])
    if (layout.tiles.shape, layout.starts.shape) != (alike.tiles.shape, alike.starts.shape):
        raise ValueError("attention: the layout was made for another implementation; see make_layout")
    return chosen.body(*(_as_taken(x, chosen) for x in (q, k, v)), layout, scale=scale)


def _as_taken(x: Array | Columns, implementation: Implementation) -> Array | Columns:
    return x.alone() if isinstance(x, Columns) and not implementation.takes_columns else x


def norm_rotary(
    x: Float[Array, "R N H"] | Columns,
    scale: Float32[Array, " H"],
    by: Rotary,
    *,
    eps: float,
    dtype: DTypeLike,
    implementation: str | None = None,
) -> Float[Array, "R N H"]:
    """Normalise every head and turn it, as queries and keys of Qwen3 need it before attention.

    Each head is divided by its root mean square (with eps under the root) and multiplied by scale. Then its dimensions
    i and i + H/2 are turned by the angle i of the row. The computation is in float32.

    Args:
        x: the queries or keys.
        scale: the scale of the norm.
        by: the rotary tables.
        eps: the term under the root.
        dtype: the dtype of the result.
        implementation: that of attention.

    Raises:
        ValueError: the shapes do not match.
    """
    if x.shape[2:] != scale.shape or not x.shape[::2] == by.cos.shape == by.sin.shape:
        raise ValueError(
            f"norm_rotary: got x {x.shape}, scale {scale.shape}, tables {by.cos.shape}, {by.sin.shape}; "
            "want [R, N, H], [H], [R, H], [R, H]"
        )
    chosen = pick(implementation)
    return chosen.norm_rotary(_as_taken(x, chosen), scale, by, eps=eps, dtype=dtype)


def heads_of(
    x: Float[Array, "R C"], first: int, heads: int, size: int, implementation: str | None
) -> Float[Array, "R heads H"] | Columns:
    """Return heads first to first + heads of x, in the form that this implementation reads with the fewest copies."""
    found = Columns(x, first, heads, size)
    return found if pick(implementation).takes_columns else found.alone()


def is_for_cpu(implementation: str | None) -> bool:
    """Return whether that implementation runs on CPU. Its name decides, because a CPU may compile for a TPU."""
    return jax.default_backend() == "cpu" and pick(implementation).body in (xla.tiled, xla.dense)


def is_for_tpu(implementation: str | None) -> bool:
    """Return whether that implementation runs on TPU."""
    return pick(implementation).body is tpu.attention


def is_for_gpu(implementation: str | None) -> bool:
    """Return whether that implementation runs on a GPU, or in an interpreter in place of a GPU."""
    return jax.default_backend() == "gpu" or pick(implementation).norm_rotary is rotary.gpu


def operand_dtype(dtype: DTypeLike, implementation: str | None) -> DTypeLike:
    """Return the dtype in which to pass q, k and v of a model in `dtype`.

    On CPU it is float32, because XLA would convert every bfloat16 tile there.
    """
    return jnp.float32 if is_for_cpu(implementation) else dtype
