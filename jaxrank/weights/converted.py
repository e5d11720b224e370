"""jaxrank's own folders: an Orbax checkpoint that needs no conversion, beside the published config and tokenizer.

    config.json, tokenizer files    as published
    weights/                        Orbax (OCDBT), one entry for each parameter, such as layers.0.attention.qkv.kernel
    jaxrank.json                    format version, family, dtype, quantization

A matrix in int8 has two entries, such as layers.0.attention.qkv.kernel_int8 and kernel_scale.

jaxrank.json is written last. A folder without it is not a converted folder.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jaxrank.errors import CheckpointError, UnsupportedError
from jaxrank.models import FAMILIES, settings_of
from jaxrank.models.layers import stack_layers
from jaxrank.models.quantized import QUANTIZATIONS, Quantized, largest_magnitudes, quantized_outline, rounded, scales
from jaxrank.sharding import MODEL, arranged, placed_order, shardings
from jaxrank.types import Config
from jaxrank.version import __version__
from jaxrank.weights.shards import Building, Part, Progress, View, by_parameter, in_threads

FORMAT = 2
MARK = "jaxrank.json"
WEIGHTS = "weights"

CHUNK_BYTES = 4 << 20
"""Arrays are stored in chunks of at most this size, and restored chunk by chunk.

TensorStore's threads keep the memory of a few chunks until the process ends.
"""

INT8, SCALE = "_int8", "_scale"
"""The suffixes of the names of a quantised parameter's two arrays."""

PIECE_BYTES = 256 * 1024
"""Chunks are cast or rounded in pieces of about this size, which need little memory."""

AGAIN = "convert the model again with `jaxrank convert`"


def is_converted(folder: Path) -> bool:
    """Return whether jaxrank wrote the folder, and finished it."""
    return (Path(folder) / MARK).is_file()


def quantization_of(folder: Path) -> str | None:
    """Return how a folder's weights are quantised already. A folder that is not jaxrank's gives None.

    Raises:
        CheckpointError: jaxrank.json is damaged or of another version.
    """
    return read_mark(folder).get("quantization") if is_converted(folder) else None


def save(folder: Path, model: nnx.Module) -> None:
    """Write the model's parameters into a folder. The folder has, or later gets, the model's config.json and tokenizer.

    Raises:
        CheckpointError: there is a checkpoint already, or the folder cannot be written.
        UnsupportedError: the model is not one of jaxrank's.
    """
    folder = Path(folder).absolute()
    if is_converted(folder) or (folder / WEIGHTS).exists():
        raise CheckpointError(f"{folder} holds a checkpoint already; choose another folder, or remove it")
    names = [name for name, family in FAMILIES.items() if family.module is type(model)]
    if not names:
        raise UnsupportedError(f"a {type(model).__name__} cannot be saved; jaxrank knows {', '.join(FAMILIES)}")
    values = by_path(arranged(nnx.state(model), 1))
    mark = {"format": FORMAT, "jaxrank": __version__, "family": names[0], "dtype": main_dtype(values)}
    mark["quantization"] = QUANTIZATIONS[0] if any(isinstance(value, Quantized) for value in values.values()) else None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_weights(folder / WEIGHTS, arrays_of(values))
        (folder / MARK).write_text(json.dumps(mark, indent=2) + "\n", encoding="utf-8")
    except (OSError, ValueError, RuntimeError) as error:
        # A full disk gives OSError from Python, and ValueError or RuntimeError from TensorStore.
        raise CheckpointError(f"{folder} could not be written: {first_line(error)}") from error


