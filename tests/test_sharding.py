"""One model over eight simulated devices gives the logits of one device, with the planned communication."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from jaxrank import convert
from jaxrank.errors import UnsupportedError
from jaxrank.packing import pack
from jaxrank.scoring import whole
from jaxrank.sharding import make_mesh, specs
from jaxrank.types import Encoded, Packed
from tests.checkpoints import make_bge, make_qwen3

TOKENS = 384
SIZES: dict[str, Any] = dict(num_hidden_layers=3, num_attention_heads=8, hidden_size=64)
GROUPS = {"8 copies": 1, "2 copies on 4 devices each": 4, "1 copy on 8 devices": 8}


@pytest.fixture(scope="module", params=["bge", "qwen3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "bge":
        return make_bge(folder, tokenizer=False, **SIZES)
    return make_qwen3(folder, num_key_value_heads=8, **SIZES)


def rows(model: Any, count: int) -> Packed:
    """That many different rows, as one with a leading axis."""
    rng = np.random.default_rng(count)
    packed = []
    for _ in range(count):
        prefix = rng.integers(5, 400, rng.integers(5, 90) if model.causal else 0).astype(np.int32)
        lengths = rng.integers(3, 90, 3)
        pairs = [Encoded(rng.integers(5, 400, n).astype(np.int32), n - 1, prefix=prefix) for n in lengths.tolist()]
        packed.append(pack(pairs, TOKENS, causal=model.causal))
    return jax.tree.map(lambda *leaves: np.stack(leaves), *packed)


@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
def test_logits_and_communication(folder: Path, group: int) -> None:
    mesh = make_mesh(jax.devices(), group)
    batch = rows(convert.load(folder, dtype="float32"), 8 // group)
    alone, state = whole(convert.load(folder, dtype="float32"))
    want = np.stack([alone(state, jax.tree.map(lambda leaf, i=i: leaf[i], batch)) for i in range(8 // group)])
    assert want[:, :3].std() > 0.03, "logits that hardly differ would prove nothing: 3,000 times the tolerance"
    together, state = whole(convert.load(folder, dtype="float32"), mesh)
    assert np.abs(np.asarray(together(state, batch)) - want).max() <= 1e-5
    compiled = together.lower(state, batch).compile().as_text()
    sums = 2 * 2 if group > 1 else 0
    assert compiled.count(" all-reduce(") == sums, "two in the scan's layer and two in the last, none without groups"
    assert not any(name in compiled for name in ("all-gather", "all-to-all", "collective-permute", "reduce-scatter"))


def test_every_device_has_its_part_of_the_matrices(folder: Path) -> None:
    """Embeddings, norms, the head and biases behind a sum are whole on every device, matrices in eight parts."""
    mesh = make_mesh(jax.devices(), 8)
    _, state = whole(convert.load(folder, dtype="float32"), mesh)
    layers, places = nnx.state(state)["layers"], specs(state, mesh)["layers"]
    checked = 0
    for (path, values), (_, spec) in zip(*map(jax.tree_util.tree_leaves_with_path, (layers, places)), strict=True):
        is_matrix = values.ndim - 1 > 1 and "norm" not in str(path)
        if is_matrix and "bias" not in str(path):
            checked += 1
            assert jax.device_put(values, NamedSharding(mesh, spec)).addressable_shards[0].data.size == values.size / 8
    assert checked >= 6


def test_heads_that_cannot_be_shared(tmp_path: Path) -> None:
    model = convert.load(make_qwen3(tmp_path), dtype="float32")
    with pytest.raises(UnsupportedError, match=r"the model has 2 heads .* which 8 devices cannot share evenly; choose"):
        whole(model, make_mesh(jax.devices(), 8))


def test_devices_that_cannot_be_grouped() -> None:
    with pytest.raises(UnsupportedError, match="8 devices cannot be split into groups of 3; choose a divisor"):
        make_mesh(jax.devices(), 3)
