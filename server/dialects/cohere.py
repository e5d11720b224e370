"""Cohere: /v1/rerank and /v2/rerank. Its clients ask again after a 429, and look for `message` in errors."""

from __future__ import annotations

from pydantic import Field

from jaxrank.server.api.content import FilledContent
from jaxrank.server.api.request import Documents, Options, Wording
from jaxrank.server.dialects.dialect import BUSY, Dialect
from jaxrank.server.dialects.objects import ObjectAnswer, object_answer


class CohereRequest(Options):
    """A query and the documents to rank for it, which are texts, or objects whose rank_fields are read."""

    query: FilledContent
    documents: Documents
    return_documents: bool | None = Field(None, description="Whether results carry their document; null means false.")
    max_chunks_per_doc: int | None = Field(None, description="It has no effect, because documents are scored whole.")


COHERE = Dialect(
    name="cohere",
    title="Cohere",
    request=CohereRequest,
    answer=object_answer,
    answered=ObjectAnswer,
    returns_documents=False,
    wording=Wording(
        query_missing="invalid request: query must not be empty or be only whitespace",
        query_empty="invalid request: query must not be empty or be only whitespace",
        query_blank="invalid request: query must not be empty or be only whitespace",
        documents_missing="invalid request: list of documents must not be empty",
        documents_empty="invalid request: list of documents must not be empty",
        too_many="invalid request: too many documents, got {count}, and this server takes at most {most}",
    ),
    refusals=BUSY,
)
