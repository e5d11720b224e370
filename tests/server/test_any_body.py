"""Whatever is sent, the answer is a ranking of it or says what is wrong, in the form of the client that asked.

`pytest --hypothesis-profile=long tests/server/test_any_body.py` tries 3,000 bodies for each dialect, others every time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from jaxrank.server.dialects.resolve import DIALECTS
from tests.server.fakes import FakeReranker, serving

PATHS = ("/rerank", "/v1/rerank", "/v2/rerank", "/reranking", "/v1/reranking", "/score", "/v1/score", "/tokenize")

LONG = settings().max_examples > 1000
usual = settings(
    max_examples=settings().max_examples if LONG else 60,
    derandomize=not LONG,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)

# the fake scorer dies of "boom" and "crash", and numbers that are none break the order that is checked here
texts = st.text(max_size=30).filter(lambda text: not re.search("boom|crash|refuse|nan|inf", text, re.IGNORECASE))
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=3))
words = st.from_regex(r"[a-f][a-z ]{0,20}[0-9é中]", fullmatch=True)
contents = words | st.fixed_dictionaries({"text": words}) | st.just([{"type": "text", "text": "a part"}])
many = st.lists(words, min_size=1, max_size=6) | st.lists(contents, min_size=1, max_size=4) | words

SIDES = [("query", "documents")] * 4 + [
    ("query", "texts"),
    ("text_1", "text_2"),
    ("queries", "items"),
    ("prompt", "model"),
]
OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "model": words,
    "top_n": st.integers(1, 7),
    "top_k": st.integers(1, 7),
    "return_documents": st.booleans(),
    "return_text": st.booleans(),
    "raw_scores": st.booleans(),
    "truncate": st.booleans(),
    "truncation": st.booleans(),
    "truncate_prompt_tokens": st.integers(-1, 600),
    "max_tokens_per_doc": st.integers(0, 40),
    "truncation_side": st.sampled_from(["left", "right", "Right"]),
    "rank_fields": st.just(["text"]),
    "instruct": words,
    "mm_processor_kwargs": st.just({}),
    "user": values,
}
FIELDS = {**OPTIONS, **{name: many for pair in SIDES for name in pair}, "query": contents, "prompt": words}


@st.composite
def requests(draw: st.DrawFn) -> dict[str, Any]:
    """A request of some dialect, with anything at all in one of its fields, or in none."""
    names = sorted({*draw(st.sampled_from(SIDES)), *draw(st.lists(st.sampled_from(sorted(OPTIONS)), max_size=4))})
    odd = draw(st.sampled_from([None, None, *names]))
    return {name: draw(values if name == odd else FIELDS[name]) for name in names}


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    """A request; rarely one that was cut off, any other JSON, or no JSON."""
    kind = draw(st.integers(0, 9))
    if kind == 9:
        return draw(st.binary(max_size=60))
    body = json.dumps(draw(values if kind == 8 else requests())).encode()
    return body[: draw(st.integers(0, len(body) - 1))] if kind == 7 else body


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with serving(FakeReranker()) as base, httpx.Client(base_url=base, timeout=30) as client:
        yield client


@pytest.mark.parametrize("name", sorted(DIALECTS))
def test_any_body(client: httpx.Client, name: str) -> None:
    dialect = DIALECTS[name]
    answers, errors = TypeAdapter(dialect.answered), TypeAdapter(dialect.error_body)

    @usual
    @given(body=bodies(), path=st.sampled_from(PATHS))
    def check(body: bytes, path: str) -> None:
        answer = client.post(f"/{name}{path}", content=body, headers={"Content-Type": "application/json"})
        said = answer.json()
        if answer.status_code != 200:
            assert answer.status_code in (400, 404, 413, 422), said
            errors.validate_python(said, strict=True)
            assert max(map(len, re.findall(r'"((?:[^"\\]|\\.)*)"', answer.text))) > 10  # says something
        elif "rerank" in path:
            answers.validate_python(said)
            results = said if isinstance(said, list) else said.get("results", said.get("data"))
            indices = [result["index"] for result in results]
            scores = [result.get("score", result.get("relevance_score")) for result in results]
            asked = json.loads(body)
            named = asked["texts"] if asked.get("documents") is None else asked["documents"]
            count = len(named) if isinstance(named, list) else 1
            assert len(set(indices)) == len(indices)
            assert set(indices) <= set(range(count))
            assert scores == sorted(scores, reverse=True)
            assert 0 < len(indices) <= count

    check()
    assert client.get("/health").json() == {"status": "alive"}
