"""Published checkpoints into jaxrank's models and folders: the only place that knows Hugging Face's tensor names.

    hub.py            where a model lies: a folder, or an id to download
    safetensors.py    a checked reader of safetensors files
    torch_bin.py      the same for PyTorch's .bin files, for conversion only
    rules.py          tensors into parameters, by a table
    xlm_roberta.py, qwen3.py, qwen3_vl.py    a family's table

`load` serves a published folder as it is, `convert` writes one that needs no conversion.
"""

from __future__ import annotations

import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.typing import DTypeLike
from tqdm import tqdm

from jaxrank import checkpoint
from jaxrank.checkpoint import read_config
from jaxrank.convert import qwen3, qwen3_vl, safetensors, torch_bin, xlm_roberta
from jaxrank.convert.hub import TOKENIZER_FILES, find
from jaxrank.convert.rules import Abstract, Rule, check, fill
from jaxrank.convert.tensors import READABLE, Tensor
from jaxrank.errors import CheckpointError, ModelError
from jaxrank.models import settings_of

__all__ = ["convert", "find", "load", "read_config"]


class Names(NamedTuple):
    """An architecture's tensor names: its table for a configuration, a folder and the names of the tensors in it, and
    tensors that may be left over."""

    rules: Callable[[Any, Path, Collection[str]], list[Rule]]
    ignored: frozenset[str]


NAMES = {
    "XLMRobertaForSequenceClassification": Names(xlm_roberta.rules, xlm_roberta.IGNORED),
    "Qwen3ForCausalLM": Names(qwen3.rules, qwen3.IGNORED),
    "Qwen3ForSequenceClassification": Names(qwen3.classifier_rules, qwen3.IGNORED),
    "Qwen3VLForConditionalGeneration": Names(qwen3_vl.rules, qwen3.IGNORED),
}


def load(
    folder: Path,
    *,
    dtype: DTypeLike | None,
    progress: Callable[[int, int], None] | None = None,
    allow_torch: bool = False,
) -> Any:
    """The model of a published checkpoint's folder, its parameters on the default device.

    dtype: of the matrices (what the model always keeps in float32 stays so); None keeps the checkpoint's. progress is
    called with the bytes read so far and in all. PyTorch's .bin files are read only with allow_torch. Raises
    CheckpointError, which names every tensor that does not fit, or UnsupportedError.
    """
    folder = Path(folder)
    config = read_config(folder)
    _, settings = settings_of(config)
    rules, ignored = NAMES[config["architectures"][0]]
    try:
        tensors = read_tensors(folder, allow_torch)
        model = checkpoint.outline(config, main_dtype(tensors) if dtype is None else dtype)
        table = rules(settings, folder, tensors)
        outlines = {
            path: Abstract(value.shape, np.dtype(value.dtype)) for path, value in checkpoint.parameters(model).items()
        }
        check(table, ignored, tensors, outlines, str(folder))
        return checkpoint.assemble(model, fill(table, tensors, outlines, progress))
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error.strerror or error}") from error


def convert(
    source: str | Path,
    folder: str | Path,
    *,
    dtype: DTypeLike | None = None,
    progress: bool = True,
    overwrite: bool = False,
) -> None:
    """Write a published checkpoint's folder as a folder of jaxrank's own (see jaxrank.checkpoint).

    dtype: of the matrices; None keeps the source's. progress: a bar on stderr. overwrite: replace an earlier
    conversion; nothing else is ever replaced. All is written into a hidden folder beside the target and renamed at the
    end, so the target is whole or not there; a killed conversion leaves that hidden folder behind. Raises ModelError.
    """
    source, folder = Path(source), Path(folder).expanduser().absolute()
    if checkpoint.is_converted(source):
        raise CheckpointError(f"{source} is converted already; name the published checkpoint")
    check_target(folder, overwrite)
    with tqdm(desc="reading", unit="B", unit_scale=True, disable=not progress) as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        model = load(source, dtype=dtype, progress=advance, allow_torch=True)
    hidden = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    try:
        hidden.mkdir(parents=True)
        for name in ("config.json", *TOKENIZER_FILES):
            if (source / name).exists():
                shutil.copyfile(source / name, hidden / name)
        checkpoint.save(hidden, model)
        replace(hidden, folder)
    except OSError as error:
        raise ModelError(f"{folder} could not be written: {error}; nothing was left there") from error
    except CheckpointError as error:  # from save, which names the hidden folder
        raise CheckpointError(f"{str(error).replace(str(hidden), str(folder))}; nothing was left there") from error
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def check_target(folder: Path, overwrite: bool) -> None:
    """Raise CheckpointError unless the folder may be written."""
    if not folder.exists() and not folder.is_symlink():
        return
    if not overwrite:
        raise CheckpointError(f"{folder} exists; choose another folder, or allow overwriting (--overwrite)")
    if folder.is_symlink() or not checkpoint.is_converted(folder):
        raise CheckpointError(f"{folder} is no converted model, so it is not overwritten; choose another folder")


def replace(new: Path, folder: Path) -> None:
    """Rename `new` to `folder`; what was there is set aside first, put back on failure, and else removed."""
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


def read_tensors(folder: Path, allow_torch: bool) -> dict[str, Tensor]:
    """The folder's tensors: safetensors, or .bin files where that is allowed and nothing else is there."""
    tensors = safetensors.read_tensors(folder)
    if tensors is not None:
        return tensors
    if not torch_bin.offers_torch(folder):
        raise CheckpointError(f"{folder} has no weights: neither {safetensors.SINGLE} nor {safetensors.INDEX}")
    if not allow_torch:
        raise CheckpointError(
            f"{folder} has only PyTorch .bin weights, which can hide code; write a folder that needs none with "
            f"`jaxrank convert {folder} NEW_FOLDER` and use that, or get the model with safetensors weights"
        )
    return torch_bin.read_tensors(folder)


def main_dtype(tensors: Mapping[str, Tensor]) -> np.dtype:
    """The dtype that most bytes have, at most float32."""
    sizes: Counter[str] = Counter({"F32": 0})
    for tensor in tensors.values():
        if tensor.dtype in READABLE:
            sizes[tensor.dtype] += tensor.nbytes
    name = sizes.most_common(1)[0][0]
    return READABLE["F32" if name == "F64" else name]
