"""Where a model named by a user lies: a folder, or a Hugging Face id that is downloaded."""

from __future__ import annotations

from pathlib import Path

from jaxrank.errors import CheckpointError

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
SAFETENSORS = ("model*.safetensors", "model.safetensors.index.json")
TORCH = ("pytorch_model*.bin", "pytorch_model.bin.index.json")


def find(name_or_folder: str | Path, revision: str | None = None, *, allow_torch: bool = False) -> Path:
    """The folder of a model: an existing folder as it is, otherwise a Hugging Face id's, downloaded if need be.

    Only the configuration, the tokenizer and safetensors weights are fetched; with allow_torch also PyTorch's .bin
    files where the repository offers no safetensors. revision: a branch, tag or commit, for an id only. Raises
    CheckpointError.
    """
    folder = Path(name_or_folder).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{folder} is a file; name the folder that holds it, with its config.json and tokenizer")
    if isinstance(name_or_folder, Path):
        raise CheckpointError(f"there is no folder {folder}; name an existing one, or a Hugging Face id as a str")
    try:
        found = download(name_or_folder, revision, (*TOKENIZER_FILES, "config.json", *SAFETENSORS))
        if allow_torch and not any(found.glob("*.safetensors")):
            found = download(name_or_folder, revision, TORCH)
    except Exception as error:  # whatever network, proxy and cache may raise is no documented list
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(
            f"there is no folder {name_or_folder}, and as a Hugging Face id it could not be fetched: {reason[0]}"
        ) from error
    return found


def download(name: str, revision: str | None, files: tuple[str, ...]) -> Path:
    """Fetch those of a repository's files that match, top folder only; the local folder of the snapshot."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, revision=revision, allow_patterns=list(files), ignore_patterns=["*/*"]))
