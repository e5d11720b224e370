"""Parameters are put together in host memory from pieces of files, with each device's part by itself.

What is read goes straight into the memory of the devices' parts. So a parameter is whole only where a device keeps all
of it. Devices that keep the same part share its memory until they have it. On CPU they share it afterwards too.
Parameters of stacked layers are filled one place after the other.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.sharding import Sharding
from tqdm import tqdm

ALIGNMENT = 64
"""With host memory at this alignment, the CPU backend uses an array in place instead of copying it."""

READERS = 2
"""The number of parameters that are read at the same time. Most of the time goes into the first use of new memory."""

Shape = tuple[int, ...]
Result = TypeVar("Result")


class Slot(NamedTuple):
    """Where an entry of a file goes: a parameter, and for stacked layers the place on its leading axis."""

    parameter: str
    place: int | None = None


def slot_of(path: str, parameters: Mapping[str, Any]) -> Slot:
    """Return the slot of a path such as layers/3/norm/scale, in parameters whose layers are stacked or not."""
    names = path.split("/")
    numbers = [at for at, name in enumerate(names) if name.isdigit()]
    if path not in parameters:
        for at in reversed(numbers):  # the last number: of stages/0/3/up, layer 3 is stacked, the stage is not
            if (stacked := "/".join(names[:at] + names[at + 1 :])) in parameters:
                return Slot(stacked, int(names[at]))
    return Slot(path)


def by_parameter(paths: Iterable[str], parameters: Mapping[str, Any]) -> dict[str, dict[str, int | None]]:
    """Return the paths that fill each parameter, with their places. The largest parameter comes first.

    A large parameter needs extra memory for a moment. In this order it is not added to the memory of all the others.
    """
    found: dict[str, dict[str, int | None]] = {}
    for path in paths:
        slot = slot_of(path, parameters)
        found.setdefault(slot.parameter, {})[path] = slot.place
    return dict(sorted(found.items(), key=lambda item: -math.prod(parameters[item[0]].shape)))


class Part(NamedTuple):
    """A tensor that holds only some of a parameter's entries along one axis, or has them in another order.

    Attributes:
        axis: the axis of the parameter, counted from the last.
        order: a function of the axis's size and the number of devices that share it. It gives the tensor's index of
            each entry, in the order of placed columns (see sharding.arranged). An entry that another tensor has gets
            -1.
    """

    axis: int
    order: Callable[[int, int], np.ndarray]


class View:
    """One device's part of a parameter, or of a place of it, in the layout of the tensor that fills it.

    Axes of the part are flattened, and the result is transposed if necessary. The part has some runs of the tensor's
    rows or columns.

    Args:
        memory: the memory of the part.
        shape: the shape of the whole.
        cut: the device's range of each axis. At most one is not the whole axis, and only axes of size 1 are flattened
            into that one.
        flat: a function that flattens a shape.
        transposed: whether the tensor is transposed.
        part: set where the tensor holds only a part of the parameter.
    """

    def __init__(
        self,
        memory: np.ndarray,
        shape: Shape,
        cut: list[range],
        flat: Callable[[Shape], Shape],
        transposed: bool,
        part: Part | None = None,
    ) -> None:
        whole, together = flat(shape), memory.reshape(flat(memory.shape))
        self.array = np.atleast_1d(together.T if transposed else together)
        self.axis, self.runs = 0, [(0, 0, len(self.array))]
        narrow = [i for i, (size, mine) in enumerate(zip(shape, cut, strict=True)) if len(mine) < size]
        if part is not None and shape[part.axis] == 1:  # this is a scale that holds for all of it
            part = None
        if part is None and not narrow:
            return
        at = narrow[0] if part is None else len(shape) + part.axis
        mine = slice(cut[at].start, cut[at].stop)
        shards = shape[at] // len(cut[at])
        self.runs = runs_of((np.arange(shape[at]) if part is None else part.order(shape[at], shards))[mine])
        axis = at - len(shape) + len(whole)  # only axes of size 1 are flattened into it
        self.axis = len(whole) - 1 - axis if transposed else axis

    def write(self, first: int, rows: np.ndarray) -> None:
        """Copy the part's share of consecutive rows of the tensor, from row `first` on."""
        for theirs, ours, length in self.runs:
            if self.axis == 0:
                start, end = max(first, theirs), min(first + len(rows), theirs + length)
                if start < end:
                    self.array[ours + start - theirs : ours + end - theirs] = rows[start - first : end - first]
            else:
                skip = (slice(None),) * (self.axis - 1)
                mine = self.array[first : first + len(rows)]
                mine[:, *skip, ours : ours + length] = rows[:, *skip, theirs : theirs + length]


