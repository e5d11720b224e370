"""From a checkpoint's tensors to a model's parameters, by a table of (tensor, parameter, transform).

The table is checked in both directions before anything is read: every tensor is used, every parameter is filled exactly
once, and every shape is equal. Then each tensor is cast and transposed, chunk by chunk, directly into the memory that
the parameter keeps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from jaxrank.convert.tensors import READABLE, Tensor
from jaxrank.errors import CheckpointError
from jaxrank.models.quantized import Quantized, largest_magnitudes, rounded, scales
from jaxrank.sharding import placed_order
from jaxrank.weights.converted import BuildingInt8
from jaxrank.weights.shards import Building, Part, Progress, by_parameter, in_threads

SHOWN = 20
"""The number of mismatches of a kind that an error lists."""

Shape = tuple[int, ...]


class Transform(NamedTuple):
    """How a parameter becomes its tensor: its axes are flattened to `flat(shape)`, and then transposed or not.

    With `minus` = (a, b) it is row a minus row b of the tensor instead, in float32. With `part` the tensor holds some
    of the parameter's entries along one axis, or has them in another order.
    """

    flat: Callable[[Shape], Shape]
    transposed: bool = False
    minus: tuple[int, int] | None = None
    part: Part | None = None

    def source_shape(self, shape: Shape) -> Shape:
        """Return the shape that the tensor of a parameter of this shape must have."""
        sizes = list(shape)
        if self.part is not None:
            sizes[self.part.axis] = int(self.fills(shape).sum())
        flat = self.flat(tuple(sizes))
        return flat[::-1] if self.transposed else flat

    def fills(self, shape: Shape) -> np.ndarray:
        """Return which entries along the part's axis the tensor of a parameter of this shape fills.

        Without a part it is [True].
        """
        return np.ones(1, bool) if self.part is None else self.part.order(shape[self.part.axis], 1) >= 0


def layer_places(layers: int) -> list[str]:
    """Return where the models keep their layers. The last layer has a place of its own."""
    return [*(f"layers/{i}/" for i in range(layers - 1)), "last/"]


SAME = Transform(lambda shape: shape)
FLAT = Transform(lambda shape: (math.prod(shape),))
"""A vector that the model keeps with other axes: [] from [1]."""
ROW = Transform(lambda shape: (1, *shape))
"""The only row of a table: [D] from [1, D]."""


LINEAR = Transform(lambda shape: shape if len(shape) == 2 else (*shape, 1), transposed=True)
"""A kernel [in, out], or [in] of one column, from torch's Linear weight [out, in]."""


