"""What the server refuses. How it says so, a dialect decides (see dialects.dialect); most with `error_body`.

    Refusal                 an answer that is not 200: status, message, type, extra headers
    ├── BadRequest          400  the request can be mended by its sender
    │   ├── Malformed                its body is no JSON object
    │   ├── Invalid                  a field is missing, or has a value of another type
    │   ├── NoDocuments              there is nothing to rank
    │   ├── TooLong                  a pair that does not fit, where truncation is refused
    │   └── NotSupported             nothing that a reranker can answer
    ├── Unauthorized        401  no key, or an unknown one
    ├── NotFound            404  no such route
    ├── MethodNotAllowed    405  not with this method
    ├── SlowBody            408  its body does not arrive in time
    ├── TooLarge            413  more bytes than the server takes
    │   └── TooManyDocuments         more documents
    ├── BadMedia            422  an image or video that cannot be had or read
    ├── LargeHead           431  more headers than the server takes
    ├── ScoringFailed       500  the model failed; the log has the reason
    ├── Unavailable         503  not now: come back after Retry-After seconds
    │   ├── Overloaded           the queue is full
    │   ├── NotReady             the model is still warming up
    │   └── Closing              the server is shutting down
    └── Expired             504  its time was up before it was scored
    ClientGone              nobody is left to answer

No message carries text of a request, of an exception's repr, or of a path.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, Field
from pydantic_core import to_json
from starlette.responses import Response

from jaxrank.errors import JaxrankError


class ErrorObject(BaseModel):
    """The error as vLLM, Infinity and OpenAI's clients read it."""

    message: str = Field(description="What came, what is allowed, what to do.")
    type: str = Field(description="A stable name of the kind of error.")
    param: str | None = Field(description="Always null.")
    code: int = Field(description="The HTTP status.")


class ErrorBody(BaseModel):
    """The body of answers that are not 200: the same in every place where some client looks for it."""

    error: ErrorObject
    object: Literal["error"]
    message: str = Field(description="As SGLang's and Cohere's clients read it.")
    type: str
    param: str | None
    code: int
    detail: str = Field(description="As Jina's and Voyage's clients read it.")


class Refusal(JaxrankError):
    """An answer that is not 200. Its text goes to the client as it stands."""

    status = 500
    type = "InternalServerError"

    def __init__(self, message: str, *, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.headers = dict(headers or {})

    def response(self) -> Response:
        """The whole answer, where the dialect is not known."""
        return json_response(error_body(self.status, str(self), self.type), self.status, self.headers)


class BadRequest(Refusal):
    """A request that its sender can mend."""

    status = 400
    type = "BadRequestError"


class Malformed(BadRequest):
    """A body that is no JSON object."""

    type = "Bad Request"


class Invalid(BadRequest):
    """A field that is missing, or has a value of another type."""

    type = "Bad Request"


class NoDocuments(BadRequest):
    """An empty list of documents."""


class TooLong(BadRequest):
    """A pair that does not fit the model, where truncation is refused."""


class NotSupported(BadRequest):
    """What other servers answer from a model that generates text, and a reranker cannot."""


class Unauthorized(Refusal):
    """No API key, or one that the server does not know."""

    status = 401
    type = "Unauthorized"

    def __init__(self) -> None:
        super().__init__(
            "This server needs an API key. Send a valid one in the header 'Authorization: Bearer KEY'.",
            headers={"WWW-Authenticate": "Bearer"},
        )


class SlowBody(Refusal):
    """A body that does not arrive in time."""

    status = 408
    type = "RequestTimeout"


class NotFound(Refusal):
    """A path without a route."""

    status = 404
    type = "NotFound"


class MethodNotAllowed(Refusal):
    """A route that does not take this method."""

    status = 405
    type = "MethodNotAllowed"


class TooLarge(Refusal):
    """More bytes than the server takes in one request."""

    status = 413
    type = "RequestTooLarge"


class LargeHead(Refusal):
    """More headers, or longer ones, than the server takes."""

    status = 431
    type = "RequestHeaderFieldsTooLarge"


class TooManyDocuments(TooLarge):
    """More documents than the server takes in one request."""


class BadMedia(Refusal):
    """An image or video that cannot be had, read or taken."""

    status = 422
    type = "UnprocessableEntityError"


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


class Expired(Refusal):
    """A request whose time was up before its answer was ready. Its documents are not scored any more."""

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
    """The error object of all dialects but TEI's: see ErrorBody."""
    error = {"message": message, "type": kind, "param": None, "code": status}
    return {"error": error, "object": "error", **error, "detail": message}


def internal(request_id: str, kind: type[Refusal] = Refusal) -> Refusal:
    """The one answer to anything unforeseen: constant but for the id under which the log tells more."""
    return kind(f"Internal error. The server's log tells more under request id {request_id}.")


def internal_error(request_id: str) -> Response:
    """The same as an answer, where the dialect is not known."""
    return internal(request_id).response()


def json_response(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """`content` as a JSON answer."""
    return Response(to_json(content, inf_nan_mode="null"), status, headers, media_type="application/json")
