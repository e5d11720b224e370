"""Matrices in int8 with a float32 scale for each output channel: half the memory of bfloat16.

Only weights are rounded. A product is (x @ int8 in x's dtype) * scale. XLA computes it without a copy of the matrix in
the wide dtype. Every int8 is exact in bfloat16. The method is symmetric: the largest magnitude of a channel becomes 127
(Wu et al. 2020, "Integer Quantization for Deep Learning Inference: Principles and Empirical Evaluation").
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
    """The product values * scale, in place of a parameter's array.

    Attributes:
        values: the numbers in int8.
        scale: the scales, with the axes of values. An axis has size 1 where one scale holds for the whole axis.
        dtype: the dtype that the numbers stand for, and that of activations beside them.
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
        """Return all of it. Modules read arrays as parameter[...]."""
        return self


Matrix = Array | Quantized


def check_quantization(name: str | None) -> None:
    """Check that the name is None or one of QUANTIZATIONS.

    Raises:
        RequestError: it is not.
    """
    if name is not None and name not in QUANTIZATIONS:
        raise RequestError(
            f"quantization {name!r} is unknown; {', '.join(QUANTIZATIONS)}, or leave it out for weights in dtype"
        )


def quantized_outline(model: nnx.Module) -> Any:
    """Return an outline with int8 and scales for every parameter that declares which axes share a scale."""
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
    """Return the largest magnitudes over these axes, which stay with size 1. A NaN or infinity is kept."""
    return np.maximum(
        x.max(tuple(np.atleast_1d(axes)), keepdims=True), -x.min(tuple(np.atleast_1d(axes)), keepdims=True)
    )


def scales(largest: Float32[np.ndarray, ...]) -> Float32[np.ndarray, ...]:
    """Return the scales of channels with these largest magnitudes.

    Raises:
        ValueError: a magnitude is not finite.
    """
    if not np.isfinite(largest).all():
        raise ValueError("has values that are not finite")
    return np.maximum(largest, np.finfo(np.float32).tiny * LARGEST) / np.float32(LARGEST)


def rounded(x: Float32[np.ndarray, ...], scale: Float32[np.ndarray, ...]) -> Int8[np.ndarray, ...]:
    """Return x in steps of scale. The two must broadcast."""
    steps = x / scale
    return np.rint(steps, out=steps).astype(np.int8)
