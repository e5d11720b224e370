"""What /docs and /openapi.json tell: one document for all dialects, and under each path prefix one for that dialect.

The inference routes read their bodies by hand, so their operations are written here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from operator import or_
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, Field, TypeAdapter

from jaxrank.server.dialects.dialect import Dialect
from jaxrank.server.dialects.resolve import DIALECTS, HEADER
from jaxrank.server.dialects.tei import TEI
from jaxrank.server.tokenizing import ContentTokens, PairTokens, PromptTokens, TeiToken, TokenizeRequest

DESCRIPTION = """Rerankers on JAX, for the clients of SGLang, vLLM, Cohere, Jina, Voyage, TEI, Infinity and llama.cpp.

Which of them a request is for is said by the base URL (`/cohere/v1/rerank`; `/cohere/docs` describes that dialect
alone), by the header `X-Rerank-Dialect`, by the server's flag `--dialect`, or else told by path and body."""

RERANK_PATHS = ("/v1/rerank", "/rerank", "/v2/rerank", "/reranking", "/v1/reranking")
SCORE_PATHS = ("/score", "/v1/score")


class Health(BaseModel):
    """The answer of GET /health."""

    status: str = Field(description='"alive", "failing" (the last batches failed) or "failed".')
    reason: str | None = Field(None, description="What is wrong. Only there if something is.")


class Ready(BaseModel):
    """The answer of GET /ready."""

    ready: bool = Field(description="Whether requests are scored. The status is 200 then, else 503.")
    state: str = Field(description='"warming up", "ready", "stopping", "failing" or "failed".')
    progress: str = Field(description="What the warm-up is at.")
    model: str
    compilations_after_ready: int = Field(description="Programs compiled since the warm-up. Anything but 0 is a bug.")
    queued_requests: int = Field(description="Requests accepted and not answered.")
    queued_tokens: int = Field(description="Tokens accepted and not scored.")


def unavailable(model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """The 503 of a route that answers the same model then."""
    return {503: {"model": model, "description": "Not (any more) in this state."}}


ERRORS = {
    400: "The request is not in order; the message names the field.",
    401: "No API key, or an unknown one.",
    408: "The body did not arrive in time.",
    413: "The body has too many bytes or documents.",
    431: "There are too many headers, or they are too long.",
    422: "An image or video cannot be had or read; in TEI's dialect also other requests that are not in order.",
    424: "The model failed, in TEI's dialect.",
    429: "The queue is full, in dialects whose clients wait then. Ask again after Retry-After seconds.",
    500: "The model failed; the log tells more under the request id.",
    503: "The queue is full, or the model is warming up. Ask again after Retry-After seconds.",
    504: "The request was not finished in its time; see the header X-Request-Timeout.",
}


def describe(app: FastAPI, dialect: Dialect | None, *, guarded: bool, sees: bool) -> dict[str, Any]:
    """The OpenAPI document for one dialect, or with None for all of them.

    guarded: whether there are keys. sees: whether the model takes images and videos.
    """
    spoken = [dialect] if dialect else list(DIALECTS.values())
    scoring = [one for one in spoken if one.pairs] or [one for one in DIALECTS.values() if one.pairs]
    pairs = [one.pairs for one in scoring if one.pairs]
    tokens = PairTokens | PromptTokens | list[list[TeiToken]] | ContentTokens
    requests = [one.request for one in spoken]
    schemas = _Schemas()
    errors = schemas.of([one.error_body for one in spoken])
    tei = TEI in spoken
    unused = {401, *(() if sees or tei else (422,)), *(() if tei else (424,))}
    failures = {str(status): _response(text, errors) for status, text in ERRORS.items() if status not in unused}

    def inference(summary: str, requests: Sequence[Any], answers: Sequence[Any]) -> dict[str, Any]:
        return {
            "tags": ["rerank"],
            "summary": summary,
            "parameters": [_HEADER],
            "requestBody": {"required": True, "content": {"application/json": {"schema": schemas.of(requests)}}},
            "responses": {"200": _response("In the dialect of the request.", schemas.of(answers)), **failures},
        }

    rerank = inference("Rank documents for a query", requests, [one.answered for one in spoken])
    score = inference("Score pairs", [one.request for one in pairs], [one.answered for one in pairs])
    tokenize = inference("Tokens of a text, or of a rerank request's pairs", [TokenizeRequest, *requests], [tokens])
    tokenize["parameters"] = [
        _HEADER,
        {"name": "render", "in": "query", "required": False, "schema": {"type": "boolean"},
         "description": "Show each pair of a rerank request as the model sees it."},
    ]  # fmt: skip
    ping: dict[str, Any] = {"tags": ["state"], "summary": "Empty", "responses": {"200": {"description": "Nothing."}}}
    paths: dict[str, dict[str, Any]] = {path: {"post": rerank} for path in RERANK_PATHS}
    paths["/v1/rerank"] = {"post": rerank, "put": rerank}
    paths |= {path: {"post": score} for path in SCORE_PATHS}
    paths |= {"/tokenize": {"post": tokenize}, "/ping": {"get": ping, "post": ping}}
    title = f"{app.title} for clients of {dialect.title}" if dialect else app.title
    document = get_openapi(title=title, version=app.version, description=app.description, routes=app.routes)
    document["paths"] |= {
        path: {method: operation | {"operationId": _name(method, path)} for method, operation in methods.items()}
        for path, methods in paths.items()
    }
    open_paths = {"/health", "/ready"}
    for path, methods in document["paths"].items():
        for operation in methods.values():
            if path in open_paths:
                operation["security"] = []
            elif guarded:
                operation["responses"]["401"] = _response(ERRORS[401], errors)
    document["servers"] = [{"url": f"/{dialect.name}" if dialect else "/"}]
    components = document.setdefault("components", {})
    components.setdefault("schemas", {}).update(schemas.definitions)
    if guarded:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    return document


_HEADER = {
    "name": HEADER,
    "in": "header",
    "required": False,
    "schema": {"type": "string", "enum": list(DIALECTS)},
    "description": "Whose client this is, where the base URL does not say it.",
}


class _Schemas:
    """JSON schemas of models, and the definitions that they refer to."""

    def __init__(self) -> None:
        self.definitions: dict[str, Any] = {}

    def of(self, models: Sequence[Any]) -> dict[str, Any]:
        """The schema of what is any of the models."""
        kinds = list(dict.fromkeys(models))
        adapter: TypeAdapter[Any] = TypeAdapter(reduce(or_, kinds))
        schema = adapter.json_schema(ref_template="#/components/schemas/{model}")
        self.definitions |= schema.pop("$defs", {})
        if len(kinds) == 1 and "properties" in schema:
            self.definitions[kinds[0].__name__] = schema
            return {"$ref": f"#/components/schemas/{kinds[0].__name__}"}
        return schema


def _response(description: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _name(method: str, path: str) -> str:
    return "_".join([method, *path.strip("/").split("/")])
