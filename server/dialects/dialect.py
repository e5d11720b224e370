"""What a dialect is: how a request is read, what is answered, in which scale, and how refusals are put."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import Response

from jaxrank.errors import TooLongError
from jaxrank.server.api.request import Options, Rerank, Scored, Terms, Wording, read_rerank
from jaxrank.server.errors import ErrorBody, Overloaded, Refusal, TooLong, error_body, json_response

Refusals = Mapping[type[Refusal], tuple[int | None, str]]
"""Status and type of refusals, and of those below them in the tree; None for the status of the class."""

BUSY: Refusals = {Overloaded: (429, "Overloaded")}
"""For the dialects whose clients wait and ask again at 429."""


@dataclass(frozen=True)
class PairScores:
    """How a dialect's /score is asked and answered: the same as in Dialect, for several queries."""

    request: type[Options]
    read: Callable[[dict[str, Any], Terms], list[Rerank]]
    answer: Callable[[list[Rerank], list[Scored]], Any]
    answered: Any


@dataclass(frozen=True, eq=False)
class Dialect:
    """One server's way of being asked to rerank.

    title: for the documentation. request: the model of what is asked. answer, answered: what makes the answer, and the
    type that documents it. raw_scores: answer a cross-encoder's logits where the request does not say, instead of their
    sigmoid. returns_documents: whether results carry their documents where the request does not say. wording: the texts
    of refusals that clients may know. refusals: the status and type of those that are not as in server.errors. error,
    error_body: what makes an error's body of status, message and type, and its model. pairs: its /score, if it has one.
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
        """The request in a JSON object. Raises BadRequest or TooManyDocuments."""
        return read_rerank(raw, self.request, self.wording, returns_documents=self.returns_documents, terms=terms)

    def too_long(self, error: TooLongError, max_length: int) -> TooLong:
        """The refusal of a pair that does not fit. Clients look for its first words, whatever else it says."""
        if self.wording.too_long and error.tokens:
            return TooLong(self.wording.too_long.format(limit=error.limit, tokens=error.tokens))
        phrase, message = f"This model's maximum context length is {max_length} tokens.", str(error)
        known = message.startswith("This model's maximum context length is")
        return TooLong(message if known else f"{phrase} {message}")

    def refusal(self, refusal: Refusal) -> Response:
        """The answer that says it."""
        status, kind = self._way(type(refusal))
        return json_response(self.error(status, str(refusal), kind), status, refusal.headers)

    def status(self, refused: type[Refusal]) -> int:
        """The status of such a refusal."""
        return self._way(refused)[0]

    def _way(self, refused: type[Refusal]) -> tuple[int, str]:
        ways = (self.refusals[kind] for kind in refused.__mro__ if kind in self.refusals)
        status, kind = next(ways, (None, refused.type))
        return status or refused.status, kind
