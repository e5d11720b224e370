"""Text Embeddings Inference (TEI): POST /rerank with `texts`, answered with an array, and GET /info.

Its errors have their own form.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from jaxrank.server.api.content import FilledContent
from jaxrank.server.api.request import SPAN, Documents, Options, Rerank, Scored, Span, Wording
from jaxrank.server.dialects.dialect import Dialect
from jaxrank.server.dialects.objects import text_of
from jaxrank.server.errors import (
    BadMedia,
    BadRequest,
    Invalid,
    LargeHead,
    MethodNotAllowed,
    NoDocuments,
    NotFound,
    Overloaded,
    Refusal,
    ScoringFailed,
    SlowBody,
    TooLarge,
    TooLong,
    TooManyDocuments,
    Unauthorized,
    Unavailable,
)


class TeiRequest(Options):
    """A query and the texts to rank for it."""

    query: FilledContent
    texts: Documents
    return_text: bool | None = Field(None, description="Whether results carry their text; null means false.")


class TeiResult(BaseModel):
    """One text's place in the ranking."""

    index: int
    text: str | None = Field(None, description="The text, if texts are returned.")
    score: float
    window: Span | None = Field(None, description=SPAN)


class TeiError(BaseModel):
    """The body of every answer other than 200."""

    error: str
    error_type: str = Field(description='"Validation", "Empty", "Overloaded", "Backend" or "Unhealthy".')


def answer(request: Rerank, scored: Scored) -> list[dict[str, Any]]:
    """Return the answer as an array."""
    results: list[dict[str, Any]] = []
    for index in scored.order:
        result: dict[str, Any] = {"index": index}
        if request.return_documents:
            result["text"] = text_of(request.documents[index])
        results.append(result | {"score": scored.scores[index]} | scored.window(index))
    return results


def error(status: int, message: str, kind: str) -> dict[str, Any]:
    """Return TEI's error object."""
    return {"error": message, "error_type": kind}


TEI = Dialect(
    name="tei",
    title="Text Embeddings Inference",
    request=TeiRequest,
    answer=answer,
    answered=list[TeiResult],
    returns_documents=False,
    wording=Wording(
        query_empty="`query` cannot be empty",
        query_blank="`query` cannot be empty",
        documents_empty="`texts` cannot be empty",
        too_many="batch size {count} > maximum allowed batch size {most}",
        too_long="`inputs` must have less than {limit} tokens. Given: {tokens}",
    ),
    refusals={
        Refusal: (None, "Backend"),
        BadRequest: (None, "Validation"),
        Invalid: (422, "Validation"),
        TooLong: (422, "Validation"),
        NoDocuments: (None, "Empty"),
        Unauthorized: (None, "Validation"),
        NotFound: (None, "Validation"),
        MethodNotAllowed: (None, "Validation"),
        SlowBody: (None, "Validation"),
        LargeHead: (None, "Validation"),
        TooLarge: (None, "Validation"),
        TooManyDocuments: (422, "Validation"),
        BadMedia: (None, "Validation"),
        ScoringFailed: (424, "Backend"),
        Unavailable: (None, "Unhealthy"),
        Overloaded: (429, "Overloaded"),
    },
    error=error,
    error_body=TeiError,
)
