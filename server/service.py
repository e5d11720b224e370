"""The objects that the routes share while the application runs. They start and end with the application."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import FastAPI

from jaxrank.media.decoding import Decoder
from jaxrank.server.http.gate import Gate
from jaxrank.server.inference import Inference
from jaxrank.server.media.fetch import Fetcher
from jaxrank.server.media.loading import MediaLoader
from jaxrank.server.observe.metrics import Metrics
from jaxrank.server.observe.tracing import Tracing
from jaxrank.server.scheduler import Scheduler
from jaxrank.server.served_model import ServedModel
from jaxrank.server.settings import Settings
from jaxrank.text.tokenizer import NO_CUT
from jaxrank.types import Encoded

PATIENCE_S = 5.0
"""Seconds to wait for the device when no request waits for it any more."""

FAILING_FOR_LONG_S = 60.0

log = logging.getLogger(__name__)


class Service:
    """The objects that the routes share while the application runs: the model, the queue, the tokenising threads.

    Args:
        reranker: The model.
        settings: The application's settings.
        tracing: Where requests are traced. None for no traces.
    """

    def __init__(self, reranker: ServedModel, settings: Settings, tracing: Tracing | None = None) -> None:
        self.reranker = reranker
        self.settings = settings
        self.tracing = tracing
        self.metrics = Metrics()
        self.started = int(time.time())
        self.progress = ""

    @contextlib.asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """Start the device thread, which warms up first. At the end, finish the accepted requests."""
        settings = self.settings
        self.threads = ThreadPoolExecutor(settings.encode_threads, thread_name_prefix="jaxrank-encode")
        self.scheduler = Scheduler(
            self.reranker.calls,
            ahead=self.reranker.ahead,
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
        """Yield the loader of images and videos, or None for a model that takes text only."""
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
        """Return the pairs that are scored to test whether scoring works again."""
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
        """Note the progress of the warm-up. A shutdown can stop the warm-up only here."""
        if self.scheduler.stopping:
            raise InterruptedError("the server is shutting down")
        self.progress = text
        log.info("warming up: %s", text)

    def _failed(self, error: BaseException) -> None:
        log.error("scoring has stopped for good", exc_info=error)
        self.settings.on_failure(error)

    def health(self) -> tuple[dict[str, Any], bool]:
        """Return the answer of GET /health, and whether the server can go on."""
        scheduler = self.scheduler
        if scheduler.failed and not scheduler.stopping:
            return {"status": "failed", "reason": "Scoring has stopped for good. Restart the server."}, False
        if scheduler.failing:
            for_long = time.monotonic() - scheduler.failing_since > FAILING_FOR_LONG_S
            reason = f"Nothing could be scored in the last {scheduler.failures} batches; the log tells why."
            return {"status": "failing", "reason": reason}, not for_long
        return {"status": "alive"}, True

    def state(self) -> dict[str, Any]:
        """Return the answer of GET /ready."""
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
