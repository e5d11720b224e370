"""jaxrank's own folders: an Orbax checkpoint that needs no conversion, beside the published config and tokenizer.

    config.json, tokenizer files    as published
    weights/                        Orbax (OCDBT), one entry a parameter, such as layers.0.attention.query.kernel
    jaxrank.json                    format version, family, dtype

jaxrank.json is written last: without it the folder does not count.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from jaxrank.errors import CheckpointError, UnsupportedError
from jaxrank.models import FAMILIES, settings_of
from jaxrank.types import Config
from jaxrank.version import __version__

FORMAT = 1
MARK = "jaxrank.json"
WEIGHTS = "weights"

CHUNK_BYTES = 4 << 20
"""Arrays are stored in chunks of at most this size, and restored chunk by chunk. TensorStore's threads keep a few
chunks' memory for good."""

ALIGNMENT = 64
"""At this alignment of host memory the CPU backend takes an array over instead of copying it."""

AGAIN = "convert the model again with `jaxrank convert`"


def is_converted(folder: Path) -> bool:
    """Whether the folder was written by jaxrank, to the end."""
    return (Path(folder) / MARK).is_file()


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
    values = parameters(model)
    mark = {"format": FORMAT, "jaxrank": __version__, "family": names[0], "dtype": main_dtype(values)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_weights(folder / WEIGHTS, values)
        (folder / MARK).write_text(json.dumps(mark, indent=2) + "\n", encoding="utf-8")
    except (OSError, ValueError, RuntimeError) as error:
        # A full disk reaches us as OSError from Python, as ValueError or RuntimeError from TensorStore.
        raise CheckpointError(f"{folder} could not be written: {first_line(error)}") from error


def load(folder: Path, *, dtype: DTypeLike) -> Any:
    """The model of a converted folder, its matrices in dtype. Raises CheckpointError, or UnsupportedError."""
    folder = Path(folder).absolute()
    read_mark(folder)
    model = outline(read_config(folder), dtype)
    try:
        values = read_weights(folder / WEIGHTS, parameters(model))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder / WEIGHTS} is missing, damaged or of another model ({first_line(error)}); {AGAIN}"
        ) from error
    return assemble(model, values)


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
    return mark


def outline(config: Config, dtype: DTypeLike) -> Any:
    """The module that config.json describes, with shapes and dtypes in place of numbers; nothing is allocated.

    Raises UnsupportedError or CheckpointError.
    """
    family, settings = settings_of(config)
    return nnx.eval_shape(lambda: family.module(settings, dtype=dtype, rngs=None))


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


def read_weights(folder: Path, outlines: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The entries of an Orbax checkpoint as arrays of the wanted shapes and dtypes; OSError or ValueError if damaged.

    Read through TensorStore, the storage under Orbax, and not by Orbax's own restore: that one takes up to three
    times the memory, because it reads whole arrays, casts copies of them, and does many at once.
    """
    import tensorstore

    if not folder.is_dir():
        raise ValueError("there is no such folder")
    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": 0}})
    arrays = {}
    # The largest first: what a large one needs for a moment is then not added to all the others.
    for path in sorted(outlines, key=lambda path: -outlines[path].size):
        place = {"driver": "ocdbt", "base": f"file://{folder}/", "path": path.replace("/", ".") + "/"}
        # Without the flag a lost chunk would be read as zeros.
        spec = {"driver": "zarr", "kvstore": place, "fill_missing_data_reads": False}
        stored = tensorstore.open(spec, open=True, context=context).result()
        shape, dtype = outlines[path].shape, np.dtype(outlines[path].dtype)
        if stored.shape != shape:
            raise ValueError(f"{path} is {list(stored.shape)}, config.json makes it {list(shape)}")
        host = host_memory(shape, dtype)
        if not shape:
            host[...] = stored.read().result()
        rows = (stored.chunk_layout.read_chunk.shape or (1,))[0] or 1
        for row in range(0, shape[0] if shape else 0, rows):
            end = min(row + rows, shape[0])
            host[row:end] = stored[row:end].read().result()
        arrays[path] = to_device(host)
    return arrays


def host_memory(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Uninitialised contiguous memory that begins at a multiple of ALIGNMENT."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def to_device(host: np.ndarray) -> jax.Array:
    """The array of `host_memory` on the default device. On CPU it IS that memory, so it must not be written again."""
    host.flags.writeable = False
    # The wait keeps copies for an accelerator from piling up.
    return jax.device_put(host).block_until_ready()


def parameters(model: nnx.Module) -> dict[str, Any]:
    """A model's parameters, arrays or outlines, by path: "layers/0/attention/query/kernel"."""
    return {"/".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(nnx.state(model))}


def assemble(model: nnx.Module, values: Mapping[str, jax.Array]) -> Any:
    """The module of `outline` with its parameters put in."""
    graph, state = nnx.split(model)
    filled = [(path, leaf.replace(values["/".join(map(str, path))])) for path, leaf in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(filled))


def main_dtype(values: Mapping[str, Any]) -> str:
    """The dtype that most of the numbers have."""
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
