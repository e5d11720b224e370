"""Turns published checkpoints into jaxrank's models and folders. Only this package knows Hugging Face's tensor names.

    hub.py            where a model lies: a folder, or an id to download
    safetensors.py    a checked reader of safetensors files
    torch_bin.py      the same for PyTorch's .bin files, for conversion only
    rules.py          tensors into parameters, by a table
    xlm_roberta.py, qwen3.py, qwen3_vl.py    a family's table

`load` loads a published folder as it is. `convert` writes a folder that needs no conversion.
"""

from __future__ import annotations

import contextlib
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jaxrank.convert import qwen3, qwen3_vl, safetensors, torch_bin, xlm_roberta
from jaxrank.convert.hub import FORMATS, SETTINGS, TOKENIZER_FILES, find
from jaxrank.convert.rules import Rule, check, fill
from jaxrank.convert.tensors import READABLE, Tensor
from jaxrank.errors import CheckpointError, ModelError
from jaxrank.models import settings_of
from jaxrank.models.quantized import check_quantization
from jaxrank.weights import converted as checkpoint
from jaxrank.weights.converted import Load, read_config
from jaxrank.weights.shards import byte_bar

__all__ = ["FORMATS", "SETTINGS", "convert", "find", "load", "prepare", "read_config"]


class Names(NamedTuple):
    """The tensor names of an architecture.

    They are its table for a configuration, a folder and the names of the tensors in it, and the tensors that may be
    left over.
    """

    rules: Callable[[Any, Path, Collection[str]], list[Rule]]
    ignored: frozenset[str]


NAMES = {
    "XLMRobertaForSequenceClassification": Names(xlm_roberta.rules, xlm_roberta.IGNORED),
    "Qwen3ForCausalLM": Names(qwen3.rules, qwen3.IGNORED),
    "Qwen3ForSequenceClassification": Names(qwen3.classifier_rules, qwen3.IGNORED),
    "Qwen3VLForConditionalGeneration": Names(qwen3_vl.rules, qwen3.IGNORED),
}


def load(folder: Path, *, dtype: DTypeLike | None, mesh: Mesh | None = None, **options: Any) -> Any:
    """Load the model of a published checkpoint's folder: `prepare`, and then the call of its result, with their
    options.

    Raises:
        CheckpointError: as in `prepare`.
        UnsupportedError: as in `prepare`.
    """
    of_prepare = {name: options.pop(name) for name in ("formats", "quantization") if name in options}
    return prepare(folder, dtype=dtype, **of_prepare)(mesh, **options)


def prepare(
    folder: Path,
    *,
    dtype: DTypeLike | None,
    quantization: str | None = None,
    formats: Sequence[str] = ("safetensors",),
) -> Load:
    """Check a published checkpoint's folder, without reading the numbers and without a device.

    Args:
        folder: the folder.
        dtype: the dtype of the matrices. What the model always keeps in float32 stays so. None keeps the checkpoint's
            dtype.
        quantization: "int8" rounds matrices while they are read (see models.quantized).
        formats: formats of hub.FORMATS. The first one that is there is read.

    Returns:
        A function that reads the folder.

    Raises:
        CheckpointError: tensors are missing or do not fit. The message names every one.
        UnsupportedError: jaxrank does not implement the model.
    """
    folder = Path(folder)
    config = read_config(folder)
    _, settings = settings_of(config)
    rules, ignored = NAMES[config["architectures"][0]]
    with readable(folder):
        tensors = read_tensors(folder, formats)
        dtype = main_dtype(tensors) if dtype is None else dtype
        table = rules(settings, folder, tensors)
        check(table, ignored, tensors, checkpoint.parameters(checkpoint.outline(config, dtype)), str(folder))

    def read(
        mesh: Mesh | None = None, *, stacked: bool = False, progress: Callable[[int, int], None] | None = None
    ) -> Any:
        model = checkpoint.outline(config, dtype, quantization, stacked=stacked)
        outlines, places = checkpoint.by_path(nnx.state(model)), checkpoint.places(model, mesh)
        with readable(folder):
            return checkpoint.assemble(model, fill(table, tensors, outlines, progress, places), mesh)

    return read


