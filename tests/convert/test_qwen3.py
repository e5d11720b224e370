"""Qwen3 checkpoints into parameters: every tensor, tied and untied heads, the answers' tokens."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from jaxrank import convert
from jaxrank.errors import CheckpointError
from jaxrank.weights import converted as checkpoint
from tests import joined
from tests.checkpoints import edit_config, make_qwen3


def head(folder: Path, dtype: str = "float32") -> np.ndarray:
    return np.asarray(checkpoint.parameters(convert.load(folder, dtype=dtype))["head"])


def answers(folder: Path) -> tuple[int, int]:
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    return vocabulary["yes"], vocabulary["no"]


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_is_the_difference_of_two_rows_in_float32(tmp_path: Path, tied: bool) -> None:
    folder = make_qwen3(tmp_path, tie_word_embeddings=tied)
    state = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(state, folder / "model.safetensors")
    table = state["model.embed_tokens.weight" if tied else "lm_head.weight"]
    yes, no = answers(folder)
    want = (table[yes].float() - table[no].float()).numpy()
    assert np.array_equal(head(folder, "bfloat16"), want)
    assert head(folder, "bfloat16").dtype == jnp.float32


def test_a_tied_head_that_was_saved_too_is_left_alone(tmp_path: Path) -> None:
    folder = make_qwen3(tmp_path)
    want = head(folder)
    state = load_file(folder / "model.safetensors")
    save_file({**state, "lm_head.weight": torch.zeros(600, 48)}, folder / "model.safetensors")
    assert np.array_equal(head(folder), want)


def test_an_untied_head_that_is_missing(tmp_path: Path) -> None:
    folder = make_qwen3(tmp_path)
    edit_config(folder, tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"missing tensors \(1\):\n  lm_head\.weight \[600, 48\]"):
        convert.load(folder, dtype="float32")


def test_every_parameter(tmp_path: Path) -> None:
    folder = make_qwen3(tmp_path, tie_word_embeddings=False)
    state = {name: tensor.numpy() for name, tensor in load_file(folder / "model.safetensors").items()}
    got = {path: np.asarray(v) for path, v in checkpoint.parameters(convert.load(folder, dtype="float32")).items()}
    yes, no = answers(folder)
    assert np.array_equal(got.pop("word"), state["model.embed_tokens.weight"])
    assert np.array_equal(got.pop("norm/scale"), state["model.norm.weight"])
    assert np.array_equal(got.pop("head"), state["lm_head.weight"][yes] - state["lm_head.weight"][no])
    for place, layer in (("layers/0/", "model.layers.0."), ("last/", "model.layers.1.")):
        q, k, v, out = (state[f"{layer}self_attn.{name}_proj.weight"] for name in "qkvo")
        assert np.array_equal(got.pop(f"{place}attention/qkv"), joined.q_k_v(q, k, v, 2))
        assert np.array_equal(got.pop(f"{place}attention/out"), joined.output(out, 2, 16))
        for name in ("gate", "up", "down"):
            assert np.array_equal(got.pop(f"{place}feed_forward/{name}"), state[f"{layer}mlp.{name}_proj.weight"].T)
        for path, name in (
            ("attention/norm", "input_layernorm"),
            ("attention/query_norm", "self_attn.q_norm"),
            ("attention/key_norm", "self_attn.k_norm"),
            ("feed_forward/norm", "post_attention_layernorm"),
        ):
            assert np.array_equal(got.pop(f"{place}{path}/scale"), state[f"{layer}{name}.weight"])
    assert got == {}


def test_sequence_classification_keeps_its_own_head(tmp_path: Path) -> None:
    folder = make_qwen3(tmp_path, classifier=True)
    assert np.array_equal(head(folder), load_file(folder / "model.safetensors")["score.weight"].numpy()[0])


@pytest.mark.parametrize("classifier", [False, True])
def test_a_converted_folder_needs_no_rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, classifier: bool) -> None:
    folder = make_qwen3(tmp_path / "source", classifier=classifier)
    want = checkpoint.parameters(convert.load(folder, dtype="float32"))
    convert.convert(folder, tmp_path / "out", progress=False)
    monkeypatch.setattr(convert, "NAMES", {})
    got = checkpoint.parameters(checkpoint.load(tmp_path / "out", dtype="float32"))
    assert got.keys() == want.keys()
    assert all(np.array_equal(got[path], want[path]) for path in want)


def test_answers_that_are_not_one_token(tmp_path: Path) -> None:
    folder = make_qwen3(tmp_path)
    path = folder / "tokenizer.json"
    settings = json.loads(path.read_text())
    settings["model"]["merges"] = [merge for merge in settings["model"]["merges"] if "".join(merge) != "yes"]
    path.write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=r"writes 'yes' as the tokens \[\d+, \d+\]; a yes/no reranker needs one"):
        convert.load(folder, dtype="float32")
