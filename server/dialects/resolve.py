"""Finds the dialect of a request. The first rule that matches decides:

1. path prefix     /cohere/v1/rerank: always right, and set by clients in their base URL
2. header          X-Rerank-Dialect: cohere
3. server flag     --dialect cohere
4. path            /v2/rerank is Cohere's, and /reranking is llama.cpp's. /rerank is TEI's with `texts`, else vLLM's.
                   /score is SGLang's with `query` or `label_token_ids`, else vLLM's
5. body            fields that only one dialect has
6. otherwise       SGLang's
"""

from __future__ import annotations

from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from jaxrank.server.api.request import as_list
from jaxrank.server.dialects.cohere import COHERE
from jaxrank.server.dialects.dialect import Dialect
from jaxrank.server.dialects.infinity import INFINITY
from jaxrank.server.dialects.jina import JINA
from jaxrank.server.dialects.llamacpp import LLAMACPP
from jaxrank.server.dialects.sglang import SGLANG
from jaxrank.server.dialects.tei import TEI
from jaxrank.server.dialects.vllm import VLLM
from jaxrank.server.dialects.voyage import VOYAGE
from jaxrank.server.errors import BadRequest, ClientGone, internal
from jaxrank.text.prompts import FRAMED_QUERY

DIALECTS = {one.name: one for one in (SGLANG, VLLM, COHERE, JINA, VOYAGE, TEI, INFINITY, LLAMACPP)}

HEADER = "X-Rerank-Dialect"

_BY_PATH = {"/v2/rerank": COHERE, "/reranking": LLAMACPP, "/v1/reranking": LLAMACPP, "/rerank": VLLM}

_VLLM_FIELDS = (
    "truncate_prompt_tokens",
    "truncation_side",
    "max_tokens_per_doc",
    "max_tokens_per_query",
    "use_activation",
    "mm_processor_kwargs",
    "instruction",
)


def resolve(path: str, raw: dict[str, Any]) -> Dialect:
    """Return the dialect by path and body (rules 4 to 6), for a request that does not name it.

    Args:
        path: The path of the route.
        raw: The JSON object of the request.
    """
    if path in ("/score", "/v1/score"):
        return SGLANG if raw.get("query") is not None or raw.get("label_token_ids") is not None else VLLM
    if path in ("/rerank", "/v1/rerank") and raw.get("texts") is not None:
        return TEI
    if path != "/v1/rerank":
        return _BY_PATH.get(path, SGLANG)
    if raw.get("top_k") is not None or raw.get("truncation") is not None:
        return VOYAGE
    if raw.get("raw_scores") is not None:
        return INFINITY
    query, documents = raw.get("query"), as_list(raw.get("documents"))
    contents = [query, *documents] if isinstance(documents, list) else [query]
    if (
        any(raw.get(field) is not None for field in _VLLM_FIELDS)
        or any(isinstance(one, dict) and isinstance(one.get("content"), list) for one in contents)
        or (isinstance(query, str) and FRAMED_QUERY.match(query))
    ):
        return VLLM
    return SGLANG


class Naming:
    """Middleware that notes the dialect that a request names (rules 1 to 3) as state["named_dialect"].

    A path prefix goes into the scope's root_path. So the routes, and their keys, are the same under every prefix.
    state["unknown_dialect"] is set if the header names no known dialect. An unforeseen error of a request that names a
    dialect is answered in that dialect.

    Args:
        app: The application inside this middleware.
        dialect: The server's dialect, for requests that do not name one. None to leave it open.
    """

    def __init__(self, app: ASGIApp, dialect: Dialect | None = None) -> None:
        self.app = app
        self.dialect = dialect

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        prefix = scope["path"].split("/", 2)[1] if scope["path"].startswith("/") else ""
        header = Headers(scope=scope).get(HEADER)
        if prefix in DIALECTS:
            scope = {**scope, "root_path": f"{scope.get('root_path', '')}/{prefix}"}
            state["named_dialect"] = DIALECTS[prefix]
        elif header is not None:
            state["named_dialect"] = DIALECTS.get(header.strip().lower())
            state["unknown_dialect"] = state["named_dialect"] is None
        elif self.dialect is not None:
            state["named_dialect"] = self.dialect
        answering = False

        async def noted(message: Any) -> None:
            nonlocal answering
            answering = True
            await send(message)

        try:
            await self.app(scope, receive, noted)
        except Exception as error:
            dialect: Dialect | None = state.get("named_dialect")
            if not answering and dialect is not None and not isinstance(error, ClientGone):
                await dialect.refusal(internal(state["request_id"]))(scope, receive, send)
            raise  # the outer layer logs it


def unknown() -> BadRequest:
    """Return the refusal of a header that names no known dialect."""
    return BadRequest(f"{HEADER} names no dialect that this server speaks; one of {', '.join(DIALECTS)}.")
