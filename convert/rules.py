"""From a checkpoint's tensors to a model's parameters, by a table of (tensor, parameter, transform).

The table is checked both ways before anything is read: every tensor is consumed, every parameter is filled exactly
once, every shape is equal. Then each tensor is cast and transposed, chunk by chunk, straight into the memory that the
parameter keeps.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np

from jaxrank.checkpoint import host_memory, to_device
from jaxrank.convert.tensors import READABLE, Tensor
from jaxrank.errors import CheckpointError

READERS = 2
"""Parameters that are read side by side."""

SHOWN = 20
"""How many mismatches of a kind an error lists."""

Shape = tuple[int, ...]


class Transform(NamedTuple):
    """How a parameter looks as its tensor: its axes flattened to `flat(shape)`, then transposed or not.

    With `minus` = (a, b) it is row a minus row b of the tensor instead, in float32.
    """

    flat: Callable[[Shape], Shape]
    transposed: bool = False
    minus: tuple[int, int] | None = None

    def source_shape(self, shape: Shape) -> Shape:
        """The shape that the tensor of a parameter of this shape must have."""
        flat = self.flat(shape)
        return flat[::-1] if self.transposed else flat

    def view(self, parameter: np.ndarray) -> np.ndarray:
        """The contiguous parameter, seen in its tensor's layout: what is written there lands in the right place."""
        flat = parameter.reshape(self.flat(parameter.shape))
        return flat.T if self.transposed else flat


SAME = Transform(lambda shape: shape)
FLAT = Transform(lambda shape: (math.prod(shape),))
"""A vector that the model keeps with more axes, or with none: [N, H] from [N*H], [] from [1]."""
ROW = Transform(lambda shape: (1, *shape))
"""The only row of a table: [D] from [1, D]."""


def linear(inputs: int = 1) -> Transform:
    """A kernel [*in, *out] whose first `inputs` axes are summed over, from torch's Linear weight [out, in]."""
    return Transform(lambda shape: (math.prod(shape[:inputs]), math.prod(shape[inputs:])), transposed=True)


def row_difference(rows: int, a: int, b: int) -> Transform:
    """Row a minus row b of a table with that many rows: [D] from [rows, D]."""
    return Transform(lambda shape: (rows, *shape), minus=(a, b))


class Rule(NamedTuple):
    """One line of a table: the tensor's name, the parameter's path (with slashes), and how to get there."""

    tensor: str
    parameter: str
    transform: Transform = SAME

    def under(self, tensors: str, parameters: str) -> Rule:
        """The same rule with both names prefixed."""
        return Rule(tensors + self.tensor, parameters + self.parameter, self.transform)


class Abstract(NamedTuple):
    """Shape and dtype of a parameter that is yet to be filled."""

    shape: Shape
    dtype: np.dtype


def check(
    rules: Iterable[Rule],
    ignored: Collection[str],
    tensors: Mapping[str, Tensor],
    parameters: Mapping[str, Abstract],
    where: str,
) -> None:
    """Raise one CheckpointError, beginning with `where`, that names everything that does not match."""
    rules = list(rules)
    filled = Counter(rule.parameter for rule in rules)
    used = {rule.tensor for rule in rules}
    missing, shapes, dtypes = [], [], []
    for rule in rules:
        parameter, tensor = parameters.get(rule.parameter), tensors.get(rule.tensor)
        expected = rule.transform.source_shape(parameter.shape) if parameter else None
        if tensor is None:
            missing.append(f"{rule.tensor} {list(expected or ())}")
        elif tensor.dtype not in READABLE:
            dtypes.append(f"{rule.tensor} is {tensor.dtype}")
        elif expected is not None and tensor.shape != expected:
            shapes.append(f"{rule.tensor} is {list(tensor.shape)}, the model needs {list(expected)}")
    unexpected = [
        f"{name} {list(tensor.shape)}" for name, tensor in tensors.items() if name not in used and name not in ignored
    ]
    table = [f"{name} filled {filled[name]} times" for name in parameters if filled[name] != 1]
    table += [f"{name} is no parameter" for name in filled if name not in parameters]
    kinds = {
        "missing tensors": missing,
        "unexpected tensors": unexpected,
        "wrong shapes": shapes,
        f"dtypes that cannot be read (only {', '.join(READABLE)} can)": dtypes,
        "faults of jaxrank's own table, please report": table,
    }
    if faults := [listing(kind, lines) for kind, lines in kinds.items() if lines]:
        raise CheckpointError(
            f"{where} does not fit its config.json. Use the weights and the config.json of one model.\n"
            + "\n".join(faults)
        )


def listing(kind: str, lines: list[str]) -> str:
    """An indented list, cut after SHOWN lines."""
    more = [f"... and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return f"{kind} ({len(lines)}):\n" + "\n".join(f"  {line}" for line in lines[:SHOWN] + more)


def fill(
    rules: Iterable[Rule],
    tensors: Mapping[str, Tensor],
    parameters: Mapping[str, Abstract],
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, jax.Array]:
    """The parameters as arrays on the default device, by path; what is given must have passed `check`.

    READERS parameters are read side by side, since most of the time goes into touching new memory; host memory in use
    at any time is as many parameters beyond what the device keeps. progress is called with the bytes read so far and
    in all, by one thread at a time.
    """
    # The largest first: what a large one needs for a moment is then not added to all the others.
    order = sorted(rules, key=lambda rule: -tensors[rule.tensor].nbytes)
    total, done, lock = sum(tensors[rule.tensor].nbytes for rule in order), 0, threading.Lock()

    def advance(count: int) -> None:
        nonlocal done
        with lock:
            done += count
            if progress:
                progress(done, total)

    def one(rule: Rule) -> jax.Array:
        shape, dtype = parameters[rule.parameter]
        host = host_memory(shape, dtype)
        if rule.transform.minus:
            a, b = (read_row(tensors[rule.tensor], row).astype(np.float32) for row in rule.transform.minus)
            host[...] = a - b
            advance(tensors[rule.tensor].nbytes)
            return to_device(host)
        view, row = np.atleast_1d(rule.transform.view(host)), 0
        for chunk in tensors[rule.tensor].chunks():
            # Cast first: a transposed write of 2-byte items touches half the memory.
            view[row : row + len(chunk)] = cast(chunk, dtype, rule.tensor)
            row += len(chunk)
            advance(chunk.nbytes)
        return to_device(host)

    with ThreadPoolExecutor(READERS) as pool:
        futures = [pool.submit(one, rule) for rule in order]
        try:
            return {rule.parameter: future.result() for rule, future in zip(order, futures, strict=True)}
        finally:
            pool.shutdown(cancel_futures=True)


def read_row(tensor: Tensor, row: int) -> np.ndarray:
    """A copy of one row of a table."""
    for chunk in tensor.chunks():
        if row < len(chunk):
            return chunk[row].copy()
        row -= len(chunk)
    raise IndexError(f"{tensor.where}: a table of {tensor.shape[0]} rows has no such row")


def cast(chunk: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """The chunk in dtype; CheckpointError if a number is too large for it."""
    with np.errstate(over="raise"):
        try:
            return chunk.astype(dtype, copy=False)
        except FloatingPointError as error:
            raise CheckpointError(f"{name} has values too large for {dtype}; choose float32") from error
