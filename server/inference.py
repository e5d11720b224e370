"""The path of a request: read in its dialect, its media loaded, tokenised, scored, answered."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from jaxrank.errors import MediaError, RequestError, TooLongError
from jaxrank.server.api import tokenize as tokenizing
from jaxrank.server.api.request import Rerank, Scored, Terms, to_object
from jaxrank.server.dialects.dialect import Dialect
from jaxrank.server.dialects.resolve import DIALECTS, HEADER, resolve, unknown
from jaxrank.server.errors import BadMedia, BadRequest, Refusal, TooLarge, json_response
from jaxrank.server.http.gate import Gate
from jaxrank.server.http.transport import LARGE_BYTES
from jaxrank.server.media.loading import MediaLoader
from jaxrank.server.observe.metrics import Stages
from jaxrank.text.windows import best_of, documents_of, span_of
from jaxrank.types import Encoded, Patches

if TYPE_CHECKING:
    from jaxrank.server.served_model import ServedModel
    from jaxrank.server.settings import Settings

TOO_LARGE = {"too_many_bytes", "too_many_items", "too_many_request_bytes", "too_many_patch_bytes"}
"""Reasons to refuse media with 413."""

Read = Callable[[Dialect, dict[str, Any]], list[Rerank]]
"""Makes of a JSON object the requests in it, usually one."""


@dataclass(frozen=True)
class Work:
    """A request on its way: as JSON, as what it asks for, tokenised."""

    dialect: Dialect
    raw: dict[str, Any]
    requests: list[Rerank]
    encoded: list[list[Encoded]]


class Inference:
    """Answers /rerank, /score and /tokenize under all their names.

    threads: where tokenising runs. loader: None for a model of text.
    """

    def __init__(
        self,
        reranker: ServedModel,
        settings: Settings,
        gate: Gate,
        threads: Executor,
        loader: MediaLoader | None,
    ) -> None:
        self.reranker = reranker
        self.settings = settings
        self.gate = gate
        self.scheduler = gate.scheduler
        self.threads = threads
        self.loader = loader
        self.terms = Terms(
            settings.max_documents,
            reranker.max_length,
            reranker.min_length,
            reranker.preprocessing is not None,
            settings.truncate,
            settings.long_document,
        )

    async def rerank(self, request: Request) -> Response:
        """The ranking of documents, in the dialect of the request."""
        work, scored = await self._scored(request, lambda dialect, raw: [dialect.read(raw, self.terms)])
        return await self._answer(request, work, scored, lambda: work.dialect.answer(work.requests[0], scored[0]))

    async def score(self, request: Request) -> Response:
        """The scores of pairs, in the order of the request."""

        def pairs(dialect: Dialect, raw: dict[str, Any]) -> Any:
            return dialect.pairs or resolve("/score", raw).pairs

        work, scored = await self._scored(request, lambda dialect, raw: pairs(dialect, raw).read(raw, self.terms))
        answer = pairs(work.dialect, work.raw).answer
        return await self._answer(request, work, scored, lambda: answer(work.requests, scored))

    async def _answer(
        self, request: Request, work: Work, scored: Sequence[Scored], make: Callable[[], Any]
    ) -> Response:
        """A 200 with what `make` returns. Its headers say what answers have no place for: dialect, scale, and how many
        tokens were left out.
        """
        headers = {
            HEADER: work.dialect.name,
            "X-Score-Scale": "logit" if scored[0].logits else "probability",
            "X-Truncated-Tokens": str(sum(sum(one.dropped) for one in scored)),
        }

        def respond() -> Response:
            return json_response(make(), headers=headers)

        with cast(Stages, request.state.stages)("answer"):
            if len(request.state.body) < LARGE_BYTES:
                return respond()
            return await asyncio.to_thread(respond)  # not among those that tokenise, which others may hold for long

    async def tokenize(self, request: Request) -> Response:
        """The tokens of a text, or of the pairs of a rerank request, which can be shown as the model sees them."""
        render = tokenizing.flag(request.query_params.get("render"), "render")

        def read(dialect: Dialect, raw: dict[str, Any]) -> list[Rerank]:
            return [] if tokenizing.is_text(raw) else [dialect.read(raw, self.terms)]

        async with self._encoded(request, read) as work:
            run = partial(tokenizing.answer, work.raw, self.reranker, work.encoded, render, self.settings.model)
            return json_response(await asyncio.get_running_loop().run_in_executor(self.threads, run))

    async def _scored(self, request: Request, read: Read) -> tuple[Work, list[Scored]]:
        """The whole path of a request: read, tokenised, scored."""
        async with self._encoded(request, read) as work:
            add = cast(Stages, request.state.stages).add
            if len(work.encoded) == 1:
                logits = [await self.scheduler.submit(work.encoded[0], add)]
            else:
                try:
                    async with asyncio.TaskGroup() as group:
                        tasks = [group.create_task(self.scheduler.submit(pairs, add)) for pairs in work.encoded]
                except BaseExceptionGroup as failed:
                    raise failed.exceptions[0] from None
                logits = [task.result() for task in tasks]
        identity, created = request.state.request_id, int(time.time())
        logits_by_default = work.dialect.raw_scores and self.reranker.scores_are_logits
        scored: list[Scored] = []
        for one, encoded, own in zip(work.requests, work.encoded, logits, strict=True):
            best = best_of(encoded, own)
            values = own[best].astype(np.float64)
            raw = logits_by_default if one.raw is None else one.raw
            scored.append(
                Scored(
                    model=self.settings.model,
                    id=identity,
                    created=created,
                    logits=raw,
                    scores=(values if raw else np.exp(-np.logaddexp(0, -values))).tolist(),
                    order=np.argsort(-values, kind="stable")[: one.top_n].tolist(),
                    tokens=[sum(len(encoded[i]) for i in group) for group in documents_of(encoded)],
                    dropped=[encoded[i].dropped for i in best],
                    windows=[span_of(encoded[i]) for i in best] if one.long_document == "window" else None,
                )
            )
        return work, scored

    @contextlib.asynccontextmanager
    async def _encoded(self, request: Request, read: Read) -> AsyncIterator[Work]:
        """The request, read and tokenised, as long as the block runs in the queue's place and its client is there."""
        stages = cast(Stages, request.state.stages)
        loop = asyncio.get_running_loop()
        async with self.gate.enter(request) as body:
            with stages("tokenise"):
                if len(body) <= self.settings.inline_bytes:
                    dialect, raw, requests, encoded = self._read(request, body, read)
                else:
                    run = partial(self._read, request, body, read)
                    dialect, raw, requests, encoded = await loop.run_in_executor(self.threads, run)
            if encoded is None:
                with stages("media"):
                    seen = await self._load(requests)
                with stages("tokenise"):
                    encode = partial(self._encode_all, dialect, requests, seen)
                    encoded = await loop.run_in_executor(self.threads, encode)
            yield Work(dialect, raw, requests, encoded)

    def _read(
        self, request: Request, body: bytes, read: Read
    ) -> tuple[Dialect, dict[str, Any], list[Rerank], list[list[Encoded]] | None]:
        """Parse, and tokenise what has no media. Thread-safe. Raises BadRequest or TooManyDocuments."""
        raw = to_object(body)
        state = request.state
        if getattr(state, "unknown_dialect", False):
            raise unknown()
        dialect = getattr(state, "named_dialect", None) or resolve(request.scope["route"].path, raw)
        state.dialect = dialect.name
        requests = read(dialect, raw)
        if self.terms.sees and any(one.media() for one in requests):
            return dialect, raw, requests, None
        return dialect, raw, requests, self._encode_all(dialect, requests, [[] for _ in requests])

    async def _load(self, requests: Sequence[Rerank]) -> list[list[Patches]]:
        """The images and videos of each request, in their order. Raises BadMedia or TooLarge, with their place."""
        assert self.loader is not None, "media are refused before, where the model does not see"
        named = [one.media() for one in requests]
        flat = [media for own in named for media in own]
        try:
            seen = iter(await self.loader.load([part for _, part in flat]))
        except MediaError as error:
            refusal = TooLarge if error.code in TOO_LARGE else BadMedia
            raise refusal(f"{flat[error.index or 0][0]} is {error}.") from None
        return [[next(seen) for _ in own] for own in named]

    def _encode_all(
        self, dialect: Dialect, requests: Sequence[Rerank], seen: Sequence[Sequence[Patches]]
    ) -> list[list[Encoded]]:
        return [self._encode(dialect, one, patches) for one, patches in zip(requests, seen, strict=True)]

    def _encode(self, dialect: Dialect, request: Rerank, seen: Sequence[Patches]) -> list[Encoded]:
        """Tokenise. Thread-safe. Raises BadRequest."""
        instruct = request.instruct if self.reranker.takes_instruct else None
        query, documents = request.with_media(seen)
        try:
            return self.reranker.encode(
                query,
                documents,
                truncate=request.truncate,
                cut=request.cut,
                instruct=instruct,
                long_document=request.long_document,
                max_windows=self.settings.max_windows,
            )
        except TooLongError as error:
            raise dialect.too_long(error, self.reranker.max_length) from None
        except RequestError as error:
            named = re.sub(r"\bdocuments\[(\d+)\]", lambda found: request.place(int(found[1])), str(error))
            raise BadRequest(named) from None


async def dialect_of(request: Request) -> Dialect:
    """The dialect in which to refuse a request. One that was to be scored gets its name as state.dialect."""
    state = request.state
    known: str | None = getattr(state, "dialect", None)
    found: Dialect | None = DIALECTS[known] if known else getattr(state, "named_dialect", None)
    body: bytes | None = getattr(state, "body", None)
    if found is None:
        route = request.scope.get("route")
        found = await asyncio.to_thread(_guess, "" if route is None else route.path, body or b"")
    if body is not None:
        state.dialect = found.name
    return found


def _guess(path: str, body: bytes) -> Dialect:
    """The dialect of a request that was refused before it was read."""
    try:
        return resolve(path, to_object(body))
    except Refusal:
        return resolve(path, {})
