"""The HTTP application: routes, keys, limits. create_app takes its whole world as arguments."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast

import numpy as np
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.middleware import Middleware
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.exceptions import HTTPException

from jaxrank.decoding import Decoder
from jaxrank.errors import MediaError, RequestError, TooLongError
from jaxrank.media import Limits, Preprocessing
from jaxrank.server import docs, schema
from jaxrank.server.errors import (
    BadRequest,
    NotReady,
    Refusal,
    TooLarge,
    Unauthorized,
    error_body,
    internal_error,
    json_response,
)
from jaxrank.server.fetch import Fetcher, MediaAccess
from jaxrank.server.media import MediaLoader
from jaxrank.server.scheduler import Scheduler
from jaxrank.server.transport import Envelope, read_body, while_connected
from jaxrank.types import Encoded, Patches

TOO_LARGE = {"too_many_bytes", "too_many_items", "too_many_request_bytes", "too_many_patch_bytes"}
"""Reasons to refuse media with 413."""

log = logging.getLogger(__name__)


class Scorer(Protocol):
    """What the server needs of a jaxrank.Reranker."""

    @property
    def name(self) -> str: ...
    @property
    def max_length(self) -> int: ...
    @property
    def row_tokens(self) -> int: ...
    @property
    def scores_are_logits(self) -> bool: ...
    @property
    def takes_instruct(self) -> bool: ...
    @property
    def preprocessing(self) -> Preprocessing | None: ...
    @property
    def compilations(self) -> int: ...
    def warm_up(self, progress: Callable[[str], None] | None = None) -> None: ...
    def encode(
        self, query: Any, documents: Sequence[Any], *, truncate: bool = True, instruct: str | None = None
    ) -> list[Encoded]: ...
    def score_encoded(self, encoded: Sequence[Encoded]) -> np.ndarray: ...


@dataclass(frozen=True)
class Settings:
    """What create_app was told; see there."""

    model: str
    max_documents: int
    max_body_bytes: int
    max_queue_tokens: int
    max_queue_requests: int
    batch_rows: int
    body_timeout_s: float
    inline_bytes: int
    encode_threads: int
    media: MediaAccess
    limits: Limits
    on_failure: Callable[[BaseException], None]


def create_app(
    reranker: Scorer,
    *,
    served_model_name: str | None = None,
    api_keys: Sequence[str] = (),
    max_documents: int = 1000,
    max_body_bytes: int | None = None,
    max_queue_tokens: int = 2**20,
    max_queue_requests: int = 512,
    batch_rows: int = 2,
    body_timeout_s: float = 60.0,
    inline_bytes: int = 1024,
    encode_threads: int = 2,
    media: MediaAccess | None = None,
    limits: Limits | None = None,
    access_log: bool = True,
    on_failure: Callable[[BaseException], None] = lambda error: None,
) -> FastAPI:
    """The application that serves `reranker`. Raises ValueError for an empty API key.

    served_model_name: what the routes call the model, by default its own name. api_keys: with any, every route but
    /health and /ready wants one of them. max_body_bytes: by default 8 MB, or 40 MB for a model that sees, since images
    may lie in the request. media, limits: where such a model's images and videos may come from, and what of them is
    refused. max_queue_tokens, max_queue_requests: with that much waiting, requests are
    answered 503. batch_rows: usual rows in one call of the device: more overlap the host's work with the device's and
    pack tighter, fewer let a newcomer wait less. body_timeout_s: most seconds for a body to arrive. inline_bytes:
    bodies up to this size are tokenised on the event loop, where a trip to a thread would cost more.
    access_log: one line a request to the logger jaxrank.access. on_failure: told, on another thread, that the warm-up
    failed or scoring stopped for good.
    """
    if not all(api_keys):
        raise ValueError("an API key is empty; give keys of at least one character, or no keys at all")
    settings = Settings(
        model=served_model_name or reranker.name,
        max_documents=max_documents,
        max_body_bytes=max_body_bytes or (8_000_000 if reranker.preprocessing is None else 40_000_000),
        max_queue_tokens=max_queue_tokens,
        max_queue_requests=max_queue_requests,
        batch_rows=batch_rows,
        body_timeout_s=body_timeout_s,
        inline_bytes=inline_bytes,
        encode_threads=encode_threads,
        media=media or MediaAccess(),
        limits=limits or Limits(),
        on_failure=on_failure,
    )
    service = Service(reranker, settings)
    app = FastAPI(
        title="jaxrank",
        description=docs.DESCRIPTION,
        openapi_url=None,  # both are served below, behind the keys
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # redirects are built from the Host header, which the client chooses
        lifespan=service.lifespan,
        middleware=[Middleware(Envelope, access_log=access_log)],
    )
    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(HTTPException, _http_error)
    app.include_router(_open_routes(service))
    app.include_router(_guarded_routes(app, service, api_keys))
    docs.describe(app, guarded=bool(api_keys))
    return app


class Service:
    """What the routes share while the application runs: the model, the queue, the tokenising threads."""

    def __init__(self, reranker: Scorer, settings: Settings) -> None:
        self.reranker = reranker
        self.settings = settings
        self.started = int(time.time())
        self.progress = ""

    @contextlib.asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """Start the device thread, which warms up first; at the end finish what was accepted."""
        settings = self.settings
        self.threads = ThreadPoolExecutor(settings.encode_threads, thread_name_prefix="jaxrank-encode")
        self.scheduler = Scheduler(
            self.reranker.score_encoded,
            batch_tokens=settings.batch_rows * self.reranker.row_tokens,
            max_tokens=settings.max_queue_tokens,
            max_requests=settings.max_queue_requests,
            prepare=self._warm_up,
            on_failure=self._failed,
        )
        self.scheduler.start()
        try:
            async with self._media_loader() as self.loader:
                yield
        finally:
            await self.scheduler.close()
            self.threads.shutdown()

    @contextlib.asynccontextmanager
    async def _media_loader(self) -> AsyncIterator[MediaLoader | None]:
        """What fetches and decodes images and videos; None for a model of text."""
        if self.reranker.preprocessing is None:
            yield None
            return
        with Decoder(self.reranker.preprocessing, self.settings.limits) as decoder:
            async with Fetcher(self.settings.media) as fetcher:
                loader = MediaLoader(fetcher, decoder)
                try:
                    yield loader
                finally:
                    loader.close()

    def _warm_up(self) -> None:
        started = time.perf_counter()
        self.reranker.warm_up(self._progress)
        self.progress = ""
        log.info("ready after %.1f s", time.perf_counter() - started)

    def _progress(self, text: str) -> None:
        """Note how far the warm-up is; the one place where a shutdown can stop it."""
        if self.scheduler.stopping:
            raise InterruptedError("the server is shutting down")
        self.progress = text
        log.info("warming up: %s", text)

    def _failed(self, error: BaseException) -> None:
        log.error("scoring has stopped for good", exc_info=error)
        self.settings.on_failure(error)

    async def rerank(self, request: Request) -> Response:
        """The whole path of a request."""
        settings, scheduler = self.settings, self.scheduler
        body = await read_body(request, settings.max_body_bytes, settings.body_timeout_s)
        if not scheduler.ready and not scheduler.failed and not scheduler.stopping:
            raise NotReady
        with scheduler.admit():
            async with while_connected(request):
                loop = asyncio.get_running_loop()
                if len(body) <= settings.inline_bytes:
                    parsed, encoded = self._read(body)
                else:
                    parsed, encoded = await loop.run_in_executor(self.threads, self._read, body)
                if encoded is None:
                    seen = await self._load(parsed)
                    encoded = await loop.run_in_executor(self.threads, self._encode, parsed, seen)
                logits = await scheduler.submit(encoded)
        content = schema.answer(parsed, encoded, logits, self.reranker.scores_are_logits)
        return Response(content, media_type="application/json")

    def _read(self, body: bytes) -> tuple[schema.Rerank, list[Encoded] | None]:
        """Parse, and tokenise what has no media. Thread-safe. Raises BadRequest or TooLarge."""
        parsed = schema.parse(body, self.settings.max_documents, self.reranker.preprocessing is not None)
        return parsed, None if parsed.media() else self._encode(parsed, [])

    async def _load(self, parsed: schema.Rerank) -> list[Patches]:
        """The request's images and videos, in their order. Raises BadRequest or TooLarge, with their place."""
        assert self.loader is not None, "media are refused before, where the model does not see"
        named = parsed.media()
        try:
            return await self.loader.load([part for _, part in named])
        except MediaError as error:
            refusal = TooLarge if error.code in TOO_LARGE else BadRequest
            raise refusal(f"{named[error.index or 0][0]} is {error}.") from None

    def _encode(self, parsed: schema.Rerank, seen: Sequence[Patches]) -> list[Encoded]:
        """Tokenise. Thread-safe. Raises BadRequest."""
        instruct = parsed.instruct if self.reranker.takes_instruct else None
        query, documents = parsed.with_media(seen)
        try:
            return self.reranker.encode(query, documents, truncate=parsed.truncate, instruct=instruct)
        except TooLongError as error:
            # Clients look for this phrase, whatever the model says besides.
            phrase, message = f"This model's maximum context length is {self.reranker.max_length} tokens.", str(error)
            raise BadRequest(message if message.startswith(phrase[:-1]) else f"{phrase} {message}") from None
        except RequestError as error:
            raise BadRequest(str(error)) from None

    def state(self) -> dict[str, Any]:
        """What GET /ready answers."""
        scheduler = self.scheduler
        names = {"stopping": scheduler.stopping, "failed": scheduler.failed, "ready": scheduler.ready}
        return {
            "ready": scheduler.ready and not scheduler.stopping,
            "state": next((name for name, holds in names.items() if holds), "warming up"),
            "progress": self.progress,
            "model": self.settings.model,
            "compilations_after_ready": self.reranker.compilations if scheduler.ready else 0,
            "queued_requests": scheduler.requests,
            "queued_tokens": scheduler.tokens,
        }


