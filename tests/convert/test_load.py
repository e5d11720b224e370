"""Published checkpoints become models: every parameter, every file form, every way not to fit."""

import json
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import XLMRobertaForSequenceClassification

from jaxrank import convert
from jaxrank.errors import CheckpointError, UnsupportedError
from jaxrank.weights import converted as checkpoint
from tests.checkpoints import edit_config, make_bge


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_bge(tmp_path_factory.mktemp("bge"), num_hidden_layers=3, tokenizer=False)


@pytest.fixture
def folder(source, tmp_path):
    return shutil.copytree(source, tmp_path / "model")


def loaded(folder, dtype="float32", **options):
    model = convert.load(folder, dtype=dtype, **options)
    return {path: np.asarray(value) for path, value in checkpoint.parameters(model).items()}


def expected(folder):
    """What each parameter must be, written out by hand and not by the table under test."""
    state = {k: v.double() for k, v in XLMRobertaForSequenceClassification.from_pretrained(folder).state_dict().items()}
    depth = 3
    found = {
        "word": state["roberta.embeddings.word_embeddings.weight"],
        "position": state["roberta.embeddings.position_embeddings.weight"],
        "token_type": state["roberta.embeddings.token_type_embeddings.weight"][0],
        "embedding_norm/scale": state["roberta.embeddings.LayerNorm.weight"],
        "embedding_norm/bias": state["roberta.embeddings.LayerNorm.bias"],
        "dense/kernel": state["classifier.dense.weight"].T,
        "dense/bias": state["classifier.dense.bias"],
        "head/kernel": state["classifier.out_proj.weight"][0],
        "head/bias": state["classifier.out_proj.bias"][0],
    }
    for i in range(depth):
        theirs, ours = f"roberta.encoder.layer.{i}.", "last/" if i == depth - 1 else f"layers/{i}/"
        parts = [f"{theirs}attention.self.{name}" for name in ("query", "key", "value")]
        found[f"{ours}attention/qkv/kernel"] = torch.cat([state[f"{part}.weight"] for part in parts]).T
        found[f"{ours}attention/qkv/bias"] = torch.cat([state[f"{part}.bias"] for part in parts])
        found[f"{ours}attention/out/kernel"] = state[f"{theirs}attention.output.dense.weight"].T
        found[f"{ours}attention/out/bias"] = state[f"{theirs}attention.output.dense.bias"]
        for name, place in (("intermediate", "up"), ("output", "down")):
            found[f"{ours}{place}/kernel"] = state[f"{theirs}{name}.dense.weight"].T
            found[f"{ours}{place}/bias"] = state[f"{theirs}{name}.dense.bias"]
        for name, place in (("attention.output", "attention_norm"), ("output", "norm")):
            found[f"{ours}{place}/scale"] = state[f"{theirs}{name}.LayerNorm.weight"]
            found[f"{ours}{place}/bias"] = state[f"{theirs}{name}.LayerNorm.bias"]
    return {path: value.numpy() for path, value in found.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_parameter(folder, dtype, stored):
    state = {name: tensor.to(stored) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    edit_config(folder, dtype=str(stored).removeprefix("torch."))
    ours, theirs = loaded(folder, dtype), expected(folder)
    assert ours.keys() == theirs.keys()
    for path, value in ours.items():
        small = value.ndim < 2 or path == "dense/kernel" or path.endswith("bias")
        assert value.dtype == (jnp.float32 if small else jnp.dtype(dtype)), path
        assert value.flags.c_contiguous
        np.testing.assert_array_equal(value, theirs[path].astype(value.dtype), err_msg=path)


def test_shards_are_the_same_model(folder, tmp_path):
    model = XLMRobertaForSequenceClassification.from_pretrained(folder)
    model.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    ours = loaded(tmp_path / "shards")
    for path, value in loaded(folder).items():
        np.testing.assert_array_equal(value, ours[path])


def test_numbers_are_on_the_device_and_progress_is_told(folder):
    seen = []
    model = convert.load(folder, dtype="float32", progress=lambda done, total: seen.append((done, total)))
    assert all(isinstance(value, jax.Array) for value in checkpoint.parameters(model).values())
    total = sum(tensor.numel() * 4 for tensor in load_file(folder / "model.safetensors").values())
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_harmless_buffers_are_ignored(folder):
    state = load_file(folder / "model.safetensors")
    state["roberta.embeddings.position_ids"] = torch.arange(514)[None]
    state["roberta.pooler.dense.weight"] = torch.zeros(48, 48)
    save_file(state, folder / "model.safetensors")
    assert loaded(folder)


def test_all_mismatches_in_one_error(folder):
    state = load_file(folder / "model.safetensors")
    del state["classifier.dense.bias"]
    state["classifier.extra"] = torch.zeros(3, 5)
    state["roberta.embeddings.LayerNorm.weight"] = torch.zeros(47)
    state["roberta.encoder.layer.1.output.dense.weight"] = torch.zeros(96, 48)
    state["roberta.encoder.layer.0.output.dense.weight"] = torch.zeros(48, 96).to(torch.float8_e4m3fn)
    state["classifier.out_proj.bias"] = torch.zeros(1, dtype=torch.int32)
    save_file(state, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        convert.load(folder, dtype="float32")
    message = str(caught.value)
    for part in (
        "missing tensors (1):\n  classifier.dense.bias [48]",
        "unexpected tensors (1):\n  classifier.extra [3, 5]",
        "wrong shapes (2):",
        "roberta.embeddings.LayerNorm.weight is [47], the model needs [48]",
        "roberta.encoder.layer.1.output.dense.weight is [96, 48], the model needs [48, 96]",
        "classifier.out_proj.bias is I32",
        "roberta.encoder.layer.0.output.dense.weight is F8_E4M3",
    ):
        assert part in message
    assert str(folder) in message


def test_long_lists_are_cut(folder):
    edit_config(folder, num_hidden_layers=9)
    with pytest.raises(CheckpointError) as caught:
        convert.load(folder, dtype="float32")
    assert "missing tensors (96):" in str(caught.value)
    assert "... and 76 more" in str(caught.value)
    assert len(str(caught.value).splitlines()) < 30
    edit_config(folder, num_hidden_layers=1)
    with pytest.raises(CheckpointError, match=r"unexpected tensors \(32\)"):
        convert.load(folder, dtype="float32")


def test_configurations_that_are_refused(folder):
    edit_config(folder, hidden_act="relu")
    with pytest.raises(UnsupportedError, match="hidden_act = 'relu'"):
        convert.load(folder, dtype="float32")
    edit_config(folder, architectures=["BertModel"])
    with pytest.raises(UnsupportedError, match="BertModel"):
        convert.load(folder, dtype="float32")


@pytest.mark.parametrize("content", ["", "[]", "{", "\udcff", "3"])
def test_config_that_is_no_object(folder, content):
    (folder / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        convert.read_config(folder)


@pytest.mark.parametrize(
    "field, value",
    [
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", 0),
        ("num_hidden_layers", "2"),
        ("hidden_size", 48.0),
        ("vocab_size", -1),
        ("num_attention_heads", 0),
        ("intermediate_size", [96]),
        ("id2label", 3),
    ],
)
def test_fields_of_a_wrong_type_or_size(folder, tmp_path, field, value):
    edit_config(folder, **{field: value})
    for use in (partial(convert.load, folder, dtype="float32"), partial(convert.convert, folder, tmp_path / "out")):
        with pytest.raises(CheckpointError, match=r"config\.json has a field of a wrong type or size"):
            use()
    assert not (tmp_path / "out").exists()


def test_config_missing_or_short_of_fields(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["hidden_size"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="hidden_size"):
        convert.load(folder, dtype="float32")
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        convert.read_config(folder)


def test_folders_without_weights(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="jaxrank convert"):
        convert.load(folder, dtype="float32")
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match="no weights"):
        convert.load(folder, dtype="float32")


def test_numbers_too_large_for_the_dtype(folder):
    state = load_file(folder / "model.safetensors")
    state["roberta.embeddings.word_embeddings.weight"][3, 3] = 1e30
    save_file(state, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="too large for float16"):
        convert.load(folder, dtype="float16")


def test_find_takes_folders_as_they_are(folder, tmp_path):
    assert convert.find(folder) == folder
    assert convert.find(str(folder)) == folder
    with pytest.raises(CheckpointError, match="is a file"):
        convert.find(folder / "config.json")
    with pytest.raises(CheckpointError, match="no folder"):
        convert.find(tmp_path / "missing")
    with pytest.raises(CheckpointError, match=f"no folder {tmp_path}/missing, and as a Hugging Face id"):
        convert.find(f"{tmp_path}/missing")


def test_find_downloads_no_more_than_needed(monkeypatch, tmp_path):
    asked = []

    def snapshot_download(name, *, revision, allow_patterns, ignore_patterns):
        asked.append((name, revision, allow_patterns, ignore_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert convert.find("some/model", "v1") == tmp_path
    assert not any(".bin" in pattern for pattern in asked[0][2])
    assert asked[0][:2] == ("some/model", "v1")
    convert.find("some/model", formats=convert.FORMATS)
    assert "pytorch_model*.bin" in asked[2][2]
    (tmp_path / "model.safetensors").touch()
    convert.find("some/model", formats=convert.FORMATS)
    assert len(asked) == 4
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: (_ for _ in ()).throw(OSError("offline")))
    with pytest.raises(CheckpointError, match="could not be fetched: offline"):
        convert.find("some/model")
