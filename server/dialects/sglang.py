"""SGLang: POST or PUT /v1/rerank, answered with an array, and /v1/score, as far as a reranker can answer it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, WithJsonSchema

from jaxrank.server.api.content import FilledContent, without_payloads
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
from jaxrank.server.dialects.objects import Usage
from jaxrank.server.errors import BadMedia, NotSupported

_EXAMPLE: dict[str, JsonValue] = {
    "query": "what is panda?",
    "documents": ["hi", "The giant panda is a bear species endemic to China."],
    "top_n": 1,
}


class SglangRequest(Options):
    """A query and the documents to rank for it."""

    model_config = ConfigDict(json_schema_extra={"examples": [_EXAMPLE]})

    query: FilledContent = Field(description="The query, for which the documents are ranked.")
    documents: FilledDocuments


class MetaInfo(BaseModel):
    """The token counts of one document."""

    prompt_tokens: int = Field(
        description="Number of scored tokens of the pair, or of all its windows, including special tokens."
    )
    truncated_tokens: int = Field(description="Number of tokens of query and document that were cut off.")
    window: Span | None = Field(None, description=SPAN)


class SglangResult(BaseModel):
    """One document's place in the ranking."""

    score: float = Field(description="Higher is more relevant; it is a raw logit for cross-encoders, else in [0, 1].")
    document: Any = Field(
        None,
        description="The document's text, or its parts as they were sent, without the contents of data: URLs; the key "
        "is missing with return_documents = false.",
    )
    index: int = Field(description="The document's place in the request, from 0.")
    meta_info: MetaInfo


def answer(request: Rerank, scored: Scored) -> list[dict[str, Any]]:
    """Return the answer as an array."""
    results: list[dict[str, Any]] = []
    for index in scored.order:
        result: dict[str, Any] = {"score": scored.scores[index]}
        if request.return_documents:
            side = request.documents[index]
            result["document"] = side if isinstance(side, str) else without_payloads(request.sent[index])
        result["index"] = index
        counts = {"prompt_tokens": scored.tokens[index], "truncated_tokens": scored.dropped[index]}
        result["meta_info"] = counts | scored.window(index)
        results.append(result)
    return results


class SglangScoreRequest(Options):
    """A query and the items to score for it, where label tokens and items before the query are refused, because a
    reranker has only one score.
    """

    query: FilledContent
    items: Documents
    label_token_ids: Annotated[list[Any] | None, WithJsonSchema({"type": "null"})] = Field(
        None, description="Refused unless null, because a reranker has no such logits."
    )
    apply_softmax: bool | None = Field(None, description="It has no effect on a single score.")
    item_first: Annotated[bool | None, WithJsonSchema({"enum": [False, None]})] = Field(
        None, description="Refused if true."
    )


class SglangScores(BaseModel):
    """The scores of the items, each in a list of its own, in the order of the request."""

    scores: list[list[float]]
    model: str
    usage: Usage
    object: Literal["scoring"]


def read_score(raw: dict[str, Any], terms: Terms) -> list[Rerank]:
    """Return the request of /v1/score.

    Args:
        raw: The JSON object.
        terms: The server's limits.

    Raises:
        BadRequest: The request is not valid.
        NotSupported: The request asks for label tokens, or for items before the query.
        TooManyDocuments: It has more items than the server takes.
    """
    if raw.get("label_token_ids") is not None:
        raise NotSupported(
            "A reranker has one score a document, not the probabilities of label_token_ids. Leave them out for that "
            "score, or POST /v1/rerank."
        )
    if raw.get("item_first"):
        raise NotSupported("A reranker reads the query first. Leave item_first out, or swap query and items.")
    sent = as_list(raw.get("items"))
    if isinstance(sent, list):
        check_count(len(sent), Wording(), terms)
        raw = raw | {"items": sent}
    request = validate(SglangScoreRequest, raw, terms.sees)
    assert isinstance(request, SglangScoreRequest)
    query = read_query(request.query, "query", Wording(), terms)
    items = read_documents(request.items, "items", Wording(documents_empty="Items cannot be empty"), terms)
    return [to_rerank(request, query, items, sent, terms=terms, field="items")]


def answer_score(requests: list[Rerank], scored: list[Scored]) -> dict[str, Any]:
    """Return the answer of /v1/score."""
    (one,) = scored
    total = sum(one.tokens)
    usage = {"prompt_tokens": total, "total_tokens": total}
    return {"scores": [[score] for score in one.scores], "model": one.model, "usage": usage, "object": "scoring"}


SGLANG = Dialect(
    name="sglang",
    title="SGLang",
    request=SglangRequest,
    answer=answer,
    answered=list[SglangResult],
    raw_scores=True,
    wording=Wording(
        document_empty="Each document must be a non-empty string",
        document_blank="Each document cannot be empty or whitespace only",
    ),
    refusals={BadMedia: (400, "BadRequestError")},
    pairs=PairScores(SglangScoreRequest, read_score, answer_score, SglangScores),
)
