"""Two batches under way: what the device has in hand at every moment, and who is told what when one of them fails."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxrank.reranker import Reranker
from jaxrank.runtime.calls import Call, Fetch, Scored, has_room
from jaxrank.server.errors import ScoringFailed
from jaxrank.server.scheduler import BatchReport, Scheduler
from jaxrank.types import Encoded, Media
from tests.checkpoints import TEXT, make_bge
from tests.server.fakes import until

ROW = 100


class Device:
    """Works by itself: a row runs when it has been handed over, and ends when the test says so.

    Rows hold pairs of up to ROW tokens in all, by their first tokens, and their lengths are tens; a pair's logit is its
    first token. log: "plan", "run" and "fetch" with the first tokens of the pairs in question. memory: tokens under way
    from which on a row fails, at its end. bad: what fails, in words of the log, as often as it stands there.
    """

    def __init__(self, *, memory: int = 10**9, bad: Sequence[tuple[str, int]] = (), error: Any = RuntimeError) -> None:
        self.memory = memory
        self.bad = list(bad)
        self.error = error
        self.log: list[tuple[str, list[int]]] = []
        self.under_way = 0
        self._ends = threading.Semaphore(0)

    def end(self, rows: int = 1) -> None:
        self._ends.release(rows)

    def calls(self, pairs: Sequence[Encoded]) -> Iterator[Call]:
        left = sorted(range(len(pairs)), key=lambda i: pairs[i].tokens[0])
        self._note("plan", left, pairs)
        while left:
            count = 1
            while count < len(left) and sum(len(pairs[i]) for i in left[: count + 1]) <= ROW:
                count += 1
            row, left = left[:count], left[count:]
            tokens = -(-sum(len(pairs[i]) for i in row) // 10) * 10
            yield Call(tokens, partial(self._run, row, tokens, pairs))

    def _note(self, what: str, row: Sequence[int], pairs: Sequence[Encoded]) -> None:
        names = [int(pairs[i].tokens[0]) for i in row]
        self.log.append((what, names))
        for name in names:
            if (what, name) in self.bad:
                self.bad.remove((what, name))
                raise self.error(f"{what} {name}")

    def _run(self, row: list[int], tokens: int, pairs: Sequence[Encoded]) -> Fetch:
        self._note("run", row, pairs)
        self.under_way += tokens
        full = self.under_way > self.memory

        def fetch() -> list[Scored]:
            assert self._ends.acquire(timeout=10)
            self.under_way -= tokens
            self._note("fetch", row, pairs)
            if full:
                raise MemoryError("the device is full")
            return [(row, np.array([pairs[i].tokens[0] for i in row], np.float32))]

        return fetch


def pairs(*names: int, length: int = ROW) -> list[Encoded]:
    return [Encoded(np.full(length, name, np.int32)) for name in names]


async def seen(condition: Callable[[], object]) -> None:
    await asyncio.to_thread(until, condition)


@asynccontextmanager
async def running(device: Device, ahead: int = ROW, **settings: Any) -> AsyncIterator[Scheduler]:
    scheduler = Scheduler(
        device.calls, ahead=ahead, batch_tokens=2 * ROW, max_tokens=10**6, max_requests=100, **settings
    )
    scheduler.start()
    try:
        yield scheduler
    finally:
        device.end(1000)
        await scheduler.close()


async def queue(scheduler: Scheduler, device: Device, *requests: list[Encoded]) -> list[asyncio.Task[np.ndarray]]:
    """The requests, of which the first is a batch alone: all others are there before a further one is chosen."""
    tasks = [asyncio.create_task(scheduler.submit(requests[0]))]
    await seen(lambda: any(what == "run" for what, _ in device.log))
    tasks += [asyncio.create_task(scheduler.submit(request)) for request in requests[1:]]
    await asyncio.sleep(0.02)
    return tasks


def of(log: Sequence[tuple[str, list[int]]]) -> list[str]:
    return [" ".join(map(str, [what, *names])) for what, names in log]


class TestRoom:
    @pytest.mark.parametrize(
        ("under_way", "ahead", "room"),
        [
            ([], 0, True),
            ([100], 0, False),
            ([1], 0, False),
            ([], 100, True),
            ([100], 100, True),
            ([5000], 100, True),
            ([100, 100], 100, False),
            ([100, 1], 100, True),
            ([1, 100], 100, False),
            ([100, 60, 40], 100, False),
        ],
    )
    def test_by_what_waits_behind_the_call_that_runs(self, under_way: list[int], ahead: int, room: bool) -> None:
        assert has_room(under_way, ahead) is room


class TestOverlap:
    def test_the_next_batch_is_handed_over_while_the_last_row_runs(self) -> None:
        async def main() -> None:
            device = Device()
            async with running(device) as scheduler:
                first, second = await queue(scheduler, device, pairs(1, 2), pairs(3, 4))
                assert of(device.log) == ["plan 1 2", "run 1", "run 2"], "it is not chosen earlier,"
                late = asyncio.create_task(scheduler.submit(pairs(5)))
                await asyncio.sleep(0.02)
                device.end()
                await seen(lambda: len(device.log) == 6)
                assert of(device.log[3:]) == ["fetch 1", "plan 4 5", "run 4"], "so that a smaller newcomer is in it"
                assert not first.done()
                device.end()
                assert (await first).tolist() == [1, 2]
                device.end(10)
                assert (await late).tolist() == [5]
                assert (await second).tolist() == [3, 4]
                assert of(device.log[6:]) == ["fetch 2", "run 5", "fetch 4", "plan 3", "run 3", "fetch 5", "fetch 3"]

        asyncio.run(main())

    def test_one_row_at_a_time_where_the_device_wants_it_so(self) -> None:
        async def main() -> None:
            device = Device()
            async with running(device, ahead=0) as scheduler:
                tasks = await queue(scheduler, device, pairs(1, 2), pairs(3))
                device.end(10)
                assert [task.tolist() for task in await asyncio.gather(*tasks)] == [[1, 2], [3]]
            expected = ["plan 1 2", "run 1", "fetch 1", "run 2", "fetch 2", "plan 3", "run 3", "fetch 3"]
            assert of(device.log) == expected

        asyncio.run(main())

    def test_what_follows_a_short_row_is_there_before_it_begins(self) -> None:
        """A batch of two full rows whose pairs do not share them out evenly comes to three, the last one short."""

        async def main() -> None:
            device = Device()
            async with running(device) as scheduler:
                full = pairs(1, 2, length=ROW - 5) + pairs(3, length=10)
                tasks = await queue(scheduler, device, full, pairs(4, 5))
                device.end()
                await seen(lambda: len(device.log) == 7)
                assert of(device.log) == ["plan 1 2 3", "run 1", "run 2", "fetch 1", "run 3", "plan 4 5", "run 4"]
                device.end(10)
                await asyncio.gather(*tasks)

        asyncio.run(main())

    def test_two_batches_at_most_however_small(self) -> None:
        async def main() -> None:
            device = Device()
            async with running(device) as scheduler:
                full = pairs(1, 2, length=ROW - 5) + pairs(3, length=10)
                small, large = pairs(4, length=5), pairs(5, length=2 * ROW)  # which share no batch
                tasks = await queue(scheduler, device, full, small, large)
                device.end()
                await seen(lambda: len(device.log) == 7)
                await asyncio.sleep(0.02)
                assert of(device.log[3:]) == ["fetch 1", "run 3", "plan 4", "run 4"]
                device.end(10)
                assert [task.tolist() for task in await asyncio.gather(*tasks)] == [[1, 2, 3], [4], [5]]

        asyncio.run(main())

    def test_a_single_request_is_answered_without_another(self) -> None:
        async def main() -> None:
            device = Device()
            async with running(device) as scheduler:
                for name in range(3):
                    device.end()
                    assert (await scheduler.submit(pairs(name, length=7))).tolist() == [name]
                    assert of(device.log[3 * name :]) == [f"plan {name}", f"run {name}", f"fetch {name}"]

        asyncio.run(main())

    def test_images_wait_until_the_device_is_free(self) -> None:
        """What the vision tower makes of them is waited for, and the batch before must not wait with it."""
        media = Media((), np.zeros(0, np.int32), np.zeros((3, ROW), np.int32))
        seeing = [Encoded(np.full(ROW, 3, np.int32), media=media)]

        async def main() -> None:
            device = Device()
            async with running(device) as scheduler:
                first, second = await queue(scheduler, device, pairs(1, 2), seeing)
                device.end(2)
                assert (await first).tolist() == [1, 2]
                device.end()
                assert (await second).tolist() == [3]
                assert of(device.log) == [
                    "plan 1 2", "run 1", "run 2", "fetch 1", "fetch 2", "plan 3", "run 3", "fetch 3",
                ]  # fmt: skip

        asyncio.run(main())

    def test_speed_and_batch_seconds_count_no_moment_twice(self) -> None:
        reports: list[BatchReport] = []

        async def main() -> None:
            device = Device()
            async with running(device, on_batch=reports.append) as scheduler:
                begin = asyncio.get_running_loop().time()
                tasks = await queue(scheduler, device, pairs(1, 2), pairs(3, 4), pairs(5, 6))
                for _ in range(6):
                    await asyncio.sleep(0.02)
                    device.end()
                await asyncio.gather(*tasks)
                await seen(lambda: len(reports) == 3)
                assert sum(report.seconds for report in reports) <= asyncio.get_running_loop().time() - begin
                assert 0 < scheduler.rate <= 200 / 0.04

        asyncio.run(main())
        assert [(report.pairs, report.tokens, report.fill) for report in reports] == [(2, 200, 1.0)] * 3
        assert all(report.seconds > 0.03 for report in reports)

    def test_what_is_cancelled_is_scored_only_if_it_is_chosen(self) -> None:
        async def main() -> None:
            device = Device()
            async with running(device) as scheduler:
                tasks = await queue(scheduler, device, pairs(1, 2), pairs(3, 4, 5, 6, 7, 8))
                device.end()
                await seen(lambda: len(device.log) == 6)
                tasks[1].cancel()
                await seen(lambda: scheduler.tokens == 4 * ROW)  # the two batches that are under way
                device.end(10)
                assert (await tasks[0]).tolist() == [1, 2]
                await seen(lambda: scheduler.tokens == 0)
                assert of(device.log[-3:]) == ["run 8", "fetch 7", "fetch 8"]

        asyncio.run(main())

    def test_closing_finishes_both(self) -> None:
        async def main() -> None:
            device = Device()
            async with running(device) as scheduler:
                tasks = await queue(scheduler, device, pairs(1, 2), pairs(3, 4))
                device.end()
                await seen(lambda: len(device.log) == 6)
                closing = asyncio.create_task(scheduler.close())
                device.end(10)
                assert [task.tolist() for task in await asyncio.gather(*tasks)] == [[1, 2], [3, 4]]
                await asyncio.wait_for(closing, 5)

        asyncio.run(main())

    @pytest.mark.parametrize("in_flight", [1, 2, 3])
    def test_a_model_gives_the_same_scores(self, tmp_path: Path, in_flight: int) -> None:
        made = Reranker.from_pretrained(make_bge(tmp_path), dtype="float32", row_tokens=128, compile_cache=None)
        requests = [made.encode(text, TEXT[: 1 + i] * 3) for i, text in enumerate(TEXT)]
        expected = [made.score_encoded(request) for request in requests]
        made.scorer.in_flight = in_flight
        assert made.ahead == 128 * (in_flight - 1)

        async def main() -> list[np.ndarray]:
            scheduler = Scheduler(made.calls, ahead=made.ahead, batch_tokens=256, max_tokens=10**6, max_requests=100)
            scheduler.start()
            answers = await asyncio.gather(*map(scheduler.submit, requests))
            await scheduler.close()
            return answers

        for answer, right in zip(asyncio.run(main()), expected, strict=True):
            np.testing.assert_allclose(answer, right, atol=1e-5)


TWO = (pairs(1, 2), pairs(3, 4))
"""Requests that are a batch each."""


def answers(device: Device, *requests: list[Encoded], ahead: int = ROW, **settings: Any) -> list[Any]:
    """What each of the requests gets when batches are two of their pairs."""

    async def main() -> list[Any]:
        async with running(device, ahead, **settings) as scheduler:
            tasks = await queue(scheduler, device, *requests)
            device.end(1000)
            found = await asyncio.gather(*tasks, return_exceptions=True)
            assert scheduler.tokens == 0 or scheduler.failed
        return [type(one) if isinstance(one, BaseException) else one.tolist() for one in found]

    return asyncio.run(main())


class TestFailures:
    def test_handing_over_the_second_fails_once(self) -> None:
        device = Device(bad=[("run", 3)])
        assert answers(device, *TWO) == [[1, 2], [3, 4]]
        assert of(device.log[3:]) == [
            "fetch 1", "plan 3 4", "run 3", "fetch 2",
            "plan 4", "run 4", "fetch 4", "plan 3", "run 3", "fetch 3",
        ]  # fmt: skip

    def test_planning_the_second_fails_for_good(self) -> None:
        device = Device(bad=[("plan", 3)] * 2)
        assert answers(device, *TWO, pairs(5, 6)) == [[1, 2], ScoringFailed, [5, 6]]

    @pytest.mark.parametrize("what", ["run", "fetch"])
    def test_the_second_fails_for_good(self, what: str) -> None:
        reports: list[BatchReport] = []
        device = Device(bad=[(what, 4)] * 2)
        assert answers(device, *TWO, pairs(5, 6), on_batch=reports.append) == [[1, 2], ScoringFailed, [5, 6]]
        assert [report.failed_pairs for report in reports] == [0, 1, 0], "3, in a half of its own, was scored"

    def test_the_first_fails_on_the_device_and_the_second_loses_nothing(self) -> None:
        device = Device(bad=[("fetch", 2)])
        assert answers(device, *TWO) == [[1, 2], [3, 4]]
        assert of(device.log[3:]) == [
            "fetch 1", "plan 3 4", "run 3", "fetch 2", "fetch 3",
            "plan 2", "run 2", "fetch 2", "plan 1", "run 1", "fetch 1", "run 4", "fetch 4",
        ], "its halves are tried when nothing else is under way, and the second goes on where it was"  # fmt: skip

    def test_the_first_fails_for_good_and_the_second_loses_nothing(self) -> None:
        device = Device(bad=[("fetch", 2)] * 2)
        assert answers(device, *TWO) == [ScoringFailed, [3, 4]]

    def test_both_fail_once(self) -> None:
        device = Device(bad=[("fetch", 2), ("fetch", 3)])
        assert answers(device, *TWO) == [[1, 2], [3, 4]]
        planned = of([line for line in device.log if line[0] == "plan"])
        assert planned == ["plan 1 2", "plan 3 4", "plan 2", "plan 1", "plan 4", "plan 3"]

    def test_both_fail_for_good(self) -> None:
        device = Device(bad=[("fetch", 2), ("fetch", 3)] * 2)
        assert answers(device, *TWO, pairs(5)) == [ScoringFailed, ScoringFailed, [5]]

    def test_memory_for_one_row_alone(self) -> None:
        """Rows fail for as long as two are under way; halves, of one row each, do not."""
        device = Device(memory=ROW)
        assert answers(device, *TWO, pairs(5, 6)) == [[1, 2], [3, 4], [5, 6]]
        assert device.under_way == 0

    def test_memory_for_nothing(self) -> None:
        device = Device(memory=0)
        seen: list[bool] = []
        assert (
            answers(device, *TWO, pairs(5, 6), on_batch=lambda report: seen.append(bool(report.failed_pairs)))
            == [ScoringFailed] * 3
        )
        assert seen == [True] * 3

    def test_speed_is_not_measured_beside_a_batch_that_failed(self) -> None:
        rates: list[float] = []

        async def main() -> None:
            device = Device(bad=[("fetch", 2)] * 2)
            async with running(device, on_batch=lambda report: rates.append(scheduler.rate)) as scheduler:
                tasks = await queue(scheduler, device, *TWO, pairs(5, 6))
                device.end(1000)
                await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run(main())
        assert rates[:2] == [0, 0]
        assert rates[2] > 0

    def test_failures_in_a_row_are_counted_by_batch(self) -> None:
        counts: list[int] = []

        async def main() -> None:
            device = Device(bad=[("fetch", i) for i in (1, 2, 3, 4)] * 2)
            settings = {"on_batch": lambda report: counts.append(scheduler.failures), "fail_after": 2}
            async with running(device, **settings) as scheduler:
                tasks = await queue(scheduler, device, *TWO, pairs(5, 6))
                device.end(1000)
                await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run(main())
        assert counts == [1, 2, 0]

    @pytest.mark.parametrize("what", [("run", 3), ("fetch", 2), ("fetch", 3)])
    def test_the_thread_dying_fails_both(self, what: tuple[str, int]) -> None:
        told: list[BaseException] = []
        device = Device(bad=[what], error=SystemExit)
        found = answers(device, *TWO, pairs(5, 6, 7, 8), on_failure=told.append)
        assert found[0] == ([1, 2] if what == ("fetch", 3) else ScoringFailed)
        assert found[1:] == [ScoringFailed] * 2
        assert [type(error) for error in told] == [SystemExit]

    @pytest.mark.parametrize("ahead", [0, ROW])
    def test_pairs_without_logits_are_a_failure(self, ahead: int) -> None:
        def calls(encoded: Sequence[Encoded]) -> Iterator[Call]:
            """Forgets all pairs but the first."""
            if len(encoded) > 1:
                yield Call(ROW, lambda: lambda: [([0], np.zeros(1, np.float32))])

        async def main() -> None:
            scheduler = Scheduler(calls, ahead=ahead, batch_tokens=2 * ROW, max_tokens=10**6, max_requests=100)
            scheduler.start()
            requests = [asyncio.wait_for(scheduler.submit(pairs(*[1] * count)), 5) for count in (1, 2, 1)]
            found = await asyncio.gather(*requests, return_exceptions=True)
            assert [type(one) for one in found] == [ScoringFailed] * 3
            await scheduler.close()

        asyncio.run(main())
