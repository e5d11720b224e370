"""What every dialect reads a request into, and what its answer is made of: JSON in, a Rerank out.

Lenient where that cannot mislead: null means the default, unknown fields are ignored, and every dialect takes the
fields of the others. Everything that is refused is refused with the field's name and what it may hold, never with the
value that came.
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
    """A lone document as a list of one."""
    return [value] if isinstance(value, str | dict) else value


Documents = TypeAliasType("Documents", Annotated[list[Content], BeforeValidator(as_list)])
"""A list of contents, or a lone one that is no list itself."""

FilledDocuments = TypeAliasType("FilledDocuments", Annotated[list[FilledContent], BeforeValidator(as_list)])
"""The same where documents without anything in them are refused."""

SideName = Literal["left", "right", "Left", "Right"]
LongDocument = Literal["truncate", "window"]

Span = Annotated[list[int], Field(min_length=2, max_length=2)]
SPAN = (
    "With long_document = window: the characters [start, stop) of the document's text, as code points, that the score "
    "is of."
)
"""What results say as window, for the documentation."""


_RESERVED = ("chat_template", "tools", "tokenize")
"""What chat_template_kwargs cannot set."""


class Options(BaseModel):
    """What a request may say besides query and documents, in any dialect. Null stands for the default; unknown fields
    are ignored."""

    model: Any = Field(None, description="Ignored: the server has one model.")
    top_n: int | None = Field(None, ge=1, description="How many results to answer, best first. Null: all.")
    top_k: int | None = Field(None, ge=1, description="Another name of top_n.")
    return_documents: bool | None = Field(
        None, description="Whether results carry their document. Null: as the dialect's own server does."
    )
    return_text: bool | None = Field(None, description="Another name of return_documents.")
    truncate: bool | None = Field(
        None,
        description="Whether a pair that is too long is cut (its document first); false: it is refused. Null: as the "
        "server was started, usually true.",
    )
    truncation: bool | None = Field(None, description="Another name of truncate.")
    truncate_prompt_tokens: int | None = Field(
        None, ge=-1, description="Most tokens of a pair, longer ones are cut. -1: what the model takes."
    )
    truncation_side: SideName | None = Field(
        None, description='"left": what is too long loses its beginning. Null: its end.'
    )
    truncation_direction: SideName | None = Field(None, description="Another name of truncation_side.")
    max_tokens_per_doc: int | None = Field(
        None,
        ge=0,
        description="Most tokens of a document's text, which is cut before it is scored. 0 or null: no limit.",
    )
    max_doc_length: int | None = Field(None, ge=0, description="Another name of max_tokens_per_doc.")
    max_tokens_per_query: int | None = Field(None, ge=0, description="The same for the query.")
    long_document: LongDocument | None = Field(
        None,
        description='"window": documents that do not fit are split into overlapping windows, the best of which gives '
        'the score; results say which as window. "truncate": their end is cut off. Null: as the server was started.',
    )
    instruct: str | None = Field(
        None, description="What is to be judged; for models that read a prompt, others ignore it. Null: the default."
    )
    instruction: str | None = Field(None, description="Another name of instruct.")
    chat_template_kwargs: dict[str, Any] | None = Field(
        None,
        description="Its instruction is another name of instruct. Templates cannot be set by requests.",
        json_schema_extra={
            "properties": {
                **{name: {"type": ["string", "null"]} for name in ("instruction", "instruct")},
                **{name: {"type": "null"} for name in _RESERVED},
            }
        },
    )
    raw_scores: bool | None = Field(
        None, description="True: answer logits; false: their sigmoid. Null: as the dialect's own server does."
    )
    use_activation: bool | None = Field(None, description="The opposite of raw_scores.")
    rank_fields: list[str] | None = Field(
        None,
        description="Which fields of documents that are objects are read, in this order; each such document needs one "
        "of them, and then no text. Null: text.",
    )
    mm_processor_kwargs: dict[str, Any] | None = Field(
        None,
        description="Refused unless empty: how images are read is the server's.",
        json_schema_extra={"maxProperties": 0},
    )


@dataclass(frozen=True)
class Wording:
    """The texts in which a dialect's own server refuses requests. None: not refused, or in this server's words."""

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
    """What the server takes. max_length: most tokens of a pair. min_length: the fewest that one can be cut to. sees:
    images and videos. truncate: whether pairs that are too long are cut, where a request does not say. long_document:
    what is done with documents that do not fit, where it does not say that."""

    max_documents: int
    max_length: int
    min_length: int
    sees: bool
    truncate: bool
    long_document: str = "truncate"


@dataclass(frozen=True, slots=True)
class Rerank:
    """A request that is in order, in whatever dialect it came.

    sent: the documents as they came. top_n: None for all. cut: what is left out of the texts. long_document: one of
    windows.LONG_DOCUMENT. instruct: None for the server's default. raw: whether logits are asked for, None for the
    dialect's scale. asked, field, at: what the request calls the query, the documents, and each document's place among
    them; none for the order in which they are.
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
        """What the request calls a document."""
        return f"{self.field}[{self.at[index] if self.at else index}]"

    def media(self) -> list[tuple[str, MediaPart]]:
        """The images and videos of query and documents, each with its place, in their order."""
        named = media_of(self.query, self.asked)
        for index, side in enumerate(self.documents):
            if not isinstance(side, str):
                named += media_of(side, self.place(index))
        return named

    def with_media(self, seen: Sequence[Patches]) -> tuple[Any, list[Any]]:
        """Query and documents with these patches in the places of `media()`."""
        left = iter(seen)

        def fill(side: Side) -> Any:
            return side if isinstance(side, str) else [p if isinstance(p, str) else next(left) for p in side]

        return fill(self.query), [fill(side) for side in self.documents]


