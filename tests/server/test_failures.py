"""When the device fails: who is answered what, what GET /ready and /health say, and how it becomes well again."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest

from jaxrank.server import service
from jaxrank.server.errors import ScoringFailed
from jaxrank.server.scheduler import BatchReport, Scheduler
from jaxrank.types import Encoded
from tests.server.fakes import FakeReranker, one_call, rerank, serving, until


def body(*documents: str) -> dict[str, Any]:
    return {"query": "q", "documents": documents}


class Device:
    """Scores pairs as their first token. full: the most tokens that it can take. bad: a token that fails a call."""

    def __init__(self, full: int = 10**9, bad: int = -1) -> None:
        self.full = full
        self.bad = bad
        self.calls: list[list[int]] = []
        self.hold = threading.Event()
        self.hold.set()

    def __call__(self, pairs: Sequence[Encoded]) -> np.ndarray:
        assert self.hold.wait(10)
        self.calls.append([len(pair) for pair in pairs])
        if sum(self.calls[-1]) > self.full or any(pair.tokens[0] == self.bad for pair in pairs):
            raise MemoryError("the device is full")
        return np.array([pair.tokens[0] for pair in pairs], np.float32)


def pairs(*tokens: int, length: int = 10) -> list[Encoded]:
    return [Encoded(np.full(length, token, np.int32)) for token in tokens]


def together(
    device: Device,
    *requests: list[Encoded],
    then: Callable[[Scheduler], None] = lambda scheduler: None,
    **settings: Any,
) -> list[Any]:
    """What the requests get when they are all there before the first batch is formed."""

    async def main() -> list[Any]:
        scheduler = Scheduler(
            one_call(device), batch_tokens=100, max_tokens=10**6, max_requests=100, prepare=lambda: None, **settings
        )
        device.hold.clear()
        scheduler.start()
        blocker = asyncio.create_task(scheduler.submit(pairs(0)))
        await asyncio.sleep(0.05)
        tasks = [asyncio.create_task(scheduler.submit(request)) for request in requests]
        await asyncio.sleep(0.05)
        device.hold.set()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        await blocker
        assert scheduler.tokens == 0
        then(scheduler)
        await scheduler.close()
        return [answer if isinstance(answer, BaseException) else answer.tolist() for answer in answers]

    return asyncio.run(main())


class TestHalves:
    def test_what_is_too_much_at_once_is_scored_in_halves(self) -> None:
        device = Device(full=60)
        reports: list[BatchReport] = []
        answers = together(device, pairs(1, 2, 3, 4), pairs(5, 6, 7, 8, 9, 10), on_batch=reports.append)
        assert answers == [[1, 2, 3, 4], [5, 6, 7, 8, 9, 10]]
        assert [len(call) for call in device.calls] == [1, 10, 5, 5]
        assert [(report.pairs, report.tokens, report.fill, report.failed_pairs) for report in reports] == [
            (1, 10, 0.1, 0), (10, 100, 1.0, 0),
        ]  # fmt: skip

    def test_the_half_that_fails_again_fails_its_requests_alone(self) -> None:
        device = Device(bad=13)
        reports: list[BatchReport] = []
        first, second, third = together(
            device, pairs(1, 2, 3, 4), pairs(5, 13), pairs(7, 8, 9, 10), on_batch=reports.append
        )
        # deadlines order the requests by size: 5 13 | 1 2 3 in the first half, 4 7 8 9 10 in the second
        assert isinstance(second, ScoringFailed)
        assert isinstance(first, ScoringFailed), "it shared the half"
        assert third == [7, 8, 9, 10]
        assert [len(call) for call in device.calls] == [1, 10, 5, 5], "halved once, not again"
        assert reports[-1].failed_pairs == 5

    def test_halves_are_of_tokens(self) -> None:
        device = Device(full=60)
        answers = together(device, pairs(1, length=50) + pairs(2, 3, 4, 5, 6))
        assert answers == [[1, 2, 3, 4, 5, 6]]
        assert device.calls[1:] == [[50, 10, 10, 10, 10, 10], [50], [10] * 5]

    def test_a_single_pair_is_not_tried_again(self) -> None:
        device = Device(bad=13)
        (answer,) = together(device, pairs(13, length=200))
        assert isinstance(answer, ScoringFailed)
        assert device.calls == [[10], [200]]

    def test_the_rest_of_a_failed_request_is_not_scored(self) -> None:
        device = Device(bad=13)
        answer, other = together(device, pairs(*range(50, 90), 13), pairs(*range(10)))
        assert isinstance(answer, ScoringFailed)
        assert [len(call) for call in device.calls] == [1, 10, 10, 5, 5], "of 41 pairs"
        assert other == list(range(10))

    def test_only_batches_of_which_nothing_is_scored_count(self) -> None:
        def failing(scheduler: Scheduler) -> None:
            assert (scheduler.failures, scheduler.failing) == (0, False)

        together(Device(bad=13), *[pairs(13, 1, 2, 3, 4, 5, 6, 7, 8, 9) for _ in range(5)], then=failing, fail_after=1)


class Broken(FakeReranker):
    """Fails whatever it is asked while `broken` is set."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.broken = False
        self.tried = 0

    def score_encoded(self, encoded: Sequence[Encoded]) -> np.ndarray:
        if self.broken:
            self.tried += 1
            raise RuntimeError("the device is gone")
        return super().score_encoded(encoded)