class Load(Protocol):
    """Read a checkpoint that was checked, and return the model.

    Args:
        mesh: the devices that its parameters are spread over. None puts them on the default device.
        stacked: whether its layers are stacked (see models.layers.stack_layers).
        progress: a function that is called with the bytes read so far and the bytes in all.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """

    def __call__(
        self,
        mesh: Mesh | None = None,
        *,
        stacked: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> Any: ...


def load(folder: Path, *, dtype: DTypeLike, quantization: str | None = None, mesh: Mesh | None = None) -> Any:
    """Load the model of a converted folder: `prepare`, and then the call of its result, with their options.

    Raises:
        CheckpointError: as in `prepare`.
        UnsupportedError: as in `prepare`.
    """
    return prepare(folder, dtype=dtype, quantization=quantization)(mesh)


def prepare(folder: Path, *, dtype: DTypeLike, quantization: str | None = None) -> Load:
    """Check a converted folder, without reading the numbers and without a device.

    Args:
        folder: the folder.
        dtype: the dtype of the matrices.
        quantization: "int8" rounds the matrices while they are read. A folder that has them in int8 keeps them so.

    Returns:
        A function that reads the folder.

    Raises:
        CheckpointError: the folder is damaged, or not a converted one.
        UnsupportedError: jaxrank does not implement the model.
    """
    folder = Path(folder).absolute()
    kept = read_mark(folder).get("quantization")
    config = read_config(folder)
    refused = f"{folder / WEIGHTS} is missing, damaged or of another model"
    try:
        stored = open_weights(folder / WEIGHTS, parameters(outline(config, dtype, kept)))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{refused} ({first_line(error)}); {AGAIN}") from error

    def read(
        mesh: Mesh | None = None, *, stacked: bool = False, progress: Callable[[int, int], None] | None = None
    ) -> Any:
        model = outline(config, dtype, quantization or kept, stacked=stacked)
        try:
            outlines = by_path(nnx.state(model))
            return assemble(model, read_weights(stored, outlines, places(model, mesh), orders(model), progress), mesh)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{refused} ({first_line(error)}); {AGAIN}") from error

    return read


def read_config(folder: Path) -> Config:
    """Read the folder's config.json.

    Raises:
        CheckpointError: the file is not there, or is not a JSON object.
    """
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); a model's folder must have one") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no JSON ({error}); fetch it again") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is {type(config).__name__}, not an object; fetch it again")
    return config


def read_mark(folder: Path) -> dict[str, Any]:
    """Read and check the folder's jaxrank.json.

    Raises:
        CheckpointError: the file is missing, damaged, or of another version.
    """
    path = folder / MARK
    try:
        mark = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): no converted folder; {AGAIN}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON ({error}); {AGAIN}") from error
    if not isinstance(mark, dict) or mark.get("format") != FORMAT:
        came = mark.get("format") if isinstance(mark, dict) else mark
        raise CheckpointError(f"{path} says format {came!r}, this jaxrank reads {FORMAT}; {AGAIN}")
    if mark.get("family") not in list(FAMILIES):
        raise CheckpointError(f"{path} says family {mark.get('family')!r}; this jaxrank knows {', '.join(FAMILIES)}")
    if (quantization := mark.get("quantization")) not in (None, *QUANTIZATIONS):
        known = ", ".join(QUANTIZATIONS)
        raise CheckpointError(f"{path} says quantization {quantization!r}; this jaxrank knows {known}; {AGAIN}")
    return mark


def outline(config: Config, dtype: DTypeLike, quantization: str | None = None, *, stacked: bool = False) -> Any:
    """Return the module that config.json describes, with shapes and dtypes in place of numbers. Nothing is allocated.

    Args:
        config: the parsed config.json.
        dtype: the dtype of the matrices.
        quantization: how they are quantised.
        stacked: whether the layers are stacked (see models.layers.stack_layers).

    Raises:
        UnsupportedError: jaxrank does not implement the model.
        CheckpointError: a field of config.json is missing or wrong.
    """
    family, settings = settings_of(config)
    model = nnx.eval_shape(lambda: family.module(settings, dtype=dtype, rngs=None))
    if quantization:
        model = quantized_outline(model)
    if stacked:
        stack_layers(model)
    return model


def write_weights(folder: Path, values: Mapping[str, jax.Array]) -> None:
    """Write an Orbax checkpoint with one entry for each value. It raises the errors of Orbax and TensorStore."""
    import orbax.checkpoint as ocp

    tree = nested(values)
    # The checkpoint is not compressed. Random-looking mantissas shrink by less than a tenth, and the compressor would
    # double the memory that saving takes. The layout is explicit because read_weights relies on it.
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=False, use_compression=False)
    chunked = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), tree)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(folder, args=ocp.args.PyTreeSave(tree, save_args=chunked))


