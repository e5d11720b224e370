"""What /docs and /openapi.json tell: the models of the answers and the description of the rerank route."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, Field

from jaxrank.server.errors import ErrorBody
from jaxrank.server.schema import RerankRequest, RerankResult

DESCRIPTION = "Rerankers on JAX. POST /v1/rerank speaks SGLang's dialect; errors have one flat shape everywhere."


class Health(BaseModel):
    """The answer of GET /health."""

    status: str = Field(description='"alive" or "failed".')


class Ready(BaseModel):
    """The answer of GET /ready."""

    ready: bool = Field(description="Whether requests are scored. The status is 200 then, else 503.")
    state: str = Field(description='"warming up", "ready", "stopping" or "failed".')
    progress: str = Field(description="What the warm-up is at.")
    model: str
    compilations_after_ready: int = Field(description="Programs compiled since the warm-up. Anything but 0 is a bug.")
    queued_requests: int = Field(description="Requests accepted and not answered.")
    queued_tokens: int = Field(description="Tokens accepted and not scored.")


class Model(BaseModel):
    """A model, as OpenAI's API lists it."""

    id: str
    object: str
    created: int = Field(description="When the server started, in seconds since 1970.")
    owned_by: str
    max_model_len: int = Field(description="Most tokens of a query and document together.")
    max_documents: int = Field(description="Most documents in one request.")


class Models(BaseModel):
    """The answer of GET /v1/models."""

    object: str
    data: list[Model]


def unavailable(model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """The 503 of a route that answers the same model then."""
    return {503: {"model": model, "description": "Not (any more) in this state."}}


_ERRORS: dict[int | str, str] = {
    400: "The request is not in order; the message names the field.",
    401: "No API key, or an unknown one.",
    408: "The body did not arrive in time.",
    413: "The body has too many bytes or documents.",
    500: "The model failed; the log tells more under the request id.",
    503: "The queue is full, or the model is warming up. Ask again after Retry-After seconds.",
}

RERANK: dict[str, Any] = {
    "summary": "Rank documents for a query",
    "tags": ["rerank"],
    "operation_id": "rerank",
    "response_model": list[RerankResult],
    "responses": {status: {"model": ErrorBody, "description": text} for status, text in _ERRORS.items()},
    "openapi_extra": {
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/RerankRequest"}}},
        }
    },
}
"""How the route is declared. Its body is read by hand, so the request's schema is added in describe()."""


def describe(app: FastAPI, guarded: bool) -> None:
    """Make app.openapi() tell of the request's schema and, where there are keys, of the bearer key."""

    def openapi() -> dict[str, Any]:
        if not app.openapi_schema:
            document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            request = RerankRequest.model_json_schema(ref_template="#/components/schemas/{model}")
            components = document["components"]
            components["schemas"] |= request.pop("$defs") | {"RerankRequest": request}
            if guarded:
                components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
                document["security"] = [{"key": []}]
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # the way FastAPI documents for changing the schema
