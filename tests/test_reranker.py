"""Reranker against transformers' own tokenizer and classifier; its order, its limits, what it refuses and how."""

from __future__ import annotations

import io
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, XLMRobertaForSequenceClassification

from jaxrank.errors import CheckpointError, JaxrankError, RequestError, TooLongError
from jaxrank.reranker import Reranker, sigmoid
from jaxrank.text.tokenizer import PairTokenizer
from tests.checkpoints import TEXT, make_bge
from tests.test_tokens import as_published

LIMIT = 64
QUERY = "what is panda?"
DOCUMENTS = [
    "hi",
    *TEXT[:3],
    "",
    "nul \x00 byte",
    "🐼 emoji, ﬁ ligature, 北京是中国的首都。",
    "The giant panda is endemic to China. " * 30,
    "Paris " * 70,
    "x" * 3000,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bge(tmp_path_factory.mktemp("bge"), max_position_embeddings=LIMIT + 2)


def load(folder: Path, **settings: Any) -> Reranker:
    settings = {"dtype": "float32", "compile_cache": None, "row_tokens": 128, **settings}
    return Reranker.from_pretrained(folder, **settings)


@pytest.fixture(scope="module")
def reranker(folder: Path) -> Reranker:
    return load(folder)


@pytest.fixture(scope="module")
def published(folder: Path) -> Callable[[Sequence[tuple[str, str]]], np.ndarray]:
    """Logits of pairs as the publisher's script gets them: its tokenizer and class, one pair at a time."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = XLMRobertaForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def logits(pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        ids = [as_published(tokenizer, query, document, LIMIT) for query, document in pairs]
        return np.array([model(torch.tensor([row])).logits.item() for row in ids])

    return logits


class TestParity:
    @pytest.mark.parametrize("query", [QUERY, "", "Where do pandas live? " * 20], ids=["short", "empty", "too long"])
    def test_score(self, reranker: Reranker, published: Any, query: str) -> None:
        want = published([(query, document) for document in DOCUMENTS])
        assert want.std() > 0.05, "logits that hardly differ would prove nothing"
        got = reranker.score(query, DOCUMENTS, raw=True)
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
        probabilities = reranker.score(query, DOCUMENTS)
        assert probabilities.dtype == np.float32
        np.testing.assert_allclose(probabilities, 1 / (1 + np.exp(-want)), rtol=0, atol=1e-4)

    def test_rank(self, reranker: Reranker, published: Any) -> None:
        want = published([(QUERY, document) for document in DOCUMENTS])
        ranked = reranker.rank(QUERY, DOCUMENTS)
        assert sorted(item.index for item in ranked) == list(range(len(DOCUMENTS)))
        assert np.diff(want[[item.index for item in ranked]]).max() < 2e-4, "falling, as far as parity reaches"
        assert [item.document for item in ranked] == [DOCUMENTS[item.index] for item in ranked]
        assert [item.score for item in ranked] == reranker.score(QUERY, DOCUMENTS)[[i.index for i in ranked]].tolist()
        for top_n in (1, 3, len(DOCUMENTS), 1000):
            assert reranker.rank(QUERY, DOCUMENTS, top_n=top_n) == ranked[:top_n]

    def test_predict(self, reranker: Reranker, published: Any) -> None:
        pairs = [(query, document) for document in DOCUMENTS for query in (QUERY, TEXT[2])]
        got = reranker.predict(pairs, raw=True)
        np.testing.assert_allclose(got, published(pairs), rtol=0, atol=1e-4)
        np.testing.assert_array_equal(reranker.predict([list(pair) for pair in pairs]), sigmoid(got))  # type: ignore
        np.testing.assert_array_equal(reranker.predict(np.array(pairs)), sigmoid(got))  # type: ignore

    def test_bfloat16(self, folder: Path, published: Any) -> None:
        """That the dtype arrives; how near it comes is measured in tests/models."""
        want = published([(QUERY, document) for document in DOCUMENTS])
        got = load(folder, dtype="bfloat16").score(QUERY, DOCUMENTS, raw=True)
        assert got.dtype == np.float32
        assert 1e-5 < np.abs(got - want).max() <= 0.1


class TestOrder:
    def test_ties_by_index(self, folder: Path, tmp_path: Path) -> None:
        """A head of zeros scores every document alike, to the last bit."""
        shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
        state = load_file(folder / "model.safetensors")
        state["classifier.out_proj.weight"].zero_()
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
        reranker = load(tmp_path)
        ranked = reranker.rank(QUERY, DOCUMENTS * 9)
        assert len({item.score for item in ranked}) == 1
        assert [item.index for item in ranked] == list(range(9 * len(DOCUMENTS)))
        assert [item.index for item in reranker.rank(QUERY, DOCUMENTS, top_n=2)] == [0, 1]

    def test_equal_documents_score_alike_wherever_they_stand(self, reranker: Reranker) -> None:
        scores = reranker.score(QUERY, DOCUMENTS * 5, raw=True).reshape(5, -1)
        assert np.ptp(scores, axis=0).max() <= 1e-5

    def test_no_documents(self, reranker: Reranker) -> None:
        assert reranker.score(QUERY, []).shape == reranker.predict([]).shape == (0,)
        assert reranker.rank(QUERY, []) == reranker.rank(QUERY, [], top_n=3) == []

    def test_pairs_are_encoded_in_order_and_a_repeated_query_once(
        self, reranker: Reranker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pairs = [("a", "one"), ("a", "two"), ("b", "one"), ("a", "three")]
        alone = [reranker.encode(query, [document])[0].tokens.tolist() for query, document in pairs]
        calls, encode = [], reranker.encode
        monkeypatch.setattr(reranker, "encode", lambda *args, **_: calls.append(args) or encode(*args))
        assert [pair.tokens.tolist() for pair in reranker.encode_pairs(pairs)] == alone
        assert calls == [("a", ["one", "two", "three"]), ("b", ["one"])]
        np.testing.assert_array_equal(
            reranker.predict([(QUERY, document) for document in DOCUMENTS]), reranker.score(QUERY, DOCUMENTS)
        )

    def test_threads_encode_at_once(self, reranker: Reranker) -> None:
        """More work than one switch of threads takes, and no two alike."""
        jobs = [(f"{QUERY} {i}", [f"{i} {document}" for document in DOCUMENTS]) for i in range(60)]

        def ids(job: tuple[str, list[str]]) -> list[list[int]]:
            return [pair.tokens.tolist() for pair in reranker.encode(*job)]

        serial = [ids(job) for job in jobs]
        assert len({str(job) for job in serial}) == len(jobs)
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(ids, jobs * 3)) == serial * 3


class TestLimits:
    @pytest.mark.parametrize("max_length", [8, 9, 12, 15, 16, 40, LIMIT])
    def test_no_pair_is_longer_than_asked(self, folder: Path, max_length: int) -> None:
        reranker = load(folder, max_length=max_length)
        assert reranker.max_length == max_length
        whole = PairTokenizer(folder, 10_000)
        documents = [*DOCUMENTS, "</s></s> <s> is text"]
        for query in ("", "q</s>", "Where do pandas live? " * 30):
            (bare,) = whole.encode(query, [""])
            kept = min(len(bare) - 4, max_length * 3 // 4, max_length - 4)
            for pair, all_of_it in zip(reranker.encode(query, documents), whole.encode(query, documents), strict=True):
                room = min(max_length - 4 - kept, len(all_of_it) - len(bare))
                assert len(pair) == 4 + kept + room <= max_length
                assert pair.dropped == len(all_of_it) - len(pair)
                tokens = pair.tokens.tolist()
                assert (tokens[0], tokens[-1], tokens.count(2)) == (0, 2, 3), "the frame is whole"

    @pytest.mark.parametrize("max_length", [-1, 0, 7, LIMIT + 1])
    def test_lengths_that_the_model_does_not_take(self, folder: Path, max_length: int) -> None:
        with pytest.raises(RequestError, match=f"max_length is {max_length}; this model takes 8 to {LIMIT} tokens"):
            load(folder, max_length=max_length)

    def test_truncation_refused(self, reranker: Reranker) -> None:
        with pytest.raises(TooLongError, match=r"documents\[1\] with its query has at least"):
            reranker.encode(QUERY, ["hi", "panda " * 100], truncate=False)


class TestRefusals:
    @pytest.mark.parametrize(
        "call, message",
        [
            (lambda r: r.score(QUERY, "hi"), "documents must be a list of strings, got one string; wrap it in a list"),
            (lambda r: r.rank(QUERY, "hi"), "documents must be a list of strings, got one string; wrap it in a list"),
            (lambda r: r.encode(QUERY, "hi"), "documents must be a list of strings, got one string; wrap it in a list"),
            (lambda r: r.score(QUERY, None), "documents must be a list of strings, got NoneType"),
            (lambda r: r.rank(QUERY, (d for d in "ab")), "documents must be a list of strings, got generator"),
            (lambda r: r.score(QUERY, b"hi"), "documents[0] must be a string, got int"),
            (lambda r: r.score(QUERY, ["hi", None]), "documents[1] must be a string, got NoneType"),
            (lambda r: r.rank(["hi"], ["hi"]), "query must be a string, got list"),
            (lambda r: r.score("a\ud800", ["hi"]), "query contains a lone surrogate at character 1"),
            (lambda r: r.rank(QUERY, ["hi", "\udfff"]), "documents[1] contains a lone surrogate at character 0"),
            (lambda r: r.predict([("a", "b"), ("a", 3)]), "pairs[1][1] must be a string, got int"),
            (lambda r: r.predict([("a", "b"), (None, "b")]), "pairs[1][0] must be a string, got NoneType"),
            (lambda r: r.predict([("a", "x\udc00")]), "pairs[0][1] contains a lone surrogate at character 1"),
            (lambda r: r.predict(("query", "text")), "pairs[0] must be a (query, document) pair, got 'query'; give a"),
            (lambda r: r.predict("ab"), "pairs[0] must be a (query, document) pair, got 'a'; give a list of pairs"),
            (lambda r: r.predict([("a", "b"), ("a", "b", "c")]), "pairs[1] must be a (query, document) pair, got ('a'"),
            (lambda r: r.predict([3]), "pairs[0] must be a (query, document) pair, got 3"),
            (lambda r: r.rank(QUERY, ["hi"], top_n=0), "top_n is 0; it must be at least 1"),
            (lambda r: r.rank(QUERY, ["hi"], top_n=-2), "top_n is -2; it must be at least 1"),
        ],
    )  # fmt: skip
    def test_requests(self, reranker: Reranker, call: Callable[[Reranker], Any], message: str) -> None:
        with pytest.raises(RequestError, match=re.escape(message)) as caught:
            call(reranker)
        assert isinstance(caught.value, JaxrankError)
        assert isinstance(caught.value, ValueError)

    def test_dtype(self, folder: Path) -> None:
        with pytest.raises(RequestError, match="dtype 'float16' is unknown; one of bfloat16, float32"):
            load(folder, dtype="float16")

    def test_tokenizer_of_another_model(self, folder: Path, tmp_path: Path) -> None:
        """Ids beyond the table would read its last row, and score without a word."""
        make_bge(tmp_path, tokenizer=False, vocab_size=50)
        shutil.copy(folder / "tokenizer.json", tmp_path)
        with pytest.raises(CheckpointError, match=r"tokenizer has \d{3} tokens, config\.json says vocab_size 50; use"):
            load(tmp_path)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


LONG = [f"{i} {TEXT[0]}" for i in range(60)]


class TestProgress:
    @pytest.mark.parametrize("stream", [Terminal(), io.StringIO()], ids=["terminal", "file"])
    @pytest.mark.parametrize("documents", [LONG, LONG[:3]], ids=["long", "short"])
    @pytest.mark.parametrize("progress", [True, False])
    def test_a_bar_for_long_jobs_on_a_terminal_unless_unwanted(
        self,
        reranker: Reranker,
        monkeypatch: pytest.MonkeyPatch,
        stream: io.StringIO,
        documents: list[str],
        progress: bool,
    ) -> None:
        stream.seek(0)
        stream.truncate()
        monkeypatch.setattr(sys, "stderr", stream)
        scores = reranker.score(QUERY, documents, progress=progress)
        assert [item.index for item in reranker.rank(QUERY, documents, progress=progress)] == np.argsort(
            -scores, kind="stable"
        ).tolist()
        shown = stream.getvalue()
        if progress and documents is LONG and stream.isatty():
            assert "scoring: 100%" in shown
            assert "60/60" in shown
        else:
            assert shown == ""


def test_sigmoid_takes_every_float32() -> None:
    largest = float(np.finfo(np.float32).max)
    logits = np.array([-largest, -1000, -80, 0, 2, 1000, largest], np.float32)
    want = [0, 0, np.exp(-80), 0.5, 1 / (1 + np.exp(-2)), 1, 1]
    np.testing.assert_allclose(sigmoid(logits), np.array(want), rtol=1e-6)
