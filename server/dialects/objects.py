"""The answer that the clients of vLLM, Cohere, Jina, Infinity and llama.cpp all read.

It is an object with `results`. Each client finds the fields that it needs.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from jaxrank.server.api.content import Side, without_payloads
from jaxrank.server.api.request import SPAN, Rerank, Scored, Span


class Document(BaseModel):
    """A document as it was sent: its text, images and videos without the contents of data: URLs, and other fields."""

    text: Any = Field(description="The scored text, null if there is none, or the field as it was sent.")
    multi_modal: list[Any] | None = Field(description="The parts as they were sent, if there are images or videos.")


class Ranked(BaseModel):
    """One document's place in the ranking."""

    index: int = Field(description="The document's place in the request, from 0.")
    relevance_score: float = Field(description="Higher is more relevant.")
    window: Span | None = Field(None, description=SPAN)


class ObjectResult(Ranked):
    """One document's place in the ranking."""

    document: Document | None = Field(None, description="The document, if documents are returned.")


class Usage(BaseModel):
    """Tokens of all pairs as they were scored, including the frame around their texts, and images and videos."""

    prompt_tokens: int
    total_tokens: int


class ApiVersion(BaseModel):
    """What Cohere's clients read."""

    version: str


class BilledUnits(BaseModel):
    """What Cohere's clients read, where one unit is up to a hundred documents."""

    search_units: int


class InputTokens(BaseModel):
    """What Cohere's clients read."""

    input_tokens: int


class Meta(BaseModel):
    """What Cohere's clients read."""

    api_version: ApiVersion
    billed_units: BilledUnits
    tokens: InputTokens


class Facts(BaseModel):
    """What such an answer holds besides its results."""

    id: str
    object: Literal["rerank"]
    created: int = Field(description="In seconds since 1970.")
    model: str
    usage: Usage
    meta: Meta


class ObjectAnswer(Facts):
    """The ranking, best first."""

    results: list[ObjectResult]


def object_answer(request: Rerank, scored: Scored) -> dict[str, Any]:
    """Return the ranking as an ObjectAnswer. Its documents are objects."""
    total = sum(scored.tokens)
    results: list[dict[str, Any]] = []
    for index in scored.order:
        result: dict[str, Any] = {"index": index, "relevance_score": scored.scores[index]}
        if request.return_documents:
            result["document"] = as_object(request.documents[index], request.sent[index])
        results.append(result | scored.window(index))
    return {
        "id": f"rerank-{scored.id}",
        "object": "rerank",
        "created": scored.created,
        "model": scored.model,
        "results": results,
        "usage": {"prompt_tokens": total, "total_tokens": total},
        "meta": {
            "api_version": {"version": "2"},
            "billed_units": {"search_units": -(-len(scored.scores) // 100)},
            "tokens": {"input_tokens": total},
        },
    }


def as_object(side: Side, sent: Any) -> dict[str, Any]:
    """Return a document as an object, with its scored text, the fields that were sent with it, and its media."""
    fields = without_payloads(sent) if isinstance(sent, dict) and "content" not in sent else {}
    if isinstance(side, str):
        return {"text": side, **fields, "multi_modal": None}
    parts = sent.get("content", [sent]) if isinstance(sent, dict) else sent
    return {"text": text_of(side), **fields, "multi_modal": without_payloads(parts)}


def text_of(side: Side) -> str | None:
    """Return the text of a document, or None if there is none."""
    if isinstance(side, str):
        return side
    return "".join(piece for piece in side if isinstance(piece, str)) or None
