"""Clients of other servers, as the package index has them: rankings, and errors of their own types with our texts.

Run by `make test-clients`, in an environment of their own.
"""

from __future__ import annotations

from typing import Any

import cohere
import litellm
import pytest
from cohere.core.api_error import ApiError
from conftest import KEY

QUERY = "what is panda?"
DOCUMENTS = [
    "hi",
    "The giant panda (Ailuropoda melanoleuca), sometimes called a panda bear or simply panda, is a bear species "
    "endemic to China.",
    "Paris is the capital of France.",
]

PATHS = {
    "cohere/": "/cohere/v2/rerank",
    "hosted_vllm/": "/vllm",
    "infinity/": "/infinity",
    "huggingface/": "/tei",
    "voyage/": "/voyage/v1/rerank",
}
"""What follows the server's address in api_base, by LiteLLM's provider."""


def rerank(provider: str, url: str, jina_url: str, **changes: Any) -> Any:
    base = jina_url if provider == "jina_ai/" else url + PATHS[provider]
    asked = dict(model=provider + "m", query=QUERY, documents=DOCUMENTS, api_base=base, api_key=KEY, max_retries=0)
    return litellm.rerank(**asked | changes)


PROVIDERS = [*PATHS, "jina_ai/"]


class TestLiteLLM:
    @pytest.mark.parametrize("provider", PROVIDERS)
    def test_ranking(self, provider: str, url: str, jina_url: str) -> None:
        results = rerank(provider, url, jina_url).results
        assert sorted(one["index"] for one in results) == [0, 1, 2]
        best = max(results, key=lambda one: one["relevance_score"])
        assert best["index"] == 1
        assert all(0 <= one["relevance_score"] <= 1 for one in results)

    @pytest.mark.parametrize("provider", PROVIDERS)
    def test_top_n(self, provider: str, url: str, jina_url: str) -> None:
        assert [one["index"] for one in rerank(provider, url, jina_url, top_n=1).results] == [1]

    @pytest.mark.parametrize("provider", PROVIDERS)
    def test_too_many_documents(self, provider: str, url: str, jina_url: str) -> None:
        said = "maximum allowed batch size 20" if provider == "huggingface/" else "takes at most 20"
        with pytest.raises(Exception, match=said) as caught:
            rerank(provider, url, jina_url, documents=["a"] * 21)
        assert type(caught.value).__module__.startswith("litellm")

    @pytest.mark.parametrize("provider", PROVIDERS)
    def test_a_wrong_key(self, provider: str, url: str, jina_url: str) -> None:
        with pytest.raises(Exception, match="needs an API key") as caught:
            rerank(provider, url, jina_url, api_key="wrong")
        assert type(caught.value).__module__.startswith("litellm")


class TestCohere:
    @pytest.mark.parametrize("version", [1, 2])
    def test_ranking(self, url: str, version: int) -> None:
        client: Any = (cohere.Client if version == 1 else cohere.ClientV2)(KEY, base_url=url + "/cohere")
        answer = client.rerank(model="m", query=QUERY, documents=DOCUMENTS, top_n=2)
        assert answer.results[0].index == 1
        assert len(answer.results) == 2
        assert answer.results[0].relevance_score > answer.results[1].relevance_score
        assert answer.meta.billed_units.search_units == 1

    def test_documents_of_fields(self, url: str) -> None:
        client = cohere.Client(KEY, base_url=url + "/cohere")
        documents = [{"title": "a", "text": text} for text in DOCUMENTS]
        answer = client.rerank(
            model="m", query=QUERY, documents=documents, rank_fields=["title", "text"], return_documents=True
        )
        assert answer.results[0].index == 1
        assert answer.results[0].document is not None
        assert "giant panda" in answer.results[0].document.text

    @pytest.mark.parametrize("version", [1, 2])
    def test_errors(self, url: str, version: int) -> None:
        kind = cohere.Client if version == 1 else cohere.ClientV2
        with pytest.raises(ApiError) as caught:
            kind("wrong", base_url=url + "/cohere").rerank(model="m", query=QUERY, documents=DOCUMENTS)
        assert caught.value.status_code == 401
        assert "needs an API key" in caught.value.body["message"]
        with pytest.raises(ApiError) as caught:
            kind(KEY, base_url=url + "/cohere").rerank(model="m", query="", documents=DOCUMENTS)
        assert caught.value.status_code == 400
        assert caught.value.body["message"]
