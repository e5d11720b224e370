"""vLLM: /rerank, /v1/rerank and /v2/rerank, answered with an object, and /score and /v1/score for pairs.

This is also the dialect of /rerank for clients that do not name theirs: LiteLLM's, Jina's and llama.cpp's.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from jaxrank.server.api.content import FilledContent
from jaxrank.server.api.request import (
    SPAN,
    Documents,
    FilledDocuments,
    Options,
    Rerank,
    Scored,
    Span,
    Terms,
    Wording,
    as_list,
    check_count,
    read_documents,
    read_query,
    to_rerank,
    validate,
)
from jaxrank.server.dialects.dialect import Dialect, PairScores
from jaxrank.server.dialects.objects import ObjectAnswer, Usage, object_answer
from jaxrank.server.errors import BadRequest, Invalid, NoDocuments, Unavailable


class VllmRequest(Options):
    """A query and the documents to rank for it, where {"content": [parts]} is one document with any parts."""

    query: FilledContent
    documents: Documents
    top_n: int | None = Field(None, ge=0, description="How many results to answer, best first; 0 or null means all.")


PAIRS = (("queries", "documents"), ("queries", "items"), ("data_1", "data_2"), ("text_1", "text_2"))
"""The pairs of names for the two sides of /score."""

_GIVEN: JsonValue = {"type": ["array", "object", "string"]}
_SIDES: list[JsonValue] = [{"required": list(pair), "properties": dict.fromkeys(pair, _GIVEN)} for pair in PAIRS]


class VllmScoreRequest(Options):
    """Two sides to score against each other, under one of four pairs of names: 1 with 1, 1 with many, or N with N."""

    model_config = ConfigDict(json_schema_extra={"anyOf": _SIDES})

    queries: FilledDocuments | None = None
    documents: Documents | None = None
    items: Documents | None = None
    data_1: FilledDocuments | None = None
    data_2: Documents | None = None
    text_1: FilledDocuments | None = None
    text_2: Documents | None = None


class VllmScore(BaseModel):
    """The score of one pair."""

    index: int
    object: Literal["score"]
    score: float
    window: Span | None = Field(None, description=SPAN)


class VllmScores(BaseModel):
    """Scores in the order of the request."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[VllmScore]
    usage: Usage


def read_score(raw: dict[str, Any], terms: Terms) -> list[Rerank]:
    """Return the request of /score: one Rerank for each query, with its documents.

    Args:
        raw: The JSON object.
        terms: The server's limits.

    Raises:
        BadRequest: The request is not valid.
        TooManyDocuments: A side has more entries than the server takes.
    """
    names = [pair for pair in PAIRS if all(raw.get(name) is not None for name in pair)]
    if not names:
        shown = ", ".join(" and ".join(pair) for pair in PAIRS)
        raise Invalid(f"The two sides of the pairs are missing: give one of {shown}.")
    left, right = names[0]
    sent = {name: as_list(raw[name]) for name in (left, right)}
    for value in sent.values():
        if isinstance(value, list):
            check_count(len(value), Wording(), terms)
    request = validate(VllmScoreRequest, raw | sent, terms.sees)
    ours, theirs = getattr(request, left), getattr(request, right)
    if not ours or not theirs:
        raise NoDocuments(f"{left} and {right} cannot be empty")
    if len(ours) not in (1, len(theirs)):
        raise BadRequest(f"Input lengths must be either 1:1, 1:N or N:N; got {len(ours)}:{len(theirs)}.")
    places: dict[str, list[int]] = {}
    for index in range(len(theirs)):
        places.setdefault(json.dumps(sent[left][index if len(ours) > 1 else 0]), []).append(index)
    documents = read_documents(theirs, right, Wording(), terms)
    requests: list[Rerank] = []
    for at in places.values():
        asked = at[0] if len(ours) > 1 else 0
        query = read_query(ours[asked], f"{left}[{asked}]", Wording(), terms)
        own = [documents[index] for index in at]
        names_ = {"asked": f"{left}[{asked}]", "field": right, "at": at}
        requests.append(to_rerank(request, query, own, own, terms=terms, **names_))
    return requests


def answer_score(requests: list[Rerank], scored: list[Scored]) -> dict[str, Any]:
    """Return the answer of /score."""
    scores = {
        index: {"score": score, **one.window(i)}
        for request, one in zip(requests, scored, strict=True)
        for i, (index, score) in enumerate(zip(request.at, one.scores, strict=True))
    }
    total = sum(sum(one.tokens) for one in scored)
    return {
        "id": f"score-{scored[0].id}",
        "object": "list",
        "created": scored[0].created,
        "model": scored[0].model,
        "data": [{"index": index, "object": "score", **scores[index]} for index in range(len(scores))],
        "usage": {"prompt_tokens": total, "total_tokens": total},
    }


VLLM = Dialect(
    name="vllm",
    title="vLLM",
    request=VllmRequest,
    answer=object_answer,
    answered=ObjectAnswer,
    refusals={Unavailable: (503, "Service Unavailable")},
    pairs=PairScores(VllmScoreRequest, read_score, answer_score, VllmScores),
)
