"""From a prompt's frame and a request's contents to token ids. Texts stay texts; images and videos are spans."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from jaxtyping import Int32
from tokenizers import Tokenizer

from jaxrank.errors import RequestError, TooLongError
from jaxrank.media.grid import mrope_positions, tokens_of
from jaxrank.text.prompts import Piece, Prompt, Slot, Texts, unwrap
from jaxrank.text.tokenizer import (
    LEAST_TOKENS,
    NO_CUT,
    SPARE,
    Cut,
    check_text,
    clip,
    encodings,
    load_tokenizer,
    token_ids,
)
from jaxrank.text.windows import Windows, characters
from jaxrank.types import NO_PREFIX, Encoded, Media, Patches, Window

Part = str | Patches
"""A part of a query or document: text, an image or a video."""

Segment = tuple[Piece, ...]
"""A run of a prompt's text without markup, with gaps for texts."""

FRAME, BODY, DOCUMENT = range(3)
"""The ranks of tokens. They decide which tokens go when a prompt is too long.

The frame's markup and the media stay. The document's text goes first, then the last tokens between the first gap and
the last one.
"""


class Text(NamedTuple):
    """A run of text that is tokenised as one: its parts, and the rank of each."""

    parts: tuple[str, ...]
    ranks: tuple[int, ...]

    def __str__(self) -> str:
        return "".join(self.parts)


class Span(NamedTuple):
    """The tokens of an image, or of one step of a video, with a token of markup on each side.

    Attributes:
        ids: the token ids.
        media: the number of the image or video in its prompt.
    """

    ids: list[int]
    media: int


Chunk = int | Text | Span


