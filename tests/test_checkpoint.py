"""Converted folders: readable entries, exact numbers, and a clear error for whatever is wrong with one."""

import json
import os
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from jaxrank.errors import CheckpointError, ModelError, UnsupportedError
from jaxrank.models import settings_of
from jaxrank.weights import converted as checkpoint

CONFIG = {
    "architectures": ["XLMRobertaForSequenceClassification"],
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 66,
}


def make(dtype=jnp.float32):
    family, settings = settings_of(CONFIG)
    return family.module(settings, dtype=dtype, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    checkpoint.save(folder, make())
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


@pytest.mark.parametrize("stored", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("wanted", [jnp.float32, jnp.bfloat16])
def test_round_trip(tmp_path, stored, wanted):
    model = make(stored)
    checkpoint.save(tmp_path, model)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    found = checkpoint.parameters(checkpoint.load(tmp_path, dtype=wanted))
    kept = checkpoint.parameters(make(wanted))
    for path, value in checkpoint.parameters(model).items():
        assert isinstance(found[path], jax.Array)
        assert found[path].dtype == kept[path].dtype, path
        np.testing.assert_array_equal(np.asarray(found[path]), np.asarray(value.astype(kept[path].dtype)), path)


def test_entries_have_readable_names_and_orbax_reads_them(folder):
    with ocp.PyTreeCheckpointer() as checkpointer, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that no sharding was asked for
        tree = checkpointer.restore(folder / "weights")
    value = checkpoint.parameters(make())["layers/0/attention/qkv/kernel"]
    np.testing.assert_array_equal(np.asarray(tree["layers"]["0"]["attention"]["qkv"]["kernel"]), np.asarray(value))
    mark = json.loads((folder / "jaxrank.json").read_text())
    assert mark["family"] == CONFIG["architectures"][0]
    assert (mark["format"], mark["dtype"]) == (2, "float32")


def read(folder, values):
    return checkpoint.read_weights(checkpoint.open_weights(folder, values), values)


def test_arrays_larger_than_a_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", 1000)
    values = {"a/b": jnp.arange(7001.0), "a/c": jnp.arange(9000.0).reshape(30, 300), "d": jnp.float32(3)}
    checkpoint.write_weights(tmp_path / "w", values)
    for path, value in read(tmp_path / "w", values).items():
        np.testing.assert_array_equal(np.asarray(value), np.asarray(values[path]))


def test_is_converted(folder, tmp_path):
    assert checkpoint.is_converted(folder)
    assert not checkpoint.is_converted(tmp_path)
    assert not checkpoint.is_converted(tmp_path / "missing")


def test_save_refuses_what_is_there_and_what_it_does_not_know(folder, tmp_path):
    with pytest.raises(CheckpointError, match="holds a checkpoint already"):
        checkpoint.save(folder, make())
    with pytest.raises(UnsupportedError, match="Linear cannot be saved"):
        checkpoint.save(tmp_path / "new", nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match="could not be written"):
        checkpoint.save(tmp_path / "file" / "model", make())


@pytest.mark.parametrize(
    "mark, message",
    [
        (None, "no converted folder"),
        ("{", "no JSON"),
        ("[]", "says format"),
        ('{"format": 1}', "says format 1, this jaxrank reads 2"),
        ('{"format": 2, "family": "Bert"}', "says family 'Bert'"),
        ('{"format": 2, "family": ["Bert"]}', "says family"),
    ],
)
def test_bad_marks(folder, mark, message):
    (folder / "jaxrank.json").unlink()
    if mark:
        (folder / "jaxrank.json").write_text(mark)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(folder, dtype="float32")


def test_weights_of_another_shape(folder):
    (folder / "config.json").write_text(json.dumps({**CONFIG, "vocab_size": 301}))
    with pytest.raises(CheckpointError, match=r"word is \[300, 32\], config.json makes it \[301, 32\]"):
        checkpoint.load(folder, dtype="float32")
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": 4}))
    with pytest.raises(CheckpointError, match="jaxrank convert"):
        checkpoint.load(folder, dtype="float32")


@pytest.mark.parametrize("damage", ["missing", "half", "empty"])
def test_damaged_weights_are_never_read_as_something_else(folder, tmp_path, damage):
    """Every file of the weights in turn: what does not stop the loading must not change a number."""
    right, refused = checkpoint.parameters(make()), 0
    for path in sorted(path for path in (folder / "weights").rglob("*") if path.is_file()):
        copy = shutil.copytree(folder, tmp_path / "copy")
        victim = copy / path.relative_to(folder)
        if damage == "missing":
            victim.unlink()
        else:
            os.truncate(victim, path.stat().st_size // 2 if damage == "half" else 0)
        try:
            found = checkpoint.parameters(checkpoint.load(copy, dtype="float32"))
        except CheckpointError as error:
            assert "jaxrank convert" in str(error)  # noqa: PT017
            refused += 1
        else:
            assert all((np.asarray(found[name]) == np.asarray(value)).all() for name, value in right.items())
        shutil.rmtree(copy)
    assert refused >= 3
    shutil.rmtree(folder / "weights")
    with pytest.raises(CheckpointError, match="no such folder"):
        checkpoint.load(folder, dtype="float32")


def test_parameters_are_outlined_without_memory():
    model = checkpoint.outline({**CONFIG, "vocab_size": 10**9, "hidden_size": 4096}, jnp.bfloat16)
    assert checkpoint.parameters(model)["word"].shape == (10**9, 4096)
    with pytest.raises(CheckpointError, match="hidden_size"):
        checkpoint.outline({k: v for k, v in CONFIG.items() if k != "hidden_size"}, jnp.float32)
    with pytest.raises(CheckpointError, match="wrong type"):
        checkpoint.outline({**CONFIG, "hidden_size": "wide"}, jnp.float32)
