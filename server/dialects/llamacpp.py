"""llama.cpp's server: /rerank, /reranking, /v1/rerank and /v1/reranking.

The scores of cross-encoders are logits. Results carry their documents only if the request asks for them. Errors have
their own types.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from jaxrank.server.api.content import FilledContent
from jaxrank.server.api.request import Documents, Options, Rerank, Scored, Wording
from jaxrank.server.dialects import tei
from jaxrank.server.dialects.dialect import Dialect
from jaxrank.server.dialects.objects import ObjectAnswer, object_answer
from jaxrank.server.errors import (
    BadMedia,
    BadRequest,
    LargeHead,
    MethodNotAllowed,
    NotFound,
    NotSupported,
    Refusal,
    SlowBody,
    TooLarge,
    TooLong,
    Unauthorized,
    Unavailable,
)


class LlamacppRequest(Options):
    """A query and the documents to rank for it."""

    query: FilledContent
    documents: Documents
    return_documents: bool | None = Field(None, description="Whether results carry their document; null means false.")


def answer(request: Rerank, scored: Scored) -> Any:
    """Return the answer as an object, or as TEI's array if the request calls its documents texts."""
    return tei.answer(request, scored) if request.field == "texts" else object_answer(request, scored)


LLAMACPP = Dialect(
    name="llamacpp",
    title="llama.cpp",
    request=LlamacppRequest,
    answer=answer,
    answered=ObjectAnswer | list[tei.TeiResult],
    raw_scores=True,
    returns_documents=False,
    wording=Wording(
        query_missing='"query" must be provided',
        documents_missing='"documents" must be a non-empty string array',
        documents_empty='"documents" must be a non-empty string array',
    ),
    refusals={
        Refusal: (None, "server_error"),
        BadRequest: (400, "invalid_request_error"),
        BadMedia: (400, "invalid_request_error"),
        TooLong: (400, "exceed_context_size_error"),
        Unauthorized: (401, "authentication_error"),
        NotFound: (404, "not_found_error"),
        MethodNotAllowed: (405, "invalid_request_error"),
        SlowBody: (408, "invalid_request_error"),
        TooLarge: (413, "invalid_request_error"),
        LargeHead: (431, "invalid_request_error"),
        NotSupported: (400, "not_supported_error"),
        Unavailable: (503, "unavailable_error"),
    },
)
