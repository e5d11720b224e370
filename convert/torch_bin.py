"""Reads PyTorch's pickled checkpoints, only for `jaxrank convert`. It reads weights only, so no code in them is run."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxrank.convert.tensors import Tensor, rows_per_chunk
from jaxrank.errors import CheckpointError

SINGLE = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"
OLDEST = (2, 6)
"""The oldest version of torch that is used. Before torch 2.6 `weights_only=True` could be bypassed (CVE-2025-32434)."""

DTYPES = {"torch.float64": "F64", "torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16"}


def offers_torch(folder: Path) -> bool:
    """Return whether the folder holds PyTorch weights."""
    return (folder / SINGLE).exists() or (folder / INDEX).exists()


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of pytorch_model.bin, or of the shards that its index lists.

    Raises:
        CheckpointError: torch is missing or too old, or a file is missing or damaged.
    """
    torch = import_torch(folder)
    tensors: dict[str, Tensor] = {}
    for path in files(folder):
        for name, value in load_file(torch, path).items():
            if name in tensors:
                raise CheckpointError(f"{path}: {name} is in another file too; fetch the checkpoint again")
            dtype = DTYPES.get(str(value.dtype), str(value.dtype))
            tensors[name] = Tensor(dtype, tuple(value.shape), path.name, partial(read_chunks, torch, value))
    return tensors


def import_torch(folder: Path) -> Any:
    """Return the torch module.

    Raises:
        CheckpointError: torch is not installed or too old.
    """
    try:
        import torch
    except ImportError as error:
        raise CheckpointError(
            f"{folder} has only PyTorch .bin weights, and reading them needs torch, which is not installed: "
            "pip install torch, or get the model with safetensors weights"
        ) from error
    version = str(torch.__version__)
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        raise CheckpointError(f"torch {version} cannot read .bin files safely; install torch 2.6 or newer")
    return torch


def files(folder: Path) -> list[Path]:
    """Return the .bin files, in order.

    Raises:
        CheckpointError: the index is damaged, or lists a file that is not in the folder.
    """
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    try:
        names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / INDEX} is damaged ({error!r}); fetch it again") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
            raise CheckpointError(f"{folder / INDEX} lists {name!r}, which is no file of the same folder")
    return [folder / name for name in names]


def load_file(torch: Any, path: Path) -> dict[str, Any]:
    """Return one file's tensors by name. They are mapped if the file's format allows it.

    Raises:
        CheckpointError: the file cannot be read, or holds something other than a table of tensors.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a hostile or damaged pickle can fail in any way
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{path} cannot be read as weights ({reason}); it is damaged, or holds more than tensors. Do not trust "
            "it; get the model with safetensors weights"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise CheckpointError(f"{path} holds something other than a table of tensors; get safetensors weights")
    return state


def read_chunks(torch: Any, tensor: Any) -> Iterator[np.ndarray]:
    """Yield the rows of a torch tensor, about CHUNK_BYTES at a time."""
    tensor = tensor.detach().reshape(tensor.shape or (1,))
    rows = rows_per_chunk(tuple(tensor.shape), tensor.element_size())
    for start in range(0, tensor.shape[0], rows):
        chunk = tensor[start : start + rows].contiguous()
        if tensor.dtype == torch.bfloat16:  # numpy() does not know bfloat16
            yield chunk.view(torch.uint16).numpy().view(jnp.bfloat16)
        else:
            yield chunk.numpy()
