"""int8 from files to logits: rounded while loading, converted, read back, and over several devices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from jaxrank import Reranker, convert
from jaxrank.errors import CheckpointError, RequestError
from jaxrank.runtime.programs import take_tower, whole
from jaxrank.sharding import choose_mesh, make_mesh
from jaxrank.weights import converted as checkpoint
from tests.checkpoints import make_bge, make_qwen3, make_qwen3_vl
from tests.test_sharding import Device, make_vl, rows


def same(model: Any, other: Any) -> None:
    ours, theirs = checkpoint.parameters(model), checkpoint.parameters(other)
    assert ours.keys() == theirs.keys()
    for path, value in ours.items():
        assert value.dtype == theirs[path].dtype, path
        np.testing.assert_array_equal(np.asarray(value), np.asarray(theirs[path]), path)


@pytest.mark.parametrize("make", [make_bge, make_qwen3, make_qwen3_vl])
def test_all_ways_give_the_same_bits(tmp_path: Path, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounded while a published folder is read, while it is converted, and while a converted folder is read, in several
    chunks; a folder in int8 needs no word of it, and takes one."""
    published = make(tmp_path / "published")
    model = convert.load(published, dtype="float32", quantization="int8")
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", 5000)
    convert.convert(published, tmp_path / "plain", progress=False)
    convert.convert(published, tmp_path / "int8", quantization="int8", progress=False)
    same(checkpoint.load(tmp_path / "plain", dtype="float32", quantization="int8"), model)
    same(checkpoint.load(tmp_path / "int8", dtype="float32"), model)
    same(checkpoint.load(tmp_path / "int8", dtype="float32", quantization="int8"), model)
    marks = [checkpoint.read_mark(tmp_path / name) for name in ("plain", "int8")]
    assert [(mark["dtype"], mark["quantization"]) for mark in marks] == [("float32", None), ("float32", "int8")]


@pytest.mark.parametrize("make", [make_bge, make_qwen3, make_vl])
def test_several_devices(tmp_path: Path, make: Any) -> None:
    """The logits of one, on two copies of the weights, each on two devices."""
    place, mesh = make(tmp_path), make_mesh(jax.devices()[:4], 2)

    def load() -> Any:
        model = convert.load(place, dtype="float32", quantization="int8")
        take_tower(model)
        return model

    batch = rows(load(), 2)
    alone, state = whole(load())
    want = np.stack([alone(state, jax.tree.map(lambda leaf, i=i: leaf[i], batch)) for i in range(2)])
    assert want[:, :3].std() > 0.03, "logits that hardly differ would prove nothing: 3,000 times the tolerance"
    together, state = whole(load(), mesh)
    assert np.abs(np.asarray(together(state, batch)) - want).max() <= 1e-5


def test_parts_of_matrices_and_scales(tmp_path: Path) -> None:
    published = make_qwen3(tmp_path, num_key_value_heads=4)
    mesh = make_mesh(jax.devices()[:4], 4)
    arrays = checkpoint.parameters(convert.load(published, dtype="float32", quantization="int8", mesh=mesh))
    cut = {path: array.size // array.addressable_shards[0].data.size for path, array in arrays.items()}
    layer = {path.removeprefix("last/"): parts for path, parts in cut.items() if path.startswith("last/")}
    for name in ("attention/qkv", "feed_forward/gate", "feed_forward/up"):
        assert (layer[f"{name}_int8"], layer[f"{name}_scale"]) == (4, 4), name
    for name in ("attention/out", "feed_forward/down"):
        assert (layer[f"{name}_int8"], layer[f"{name}_scale"]) == (4, 1), "sums over what is cut have whole scales"
    assert (cut["word_int8"], cut["word_scale"], cut["head"]) == (1, 1, 1)


def test_devices_are_chosen_by_what_int8_needs(tmp_path: Path) -> None:
    config = checkpoint.read_config(make_qwen3(tmp_path, tokenizer=False, num_key_value_heads=4))
    plain, small = (checkpoint.outline(config, "bfloat16", name) for name in (None, "int8"))
    size = sum(array.size * array.dtype.itemsize for array in checkpoint.parameters(plain).values())
    devices = [Device(size)] * 4
    mesh = choose_mesh(plain, devices)
    assert mesh is not None
    assert mesh.shape["model"] == 2
    mesh = choose_mesh(small, devices)
    assert mesh is not None
    assert mesh.shape["model"] == 1


class TestErrors:
    def test_unknown_names(self, tmp_path: Path) -> None:
        message = "quantization 'awq' is unknown; int8, or leave it out for weights in dtype"
        with pytest.raises(RequestError, match=message):
            Reranker.from_pretrained(quantization="awq")
        with pytest.raises(RequestError, match=message):
            convert.convert(tmp_path, tmp_path / "out", quantization="awq")
        assert not (tmp_path / "out").exists()

    def test_weights_that_are_not_finite(self, tmp_path: Path) -> None:
        folder = make_bge(tmp_path / "model", tokenizer=False)
        name = "roberta.encoder.layer.0.output.dense.weight"
        state = load_file(folder / "model.safetensors")
        state[name][5, 7] = torch.nan
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(CheckpointError, match=f"{name} has values that are not finite, which int8 cannot hold"):
            convert.load(folder, dtype="float32", quantization="int8")
        convert.convert(folder, tmp_path / "plain", progress=False)
        with pytest.raises(CheckpointError, match=r"layers/0/down/kernel has values that are not finite"):
            checkpoint.load(tmp_path / "plain", dtype="float32", quantization="int8")

    @pytest.mark.parametrize("change, message", [
        ({"quantization": "int4"}, "says quantization 'int4'; this jaxrank knows int8; convert the model again"),
        ({"quantization": None}, "missing, damaged or of another model"),
    ])  # fmt: skip
    def test_marks_that_do_not_fit(self, tmp_path: Path, change: dict[str, Any], message: str) -> None:
        convert.convert(make_bge(tmp_path / "model"), tmp_path / "int8", quantization="int8", progress=False)
        path = tmp_path / "int8/jaxrank.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
        with pytest.raises(CheckpointError, match=message):
            checkpoint.load(tmp_path / "int8", dtype="float32")