def open_weights(folder: Path, outlines: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of an Orbax checkpoint by path, as TensorStore's arrays. They are not read yet.

    The function uses TensorStore, the storage under Orbax, and not Orbax's own restore. That one takes up to three
    times the memory, because it reads whole arrays, casts copies of them, and does many at once.

    Raises:
        OSError: an entry is missing.
        ValueError: an entry is missing or has another shape.
    """
    import tensorstore

    if not folder.is_dir():
        raise ValueError("there is no such folder")
    # One chunk is decoded at a time. More threads would keep chunks of memory, and copying does not take long.
    limits = {"cache_pool": {"total_bytes_limit": 0}, "data_copy_concurrency": {"limit": 1}}
    context = tensorstore.Context(limits)
    opened = {}
    for path in outlines:
        place = {"driver": "ocdbt", "base": f"file://{folder}/", "path": path.replace("/", ".") + "/"}
        # Without the flag a lost chunk would be read as zeros.
        spec = {"driver": "zarr", "kvstore": place, "fill_missing_data_reads": False}
        opened[path] = tensorstore.open(spec, open=True, context=context)
    stored = {path: future.result() for path, future in opened.items()}
    for path, entry in stored.items():
        if entry.shape != outlines[path].shape:
            raise ValueError(f"{path} is {list(entry.shape)}, config.json makes it {list(outlines[path].shape)}")
    return stored


def read_weights(
    stored: Mapping[str, Any],
    outlines: Mapping[str, Any],
    places: Mapping[str, Any] | None = None,
    orders: Mapping[str, Part] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Read what `open_weights` opened, as values of the wanted shapes and dtypes.

    Args:
        stored: the opened entries, by path.
        outlines: the shapes and dtypes of the values. Layers may be stacked in them. A matrix that is stored in a wide
            dtype may be wanted in int8.
        places: the shardings of the values that are not on the default device.
        orders: the column order of the values whose columns devices share (see `orders`).
        progress: a function that is called with the bytes read so far and the bytes in all.

    Raises:
        OSError: the checkpoint is damaged.
        ValueError: the checkpoint is damaged.
    """
    told = Progress(sum(entry.size * entry.dtype.numpy_dtype.itemsize for entry in stored.values()), progress)
    # A parameter in int8 has two entries. Their names are its own name with a suffix.
    sources = by_parameter({path.removesuffix(SCALE).removesuffix(INT8): None for path in stored}, outlines)

    def pieces(path: str) -> Iterator[tuple[int, np.ndarray]]:
        """Yield an entry piece by piece, with the first row of each."""
        entry = stored[path]
        rows = (entry.chunk_layout.read_chunk.shape or (1,))[0] or 1
        for row in range(0, entry.shape[0] if entry.shape else 1, rows):
            some = entry[row : min(row + rows, entry.shape[0])] if entry.shape else entry
            chunk = np.atleast_1d(some.read().result())
            step = max(1, PIECE_BYTES * len(chunk) // max(1, chunk.nbytes))
            for start in range(0, len(chunk), step):
                yield row + start, chunk[start : start + step]

    def copy(path: str, views: list[View]) -> None:
        for row, piece in pieces(path):
            for view in views:
                view.write(row, piece)
            told.add(piece.nbytes)

    def one(parameter: str) -> Any:
        outline, place, part = outlines[parameter], (places or {}).get(parameter), (orders or {}).get(parameter)
        if not isinstance(outline, Quantized):
            building = Building(outline.shape, np.dtype(outline.dtype), place)
            for path, at in sources[parameter].items():
                copy(path, building.views(at, part=part))
            return building.finish()
        building = BuildingInt8(outline, place)
        for path, at in sources[parameter].items():
            if path not in stored:
                copy(path + INT8, building.values.views(at, part=part))
                copy(path + SCALE, building.scale.views(at, part=part))
                continue
            scale = scale_of(pieces(path), outline.scale.shape[0 if at is None else 1 :], path)
            for view in building.scale.views(at, part=part):
                view.write(0, scale)
            for row, piece in pieces(path):
                own = scale if len(scale) == 1 else scale[row : row + len(piece)]
                for view in building.values.views(at, part=part):
                    view.write(row, rounded(piece.astype(np.float32, copy=False), own))
                told.add(piece.nbytes)
        return building.finish()

    return in_threads(one, sources)


def scale_of(pieces: Iterator[tuple[int, np.ndarray]], shape: tuple[int, ...], name: str) -> np.ndarray:
    """Return the scales of an array that comes in pieces. An axis of size 1 in `shape` shares one scale.

    Raises:
        ValueError: a number is not finite. The message has the name.
    """
    axes = [axis for axis, size in enumerate(shape) if size == 1]
    largest = np.zeros(shape, np.float32)
    for row, piece in pieces:
        own = largest if shape[0] == 1 else largest[row : row + len(piece)]
        np.maximum(own, largest_magnitudes(piece.astype(np.float32, copy=False), axes), out=own)
    try:
        return scales(largest)
    except ValueError as error:
        raise ValueError(f"{name} {error}") from error


class BuildingInt8:
    """A parameter in int8 and its scales, while they are filled.

    Args:
        outline: the parameter's shapes.
        place: its shardings, as in `places`.
    """

    def __init__(self, outline: Quantized, place: Quantized | None) -> None:
        self.outline = outline
        self.values = Building(outline.values.shape, np.dtype(np.int8), None if place is None else place.values)
        self.scale = Building(outline.scale.shape, np.dtype(np.float32), None if place is None else place.scale)

    def finish(self) -> Quantized:
        """Return both on their devices."""
        return replace(self.outline, values=self.values.finish(), scale=self.scale.finish())


def places(model: nnx.Module, mesh: Mesh | None) -> dict[str, Any]:
    """Return where a model's parameters lie on the mesh, by path.

    One in int8 has two shardings. Without a mesh there are none.
    """
    return {} if mesh is None else by_path(shardings(nnx.state(model), mesh))


def orders(model: nnx.Module) -> dict[str, Part]:
    """Return how columns of stored arrays go to the devices that share them, by path.

    Only parameters that have members are listed (see sharding.arranged).
    """
    found = {}
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        metadata = leaf.get_metadata()
        if (members := metadata.get("members", 1)) > 1:
            found["/".join(map(str, path))] = Part(metadata["shard"], partial(placed_order, members))
    return found


def by_path(state: Any) -> dict[str, Any]:
    """Return the values of a state's parameters by path, such as "layers/0/attention/qkv/kernel"."""
    return {"/".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}


def parameters(model: nnx.Module) -> dict[str, Any]:
    """Return a model's arrays, or outlines of arrays, by path. A parameter in int8 has two."""
    return arrays_of(by_path(nnx.state(model)))


def arrays_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values by path, with two entries for one in int8."""
    arrays: dict[str, Any] = {}
    for path, value in values.items():
        parts = {INT8: value.values, SCALE: value.scale} if isinstance(value, Quantized) else {"": value}
        arrays.update({path + end: part for end, part in parts.items()})
    return arrays


def assemble(model: nnx.Module, values: Mapping[str, Any], mesh: Mesh | None = None) -> Any:
    """Return the module of `outline` with its parameters put in, arranged for the mesh's devices."""
    graph, state = nnx.split(model)
    shards = 1 if mesh is None else mesh.shape[MODEL]
    filled = [
        (path, leaf.replace(values["/".join(map(str, path))], shards=shards)) for path, leaf in nnx.to_flat_state(state)
    ]
    return nnx.merge(graph, nnx.from_flat_state(filled))


def main_dtype(values: Mapping[str, Any]) -> str:
    """Return the dtype that most of the numbers have, or stand for."""
    sizes: Counter[str] = Counter()
    for value in values.values():
        sizes[str(value.dtype)] += value.size
    return sizes.most_common(1)[0][0]


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return {"layers/0/norm": x} as {"layers": {"0": {"norm": x}}}."""
    tree: dict[str, Any] = {}
    for path, value in values.items():
        *folders, name = path.split("/")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = value
    return tree


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's text.

    If it is long, its middle is cut out: TensorStore's reason is at the end.
    """
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if len(line) < 300 else f"{line[:120]} ... {line[-160:]}"
