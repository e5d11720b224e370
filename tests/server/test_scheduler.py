"""Requests scored together: batching, order, overload, cancelling, failures, the end. Over HTTP where it shows."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest

from jaxrank.server.errors import Closing, Overloaded, ScoringFailed
from jaxrank.server.scheduler import Scheduler, smoothed
from jaxrank.types import Encoded
from tests.server.fakes import FakeReranker, one_call, rerank, serving, until


def body(*documents: str) -> dict[str, Any]:
    return {"query": "q", "documents": documents}


def queued(base: str) -> tuple[int, int]:
    state = httpx.get(base + "/ready").json()
    return state["queued_requests"], state["queued_tokens"]


class TestOverHttp:
    def test_clients_share_batches(self) -> None:
        fake = FakeReranker(row_tokens=1000)
        with serving(fake) as base, ThreadPoolExecutor(33) as pool:
            fake.gate.clear()
            first = pool.submit(rerank, base, body("x"))
            assert fake.waiting.wait(5)
            others = [pool.submit(rerank, base, body(f"{i} apples", f"{i + 0.5} pears")) for i in range(32)]
            until(lambda: queued(base)[0] == 33)
            fake.gate.set()
            for i, future in enumerate(others):
                assert [result["score"] for result in future.result().json()] == [i + 0.5, i]
            assert first.result().status_code == 200
        assert len(fake.batches) == 2
        assert len(fake.batches[1]) == 64

    def test_one_document_overtakes_a_thousand(self) -> None:
        fake = FakeReranker(row_tokens=100, delay_s=0.002)
        with serving(fake) as base, ThreadPoolExecutor(2) as pool:
            fake.gate.clear()
            large = pool.submit(rerank, base, body(*["x" * 10] * 1000))
            assert fake.waiting.wait(5)
            small = pool.submit(rerank, base, body("5 apples"))
            until(lambda: queued(base)[0] == 2)
            fake.gate.set()
            assert small.result().json()[0]["score"] == 5
            assert not large.done()
            assert len(fake.batches) < 20
            assert len(large.result().json()) == 1000
        # nothing was lost or scored twice, and rows were full
        assert sum(map(len, fake.batches)) == 1001
        assert len(fake.batches) <= 102

    @pytest.mark.parametrize("limit", [{"max_queue_requests": 2}, {"max_queue_tokens": 20}])
    def test_overload(self, limit: dict[str, Any]) -> None:
        fake = FakeReranker()
        with serving(fake, **limit) as base, ThreadPoolExecutor(2) as pool:
            fake.gate.clear()
            accepted = [pool.submit(rerank, base, body("1 apple and"))]
            assert fake.waiting.wait(5)
            accepted.append(pool.submit(rerank, base, body("2 apples and")))
            until(lambda: queued(base) == (2, 23))
            response = rerank(base, body("3"))
            assert response.status_code == 503
            assert 1 <= int(response.headers["retry-after"]) <= 60
            assert response.json()["message"].startswith("The request queue is full.")
            assert httpx.get(base + "/ready").status_code == 200
            assert httpx.get(base + "/health").status_code == 200
            fake.gate.set()
            assert [future.result().status_code for future in accepted] == [200, 200]
            assert queued(base) == (0, 0)
            assert rerank(base, body("3")).status_code == 200

    def test_the_estimate_of_speed(self) -> None:
        assert smoothed(0.0, 70.0) == 70.0  # the first batch's
        assert 85 < smoothed(100.0, 50.0) < 100 < smoothed(100.0, 150.0) < 105
        rate, fast = 100.0, 0
        for batch in range(1000):  # batches of 80 and 120 in turn: the estimate stays below their mean
            rate = smoothed(rate, 120.0 if batch % 2 else 80.0)
            fast += rate > 100
        assert fast < 10
        assert 80 < rate < 95

    def test_overload_by_seconds(self) -> None:
        fake = FakeReranker(row_tokens=50, delay_s=0.02)  # at most 2,500 tokens a second
        with serving(fake, max_queue_s=1.0) as base, ThreadPoolExecutor(2) as pool:
            assert (
                rerank(base, body(*["x" * 10] * 400)).status_code == 200
            )  # nothing is refused before a speed is known
            fake.gate.clear()
            fake.waiting.clear()
            held = pool.submit(rerank, base, body(*["x" * 10] * 5))
            assert fake.waiting.wait(5)
            more = pool.submit(rerank, base, body(*["x" * 10] * 400))  # a request is judged by the queue that it finds
            until(lambda: queued(base) == (2, 4050))
            response = rerank(base, body("3"))
            assert response.status_code == 503
            assert 1 <= int(response.headers["retry-after"]) <= 60
            assert response.json()["message"].startswith("The request queue is full.")
            fake.gate.set()
            assert (held.result().status_code, more.result().status_code) == (200, 200)
            assert rerank(base, body("3")).status_code == 200

    @pytest.mark.parametrize("half_close", [False, True])
    def test_a_client_that_leaves_is_dropped(self, half_close: bool) -> None:
        fake = FakeReranker(row_tokens=100)
        with serving(fake) as base:
            fake.gate.clear()
            content = b'{"query": "q", "documents": [' + b",".join([b'"xxxxxxxxxx"'] * 500) + b"]}"
            host, port = base.removeprefix("http://").split(":")
            with socket.create_connection((host, int(port))) as client:
                client.sendall(
                    b"POST /v1/rerank HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                    b"Content-Length: %d\r\n\r\n%b" % (len(content), content)
                )
                assert fake.waiting.wait(5)
                until(lambda: queued(base) == (1, 5000))
                if half_close:
                    client.shutdown(socket.SHUT_WR)
                    until(lambda: queued(base)[0] == 0)
            until(lambda: queued(base) == (0, 100))  # what the device already has
            fake.gate.set()
            until(lambda: queued(base) == (0, 0))
            assert rerank(base, body("1")).status_code == 200
        assert [len(batch) for batch in fake.batches] == [10, 1]

    def test_a_failing_batch_fails_only_its_requests(self) -> None:
        fake = FakeReranker(row_tokens=50)
        with serving(fake) as base, ThreadPoolExecutor(4) as pool:
            fake.gate.clear()
            bodies = [body("x" * 50), body("boom" * 11, *["x" * 40] * 100), body("3 " + "x" * 40), body("nan x", "1 x")]
            futures: list[Future[httpx.Response]] = []
            for at, content in enumerate(bodies):
                futures.append(pool.submit(rerank, base, content))
                until(lambda at=at: queued(base)[0] == at + 1)
            fake.gate.set()
            answers = [future.result() for future in futures]
            assert [answer.status_code for answer in answers] == [200, 500, 200, 500]
            for failed in (answers[1], answers[3]):
                assert failed.json()["type"] == "InternalServerError"
                assert failed.headers["x-request-id"] in failed.json()["message"]
            until(lambda: queued(base) == (0, 0))
            assert rerank(base, body("1")).json()[0]["score"] == 1
        assert sum(map(len, fake.batches)) < 20  # the rest of the failed request was not scored

    def test_infinities_fail(self) -> None:
        with serving(FakeReranker()) as base:
            assert rerank(base, body("inf x")).status_code == 500
            assert rerank(base, body("-inf x")).status_code == 500
            assert rerank(base, body("3e38 x")).status_code == 200

    def test_shutdown_finishes_what_was_accepted(self) -> None:
        fake = FakeReranker(row_tokens=100)
        with ThreadPoolExecutor(8) as pool:
            with serving(fake) as base:
                fake.gate.clear()
                futures = [pool.submit(rerank, base, body(*["x" * 10] * 50)) for _ in range(8)]
                until(lambda: queued(base)[0] == 8)
                threading.Timer(0.3, fake.gate.set).start()  # well after the shutdown has begun
            assert [future.result().status_code for future in futures] == [200] * 8


def pairs(*lengths: int) -> list[Encoded]:
    return [Encoded(np.full(length, length, np.int32)) for length in lengths]


@contextlib.asynccontextmanager
async def running(score: Any, batch_tokens: int = 100, max_requests: int = 100) -> AsyncIterator[Scheduler]:
    scheduler = Scheduler(one_call(score), batch_tokens=batch_tokens, max_tokens=10**6, max_requests=max_requests)
    scheduler.start()
    try:
        yield scheduler
    finally:
        await scheduler.close()


def by_length(encoded: Sequence[Encoded]) -> np.ndarray:
    return np.array([len(pair) for pair in encoded], np.float32)


class TestScheduler:
    def test_results_are_in_the_order_of_the_request(self) -> None:
        async def main() -> None:
            async with running(by_length) as scheduler:
                generator = np.random.default_rng(0)
                requests = [generator.integers(1, 300, generator.integers(1, 40)).tolist() for _ in range(100)]
                answers = await asyncio.gather(*[scheduler.submit(pairs(*lengths)) for lengths in requests])
                for lengths, logits in zip(requests, answers, strict=True):
                    assert logits.tolist() == lengths
                assert scheduler.tokens == 0
                assert (await scheduler.submit([])).shape == (0,)

        asyncio.run(main())

    def test_batches_are_full_and_longer_pairs_go_alone(self) -> None:
        batches: list[list[int]] = []

        def score(encoded: Sequence[Encoded]) -> np.ndarray:
            batches.append([len(pair) for pair in encoded])
            return by_length(encoded)

        async def main() -> None:
            async with running(score) as scheduler:
                await scheduler.submit(pairs(60, 250, 40, 30, 30, 60, 10, 70))

        asyncio.run(main())
        assert batches == [[250], [70, 30], [60, 40], [60, 30, 10]]

    def test_a_shared_prefix_counts_once_a_batch_and_request(self) -> None:
        batches: list[list[tuple[int, int]]] = []

        def score(encoded: Sequence[Encoded]) -> np.ndarray:
            batches.append([(len(pair.prefix), len(pair.tokens)) for pair in encoded])
            return by_length(encoded)

        def star(prefix: int, *lengths: int) -> list[Encoded]:
            shared = np.zeros(prefix, np.int32)
            return [Encoded(np.zeros(length, np.int32), prefix=shared) for length in lengths]

        async def main() -> None:
            async with running(score) as scheduler:
                await scheduler.submit(star(40, 20, 20, 20, 20, 20, 90))
                await asyncio.gather(scheduler.submit(star(10, 5)), scheduler.submit(star(60, 15, 10, 5)))
                assert scheduler.tokens == 0

        asyncio.run(main())
        assert batches[:3] == [[(40, 90)], [(40, 20)] * 3, [(40, 20)] * 2], "130 tokens, 40 + 3 * 20, 40 + 2 * 20"
        # however the two requests fell together, no batch computes more than 100 tokens
        rest = [pair for batch in batches[3:] for pair in batch]
        assert sorted(rest) == [(10, 5), (60, 5), (60, 10), (60, 15)]
        for batch in batches[3:]:
            assert sum({prefix for prefix, _ in batch}) + sum(own for _, own in batch) <= 100

    def test_a_stream_of_small_requests_does_not_starve_a_large_one(self) -> None:
        served = 0

        async def main() -> None:
            nonlocal served
            async with running(by_length) as scheduler:
                large = asyncio.create_task(scheduler.submit(pairs(*[50] * 40)))
                while not large.done():
                    await asyncio.gather(*[scheduler.submit(pairs(50)) for _ in range(8)])
                    served += 8
                assert len(await large) == 40

        asyncio.run(main())
        assert served < 200

    def test_wrong_shapes_are_failures(self) -> None:
        async def main() -> None:
            async with running(lambda encoded: np.zeros(len(encoded) + 1, np.float32)) as scheduler:
                with pytest.raises(ScoringFailed):
                    await scheduler.submit(pairs(1, 2))

        asyncio.run(main())

    def test_the_thread_dying_fails_everything_and_is_told(self) -> None:
        def score(encoded: Sequence[Encoded]) -> np.ndarray:
            raise SystemExit

        async def main() -> None:
            told: list[BaseException] = []
            scheduler = Scheduler(
                one_call(score), batch_tokens=10, max_tokens=100, max_requests=9, on_failure=told.append
            )
            scheduler.start()
            answers = await asyncio.gather(*[scheduler.submit(pairs(5, 6)) for _ in range(5)], return_exceptions=True)
            assert [type(answer) for answer in answers] == [ScoringFailed] * 5
            assert [type(error) for error in told] == [SystemExit]
            with pytest.raises(ScoringFailed), scheduler.admit():
                pass
            await scheduler.close()

        asyncio.run(main())

    def test_admission(self) -> None:
        async def main() -> None:
            async with running(by_length, max_requests=1) as scheduler:
                with scheduler.admit(), pytest.raises(Overloaded, match="queue is full"), scheduler.admit():
                    pass
                with scheduler.admit():
                    # closing waits for those who are in, and lets no one else in
                    end = asyncio.create_task(scheduler.close())
                    await asyncio.sleep(0.01)
                    with pytest.raises(Closing), scheduler.admit():
                        pass
                    assert (await scheduler.submit(pairs(3))).tolist() == [3]
                await end

        asyncio.run(main())
