"""The documents behind /docs and /openapi.json. One is for all dialects, and one under each path prefix is for that
dialect.

The inference routes read their bodies by hand, so their operations are written here. Their statuses come from the
dialects' tables of refusals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from operator import or_
from typing import Any, Literal

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, Field, TypeAdapter

from jaxrank.server.api.request import Terms
from jaxrank.server.api.schemas import content_schemas
from jaxrank.server.api.tokenize import ContentTokens, PairTokens, PromptTokens, TeiToken, TokenizeRequest
from jaxrank.server.dialects.dialect import Dialect
from jaxrank.server.dialects.resolve import DIALECTS, HEADER
from jaxrank.server.errors import (
    BadMedia,
    BadRequest,
    Expired,
    Invalid,
    LargeHead,
    NotReady,
    Overloaded,
    Refusal,
    ScoringFailed,
    SlowBody,
    TooLarge,
    TooManyDocuments,
    Unauthorized,
)

DESCRIPTION = """Rerankers on JAX, for the clients of SGLang, vLLM, Cohere, Jina, Voyage, TEI, Infinity and llama.cpp.

A request names its dialect by the base URL, as in `/cohere/v1/rerank`, or by the header `X-Rerank-Dialect`. Otherwise
the server's flag `--dialect` decides, or else path and body. `/cohere/docs` describes that dialect alone.

