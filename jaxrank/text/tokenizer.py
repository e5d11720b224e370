"""From texts to token ids, in the way of the publishers' scripts. The text of users never becomes markup."""

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
"""No token of these vocabularies is this long. Text that lies further than that beyond the limit need not be
tokenised."""

SPARE = 64
"""The number of tokens beyond the limit that are tokenised too. A cut in a text changes only the last few tokens."""

RUN_CHARACTERS = 2**18
"""The number of characters of texts that are tokenised together."""


@dataclass(frozen=True)
class Cut:
    """What a request leaves out of its texts, in addition to the model's limit. With None only the model's limit holds.

    Attributes:
        pair: the most tokens of a whole pair, with its whole frame.
        query: the most tokens of the query's texts by themselves.
        document: the most tokens of a document's texts by themselves.
        keep_end: whether a text that is too long loses its beginning instead of its end.
    """

    pair: int | None = None
    query: int | None = None
    document: int | None = None
    keep_end: bool = False

    def limit(self, max_length: int, least: int) -> int:
        """Return the most tokens of a pair, for a model that takes `max_length`.

        Raises:
            RequestError: the limit is less than `least`.
        """
        if self.pair is not None and self.pair < least:
            raise RequestError(f"a pair is to have {self.pair} tokens at most; this model needs at least {least}")
        return min(max_length, self.pair or max_length)

    def kept(self, ids: list[int], most: int | None) -> list[int]:
        """Return those of a text's ids that stay, at most `most`."""
        if most is None or len(ids) <= most:
            return ids
        return ids[len(ids) - most :] if self.keep_end else ids[:most]


NO_CUT = Cut()

LEAST_TOKENS = 8
"""A pair cannot be cut to fewer tokens than these, beside its frame."""


class Token(NamedTuple):
    """A token of a text. It covers the characters [start, stop)."""

    id: int
    text: str
    start: int
    stop: int


def load_tokenizer(folder: Path) -> tuple[Tokenizer, dict[str, int]]:
    """Load the tokenizer of a model folder.

    Truncation and padding are off. Added tokens inside texts are plain text: `</s>` in a document becomes pieces such
    as `<`, `/`, `s`, `>`, and never the separator.

    Returns:
        The tokenizer, and the ids of its added tokens by their text. The special tokens are among them.

    Raises:
        CheckpointError: a file is missing or damaged.
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
            # This includes tokens that are not marked special, such as <think>. No merges lead to them.
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

    They are pieces of the vocabulary and have the best score of all. So the model finds them in plain text, even where
    the tokenizer is set not to find them. A piece with a space in it matches nothing, because Metaspace leaves no
    spaces.
    """
    settings["model"]["vocab"] = [
        [f" {piece}" if piece in special else piece, score] for piece, score in settings["model"]["vocab"]
    ]
    settings["added_tokens"] = []
    settings["post_processor"] = None


def special_id(special: dict[str, int], folder: Path, name: str, default: str) -> int:
    """Return the id of a special token such as "cls_token", by the text that tokenizer_config.json gives it.

    Args:
        special: the ids of special tokens, by their text.
        folder: the model's folder.
        name: the token's name in tokenizer_config.json.
        default: its text if that file does not give one.

    Raises:
        CheckpointError: the file is damaged, or the text is not a special token.
    """
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
    """Return `text` if it is a string of valid Unicode.

    Raises:
        RequestError: it is not. The message names it as `where`.
    """
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
    """Yield the ids of each text, in order, without special tokens."""
    return (encoding.ids for encoding in encodings(tokenizer, texts, places=False))


def encodings(tokenizer: Tokenizer, texts: Sequence[str], *, places: bool) -> Iterator[Any]:
    """Yield the tokenizers.Encoding of each text, in order, without special tokens.

    Single texts go this way too, because Tokenizer.encode holds Python's lock while it works. Texts are tokenised in
    runs, because the library frees its results with that lock held. For megabytes of text this would stop other
    threads, such as a server's event loop, for 0.1 s.

    Args:
        tokenizer: the tokenizer.
        texts: the texts.
        places: whether the result has the characters of each token.
    """
    encode = tokenizer.encode_batch if places else tokenizer.encode_batch_fast
    first, size = 0, 0
    for last, text in enumerate(texts, 1):
        size += len(text)
        if size >= RUN_CHARACTERS or last == len(texts):
            yield from encode(texts[first:last], add_special_tokens=False)
            first, size = last, 0


class PairTokenizer:
    """Write `<s> query </s></s> document </s>`, the form that XLM-R cross-encoders read. The scored token is `<s>`.

    It works like FlagEmbedding's FlagReranker: the query is cut to 3/4 of max_length first, then the document to what
    is left. If the query leaves no room for the frame (max_length under 13), it is cut further. The class is
    thread-safe.

    Raises:
        CheckpointError: the tokenizer cannot be read, or lacks a special token.
    """

    def __init__(self, folder: Path, max_length: int):
        self.tokenizer, self.special = load_tokenizer(folder)
        self.cls_id = special_id(self.special, folder, "cls_token", "<s>")
        self.sep_id = special_id(self.special, folder, "sep_token", "</s>")
        self.max_length = max_length
        self.min_length = LEAST_TOKENS

    def _ids(self, texts: Sequence[str], limit: int, keep_end: bool) -> Iterator[list[int]]:
        """Yield the token ids of each text.

        A text far longer than `limit` tokens gives only enough ids to fill the limit.
        """
        clipped = [clip(text, limit, keep_end) for text in texts]
        for text, short, ids in zip(texts, clipped, token_ids(self.tokenizer, clipped), strict=True):
            if len(short) < len(text) and len(ids) < limit + SPARE:
                # Runs of spaces or unknown characters shrink to one token, so the whole text is needed.
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
        """Tokenise one query with its documents.

        Args:
            query: the query.
            documents: the documents.
            truncate: whether pairs that are too long are cut. False refuses them, except for what `cut` asks for.
            cut: what to leave out in addition.
            windows: how to split documents that do not fit. None does not split.

        Returns:
            One item for each document, in order. With `windows` there is one for each window of the documents that do
            not fit. `dropped` counts the tokens that truncation removed. For texts of more than 32 characters for each
            token of the limit, the true number may be larger.

        Raises:
            RequestError: a text is not valid, or a document has too many windows.
            TooLongError: a pair is too long and `truncate` is False.
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
    """Return a prefix of `text` whose first `limit` tokens are those of the whole text.

    It ends at a space if one is near. With keep_end, the function returns a suffix instead, whose last `limit` tokens
    are those of the whole text. The suffix begins at a space if one is near.
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
    """Return the tokens of a text by itself, without the frame of a pair.

    Raises:
        RequestError: the text is not a string of valid Unicode.
    """
    (encoding,) = encodings(tokenizer, [check_text(text, "text")], places=True)
    return [Token(i, t, *at) for i, t, at in zip(encoding.ids, encoding.tokens, encoding.offsets, strict=True)]


def written(tokenizer: Tokenizer, special: dict[str, int], ids: Sequence[int]) -> str:
    """Return tokens as text, with special tokens by their names."""
    names = {number: name for name, number in special.items()}
    runs = groupby(ids, key=lambda one: one in names)
    return "".join(
        "".join(names[one] for one in run) if marked else tokenizer.decode(list(run), skip_special_tokens=False)
        for marked, run in runs
    )
