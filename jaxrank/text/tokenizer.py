"""From texts to token ids, as the publishers' scripts make them, with the text of users never becoming markup."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from jaxrank.errors import CheckpointError, RequestError, TooLongError
from jaxrank.text.windows import Windows, characters
from jaxrank.types import Encoded, Window

CHARACTERS_PER_TOKEN = 32
"""No token of these vocabularies is this long: what lies further than that beyond the limit need not be tokenised."""

SPARE = 64
"""Tokens beyond the limit that are tokenised all the same: where a text was cut changes only its last few tokens."""

RUN_CHARACTERS = 2**18
"""Texts that are tokenised together."""


@dataclass(frozen=True)
class Cut:
    """What a request leaves out of its texts, besides what the model's limit does.

    pair: most tokens of a whole pair, with all that frames it. query, document: most tokens of a query's or document's
    texts by themselves. None: no limit but the model's. keep_end: what is too long loses its beginning, not its end.
    """

    pair: int | None = None
    query: int | None = None
    document: int | None = None
    keep_end: bool = False

    def limit(self, max_length: int, least: int) -> int:
        """Most tokens of a pair for a model that takes `max_length`. Raises RequestError where less than `least`."""
        if self.pair is not None and self.pair < least:
            raise RequestError(f"a pair is to have {self.pair} tokens at most; this model needs at least {least}")
        return min(max_length, self.pair or max_length)

    def kept(self, ids: list[int], most: int | None) -> list[int]:
        """Of a text's ids those that stay, at most `most`."""
        if most is None or len(ids) <= most:
            return ids
        return ids[len(ids) - most :] if self.keep_end else ids[:most]


NO_CUT = Cut()

LEAST_TOKENS = 8
"""Of a pair, beside what frames it: it cannot be cut to fewer."""


class Token(NamedTuple):
    """A token of a text: the characters [start, stop) of it."""

    id: int
    text: str
    start: int
    stop: int


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


def token_ids(tokenizer: Tokenizer, texts: Sequence[str]) -> Iterator[list[int]]:
    """The ids of each text, in order, without special tokens."""
    return (encoding.ids for encoding in encodings(tokenizer, texts, places=False))


def encodings(tokenizer: Tokenizer, texts: Sequence[str], *, places: bool) -> Iterator[Any]:
    """The tokenizers.Encoding of each text, in order, without special tokens. places: with the characters of tokens.

    Single texts go this way too, since Tokenizer.encode holds Python's lock while it works. They are tokenised in runs:
    what the library makes of them is freed with that lock held, and of megabytes of text that would stop other threads,
    such as a server's event loop, for 0.1 s.
    """
    encode = tokenizer.encode_batch if places else tokenizer.encode_batch_fast
    first, size = 0, 0
    for last, text in enumerate(texts, 1):
        size += len(text)
        if size >= RUN_CHARACTERS or last == len(texts):
            yield from encode(texts[first:last], add_special_tokens=False)
            first, size = last, 0


