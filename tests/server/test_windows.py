"""Long documents in windows over real HTTP: each dialect's answer, the server's default, and refusals."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from jaxrank import RequestError
from jaxrank.reranker import Reranker
from jaxrank.server import create_app
from tests.checkpoints import TEXT, make_bge
from tests.server.fakes import FakeReranker, rerank, serving

QUERY = "q" * 490
BODY = {"query": QUERY, "documents": ["1 234567897 abc", "3 short", "2 234567899 234567894"]}
"""The fake cuts documents at ten characters beside this query; a piece's score is the number that it begins with."""

WINDOWS = {2: [10, 20], 0: [10, 15], 1: [0, 7]}
"""Of the best pieces, best first."""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(FakeReranker(), max_windows=6) as base:
        yield base


def post(url: str, path: str, body: Any) -> Any:
    answer = httpx.post(url + path, json=body, timeout=30)
    assert answer.status_code == 200, answer.text
    return answer.json()


def results(answer: Any) -> list[dict[str, Any]]:
    return answer if isinstance(answer, list) else answer.get("results") or answer["data"]


class TestDialects:
    @pytest.mark.parametrize("name", ["vllm", "cohere", "jina", "voyage", "infinity", "llamacpp", "tei"])
    def test_a_key_on_each_result(self, url: str, name: str) -> None:
        body = {"query": QUERY, ("texts" if name == "tei" else "documents"): BODY["documents"]}
        path = f"/{name}/rerank"
        path = f"/{name}/v1/rerank" if name == "voyage" else path
        asked = post(url, path, body | {"long_document": "window", "raw_scores": True})
        assert [(one["index"], one["window"]) for one in results(asked)] == list(WINDOWS.items())
        score = "score" if name == "tei" else "relevance_score"
        assert [one[score] for one in results(asked)] == [9, 7, 3]
        if name != "tei":
            assert asked["usage"]["total_tokens"] == sum(map(len, BODY["documents"])), "of all that was computed"
        for unasked in ({}, {"long_document": None}, {"long_document": "truncate"}):
            plain = post(url, path, body | unasked | {"raw_scores": True})
            assert [one[score] for one in results(plain)] == [3, 2, 1]
            assert all("window" not in one for one in results(plain))

    def test_sglang_says_it_in_meta_info(self, url: str) -> None:
        answer = post(url, "/v1/rerank", BODY | {"long_document": "window", "top_n": 2})
        assert answer == [
            {
                "score": 9.0,
                "document": BODY["documents"][2],
                "index": 2,
                "meta_info": {"prompt_tokens": 21, "truncated_tokens": 0, "window": [10, 20]},
            },
            {
                "score": 7.0,
                "document": BODY["documents"][0],
                "index": 0,
                "meta_info": {"prompt_tokens": 15, "truncated_tokens": 0, "window": [10, 15]},
            },
        ]
        plain = post(url, "/v1/rerank", BODY)
        assert all(one["meta_info"].keys() == {"prompt_tokens", "truncated_tokens"} for one in plain)

    def test_scores_of_pairs(self, url: str) -> None:
        sides = {"queries": [QUERY, "other", QUERY], "documents": BODY["documents"]}
        data = post(url, "/vllm/score", sides | {"long_document": "window", "raw_scores": True})["data"]
        assert [(one["score"], one["window"]) for one in data] == [(7, [10, 15]), (3, [0, 7]), (9, [10, 20])]
        items = {"query": QUERY, "items": BODY["documents"], "long_document": "window"}
        assert post(url, "/sglang/v1/score", items)["scores"] == [[7], [3], [9]]

    def test_tokens_of_windows(self, url: str) -> None:
        shown = post(url, "/tokenize?render=true", BODY | {"long_document": "window"})
        assert shown["prompts"] == ["1 23456789", "7 abc", "3 short", "2 23456789", "9 23456789", "4"]


class TestServer:
    def test_its_default(self) -> None:
        with serving(FakeReranker(), long_document="window") as base:
            assert [one["score"] for one in post(base, "/v1/rerank", BODY)] == [9, 7, 3]
            told = post(base, "/v1/rerank", BODY | {"long_document": "truncate"})
            assert [one["score"] for one in told] == [3, 2, 1]
            assert "window" not in told[0]["meta_info"]
        with pytest.raises(RequestError, match="long_document 'no' is unknown; one of truncate, window"):
            create_app(FakeReranker(), long_document="no")

    @pytest.mark.parametrize("value", ["windows", "", 3, True, ["window"]])
    def test_unknown_ways(self, url: str, value: Any) -> None:
        for path in ("/sglang/v1/rerank", "/cohere/v2/rerank", "/tei/rerank"):
            answer = httpx.post(url + path, json=BODY | {"long_document": value})
            assert answer.status_code == (422 if "tei" in path else 400)
            assert 'long_document must be "truncate", "window" or null; got ' in answer.text.replace("\\", "")


class TestModel:
    def test_scores_and_windows_are_those_of_the_library(self, tmp_path: Path) -> None:
        folder = make_bge(tmp_path, max_position_embeddings=66)
        reranker = Reranker.from_pretrained(folder, dtype="float32", compile_cache=None, row_tokens=128)
        query, documents = "Where do pandas live?", ["short", " ".join(TEXT) * 3, "\ufeff" + TEXT[1] * 2]
        want = reranker.rank(query, documents, long_document="window", progress=False)
        pairs = reranker.encode(query, documents, long_document="window")
        with serving(reranker, batch_rows=1, patience_s=60, max_windows=len(pairs)) as base:
            body = {"query": query, "documents": documents, "long_document": "window"}
            answer = post(base, "/sglang/v1/rerank", body | {"raw_scores": False})
            usage = post(base, "/cohere/v2/rerank", body)["usage"]
            too_many = rerank(base, body | {"max_tokens_per_doc": 9})
            too_short = rerank(base, body | {"max_tokens_per_doc": 5})
            too_large = rerank(base, body | {"documents": ["x", "x" * 2_000_000]})
        assert [one["index"] for one in answer] == [one.index for one in want]
        np.testing.assert_allclose([one["score"] for one in answer], [one.score for one in want], atol=1e-5)
        assert [tuple(one["meta_info"]["window"]) for one in answer] == [one.window for one in want]
        assert usage["total_tokens"] == sum(map(len, pairs)) == sum(one["meta_info"]["prompt_tokens"] for one in answer)
        for refused, text in (
            (too_many, "windows of 9 tokens, and one request may have"),
            (too_short, "documents[1] does not fit, and could only be split into windows of 5 tokens"),
            (too_large, "documents[1] has 2000000 characters, and one that may be split can have 1048576"),
        ):
            assert refused.status_code == 400, refused.text
            assert text in refused.json()["message"]