@dataclass(frozen=True, slots=True)
class Scored:
    """What an answer is made of. id, created: of the request; created in seconds since 1970.

    scores: of every document in the order of the request. logits: whether they are, else probabilities. order: the
    documents best first, ties in the order of the request, at most top_n. tokens, dropped: of every document, those
    scored, in all its windows, and those left out. windows: the characters of each that its score is of, None for one
    with images or videos; None where documents were not to be split.
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
        """What a document's result says besides: nothing, or its window."""
        return {} if self.windows is None else {"window": self.windows[index]}


def to_object(body: bytes) -> dict[str, Any]:
    """The JSON object in a body. Raises Malformed."""
    raw = load_json(body)
    if not isinstance(raw, dict):
        raise Malformed(f"The body must be a JSON object with the fields query and documents; got {kind(raw)}.")
    return cast(dict[str, Any], raw)


def read_rerank(
    raw: dict[str, Any], model: type[Options], wording: Wording, *, returns_documents: bool, terms: Terms
) -> Rerank:
    """The request in a JSON object. Raises BadRequest or TooManyDocuments.

    model: the dialect's own, with the fields query, and documents or texts; the documents may have either name.
    returns_documents: whether the dialect answers documents where a request does not say.
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
    """Raise TooManyDocuments for more than the server takes."""
    if count > terms.max_documents:
        raise TooManyDocuments(wording.too_many.format(count=count, most=terms.max_documents))


def read_query(content: Content, place: str, wording: Wording, terms: Terms) -> Side:
    """The query. Raises BadRequest for one without anything in it."""
    query = read(content, place, terms.sees)
    if not query:
        raise BadRequest(wording.query_empty)
    if isinstance(query, str) and query.isspace():
        raise BadRequest(wording.query_blank)
    return query


def read_documents(contents: Sequence[Content], field: str, wording: Wording, terms: Terms) -> list[Side]:
    """The documents. Raises BadRequest for none; for empty ones only where the dialect's own server does."""
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
    """What the options ask for. Raises BadRequest for what no server may be asked for."""
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
    """A limit that limits something, else None."""
    return most if most and most < max_length else None


def _instruction(kwargs: dict[str, Any]) -> str | None:
    """The instruct among the values for a template."""
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
    """Documents that are objects as the text of their `fields`, joined by newlines. Raises BadRequest."""
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
    """The model of a JSON object, null standing for defaults. Raises Invalid. names: fields as the request has them."""
    try:
        return model.model_validate({name: value for name, value in raw.items() if value is not None})
    except ValidationError as error:
        # Validation errors quote the input: nothing of them but the place is passed on.
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
