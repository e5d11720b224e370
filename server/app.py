"""The HTTP application: its routes, and how they are put together. create_app takes its whole world as arguments."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast

import numpy as np
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.middleware import Middleware
from fastapi.openapi.docs import get_swagger_ui_html
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse

from jaxrank.attention import Choice
from jaxrank.decoding import Decoder
from jaxrank.errors import RequestError
from jaxrank.media import Limits, Preprocessing
from jaxrank.server import docs, facts, page
from jaxrank.server.access import Access, Guard, cross_origin, open_to_all
from jaxrank.server.dialects.dialect import Dialect
from jaxrank.server.dialects.resolve import DIALECTS, Naming
from jaxrank.server.errors import (
    BadRequest,
    MethodNotAllowed,
    NotFound,
    Refusal,
    ScoringFailed,
    internal,
    json_response,
)
from jaxrank.server.fetch import Fetcher, MediaAccess
from jaxrank.server.gate import Gate, GateLimits
from jaxrank.server.inference import Inference, dialect_of
from jaxrank.server.media import MediaLoader
from jaxrank.server.metrics import CONTENT_TYPE, Metrics
from jaxrank.server.scheduler import Scheduler
from jaxrank.server.tracing import Tracing
from jaxrank.server.transport import Envelope, HeadLimits
from jaxrank.stages import Stages
from jaxrank.tokens import NO_CUT, Cut, Token
from jaxrank.types import Encoded, Work
from jaxrank.version import __version__
from jaxrank.windows import splits

PATIENCE_S = 5.0
"""For the device, when nobody waits for it any more."""

FAILING_FOR_LONG_S = 60.0

log = logging.getLogger(__name__)


class Scorer(Protocol):
    """What the server needs of a jaxrank.Reranker."""

    @property
    def name(self) -> str: ...
    @property
    def devices(self) -> str: ...
    @property
    def attention(self) -> Mapping[str, Choice]: ...
    @property
    def max_length(self) -> int: ...
    @property
    def min_length(self) -> int: ...
    @property
    def row_tokens(self) -> int: ...
    @property
    def scores_are_logits(self) -> bool: ...
    @property
    def dtype(self) -> str: ...
    @property
    def takes_instruct(self) -> bool: ...
    @property
    def preprocessing(self) -> Preprocessing | None: ...
    @property
    def compilations(self) -> int: ...
    @property
    def compiled(self) -> tuple[int, int]: ...
    @property
    def stages(self) -> Stages: ...
    @property
    def work(self) -> Work: ...
    def warm_up(self, progress: Callable[[str], None] | None = None) -> None: ...
    def encode(
        self,
        query: Any,
        documents: Sequence[Any],
        *,
        truncate: bool,
        cut: Cut,
        instruct: str | None,
        long_document: str = "truncate",
        max_windows: int | None = None,
    ) -> list[Encoded]: ...
    def score_encoded(self, encoded: Sequence[Encoded]) -> np.ndarray: ...
    def render(self, pair: Encoded) -> str: ...
    def tokens_of(self, text: str) -> list[Token]: ...


@dataclass(frozen=True)
class Settings:
    """What create_app was told; see there."""

    model: str
    dialect: Dialect | None
    truncate: bool
    long_document: str
    max_documents: int
    max_windows: int
    gate: GateLimits
    max_queue_tokens: int
    max_queue_requests: int
    max_queue_s: float
    batch_rows: int
    inline_bytes: int
    encode_threads: int
    fail_after: int
    probe_s: float
    media: MediaAccess
    limits: Limits
    media_workers: int
    on_ready: Callable[[], None]
    on_failure: Callable[[BaseException], None]


def create_app(
    reranker: Scorer,
    *,
    served_model_name: str | None = None,
    api_keys: Sequence[str] = (),
    open_metrics: bool = False,
    cors_origins: Sequence[str] = (),
    dialect: str = "auto",
    truncate: bool = True,
    long_document: str = "truncate",
    max_documents: int = 1000,
    max_windows: int = 1024,
    max_body_bytes: int | None = None,
    max_headers: int = 100,
    max_header_bytes: int = 32_768,
    max_queue_tokens: int = 2**20,
    max_queue_requests: int = 512,
    max_queue_bytes: int = 512_000_000,
    max_queue_s: float = math.inf,
    batch_rows: int = 2,
    body_timeout_s: float = 60.0,
    request_timeout_s: float = 60.0,
    fail_after: int = 3,
    probe_s: float = 5.0,
    inline_bytes: int = 1024,
    encode_threads: int = 2,
    media: MediaAccess | None = None,
    limits: Limits | None = None,
    media_workers: int = 2,
    access_log: bool = True,
    otlp_endpoint: str | None = None,
    on_ready: Callable[[], None] = lambda: None,
    on_failure: Callable[[BaseException], None] = lambda error: None,
) -> FastAPI:
    """The application that serves `reranker`. Raises RequestError for settings that cannot be.

    served_model_name: what the routes call the model, by default its own name. api_keys: with any, every route but
    the page at /, /health and /ready wants one of them, and /metrics too unless open_metrics. cors_origins: web pages
    of which browsers may ask, see access.cross_origin. dialect: of requests that do not name theirs, a name in
    dialects.resolve.DIALECTS, or "auto" to tell by path and body. truncate: whether pairs that are too long are cut,
    where a request does not say; they are refused else. long_document: "truncate" or "window", what is done with
    documents that do not fit, where a request does not say (see Reranker.encode); max_windows: how many windows all
    that do not fit may come to in one request. max_headers, max_header_bytes: of one request. max_body_bytes:
    by default 8 MB, or 40 MB for a model that sees, since images may lie in the request. media, limits: where such a
    model's images and videos may come from, and what of them is refused; media_workers: processes that decode them.
    max_queue_tokens, max_queue_requests, max_queue_bytes: with that much waiting, requests are answered 429 or 503, by
    dialect; bytes are those of the requests' bodies. max_queue_s: the same where what waits takes that many seconds at
    the speed of the last batches. batch_rows: usual rows in one call of the device: more overlap the
    host's work with the device's and pack tighter, fewer let a newcomer wait less. body_timeout_s: most seconds for a
    body to arrive. request_timeout_s: from there to the answer; what is not scored then is answered 504. fail_after:
    batches that fail in a row until the server says that it is not ready; probe_s: seconds between tries of its own
    then. inline_bytes: bodies up to this size are tokenised on the event loop, where a trip to a thread would cost
    more. access_log: one line a request to the logger jaxrank.access. otlp_endpoint: see tracing.Tracing. on_ready,
    on_failure: told, on another thread, that the warm-up is over; that it failed or scoring stopped for good.
    """
    if dialect != "auto" and dialect not in DIALECTS:
        raise RequestError(f"dialect {dialect!r} is unknown; one of auto, {', '.join(DIALECTS)}")
    splits(long_document)
    access = Access(api_keys)
    settings = Settings(
        model=served_model_name or reranker.name,
        dialect=DIALECTS.get(dialect),
        truncate=truncate,
        long_document=long_document,
        max_documents=max_documents,
        max_windows=max_windows,
        gate=GateLimits(
            max_body_bytes=max_body_bytes or (8_000_000 if reranker.preprocessing is None else 40_000_000),
            max_queue_bytes=max_queue_bytes,
            body_timeout_s=body_timeout_s,
            request_timeout_s=request_timeout_s,
        ),
        max_queue_tokens=max_queue_tokens,
        max_queue_requests=max_queue_requests,
        max_queue_s=max_queue_s,
        batch_rows=batch_rows,
        inline_bytes=inline_bytes,
        encode_threads=encode_threads,
        fail_after=fail_after,
        probe_s=probe_s,
        media=media or MediaAccess(),
        limits=limits or Limits(),
        media_workers=media_workers,
        on_ready=on_ready,
        on_failure=on_failure,
    )
    tracing = None if otlp_endpoint is None else Tracing(otlp_endpoint)
    service = Service(reranker, settings, tracing)
    envelope = Middleware(Envelope, metrics=service.metrics, tracing=tracing, access_log=access_log)
    app = FastAPI(
        title="jaxrank",
        description=docs.DESCRIPTION,
        openapi_url=None,  # both are served below, behind the keys
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # redirects are built from the Host header, which the client chooses
        lifespan=service.lifespan,
        dependencies=[Depends(HeadLimits(max_headers, max_header_bytes)), Depends(access)],
        middleware=[
            envelope,
            *cross_origin(cors_origins),
            Middleware(Guard, access=access),
            Middleware(Naming, dialect=settings.dialect),
        ],
    )
    app.state.service = service
    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(HTTPException, _http_error)
    app.include_router(page.routes())
    app.include_router(_open_routes(service))
    app.include_router(_guarded_routes(app, service, access))
    app.include_router(_metrics_route(service, open_metrics))
    return app


class Service:
    """What the routes share while the application runs: the model, the queue, the tokenising threads."""

    def __init__(self, reranker: Scorer, settings: Settings, tracing: Tracing | None = None) -> None:
        self.reranker = reranker
        self.settings = settings
        self.tracing = tracing
        self.metrics = Metrics()
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
            max_wait_s=settings.max_queue_s,
            prepare=self._warm_up,
            on_failure=self._failed,
            on_batch=self.metrics.batch,
            fail_after=settings.fail_after,
            probe=self._probe,
            probe_s=settings.probe_s,
        )
        self.gate = Gate(self.scheduler, settings.gate)
        reranker = self.reranker
        self.metrics.watch(
            self.scheduler, lambda: reranker.work, lambda: reranker.compilations, lambda: reranker.attention
        )
        self.scheduler.start()
        stalls = asyncio.create_task(self.metrics.watch_event_loop())
        try:
            async with self._media_loader() as loader:
                self.inference = Inference(self.reranker, settings, self.gate, self.threads, loader)
                yield
        finally:
            await self.scheduler.close(PATIENCE_S)
            stalls.cancel()
            self.threads.shutdown(wait=False, cancel_futures=True)
            if self.tracing is not None:
                await asyncio.to_thread(self.tracing.close)

    @contextlib.asynccontextmanager
    async def _media_loader(self) -> AsyncIterator[MediaLoader | None]:
        """What fetches and decodes images and videos; None for a model of text."""
        if self.reranker.preprocessing is None:
            yield None
            return
        settings = self.settings
        with Decoder(self.reranker.preprocessing, settings.limits, workers=settings.media_workers) as decoder:
            async with Fetcher(settings.media) as fetcher:
                loader = MediaLoader(fetcher, decoder, self.metrics.media)
                try:
                    yield loader
                finally:
                    loader.close()

    def _probe(self) -> list[Encoded]:
        """What is scored to see whether scoring works again."""
        return self.reranker.encode("Is it well?", ["It is."], truncate=True, cut=NO_CUT, instruct=None)

    def _warm_up(self) -> None:
        attention = ", ".join(f"{choice} for {part}" for part, choice in self.reranker.attention.items())
        log.info("%s on %s, attention: %s", self.reranker.name, self.reranker.devices, attention)
        stages = self.reranker.stages
        stages.lap("server")
        self.reranker.warm_up(self._progress)
        self.progress = ""
        self.settings.on_ready()
        stages.lap("programs")
        compiled, found = self.reranker.compiled
        fields = {"seconds": stages.rounded(), "programs_compiled": compiled, "programs_from_cache": found}
        log.info("ready after %s: %d programs compiled, %d from the cache", stages, compiled, found,
                 extra={"fields": fields})  # fmt: skip

    def _progress(self, text: str) -> None:
        """Note how far the warm-up is; the one place where a shutdown can stop it."""
        if self.scheduler.stopping:
            raise InterruptedError("the server is shutting down")
        self.progress = text
        log.info("warming up: %s", text)

    def _failed(self, error: BaseException) -> None:
        log.error("scoring has stopped for good", exc_info=error)
        self.settings.on_failure(error)

    def health(self) -> tuple[dict[str, Any], bool]:
        """What GET /health answers, and whether all is well enough to go on."""
        scheduler = self.scheduler
        if scheduler.failed and not scheduler.stopping:
            return {"status": "failed", "reason": "Scoring has stopped for good. Restart the server."}, False
        if scheduler.failing:
            for_long = time.monotonic() - scheduler.failing_since > FAILING_FOR_LONG_S
            reason = f"Nothing could be scored in the last {scheduler.failures} batches; the log tells why."
            return {"status": "failing", "reason": reason}, not for_long
        return {"status": "alive"}, True

    def state(self) -> dict[str, Any]:
        """What GET /ready answers."""
        scheduler = self.scheduler
        names = {
            "stopping": scheduler.stopping,
            "failed": scheduler.failed,
            "failing": scheduler.failing,
            "ready": scheduler.ready,
        }
        return {
            "ready": scheduler.ready and not scheduler.stopping and not scheduler.failing,
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

    @router.get("/health", response_model=docs.Health, responses=docs.unavailable(docs.Health), openapi_extra=docs.OPEN)
    @open_to_all
    async def health() -> Response:
        """Whether the process is alive. 503 when it has to be restarted: scoring has stopped, or fails for a minute."""
        answer, well = service.health()
        return json_response(answer, 200 if well else 503)

    ready_503 = docs.unavailable(docs.Ready, retry=True)

    @router.get("/ready", response_model=docs.Ready, responses=ready_503, openapi_extra=docs.OPEN)
    @open_to_all
    async def ready() -> Response:
        """Whether the model is warm and takes requests. A full queue does not make it unready."""
        state = service.state()
        return json_response(state) if state["ready"] else json_response(state, 503, {"Retry-After": "5"})

    return router


def _metrics_route(service: Service, open_metrics: bool) -> APIRouter:
    """The route that Prometheus asks. It needs a key unless open_metrics."""
    router = APIRouter(tags=["state"])

    async def metrics() -> Response:
        """Counters in Prometheus' text format."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)

    endpoint = open_to_all(metrics) if open_metrics else metrics
    more = docs.OPEN if open_metrics else None
    router.add_api_route("/metrics", endpoint, methods=["GET"], response_class=PlainTextResponse, openapi_extra=more)
    return router


