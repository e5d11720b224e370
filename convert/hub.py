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
"""The formats of published weights, the preferred one first. Those of torch can hide code."""


def find(
    name_or_folder: str | Path,
    revision: str | None = None,
    *,
    formats: Sequence[str] = ("safetensors",),
    **options: Any,
) -> Path:
    """Return the folder of a model: an existing folder as it is, or a Hugging Face id's, downloaded if necessary.

    Only the configuration, the tokenizer and weights are fetched. The weights are in the first of these formats that
    the repository offers.

    Args:
        revision: a branch, tag or commit, only for an id.
        formats: the formats of weights.
        options: options of huggingface_hub, such as token, only for an id.

    Raises:
        CheckpointError: there is no such folder, or the download failed.
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
    except Exception as error:  # network, proxy and cache have no complete list of errors
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(
            f"there is no folder {name_or_folder}, and as a Hugging Face id it could not be fetched: {reason[0]}"
        ) from error
    return found


def download(name: str, revision: str | None, files: tuple[str, ...], **options: Any) -> Path:
    """Fetch those of a repository's files that match, from its top folder only.

    Return the local folder of the snapshot.
    """
    from huggingface_hub import snapshot_download

    patterns = dict(allow_patterns=list(files), ignore_patterns=["*/*"])
    return Path(snapshot_download(name, revision=revision, **patterns, **options))
