"""Reads a request of any dialect into a Rerank, and defines what its answer is made of.

The reading is lenient where that cannot mislead. Null means the default, unknown fields are ignored, and every dialect
accepts the fields of the others. A refusal names the field and its allowed values. It never quotes the value that came.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, BeforeValidator, Field, ValidationError
from typing_extensions import TypeAliasType

from jaxrank.server.api.content import HOLDS, Content, FilledContent, Side, allowed, media_of, read
from jaxrank.server.errors import BadRequest, Invalid, Malformed, NoDocuments, TooManyDocuments
from jaxrank.server.http.json_input import load_json
from jaxrank.server.media.loading import MediaPart
from jaxrank.text.tokenizer import Cut
from jaxrank.types import Patches


def as_list(value: Any) -> Any:
    """Return a single document as a list of one. Return other values unchanged."""
    return [value] if isinstance(value, str | dict) else value


Documents = TypeAliasType("Documents", Annotated[list[Content], BeforeValidator(as_list)])
"""A list of contents, or a single one that is not a list itself."""

FilledDocuments = TypeAliasType("FilledDocuments", Annotated[list[FilledContent], BeforeValidator(as_list)])
"""The same, but refused if a document is empty."""

SideName = Literal["left", "right", "Left", "Right"]
LongDocument = Literal["truncate", "window"]

Span = Annotated[list[int], Field(min_length=2, max_length=2)]
SPAN = (
    "With long_document = window, the characters [start, stop) of the document's text that give the score, counted in "
    "code points."
)
"""The description of a result's window, for the documentation."""


_RESERVED = ("chat_template", "tools", "tokenize")
"""The keys that chat_template_kwargs must not set."""


class Options(BaseModel):
    """The fields that a request may have besides query and documents, in any dialect; null stands for the default, and
    unknown fields are ignored.
    """

    model: Any = Field(None, description="Ignored: the server has one model.")
    top_n: int | None = Field(None, ge=1, description="How many results to answer, best first; null means all.")
    top_k: int | None = Field(None, ge=1, description="Another name of top_n.")
    return_documents: bool | None = Field(
        None, description="Whether results carry their document; null means as in the dialect's own server."
    )
    return_text: bool | None = Field(None, description="Another name of return_documents.")
    truncate: bool | None = Field(
        None,
        description="Whether a pair that is too long is cut (its document first), not refused; null means the server's "
        "default, usually true.",
    )
    truncation: bool | None = Field(None, description="Another name of truncate.")
    truncate_prompt_tokens: int | None = Field(
        None, ge=-1, description="Most tokens of a pair, above which it is cut; -1 means the model's limit."
    )
    truncation_side: SideName | None = Field(
        None, description='"left" cuts the beginning of a text that is too long; null cuts its end.'
    )
    truncation_direction: SideName | None = Field(None, description="Another name of truncation_side.")
    max_tokens_per_doc: int | None = Field(
        None,
        ge=0,
        description="Most tokens of a document's text, which is cut before it is scored; 0 or null means no limit.",
    )
    max_doc_length: int | None = Field(None, ge=0, description="Another name of max_tokens_per_doc.")
    max_tokens_per_query: int | None = Field(None, ge=0, description="The same for the query.")
    long_document: LongDocument | None = Field(
        None,
        description='"window" splits documents that do not fit into overlapping windows, of which the best one gives '
        'the score and the field window; "truncate" cuts off their end; null means the default of the server.',
    )
    instruct: str | None = Field(
        None, description="What to judge, for models that read a prompt (others ignore it); null means the default."
    )
    instruction: str | None = Field(None, description="Another name of instruct.")
    chat_template_kwargs: dict[str, Any] | None = Field(
        None,
        description="Its instruction is another name of instruct; requests cannot set templates.",
        json_schema_extra={
            "properties": {
                **{name: {"type": ["string", "null"]} for name in ("instruction", "instruct")},
                **{name: {"type": "null"} for name in _RESERVED},
            }
        },
    )
    raw_scores: bool | None = Field(
        None, description="True means logits, false their sigmoid, and null the scale of the dialect's own server."
    )
    use_activation: bool | None = Field(None, description="The opposite of raw_scores.")
    rank_fields: list[str] | None = Field(
        None,
        description="The fields to read, in this order, of documents that are objects; each of these needs one of the "
        "fields, and then no text; null means text.",
    )
    mm_processor_kwargs: dict[str, Any] | None = Field(
        None,
        description="Refused unless empty, because the server sets how images are read.",
        json_schema_extra={"maxProperties": 0},
    )