def _guarded_routes(app: FastAPI, service: Service, access: Access) -> APIRouter:
    """The routes that need a key where there are any."""
    router = APIRouter()
    about = facts.Facts(service.reranker, service.settings, service.started)

    async def rerank(request: Request) -> Response:
        return await service.inference.rerank(request)

    async def score(request: Request) -> Response:
        return await service.inference.score(request)

    # Their bodies are read by hand, so docs describes them by hand.
    for path in docs.RERANK_PATHS:
        methods = ["POST", "PUT"] if path == "/v1/rerank" else ["POST"]
        router.add_api_route(path, rerank, methods=methods, include_in_schema=False)
    for path in docs.SCORE_PATHS:
        router.add_api_route(path, score, methods=["POST"], include_in_schema=False)

    @router.post("/tokenize", include_in_schema=False)
    async def tokenize(request: Request) -> Response:
        return await service.inference.tokenize(request)

    @router.get("/v1/models", response_model=facts.Models, tags=["state"])
    async def models() -> Response:
        """The one model of this server, in OpenAI's list."""
        return json_response(about.models())

    @router.get("/models", response_model=facts.InfinityModels, tags=["state"])
    async def infinity_models() -> Response:
        """The same with the state of the queue, as Infinity lists it."""
        return json_response(about.infinity_models(service.scheduler.requests))

    @router.get("/info", response_model=facts.Info, tags=["state"])
    async def info() -> Response:
        """The model and the limits of this server, as TEI tells them."""
        return json_response(about.info())

    @router.get("/version", response_model=facts.Version, tags=["state"])
    async def version() -> Response:
        """The version of jaxrank."""
        return json_response({"version": __version__})

    async def ping() -> Response:
        """An empty answer, behind the keys; /health and /ready tell more, without one."""
        return Response()

    # One route for both methods so that a 405 names both; the documentation has one operation a method.
    router.add_api_route("/ping", ping, methods=["GET", "POST"], include_in_schema=False)

    documents: dict[Dialect | None, bytes] = {}

    @router.get("/openapi.json", include_in_schema=False)
    async def openapi(request: Request) -> Response:
        dialect: Dialect | None = getattr(request.state, "named_dialect", None)
        if dialect not in documents:  # takes a while, so not on the event loop, and once
            describe = partial(docs.describe, app, dialect, service.inference.terms, guarded=access.guarded)
            documents[dialect] = to_json(await asyncio.to_thread(describe))
        return Response(documents[dialect], media_type="application/json")

    @router.get("/docs", include_in_schema=False)
    async def swagger() -> Response:
        return get_swagger_ui_html(openapi_url="openapi.json", title="jaxrank")

    return router


async def _refused(request: Request, error: Exception) -> Response:
    """A refusal in the dialect of the request."""
    refusal = cast(Refusal, error)
    request.app.state.service.metrics.refusal(type(refusal).__name__)
    if isinstance(refusal, ScoringFailed):  # what exactly failed is in the log, under the id
        identity = request.state.request_id
        log.error("request %s: %s", identity, refusal, extra={"fields": {"request_id": identity}})
        refusal = internal(identity, ScoringFailed)
    return (await dialect_of(request)).refusal(refusal)


async def _http_error(request: Request, error: Exception) -> Response:
    """Errors that the framework raises by itself, in the server's own words."""
    http = cast(HTTPException, error)
    refusals = {
        404: NotFound("There is no such route. GET /docs lists the routes."),
        405: MethodNotAllowed(
            "This route does not take that method. The Allow header names those that it takes.", headers=http.headers
        ),
    }
    return await _refused(request, refusals.get(http.status_code, BadRequest("The request is malformed.")))
