"""What the server refuses, and the one JSON shape in which it says so.

    Refusal                 an answer that is not 200: status, message, type, extra headers
    ├── BadRequest          400  the request can be mended by its sender
    │   └── Malformed                its body cannot even be read as a request
    ├── Unauthorized        401  no key, or an unknown one
    ├── TooLarge            413  more bytes or documents than the server takes
    ├── ScoringFailed       500  the model failed; the log has the reason
    └── Unavailable         503  not now: come back after Retry-After seconds
        ├── Overloaded           the queue is full
        ├── NotReady             the model is still warming up
        └── Closing              the server is shutting down
    ClientGone              nobody is left to answer

The shape is SGLang's flat error object: {"object": "error", "message", "type", "param": null, "code": status}.
No message carries text of a request, of an exception's repr, or of a path.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, Field
from pydantic_core import to_json
from starlette.responses import Response

from jaxrank.errors import JaxrankError


class ErrorBody(BaseModel):
    """The body of every answer that is not 200."""

    object: str = Field("error", description='Always "error".')
    message: str = Field(description="What came, what is allowed, what to do.")
    type: str = Field(description="A stable name of the kind of error.")
    param: str | None = Field(None, description="Always null.")
    code: int = Field(description="The HTTP status.")


class Refusal(JaxrankError):
    """An answer that is not 200. Its text goes to the client as it stands."""

    status = 500
    type = "InternalServerError"

    def __init__(self, message: str, *, headers: Mapping[str, str] | None = None, **extra: Any) -> None:
        super().__init__(message)
        self.headers = dict(headers or {})
        self.extra = extra

    def body(self) -> dict[str, Any]:
        """The JSON object that the client gets."""
        return error_body(self.status, str(self), self.type) | self.extra

    def response(self) -> Response:
        """The whole answer."""
        return json_response(self.body(), self.status, self.headers)


class BadRequest(Refusal):
    """A request that its sender can mend."""

    status = 400
    type = "BadRequestError"


class Malformed(BadRequest):
    """A body that cannot be read as a request: not JSON, fields missing, values of a wrong type."""

    type = "Bad Request"


class Unauthorized(Refusal):
    """No API key, or one that the server does not know."""

    status = 401
    type = "Unauthorized"

    def __init__(self) -> None:
        super().__init__(
            "This server wants an API key that it knows. Send the header 'Authorization: Bearer KEY'.",
            headers={"WWW-Authenticate": "Bearer"},
            error="Unauthorized",
        )


class TooLarge(Refusal):
    """More bytes or documents than the server takes in one request."""

    status = 413
    type = "RequestTooLarge"


class ScoringFailed(Refusal):
    """The model failed on a batch, or answered something that is not a number."""


class Unavailable(Refusal):
    """Not now. retry_after: whole seconds after which to ask again."""

    status = 503
    type = "ServiceUnavailable"

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message, headers={"Retry-After": str(retry_after)})


class Overloaded(Unavailable):
    """The queue holds as many requests or tokens as it may."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"The request queue is full. Try again in {retry_after} s.", retry_after)


class NotReady(Unavailable):
    """The model is still being compiled."""

    def __init__(self) -> None:
        super().__init__("The model is warming up. Wait until GET /ready answers 200.", 5)


class Closing(Unavailable):
    """The server takes no new requests because it is going away."""

    def __init__(self) -> None:
        super().__init__("The server is shutting down. Send the request to another one.", 5)


class ClientGone(JaxrankError):
    """The client closed the connection before its answer was ready."""


def error_body(status: int, message: str, kind: str) -> dict[str, Any]:
    """SGLang's flat error object."""
    return {"object": "error", "message": message, "type": kind, "param": None, "code": status}


def internal_error(request_id: str) -> Response:
    """The one answer to anything unforeseen: constant but for the id under which the log tells more."""
    message = f"Internal error. The server's log tells more under request id {request_id}."
    return json_response(error_body(500, message, Refusal.type), 500)


def json_response(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """`content` as a JSON answer."""
    return Response(to_json(content), status, headers, media_type="application/json")
