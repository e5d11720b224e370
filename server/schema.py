"""SGLang's rerank request and answer: JSON in, a Rerank out; logits in, JSON out.

Lenient where that cannot mislead: null means the default, unknown fields are ignored. Everything that is refused is
refused with the field's name and what it may hold, never with the value that came.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError
from pydantic_core import to_json

from jaxrank.server.content import Content, Side, allowed, media_of, read, without_payloads
from jaxrank.server.errors import BadRequest, Malformed, TooLarge
from jaxrank.server.media import MediaPart
from jaxrank.types import Encoded, Patches

_EXAMPLE: dict[str, JsonValue] = {
    "query": "what is panda?",
    "documents": ["hi", "The giant panda is a bear species endemic to China."],
    "top_n": 1,
}


class RerankRequest(BaseModel):
    """A query and the documents to rank for it. Null stands for the default; unknown fields are ignored."""

    model_config = ConfigDict(json_schema_extra={"examples": [_EXAMPLE]})

    query: Content = Field(description="What the documents are ranked for. Not empty, not only white space.")
    documents: list[Content] = Field(description="At least one document. None empty or only white space.")
    top_n: int | None = Field(None, ge=1, description="How many results to answer, best first. Null: all.")
    return_documents: bool | None = Field(None, description="Whether results carry their document. Null: true.")
    truncate: bool | None = Field(
        None, description="Whether a pair that is too long is cut (its document first); false: answer 400. Null: true."
    )
    truncation: bool | None = Field(None, description="Another name of truncate.")
    instruct: str | None = Field(
        None, description="What is to be judged; for models that read a prompt, others ignore it. Null: the default."
    )
    instruction: str | None = Field(None, description="Another name of instruct.")
    model: Any = Field(None, description="Ignored: the server has one model.")


class MetaInfo(BaseModel):
    """What scoring one document took."""

    prompt_tokens: int = Field(description="Tokens of the pair as it was scored, special tokens included.")
    truncated_tokens: int = Field(description="Tokens of query and document that were cut off. 0: none.")


class RerankResult(BaseModel):
    """One document's place in the ranking."""

    score: float = Field(description="Higher is more relevant. A raw logit for cross-encoders, else in [0, 1].")
    document: Any = Field(
        None,
        description="The document's text, or its parts as they were sent, without the contents of data: URLs; no such "
        "key with return_documents = false.",
    )
    index: int = Field(description="The document's place in the request, from 0.")
    meta_info: MetaInfo


@dataclass(frozen=True, slots=True)
class Rerank:
    """A request that is in order. top_n: None for all. instruct: None for the server's default. shown: the documents as
    the answer repeats them."""

    query: Side
    documents: list[Side]
    shown: list[Any]
    top_n: int | None
    return_documents: bool
    truncate: bool
    instruct: str | None

    def media(self) -> list[tuple[str, MediaPart]]:
        """The images and videos of query and documents, each with its place, in their order."""
        sides = [("query", self.query), *((f"documents[{i}]", side) for i, side in enumerate(self.documents))]
        return [named for place, side in sides for named in media_of(side, place)]

    def with_media(self, seen: Sequence[Patches]) -> tuple[Any, list[Any]]:
        """Query and documents with these patches in the places of `media()`."""
        left = iter(seen)

        def fill(side: Side) -> Any:
            return side if isinstance(side, str) else [p if isinstance(p, str) else next(left) for p in side]

        return fill(self.query), [fill(side) for side in self.documents]


