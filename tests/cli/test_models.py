"""Models that cannot be loaded, as the command tells it."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import edit_config
from tests.cli.commands import NO_CACHE, Run, complaint, standard_input, to_bin


def lose_a_field(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["hidden_size"]
    (folder / "config.json").write_text(json.dumps(config))


BAD_MODELS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (shutil.rmtree, "there is no folder {folder}, and as a Hugging Face id it could not be fetched"),
    "no config": (lambda f: (f / "config.json").unlink(), "{folder}/config.json cannot be read (No such file"),
    "config cut short": (lambda f: (f / "config.json").write_text("{"), "{folder}/config.json is no JSON"),
    "config lacks a field": (lose_a_field, "config.json lacks 'hidden_size'"),
    "config of a wrong type": (
        lambda f: edit_config(f, max_position_embeddings="130"), "config.json has a field of a wrong type or size"),
    "another architecture": (
        lambda f: edit_config(f, architectures=["BertModel"]), "architectures is ['BertModel']; jaxrank knows XLMR"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "{folder}: no tokenizer.json (found: config.json"),
    "damaged tokenizer": (lambda f: os.truncate(f / "tokenizer.json", 999), "tokenizer.json: not a tokenizer that"),
    "odd special token": (
        lambda f: (f / "tokenizer_config.json").write_text('{"sep_token": {"x": 1}}'), "sep_token None is not among"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "{folder} has no weights"),
    "weights cut short": (
        lambda f: os.truncate(f / "model.safetensors", 90_000), "{folder}/model.safetensors is damaged: its tensors"),
    "weights of one byte": (lambda f: os.truncate(f / "model.safetensors", 1), "safetensors has 1 bytes and a header"),
    ".bin weights": (to_bin, "code; write a folder that needs none with `jaxrank convert {folder} NEW_FOLDER`"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_MODELS)
@pytest.mark.parametrize("command", ["rerank", "serve"])
def test_bad_models(run: Run, folder: Path, documents: Path, command: str, kind: str) -> None:
    damage, message = BAD_MODELS[kind]
    damage(folder)
    line = ["rerank", "q", documents, "--model", folder] if command == "rerank" else ["serve", folder, "--port", 0]
    assert message.format(folder=folder) in complaint(run(*line, *NO_CACHE))


def test_every_tensor_that_does_not_fit_is_named(run: Run, folder: Path, documents: Path) -> None:
    state = load_file(folder / "model.safetensors")
    del state["classifier.dense.bias"]
    state["roberta.embeddings.LayerNorm.weight"] = torch.zeros(47)
    state["roberta.encoder.layer.1.output.dense.weight"] = torch.zeros(96, 48)
    save_file(state, folder / "model.safetensors")
    status, out, err = run("rerank", "q", documents, "--model", folder, *NO_CACHE)
    assert (status, out) == (1, "")
    assert [line.strip() for line in err.splitlines()] == [
        f"jaxrank: error: {folder} does not fit its config.json. Use the weights and the config.json of one model.",
        "missing tensors (1):",
        "classifier.dense.bias [48]",
        "wrong shapes (2):",
        "roberta.embeddings.LayerNorm.weight is [47], the model needs [48]",
        "roberta.encoder.layer.1.output.dense.weight is [96, 48], the model needs [48, 96]",
    ]


WEIGHTS_AND_SETTINGS = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "")


@pytest.mark.parametrize(
    "victim, mode, line, named",
    [
        *((f"model/{name}", 0, "rerank q --model {0}/model", f"model/{name}") for name in WEIGHTS_AND_SETTINGS),
        ("", 0, "rerank q --model {0}/model", "model"),
        ("documents.txt", 0, "rerank q {0}/documents.txt", "documents.txt"),
        ("", 0, "convert {0}/model {0}/out --no-progress", "model"),
        ("", 0o555, "convert {0}/model {0}/out --no-progress", "out could not be written"),
    ],
)
def test_no_permission(
    run: Run, source: Path, monkeypatch: pytest.MonkeyPatch, victim: str, mode: int, line: str, named: str
) -> None:
    """Root may do everything, so root becomes nobody meanwhile, in a folder that others can reach (not pytest's)."""
    place = Path(tempfile.mkdtemp())
    shutil.copytree(source, place / "model")
    (place / "documents.txt").touch()
    for path in (place, *place.rglob("*")):
        path.chmod(0o755)
    standard_input(monkeypatch, b"hi\n")
    user = os.geteuid()
    try:
        (place / victim).chmod(mode)
        os.seteuid(user or 65534)
        try:
            message = complaint(run(*line.format(place).split(), *(NO_CACHE if line[0] == "r" else ())))
        finally:
            os.seteuid(user)
        assert f"{place}/{named}" in message
        assert "Permission denied" in message
        place.chmod(0o755)
        assert sorted(os.listdir(place)) == ["documents.txt", "model"]
    finally:
        for path in (place, place / "model"):
            path.chmod(0o755)
        shutil.rmtree(place)
