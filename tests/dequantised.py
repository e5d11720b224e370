"""A published checkpoint with int8's rounding written out, by code that shares nothing with jaxrank's."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

ROUNDED = re.compile(
    r"roberta\.encoder\.layer\.\d+\..*(query|key|value|dense)\.weight|.*word_embeddings\.weight|"
    r"model\.(language_model\.)?(embed_tokens|layers\.\d+\..*_proj)\.weight"
)
"""Matrices of the layers and the table of words; not heads, norms, positions and the vision tower."""


def round_rows(weight: np.ndarray) -> np.ndarray:
    """Rows (output channels, or words) in 255 steps that are symmetric about 0, as float32 again.

    In float64 but for the quotient, whose nearest float32 is what is rounded: of some 100,000 weights one lies so close
    to the middle of two steps that it matters.
    """
    rows = []
    for row in weight.astype(np.float64):
        step = np.float64(np.float32(np.abs(row).max() / 127)) or 1.0
        rows.append(np.round((row / step).astype(np.float32)) * step)
    return np.stack(rows).astype(np.float32)


def dequantised(folder: Path, out: Path) -> Path:
    """The folder with every matrix that int8 is for rounded, and a head of its own, which is not."""
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    for name in [name for name in tensors if name.endswith("embed_tokens.weight")]:
        tensors.setdefault("lm_head.weight", tensors[name].clone())
    rounded = [name for name in tensors if ROUNDED.fullmatch(name)]
    for name in rounded:
        tensors[name] = torch.from_numpy(round_rows(tensors[name].numpy()))
    assert len(rounded) > 6
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    for part in (config, config.get("text_config", {})):
        part["tie_word_embeddings"] = False
    (out / "config.json").write_text(json.dumps(config))
    return out