def _open_routes(service: Service) -> APIRouter:
    """The routes that need no key."""
    router = APIRouter(tags=["state"])

    @router.get("/health", response_model=docs.Health, responses=docs.unavailable(docs.Health))
    async def health() -> Response:
        """Whether the process is alive. 503 only when it can never score again and has to be restarted."""
        failed = service.scheduler.failed and not service.scheduler.stopping
        return json_response({"status": "failed" if failed else "alive"}, 503 if failed else 200)

    @router.get("/ready", response_model=docs.Ready, responses=docs.unavailable(docs.Ready))
    async def ready() -> Response:
        """Whether the model is warm and takes requests. A full queue does not make it unready."""
        state = service.state()
        return json_response(state) if state["ready"] else json_response(state, 503, {"Retry-After": "5"})

    return router


def _guarded_routes(app: FastAPI, service: Service, api_keys: Sequence[str]) -> APIRouter:
    """The routes that need a key where there are any."""
    guard = [Depends(partial(_check_key, tuple(key.encode() for key in api_keys)))] if api_keys else []
    router = APIRouter(dependencies=guard)

    async def rerank(request: Request) -> Response:
        """Score every document against the query and answer them best first. PUT does the same as POST."""
        return await service.rerank(request)

    # The first is the one that answers, one route for both methods so that a 405 names both; the second is the one
    # that the documentation shows, where an operation has one method.
    router.add_api_route("/v1/rerank", rerank, methods=["POST", "PUT"], include_in_schema=False)
    router.add_api_route("/v1/rerank", rerank, methods=["POST"], **docs.RERANK)

    @router.get("/v1/models", response_model=docs.Models, tags=["state"])
    async def models() -> Response:
        """The one model of this server, in OpenAI's list."""
        model = {
            "id": service.settings.model,
            "object": "model",
            "created": service.started,
            "owned_by": "jaxrank",
            "max_model_len": service.reranker.max_length,
            "max_documents": service.settings.max_documents,
        }
        return json_response({"object": "list", "data": [model]})

    @router.get("/openapi.json", include_in_schema=False)
    async def openapi() -> Response:
        return json_response(app.openapi())

    @router.get("/docs", include_in_schema=False)
    async def swagger() -> Response:
        return get_swagger_ui_html(openapi_url="openapi.json", title="jaxrank")

    return router


