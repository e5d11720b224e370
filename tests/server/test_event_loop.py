"""The event loop serves everybody: nothing long may run on it, however large requests are."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from jaxrank.reranker import Reranker
from jaxrank.server import create_app
from jaxrank.server.http.connections import Config, Server
from jaxrank.server.serve import forget_garbage
from jaxrank.text import tokenizer as tokens
from tests.checkpoints import TEXT, make_bge
from tests.server.fakes import FakeReranker, serving


@contextlib.contextmanager
def garbage_forgotten() -> Iterator[None]:
    """As jaxrank.server.serve does once the model is warm: collections would count what other tests left behind."""
    forget_garbage()
    try:
        yield
    finally:
        gc.unfreeze()


async def busiest(reranker: Any, bodies: list[bytes]) -> tuple[float, list[int]]:
    """The longest stretch of the event loop's own processor time while it answers the bodies, in seconds; the statuses.

    Processor time, not wall time: other processes on the machine take nothing from it.
    """
    server = Server(Config(create_app(reranker, batch_rows=1)))
    worst = 0.0

    async def tick() -> None:
        nonlocal worst
        before = time.thread_time()
        while True:
            await asyncio.sleep(0.001)
            now = time.thread_time()
            worst, before = max(worst, now - before), now

    def send(url: str, body: bytes) -> int:
        return httpx.post(url, content=body, headers={"Content-Type": "application/json"}, timeout=60).status_code

    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = "http://{}:{}".format(*listener.getsockname())
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        async with httpx.AsyncClient() as client:
            while not server.started or (await client.get(url + "/ready")).status_code != 200:
                await asyncio.sleep(0.05)
        ticking = asyncio.create_task(tick())
        statuses = await asyncio.gather(*[asyncio.to_thread(send, url + "/v1/rerank", body) for body in bodies])
        ticking.cancel()
        server.should_exit = True
        await serving
    return worst, statuses


def test_large_and_hostile_bodies() -> None:
    fake = FakeReranker(row_tokens=10**6)
    long = json.dumps({"query": "q", "documents": ["long and boring " * 480] * 1000}).encode()
    assert len(long) > 7_000_000
    escaped = json.dumps({"query": "q", "documents": ['äöü\\"\n' * 200] * 1000}).encode()
    many = json.dumps({"query": "q", "documents": ["1"], "x": [[]] * 1_900_000}).encode()
    broken = long[:-2]
    with garbage_forgotten():
        worst, statuses = asyncio.run(
            busiest(fake, [long, escaped, many, broken, *[b'{"query": "q", "documents": ["1"]}'] * 20])
        )
    assert statuses == [200, 200, 413, 400] + [200] * 20
    assert worst < 0.05


def test_stalls_are_measured() -> None:
    """An event loop that stands still shows in the metrics."""

    class Slow(FakeReranker):
        def encode(self, *args: Any, **kwargs: Any) -> Any:
            time.sleep(0.3)  # on the event loop, since the body is small
            return super().encode(*args, **kwargs)

    with serving(Slow()) as base:
        httpx.post(base + "/v1/rerank", json={"query": "q", "documents": ["1"]})
        text = httpx.get(base + "/metrics").text
    counts = {
        bound: float(text.partition(f'jaxrank_event_loop_stall_seconds_bucket{{le="{bound}"}} ')[2].split()[0])
        for bound in ("0.2", "+Inf")
    }
    assert counts["+Inf"] - counts["0.2"] >= 1


def test_tokenising_in_runs_changes_nothing(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    reranker = Reranker.from_pretrained(make_bge(tmp_path), dtype="float32", compile_cache=None)
    documents = [text[: 7 * i] for i, text in enumerate(TEXT * 3)] + ["", "x" * 20_000]
    whole = reranker.encode("a query", documents)
    calls: list[int] = []
    inner = reranker.tokenizer.tokenizer

    class Counting:
        def encode_batch_fast(self, texts: list[str], **options: Any) -> Any:
            calls.append(sum(map(len, texts)))
            return inner.encode_batch_fast(texts, **options)

        def encode(self, *args: Any, **options: Any) -> Any:
            return inner.encode(*args, **options)

    monkeypatch.setattr(tokens, "RUN_CHARACTERS", 100)
    monkeypatch.setattr(reranker.tokenizer, "tokenizer", Counting())
    in_runs = reranker.encode("a query", documents)
    assert [pair.tokens.tolist() for pair in in_runs] == [pair.tokens.tolist() for pair in whole]
    assert len(calls) > 3
