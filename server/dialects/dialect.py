"""A dialect: how a request is read, the form and the scale of the answer, and the form of refusals."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import Response

from jaxrank.errors import TooLongError
from jaxrank.server.api.request import Options, Rerank, Scored, Terms, Wording, read_rerank
from jaxrank.server.errors import ErrorBody, Overloaded, Refusal, TooLong, error_body, json_response

Refusals = Mapping[type[Refusal], tuple[int | None, str]]
"""Status and type of refusals and of their subclasses. None stands for the status of the class."""

BUSY: Refusals = {Overloaded: (429, "Overloaded")}
"""For the dialects whose clients wait and ask again after a 429."""


@dataclass(frozen=True)
class PairScores:
    """How a dialect's /score is read and answered. The fields are as in Dialect, for several queries.

    Args:
        request: The model of the request.
        read: Reads a JSON object.
        answer: Makes the answer.
        answered: The type that documents the answer.
    """

    request: type[Options]
    read: Callable[[dict[str, Any], Terms], list[Rerank]]
    answer: Callable[[list[Rerank], list[Scored]], Any]
    answered: Any


@dataclass(frozen=True, eq=False)
class Dialect:
    """The form in which one server's clients ask to rerank.

    Args:
        name: The name in paths, headers and flags.
        title: The name in the documentation.
        request: The model of the request.
        answer: Makes the answer.
        answered: The type that documents the answer.
        raw_scores: Whether a cross-encoder's scores are logits, if the request does not say. Otherwise they are the
            logits' sigmoid.
        returns_documents: Whether results carry their documents, if the request does not say.
        wording: The texts of refusals that clients may know.
        refusals: The status and type of refusals that differ from server.errors.
        error: Makes an error's body of status, message and type.
        error_body: The model of an error's body.
        pairs: The dialect's /score, if it has one.
    """

    name: str
    title: str
    request: type[Options]
    answer: Callable[[Rerank, Scored], Any]
    answered: Any
    raw_scores: bool = False
    returns_documents: bool = True
    wording: Wording = field(default_factory=Wording)
    refusals: Refusals = field(default_factory=dict)
    error: Callable[[int, str, str], dict[str, Any]] = error_body
    error_body: type[Any] = ErrorBody
    pairs: PairScores | None = None

    def read(self, raw: dict[str, Any], terms: Terms) -> Rerank:
        """Return the request in a JSON object.

        Args:
            raw: The JSON object.
            terms: The server's limits.

        Raises:
            BadRequest: The request is not valid.
            TooManyDocuments: It has more documents than the server takes.
        """
        return read_rerank(raw, self.request, self.wording, returns_documents=self.returns_documents, terms=terms)

    def too_long(self, error: TooLongError, max_length: int) -> TooLong:
        """Return the refusal of a pair that does not fit. Clients look for its first words."""
        if self.wording.too_long and error.tokens:
            return TooLong(self.wording.too_long.format(limit=error.limit, tokens=error.tokens))
        phrase, message = f"This model's maximum context length is {max_length} tokens.", str(error)
        known = message.startswith("This model's maximum context length is")
        return TooLong(message if known else f"{phrase} {message}")

    def refusal(self, refusal: Refusal) -> Response:
        """Return the response for a refusal."""
        status, kind = self._way(type(refusal))
        return json_response(self.error(status, str(refusal), kind), status, refusal.headers)

    def status(self, refused: type[Refusal]) -> int:
        """Return the status of this kind of refusal."""
        return self._way(refused)[0]

    def _way(self, refused: type[Refusal]) -> tuple[int, str]:
        ways = (self.refusals[kind] for kind in refused.__mro__ if kind in self.refusals)
        status, kind = next(ways, (None, refused.type))
        return status or refused.status, kind
