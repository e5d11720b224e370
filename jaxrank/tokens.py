"""From texts to token ids, as the publishers' scripts make them, with the text of users never becoming markup."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from jaxrank.errors import CheckpointError, RequestError, TooLongError
from jaxrank.types import Encoded

CHARACTERS_PER_TOKEN = 32
"""No token of these vocabularies is this long: what lies further than that beyond the limit need not be tokenised."""

SPARE = 64
"""Tokens beyond the limit that are tokenised all the same: where a text was cut changes only its last few tokens."""


def load_tokenizer(folder: Path) -> tuple[Tokenizer, dict[str, int]]:
    """The tokenizer of a model folder, and the ids of its added tokens, special ones among them, by their text.

    Truncation and padding are off, and added tokens inside texts are text: `</s>` in a document becomes pieces
    such as `<`, `/`, `s`, `>`, never the separator.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        found = sorted(p.name for p in folder.iterdir())[:20]
        raise CheckpointError(
            f"{folder}: no tokenizer.json (found: {', '.join(found) or 'nothing'}). Put the one published with the "
            "model there; transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...) also writes it"
        )
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        special = {token["content"]: token["id"] for token in settings["added_tokens"]}
        if settings["model"]["type"] == "Unigram":
            _hide_special_pieces(settings, special)
        elif settings["model"]["type"] == "BPE":
            # also those that are not marked special, such as <think>; no merges lead to them
            settings["added_tokens"], settings["post_processor"] = [], None
        tokenizer = Tokenizer.from_str(json.dumps(settings))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); a model's folder must have one") from error
    except Exception as error:  # tokenizers raises bare Exception for any damage
        reason = f"{type(error).__name__}: {error}"[:200]
        raise CheckpointError(f"{path}: not a tokenizer that the tokenizers library can read ({reason})") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer, special


def _hide_special_pieces(settings: dict[str, Any], special: dict[str, int]) -> None:
    """Make the special tokens of a Unigram vocabulary unreachable from text.

    They are pieces of the vocabulary with the best score of all, so that the model finds them in plain text even
    where the tokenizer was told not to. With a space in it a piece matches nothing: Metaspace leaves no spaces.
    """
    settings["model"]["vocab"] = [
        [f" {piece}" if piece in special else piece, score] for piece, score in settings["model"]["vocab"]
    ]
    settings["added_tokens"] = []
    settings["post_processor"] = None


def special_id(special: dict[str, int], folder: Path, name: str, default: str) -> int:
    """The id of a special token such as "cls_token", by the text that tokenizer_config.json gives it."""
    path = folder / "tokenizer_config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    given = (settings.get(name) if isinstance(settings, dict) else None) or default
    text = given.get("content") if isinstance(given, dict) else given
    if not isinstance(text, str) or text not in special:
        raise CheckpointError(
            f"{folder}: {name} {text!r} is not among the tokenizer's special tokens ({', '.join(special)})"
        )
    return special[text]


def check_text(text: object, where: str) -> str:
    """`text` if it is a string of valid Unicode; RequestError naming `where` otherwise."""
    if not isinstance(text, str):
        raise RequestError(f"{where} must be a string, got {type(text).__name__}")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RequestError(
                f"{where} contains a lone surrogate at character {error.start}, which is not valid Unicode; "
                "send the character itself or replace it"
            ) from None
    return text


class PairTokenizer:
    """`<s> query </s></s> document </s>`, the scored token being `<s>`: what XLM-R cross-encoders read.

    As FlagEmbedding's FlagReranker does: the query is first cut to 3/4 of max_length, then the document to what is
    left. Where the query leaves no room for the frame (max_length under 13), it is cut further. Thread-safe.
    """

    def __init__(self, folder: Path, max_length: int):
        self.tokenizer, special = load_tokenizer(folder)
        self.cls_id = special_id(special, folder, "cls_token", "<s>")
        self.sep_id = special_id(special, folder, "sep_token", "</s>")
        self.max_length = max_length

    def _ids(self, texts: Sequence[str], limit: int) -> list[list[int]]:
        """Token ids of each text; of one far longer than `limit` tokens, ids enough to fill the limit."""
        clipped = [clip(text, limit) for text in texts]
        ids = [e.ids for e in self.tokenizer.encode_batch_fast(clipped, add_special_tokens=False)]
        for i, text in enumerate(texts):
            if len(clipped[i]) < len(text) and len(ids[i]) < limit + SPARE:
                # runs of spaces or unknown characters shrink to one token: only the whole text tells
                ids[i] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def encode(self, query: str, documents: Sequence[str], *, truncate: bool = True) -> list[Encoded]:
        """One Encoded for each document, in order.

        Where truncation removed tokens, `dropped` counts them (at least so many, for texts of more than
        32 characters a token of the limit). truncate=False raises TooLongError instead.
        """
        check_text(query, "query")
        for i, document in enumerate(documents):
            check_text(document, f"documents[{i}]")
        query_ids = self._ids([query], self.max_length)[0]
        kept = query_ids[: min(self.max_length * 3 // 4, self.max_length - 4)]
        room = self.max_length - 4 - len(kept)
        head = [self.cls_id, *kept, self.sep_id, self.sep_id]
        pairs = []
        for i, ids in enumerate(self._ids(documents, room)):
            dropped = len(query_ids) - len(kept) + max(len(ids) - room, 0)
            if dropped and not truncate:
                raise TooLongError(
                    f"This model's maximum context length is {self.max_length} tokens, but documents[{i}] with its "
                    f"query has at least {self.max_length + dropped}. Shorten it, or allow truncation"
                )
            pairs.append(Encoded(np.array([*head, *ids[:room], self.sep_id], np.int32), 0, dropped))
        return pairs


def clip(text: str, limit: int) -> str:
    """A prefix of `text` whose first `limit` tokens are those of the whole text; it ends at a space if one is near."""
    most = (limit + 2 * SPARE) * CHARACTERS_PER_TOKEN
    if len(text) <= most:
        return text
    space = text.find(" ", most, most + 4096)
    return text[: space if space >= 0 else most]
