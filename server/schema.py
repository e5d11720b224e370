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

from jaxrank.server.errors import BadRequest, Malformed, TooLarge
from jaxrank.types import Encoded


class Part(BaseModel):
    """A piece of a query or document. A text-only model takes {"type": "text", "text": "..."} or {"text": "..."}."""

    model_config = ConfigDict(extra="allow")

    type: str | None = Field(None, description='"text", the default.')
    text: str | None = Field(None, description="The text. Texts of several parts are joined as they stand.")


Content = str | Part | list[Part]

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
    document: str | None = Field(None, description="The document's text; no such key with return_documents = false.")
    index: int = Field(description="The document's place in the request, from 0.")
    meta_info: MetaInfo


@dataclass(frozen=True, slots=True)
class Rerank:
    """A request that is in order. top_n: None for all. instruct: None for the server's default."""

    query: str
    documents: list[str]
    top_n: int | None
    return_documents: bool
    truncate: bool
    instruct: str | None


def parse(body: bytes, max_documents: int) -> Rerank:
    """The request in a body of JSON. Raises BadRequest or TooLarge, with the texts that SGLang has for it."""
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
        raise Malformed(_complaint(error.errors(include_url=False)[0]["loc"], raw)) from None
    query = _text(request.query, "query")
    if not query:
        raise BadRequest("Query cannot be empty")
    if query.isspace():
        raise BadRequest("Query cannot be empty or whitespace only")
    if not request.documents:
        raise BadRequest("Documents cannot be empty")
    texts = [_text(document, "documents", index) for index, document in enumerate(request.documents)]
    if "" in texts:
        raise BadRequest("Each document must be a non-empty string")
    if any(map(str.isspace, texts)):
        raise BadRequest("Each document cannot be empty or whitespace only")
    return Rerank(
        query=query,
        documents=texts,
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
            result["document"] = request.documents[index]
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


_CONTENT = 'a string, an object {"text": "..."} or an array of {"type": "text", "text": "..."} parts'
_ALLOWED = {
    "query": _CONTENT,
    "documents": f"an array of documents, each {_CONTENT}",
    "top_n": "a whole number of at least 1, or null for all",
    "return_documents": "true, false or null",
    "truncate": "true, false or null",
    "truncation": "true, false or null",
    "instruct": "a string or null",
    "instruction": "a string or null",
}


def _complaint(place: tuple[int | str, ...], raw: dict[str, Any]) -> str:
    """What is wrong at the place that a validation error names, in terms of the request's own fields."""
    field = str(place[0]) if place else ""
    if field not in raw:
        return f"The field {field} is missing: it must be {_ALLOWED[field]}."
    if field == "documents" and len(place) > 1:
        index = cast(int, place[1])
        return f"documents[{index}] must be {_CONTENT}; got {_kind(raw[field][index])}."
    return f"{field} must be {_ALLOWED[field]}; got {_kind(raw[field])}."


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


def _text(content: Content, field: str, index: int | None = None) -> str:
    """The text of a query or document, parts joined. Raises BadRequest for media, and for text that is not Unicode."""
    if isinstance(content, str):
        text = content
    else:
        parts = content if isinstance(content, list) else [content]
        text = "".join([_part_text(part, field, index) for part in parts])
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise BadRequest(
                f"{_place(field, index)} contains a lone surrogate (invalid Unicode). "
                "Escapes from \\ud800 to \\udfff must come in pairs."
            ) from None
    return text


_MEDIA = {"image", "image_url", "image_embeds", "video", "video_url", "audio", "audio_url", "input_audio"}


def _part_text(part: Part, field: str, index: int | None) -> str:
    """The text of one part. Media are refused rather than left out: the score would be of something else."""
    extra = part.model_extra or {}
    if part.type in _MEDIA or not _MEDIA.isdisjoint(extra):
        raise BadRequest(f"{_place(field, index)} holds an image, video or sound, and this model takes text only.")
    if part.text is None or part.type not in (None, "text"):
        raise Malformed(f"{_place(field, index)} must be {_CONTENT}; got a part without text or of another type.")
    return part.text


def _place(field: str, index: int | None) -> str:
    return field if index is None else f"{field}[{index}]"