@dataclass(frozen=True)
class Wording:
    """The texts with which a dialect's own server refuses requests.

    None means that the request is not refused for this reason, or that this server's own text is used.
    """

    query_missing: str | None = None
    query_empty: str = "Query cannot be empty"
    query_blank: str = "Query cannot be empty or whitespace only"
    documents_missing: str | None = None
    documents_empty: str = "Documents cannot be empty"
    document_empty: str | None = None
    document_blank: str | None = None
    too_many: str = (
        "The request has {count} documents; this server takes at most {most} in one request. "
        "Send them in several requests, or raise the server's max_documents."
    )
    too_long: str | None = None


@dataclass(frozen=True)
class Terms:
    """The limits and defaults of the server.

    Args:
        max_documents: Most documents in one request.
        max_length: Most tokens of a pair.
        min_length: The smallest length in tokens that a pair can be cut to.
        sees: Whether the model sees images and videos.
        truncate: Whether pairs that are too long are cut, if a request does not say.
        long_document: How documents that do not fit are handled, if a request does not say.
    """

    max_documents: int
    max_length: int
    min_length: int
    sees: bool
    truncate: bool
    long_document: str = "truncate"


@dataclass(frozen=True, slots=True)
class Rerank:
    """A valid request, in any dialect.

    Args:
        query: The query.
        documents: The documents.
        sent: The documents as they were sent.
        top_n: How many results to answer. None for all.
        return_documents: Whether results carry their documents.
        truncate: Whether pairs that are too long are cut.
        cut: The parts of the texts that are left out.
        long_document: One of windows.LONG_DOCUMENT.
        instruct: What to judge. None for the server's default.
        raw: Whether the answer has logits. None for the dialect's scale.
        asked: The request's name for the query.
        field: The request's name for the documents.
        at: Each document's index in that field. If it is empty, the documents are in the field's order.
    """

    query: Side
    documents: list[Side]
    sent: list[Any]
    top_n: int | None
    return_documents: bool
    truncate: bool
    cut: Cut
    long_document: str
    instruct: str | None
    raw: bool | None
    asked: str = "query"
    field: str = "documents"
    at: Sequence[int] = ()

    def place(self, index: int) -> str:
        """Return the request's name for a document, such as documents[2]."""
        return f"{self.field}[{self.at[index] if self.at else index}]"

    def media(self) -> list[tuple[str, MediaPart]]:
        """Return the images and videos of query and documents in their order, each with its place."""
        named = media_of(self.query, self.asked)
        for index, side in enumerate(self.documents):
            if not isinstance(side, str):
                named += media_of(side, self.place(index))
        return named

    def with_media(self, seen: Sequence[Patches]) -> tuple[Any, list[Any]]:
        """Return query and documents with patches in place of images and videos.

        Args:
            seen: The patches, in the order of `media()`.
        """
        left = iter(seen)

        def fill(side: Side) -> Any:
            return side if isinstance(side, str) else [p if isinstance(p, str) else next(left) for p in side]

        return fill(self.query), [fill(side) for side in self.documents]


@dataclass(frozen=True, slots=True)
class Scored:
    """The values that an answer is made of.

    Args:
        model: The name of the model.
        id: The id of the request.
        created: When the request was scored, in seconds since 1970.
        logits: Whether the scores are logits. Otherwise they are probabilities.
        scores: One for each document, in the order of the request.
        order: Indices of the documents, best first, at most top_n. Equal scores keep the order of the request.
        tokens: For each document, the number of scored tokens in all its windows.
        dropped: For each document, the number of tokens that were left out.
        windows: For each document, the characters that its score is for. None for a document with images or videos. The
            whole field is None if documents were not to be split.
    """

    model: str
    id: str
    created: int
    logits: bool
    scores: list[float]
    order: list[int]
    tokens: list[int]
    dropped: list[int]
    windows: list[tuple[int, int] | None] | None = None

    def window(self, index: int) -> dict[str, tuple[int, int] | None]:
        """Return the window field of a document's result, or nothing."""
        return {} if self.windows is None else {"window": self.windows[index]}


def to_object(body: bytes) -> dict[str, Any]:
    """Return the JSON object in a body.

    Raises:
        Malformed: The body is not a JSON object.
        TooLarge: The JSON has too many values.
    """
    raw = load_json(body)
    if not isinstance(raw, dict):
        raise Malformed(f"The body must be a JSON object with the fields query and documents; got {kind(raw)}.")
    return cast(dict[str, Any], raw)