def members(transform: Transform, count: int, start: int, stop: int, size: int = 1, *, axis: int = -1) -> Transform:
    """Return the same transform for a tensor that holds members start to stop of a parameter: queries, keys or values.

    The parameter has `count` members on that axis. A member has so many columns for each (key) head, `size` together.
    If the tensor has several members, those of one key head stand side by side: query head k * G + g belongs to key
    head k. The parameter has one member of all key heads side by side (see sharding.arranged).
    """

    def index(columns: int, shards: int) -> np.ndarray:
        found = np.full((shards, count, columns // (shards * count * size), size), -1)
        some = found[:, start:stop]
        shape = (shards, found.shape[2], stop - start, size)
        some[...] = np.arange(some.size).reshape(shape).swapaxes(1, 2)
        return found.ravel()

    return transform._replace(part=Part(axis, index))


def in_order(transform: Transform, count: int) -> Transform:
    """Return the same transform for a tensor that holds all members, one after the other."""
    return transform._replace(part=Part(-1, partial(placed_order, count)))


def row_difference(rows: int, a: int, b: int) -> Transform:
    """Return row a minus row b of a table with that many rows: [D] from [rows, D]."""
    return Transform(lambda shape: (rows, *shape), minus=(a, b))


class Rule(NamedTuple):
    """One line of a table: the tensor's name, the parameter's path (with slashes), and the transform between them."""

    tensor: str
    parameter: str
    transform: Transform = SAME

    def under(self, tensors: str, parameters: str) -> Rule:
        """Return the same rule with a prefix before both names."""
        return Rule(tensors + self.tensor, parameters + self.parameter, self.transform)


def check(
    rules: Iterable[Rule],
    ignored: Collection[str],
    tensors: Mapping[str, Tensor],
    parameters: Mapping[str, Any],
    where: str,
) -> None:
    """Check that the table matches the tensors and the parameters.

    Args:
        parameters: the outlines of the parameters, by path.
        where: the beginning of the message.

    Raises:
        CheckpointError: something does not match. The message names all of it.
    """
    rules = list(rules)
    filled: dict[str, np.ndarray] = {}
    used = {rule.tensor for rule in rules}
    missing, shapes, dtypes = [], [], []
    for rule in rules:
        parameter, tensor = parameters.get(rule.parameter), tensors.get(rule.tensor)
        expected = rule.transform.source_shape(parameter.shape) if parameter is not None else None
        times = np.ones(1, int) if parameter is None else rule.transform.fills(parameter.shape).astype(int)
        filled[rule.parameter] = filled.get(rule.parameter, 0) + times
        if tensor is None:
            missing.append(f"{rule.tensor} {list(expected or ())}")
        elif tensor.dtype not in READABLE:
            dtypes.append(f"{rule.tensor} is {tensor.dtype}")
        elif expected is not None and tensor.shape != expected:
            shapes.append(f"{rule.tensor} is {list(tensor.shape)}, the model needs {list(expected)}")
    unexpected = [
        f"{name} {list(tensor.shape)}" for name, tensor in tensors.items() if name not in used and name not in ignored
    ]
    table = [
        f"{name} filled {sorted(set(filled.get(name, np.zeros(1, int)).flat))} times"
        for name in parameters
        if name not in filled or (filled[name] != 1).any()
    ]
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
    """Return an indented list, cut after SHOWN lines."""
    more = [f"... and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return f"{kind} ({len(lines)}):\n" + "\n".join(f"  {line}" for line in lines[:SHOWN] + more)


def fill(
    rules: Iterable[Rule],
    tensors: Mapping[str, Tensor],
    parameters: Mapping[str, Any],
    progress: Callable[[int, int], None] | None = None,
    places: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the values of the parameters by path, on the default device or in their `places`.

    The input must have passed `check`. Only layers may be stacked, and parameters may be wanted in int8.

    A few parameters are read at the same time. Beyond what the device keeps, the host memory in use at any time is that
    of as many parameters. `progress` is called with the bytes read so far and the bytes in all, by one thread at a
    time.
    """
    table: dict[str, list[Rule]] = {}
    for rule in rules:
        table.setdefault(rule.parameter, []).append(rule)
    sources = by_parameter(table, parameters)
    told = Progress(sum(tensors[rule.tensor].nbytes for some in table.values() for rule in some), progress)

    def rules_of(parameter: str) -> Iterator[tuple[Rule, int | None]]:
        for path, at in sources[parameter].items():
            for rule in table[path]:
                yield rule, at

    def one(parameter: str) -> Any:
        outline, place = parameters[parameter], (places or {}).get(parameter)
        if isinstance(outline, Quantized):
            return in_int8(parameter, BuildingInt8(outline, place))
        dtype = np.dtype(outline.dtype)
        building = Building(outline.shape, dtype, place)
        for (name, _, transform), at in rules_of(parameter):
            tensor = tensors[name]
            if transform.minus:
                a, b = (read_row(tensor, row).astype(np.float32) for row in transform.minus)
                for view in building.views(at, ROW.flat):
                    view.write(0, (a - b)[None])
                told.add(tensor.nbytes)
                continue
            views, row = building.views(at, transform.flat, transform.transposed, transform.part), 0
            for chunk in tensor.chunks():
                # Cast first, because a transposed write of 2-byte items touches half the memory.
                values = cast(chunk, dtype, name)
                for view in views:
                    view.write(row, values)
                row += len(chunk)
                told.add(chunk.nbytes)
        return building.finish()

    def in_int8(parameter: str, building: BuildingInt8) -> Quantized:
        """Fill a parameter in int8.

        A tensor's row becomes a channel: torch has [out, in], and a table's rows are rows.
        """
        for (name, _, transform), at in rules_of(parameter):
            part = transform.part
            values, row = building.values.views(at, transform.flat, transform.transposed, part), 0
            # There is a scale for each channel. The part's axes are those of the channels, if it has any.
            shared = building.scale.views(at, FLAT.flat, part=part)
            for chunk in tensors[name].chunks():
                steps, scale = rounded_rows(chunk, name)
                for views, rows in ((values, steps), (shared, scale)):
                    for view in views:
                        view.write(row, rows)
                row += len(chunk)
                told.add(chunk.nbytes)
        return building.finish()

    return in_threads(one, sources)


def rounded_rows(chunk: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return rows of a tensor in int8, and the scale of each.

    Raises:
        CheckpointError: int8 cannot hold a number.
    """
    wide = cast(chunk, np.dtype(np.float32), name)
    try:
        scale = scales(largest_magnitudes(wide, 1))
    except ValueError as error:
        raise CheckpointError(f"{name} {error}, which int8 cannot hold; load it without quantization") from error
    return rounded(wide, scale), scale[:, 0]


def read_row(tensor: Tensor, row: int) -> np.ndarray:
    """Return a copy of one row of a table.

    Raises:
        IndexError: there is no such row.
    """
    for chunk in tensor.chunks():
        if row < len(chunk):
            return chunk[row].copy()
        row -= len(chunk)
    raise IndexError(f"{tensor.where}: a table of {tensor.shape[0]} rows has no such row")


def cast(chunk: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """Return the chunk in dtype.

    Raises:
        CheckpointError: a number is too large for dtype.
    """
    with np.errstate(over="raise"):
        try:
            return chunk.astype(dtype, copy=False)
        except FloatingPointError as error:
            raise CheckpointError(f"{name} has values too large for {dtype}; choose float32") from error
