"""CrossEncoder beside sentence-transformers' on the same random weights, in float32."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import sentence_transformers
import torch
from sentence_transformers.cross_encoder.evaluation import (
    CrossEncoderClassificationEvaluator,
    CrossEncoderCorrelationEvaluator,
    CrossEncoderRerankingEvaluator,
)
from torch import nn

import jaxrank
from tests.checkpoints import TEXT, make_bge

QUERY = "Where do pandas live?"
WORDS = " ".join(TEXT).split()
DOCUMENTS = ["hi", *TEXT, "", "hi", "The giant panda is endemic to China. " * 40, "Paris"]
PAIRS = [(query, document) for document in DOCUMENTS for query in (QUERY, "panda", "北京")]


def texts(seed: int, count: int, words: int) -> list[str]:
    """Different ones of so many words at most."""
    draw = np.random.default_rng(seed)
    return [f"{i} " + " ".join(draw.choice(WORDS, draw.integers(3, words))) for i in range(count)]


class Both(NamedTuple):
    ours: Any
    theirs: Any


def load(folder: Path, **arguments: Any) -> Both:
    own = dict(compile_cache=None, row_tokens=512)
    return Both(
        jaxrank.CrossEncoder(str(folder), **arguments, **own),
        sentence_transformers.CrossEncoder(str(folder), device="cpu", **arguments),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bge(tmp_path_factory.mktemp("bge"), max_position_embeddings=130)


@pytest.fixture(scope="module")
def both(folder: Path) -> Both:
    return load(folder)


def forms(value: Any) -> Any:
    """The type and shape of a result, and of what a list holds."""
    if isinstance(value, list):
        return [forms(one) for one in value]
    if isinstance(value, dict):
        return {name: forms(one) for name, one in value.items()}
    return type(value), getattr(value, "shape", None), getattr(value, "dtype", None)


@pytest.mark.parametrize("method", ["__init__", "predict", "rank"])
def test_signatures(method: str) -> None:
    def parameters(of: type) -> list[tuple[str, Any, Any]]:
        found = inspect.signature(getattr(of, method)).parameters.values()
        return [(p.name, p.default, p.kind) for p in found if p.name != "settings"]

    assert parameters(jaxrank.CrossEncoder) == parameters(sentence_transformers.CrossEncoder)


class TestPredict:
    @pytest.mark.parametrize("inputs", [PAIRS, tuple(PAIRS), np.array(PAIRS), PAIRS[4], list(PAIRS[4]), []])
    @pytest.mark.parametrize("convert", [{}, {"convert_to_tensor": True}, {"convert_to_numpy": False}])
    def test_forms_and_scores(self, both: Both, inputs: Any, convert: dict[str, bool]) -> None:
        ours, theirs = (model.predict(inputs, **convert) for model in both)
        if len(inputs):
            assert forms(ours) == forms(theirs)
            np.testing.assert_allclose(np.array(ours), np.array(theirs), rtol=0, atol=2e-5)
        else:
            assert type(ours) is type(theirs)
            assert len(ours) == len(theirs) == 0

    @pytest.mark.parametrize("activation", [nn.Identity(), nn.Sigmoid(), nn.Tanh(), torch.sigmoid, lambda x: 2 * x])
    def test_activations(self, both: Both, activation: Callable[..., Any]) -> None:
        ours, theirs = (model.predict(PAIRS, activation_fn=activation) for model in both)
        assert theirs.std() > 0.05, "scores that hardly differ would prove nothing"
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)

    @pytest.mark.parametrize("max_length", [24, 64])
    def test_long_documents_are_cut_alike(self, folder: Path, max_length: int) -> None:
        pairs = [(query, document) for query in texts(0, 4, 4) for document in texts(1, 10, 60)]
        ours, theirs = load(folder, max_length=max_length)
        tokens = [len(theirs.tokenizer(*pair)["input_ids"]) for pair in pairs]
        assert np.mean(np.array(tokens) > max_length) > 0.5
        np.testing.assert_allclose(
            ours.predict(pairs, activation_fn=nn.Identity()), theirs.predict(pairs, activation_fn=nn.Identity()),
            rtol=0, atol=1e-4,
        )  # fmt: skip

    @pytest.mark.parametrize("wrong", ["ab", [("a", "b", "c")], 3])
    def test_what_is_no_pair_is_an_error_for_both(self, both: Both, wrong: Any) -> None:
        with pytest.raises(ValueError, match="pair"):
            both.ours.predict(wrong)

    def test_softmax_and_batches_change_nothing(self, both: Both) -> None:
        ours, theirs = (model.predict(PAIRS, batch_size=3, apply_softmax=True) for model in both)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5)


class TestRank:
    @pytest.mark.parametrize(
        "arguments",
        [
            {}, dict(top_k=3), dict(top_k=99), dict(top_k=0), dict(return_documents=True),
            dict(activation_fn=lambda x: -x), dict(prompt="Find: "),
        ],
    )  # fmt: skip
    def test_the_same_items(self, both: Both, arguments: dict[str, Any]) -> None:
        ours, theirs = (model.rank(QUERY, DOCUMENTS, **arguments) for model in both)
        assert forms(ours) == forms(theirs)
        scores = [[item.pop("score") for item in items] for items in (ours, theirs)]
        np.testing.assert_allclose(scores[0], scores[1], rtol=0, atol=2e-5)
        if "hi" not in [item.get("text") for item in ours]:  # two equal documents may change places
            same = {2: 0, 6: 0}
            assert [same.get(i["corpus_id"], i["corpus_id"]) for i in ours] == [
                same.get(i["corpus_id"], i["corpus_id"]) for i in theirs
            ]


def test_folders_that_sentence_transformers_saved(both: Both, tmp_path: Path) -> None:
    """Activation, prompts and the default one come along."""
    prompts = {"query": "Find: ", "none": ""}
    saved = sentence_transformers.CrossEncoder(
        both.ours.reranker.name, device="cpu", activation_fn=nn.Identity(), prompts=prompts, default_prompt_name="query"
    )
    saved.save_pretrained(str(tmp_path))
    ours, theirs = load(tmp_path)
    assert ours.prompts == theirs.prompts == prompts
    for arguments in ({}, dict(prompt_name="none"), dict(prompt="See: ")):
        got, want = (model.predict(PAIRS, **arguments) for model in (ours, theirs))
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
    assert np.abs(ours.predict(PAIRS)).max() > 1, "these are logits"


class TestEvaluators:
    @pytest.mark.parametrize(
        "kind, arguments",
        [
            ("negative", {}),
            ("documents", {}),
            ("documents", dict(always_rerank_positives=False, at_k=3)),
        ],
    )
    def test_reranking(self, both: Both, tmp_path: Path, kind: str, arguments: dict[str, Any]) -> None:
        draw = np.random.default_rng(3)
        samples: list[dict[str, Any]] = []
        for number, query in enumerate(texts(4, 30, 8)):
            found = texts(100 + number, 12, 40)
            positive = draw.choice(found, draw.integers(1, 4), replace=False).tolist()
            others = [document for document in found if document not in positive]
            samples.append({"query": query, "positive": positive, kind: others if kind == "negative" else found})
        figures = []
        for name, model in zip(both._fields, both, strict=True):
            evaluator = CrossEncoderRerankingEvaluator(samples, name="random", **arguments)
            figures.append(model.evaluate(evaluator, str(tmp_path / name)))
            assert evaluator.primary_metric in figures[-1]
        ours, theirs = figures
        assert ours == pytest.approx(theirs, abs=1e-12)
        assert 0 < ours[f"random_ndcg@{arguments.get('at_k', 10)}"] < 1
        (table,) = (tmp_path / "ours").iterdir()
        assert table.read_text() == (tmp_path / "theirs" / table.name).read_text()
        assert both.ours.model_card_data.results[-1][1].keys() <= ours.keys()

    def test_others(self, both: Both) -> None:
        draw = np.random.default_rng(5)
        pairs = list(zip(texts(6, 40, 10), texts(7, 40, 30), strict=True))
        for evaluator in (
            CrossEncoderClassificationEvaluator(pairs, draw.integers(0, 2, 40).tolist()),
            CrossEncoderCorrelationEvaluator(pairs, draw.random(40).tolist()),
        ):
            ours, theirs = (evaluator(model) for model in both)
            assert ours == pytest.approx(theirs, abs=1e-4)