Every answer has the header `X-Request-Id`. Other paths are answered 404. Other methods are answered 405, with
the header `Allow`. Both have the body of all refusals. `GET /` is a page to try the model. `GET /docs` shows this
document."""

RERANK_PATHS = ("/v1/rerank", "/rerank", "/v2/rerank", "/reranking", "/v1/reranking")
SCORE_PATHS = ("/score", "/v1/score")


class Health(BaseModel):
    """The answer of GET /health."""

    status: Literal["alive", "failing", "failed"] = Field(description='"failing" means that the last batches failed.')
    reason: str | None = Field(None, description="What is wrong, if something is.")


class Ready(BaseModel):
    """The answer of GET /ready."""

    ready: bool = Field(description="Whether requests are scored; the status is then 200, else 503.")
    state: Literal["warming up", "ready", "stopping", "failing", "failed"]
    progress: str = Field(description="The progress of the warm-up.")
    model: str
    compilations_after_ready: int = Field(description="Programs compiled since the warm-up; more than 0 is a bug.")
    queued_requests: int = Field(description="Requests that are accepted but not answered.")
    queued_tokens: int = Field(description="Tokens that are accepted but not scored.")


def unavailable(model: type[BaseModel], *, retry: bool = False) -> dict[int | str, dict[str, Any]]:
    """Return the description of a 503 that has the same model as the 200.

    Args:
        model: The model of the answer.
        retry: Whether the answer has the header Retry-After.
    """
    headers = {"headers": _FAILED[503]} if retry else {}
    return {503: {"model": model, "description": "Not (any more) in this state.", **headers}}


OPEN: dict[str, Any] = {"security": []}
"""An addition to the documentation of a route that needs no key."""

ALWAYS: dict[type[Refusal], str] = {
    Unauthorized: "No API key, or an unknown one.",
    LargeHead: "There are too many headers, or they are too long.",
    Refusal: "Something unforeseen; the log tells more under the request id.",
}
"""Why any route may refuse a request."""

SCORING: dict[type[Refusal], str] = {
    BadRequest: "The request is not in order; the message names the field.",
    Invalid: "A field is missing or of another type; the message says what it may hold.",
    SlowBody: "The body did not arrive in time.",
    TooLarge: "The body has too many bytes, or values, or its images and videos have.",
    TooManyDocuments: "There are too many documents.",
    BadMedia: "An image or video cannot be had or read.",
    ScoringFailed: "The model failed; the log tells more under the request id.",
    Overloaded: "The queue is full. Ask again after Retry-After seconds.",
    NotReady: "The model is warming up, or the server shuts down. Ask again after Retry-After seconds.",
    Expired: "The request was not finished in its time; see the header X-Request-Timeout.",
}
"""Why the routes that score or tokenise may also refuse a request."""

PLAIN = {
    400: "What came is not HTTP.",
    408: "The headers did not arrive in time.",
    503: "There are too many connections.",
}
"""Why a connection may be refused before there is a request. These answers are plain text."""


def describe(app: FastAPI, dialect: Dialect | None, terms: Terms, *, guarded: bool) -> dict[str, Any]:
    """Return the OpenAPI document for one dialect, or for all of them.

    Args:
        app: The application.
        dialect: The dialect. None for all of them.
        terms: The server's limits for requests.
        guarded: Whether the server has keys.
    """
    spoken = [dialect] if dialect else list(DIALECTS.values())
    scoring = [one for one in spoken if one.pairs] or [one for one in DIALECTS.values() if one.pairs]
    pairs = [one.pairs for one in scoring if one.pairs]
    tokens = PairTokens | PromptTokens | list[list[TeiToken]] | ContentTokens
    requests = [one.request for one in spoken]
    schemas = _Schemas()
    errors = schemas.of([one.error_body for one in spoken])
    always = {kind: text for kind, text in ALWAYS.items() if guarded or kind is not Unauthorized}
    more = {kind: text for kind, text in SCORING.items() if terms.sees or kind is not BadMedia}
    failures = _failures(spoken, more | always, errors)

    def inference(
        summary: str, asked: Sequence[Any], answers: Sequence[Any], headers: Mapping[str, Any]
    ) -> dict[str, Any]:
        good = _response("In the dialect of the request.", schemas.of(answers), headers)
        return {
            "tags": ["rerank"],
            "summary": summary,
            "parameters": _PARAMETERS if dialect else [_NAMES, *_PARAMETERS],
            "requestBody": {"required": True, "content": {"application/json": {"schema": schemas.of(asked)}}},
            "responses": {"200": good} | failures,
        }

    rerank = inference("Rank documents for a query", requests, [one.answered for one in spoken], _SCORED)
    score = inference("Score pairs", [one.request for one in pairs], [one.answered for one in pairs], _SCORED)
    tokenize = inference("Tokens of a text, or of a rerank request's pairs", [TokenizeRequest, *requests], [tokens], {})
    tokenize["parameters"] = [*tokenize["parameters"], _RENDER]
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
    for methods in document["paths"].values():
        for method, operation in methods.items():
            own = {
                kind: text for kind, text in always.items() if kind is not Unauthorized or "security" not in operation
            }
            responses = _failures(spoken, own, errors) | operation["responses"]
            good = responses["200"]
            responses["200"] = good | {"headers": good.get("headers", {}) | _REQUEST_ID}
            methods[method] = operation | {"responses": _with_plain(responses)}
    document["servers"] = [{"url": f"/{dialect.name}" if dialect else "/"}]
    components = document.setdefault("components", {})
    for definition in schemas.definitions.values():
        if field := definition.get("properties", {}).get("truncate_prompt_tokens"):
            length = {"type": "integer", "minimum": terms.min_length, "maximum": terms.max_length}
            field["anyOf"] = [{"const": -1}, length, {"type": "null"}]
    components.setdefault("schemas", {}).update(schemas.definitions)
    components["schemas"] |= content_schemas(terms.sees, terms.max_documents)
    if guarded:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    return document


_NAMES = {
    "name": HEADER,
    "in": "header",
    "required": False,
    "schema": {"type": "string", "enum": list(DIALECTS)},
    "description": "The dialect of the request, if the base URL does not name it.",
}
_PARAMETERS = [
    {
        "name": "X-Request-Timeout",
        "in": "header",
        "required": False,
        "schema": {"type": "number", "exclusiveMinimum": 0},
        "description": "Seconds until the answer, if fewer than the server's own limit.",
    },
    {
        "name": "X-Request-Id",
        "in": "header",
        "required": False,
        "schema": {"type": "string"},
        "description": "The id for the answer, if it is 1 to 128 printable ASCII characters.",
    },
]
_RENDER = {
    "name": "render",
    "in": "query",
    "required": False,
    "schema": {"type": "string", "enum": ["true", "false", "1", "0", ""]},
    "description": 'Show each pair of a rerank request as the model sees it. "" is true.',
}


def _header(description: str, kind: str = "string", **schema: Any) -> dict[str, Any]:
    return {"description": description, "required": True, "schema": {"type": kind, **schema}}


_REQUEST_ID = {"X-Request-Id": _header("The request's own id, or a new one; the log has it too.")}
_SCORED = {
    HEADER: _header("The dialect of the answer.", enum=list(DIALECTS)),
    "X-Score-Scale": _header("The scale of the scores.", enum=["logit", "probability"]),
    "X-Truncated-Tokens": _header("Tokens of query and documents that were cut off.", "integer"),
}
_FAILED = {
    401: {"WWW-Authenticate": _header("How to send the key.", const="Bearer")},
    429: {"Retry-After": _header("Whole seconds after which to ask again.", "integer")},
    503: {"Retry-After": _header("Whole seconds after which to ask again.", "integer")},
}
"""Headers of refusals, by status."""


class _Schemas:
    """JSON schemas of models, and the definitions that they use."""

    def __init__(self) -> None:
        self.definitions: dict[str, Any] = {}

    def of(self, models: Sequence[Any]) -> dict[str, Any]:
        """Return the schema of a value that is any one of the models."""
        kinds = list(dict.fromkeys(models))
        adapter: TypeAdapter[Any] = TypeAdapter(reduce(or_, kinds))
        schema = adapter.json_schema(ref_template="#/components/schemas/{model}")
        self.definitions |= schema.pop("$defs", {})
        if len(kinds) == 1 and "properties" in schema:
            self.definitions[kinds[0].__name__] = schema
            return {"$ref": f"#/components/schemas/{kinds[0].__name__}"}
        return schema


def _failures(spoken: Sequence[Dialect], texts: Mapping[type[Refusal], str], errors: Any) -> dict[str, dict[str, Any]]:
    """Return the answers for these reasons to refuse a request, by status.

    If only some dialects give a reason this status, its text names them.
    """
    found: dict[int, list[str]] = {}
    for kind, text in texts.items():
        titles: dict[int, list[str]] = {}
        for one in spoken:
            titles.setdefault(one.status(kind), []).append(one.title)
        for status, own in titles.items():
            found.setdefault(status, []).append(text if len(titles) == 1 else f"{', '.join(own)}: {text}")
    return {
        str(status): _response(" ".join(found[status]), errors, _FAILED.get(status, {})) for status in sorted(found)
    }


def _with_plain(responses: Mapping[str, Any]) -> dict[str, Any]:
    """Return the responses, with the plain-text answers for connections without a request."""
    plain = {"text/plain": {"schema": {"type": "string"}}}
    added = {
        str(status): {
            "description": f"{responses[str(status)]['description']} {text}" if str(status) in responses else text,
            "content": responses.get(str(status), {}).get("content", {}) | plain,
        }
        for status, text in PLAIN.items()
    }
    merged = {status: dict(response) | added.get(status, {}) for status, response in responses.items()}
    return dict(sorted((added | merged).items()))


def _response(description: str, schema: Mapping[str, Any], headers: Mapping[str, Any] | None = None) -> dict[str, Any]:
    response: dict[str, Any] = {"description": description, "content": {"application/json": {"schema": schema}}}
    return response | ({"headers": headers} if headers else {})


def _name(method: str, path: str) -> str:
    return "_".join([method, *path.strip("/").split("/")])
