"""jaxrank's own folders: an Orbax checkpoint that needs no conversion, beside the published config and tokenizer.

    config.json, tokenizer files    as published
    weights/                        Orbax (OCDBT), one entry a parameter, such as layers.0.attention.qkv.kernel
    jaxrank.json                    format version, family, dtype, quantization

A matrix in int8 has two entries, such as layers.0.attention.qkv.kernel_int8 and kernel_scale.

jaxrank.json is written last: without it the folder does not count.
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
"""Arrays are stored in chunks of at most this size, and restored chunk by chunk. TensorStore's threads keep a few
chunks' memory for good."""

INT8, SCALE = "_int8", "_scale"
"""What the names of a quantised parameter's two arrays end in."""

PIECE_BYTES = 256 * 1024
"""Chunks are cast or rounded in pieces of about this size, for which little memory is needed."""

AGAIN = "convert the model again with `jaxrank convert`"


def is_converted(folder: Path) -> bool:
    """Whether the folder was written by jaxrank, to the end."""
    return (Path(folder) / MARK).is_file()


def quantization_of(folder: Path) -> str | None:
    """How a folder's weights are quantised already: never, if it is not jaxrank's. CheckpointError as `load` has it."""
    return read_mark(folder).get("quantization") if is_converted(folder) else None


def save(folder: Path, model: nnx.Module) -> None:
    """Write the model's parameters into a folder, which has or gets the model's config.json and tokenizer.

    Raises CheckpointError if there is one already, or if it cannot be written; UnsupportedError if the model is none
    of jaxrank's.
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
        # A full disk reaches us as OSError from Python, as ValueError or RuntimeError from TensorStore.
        raise CheckpointError(f"{folder} could not be written: {first_line(error)}") from error


class Load(Protocol):
    """Reads a checkpoint that was checked: the model with its parameters on the default device or spread over a mesh.

    stacked: with its layers stacked (see models.layers.stack_layers). progress is called with the bytes read so far and
    in all. Raises CheckpointError.
    """

    def __call__(
        self,
        mesh: Mesh | None = None,
        *,
        stacked: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> Any: ...


def load(folder: Path, *, dtype: DTypeLike, quantization: str | None = None, mesh: Mesh | None = None) -> Any:
    """The model of a converted folder: `prepare` and what it returns, with their options."""
    return prepare(folder, dtype=dtype, quantization=quantization)(mesh)


def prepare(folder: Path, *, dtype: DTypeLike, quantization: str | None = None) -> Load:
    """Check a converted folder, without a look at the numbers and without a device; what is returned reads it.

    dtype: of the matrices. quantization: "int8" rounds them while they are read; a folder that has them so keeps them.
    Raises CheckpointError, or UnsupportedError.
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
    """The folder's config.json; CheckpointError if it is not there or no JSON object."""
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
    """The folder's jaxrank.json, checked."""
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
    """The module that config.json describes, with shapes and dtypes in place of numbers; nothing is allocated.

    stacked: with its layers stacked (see models.layers.stack_layers). Raises UnsupportedError or CheckpointError.
    """
    family, settings = settings_of(config)
    model = nnx.eval_shape(lambda: family.module(settings, dtype=dtype, rngs=None))
    if quantization:
        model = quantized_outline(model)
    if stacked:
        stack_layers(model)
    return model


def write_weights(folder: Path, values: Mapping[str, jax.Array]) -> None:
    """Write an Orbax checkpoint with one entry a value; raises whatever Orbax and TensorStore raise."""
    import orbax.checkpoint as ocp

    tree = nested(values)
    # Not compressed: random-looking mantissas shrink by less than a tenth, and the compressor would double the memory
    # that saving takes. The layout is spelled out because read_weights relies on it.
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=False, use_compression=False)
    chunked = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), tree)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(folder, args=ocp.args.PyTreeSave(tree, save_args=chunked))


