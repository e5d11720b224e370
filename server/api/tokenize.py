"""POST /tokenize: the tokens of texts, or the tokens of a rerank request's pairs as they are scored.

Texts may be sent in the forms of SGLang, vLLM, TEI and llama.cpp.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from jaxrank.errors import RequestError
from jaxrank.server.api.request import kind
from jaxrank.server.errors import BadRequest, Invalid
from jaxrank.text.tokenizer import Token
from jaxrank.types import Encoded

TEXTS = {"prompt": "SGLang and vLLM", "inputs": "TEI", "content": "llama.cpp"}
"""The fields that hold a text, and the servers that call it so."""


_NAMED: list[JsonValue] = [{"required": [name], "properties": {name: {"type": ["array", "string"]}}} for name in TEXTS]


class TokenizeRequest(BaseModel):
    """One text, or several, under one of three names, tokenised without the frame that it has in a pair."""

    model_config = ConfigDict(json_schema_extra={"anyOf": _NAMED})

    prompt: str | list[str] | None = Field(None, description="As SGLang's and vLLM's clients send it.")
    inputs: str | list[str] | None = Field(None, description="As TEI's clients send it.")
    content: str | None = Field(None, description="As llama.cpp's clients send it.")


class PairTokens(BaseModel):
    """The tokens of each pair of a rerank request."""

    model: str
    max_model_len: int
    count: int = Field(description="Number of tokens of all pairs, as in usage.")
    tokens: list[list[int]] = Field(description="The token ids of each pair, including the frame around its texts.")
    prompts: list[str] | None = Field(None, description="Each pair as the model sees it, if render=true.")


class PromptTokens(BaseModel):
    """The tokens of a prompt."""

    tokens: list[int] | list[list[int]]
    count: int | list[int]
    max_model_len: int


class TeiToken(BaseModel):
    """A token and the place of its characters in the text."""

    id: int
    text: str
    special: bool
    start: int
    stop: int


class ContentTokens(BaseModel):
    """The tokens of the field content."""

    tokens: list[int]


class Tokenizer(Protocol):
    """The part of jaxrank.Reranker that is used here."""

    @property
    def max_length(self) -> int: ...
    def render(self, pair: Encoded) -> str: ...
    def tokens_of(self, text: str) -> list[Token]: ...


def is_text(raw: dict[str, Any]) -> bool:
    """Return whether the request is to tokenise texts, not the pairs of a rerank request."""
    return raw.get("query") is None and any(raw.get(name) is not None for name in TEXTS)


def flag(value: str | None, name: str) -> bool:
    """Return a truth value of a query string.

    Args:
        value: The text. None, "0" and "false" are false; "", "1" and "true" are true.
        name: The name of the value, for messages.

    Raises:
        BadRequest: It is another text.
    """
    if value not in (None, "", "0", "1", "false", "true"):
        raise BadRequest(f"{name} must be true or false.")
    return value in ("", "1", "true")


def answer(
    raw: dict[str, Any], tokenizer: Tokenizer, encoded: Sequence[Sequence[Encoded]], render: bool, model: str
) -> Any:
    """Return the answer to a request.

    Args:
        raw: The request.
        tokenizer: Tokenises texts and renders pairs.
        encoded: The pairs of a rerank request. Empty for a request with texts.
        render: Whether to show each pair as the model sees it.
        model: The name of the model.

    Raises:
        BadRequest: A text cannot be tokenised.
        Invalid: The field with the texts has another type.
    """
    if encoded:
        pairs = encoded[0]
        prompts = {"prompts": [tokenizer.render(pair) for pair in pairs]} if render else {}
        ids = [[*pair.prefix.tolist(), *pair.tokens.tolist()] for pair in pairs]
        head = {"model": model, "max_model_len": tokenizer.max_length, "count": sum(map(len, pairs))}
        return head | {"tokens": ids} | prompts
    name = next(name for name in TEXTS if raw.get(name) is not None)
    value = raw[name]
    texts = cast(list[Any], value if isinstance(value, list) and name != "content" else [value])
    if not all(isinstance(text, str) for text in texts):
        raise Invalid(
            f"{name} must be a string{'' if name == 'content' else ' or an array of strings'}; got {kind(value)}."
        )
    try:
        found = [tokenizer.tokens_of(text) for text in texts]
    except RequestError as error:
        raise BadRequest(str(error)) from None
    ids = [[token.id for token in tokens] for tokens in found]
    if name == "inputs":
        return [[{**token._asdict(), "special": False} for token in tokens] for tokens in found]
    if name == "content":
        return {"tokens": ids[0]}
    counts = [len(one) for one in ids]
    many = isinstance(value, list)
    return {
        "tokens": ids if many else ids[0],
        "count": counts if many else counts[0],
        "max_model_len": tokenizer.max_length,
    }