def runs_of(index: np.ndarray) -> list[tuple[int, int, int]]:
    """Return (first of theirs, first of ours, length) of each run.

    In a run the tensor's indices of our entries count up. Entries of -1 are in no run.
    """
    borders = np.flatnonzero((np.diff(index) != 1) | (index[:-1] < 0)) + 1
    starts = [0, *borders.tolist()]
    lengths = np.diff([*starts, len(index)]).tolist()
    return [(int(index[at]), at, n) for at, n in zip(starts, lengths, strict=True) if index[at] >= 0]


class Building:
    """A parameter that is being filled, for the default device or spread as `place` says."""

    def __init__(self, shape: Shape, dtype: np.dtype, place: Sharding | None = None) -> None:
        self.shape, self.place = shape, place
        cuts: dict[Any, tuple[slice, ...]] = {None: (slice(None),) * len(shape)}
        if place is not None:
            cuts = {device: cut or () for device, cut in place.addressable_devices_indices_map(shape).items()}
        self.devices: dict[Any, tuple[range, ...]] = {
            device: tuple(range(*one.indices(size)) for one, size in zip(cut, shape, strict=True))
            for device, cut in cuts.items()
        }
        self.parts = {cut: host_memory(tuple(map(len, cut)), dtype) for cut in set(self.devices.values())}

    def views(
        self,
        place: int | None,
        flat: Callable[[Shape], Shape] = lambda shape: shape,
        transposed: bool = False,
        part: Part | None = None,
    ) -> list[View]:
        """Return the devices' parts of the parameter, or of its place `place`, in the layout of the tensor that
        fills it."""
        skip = 0 if place is None else 1
        return [
            # the dots make a view of a single number too
            View(
                memory if place is None else memory[place, ...], self.shape[skip:], list(cut[skip:]), flat, transposed,
                part,
            )
            for cut, memory in self.parts.items()
        ]  # fmt: skip

    def finish(self) -> jax.Array:
        """Return the array on its devices.

        On CPU it IS the memory that was filled. So that memory must not be written again.
        """
        for memory in self.parts.values():
            memory.flags.writeable = False
        arrays = [jax.device_put(self.parts[cut], device) for device, cut in self.devices.items()]
        jax.block_until_ready(arrays)  # so that copies for an accelerator do not add up
        if self.place is None:
            return arrays[0]
        return jax.make_array_from_single_device_arrays(self.shape, self.place, arrays)


class Progress:
    """Count the bytes done, and report them with the bytes in all to `tell`, from one thread at a time."""

    def __init__(self, total: int, tell: Callable[[int, int], None] | None) -> None:
        self.total, self.done, self.tell, self.lock = total, 0, tell, threading.Lock()

    def add(self, count: int) -> None:
        with self.lock:
            self.done += count
            if self.tell:
                self.tell(self.done, self.total)


@contextlib.contextmanager
def byte_bar(said: str, *, disable: bool | None = None) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar on stderr. It is called with the bytes done and the bytes in all.

    Args:
        said: the label of the bar.
        disable: whether to hide the bar. None shows it only on a terminal.
    """
    with tqdm(desc=said, unit="B", unit_scale=True, disable=disable) as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield advance


def in_threads(work: Callable[[str], Result], names: Iterable[str]) -> dict[str, Result]:
    """Return work(name) for all names. READERS of them run at a time, and the first exception ends it."""
    with ThreadPoolExecutor(READERS) as pool:
        futures = {name: pool.submit(work, name) for name in names}
        try:
            return {name: future.result() for name, future in futures.items()}
        finally:
            pool.shutdown(cancel_futures=True)


def host_memory(shape: Shape, dtype: np.dtype) -> np.ndarray:
    """Return uninitialised contiguous memory that begins at a multiple of ALIGNMENT."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)