def open_weights(folder: Path, outlines: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of an Orbax checkpoint by path, as TensorStore's arrays, not read yet.

    OSError or ValueError if one is missing or has another shape.

    Through TensorStore, the storage under Orbax, and not by Orbax's own restore: that one takes up to three times the
    memory, because it reads whole arrays, casts copies of them, and does many at once.
    """
    import tensorstore

    if not folder.is_dir():
        raise ValueError("there is no such folder")
    # one chunk decoded at a time: further threads would keep chunks of memory, and copying is not what takes long
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
    """What `open_weights` opened, as values of the wanted shapes and dtypes; OSError or ValueError if damaged.

    outlines: of the values, where layers may be stacked, and what is stored whole may be wanted in int8. places: where
    those lie that are not on the default device. orders: of those whose columns devices share out (see `orders`).
    """
    told = Progress(sum(entry.size * entry.dtype.numpy_dtype.itemsize for entry in stored.values()), progress)
    # an entry in int8 has the name of what it stands for, and two of its own
    sources = by_parameter({path.removesuffix(SCALE).removesuffix(INT8): None for path in stored}, outlines)

    def pieces(path: str) -> Iterator[tuple[int, np.ndarray]]:
        """An entry piece by piece, with the first row of each."""
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
    """The scales of an array that comes in pieces; those axes share one that have size 1. ValueError with the name."""
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
    """A parameter in int8 and its scales, as they are filled; place: as `places` has it."""

    def __init__(self, outline: Quantized, place: Quantized | None) -> None:
        self.outline = outline
        self.values = Building(outline.values.shape, np.dtype(np.int8), None if place is None else place.values)
        self.scale = Building(outline.scale.shape, np.dtype(np.float32), None if place is None else place.scale)

    def finish(self) -> Quantized:
        """Both on their devices."""
        return replace(self.outline, values=self.values.finish(), scale=self.scale.finish())


def places(model: nnx.Module, mesh: Mesh | None) -> dict[str, Any]:
    """Where a model's parameters lie on the mesh, by path, two shardings for one in int8; none without a mesh."""
    return {} if mesh is None else by_path(shardings(nnx.state(model), mesh))


def orders(model: nnx.Module) -> dict[str, Part]:
    """How columns of stored arrays go to the devices that share them, by path of the parameters that have members (see
    sharding.arranged)."""
    found = {}
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        metadata = leaf.get_metadata()
        if (members := metadata.get("members", 1)) > 1:
            found["/".join(map(str, path))] = Part(metadata["shard"], partial(placed_order, members))
    return found


def by_path(state: Any) -> dict[str, Any]:
    """What a state's parameters hold, by path: "layers/0/attention/qkv/kernel"."""
    return {"/".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}


def parameters(model: nnx.Module) -> dict[str, Any]:
    """A model's arrays, or outlines of arrays, by path; two for a parameter in int8."""
    return arrays_of(by_path(nnx.state(model)))


def arrays_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by path, with two entries for one in int8."""
    arrays: dict[str, Any] = {}
    for path, value in values.items():
        parts = {INT8: value.values, SCALE: value.scale} if isinstance(value, Quantized) else {"": value}
        arrays.update({path + end: part for end, part in parts.items()})
    return arrays


def assemble(model: nnx.Module, values: Mapping[str, Any], mesh: Mesh | None = None) -> Any:
    """The module of `outline` with its parameters put in, arranged for the mesh's devices."""
    graph, state = nnx.split(model)
    shards = 1 if mesh is None else mesh.shape[MODEL]
    filled = [
        (path, leaf.replace(values["/".join(map(str, path))], shards=shards)) for path, leaf in nnx.to_flat_state(state)
    ]
    return nnx.merge(graph, nnx.from_flat_state(filled))


def main_dtype(values: Mapping[str, Any]) -> str:
    """The dtype that most of the numbers have, or stand for."""
    sizes: Counter[str] = Counter()
    for value in values.values():
        sizes[str(value.dtype)] += value.size
    return sizes.most_common(1)[0][0]


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """{"layers/0/norm": x} as {"layers": {"0": {"norm": x}}}."""
    tree: dict[str, Any] = {}
    for path, value in values.items():
        *folders, name = path.split("/")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = value
    return tree


def first_line(error: BaseException) -> str:
    """What an exception says on its first line, the middle cut out if long: TensorStore ends with the reason."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if len(line) < 300 else f"{line[:120]} ... {line[-160:]}"