def parse(body: bytes, max_documents: int, sees: bool = False) -> Rerank:
    """The request in a body of JSON. Raises BadRequest or TooLarge, with the texts that SGLang has for it.

    sees: whether the model takes images and videos.
    """
    raw = _object(body)
    documents = raw.get("documents")
    if isinstance(documents, list) and len(documents) > max_documents:
        raise TooLarge(
            f"The request has {len(documents)} documents; this server takes at most {max_documents} in one request. "
            "Send them in several requests, or raise the server's max_documents."
        )
    try:
        request = RerankRequest.model_validate(raw)
    except ValidationError as error:
        # Validation errors quote the input: nothing of them but the place is passed on.
        raise Malformed(_complaint(error.errors(include_url=False)[0]["loc"], raw, sees)) from None
    query = read(request.query, "query", sees)
    if not query:
        raise BadRequest("Query cannot be empty")
    if isinstance(query, str) and query.isspace():
        raise BadRequest("Query cannot be empty or whitespace only")
    if not request.documents:
        raise BadRequest("Documents cannot be empty")
    sides = [read(document, f"documents[{index}]", sees) for index, document in enumerate(request.documents)]
    if "" in sides:
        raise BadRequest("Each document must be a non-empty string")
    if any(isinstance(side, str) and side.isspace() for side in sides):
        raise BadRequest("Each document cannot be empty or whitespace only")
    return Rerank(
        query=query,
        documents=sides,
        shown=[
            side if isinstance(side, str) else without_payloads(sent)
            for side, sent in zip(sides, raw["documents"], strict=True)
        ],
        top_n=request.top_n,
        return_documents=request.return_documents is not False,
        truncate=request.truncate is not False and request.truncation is not False,
        instruct=request.instruct or request.instruction or None,
    )


def answer(request: Rerank, encoded: Sequence[Encoded], logits: np.ndarray, as_logits: bool) -> bytes:
    """The ranking as JSON: best first, ties in the order of the request.

    logits: finite float32, one a document. as_logits: answer them as they are, else their sigmoid.
    """
    values = logits.astype(np.float64)
    scores = (values if as_logits else np.exp(-np.logaddexp(0, -values))).tolist()
    order = np.argsort(-values, kind="stable")[: request.top_n].tolist()
    results: list[dict[str, Any]] = []
    for index in order:
        pair = encoded[index]
        result: dict[str, Any] = {"score": scores[index]}
        if request.return_documents:
            result["document"] = request.shown[index]
        result["index"] = index
        result["meta_info"] = {"prompt_tokens": len(pair), "truncated_tokens": pair.dropped}
        results.append(result)
    return to_json(results)


def _object(body: bytes) -> dict[str, Any]:
    """The JSON object in a body. Raises Malformed."""
    try:
        raw = json.loads(body.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise Malformed(f"The body is not UTF-8: byte {error.start} is invalid. Send JSON in UTF-8.") from None
    except RecursionError:
        raise Malformed("The body's JSON is nested too deeply.") from None
    except json.JSONDecodeError as error:
        raise Malformed(f"The body is not JSON: {error.msg}, line {error.lineno} column {error.colno}.") from None
    except ValueError:  # whole numbers of thousands of digits
        raise Malformed("The body's JSON holds a number that is too long.") from None
    if not isinstance(raw, dict):
        raise Malformed(f"The body must be a JSON object with the fields query and documents; got {_kind(raw)}.")
    return cast(dict[str, Any], raw)


_ALLOWED = {
    "top_n": "a whole number of at least 1, or null for all",
    "return_documents": "true, false or null",
    "truncate": "true, false or null",
    "truncation": "true, false or null",
    "instruct": "a string or null",
    "instruction": "a string or null",
}


def _complaint(place: tuple[int | str, ...], raw: dict[str, Any], sees: bool) -> str:
    """What is wrong at the place that a validation error names, in terms of the request's own fields."""
    content = allowed(sees)
    may = {**_ALLOWED, "query": content, "documents": f"an array of documents, each {content}"}
    field = str(place[0]) if place else ""
    if field not in raw:
        return f"The field {field} is missing: it must be {may[field]}."
    if field == "documents" and len(place) > 1:
        index = cast(int, place[1])
        return f"documents[{index}] must be {content}; got {_kind(raw[field][index])}."
    return f"{field} must be {may[field]}; got {_kind(raw[field])}."


def _kind(value: Any) -> str:
    """What a JSON value is, without quoting it, but for small numbers."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case int() | float():
            return str(value) if abs(value) < 10**6 else "a number"
        case str():
            return "a string" if value else "an empty string"
        case list():
            return "an array" if value else "an empty array"
        case _:
            return "an object"
