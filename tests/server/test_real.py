"""A real model behind real HTTP: the scores of the library, whoever shares the batch, and nothing compiled late."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest

from jaxrank.reranker import Reranker
from tests.checkpoints import TEXT, make_bge
from tests.server.fakes import rerank, serving

WORDS = " ".join(TEXT).split()


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> Reranker:
    folder = make_bge(tmp_path_factory.mktemp("bge"), max_position_embeddings=258)
    return Reranker.from_pretrained(folder, dtype="float32", compile_cache=None, row_tokens=256)


def request(seed: int) -> dict[str, Any]:
    generator = np.random.default_rng(seed)
    documents = [" ".join(generator.choice(WORDS, generator.integers(1, 80))) for _ in range(generator.integers(1, 12))]
    return {"query": f"{generator.choice(WORDS)} number {seed}?", "documents": documents}


def test_scores_are_those_of_the_library(reranker: Reranker) -> None:
    requests = [request(seed) for seed in range(40)]
    with serving(reranker, batch_rows=2, patience_s=60) as base, ThreadPoolExecutor(16) as pool:
        answers = [answer.json() for answer in pool.map(lambda body: rerank(base, body), requests)]
        state = httpx.get(base + "/ready").json()
        too_long = {"query": "q", "documents": ["panda " * 600]}
        cut = rerank(base, too_long).json()[0]["meta_info"]
        refused = rerank(base, {**too_long, "truncate": False})
    assert state["compilations_after_ready"] == 0
    for body, answer in zip(requests, answers, strict=True):
        expected = reranker.score(body["query"], body["documents"], raw=True)
        got = {result["index"]: result["score"] for result in answer}
        np.testing.assert_allclose([got[i] for i in range(len(got))], expected, atol=1e-4)
        assert [result["score"] for result in answer] == sorted(got.values(), reverse=True)
        lengths = [len(pair) for pair in reranker.encode(body["query"], body["documents"])]
        assert {result["index"]: result["meta_info"]["prompt_tokens"] for result in answer} == dict(enumerate(lengths))
    assert cut["prompt_tokens"] == reranker.max_length
    assert cut["truncated_tokens"] > 0
    assert refused.status_code == 400
    assert refused.json()["message"].startswith(f"This model's maximum context length is {reranker.max_length} tokens")
