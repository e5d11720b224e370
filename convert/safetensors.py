"""Reads safetensors files, one or a sharded set: https://huggingface.co/docs/safetensors#format

A file is 8 bytes of header length (little endian), a JSON header, and data. The header is checked completely before any
data is read. So a damaged or forged file is a CheckpointError, and never a crash or a wrong number. Data is read
through a small buffer and not mapped. So memory does not grow with the file, and a file that is cut short while it is
read gives an error and no SIGBUS.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxrank.convert.tensors import READABLE, Tensor, rows_per_chunk
from jaxrank.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
HEADER_LIMIT = 100_000_000

OTHER_BITS = {
    **dict.fromkeys(["I64", "U64", "C64"], 64),
    **dict.fromkeys(["I32", "U32"], 32),
    **dict.fromkeys(["I16", "U16"], 16),
    **dict.fromkeys(["I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0"], 8),
    **dict.fromkeys(["F6_E2M3", "F6_E3M2"], 6),
    "F4": 4,
}
BITS = {name: 8 * dtype.itemsize for name, dtype in READABLE.items()} | OTHER_BITS


class Entry(NamedTuple):
    """One tensor of a file. `begin` and `end` are counted from the file's start."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_tensors(folder: Path) -> dict[str, Tensor] | None:
    """Return all tensors of the folder's model.safetensors, or of the shards that its index lists.

    None if it has neither.

    Every header is checked here. Data is read later, by `Tensor.chunks`.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    if (folder / SINGLE).exists():
        return open_tensors(folder / SINGLE, read_header(folder / SINGLE))
    if not (folder / INDEX).exists():
        return None
    tensors = {}
    for name, expected in read_index(folder / INDEX).items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{folder / INDEX} lists {name}, which does not exist; fetch the checkpoint again")
        entries = read_header(path)
        if different := sorted(expected ^ entries.keys()):
            raise CheckpointError(
                f"{path} and {INDEX} disagree about {some(different)}: the shards are not of one checkpoint; "
                "fetch it again"
            )
        tensors |= open_tensors(path, entries)
    return tensors


def open_tensors(path: Path, entries: dict[str, Entry]) -> dict[str, Tensor]:
    return {
        name: Tensor(entry.dtype, entry.shape, path.name, partial(read_chunks, path, name, entry))
        for name, entry in entries.items()
    }


def read_index(path: Path) -> dict[str, set[str]]:
    """Return the shards that an index lists, each with the names of its tensors.

    Raises:
        CheckpointError: the index is damaged.
    """
    index = parse_json(path, path.read_bytes())
    places = index.get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{path}: weight_map is missing or empty; it must map tensor names to files")
    shards: dict[str, set[str]] = {}
    for name, file in places.items():
        if not isinstance(file, str) or file in ("", ".", "..") or "/" in file or "\\" in file or "\0" in file:
            raise CheckpointError(f"{path}: {name} lies in {file!r}; shards must be files of the same folder")
        shards.setdefault(file, set()).add(name)
    return shards


def read_header(path: Path) -> dict[str, Entry]:
    """Return the entries of a safetensors file by tensor name.

    They are checked: known dtypes, sizes that fit, no gap, no overlap.

    Raises:
        CheckpointError: the file is damaged or cannot be read.
    """
    try:
        with path.open("rb") as file:
            length = path.stat().st_size
            size = int.from_bytes(file.read(8), "little")
            if length < 8 or size > min(HEADER_LIMIT, length - 8):
                raise CheckpointError(
                    f"{path} has {length} bytes and a header of {size}: it is cut short or no safetensors file; "
                    "fetch it again"
                )
            header = parse_json(path, file.read(size))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    header.pop("__metadata__", None)
    entries = {name: parse_entry(path, name, value, 8 + size) for name, value in header.items()}
    check_cover(path, entries, 8 + size, length)
    return entries


def parse_json(path: Path, content: bytes) -> dict[str, Any]:
    """Return an object from JSON in which no key comes twice.

    Raises:
        CheckpointError: the content is not such an object.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a key comes twice")
        return found

    try:
        value = json.loads(content.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: its JSON cannot be read ({error}); fetch it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is damaged: its JSON is no object; fetch it again")
    return value


def parse_entry(path: Path, name: str, value: Any, base: int) -> Entry:
    """Return one entry of a header. `base` is where the data begins.

    Raises:
        CheckpointError: the entry is not valid.
    """
    bad = f"{path}: the header's entry of {name} is damaged"
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{bad}: it must have dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise CheckpointError(f"{bad}: dtype is {dtype!r}; known are {', '.join(BITS)}")
    if not naturals(shape):
        raise CheckpointError(f"{bad}: shape is {shape!r}; it must be a list of sizes")
    if not naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{bad}: data_offsets is {offsets!r}; it must be [begin, end]")
    if math.prod(shape) * BITS[dtype] != (offsets[1] - offsets[0]) * 8:
        raise CheckpointError(f"{bad}: {dtype} {shape} does not fill {offsets[1] - offsets[0]} bytes")
    return Entry(dtype, tuple(shape), base + offsets[0], base + offsets[1])


def naturals(value: Any) -> bool:
    """Return whether value is a list of non-negative ints. True and 1.0 are no ints here."""
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def check_cover(path: Path, entries: dict[str, Entry], begin: int, end: int) -> None:
    """Check that the entries lie side by side from begin to end, the end of the file.

    Raises:
        CheckpointError: there is a gap or an overlap.
    """
    at = begin
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != at:
            what = "overlaps the tensor before it" if entry.begin < at else f"leaves {entry.begin - at} bytes unused"
            raise CheckpointError(f"{path} is damaged: {name} {what}; fetch it again")
        at = entry.end
    if at != end:
        raise CheckpointError(
            f"{path} is damaged: its tensors end at byte {at}, the file at {end}: it is cut short or has bytes to "
            "spare; fetch it again"
        )


def read_chunks(path: Path, name: str, entry: Entry) -> Iterator[np.ndarray]:
    """Yield the rows of one tensor, about CHUNK_BYTES at a time, all in the same buffer.

    Raises:
        CheckpointError: the file ended within the tensor.
    """
    dtype, shape = READABLE[entry.dtype], entry.shape or (1,)
    if entry.begin == entry.end:
        return
    rows = min(shape[0], rows_per_chunk(shape, dtype.itemsize))
    buffer = np.empty((rows, *shape[1:]), dtype)
    with path.open("rb", buffering=0) as file:
        file.seek(entry.begin)
        for start in range(0, shape[0], rows):
            chunk = buffer[: shape[0] - start]
            # Read through a view of bytes, because bfloat16 has no buffer protocol.
            left = chunk.reshape(-1).view(np.uint8).data
            while len(left):
                count = file.readinto(left)
                if not count:
                    raise CheckpointError(f"{path} ended within {name}: it was changed while it was read")
                left = left[count:]
            yield chunk


def some(names: list[str], most: int = 5) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
