"""Qwen3-VL checkpoints into parameters: every tensor of both layouts, tied and untied heads, round trips."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from jaxrank import convert
from jaxrank.errors import CheckpointError
from jaxrank.weights import converted as checkpoint
from tests import joined
from tests.checkpoints import edit_config, make_qwen3_vl


def loaded(folder: Path, dtype: str | None = "float32") -> dict[str, np.ndarray]:
    model = convert.load(folder, dtype=dtype)
    return {path: np.asarray(value) for path, value in checkpoint.parameters(model).items()}


def tensors(folder: Path) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in load_file(folder / "model.safetensors").items()}


def answers(folder: Path) -> tuple[int, int]:
    vocabulary = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
    return vocabulary["yes"], vocabulary["no"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen3_vl(tmp_path_factory.mktemp("qwen3_vl"), tied=False)


def test_every_parameter(folder: Path) -> None:
    state, got = tensors(folder), loaded(folder)
    yes, no = answers(folder)
    text, visual = "model.language_model.", "model.visual."

    def take(path: str, tensor: str, *shape: int, turned: bool = False) -> None:
        want = state.pop(tensor)
        want = want.T if turned else want
        assert np.array_equal(got.pop(path), want.reshape(shape) if shape else want), path

    for i, place in enumerate(["adding/0/", "adding/1/", "layers/0/", "last/"]):
        layer = f"{text}layers.{i}."
        q, k, v, out = (state.pop(f"{layer}self_attn.{name}_proj.weight") for name in "qkvo")
        assert np.array_equal(got.pop(f"{place}attention/qkv"), joined.q_k_v(q, k, v, 2))
        assert np.array_equal(got.pop(f"{place}attention/out"), joined.output(out, 2, 16))
        for name in ("gate", "up", "down"):
            take(f"{place}feed_forward/{name}", f"{layer}mlp.{name}_proj.weight", turned=True)
        for path, name in (
            ("attention/norm", "input_layernorm"),
            ("attention/query_norm", "self_attn.q_norm"),
            ("attention/key_norm", "self_attn.k_norm"),
            ("feed_forward/norm", "post_attention_layernorm"),
        ):
            take(f"{place}{path}/scale", f"{layer}{name}.weight")
    for i, stage in enumerate(["0/0", "1/0", "1/1", "2/0"]):
        place, layer = f"vision/stages/{stage}/", f"{visual}blocks.{i}."
        for path, name in (
            ("attention/qkv/kernel", "attn.qkv.weight"),
            ("attention/out/kernel", "attn.proj.weight"),
            ("up/kernel", "mlp.linear_fc1.weight"),
            ("down/kernel", "mlp.linear_fc2.weight"),
        ):
            take(place + path, layer + name, turned=True)
        for path, name in (
            ("attention/norm/scale", "norm1.weight"),
            ("attention/norm/bias", "norm1.bias"),
            ("attention/qkv/bias", "attn.qkv.bias"),
            ("attention/out/bias", "attn.proj.bias"),
            ("norm/scale", "norm2.weight"),
            ("norm/bias", "norm2.bias"),
            ("up/bias", "mlp.linear_fc1.bias"),
            ("down/bias", "mlp.linear_fc2.bias"),
        ):
            take(place + path, layer + name)
    for place, name in (("merger", "merger"), ("mergers/0", "deepstack_merger_list.0"),
                        ("mergers/1", "deepstack_merger_list.1")):  # fmt: skip
        for path, tensor in (("up", "linear_fc1"), ("down", "linear_fc2")):
            take(f"vision/{place}/{path}/kernel", f"{visual}{name}.{tensor}.weight", turned=True)
            take(f"vision/{place}/{path}/bias", f"{visual}{name}.{tensor}.bias")
        take(f"vision/{place}/norm/scale", f"{visual}{name}.norm.weight")
        take(f"vision/{place}/norm/bias", f"{visual}{name}.norm.bias")
    take("vision/patch", f"{visual}patch_embed.proj.weight", 64, 1536)
    take("vision/patch_bias", f"{visual}patch_embed.proj.bias")
    take("vision/position", f"{visual}pos_embed.weight")
    take("word", f"{text}embed_tokens.weight")
    take("norm/scale", f"{text}norm.weight")
    table = state.pop("lm_head.weight")
    assert np.array_equal(got.pop("head"), table[yes] - table[no])
    assert got == {}
    assert state == {}


def test_both_layouts_of_names(folder: Path, tmp_path: Path) -> None:
    """Older checkpoints: visual.* and model.*."""
    old = {
        name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    assert not any("language_model" in name for name in old)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    save_file(old, tmp_path / "model.safetensors")
    want, got = loaded(folder), loaded(tmp_path)
    assert got.keys() == want.keys()
    assert all(np.array_equal(got[path], want[path]) for path in want)


def test_a_tensor_too_few_and_one_too_many(folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    state = load_file(folder / "model.safetensors")
    state["model.visual.blocks.4.norm1.bias"] = state.pop("model.visual.blocks.3.norm1.bias")
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        convert.load(tmp_path, dtype="float32")
    assert "missing tensors (1):\n  model.visual.blocks.3.norm1.bias [64]" in str(caught.value)
    assert "unexpected tensors (1):\n  model.visual.blocks.4.norm1.bias [64]" in str(caught.value)


def test_a_tied_head_in_float32(tmp_path: Path) -> None:
    folder = make_qwen3_vl(tmp_path)
    state = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(state, folder / "model.safetensors")
    table = state["model.language_model.embed_tokens.weight"].float().numpy()
    yes, no = answers(folder)
    got = loaded(folder, None)
    assert np.array_equal(got["head"], table[yes] - table[no])
    assert got["head"].dtype == jnp.float32
    assert got["word"].dtype == got["vision/position"].dtype == got["vision/patch"].dtype == jnp.bfloat16
    assert got["vision/stages/0/0/attention/qkv/bias"].dtype == got["vision/merger/norm/scale"].dtype == jnp.float32


def test_a_tied_head_that_was_saved_too_is_left_alone(tmp_path: Path) -> None:
    folder = make_qwen3_vl(tmp_path)
    want = loaded(folder)["head"]
    state = load_file(folder / "model.safetensors")
    save_file({**state, "lm_head.weight": torch.zeros(600, 64)}, folder / "model.safetensors")
    assert np.array_equal(loaded(folder)["head"], want)
    edit_config(folder, tie_word_embeddings=False)
    assert not loaded(folder)["head"].any()


def test_a_converted_folder_needs_no_rules(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    want = loaded(folder)
    convert.convert(folder, tmp_path / "out", progress=False)
    monkeypatch.setattr(convert, "NAMES", {})
    got = checkpoint.parameters(checkpoint.load(tmp_path / "out", dtype="float32"))
    assert got.keys() == want.keys()
    assert all(np.array_equal(got[path], want[path]) for path in want)