def read_rerank(
    raw: dict[str, Any], model: type[Options], wording: Wording, *, returns_documents: bool, terms: Terms
) -> Rerank:
    """Return the request in a JSON object.

    Args:
        raw: The JSON object.
        model: The dialect's model, with the field query, and with documents or texts. The request may use either name.
        wording: The dialect's texts of refusals.
        returns_documents: Whether results carry their documents, if the request does not say.
        terms: The server's limits.

    Raises:
        BadRequest: The request is not valid.
        TooManyDocuments: It has more documents than the server takes.
    """
    own = "texts" if "texts" in model.model_fields else "documents"
    other = "documents" if own == "texts" else "texts"
    field = other if raw.get(own) is None and raw.get(other) is not None else own
    for name, missing in (("query", wording.query_missing), (field, wording.documents_missing)):
        if raw.get(name) is None and missing:
            raise Invalid(missing)
    sent = as_list(raw.get(field))
    if isinstance(sent, list):
        check_count(len(sent), wording, terms)
    ranked = {} if sent is None else {own: ranked_fields(sent, raw.get("rank_fields"), field)}
    request = validate(model, raw | ranked, terms.sees, {own: field})
    given = cast(Any, request)
    query = read_query(given.query, "query", wording, terms)
    documents = read_documents(getattr(given, own), field, wording, terms)
    return to_rerank(
        request, query, documents, cast(list[Any], sent), returns_documents=returns_documents, terms=terms, field=field
    )


def check_count(count: int, wording: Wording, terms: Terms) -> None:
    """Check the number of documents.

    Raises:
        TooManyDocuments: There are more than the server takes.
    """
    if count > terms.max_documents:
        raise TooManyDocuments(wording.too_many.format(count=count, most=terms.max_documents))


def read_query(content: Content, place: str, wording: Wording, terms: Terms) -> Side:
    """Return the query.

    Raises:
        BadRequest: The query is empty or blank, or its content is not valid.
    """
    query = read(content, place, terms.sees)
    if not query:
        raise BadRequest(wording.query_empty)
    if isinstance(query, str) and query.isspace():
        raise BadRequest(wording.query_blank)
    return query


def read_documents(contents: Sequence[Content], field: str, wording: Wording, terms: Terms) -> list[Side]:
    """Return the documents.

    Raises:
        BadRequest: There are no documents, or a content is not valid. Empty and blank documents are refused only if the
            dialect's own server refuses them.
    """
    if not contents:
        raise NoDocuments(wording.documents_empty)
    sides = [read(content, f"{field}[{index}]", terms.sees) for index, content in enumerate(contents)]
    if wording.document_empty and "" in sides:
        raise BadRequest(wording.document_empty)
    if wording.document_blank and any(isinstance(side, str) and side.isspace() for side in sides):
        raise BadRequest(wording.document_blank)
    return sides


def to_rerank(
    request: Options,
    query: Side,
    documents: list[Side],
    sent: list[Any],
    *,
    returns_documents: bool = False,
    terms: Terms,
    **names: Any,
) -> Rerank:
    """Return the request with its options applied.

    Args:
        request: The options.
        query: The query.
        documents: The documents.
        sent: The documents as they were sent.
        returns_documents: Whether results carry their documents, if the request does not say.
        terms: The server's limits.
        **names: The fields asked, field and at of Rerank.

    Raises:
        BadRequest: An option has a value that this server cannot accept.
    """
    most = request.truncate_prompt_tokens
    if most is not None and most > terms.max_length:
        raise BadRequest(
            f"truncate_prompt_tokens is {kind(most)}; this model takes at most {terms.max_length} tokens. "
            "Please request a smaller truncation size."
        )
    if most is not None and -1 < most < terms.min_length:
        raise BadRequest(
            f"truncate_prompt_tokens is {most}; this model needs at least {terms.min_length} tokens. -1 or null: what "
            "it takes."
        )
    if request.mm_processor_kwargs:
        raise BadRequest("mm_processor_kwargs must be empty: how images are read is set where the server is started.")
    said = [value for value in (request.truncate, request.truncation) if value is not None]
    side = request.truncation_side or request.truncation_direction or "right"
    returned = [value for value in (request.return_documents, request.return_text) if value is not None]
    instruction = _instruction(request.chat_template_kwargs or {})
    raw = request.raw_scores
    if raw is None and request.use_activation is not None:
        raw = not request.use_activation
    return Rerank(
        query=query,
        documents=documents,
        sent=sent,
        top_n=request.top_n or request.top_k or None,
        return_documents=returned[0] if returned else returns_documents,
        truncate=False not in said and (bool(said) or most is not None or terms.truncate),
        cut=Cut(
            pair=None if most == -1 else most,
            query=_below(request.max_tokens_per_query, terms.max_length),
            document=_below(request.max_tokens_per_doc or request.max_doc_length, terms.max_length),
            keep_end=side.lower() == "left",
        ),
        long_document=request.long_document or terms.long_document,
        instruct=request.instruct or request.instruction or instruction or None,
        raw=raw,
        **names,
    )


