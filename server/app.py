"""The HTTP application and its routes. create_app takes all of its inputs as arguments."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.middleware import Middleware
from fastapi.openapi.docs import get_swagger_ui_html
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse

from jaxrank.errors import RequestError
from jaxrank.media.images import Limits
from jaxrank.server.api import facts
from jaxrank.server.api import openapi as docs
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
from jaxrank.server.http import page
from jaxrank.server.http.access import Access, Guard, cross_origin, open_to_all
from jaxrank.server.http.gate import GateLimits
from jaxrank.server.http.transport import Envelope, HeadLimits
from jaxrank.server.inference import dialect_of
from jaxrank.server.media.fetch import MediaAccess
from jaxrank.server.observe.metrics import CONTENT_TYPE
from jaxrank.server.observe.tracing import Tracing
from jaxrank.server.served_model import ServedModel
from jaxrank.server.service import Service
from jaxrank.server.settings import Settings, encode_threads_for, usable_cores
from jaxrank.text.windows import splits
from jaxrank.version import __version__

log = logging.getLogger(__name__)


def create_app(
    reranker: ServedModel,
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
    encode_threads: int | None = None,
    media: MediaAccess | None = None,
    limits: Limits | None = None,
    media_workers: int = 2,
    access_log: bool = True,
    otlp_endpoint: str | None = None,
    on_ready: Callable[[], None] = lambda: None,
    on_failure: Callable[[BaseException], None] = lambda error: None,
) -> FastAPI:
    """Return the application that serves `reranker`.

    Args:
        reranker: The model.
        served_model_name: The name that the routes give the model. By default it is the model's own name.
        api_keys: If there are any, every route needs one of them, except the page at /, /health and /ready. /metrics
            needs one too, unless open_metrics is set.
        open_metrics: Whether /metrics needs no key.
        cors_origins: The web pages whose browsers may send requests. See access.cross_origin.
        dialect: The dialect of requests that do not name theirs. It is a name in dialects.resolve.DIALECTS, or "auto"
            to choose it by path and body.
        truncate: Whether pairs that are too long are cut, if a request does not say. Otherwise they are refused.
        long_document: "truncate" or "window": how documents that do not fit are handled, if a request does not say. See
            Reranker.encode.
        max_documents: Most documents in one request.
        max_windows: Most windows in one request, counted over all documents that do not fit.
        max_body_bytes: Most bytes in the body of one request. The default is 8 MB, or 40 MB for a model that sees,
            since images may be part of the request.
        max_headers: Most headers in one request.
        max_header_bytes: Most bytes of the address and the headers of one request.
        max_queue_tokens: If so many tokens wait, requests are answered 429 or 503. The dialect decides which.
        max_queue_requests: The same, in requests.
        max_queue_bytes: The same, in bytes of the requests' bodies.
        max_queue_s: The same, in seconds that the waiting work takes at the speed of the last batches.
        batch_rows: The number of usual rows that are chosen together. With more rows, they are packed tighter. With
            fewer, a new request waits less.
        body_timeout_s: Most seconds until a body has arrived.
        request_timeout_s: Most seconds from there to the answer. A request that is not scored by then is answered 504.
        fail_after: After so many failed batches in a row, the server says that it is not ready.
        probe_s: Seconds between the server's own attempts to score, while it is failing.
        inline_bytes: Bodies up to this size are tokenised on the event loop, where a switch to a thread would cost
            more.
        encode_threads: The number of threads that tokenise the other bodies. By default encode_threads_for decides.
        media: Where the images and videos of a model that sees may come from.
        limits: What is refused of those images and videos.
        media_workers: The number of processes that decode them.
        access_log: Whether the logger jaxrank.access gets one line a request.
        otlp_endpoint: Where traces are sent. See tracing.Tracing.
        on_ready: Called on another thread when the warm-up is over.
        on_failure: Called on another thread when the warm-up failed, or when scoring stopped for good.

    Returns:
        The application.

    Raises:
        RequestError: A setting is not valid.
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
        encode_threads=encode_threads_for(usable_cores()) if encode_threads is None else encode_threads,
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
        openapi_url=None,  # the routes below serve both, and they need a key
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # a redirect would use the Host header, which the client chooses
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
    app.include_router(_guarded_routes(service))
    app.include_router(_documentation_routes(app, service, access))
    app.include_router(_metrics_route(service, open_metrics))
    return app


