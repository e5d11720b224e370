"""A model opened up: the pieces on every family, stacked and not; examples/ compares them with transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrank import Reranker, convert
from jaxrank.models.layers import stack_layers
from jaxrank.research import each_layer, hidden_states, own_tokens, with_attention
from jaxrank.runtime.packing import pack
from jaxrank.runtime.programs import take_tower
from jaxrank.types import Encoded
from tests.checkpoints import make_bge, make_qwen3, make_qwen3_vl

FAMILIES: dict[str, Callable[[Path], Path]] = {
    "bge": lambda folder: make_bge(folder, num_hidden_layers=3),
    "qwen3": lambda folder: make_qwen3(folder, num_hidden_layers=3),
    "qwen3-vl": make_qwen3_vl,
}


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILIES[request.param](tmp_path_factory.mktemp("model"))


def model_of(folder: Path) -> Any:
    model: Any = convert.load(folder, dtype="float32")
    take_tower(model)
    return model


def row(model: Any) -> Any:
    rng = np.random.default_rng(0)
    pairs = [Encoded(rng.integers(5, 300, n).astype(np.int32), 0 if not model.causal else n - 1) for n in (20, 3, 41)]
    return jax.tree.map(jnp.asarray, pack(pairs, 70, causal=model.causal))


@nnx.jit
def logits(model: Any, *arguments: Any) -> jax.Array:
    return model(*arguments)


class TestModels:
    def test_from_embeddings(self, folder: Path) -> None:
        model = model_of(folder)
        batch = row(model)
        plain, embeddings = logits(model, batch), model.token_embeddings(batch)
        assert np.array_equal(plain, logits(model, batch, embeddings))
        assert np.array_equal(embeddings, np.asarray(model.word[...])[batch.tokens])
        moved = logits(model, batch, embeddings.at[22].multiply(0.5))  # of the second pair
        assert np.flatnonzero(np.asarray(moved != plain)).tolist() == [1]

    def test_states_of_stacked_layers(self, folder: Path) -> None:
        model, stacked = model_of(folder), model_of(folder)
        stack_layers(stacked)
        batch = row(model)
        count = len(model.layers)
        assert len(each_layer(model.layers)) == len(each_layer(stacked.layers)) == count
        states, other = (nnx.jit(hidden_states)(one, batch) for one in (model, stacked))
        assert len(states) == count + 2
        for a, b in zip(states, other, strict=True):
            assert np.abs(a - b).max() < 1e-5
        assert np.abs(model.classify(states[-1][batch.score_at]) - logits(model, batch))[:3].max() < 1e-5

    def test_dense_attention_has_gradients(self, folder: Path) -> None:
        model = model_of(folder)
        if hasattr(model, "adding"):
            pytest.skip("its layers are Qwen3's")
        dense, batch = with_attention(model, "dense"), row(model)
        assert model.implementation is None, "the given model stays what it is"
        slope = nnx.jit(lambda model, batch, at: jax.value_and_grad(lambda at: model(batch, at)[1])(at))
        logit, slopes = slope(dense, batch, dense.token_embeddings(batch))
        assert abs(float(logit - logits(model, batch)[1])) < 1e-5
        moved = np.flatnonzero(np.abs(np.asarray(slopes)).max(-1)).tolist()
        assert moved == [20, 21, 22], "the logit of the second pair depends on its tokens alone"
        assert np.isfinite(slopes).all()

    def test_parameters_are_shared(self, folder: Path) -> None:
        model = model_of(folder)
        assert with_attention(model, "dense").last.attention.out is not None
        before, after = (jax.tree.leaves(one.word) for one in (model, with_attention(model, "dense")))
        assert before[0] is after[0], "no second copy of the weights"

    def test_unknown_attention(self, folder: Path) -> None:
        model = model_of(folder)
        with pytest.raises(ValueError, match="'desne' is unknown; one of"):
            with_attention(model, "desne")


class TestOwnTokens:
    @pytest.mark.parametrize("text", ["Pandas live in China.", "yes", " ", "", "</s><|im_end|>\n"])
    @pytest.mark.parametrize("make", [make_bge, make_qwen3])
    def test_of_query_and_document(self, make: Callable[..., Path], text: str, tmp_path: Path) -> None:
        reranker = Reranker.from_pretrained(make(tmp_path), dtype="float32")
        ids = [token.id for token in reranker.tokens_of(text)]
        for query, document, blank in ((text, "a panda", ("", "a panda")), ("a panda", text, ("a panda", ""))):
            (pair,), (empty,) = reranker.encode(query, [document]), reranker.encode(blank[0], [blank[1]])
            found = pair.tokens[own_tokens(pair, empty)].tolist()
            decode = reranker.tokenizer.tokenizer.decode
            assert found == ids or decode(found).strip() == decode(ids).strip()
            assert len(pair.tokens) - len(found) <= len(empty.tokens)

    def test_shared_prefix(self, tmp_path: Path) -> None:
        reranker = Reranker.from_pretrained(make_qwen3(tmp_path), dtype="float32")
        pair, blank = reranker.encode("panda", ["a bear", ""])
        with pytest.raises(ValueError, match="encode each as a request of one document"):
            own_tokens(pair, blank)


def test_rows_are_only_as_long_as_needed() -> None:
    """The examples pack rows of any length, not only of the ladder's: the same logits."""
    reranker = Reranker.from_pretrained(dtype="float32")
    pairs = reranker.encode("what is panda?", ["hi", "The giant panda is a bear."])
    found = logits(reranker.model, pack(pairs, 71))[:2]
    assert np.abs(found - reranker.score_encoded(pairs)).max() < 1e-5
