"""The path of a request: it is read in its dialect, its media are loaded, and it is tokenised, scored and answered."""

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
"""The error codes of media that are refused with 413."""

Read = Callable[[Dialect, dict[str, Any]], list[Rerank]]
"""Turns a JSON object into the requests in it. Usually there is one."""


@dataclass(frozen=True)
class Work:
    """One HTTP request in progress: its JSON object, the requests in it, and their encoded pairs."""

    dialect: Dialect
    raw: dict[str, Any]
    requests: list[Rerank]
    encoded: list[list[Encoded]]


class Inference:
    """Answers /rerank, /score and /tokenize under all their names.

    Args:
        reranker: The model.
        settings: The application's settings.
        gate: Every request enters through it.
        threads: The executor that tokenises.
        loader: Loads images and videos. None for a model that takes text only.
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
        """Answer with the ranking of the documents, in the dialect of the request.

        Raises:
            Refusal: The request cannot be answered.
            ClientGone: The client has closed the connection.
        """
        work, scored = await self._scored(request, lambda dialect, raw: [dialect.read(raw, self.terms)])
        return await self._answer(request, work, scored, lambda: work.dialect.answer(work.requests[0], scored[0]))

    async def score(self, request: Request) -> Response:
        """Answer with the scores of the pairs, in the order of the request.

        Raises:
            Refusal: The request cannot be answered.
            ClientGone: The client has closed the connection.
        """

        def pairs(dialect: Dialect, raw: dict[str, Any]) -> Any:
            return dialect.pairs or resolve("/score", raw).pairs

        work, scored = await self._scored(request, lambda dialect, raw: pairs(dialect, raw).read(raw, self.terms))
        answer = pairs(work.dialect, work.raw).answer
        return await self._answer(request, work, scored, lambda: answer(work.requests, scored))

    async def _answer(
        self, request: Request, work: Work, scored: Sequence[Scored], make: Callable[[], Any]
    ) -> Response:
        """Answer 200 with the result of `make`.

        The headers carry what the answer's body has no place for: the dialect, the scale of the scores, and the number
        of dropped tokens.
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
            return await asyncio.to_thread(respond)  # not a tokenising thread: long requests may occupy those

    async def tokenize(self, request: Request) -> Response:
        """Answer with the tokens of a text, or of the pairs of a rerank request.

        With `render` in the query string, the answer also shows each pair as the model sees it.

        Raises:
            Refusal: The request cannot be answered.
            ClientGone: The client has closed the connection.
        """
        render = tokenizing.flag(request.query_params.get("render"), "render")

        def read(dialect: Dialect, raw: dict[str, Any]) -> list[Rerank]:
            return [] if tokenizing.is_text(raw) else [dialect.read(raw, self.terms)]

        async with self._encoded(request, read) as work:
            run = partial(tokenizing.answer, work.raw, self.reranker, work.encoded, render, self.settings.model)
            return json_response(await asyncio.get_running_loop().run_in_executor(self.threads, run))

    async def _scored(self, request: Request, read: Read) -> tuple[Work, list[Scored]]:
        """Read, tokenise and score a request."""
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
        """Read and tokenise the request. The block holds a place in the queue, as long as the client is connected."""
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
        """Parse the body, and tokenise it if it has no media. Thread-safe.

        Raises:
            BadRequest: The request is not valid.
            TooLarge: The JSON has too many values.
            TooManyDocuments: The request has more documents than the server takes.
        """
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
        """Return the images and videos of each request, in their order.

        Raises:
            BadMedia: An image or video cannot be used. The message says where it is in the request.
            TooLarge: The images and videos are too large or too many. The message says where.
        """
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
        """Tokenise one request. Thread-safe.

        Raises:
            BadRequest: A pair does not fit or is not valid.
        """
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
    """Return the dialect for refusing a request.

    If the request's body was read, state.dialect is set to the dialect's name.
    """
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
    """Return the dialect of a request that was refused before it was read."""
    try:
        return resolve(path, to_object(body))
    except Refusal:
        return resolve(path, {})
