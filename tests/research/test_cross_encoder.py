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
SAMPLES = TEXT[:3]  # the fourth has what looks like a special token, which is markup to sentence-transformers
WORDS = " ".join(SAMPLES).split()
DOCUMENTS = ["hi", *SAMPLES, "", "hi", "The giant panda is endemic to China. " * 80, "Paris"]
PAIRS = [(query, document) for document in DOCUMENTS for query in (QUERY, "panda", "北京")]


def texts(seed: int, count: int, words: int) -> list[str]:
    """Different ones of so many words at most."""
    draw = np.random.default_rng(seed)
    return [f"{i} " + " ".join(draw.choice(WORDS, draw.integers(3, words))) for i in range(count)]


class Both(NamedTuple):
    ours: Any
    theirs: Any


def load(folder: Path, own: dict[str, Any], **arguments: Any) -> Both:
    return Both(
        jaxrank.CrossEncoder(str(folder), **arguments, **own),
        sentence_transformers.CrossEncoder(str(folder), device="cpu", **arguments),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bge(tmp_path_factory.mktemp("bge"), gain=1.6, max_position_embeddings=258)


@pytest.fixture(scope="module")
def both(folder: Path, own: dict[str, Any]) -> Both:
    return load(folder, own)


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
            numbers = [[float(one) for one in (scores if len(inputs) > 2 else [scores])] for scores in (ours, theirs)]
            np.testing.assert_allclose(*numbers, rtol=0, atol=2e-5)
        else:
            assert type(ours) is type(theirs)
            assert len(ours) == len(theirs) == 0

    @pytest.mark.parametrize("activation", [nn.Identity(), nn.Sigmoid(), nn.Tanh(), torch.sigmoid, lambda x: 2 * x])
    def test_activations(self, both: Both, activation: Callable[..., Any]) -> None:
        ours, theirs = (model.predict(PAIRS, activation_fn=activation) for model in both)
        assert theirs.std() > 0.01, "scores that hardly differ would prove nothing"
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)

    @pytest.mark.parametrize("max_length", [9, 64])
    def test_long_pairs_are_cut_alike(self, folder: Path, own: dict[str, Any], max_length: int) -> None:
        """Short and long queries with short and long documents."""
        found = [*texts(0, 3, 4), *texts(1, 3, 12), *texts(2, 3, 60), "", "panda " * 100]
        pairs = [(query, document) for query in found for document in found]
        ours, theirs = load(folder, own, activation_fn=nn.Identity(), max_length=max_length)
        whole = sentence_transformers.CrossEncoder(str(folder), device="cpu").tokenizer
        lengths = np.array([len(ids) for ids in whole(pairs)["input_ids"]])
        assert np.mean(lengths > max_length) > 0.3
        want = theirs.predict(pairs)
        np.testing.assert_allclose(ours.predict(pairs), want, rtol=0, atol=1e-4)
        ranked = {item["corpus_id"]: item["score"] for item in ours.rank(found[-1], found)}
        np.testing.assert_allclose([ranked[i] for i in range(len(found))], want[-len(found) :], rtol=0, atol=1e-4)

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
        same = {5: 0}  # equal documents, whose scores may differ in the last bit
        orders = [[same.get(item["corpus_id"], item["corpus_id"]) for item in items] for items in (ours, theirs)]
        assert orders[0] == orders[1]


def test_folders_that_sentence_transformers_saved(both: Both, own: dict[str, Any], tmp_path: Path) -> None:
    """Activation, prompts and the default one come along."""
    prompts = {"query": "Find: ", "none": ""}
    saved = sentence_transformers.CrossEncoder(
        both.ours.reranker.name, device="cpu", activation_fn=nn.Identity(), prompts=prompts, default_prompt_name="query"
    )
    saved.save_pretrained(str(tmp_path))
    ours, theirs = load(tmp_path, own)
    assert ours.prompts == theirs.prompts == prompts
    for arguments in ({}, dict(prompt_name="none"), dict(prompt="See: ")):
        got, want = (model.predict(PAIRS, **arguments) for model in (ours, theirs))
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
    logits = ours.predict(PAIRS, activation_fn=nn.Identity())
    np.testing.assert_allclose(ours.predict(PAIRS), logits, rtol=0, atol=1e-5)


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
        for number, query in enumerate(texts(4, 20, 8)):
            found = texts(100 + number, 12, 20)
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