class PairTokenizer:
    """`<s> query </s></s> document </s>`, the scored token being `<s>`: what XLM-R cross-encoders read.

    As FlagEmbedding's FlagReranker does: the query is first cut to 3/4 of max_length, then the document to what is
    left. Where the query leaves no room for the frame (max_length under 13), it is cut further. Thread-safe.
    """

    def __init__(self, folder: Path, max_length: int):
        self.tokenizer, self.special = load_tokenizer(folder)
        self.cls_id = special_id(self.special, folder, "cls_token", "<s>")
        self.sep_id = special_id(self.special, folder, "sep_token", "</s>")
        self.max_length = max_length
        self.min_length = LEAST_TOKENS

    def _ids(self, texts: Sequence[str], limit: int, keep_end: bool) -> Iterator[list[int]]:
        """Token ids of each text; of one far longer than `limit` tokens, ids enough to fill the limit."""
        clipped = [clip(text, limit, keep_end) for text in texts]
        for text, short, ids in zip(texts, clipped, token_ids(self.tokenizer, clipped), strict=True):
            if len(short) < len(text) and len(ids) < limit + SPARE:
                # runs of spaces or unknown characters shrink to one token: only the whole text tells
                yield from token_ids(self.tokenizer, [text])
            else:
                yield ids

    def encode(
        self,
        query: str,
        documents: Sequence[str],
        *,
        truncate: bool = True,
        cut: Cut = NO_CUT,
        windows: Windows | None = None,
    ) -> list[Encoded]:
        """One Encoded for each document, in order; with `windows` one for each window of those that do not fit.

        Where truncation removed tokens, `dropped` counts them (at least so many, for texts of more than
        32 characters a token of the limit). truncate=False raises TooLongError instead, but for what `cut` asks for.
        """
        check_text(query, "query")
        for i, document in enumerate(documents):
            check_text(document, f"documents[{i}]")
        limit = cut.limit(self.max_length, least=self.min_length)
        (query_ids,) = self._ids([query], limit, cut.keep_end)
        asked = cut.kept(query_ids, cut.query)
        kept = cut.kept(asked, min(limit * 3 // 4, limit - 4))
        room = limit - 4 - len(kept)
        head = [self.cls_id, *kept, self.sep_id, self.sep_id]

        def check(i: int, excess: int) -> None:
            if excess and not truncate:
                raise TooLongError(
                    f"This model's maximum context length is {limit} tokens, but documents[{i}] with its "
                    f"query has at least {limit + excess}. Shorten it, or allow truncation",
                    limit + excess,
                    limit,
                )

        pairs = []
        if windows is not None:
            size = room if cut.document is None else min(room, cut.document)
            for i, document in enumerate(documents):
                windows.check(len(document), f"documents[{i}]")
            for i, encoding in enumerate(encodings(self.tokenizer, documents, places=True)):
                ids, place = encoding.ids, (0, len(documents[i]))
                check(i, len(asked) - len(kept))
                for number, run in enumerate(windows.runs(len(ids), size, f"documents[{i}]")):
                    window = Window(*characters(encoding, run, (0, len(ids)), place), number)
                    tokens = np.array([*head, *ids[slice(*run)], self.sep_id], np.int32)
                    pairs.append(Encoded(tokens, 0, len(query_ids) - len(kept), window=window))
            return pairs
        for i, ids in enumerate(self._ids(documents, room, cut.keep_end)):
            own = cut.kept(ids, cut.document)
            check(i, len(asked) - len(kept) + max(len(own) - room, 0))
            own = cut.kept(own, room)
            dropped = len(query_ids) - len(kept) + len(ids) - len(own)
            pairs.append(Encoded(np.array([*head, *own, self.sep_id], np.int32), 0, dropped))
        return pairs


def clip(text: str, limit: int, keep_end: bool = False) -> str:
    """A prefix of `text` whose first `limit` tokens are those of the whole text; it ends at a space if one is near.

    keep_end: a suffix instead, with the last ones; it begins at a space.
    """
    most = (limit + 2 * SPARE) * CHARACTERS_PER_TOKEN
    if len(text) <= most:
        return text
    if keep_end:
        start = len(text) - most
        space = text.rfind(" ", max(start - 4096, 0), start + 1)
        return text[space if space >= 0 else start :]
    space = text.find(" ", most, most + 4096)
    return text[: space if space >= 0 else most]


def tokens_of(tokenizer: Tokenizer, text: str) -> list[Token]:
    """The tokens of a text by itself, without what frames it in a pair."""
    (encoding,) = encodings(tokenizer, [check_text(text, "text")], places=True)
    return [Token(i, t, *at) for i, t, at in zip(encoding.ids, encoding.tokens, encoding.offsets, strict=True)]


def written(tokenizer: Tokenizer, special: dict[str, int], ids: Sequence[int]) -> str:
    """Tokens as text, special ones by their names."""
    names = {number: name for name, number in special.items()}
    runs = groupby(ids, key=lambda one: one in names)
    return "".join(
        "".join(names[one] for one in run) if marked else tokenizer.decode(list(run), skip_special_tokens=False)
        for marked, run in runs
    )
