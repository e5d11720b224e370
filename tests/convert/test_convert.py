"""Conversion is exact, whole or not at all, and runs no code from a checkpoint."""

import builtins
import contextlib
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from jaxrank import convert
from jaxrank.convert import rules
from jaxrank.errors import CheckpointError, ModelError
from jaxrank.weights import converted as checkpoint
from tests.checkpoints import make_bge

CONVERT = "import sys; from jaxrank import convert; convert.convert(sys.argv[1], sys.argv[2], progress=False)"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_bge(tmp_path_factory.mktemp("bge"))


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    return make_bge(
        tmp_path_factory.mktemp("larger"), tokenizer=False, vocab_size=20_000, hidden_size=256, intermediate_size=1024
    )


def same(ours, theirs):
    ours, theirs = checkpoint.parameters(ours), checkpoint.parameters(theirs)
    assert ours.keys() == theirs.keys()
    for path, value in ours.items():
        assert value.dtype == theirs[path].dtype
        np.testing.assert_array_equal(np.asarray(value), np.asarray(theirs[path]), err_msg=path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip_is_exact_and_needs_no_rules(source, tmp_path, monkeypatch, dtype):
    convert.convert(source, tmp_path / "out", dtype=dtype, progress=False)
    model = convert.load(source, dtype=dtype)
    monkeypatch.setattr(convert, "NAMES", {})
    monkeypatch.setattr(rules, "fill", None)
    assert checkpoint.is_converted(tmp_path / "out")
    same(checkpoint.load(tmp_path / "out", dtype=dtype), model)
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert (tmp_path / "out/config.json").read_bytes() == (source / "config.json").read_bytes()
    assert os.listdir(tmp_path) == ["out"]
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_the_sources_dtype_is_kept(source, tmp_path):
    state = {name: tensor.bfloat16() for name, tensor in load_file(source / "model.safetensors").items()}
    shutil.copytree(source, tmp_path / "in")
    save_file(state, tmp_path / "in/model.safetensors")
    convert.convert(tmp_path / "in", tmp_path / "out", progress=False)
    assert checkpoint.read_mark(tmp_path / "out")["dtype"] == "bfloat16"
    convert.convert(source, tmp_path / "wide", progress=False)
    assert checkpoint.read_mark(tmp_path / "wide")["dtype"] == "float32"
    assert checkpoint.load(tmp_path / "wide", dtype="bfloat16").word.dtype == jnp.bfloat16


def test_progress_bar(source, tmp_path, capsys):
    convert.convert(source, tmp_path / "out", progress=True)
    assert "reading: 100%" in capsys.readouterr().err


def test_existing_targets(source, tmp_path):
    out = tmp_path / "out"
    convert.convert(source, out, dtype="float32", progress=False)
    with pytest.raises(CheckpointError, match="exists; choose another"):
        convert.convert(source, out, progress=False)
    convert.convert(source, out, dtype="bfloat16", progress=False, overwrite=True)
    assert checkpoint.read_mark(out)["dtype"] == "bfloat16"
    with pytest.raises(CheckpointError, match="converted already"):
        convert.convert(out, tmp_path / "twice", progress=False)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").touch()
    for target in (tmp_path / "mine", source):
        with pytest.raises(CheckpointError, match="no converted model"):
            convert.convert(source, target, progress=False, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["mine", "out"]


def test_target_that_cannot_be_written(source, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match="could not be written"):
        convert.convert(source, tmp_path / "file/out", progress=False)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_target_without_permission(source, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(ModelError, match="could not be written"):
        convert.convert(source, tmp_path / "closed/out", progress=False)


def test_full_disk(larger, tmp_path):
    """A limit on the size of files stands for the disk: writing fails in the middle of the weights."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, 5_000_000)); "
    result = subprocess.run(
        [sys.executable, "-c", limit + CONVERT, larger, tmp_path / "out"], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 1
    assert re.search(
        r"^jaxrank\.errors\.CheckpointError: .*/out could not be written: .*File too large", result.stderr, re.M
    )
    assert os.listdir(tmp_path) == []


def test_what_goes_on_writing_after_a_failure(source, tmp_path, monkeypatch):
    """As TensorStore's threads may: their files keep the folder from being removed, or make it again."""
    writers = []

    def fail(hidden, model):
        def write():
            end = time.monotonic() + 0.3
            while time.monotonic() < end:
                with contextlib.suppress(OSError):  # the folder may vanish in between
                    (hidden / "weights").mkdir(parents=True, exist_ok=True)
                    (hidden / "weights" / "late").write_bytes(b"x")

        writers.append(threading.Thread(target=write))
        writers[0].start()
        raise OSError("no space left")

    monkeypatch.setattr(checkpoint, "save", fail)
    with pytest.raises(ModelError, match="no space left; nothing was left there"):
        convert.convert(source, tmp_path / "out", progress=False)
    writers[0].join()
    assert os.listdir(tmp_path) == []


def test_a_killed_conversion_leaves_nothing_that_loads(larger, tmp_path):
    """Killed at five moments, beginning when the hidden folder shows up."""
    for i, delay in enumerate((0.0, 0.005, 0.02, 0.05, 0.1)):
        parent, out = tmp_path / str(i), tmp_path / str(i) / "out"
        parent.mkdir()
        process = subprocess.Popen([sys.executable, "-c", CONVERT, larger, out], stderr=subprocess.DEVNULL)
        while not os.listdir(parent) and process.poll() is None:
            time.sleep(0.001)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if out.exists():  # it was done before the signal
            same(checkpoint.load(out, dtype="float32"), convert.load(larger, dtype="float32"))
        for left in parent.glob(".out.*"):
            assert not checkpoint.is_converted(left) or checkpoint.load(left, dtype="float32")
        shutil.rmtree(parent)


@pytest.fixture
def pickled(source, tmp_path):
    """The same model with .bin weights only."""
    folder = tmp_path / "pickled"
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(load_file(source / "model.safetensors"), folder / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize("form", ["zip", "legacy", "shards", "bfloat16"])
def test_bin_weights(source, pickled, tmp_path, form):
    state = torch.load(pickled / "pytorch_model.bin", weights_only=True)
    if form == "legacy":
        torch.save(state, pickled / "pytorch_model.bin", _use_new_zipfile_serialization=False)
        assert not zipfile.is_zipfile(pickled / "pytorch_model.bin")
    elif form == "bfloat16":
        torch.save({k: v.bfloat16() for k, v in state.items()}, pickled / "pytorch_model.bin")
    elif form == "shards":
        (pickled / "pytorch_model.bin").unlink()
        names = sorted(state)
        places = {name: f"pytorch_model-{i % 2}.bin" for i, name in enumerate(names)}
        for file in set(places.values()):
            torch.save({name: state[name] for name in names if places[name] == file}, pickled / file)
        (pickled / "pytorch_model.bin.index.json").write_text(f'{{"weight_map": {places}}}'.replace("'", '"'))
    convert.convert(pickled, tmp_path / "out", progress=False)
    dtype = "bfloat16" if form == "bfloat16" else "float32"
    assert checkpoint.read_mark(tmp_path / "out")["dtype"] == dtype
    if form != "bfloat16":
        same(checkpoint.load(tmp_path / "out", dtype=dtype), convert.load(source, dtype=dtype))


def test_bin_shards_stay_in_the_folder(pickled, tmp_path):
    (pickled / "pytorch_model.bin").rename(tmp_path / "outside.bin")
    (pickled / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "../outside.bin"}}')
    with pytest.raises(CheckpointError, match="same folder"):
        convert.convert(pickled, tmp_path / "out", progress=False)


class Malicious:
    def __reduce__(self):
        return (os.mkdir, ("owned",))


@pytest.mark.parametrize("content", ["torch", "pickle", "nonsense", "number"])
def test_bin_with_anything_else_is_refused(pickled, tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    path = pickled / "pytorch_model.bin"
    if content == "torch":
        torch.save({"a": Malicious()}, path)
    elif content == "number":
        torch.save({"a": 3}, path)
    else:
        path.write_bytes(pickle.dumps(Malicious()) if content == "pickle" else b"nonsense")
    with pytest.raises(CheckpointError, match="safetensors weights"):
        convert.convert(pickled, tmp_path / "out", progress=False)
    assert not (tmp_path / "owned").exists()
    assert not (tmp_path / "out").exists()


def test_bin_without_torch(pickled, tmp_path, monkeypatch):
    really = builtins.__import__

    def without_torch(name, *args, **kwargs):
        if name == "torch":
            raise ImportError("No module named 'torch'")
        return really(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_torch)
    with pytest.raises(CheckpointError, match="pip install torch, or get the model with safetensors"):
        convert.convert(pickled, tmp_path / "out", progress=False)


def test_bin_with_a_torch_that_is_too_old(pickled, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    with pytest.raises(CheckpointError, match=r"install torch 2\.6 or newer"):
        convert.convert(pickled, tmp_path / "out", progress=False)
