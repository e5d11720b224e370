"""One model over eight simulated devices gives the logits of one device, with the planned communication."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from jaxrank import Reranker, convert
from jaxrank.errors import UnsupportedError
from jaxrank.runtime.packing import pack
from jaxrank.runtime.patch_packing import pack_patches
from jaxrank.runtime.programs import take_tower, whole, whole_tower
from jaxrank.sharding import choose_mesh, make_mesh, specs
from jaxrank.types import Encoded, MediaTokens, Packed, Patches, PatchRow
from jaxrank.weights import converted as checkpoint
from tests.checkpoints import TEXT, make_bge, make_qwen3, make_qwen3_vl
from tests.media import photo

TOKENS = 384
SIZES: dict[str, Any] = dict(num_hidden_layers=3, num_attention_heads=8, hidden_size=64)
GROUPS = {"8 copies": 1, "2 copies on 4 devices each": 4, "1 copy on 8 devices": 8}
OTHERS = ("all-gather", "all-to-all", "collective-permute", "reduce-scatter")


@pytest.fixture(scope="module", params=["bge", "qwen3", "qwen3_vl"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "bge":
        return make_bge(folder, **SIZES)
    if request.param == "qwen3":
        return make_qwen3(folder, num_key_value_heads=8, **SIZES)
    return make_vl(folder)


def make_vl(folder: Path) -> Path:
    """One text layer that adds features, one like the others, and the last."""
    return make_qwen3_vl(
        folder, text=dict(num_key_value_heads=8, **SIZES), vision=dict(num_heads=8, deepstack_visual_indexes=[1])
    )


def load(folder: Path) -> Any:
    model = convert.load(folder, dtype="float32")
    take_tower(model)
    return model


def rows(model: Any, count: int) -> Packed:
    """That many different rows, as one with a leading axis."""
    rng = np.random.default_rng(count)
    packed = []
    for _ in range(count):
        prefix = rng.integers(5, 400, rng.integers(5, 90) if model.causal else 0).astype(np.int32)
        lengths = rng.integers(3, 90, 3)
        pairs = [Encoded(rng.integers(5, 400, n).astype(np.int32), n - 1, prefix=prefix) for n in lengths.tolist()]
        row = pack(pairs, TOKENS, causal=model.causal)
        if hasattr(model, "adding"):
            here = rng.random(TOKENS) < 0.3
            features = rng.normal(size=(TOKENS, 2, 64)).astype(np.float32) * here[:, None, None]
            positions = np.stack([row.positions] * 3) + rng.integers(0, 9, (3, TOKENS)).astype(np.int32)
            row = replace(row, positions=positions, media=MediaTokens(here, features))
        packed.append(row)
    return stacked(packed)


def stacked(rows: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *rows)


def patch_rows(count: int) -> PatchRow:
    """That many different rows of patches, as one with a leading axis."""
    rng = np.random.default_rng(count)
    packed = []
    for _ in range(count):
        media = [
            Patches(rng.normal(size=(4 * int(n), 1536)).astype(np.float32), (1, 2, 2 * int(n)))
            for n in rng.integers(1, 15, 3)
        ]
        packed.append(pack_patches(media, 256, values=1536, merge=2, side=6))
    return stacked(packed)


@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
def test_logits_and_communication(folder: Path, group: int) -> None:
    mesh = make_mesh(jax.devices(), group)
    model = load(folder)
    batch = rows(model, 8 // group)
    alone, state = whole(load(folder))
    want = np.stack([alone(state, jax.tree.map(lambda leaf, i=i: leaf[i], batch)) for i in range(8 // group)])
    assert want[:, :3].std() > 0.03, "logits that hardly differ would prove nothing: 3,000 times the tolerance"
    together, state = whole(load(folder), mesh)
    program = together.lower(state, batch).compile()
    assert np.abs(np.asarray(program(state, batch)) - want).max() <= 1e-5
    compiled = program.as_text()
    sums = 2 * (2 + len(getattr(model, "adding", ()))) if group > 1 else 0
    assert compiled.count(" all-reduce(") == sums, "two in the scan's layer and in each outside, none without groups"
    assert not any(name in compiled for name in OTHERS)


@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
def test_the_tower(tmp_path: Path, group: int) -> None:
    folder, mesh, batch = make_vl(tmp_path), make_mesh(jax.devices(), group), patch_rows(8 // group)
    alone, state = whole_tower(convert.load(folder, dtype="float32").vision)
    want = np.stack([alone(state, jax.tree.map(lambda leaf, i=i: leaf[i], batch)) for i in range(8 // group)])
    assert want[:, :3].std(1).mean() > 0.03, "tokens that hardly differ would prove nothing: 3,000 times the tolerance"
    together, state = whole_tower(convert.load(folder, dtype="float32").vision, mesh)
    program = together.lower(state, batch).compile()
    assert np.abs(np.asarray(program(state, batch)) - want).max() <= 1e-5
    compiled = program.as_text()
    sums = compiled.count(" all-reduce(")
    assert sums in ((5, 6) if group > 1 else (0,)), "two in each of two stages' scans, and the mergers' two, or as one"
    assert not any(name in compiled for name in OTHERS)


def test_every_device_has_its_part_of_the_matrices(folder: Path) -> None:
    """Embeddings, norms, the head and biases behind a sum are whole on every device, matrices in eight parts."""
    mesh = make_mesh(jax.devices(), 8)
    _, state = whole(load(folder), mesh)
    layers, places = nnx.state(state)["layers"], specs(state, mesh)["layers"]
    checked = 0
    for (path, values), (_, spec) in zip(*map(jax.tree_util.tree_leaves_with_path, (layers, places)), strict=True):
        is_matrix = values.ndim - 1 > 1 and "norm" not in str(path)
        if is_matrix and "bias" not in str(path):
            checked += 1
            assert jax.device_put(values, NamedSharding(mesh, spec)).addressable_shards[0].data.size == values.size / 8
    gated = "feed_forward" in layers
    assert checked == 4 + gated, "queries, keys and values; the output; up and down, and Qwen's gate"


def test_heads_that_cannot_be_shared(tmp_path: Path) -> None:
    model = convert.load(make_qwen3(tmp_path), dtype="float32")
    with pytest.raises(UnsupportedError, match=r"the model has 2 heads .* which 8 devices cannot share evenly; choose"):
        whole(model, make_mesh(jax.devices(), 8))


def test_devices_that_cannot_be_grouped() -> None:
    with pytest.raises(UnsupportedError, match="8 devices cannot be split into groups of 3; choose a divisor"):
        make_mesh(jax.devices(), 3)


DOCUMENTS = [f"{text} {'panda ' * n}" for n, text in enumerate(TEXT * 6)]


@pytest.mark.parametrize("family, copies, share", [("bge", 8, 1), ("qwen3_vl", 2, 4)])
def test_scores(tmp_path: Path, family: str, copies: int, share: int) -> None:
    """From files to scores, media included: rows are shared out among copies, and each device gets its part alone."""
    folder = place = make_vl(tmp_path) if family == "qwen3_vl" else make_bge(tmp_path / "published", **SIZES)
    if family == "bge":
        place = tmp_path / "converted"
        convert.convert(folder, place, progress=False)
    settings: Any = dict(dtype="float32", row_tokens=256, max_length=400, compile_cache=None)
    alone = Reranker.from_pretrained(folder, **settings)
    together = Reranker.from_pretrained(place, data_parallel=copies, tensor_parallel=share, **settings)
    assert alone.devices == "1 device (cpu)"
    assert together.devices == f"8 devices (cpu): {copies} x the weights, each on {share}"
    documents: list[Any] = [*DOCUMENTS]
    if alone.tower is not None:
        documents[3:3] = [photo(64 + 32 * i, 96, i) for i in range(5)]
    want = alone.score("Where do pandas live?", documents, raw=True, progress=False)
    assert want.std() > 0.03
    for some in (documents, documents[:5], documents[:1]):
        got = together.score("Where do pandas live?", some, raw=True, progress=False)
        assert np.abs(got - want[: len(some)]).max() <= 1e-5


class Device:
    """One with so many bytes of memory."""

    platform = device_kind = "toy"
    process_index = 0

    def __init__(self, memory: int) -> None:
        self.memory = memory

    def memory_stats(self) -> dict[str, int]:
        return {"bytes_limit": self.memory}


class TestChoice:
    def choose(self, folder: Path, memory: float, **asked: int) -> tuple[int, int]:
        """Copies, and devices to a copy, with eight devices of so many times the weights' memory."""
        outline = checkpoint.outline(checkpoint.read_config(folder), "float32")
        size = sum(value.size * value.dtype.itemsize for value in checkpoint.parameters(outline).values())
        mesh = choose_mesh(
            outline, [Device(int(size * memory)) for _ in range(8)], asked.get("data"), asked.get("tensor")
        )
        return (1, 1) if mesh is None else (mesh.shape["data"], mesh.shape["model"])

    def test_as_few_as_hold_it(self, tmp_path: Path) -> None:
        """The embedding, a tenth of the weights here, is on every device."""
        folder = make_qwen3(tmp_path, num_key_value_heads=8, vocab_size=300, **SIZES)
        assert self.choose(folder, 1.4) == (8, 1)
        assert self.choose(folder, 1.2) == (4, 2)
        assert self.choose(folder, 0.6) == (2, 4)
        assert self.choose(folder, 1.4, data=1) == (1, 1)
        assert self.choose(folder, 1.2, data=1) == (1, 2)
        assert self.choose(folder, 9.0, tensor=2) == (4, 2)
        assert self.choose(folder, 9.0, data=2, tensor=2) == (2, 2)
        with pytest.raises(UnsupportedError, match=r"GB on each of 8 devices, .* take more or larger devices"):
            self.choose(folder, 0.1)
        with pytest.raises(
            UnsupportedError, match="4 copies of the weights, each on 4 devices, are asked for; there are 8 devices"
        ):
            self.choose(folder, 9.0, data=4, tensor=4)
        with pytest.raises(UnsupportedError, match="there are 8"):
            self.choose(folder, 9.0, tensor=0)

    def test_heads_rule_some_out(self, tmp_path: Path) -> None:
        folder = make_qwen3(tmp_path, num_key_value_heads=2, vocab_size=300, **SIZES)
        with pytest.raises(UnsupportedError, match="the model has 2 heads"):
            self.choose(folder, 0.3)
        with pytest.raises(UnsupportedError, match="2 heads or ffn columns, which 4 devices cannot share"):
            self.choose(folder, 9.0, tensor=4)