@contextlib.contextmanager
def readable(folder: Path) -> Iterator[None]:
    """Raise CheckpointError in place of an OSError."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error.strerror or error}") from error


def convert(
    source: str | Path,
    folder: str | Path,
    *,
    dtype: DTypeLike | None = None,
    quantization: str | None = None,
    progress: bool = True,
    overwrite: bool = False,
) -> None:
    """Write a published checkpoint's folder as a folder of jaxrank's own (see jaxrank.weights.converted).

    All is written into a hidden folder beside the target and renamed at the end. So the target is complete or not
    there. A killed conversion leaves that hidden folder behind.

    Args:
        source: the published checkpoint's folder.
        folder: the target.
        dtype: the dtype of the matrices. None keeps the source's dtype.
        quantization: "int8" or None.
        progress: whether a bar is shown on stderr.
        overwrite: whether an earlier conversion is replaced. Nothing else is ever replaced.

    Raises:
        ModelError: the source cannot be read, or the target cannot be written.
        RequestError: an argument has a value that is not allowed.
    """
    check_quantization(quantization)
    source, folder = Path(source), Path(folder).expanduser().absolute()
    if checkpoint.is_converted(source):
        raise CheckpointError(f"{source} is converted already; name the published checkpoint")
    check_target(folder, overwrite)
    with byte_bar("reading", disable=not progress) as advance:
        model = load(source, dtype=dtype, quantization=quantization, formats=FORMATS, progress=advance)
    hidden = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    try:
        hidden.mkdir(parents=True)
        for name in ("config.json", SETTINGS, *TOKENIZER_FILES):
            if (source / name).exists():
                shutil.copyfile(source / name, hidden / name)
        checkpoint.save(hidden, model)
        replace(hidden, folder)
    except OSError as error:
        raise ModelError(f"{folder} could not be written: {error}; nothing was left there") from error
    except CheckpointError as error:  # from save; its message names the hidden folder
        raise CheckpointError(f"{str(error).replace(str(hidden), str(folder))}; nothing was left there") from error
    finally:
        for _ in range(20):  # after one failed write, TensorStore's threads may continue others
            if not hidden.exists():
                break
            shutil.rmtree(hidden, ignore_errors=True)
            time.sleep(0.1)


def check_target(folder: Path, overwrite: bool) -> None:
    """Check that the folder may be written.

    Raises:
        CheckpointError: it may not.
    """
    if not folder.exists() and not folder.is_symlink():
        return
    if not overwrite:
        raise CheckpointError(f"{folder} exists; choose another folder, or allow overwriting (--overwrite)")
    if folder.is_symlink() or not checkpoint.is_converted(folder):
        raise CheckpointError(f"{folder} is no converted model, so it is not overwritten; choose another folder")


def replace(new: Path, folder: Path) -> None:
    """Rename `new` to `folder`.

    An existing folder is moved aside first. It is moved back on failure, and else removed.
    """
    old = new.with_name(new.name + ".old")
    if folder.exists():
        folder.rename(old)
    try:
        new.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def read_tensors(folder: Path, formats: Sequence[str]) -> dict[str, Tensor]:
    """Return the folder's tensors, in the first of these formats that it has.

    Raises:
        CheckpointError: there are no such weights.
    """
    tensors = safetensors.read_tensors(folder) if "safetensors" in formats else None
    if tensors is not None:
        return tensors
    if torch_bin.offers_torch(folder):
        if "torch" in formats:
            return torch_bin.read_tensors(folder)
        raise CheckpointError(
            f"{folder} has only PyTorch .bin weights, which can hide code; write a folder that needs none with "
            f"`jaxrank convert {folder} NEW_FOLDER` and use that, or get the model with safetensors weights"
        )
    lacking = " or ".join(f"{MAIN_FILES[name][0]} (or {MAIN_FILES[name][1]})" for name in formats)
    held = [name for name in FORMATS if any((folder / file).exists() for file in MAIN_FILES[name])]
    held += ["orbax"] if checkpoint.is_converted(folder) else []
    hint = f"; there are weights of load format {' and '.join(held)}" if held else ""
    raise CheckpointError(f"{folder} has no weights to load: no {lacking}{hint}")


MAIN_FILES = {
    "safetensors": (safetensors.SINGLE, safetensors.INDEX),
    "torch": (torch_bin.SINGLE, torch_bin.INDEX),
}
"""The file that a folder of each format has, or the file that a sharded set has."""


def main_dtype(tensors: Mapping[str, Tensor]) -> np.dtype:
    """Return the dtype that most bytes have, at most float32."""
    sizes: Counter[str] = Counter({"F32": 0})
    for tensor in tensors.values():
        if tensor.dtype in READABLE:
            sizes[tensor.dtype] += tensor.nbytes
    name = sizes.most_common(1)[0][0]
    return READABLE["F32" if name == "F64" else name]