class PromptTokenizer:
    """Put instruct, query and document into the gaps of a prompt's own text. The scored token is the last one.

    It works like the scripts of Qwen3-Reranker and Qwen3-VL-Reranker: the ids are those of the whole text, cut at the
    prompt's own markup. If there are too many, the last tokens of the document's text are left out, and then those of
    the query's text. Frame and media stay. The tokens at the start that all documents of a request share become their
    prefix. The class is thread-safe.

    Args:
        folder: the model's folder.
        max_length: the most tokens of a prompt.
        prompt: the prompt.
        merge: the number of patches in each direction that become one token, for models that see images.

    Raises:
        RequestError: the prompt alone does not fit `max_length`.
        CheckpointError: the tokenizer cannot be read.
    """

    def __init__(self, folder: Path, max_length: int, prompt: Prompt, merge: int | None = None):
        self.tokenizer, self.special = load_tokenizer(folder)
        self.max_length = max_length
        self.prompt = prompt
        self.merge = merge
        self._plain, self._instructed = self._segments(prompt.plain), self._segments(prompt.instructed)
        self.frame = max(map(self._empty, (self._plain, self._instructed)))  # the plain prompt has its own instruct
        self.min_length = self.frame + LEAST_TOKENS
        if max_length < self.min_length:
            raise RequestError(f"max_length is {max_length}; the prompt alone takes {self.frame} tokens")

    def _empty(self, segments: Sequence[int | Segment]) -> int:
        """Return the number of tokens of a prompt with nothing in its gaps."""
        chunks = self._chunks(segments, {slot: [""] for slot in Slot}, [])
        return sum(len(self._ids(str(chunk))) if isinstance(chunk, Text) else 1 for chunk in chunks)

    def _segments(self, pieces: Sequence[Piece]) -> list[int | Segment]:
        """Return a prompt as ids, and as runs of text with gaps between them. Each run is tokenised as one."""
        marks = sorted(self.special, key=len, reverse=True)
        pattern = re.compile(f"({'|'.join(map(re.escape, marks)) or '(?!)'})")
        segments: list[int | Segment] = []
        run: list[Piece] = []

        def end_run() -> None:
            if any(isinstance(piece, Slot) for piece in run):
                segments.append(tuple(run))
            else:
                segments.extend(self._ids("".join(map(str, run))))
            run.clear()

        for piece in pieces:
            if isinstance(piece, Slot):
                run.append(piece)
                continue
            for part in pattern.split(piece):
                if part in self.special:
                    end_run()
                    segments.append(self.special[part])
                elif part:
                    run.append(part)
        end_run()
        return segments

    def _ids(self, text: str) -> list[int]:
        (ids,) = token_ids(self.tokenizer, [text])
        return ids

    def _clipped(self, text: str, limit: int, keep_end: bool) -> str:
        """Return `text`. If it is far too long for any prompt, return a part of it that is still too long."""
        clipped = clip(text, limit, keep_end)
        long_enough = len(clipped) < len(text) and len(self._ids(clipped)) >= limit + SPARE
        return clipped if long_enough else text

    def _checked(self, side: str | Sequence[Part], where: str) -> list[Part]:
        """Return the parts of a query or document.

        Raises:
            RequestError: the model cannot read a part.
        """
        if not isinstance(side, list | tuple):
            return [check_text(side, where)]
        if self.merge is None and any(isinstance(part, Patches) for part in side):
            raise RequestError(f"{where} holds an image or video, and this model reads text alone")
        return [p if isinstance(p, Patches) else check_text(p, f"{where}[{i}]") for i, p in enumerate(side)]

    def _short(self, parts: Sequence[Part], limit: int, most: int | None, keep_end: bool) -> tuple[list[Part], int]:
        """Clip the texts of the parts, and keep at most `most` tokens of text.

        A character of several tokens is left out as a whole.

        Returns:
            The parts, and the number of tokens that the limit `most` left out.
        """
        short = [part if isinstance(part, Patches) else self._clipped(part, limit, keep_end) for part in parts]
        if most is None:
            return short, 0
        dropped = 0
        for i in reversed(range(len(short))) if keep_end else range(len(short)):
            if isinstance(part := short[i], str):
                (encoding,) = encodings(self.tokenizer, [part], places=True)
                places = encoding.offsets
                if excess := max(len(places) - most, 0):
                    short[i] = part[places[excess - 1][1] :] if keep_end else part[: places[-excess][0]]
                most -= len(places) - excess
                dropped += excess
        return short, dropped

    def encode(
        self,
        query: str | Sequence[Part],
        documents: Sequence[str | Sequence[Part]],
        *,
        truncate: bool = True,
        cut: Cut = NO_CUT,
        instruct: str | None = None,
        windows: Windows | None = None,
    ) -> list[Encoded]:
        """Tokenise one query with its documents.

        Texts that already have the publisher's frame around them are taken out of it (see unwrap).

        Args:
            query: the query.
            documents: the documents.
            truncate: whether prompts that are too long are cut. False refuses them, except for what `cut` asks for.
            cut: what to leave out in addition.
            instruct: what to judge. None is the prompt's default.
            windows: how to split documents that do not fit. None does not split.

        Returns:
            One item for each document, in order. With `windows` there is one for each window of the documents that do
            not fit. `dropped` counts the tokens that truncation removed. For texts of more than 32 characters for each
            token of the limit, the true number may be larger.

        Raises:
            RequestError: the model cannot read the input, or a document that cannot be split is too long.
            TooLongError: a prompt is too long and `truncate` is False, or its media alone do not fit.
        """
        limit = cut.limit(self.max_length, least=self.min_length)
        before, asked = 0, self._checked(query, "query")
        sides = [self._checked(document, f"documents[{i}]") for i, document in enumerate(documents)]
        if isinstance(query, str) and all(isinstance(document, str) for document in documents):
            inner = unwrap(Texts(instruct, query, [str(text) for text in documents]))
            instruct, asked, sides = inner.instruct, [inner.query], [[text] for text in inner.documents]
            before = inner.before
        asked, left_out = self._short(asked, limit, cut.query, cut.keep_end)
        values: dict[Slot, list[Part]] = {Slot.QUERY: asked}
        if instruct is not None:
            values[Slot.INSTRUCT] = [self._clipped(check_text(instruct, "instruct"), limit, False)]
        segments = self._plain if instruct is None else self._instructed
        prompts, media, dropped, fits = [], [], [], []
        for i, side in enumerate(sides):
            media.append([])
            document: list[Part] = [*side] or [""]
            excess = 0
            if windows is None:
                document, excess = self._short(side, limit, cut.document, cut.keep_end)
            else:
                windows.check(sum(len(part) for part in side if isinstance(part, str)), f"documents[{i}]")
                fits.append(cut.document is None or not self._short(side, limit, cut.document, False)[1])
            prompts.append(self._chunks(segments, {**values, Slot.DOCUMENT: document}, media[-1]))
            dropped.append(left_out + excess)
        texts = list(dict.fromkeys(str(chunk) for chunks in prompts for chunk in chunks if isinstance(chunk, Text)))
        made = zip(texts, encodings(self.tokenizer, texts, places=windows is not None), strict=True)
        table: dict[str, np.ndarray] = {}
        if windows is not None:
            how = _Split(self.tokenizer, table, windows, limit, cut.document, before)
            split: list[_Prompt] = []
            numbers: list[int] = []
            for i, chunks in enumerate(prompts):
                fresh: dict[str, Any] = {}  # one document at a time, because they are large
                while any(isinstance(chunk, Text) and str(chunk) not in table for chunk in chunks):
                    text, fresh[text] = next(made)
                    table[text] = np.array(fresh[text].ids, np.int32)
                prompt = _Prompt(*self._written(chunks, table), tuple(media[i]))
                pieces = list(how.pieces(prompt, chunks, sides[i], fresh, whole=fits[i], where=f"documents[{i}]"))
                split += pieces
                numbers += [dropped[i]] * len(pieces)
            return _share(split, numbers, self.merge or 1)
        table |= {text: np.array(encoding.ids, np.int32) for text, encoding in made}
        written = [_Prompt(*self._written(chunks, table), tuple(m)) for chunks, m in zip(prompts, media, strict=True)]
        for i, prompt in enumerate(written):
            if (excess := len(prompt.ids) - limit) <= 0:
                continue
            if not truncate:
                raise TooLongError(
                    f"This model's maximum context length is {limit} tokens, but documents[{i}] with its "
                    f"query has at least {len(prompt.ids)}. Shorten it, or allow truncation",
                    len(prompt.ids),
                    limit,
                )
            written[i] = self._cut(prompt, prompts[i], excess, f"documents[{i}]", cut.keep_end)
            dropped[i] += excess
        return _share(written, dropped, self.merge or 1)

    def _chunks(
        self, segments: Sequence[int | Segment], values: dict[Slot, list[Part]], media: list[Patches]
    ) -> list[Chunk]:
        """Return the prompt with its gaps filled. Its images and videos are added to `media`."""
        chunks: list[Chunk] = []
        texts: list[tuple[str, int]] = []

        def end_text() -> None:
            if texts:
                chunks.append(Text(*zip(*texts, strict=True)))
            texts.clear()

        for segment in segments:
            if isinstance(segment, int):
                chunks.append(segment)
                continue
            gaps = [i for i, piece in enumerate(segment) if isinstance(piece, Slot)]
            for i, piece in enumerate(segment):
                if isinstance(piece, str):
                    texts.append((piece, BODY if gaps[0] < i < gaps[-1] else FRAME))
                    continue
                for part in values[piece]:
                    if isinstance(part, str):
                        texts.append((part, DOCUMENT if piece is Slot.DOCUMENT else BODY))
                        continue
                    for time, ids in self._spans(part):
                        texts.append((time, FRAME))
                        end_text()
                        chunks.append(Span(ids, len(media)))
                    media.append(part)
            end_text()
        return chunks

    def _spans(self, one: Patches) -> list[tuple[str, list[int]]]:
        """Return what stands for an image or video: for each step the text before it, and its ids."""
        start, end = (self.special[f"<|vision_{name}|>"] for name in ("start", "end"))
        pad = self.special["<|video_pad|>" if one.seconds else "<|image_pad|>"]
        steps = len(one.seconds) or 1
        ids = [start, *[pad] * (tokens_of(one.grid, self.merge or 1) // steps), end]
        return [(f"<{second:.1f} seconds>", ids) for second in one.seconds] or [("", ids)]

    @staticmethod
    def _written(chunks: Sequence[Chunk], table: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Return a prompt's ids, and the number of the image or video that each stands for. -1 stands for none."""
        ids: list[int] = []
        owners: list[tuple[int, int, int]] = []
        for chunk in chunks:
            if isinstance(chunk, Span):
                owners.append((len(ids) + 1, len(ids) + len(chunk.ids) - 1, chunk.media))
                ids += chunk.ids
            else:
                ids += [chunk] if isinstance(chunk, int) else table[str(chunk)].tolist()
        owner = np.full(len(ids), -1, np.int32)
        for first, last, number in owners:
            owner[first:last] = number
        return np.array(ids, np.int32), owner

    def _cut(self, prompt: _Prompt, chunks: Sequence[Chunk], excess: int, where: str, keep_end: bool) -> _Prompt:
        """Return the prompt without `excess` of its tokens.

        The last tokens of the document go first, or its first ones with keep_end. Then tokens between the first gap and
        the last one go.
        """
        ranks: list[int] = []
        for chunk in chunks:
            if not isinstance(chunk, Text):
                ranks += [FRAME] * (1 if isinstance(chunk, int) else len(chunk.ids))
                continue
            ends = np.cumsum([len(part) for part in chunk.parts]).tolist()
            places = [
                (end - len(part), end, rank) for part, end, rank in zip(chunk.parts, ends, chunk.ranks, strict=True)
            ]
            (encoding,) = encodings(self.tokenizer, [str(chunk)], places=True)
            for left, right in encoding.offsets:
                ranks.append(max((rank for start, end, rank in places if left < end and right > start), default=FRAME))
        order = sorted((rank, -i if keep_end else i) for i, rank in enumerate(ranks) if rank)
        if excess > len(order):
            raise TooLongError(
                f"This model's maximum context length is {len(ranks) - excess} tokens, and the images and videos of "
                f"{where} and its query alone need {len(ranks) - len(order)}, with the prompt's frame. Send fewer or "
                "smaller ones"
            )
        kept = np.ones(len(ranks), bool)
        kept[[abs(i) for _, i in order[len(order) - excess :]]] = False
        return _Prompt(prompt.ids[kept], prompt.owner[kept], prompt.media)


class _Prompt(NamedTuple):
    """A whole prompt.

    Attributes:
        ids: the token ids.
        owner: the number of the item of `media` that each token stands for. -1 stands for none.
        media: the images and videos.
        window: as in Encoded.
    """

    ids: Int32[np.ndarray, " length"]
    owner: Int32[np.ndarray, " length"]
    media: tuple[Patches, ...]
    window: Window | None = None

    @property
    def identity(self) -> np.ndarray:
        """The ids as int64 [length]. Tokens of media are equal only if they stand for the very same media."""
        if not self.media:
            return self.ids.astype(np.int64)
        own = np.array([-1 - id(one) for one in self.media], np.int64)
        return np.where(self.owner < 0, self.ids, own[self.owner])

    def between(self, first: int, last: int, positions: np.ndarray | None) -> Media | None:
        """Return the media among the tokens from first to last."""
        if positions is None:
            return None
        owner = self.owner[first:last]
        at = np.flatnonzero(owner >= 0).astype(np.int32)
        return Media(tuple(self.media[i] for i in dict.fromkeys(owner[at].tolist())), at, positions[:, first:last])


class _Split(NamedTuple):
    """Split the documents of a request.

    Attributes:
        table: ids by text.
        limit: the most tokens of a prompt.
        size: the most tokens of a window. None means all the room that the prompt leaves.
        before: the number of characters before the text of each document.
    """

    tokenizer: Tokenizer
    table: Mapping[str, np.ndarray]
    windows: Windows
    limit: int
    size: int | None
    before: int

    def pieces(
        self,
        prompt: _Prompt,
        chunks: Sequence[Chunk],
        side: Sequence[Part],
        fresh: Mapping[str, Any],
        *,
        whole: bool,
        where: str,
    ) -> Iterator[_Prompt]:
        """Yield the prompt as it is if it fits. Else yield it once for each window of the document.

        Args:
            fresh: encodings that are known already, by text.
            whole: whether the document fits `size`.

        Raises:
            RequestError: the document cannot be split.
        """
        texts = [part for part in side if isinstance(part, str)]
        length = sum(map(len, texts))
        if whole and len(prompt.ids) <= self.limit:
            window = Window(self.before, self.before + length) if len(texts) == len(side) else None
            yield prompt._replace(window=window)
            return
        if len(texts) < len(side):
            raise RequestError(
                f"{where} does not fit and holds an image or video, and only texts can be split into windows. Send "
                "fewer or smaller ones or a shorter text, or ask for long_document truncate"
            )
        at = next(i for i, chunk in enumerate(chunks) if isinstance(chunk, Text) and DOCUMENT in chunk.ranks)
        text = cast(Text, chunks[at])
        begin = sum(map(len, text.parts[: text.ranks.index(DOCUMENT)]))
        end = begin + length
        encoding: Any = fresh.get(str(text)) or next(encodings(self.tokenizer, [str(text)], places=True))
        # The tokens that hold any part of the document. The first of them may begin with the last character before it.
        every = range(len(encoding))
        first = bisect_right(every, begin, key=lambda i: encoding.token_to_chars(i)[1])
        last = bisect_left(every, end, key=lambda i: encoding.token_to_chars(i)[0])
        ahead = first + len(PromptTokenizer._written(chunks[:at], self.table)[0])
        room = self.limit - (len(prompt.ids) - (last - first))
        runs = self.windows.runs(last - first, room if self.size is None else min(room, self.size), where)
        for number, run in enumerate(runs):
            start, stop = characters(encoding, run, (first, last), (begin, end))
            window = Window(self.before + start, self.before + stop, number)
            kept = slice(ahead), slice(ahead + run[0], ahead + run[1]), slice(ahead + last - first, None)
            ids, owner = (np.concatenate([of[part] for part in kept]) for of in (prompt.ids, prompt.owner))
            yield _Prompt(ids, owner, prompt.media, window)


def _share(prompts: Sequence[_Prompt], dropped: Sequence[int], merge: int) -> list[Encoded]:
    """Return the pairs of one request. What all their prompts begin with becomes their prefix."""
    identities = [prompt.identity for prompt in prompts]
    shared = _common_prefix(identities) if len(prompts) > 1 else 0
    prefix, prefix_media = (prompts[0].ids[:shared] if prompts else NO_PREFIX), None
    pairs = []
    for i, (prompt, left_out) in enumerate(zip(prompts, dropped, strict=True)):
        positions = None
        if prompt.media:
            positions, _ = mrope_positions(prompt.owner >= 0, [one.grid for one in prompt.media], merge=merge)
        if i == 0 and (prompt.owner[:shared] >= 0).any():
            prefix_media = prompt.between(0, shared, positions)
        own = prompt.between(shared, len(prompt.ids), positions)
        at = len(prompt.ids) - shared - 1
        pairs.append(Encoded(prompt.ids[shared:], at, left_out, prefix, own, prefix_media, prompt.window))
    return pairs


def _common_prefix(prompts: Sequence[np.ndarray]) -> int:
    """Return the length of the prefix that all prompts share. Each prompt has at least one token after it."""
    shared = min(map(len, prompts)) - 1
    for ids in prompts[1:]:
        different = np.flatnonzero(ids[:shared] != prompts[0][:shared])
        shared = int(different[0]) if len(different) else shared
    return shared
