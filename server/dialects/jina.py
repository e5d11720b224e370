"""Jina: /v1/rerank. Results carry their documents by default. Its clients look for `detail` in errors."""

from __future__ import annotations

from jaxrank.server.api.content import FilledContent
from jaxrank.server.api.request import Documents, Options
from jaxrank.server.dialects.dialect import BUSY, Dialect
from jaxrank.server.dialects.objects import ObjectAnswer, object_answer


class JinaRequest(Options):
    """A query and the documents to rank for it, which are texts, {"text": ...} or {"image": address} objects."""

    query: FilledContent
    documents: Documents


JINA = Dialect(
    name="jina",
    title="Jina",
    request=JinaRequest,
    answer=object_answer,
    answered=ObjectAnswer,
    refusals=BUSY,
)
