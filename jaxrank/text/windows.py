"""Long documents: each window of a document's tokens is scored as a pair of its own, and the best one counts.

This is MaxP: a document is as relevant as its best passage (Dai and Callan 2019, "Deeper Text Understanding for IR with
Contextual Neural Language Modeling"). Windows are runs of the ids of the whole document, which is tokenised once.
Slices of its text would give other ids at their borders.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxrank.errors import RequestError, TooLongError
from jaxrank.types import Encoded

LONG_DOCUMENT = ("truncate", "window")
"""What can be done with documents that do not fit: leave out their end, or split them."""

OVERLAP = 1 / 4
"""The least share of a window that the next one has too. A passage that one window cuts in two is whole in the
other."""

LEAST_TOKENS = 8
"""Windows of fewer tokens are refused. Their scores would mean little, and each repeats the whole query."""

MOST_CHARACTERS = 2**20
"""The most characters of one document, where the number of windows is limited.

Tokenising takes about 200 bytes for each character.
"""


def splits(long_document: str) -> bool:
    """Return whether documents that do not fit are split.

    Raises:
        RequestError: `long_document` is not one of LONG_DOCUMENT.
    """
    if long_document not in LONG_DOCUMENT:
        raise RequestError(f"long_document {long_document!r:.80} is unknown; one of {', '.join(LONG_DOCUMENT)}")
    return long_document == "window"


class Windows:
    """The windows of one request's documents.

    Args:
        most: the most windows that all documents that do not fit may have together. None allows any number.
    """

    def __init__(self, most: int | None = None) -> None:
        self.most = most
        self._count = 0

    def check(self, characters: int, where: str) -> None:
        """Check that a document has no more characters than may be tokenised at once.

        Args:
            characters: the number of characters of the document.
            where: the name of the document in the message.

        Raises:
            RequestError: it has more.
        """
        if self.most is not None and characters > MOST_CHARACTERS:
            raise RequestError(
                f"{where} has {characters} characters, and one that may be split can have {MOST_CHARACTERS}; send it "
                "in parts, as several documents, or ask for long_document truncate"
            )

    def runs(self, tokens: int, size: int, where: str) -> list[tuple[int, int]]:
        """Return the windows of a document, in order, as runs of tokens [first, last).

        A document that fits `size` tokens has one window. Any other has the smallest number of windows of `size` tokens
        that overlap by OVERLAP. They are spread evenly from the document's first token to its last.

        Args:
            tokens: the number of tokens of the document.
            size: the number of tokens of a window.
            where: the name of the document in messages.

        Raises:
            TooLongError: `size` is less than LEAST_TOKENS.
            RequestError: there are too many windows.
        """
        if tokens <= size:
            return [(0, tokens)]
        if size < LEAST_TOKENS:
            raise TooLongError(
                f"{where} does not fit, and could only be split into windows of {max(size, 0)} tokens; a window must "
                f"have {LEAST_TOKENS} at least. Shorten the query, allow more tokens, or ask for long_document truncate"
            )
        step = int(size * (1 - OVERLAP))
        count = 1 - (size - tokens) // step  # rounded up
        self._count += count
        if self.most is not None and self._count > self.most:
            raise RequestError(
                f"the documents up to {where} come to {self._count} windows of {size} tokens, and one request may have "
                f"{self.most}; send fewer or shorter documents in one request, allow more windows (max_windows), or "
                "ask for long_document truncate"
            )
        return [(first, first + size) for first in (i * (tokens - size) // (count - 1) for i in range(count))]


def characters(encoding: Any, run: tuple[int, int], tokens: tuple[int, int], place: tuple[int, int]) -> tuple[int, int]:
    """Return the characters of a document that a run of its tokens stands for, counted from the document's first.

    A character that a token splits counts as a whole. A character that no token stands for belongs to the token before
    it. So windows leave out no part of a document.

    Args:
        encoding: a tokenizers.Encoding with offsets, of a text that holds the document.
        run: the tokens, counted from the document's first.
        tokens: the document's tokens in the encoding.
        place: the document's characters in the text.
    """
    first, last = tokens[0] + run[0], tokens[0] + run[1]
    begin, end = place
    start = begin if first == tokens[0] else max(encoding.token_to_chars(first)[0], begin)
    stop = end if last == tokens[1] else max(encoding.token_to_chars(last - 1)[1], encoding.token_to_chars(last)[0])
    return start - begin, min(stop, end) - begin


def documents_of(encoded: Sequence[Encoded]) -> list[list[int]]:
    """Return the pairs of each document, in order, as indices into `encoded`.

    They are the document's windows, or its only pair.
    """
    groups: list[list[int]] = []
    for i, pair in enumerate(encoded):
        if pair.window is None or pair.window.number == 0:
            groups.append([])
        groups[-1].append(i)
    return groups


def best_of(encoded: Sequence[Encoded], logits: np.ndarray) -> list[int]:
    """Return the index in `encoded` of each document's pair with the highest logit, in order.

    Of equal ones the first counts.
    """
    return [max(group, key=logits.__getitem__) for group in documents_of(encoded)]


def span_of(pair: Encoded) -> tuple[int, int] | None:
    """Return the characters of its document that a pair holds, or None where documents are not split."""
    return None if pair.window is None else (pair.window.start, pair.window.stop)
