"""What the server refuses. A dialect decides how a refusal looks (see dialects.dialect); most use `error_body`.

    Refusal                 an answer other than 200: status, message, type, extra headers
    ├── BadRequest          400  the sender can correct the request
    │   ├── Malformed                its body is not a JSON object
    │   ├── Invalid                  a field is missing, or has a value of another type
    │   ├── NoDocuments              there is nothing to rank
    │   ├── TooLong                  a pair does not fit, and truncation is off
    │   └── NotSupported             a reranker cannot answer it
    ├── Unauthorized        401  no key, or an unknown one
    ├── NotFound            404  no such route
    ├── MethodNotAllowed    405  the route does not take this method
    ├── SlowBody            408  its body does not arrive in time
    ├── TooLarge            413  more bytes than the server takes
    │   └── TooManyDocuments         more documents than the server takes
    ├── BadMedia            422  an image or video cannot be fetched or read
    ├── LargeHead           431  more headers than the server takes
    ├── ScoringFailed       500  the model failed; the log has the reason
    ├── Unavailable         503  not now: ask again after Retry-After seconds
    │   ├── Overloaded           the queue is full
    │   ├── NotReady             the model is still warming up
    │   └── Closing              the server is shutting down
    └── Expired             504  its time was up before it was answered
    ClientGone              the client has left, so there is no answer

No message contains text of a request, the repr of an exception, or a path.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, Field
from pydantic_core import to_json
from starlette.responses import Response

from jaxrank.errors import JaxrankError


class ErrorObject(BaseModel):
    """The error, in the form that the clients of vLLM, Infinity and OpenAI read."""

    message: str = Field(description="What the server received, what it allows, and what to do.")
    type: str = Field(description="A stable name of the kind of error.")
    param: str | None = Field(description="Always null.")
    code: int = Field(description="The HTTP status.")


class ErrorBody(BaseModel):
    """The body of answers other than 200, which repeats the error wherever some client looks for it."""

    error: ErrorObject
    object: Literal["error"]
    message: str = Field(description="As SGLang's and Cohere's clients read it.")
    type: str
    param: str | None
    code: int
    detail: str = Field(description="As Jina's and Voyage's clients read it.")


class Refusal(JaxrankError):
    """An answer other than 200. The client gets its text unchanged.

    Args:
        message: The text for the client.
        headers: More headers of the answer.
    """

    status = 500
    type = "InternalServerError"

    def __init__(self, message: str, *, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.headers = dict(headers or {})

    def response(self) -> Response:
        """Return the complete answer, for a request of unknown dialect."""
        return json_response(error_body(self.status, str(self), self.type), self.status, self.headers)


class BadRequest(Refusal):
    """The sender can correct the request."""

    status = 400
    type = "BadRequestError"


class Malformed(BadRequest):
    """The body is not a JSON object."""

    type = "Bad Request"


class Invalid(BadRequest):
    """A field is missing, or has a value of another type."""

    type = "Bad Request"


class NoDocuments(BadRequest):
    """The list of documents is empty."""


class TooLong(BadRequest):
    """A pair does not fit the model, and truncation is off."""


class NotSupported(BadRequest):
    """Other servers answer this with a model that generates text. A reranker cannot."""


class Unauthorized(Refusal):
    """The request has no API key, or one that the server does not know."""

    status = 401
    type = "Unauthorized"

    def __init__(self) -> None:
        super().__init__(
            "This server needs an API key. Send a valid one in the header 'Authorization: Bearer KEY'.",
            headers={"WWW-Authenticate": "Bearer"},
        )


class SlowBody(Refusal):
    """The body does not arrive in time."""

    status = 408
    type = "RequestTimeout"


class NotFound(Refusal):
    """The path has no route."""

    status = 404
    type = "NotFound"


class MethodNotAllowed(Refusal):
    """The route does not take this method."""

    status = 405
    type = "MethodNotAllowed"


class TooLarge(Refusal):
    """The request has more bytes than the server takes."""

    status = 413
    type = "RequestTooLarge"


class LargeHead(Refusal):
    """The request has more headers, or longer ones, than the server takes."""

    status = 431
    type = "RequestHeaderFieldsTooLarge"


class TooManyDocuments(TooLarge):
    """The request has more documents than the server takes."""


class BadMedia(Refusal):
    """An image or video cannot be fetched, read or accepted."""

    status = 422
    type = "UnprocessableEntityError"


class ScoringFailed(Refusal):
    """The model failed on a batch, or answered something that is not a finite number."""


class Unavailable(Refusal):
    """The server cannot answer now.

    Args:
        message: The text for the client.
        retry_after: Whole seconds after which the client may ask again.
    """

    status = 503
    type = "ServiceUnavailable"

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message, headers={"Retry-After": str(retry_after)})


class Overloaded(Unavailable):
    """The queue holds as many requests or tokens as it may."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"The request queue is full. Try again in {retry_after} s.", retry_after)


class NotReady(Unavailable):
    """The model is still warming up."""

    def __init__(self) -> None:
        super().__init__("The model is warming up. Wait until GET /ready answers 200.", 5)


class Closing(Unavailable):
    """The server takes no new requests, because it is shutting down."""

    def __init__(self) -> None:
        super().__init__("The server is shutting down. Send the request to another one.", 5)


class Expired(Refusal):
    """The time of a request was up before its answer was ready. The rest of its documents is not scored."""

    status = 504
    type = "DeadlineExceeded"

    def __init__(self, seconds: float) -> None:
        super().__init__(
            f"The request was not finished within {seconds:g} s. Send fewer or shorter documents, send it when there "
            "is less to do, or give it more time, by the header X-Request-Timeout or the server's --request-timeout."
        )


class ClientGone(JaxrankError):
    """The client closed the connection before its answer was ready."""


def error_body(status: int, message: str, kind: str) -> dict[str, Any]:
    """Return the error object of all dialects except TEI. See ErrorBody."""
    error = {"message": message, "type": kind, "param": None, "code": status}
    return {"error": error, "object": "error", **error, "detail": message}


def internal(request_id: str, kind: type[Refusal] = Refusal) -> Refusal:
    """Return the one answer to every unforeseen error. Only the id changes, under which the log says more."""
    return kind(f"Internal error. The server's log tells more under request id {request_id}.")


def internal_error(request_id: str) -> Response:
    """Return the same answer as a response, for a request of unknown dialect."""
    return internal(request_id).response()


def json_response(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return a JSON response with `content` as its body."""
    return Response(to_json(content, inf_nan_mode="null"), status, headers, media_type="application/json")