def _open_routes(service: Service) -> APIRouter:
    """Return the routes that need no key."""
    router = APIRouter(tags=["state"])

    @router.get("/health", response_model=docs.Health, responses=docs.unavailable(docs.Health), openapi_extra=docs.OPEN)
    @open_to_all
    async def health() -> Response:
        """Whether the process is alive; 503 if it needs a restart: scoring has stopped, or has failed for a minute."""
        answer, well = service.health()
        return json_response(answer, 200 if well else 503)

    ready_503 = docs.unavailable(docs.Ready, retry=True)

    @router.get("/ready", response_model=docs.Ready, responses=ready_503, openapi_extra=docs.OPEN)
    @open_to_all
    async def ready() -> Response:
        """Whether the model is warm and takes requests; a full queue does not make it unready."""
        state = service.state()
        return json_response(state) if state["ready"] else json_response(state, 503, {"Retry-After": "5"})

    return router


def _metrics_route(service: Service, open_metrics: bool) -> APIRouter:
    """Return the route for Prometheus. It needs a key unless open_metrics is set."""
    router = APIRouter(tags=["state"])

    async def metrics() -> Response:
        """Counters in Prometheus' text format."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)

    endpoint = open_to_all(metrics) if open_metrics else metrics
    more = docs.OPEN if open_metrics else None
    router.add_api_route("/metrics", endpoint, methods=["GET"], response_class=PlainTextResponse, openapi_extra=more)
    return router


def _guarded_routes(service: Service) -> APIRouter:
    """Return the routes that need a key, if the server has keys."""
    router = APIRouter()
    about = facts.Facts(service.reranker, service.settings, service.started)

    async def rerank(request: Request) -> Response:
        return await service.inference.rerank(request)

    async def score(request: Request) -> Response:
        return await service.inference.score(request)

    # These routes read their bodies by hand, so docs describes them by hand.
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
        """The one model of this server, in the form of OpenAI's list."""
        return json_response(about.models())

    @router.get("/models", response_model=facts.InfinityModels, tags=["state"])
    async def infinity_models() -> Response:
        """The same list with the state of the queue, in the form of Infinity's list."""
        return json_response(about.infinity_models(service.scheduler.requests))

    @router.get("/info", response_model=facts.Info, tags=["state"])
    async def info() -> Response:
        """The model and the limits of this server, in the form of TEI's answer."""
        return json_response(about.info())

    @router.get("/version", response_model=facts.Version, tags=["state"])
    async def version() -> Response:
        """The version of jaxrank."""
        return json_response({"version": __version__})

    async def ping() -> Response:
        """An empty answer that needs a key; /health and /ready say more and need none."""
        return Response()

    # There is one route for both methods, so that a 405 names both. The documentation has one operation a method.
    router.add_api_route("/ping", ping, methods=["GET", "POST"], include_in_schema=False)

    return router


def _documentation_routes(app: FastAPI, service: Service, access: Access) -> APIRouter:
    """Return /docs and /openapi.json, which need a key, if the server has keys."""
    router = APIRouter()
    documents: dict[Dialect | None, bytes] = {}

    @router.get("/openapi.json", include_in_schema=False)
    async def openapi(request: Request) -> Response:
        dialect: Dialect | None = getattr(request.state, "named_dialect", None)
        if dialect not in documents:  # this is slow, so it runs once and not on the event loop
            describe = partial(docs.describe, app, dialect, service.inference.terms, guarded=access.guarded)
            documents[dialect] = to_json(await asyncio.to_thread(describe))
        return Response(documents[dialect], media_type="application/json")

    @router.get("/docs", include_in_schema=False)
    async def swagger() -> Response:
        return get_swagger_ui_html(openapi_url="openapi.json", title="jaxrank")

    return router


async def _refused(request: Request, error: Exception) -> Response:
    """Answer with the refusal, in the dialect of the request."""
    refusal = cast(Refusal, error)
    request.app.state.service.metrics.refusal(type(refusal).__name__)
    if isinstance(refusal, ScoringFailed):  # the log says what exactly failed, under the id
        identity = request.state.request_id
        log.error("request %s: %s", identity, refusal, extra={"fields": {"request_id": identity}})
        refusal = internal(identity, ScoringFailed)
    return (await dialect_of(request)).refusal(refusal)


async def _http_error(request: Request, error: Exception) -> Response:
    """Answer an error that the framework itself raised, with the server's own message."""
    http = cast(HTTPException, error)
    refusals = {
        404: NotFound("There is no such route. GET /docs lists the routes."),
        405: MethodNotAllowed(
            "This route does not take that method. The Allow header names those that it takes.", headers=http.headers
        ),
    }
    return await _refused(request, refusals.get(http.status_code, BadRequest("The request is malformed.")))
