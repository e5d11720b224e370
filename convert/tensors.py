"""What a checkpoint file offers under one name: a shape, a dtype, and its rows in order."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

READABLE = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}
"""The dtypes that parameters are read from, by the names that safetensors gives them."""

CHUNK_BYTES = 256 * 1024
"""Rows come in chunks of about this size. They are cast and transposed while they lie in the L2 cache."""


class Tensor(NamedTuple):
    """One tensor of a checkpoint.

    Attributes:
        dtype: the name of the dtype in safetensors. It may be one that is not READABLE.
        where: the file, for messages.
        chunks: a function that yields consecutive rows of about CHUNK_BYTES each. Rows are slices of the first axis; a
            scalar counts as one row. A chunk is valid only until the next one is asked for.
    """

    dtype: str
    shape: tuple[int, ...]
    where: str
    chunks: Callable[[], Iterator[np.ndarray]]

    @property
    def nbytes(self) -> int:
        """The bytes of the tensor, for a READABLE dtype."""
        return math.prod(self.shape) * READABLE[self.dtype].itemsize


def rows_per_chunk(shape: tuple[int, ...], itemsize: int) -> int:
    """Return how many rows of a tensor of that shape make about CHUNK_BYTES. It is at least one."""
    return max(1, CHUNK_BYTES // max(1, math.prod(shape[1:]) * itemsize))
