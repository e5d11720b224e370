"""Infinity: POST /rerank, answered with an object whose documents are texts, and GET /models."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from jaxrank.server.api.content import FilledContent
from jaxrank.server.api.request import Documents, Options, Rerank, Scored
from jaxrank.server.dialects.dialect import BUSY, Dialect
from jaxrank.server.dialects.objects import Facts, Ranked, object_answer, text_of


class InfinityRequest(Options):
    """A query and the documents to rank for it."""

    query: FilledContent
    documents: Documents
    return_documents: bool | None = Field(None, description="Whether results carry their document; null means false.")


class InfinityResult(Ranked):
    """One document's place in the ranking."""

    document: str | None = Field(None, description="The document's text, if documents are returned.")


class InfinityAnswer(Facts):
    """The ranking, best first."""

    results: list[InfinityResult]


def answer(request: Rerank, scored: Scored) -> dict[str, Any]:
    """Return the answer as an object, with texts in place of documents that are objects."""
    content = object_answer(request, scored)
    for result in content["results"]:
        if request.return_documents:
            result["document"] = text_of(request.documents[result["index"]])
    return content | {"id": f"infinity-{scored.id}"}


INFINITY = Dialect(
    name="infinity",
    title="Infinity",
    request=InfinityRequest,
    answer=answer,
    answered=InfinityAnswer,
    returns_documents=False,
    refusals=BUSY,
)
