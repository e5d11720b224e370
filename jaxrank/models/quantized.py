"""Matrices in int8 with a float32 scale for each output channel: half the memory of bfloat16.

Only weights are rounded. A product is (x @ int8 in x's dtype) * scale, which XLA computes without keeping the matrix in
the wide dtype; every int8 is exact in bfloat16. Symmetric, with the largest magnitude of a channel at 127, as in Wu et
al. 2020, "Integer Quantization for Deep Learning Inference: Principles and Empirical Evaluation".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import EllipsisType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float32, Int8, Num

from jaxrank.errors import RequestError

QUANTIZATIONS = ("int8",)

LARGEST = 127


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantized:
    """values * scale, in place of a parameter's array.

    scale has the axes of values, of size 1 where one scale holds for the whole axis. dtype: what the numbers stand for,
    and that of activations beside them.
    """

    values: Any
    scale: Any
    dtype: np.dtype = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def size(self) -> int:
        return self.values.size

    def __getitem__(self, key: EllipsisType) -> Quantized:
        """All of it: parameter[...] is how modules read arrays."""
        return self


Matrix = Array | Quantized


def check_quantization(name: str | None) -> None:
    """RequestError unless it is None or one of QUANTIZATIONS."""
    if name is not None and name not in QUANTIZATIONS:
        raise RequestError(
            f"quantization {name!r} is unknown; {', '.join(QUANTIZATIONS)}, or leave it out for weights in dtype"
        )


def quantized_outline(model: nnx.Module) -> Any:
    """An outline with int8 and scales in place of every parameter that declares which axes share a scale."""
    graph, state = nnx.split(model)

    def outline(parameter: nnx.Variable[Any]) -> nnx.Variable[Any]:
        over = parameter.get_metadata().get("scale_over")
        if not over:
            return parameter
        axes = [axis % len(parameter.shape) for axis in over]
        scale = tuple(1 if axis in axes else size for axis, size in enumerate(parameter.shape))
        return parameter.replace(
            Quantized(
                jax.ShapeDtypeStruct(parameter.shape, jnp.int8),
                jax.ShapeDtypeStruct(scale, jnp.float32),
                np.dtype(parameter.dtype),
            )
        )

    return nnx.merge(graph, jax.tree.map(outline, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)))


def largest_magnitudes(x: Num[np.ndarray, ...], axes: int | Sequence[int]) -> Float32[np.ndarray, ...]:
    """Over these axes, which stay with size 1. A NaN or infinity comes through."""
    return np.maximum(
        x.max(tuple(np.atleast_1d(axes)), keepdims=True), -x.min(tuple(np.atleast_1d(axes)), keepdims=True)
    )


def scales(largest: Float32[np.ndarray, ...]) -> Float32[np.ndarray, ...]:
    """For channels of these largest magnitudes. ValueError if one is not finite."""
    if not np.isfinite(largest).all():
        raise ValueError("has values that are not finite")
    return np.maximum(largest, np.finfo(np.float32).tiny * LARGEST) / np.float32(LARGEST)


def rounded(x: Float32[np.ndarray, ...], scale: Float32[np.ndarray, ...]) -> Int8[np.ndarray, ...]:
    """x in steps of scale, which broadcasts against it."""
    steps = x / scale
    return np.rint(steps, out=steps).astype(np.int8)
