"""Models that cannot be loaded, as the command tells it."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from jaxrank import Reranker
from jaxrank.cli import model
from jaxrank.errors import RequestError
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


def test_flags_read_by_another_program(folder: Path) -> None:
    """As jaxrank.server.on_ray.app and ray_data do, whose own tests need Ray."""
    parser = argparse.ArgumentParser()
    model.model_arguments(parser)
    asked = parser.parse_args([*NO_CACHE, "--dtype", "float32"])
    reranker = model.load(asked, str(folder), progress=False)
    assert (reranker.name, reranker.dtype) == (str(folder), "float32")


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


@pytest.fixture
def converted(run: Run, folder: Path, tmp_path: Path) -> Path:
    assert run("convert", folder, tmp_path / "converted", "--no-progress").status == 0
    return tmp_path / "converted"


class TestLoadFormat:
    def test_each_reads_its_own(self, folder: Path, converted: Path) -> None:
        """A folder with three kinds of weights, each of another model."""
        state = load_file(folder / "model.safetensors")
        state["classifier.out_proj.bias"] += 3
        torch.save(state, folder / "pytorch_model.bin")
        state["classifier.out_proj.bias"] += 3
        save_file(state, folder / "model.safetensors")
        for name in ("weights", "jaxrank.json"):
            (converted / name).rename(folder / name)

        def bias(load_format: str) -> float:
            loaded = Reranker.from_pretrained(folder, load_format=load_format, compile_cache=None)
            return float(loaded.model.head.bias[...])

        orbax = bias("orbax")
        assert bias("auto") == orbax
        assert bias("torch") == pytest.approx(orbax + 3, abs=1e-5)
        assert bias("safetensors") == pytest.approx(orbax + 6, abs=1e-5)

    @pytest.mark.parametrize(
        "kind, load_format, message",
        [
            ("published", "orbax", "{folder}/jaxrank.json cannot be read (No such file or directory): no converted"),
            ("published", "torch", "no pytorch_model.bin (or pytorch_model.bin.index.json); there are weights of load "
                                   "format safetensors"),
            ("converted", "safetensors", "no model.safetensors (or model.safetensors.index.json); there are weights of "
                                         "load format orbax"),
            ("converted", "torch", "no pytorch_model.bin (or pytorch_model.bin.index.json); there are weights of load"),
            ("bin", "safetensors", "has only PyTorch .bin weights, which can hide code"),
        ],
    )  # fmt: skip
    def test_what_a_folder_lacks(
        self, run: Run, folder: Path, converted: Path, documents: Path, kind: str, load_format: str, message: str
    ) -> None:
        if kind == "bin":
            to_bin(folder)
        model = converted if kind == "converted" else folder
        line = ["rerank", "q", documents, "--model", model, "--load-format", load_format, *NO_CACHE]
        assert message.format(folder=model) in complaint(run(*line))

    def test_unknown_ones(self, run: Run, folder: Path) -> None:
        status, out, err = run("serve", folder, "--load-format", "gguf")
        assert (status, out) == (2, "")
        assert "invalid choice: 'gguf'" in err
        with pytest.raises(RequestError, match="load_format 'pt' is unknown; one of auto, safetensors, torch, orbax"):
            Reranker.from_pretrained(folder, load_format="pt")


WITHOUT_DEVICES = """
import sys
from jaxrank import Reranker
from jaxrank.errors import ModelError
for folder in sys.argv[1:]:
    try:
        Reranker.from_pretrained(folder, compile_cache=None)
    except ModelError as error:
        print("refused:", str(error).splitlines()[0])
    except RuntimeError as error:
        print("no device:", str(error).splitlines()[0])
"""


def test_bad_folders_are_refused_before_a_device_is_touched(folder: Path, converted: Path, tmp_path: Path) -> None:
    """With a platform that cannot be had, the first touch is a RuntimeError."""

    def damaged(name: str, of: Path, damage: Callable[[Path], Any]) -> Path:
        damage(shutil.copytree(of, tmp_path / name))
        return tmp_path / name

    folders = [
        damaged("truncated", folder, lambda f: os.truncate(f / "model.safetensors", 90_000)),
        damaged("another model", folder, lambda f: edit_config(f, intermediate_size=104)),
        damaged("tokenizer of another", folder, lambda f: edit_config(f, vocab_size=9)),
        damaged("converted, another model", converted, lambda f: edit_config(f, num_hidden_layers=3)),
        damaged("converted, another width", converted, lambda f: edit_config(f, intermediate_size=104)),
        damaged("converted, without weights", converted, lambda f: shutil.rmtree(f / "weights")),
        folder,
        converted,
    ]
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_DEVICES, *folders],
        env={**os.environ, "JAX_PLATFORMS": "cuda,rocm"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    said = [line.partition(":")[0] for line in result.stdout.splitlines()]
    assert said == ["refused"] * 6 + ["no device"] * 2, result.stdout