async def _check_key(keys: tuple[bytes, ...], request: Request) -> None:
    """Raise Unauthorized unless the request carries exactly one of the keys, exactly once.

    Every key is compared, in constant time, so that the time tells neither which nor how much of one matched.
    """
    given = request.headers.getlist("authorization")
    scheme, _, key = given[0].partition(" ") if len(given) == 1 else ("", "", "")
    matches = [hmac.compare_digest(key.strip().encode("latin-1"), known) for known in keys]
    if scheme.lower() != "bearer" or not any(matches):
        raise Unauthorized


async def _refused(request: Request, error: Exception) -> Response:
    refusal = cast(Refusal, error)
    # What exactly failed is in the log, under the id.
    return internal_error(request.state.request_id) if refusal.status == 500 else refusal.response()


_HTTP_ERRORS = {
    404: ("NotFound", "There is no such route. GET /docs lists the routes."),
    405: ("MethodNotAllowed", "This route does not take that method. The Allow header names those that it takes."),
}


async def _http_error(request: Request, error: Exception) -> Response:
    """Errors that the framework raises by itself, in the server's own shape."""
    http = cast(HTTPException, error)
    kind, message = _HTTP_ERRORS.get(http.status_code, ("BadRequestError", "The request is malformed."))
    return json_response(error_body(http.status_code, message, kind), http.status_code, http.headers)
