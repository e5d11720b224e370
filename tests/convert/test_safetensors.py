"""Damaged and forged safetensors files are refused before any data is read."""

import json
import struct

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrank.convert import safetensors
from jaxrank.errors import CheckpointError


def entry(begin, end, shape, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def write(path, header, data, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def whole(tensor):
    return np.concatenate([chunk.copy() for chunk in tensor.chunks()])


@pytest.mark.parametrize("name, dtype", [("F64", "f8"), ("F32", "f4"), ("F16", "f2"), ("BF16", jnp.bfloat16)])
def test_reads_every_float_dtype(tmp_path, name, dtype):
    values = np.arange(24).reshape(4, 6).astype(dtype)
    scalar = np.asarray(7).astype(dtype)
    split = values.nbytes
    header = {
        "__metadata__": {"format": "pt"},
        "a": entry(0, split, [4, 6], name),
        "empty": entry(split, split, [0, 3], name),
        "one": entry(split, split + scalar.nbytes, [], name),
    }
    write(tmp_path / "model.safetensors", header, values.tobytes() + scalar.tobytes())
    tensors = safetensors.read_tensors(tmp_path)
    assert tensors is not None
    np.testing.assert_array_equal(whole(tensors["a"]), values)
    assert whole(tensors["a"]).dtype == values.dtype
    assert tensors["a"].shape == (4, 6)
    assert list(tensors["empty"].chunks()) == []
    assert whole(tensors["one"]) == [7]


def test_a_large_tensor_comes_in_small_chunks(tmp_path):
    values = np.random.default_rng(0).random((3001, 257), np.float32)
    write(tmp_path / "model.safetensors", {"a": entry(0, values.nbytes, [3001, 257])}, values.tobytes())
    tensors = safetensors.read_tensors(tmp_path)
    assert tensors is not None
    assert max(chunk.nbytes for chunk in tensors["a"].chunks()) < 300_000
    np.testing.assert_array_equal(whole(tensors["a"]), values)


GOOD = {"a": entry(0, 8, [2]), "b": entry(8, 16, [2])}

ATTACKS = {
    "header beyond the file": (GOOD, b"\0" * 16, 10_000, "cut short"),
    "huge header": (GOOD, b"\0" * 16, 2**63, "cut short"),
    "file cut short": (GOOD, b"\0" * 15, None, "cut short"),
    "bytes to spare": (GOOD, b"\0" * 17, None, "bytes to spare"),
    "not JSON": (b"{nonsense", b"", None, "JSON"),
    "not UTF-8": (b'{"\xff": 1}', b"", None, "JSON"),
    "deep JSON": (b"[" * 100_000, b"", None, "JSON"),
    "endless number": (b'{"a": ' + b"9" * 5000 + b"}", b"", None, "JSON"),
    "not an object": (b"[]", b"", None, "no object"),
    "a name twice": (b'{"a": {}, "a": {}}', b"", None, "twice"),
    "entry no object": ({"a": 3}, b"", None, "must have dtype"),
    "entry without shape": ({"a": {"dtype": "F32", "data_offsets": [0, 0]}}, b"", None, "must have dtype"),
    "unknown dtype": ({"a": entry(0, 8, [2], "F33")}, b"\0" * 8, None, "F33"),
    "dtype no string": ({"a": entry(0, 8, [2], ["F32"])}, b"\0" * 8, None, "dtype"),  # type: ignore[arg-type]
    "negative size": ({"a": entry(0, 8, [-2])}, b"\0" * 8, None, "shape"),
    "two negative sizes": ({"a": entry(0, 8, [-2, -1])}, b"\0" * 8, None, "shape"),
    "size no int": ({"a": entry(0, 8, [2.0])}, b"\0" * 8, None, "shape"),
    "size a bool": ({"a": entry(0, 4, [True])}, b"\0" * 4, None, "shape"),
    "huge size": ({"a": entry(0, 8, [2**62, 4])}, b"\0" * 8, None, "fill"),
    "wrong size": ({"a": entry(0, 8, [3])}, b"\0" * 8, None, "fill"),
    "offsets reversed": ({"a": entry(8, 0, [2])}, b"\0" * 8, None, "data_offsets"),
    "three offsets": ({"a": {**GOOD["a"], "data_offsets": [0, 8, 8]}}, b"\0" * 8, None, "data_offsets"),
    "offset outside": ({"a": entry(0, 800, [200])}, b"\0" * 8, None, "cut short"),
    "overlap": ({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, b"\0" * 12, None, "overlaps"),
    "hole": ({"a": entry(0, 8, [2]), "b": entry(12, 20, [2])}, b"\0" * 20, None, "4 bytes unused"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_damaged_files_are_refused(tmp_path, attack):
    header, data, length, message = ATTACKS[attack]
    write(tmp_path / "model.safetensors", header, data, length)
    with pytest.raises(CheckpointError, match=message) as caught:
        safetensors.read_tensors(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\0\0\0"])
def test_files_too_short_for_a_length(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="cut short"):
        safetensors.read_tensors(tmp_path)


def test_file_that_shrinks_while_it_is_read(tmp_path):
    path = write(tmp_path / "model.safetensors", GOOD, b"\0" * 16)
    tensors = safetensors.read_tensors(tmp_path)
    assert tensors is not None
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="while it was read"):
        list(tensors["b"].chunks())


def test_no_safetensors_is_none(tmp_path):
    assert safetensors.read_tensors(tmp_path) is None


def shards(folder, places):
    write(folder / "one.safetensors", {"a": entry(0, 8, [2])}, b"\0" * 8)
    write(folder / "two.safetensors", {"b": entry(0, 8, [2])}, b"\0" * 8)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def test_shards(tmp_path):
    shards(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    assert set(safetensors.read_tensors(tmp_path) or {}) == {"a", "b"}


@pytest.mark.parametrize(
    "places, message",
    [
        ({"a": "../one.safetensors"}, "same folder"),
        ({"a": "/etc/passwd"}, "same folder"),
        ({"a": "sub/one.safetensors"}, "same folder"),
        ({"a": "..\\one.safetensors"}, "same folder"),
        ({"a": ".."}, "same folder"),
        ({"a": 3}, "same folder"),
        ({"a": "one.safetensors", "b": "three.safetensors"}, "three.safetensors, which does not exist"),
        ({"a": "two.safetensors", "b": "one.safetensors"}, "disagree about a, b"),
        ({"a": "one.safetensors", "c": "two.safetensors"}, "disagree about b, c"),
        ({}, "weight_map"),
        (["a"], "weight_map"),
    ],
)
def test_bad_indexes_are_refused(tmp_path, places, message):
    shards(tmp_path, places)
    with pytest.raises(CheckpointError, match=message):
        safetensors.read_tensors(tmp_path)