def _below(most: int | None, max_length: int) -> int | None:
    """Return the limit if it has an effect, else None."""
    return most if most and most < max_length else None


def _instruction(kwargs: dict[str, Any]) -> str | None:
    """Return the instruct in chat_template_kwargs.

    Raises:
        BadRequest: A key is reserved.
        Invalid: The instruct is not a string.
    """
    for reserved in _RESERVED:
        if kwargs.get(reserved) is not None:
            raise BadRequest(f"chat_template_kwargs must not hold {reserved}: templates are set where a server starts.")
    for name in ("instruction", "instruct"):
        if (value := kwargs.get(name)) is not None:
            if isinstance(value, str):
                return value
            raise Invalid(f"chat_template_kwargs.{name} must be a string or null; got {kind(value)}.")
    return None


_PARTS = set(HOLDS) - {"text"}


def ranked_fields(documents: Any, fields: Any, field: str) -> Any:
    """Return the documents, where each object is replaced by the text of its `fields`, joined by newlines.

    Raises:
        BadRequest: A document has none of the fields, or arrays or objects in them.
    """
    if not (isinstance(fields, list) and fields and isinstance(documents, list)):
        return documents
    names = [name for name in fields if isinstance(name, str)]

    def text(index: int, document: Any) -> Any:
        if not isinstance(document, dict) or not _PARTS.isdisjoint(document):
            return document
        values = [document[name] for name in names if document.get(name) is not None]
        if not values:
            raise BadRequest(f"{field}[{index}] has none of the fields that rank_fields names.")
        if not all(isinstance(value, str | int | float) for value in values):
            raise BadRequest(f"{field}[{index}] has arrays or objects in rank_fields, which must be texts or numbers.")
        return "\n".join(value if isinstance(value, str) else json.dumps(value) for value in values)

    return [text(index, document) for index, document in enumerate(documents)]


def validate(model: type[Options], raw: dict[str, Any], sees: bool, names: dict[str, str] | None = None) -> Options:
    """Return the model of a JSON object, in which null stands for the default.

    Args:
        model: The dialect's model.
        raw: The JSON object.
        sees: Whether the model sees images and videos.
        names: For fields that the request calls otherwise, the request's names.

    Raises:
        Invalid: A field is missing, or has a value of another type.
    """
    try:
        return model.model_validate({name: value for name, value in raw.items() if value is not None})
    except ValidationError as error:
        # Validation errors quote the input, so only the place is passed on.
        place = error.errors(include_url=False)[0]["loc"]
    field = str(place[0]) if place else ""
    shown = (names or {}).get(field, field)
    content = allowed(sees)
    if field in ("query", "documents", "texts", "queries", "items", "data_1", "data_2", "text_1", "text_2"):
        may = content if field == "query" else f"an array of documents, each {content}"
    else:
        may = _ALLOWED.get(field, "of the type that the documentation says")
    if raw.get(field) is None and field not in raw:
        raise Invalid(f"The field {shown} is missing: it must be {may}.")
    if len(place) > 1 and isinstance(place[1], int) and isinstance(raw[field], list):
        raise Invalid(f"{shown}[{place[1]}] must be {content}; got {kind(raw[field][place[1]])}.")
    raise Invalid(f"{shown} must be {may}; got {kind(raw[field])}.")


_WHOLE = "a whole number of at least 1, or null for all"
_TRUTH = "true, false or null"
_TEXT = "a string or null"
_ALLOWED = {
    "top_n": _WHOLE,
    "top_k": _WHOLE,
    **dict.fromkeys(
        ("return_documents", "return_text", "truncate", "truncation", "raw_scores", "use_activation"), _TRUTH
    ),
    **dict.fromkeys(("apply_softmax", "item_first"), _TRUTH),
    **dict.fromkeys(("instruct", "instruction", "prompt", "content"), _TEXT),
    **dict.fromkeys(
        ("max_tokens_per_doc", "max_doc_length", "max_tokens_per_query"), "a whole number of at least 0, or null"
    ),
    **dict.fromkeys(("truncation_side", "truncation_direction"), '"left", "right" or null'),
    **dict.fromkeys(("chat_template_kwargs", "mm_processor_kwargs"), "an object or null"),
    "truncate_prompt_tokens": "a whole number of at least -1, or null",
    "rank_fields": "an array of strings, or null",
    "long_document": '"truncate", "window" or null',
}


def kind(value: Any) -> str:
    """Return the words for a JSON value, which do not quote it unless it is a small number or a truth value."""
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
