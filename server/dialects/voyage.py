"""Voyage: /v1/rerank with top_k, answered with `data`. Its clients look for `detail` in errors."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from jaxrank.server.api.content import FilledContent
from jaxrank.server.api.request import SPAN, Documents, Options, Rerank, Scored, Span
from jaxrank.server.dialects.dialect import BUSY, Dialect
from jaxrank.server.dialects.objects import Usage, text_of


class VoyageRequest(Options):
    """A query and the documents to rank for it."""

    query: FilledContent
    documents: Documents
    return_documents: bool | None = Field(None, description="Whether results carry their document; null means false.")


class VoyageResult(BaseModel):
    """One document's place in the ranking."""

    relevance_score: float
    index: int
    document: str | None = Field(None, description="The document's text, if documents are returned.")
    window: Span | None = Field(None, description=SPAN)


class VoyageAnswer(BaseModel):
    """The ranking, best first."""

    object: Literal["list"]
    data: list[VoyageResult]
    model: str
    usage: Usage


def answer(request: Rerank, scored: Scored) -> dict[str, Any]:
    """Return the answer as a list object."""
    data: list[dict[str, Any]] = []
    for index in scored.order:
        result: dict[str, Any] = {"relevance_score": scored.scores[index], "index": index}
        if request.return_documents:
            result["document"] = text_of(request.documents[index])
        data.append(result | scored.window(index))
    total = sum(scored.tokens)
    usage = {"prompt_tokens": total, "total_tokens": total}
    return {"object": "list", "data": data, "model": scored.model, "usage": usage}


VOYAGE = Dialect(
    name="voyage",
    title="Voyage",
    request=VoyageRequest,
    answer=answer,
    answered=VoyageAnswer,
    returns_documents=False,
    refusals=BUSY,
)
