"""Where a model named by a user lies: a folder, or a Hugging Face id that is downloaded."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxrank.errors import CheckpointError

SETTINGS = "config_sentence_transformers.json"
"""Prompts and activation of models that sentence-transformers has saved."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)
FILES = {
    "safetensors": ("model*.safetensors", "model.safetensors.index.json"),
    "torch": ("pytorch_model*.bin", "pytorch_model.bin.index.json"),
}
FORMATS = tuple(FILES)
"""Of published weights, the preferred one first; torch's can hide code."""


def find(
    name_or_folder: str | Path,
    revision: str | None = None,
    *,
    formats: Sequence[str] = ("safetensors",),
    **options: Any,
) -> Path:
    """The folder of a model: an existing folder as it is, otherwise a Hugging Face id's, downloaded if need be.

    Only the configuration, the tokenizer and weights are fetched: those of the first of these formats that the
    repository offers. revision: a branch, tag or commit, for an id only; so are options, huggingface_hub's own, such as
    token. Raises CheckpointError.
    """
    folder = Path(name_or_folder).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{folder} is a file; name the folder that holds it, with its config.json and tokenizer")
    if isinstance(name_or_folder, Path):
        raise CheckpointError(f"there is no folder {folder}; name an existing one, or a Hugging Face id as a str")
    try:
        found = download(
            name_or_folder, revision, (*TOKENIZER_FILES, "config.json", SETTINGS, *FILES[formats[0]]), **options
        )
        for before, name in itertools.pairwise(formats):
            if not any(file for pattern in FILES[before] for file in found.glob(pattern)):
                found = download(name_or_folder, revision, FILES[name], **options)
    except Exception as error:  # whatever network, proxy and cache may raise is no documented list
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(
            f"there is no folder {name_or_folder}, and as a Hugging Face id it could not be fetched: {reason[0]}"
        ) from error
    return found


def download(name: str, revision: str | None, files: tuple[str, ...], **options: Any) -> Path:
    """Fetch those of a repository's files that match, top folder only; the local folder of the snapshot."""
    from huggingface_hub import snapshot_download

    patterns = dict(allow_patterns=list(files), ignore_patterns=["*/*"])
    return Path(snapshot_download(name, revision=revision, **patterns, **options))