class TestReadiness:
    def test_red_after_failures_in_a_row_and_green_again_by_itself(self, caplog: pytest.LogCaptureFixture) -> None:
        fake = Broken()
        with serving(fake, fail_after=3, probe_s=0.05) as base:
            fake.broken = True
            for _ in range(2):
                assert rerank(base, body("1")).status_code == 500
            assert httpx.get(base + "/ready").status_code == 200
            assert rerank(base, body("1")).status_code == 500
            until(lambda: httpx.get(base + "/ready").status_code == 503)
            assert httpx.get(base + "/ready").json()["state"] == "failing"
            health = httpx.get(base + "/health")
            assert (health.status_code, health.json()["status"]) == (200, "failing")
            assert "Nothing could be scored" in health.json()["reason"]
            assert "jaxrank_ready 0.0" in httpx.get(base + "/metrics").text
            tried = fake.tried
            until(lambda: fake.tried > tried + 2)  # with nobody asking
            fake.broken = False
            until(lambda: httpx.get(base + "/ready").status_code == 200)
            assert httpx.get(base + "/health").json() == {"status": "alive"}
            assert rerank(base, body("1")).status_code == 200
        assert "scoring works again" in caplog.text

    def test_a_success_between_failures_keeps_it_green(self) -> None:
        with serving(FakeReranker(), fail_after=2) as base:
            for document in ("boom", "1", "boom", "1", "boom"):
                rerank(base, body(document))
            assert httpx.get(base + "/ready").status_code == 200

    def test_a_success_of_a_request_makes_it_green_too(self) -> None:
        fake = Broken()
        with serving(fake, fail_after=1, probe_s=60) as base:
            fake.broken = True
            rerank(base, body("1"))
            until(lambda: httpx.get(base + "/ready").status_code == 503)
            fake.broken = False
            assert rerank(base, body("1")).status_code == 200
            until(lambda: httpx.get(base + "/ready").status_code == 200)

    def test_health_is_red_when_it_lasts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(service, "FAILING_FOR_LONG_S", 0.2)
        fake = Broken()
        with serving(fake, fail_after=1, probe_s=0.05) as base:
            fake.broken = True
            rerank(base, body("1"))
            until(lambda: httpx.get(base + "/health").status_code == 503)
            fake.broken = False
            until(lambda: httpx.get(base + "/health").status_code == 200)

    def test_a_failing_server_stops_in_peace(self) -> None:
        fake = Broken()
        with ThreadPoolExecutor() as pool, serving(fake, fail_after=1, probe_s=0.01) as base:
            fake.broken = True
            answers = list(pool.map(lambda _: rerank(base, body("1")), range(8)))
            assert {answer.status_code for answer in answers} == {500}
