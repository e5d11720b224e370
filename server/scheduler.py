"""Pairs of many requests scored together: a queue on the event loop's side, one thread on the device's side.

Order. A request's deadline is the number of tokens that the device had been given when the request came, plus the
request's own tokens; the earliest deadline goes first. So requests of one size are served first come, first served
(each is finished before the next is begun, which keeps the mean wait low and the clients out of step), a request of
one document overtakes one of a thousand that came before it, and the large one cannot starve: newcomers overtake it
only until the device has been given as many tokens as it has itself.

Batches. The thread chooses its next batch when the last full row of the one before begins, so that the batch holds all
who came until then and the device goes on without a gap (see pipeline); where rows run one at a time, as on CPU, when
the one before is through. It takes, in order of deadline, the longest pair that still fits, until nothing does: rows
come out full to a few tokens.

Failures. A batch that fails is halved once and each half is tried; the requests of a half that fails again are failed.
A batch that is under way beside it goes on. After several batches in a row of which nothing could be scored the
scheduler is `failing`. It goes on with what comes, and tries a probe of its own where nothing does, so that it notices
when the device is well again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
import time
from bisect import bisect_right, insort
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from jaxrank.server.errors import Closing, Overloaded, ScoringFailed
from jaxrank.server.pipeline import Calls, Pipeline, Run
from jaxrank.types import Encoded

log = logging.getLogger(__name__)

Logits = np.ndarray

Stage = Callable[[str, float, float], None]
"""Told of a stage that is over: its name, begin and end by time.perf_counter()."""


@dataclass(frozen=True, slots=True)
class BatchReport:
    """A batch that is through. fill: its tokens by the most that one takes. seconds: since it was chosen, or since the
    one before was through, where that ran still."""

    pairs: int
    tokens: int
    fill: float
    seconds: float
    failed_pairs: int


class Job:
    """One request in the queue.

    waiting: indices of the pairs that no batch has taken yet, shortest first, lengths in step: of their own tokens,
    since a batch computes the prefix that they share but once. logits: float32, one a
    pair, filled batch by batch. unscored: how many are still missing. deadline: see the module. submitted, begun: when
    it came, and when a batch first took of it, by time.perf_counter().
    """

    __slots__ = (
        "begun", "deadline", "dropped", "encoded", "future", "lengths", "logits", "prefix", "submitted", "unscored",
        "waiting",
    )  # fmt: skip

    def __init__(self, encoded: Sequence[Encoded], clock: int, future: asyncio.Future[Logits]) -> None:
        self.encoded = encoded
        sizes = [len(pair.tokens) for pair in encoded]
        self.prefix = len(encoded[0].prefix)
        self.waiting = sorted(range(len(sizes)), key=sizes.__getitem__)
        self.lengths = sorted(sizes)
        self.logits = np.full(len(sizes), np.nan, np.float32)
        self.unscored = len(sizes)
        self.deadline = clock + self.prefix + sum(sizes)
        self.future = future
        self.dropped = False
        self.submitted = time.perf_counter()
        self.begun = 0.0

    def take(self, room: int) -> tuple[int, int] | None:
        """The longest waiting pair of at most `room` own tokens, as (index, length); None if there is none."""
        at = bisect_right(self.lengths, room) - 1
        return (self.waiting.pop(at), self.lengths.pop(at)) if at >= 0 else None


@dataclass(frozen=True, slots=True)
class Batch:
    """What is scored together. pairs: (request, index of its pair), in their order. given: tokens that the device
    computes for it. chosen: when, by time.perf_counter()."""

    pairs: list[tuple[Job, int]]
    given: int
    chosen: float


class Scheduler:
    """Scores the pairs of all requests on one thread. All methods are for the event loop's thread.

    calls, ahead: of a Reranker; the device thread alone uses them. batch_tokens: most tokens of a batch (a longer
    single pair goes alone). max_tokens, max_requests: no request is admitted while the queue holds that many.
    max_wait_s: nor while the queue's tokens would take that long at the measured speed.
    prepare: run on the device thread before anything is scored. on_failure: told when prepare failed or the thread
    died; nothing will be scored any more. on_batch: told of every batch, on the device thread. fail_after: batches in a
    row of which nothing could be scored, until `failing`. probe: pairs to try every probe_s seconds then.
    """

    def __init__(
        self,
        calls: Calls,
        *,
        ahead: int = 0,
        batch_tokens: int,
        max_tokens: int,
        max_requests: int,
        max_wait_s: float = math.inf,
        prepare: Callable[[], None] = lambda: None,
        on_failure: Callable[[BaseException], None] = lambda error: None,
        on_batch: Callable[[BatchReport], None] = lambda report: None,
        fail_after: int = 3,
        probe: Callable[[], Sequence[Encoded]] = lambda: (),
        probe_s: float = 5.0,
    ) -> None:
        self._pipeline = Pipeline(calls, ahead)
        self._on_batch = on_batch
        self._fail_after = fail_after
        self._probe = probe
        self._probe_s = probe_s
        self._batch_tokens = batch_tokens
        self._max_tokens = max_tokens
        self._max_requests = max_requests
        self._max_wait_s = max_wait_s
        self._prepare = prepare
        self._on_failure = on_failure
        self._thread = threading.Thread(target=self._main, name="jaxrank-device", daemon=True)
        self._idle = asyncio.Event()
        self._idle.set()
        self._closing = False
        self.ready = False
        self.failed = False
        self.failures = 0  # batches in a row of which nothing could be scored
        self.failing_since = 0.0  # by time.monotonic(); 0: it is not failing
        self.requests = 0  # admitted and not answered
        # Shared with the device thread, under _change:
        self._change = threading.Condition()
        self._jobs: list[Job] = []  # with waiting pairs, by deadline
        self._clock = 0  # tokens ever given to the device
        self._stop = False
        self.tokens = 0  # submitted and not scored
        self._rate = 0.0  # tokens a second, smoothed
        self._busy_since = 0.0  # since when the device thread works on the batch, or on what the last one left to do
        self._batches: deque[Batch] = deque()  # under way, oldest first; the device thread's own

    def start(self) -> None:
        """Start the device thread. Raises RuntimeError outside an event loop, or on a second call."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def refuse_new(self) -> None:
        """Admit no one any more. What was admitted is finished."""
        self._closing = True

    async def close(self, patience_s: float | None = None) -> None:
        """Take nothing new, finish what was admitted, end the thread. patience_s: most seconds for the batch that runs
        when all requests are gone; the thread is left alone then, and ends with the process."""
        self.refuse_new()
        if not self.failed:
            await self._idle.wait()
        with self._change:
            self._stop = True
            self._change.notify()
        await asyncio.to_thread(self._thread.join, patience_s)
        if self._thread.is_alive():
            log.warning("the device is still at work, on what nobody waits for any more")

    @property
    def stopping(self) -> bool:
        """Whether close() or refuse_new() was called."""
        return self._closing

    @property
    def rate(self) -> float:
        """Tokens that are scored a second, smoothed; 0 before the first batch."""
        return self._rate

    @property
    def wait_s(self) -> float:
        """Seconds until all that waits now is scored, by the measured speed; 0 before the first batch."""
        return self.tokens / self._rate if self._rate else 0.0

    @property
    def failing(self) -> bool:
        """Whether the last batches failed altogether. A success ends it."""
        return self.failures >= self._fail_after

    @contextlib.contextmanager
    def admit(self) -> Iterator[None]:
        """Hold a place in the queue, from before tokenising until the answer. Raises Overloaded or Closing.

        A request is judged by the queue that it finds, not by its own size, so that a large one is never refused for
        good; the queue holds at most `max_tokens` and one request a place already held.
        """
        self.check_room()
        self.requests += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.requests -= 1
            if not self.requests:
                self._idle.set()

    def check_room(self) -> None:
        """Raise what admit() would raise now."""
        if self._closing:
            raise Closing
        if self.failed:
            raise ScoringFailed("Scoring has stopped for good. The server has to be restarted.")
        if self.requests >= self._max_requests or self.tokens >= self._max_tokens or self.wait_s >= self._max_wait_s:
            raise Overloaded(self.retry_after())

    async def submit(self, encoded: Sequence[Encoded], stage: Stage = lambda name, begin, end: None) -> Logits:
        """Logits of the pairs, float32, in order; call it inside admit(). Raises ScoringFailed.

        stage: told of "wait", until a batch first takes of it, and of "score", from there to the last result. When the
        caller is cancelled, pairs that no batch holds yet are never scored.
        """
        if not encoded:
            return np.zeros(0, np.float32)
        with self._change:
            if self.failed:
                raise ScoringFailed("Scoring has stopped for good. The server has to be restarted.")
            job = Job(encoded, self._clock, self._loop.create_future())
            self.tokens += sum(job.lengths)
            insort(self._jobs, job, key=_deadline)
            self._change.notify()
        try:
            return await job.future
        finally:
            with self._change:
                self._drop(job)
            end = time.perf_counter()
            stage("wait", job.submitted, job.begun or end)
            if job.begun:
                stage("score", job.begun, end)

    def retry_after(self) -> int:
        """Whole seconds until about half of the queue is scored, 1 to 60."""
        return min(60, max(1, math.ceil(self.wait_s / 2)))

    def _drop(self, job: Job) -> None:
        """Forget the pairs of a job that no batch holds yet. The caller holds _change."""
        job.dropped = True
        if job.waiting and not self.failed:
            self.tokens -= sum(job.lengths)
            job.waiting.clear()
            job.lengths.clear()
            self._jobs.remove(job)

    # The rest runs on the device thread.

    def _main(self) -> None:
        """Prepare, then score until told to stop. Whatever gets here ends the scheduler, not the process."""
        try:
            self._prepare()
            self._busy_since = time.perf_counter()
            self.ready = True
            while self._batches or not self._ended():
                self._advance()
        except BaseException as error:
            with self._change:
                self.failed, self.ready = True, False
                jobs = self._jobs + [job for batch in self._batches for job, _ in batch.pairs]
            if not self._closing:  # a warm-up that was told to stop is no failure
                self._on_failure(error)
            failure = ScoringFailed("Scoring has stopped for good. The server has to be restarted.")
            self._answer([(job, failure) for job in jobs])

    def _advance(self) -> None:
        """Begin a batch where there is room for one, or wait for the device."""
        if self._pipeline.fill():
            if batch := self._next_batch():
                self._batches.append(batch)
                self._pipeline.begin([job.encoded[index] for job, index in batch.pairs])
                return
            if not self._batches:
                if self.failing:
                    self._note_success(self._probed())
                return
        if run := self._pipeline.next_through():
            self._finish(self._batches[0], run)
            self._batches.popleft()

    def _ended(self) -> bool:
        """Whether nothing is left and nothing will come."""
        with self._change:
            return self._stop and not self._jobs

    def _next_batch(self) -> Batch | None:
        """The next batch, waiting for one while none is under way; None when told to stop and nothing is left, or when
        it is time to probe."""
        with self._change:
            while not self._jobs and not self._stop and not self._batches:
                woken = self._change.wait(self._probe_s if self.failing else None)
                self._busy_since = time.perf_counter()
                if not woken:
                    return None
            now = time.perf_counter()
            pairs: list[tuple[Job, int]] = []
            room = self._batch_tokens
            for job in self._jobs:
                prefix = job.prefix
                # Only the first pair of a batch may be longer than the batch: it goes alone.
                while taken := job.take(room - prefix if pairs else max(room - prefix, job.lengths[-1])):
                    job.begun = job.begun or now
                    pairs.append((job, taken[0]))
                    room -= prefix + taken[1]
                    prefix = 0
                if room <= 0:
                    break
            self._jobs = [job for job in self._jobs if job.waiting]
            given = self._batch_tokens - room
            self._clock += given
            return Batch(pairs, given, now) if pairs else None

    def _finish(self, batch: Batch, run: Run) -> None:
        """Answer the requests that a batch completes, or fails."""
        ended = time.perf_counter()
        seconds = max(ended - max(batch.chosen, self._busy_since), 1e-6)
        busy_s, self._busy_since = max(ended - self._busy_since, 1e-6), ended
        tokens = sum(len(pair.tokens) for pair in run.pairs)
        failed = run.lost.tolist()
        self._note_success(not all(failed))
        answers: list[tuple[Job, Logits | ScoringFailed]] = []
        with self._change:
            self.tokens -= tokens
            if not any(failed) and not run.disturbed:
                self._rate = smoothed(self._rate, tokens / busy_s)
            for (job, index), logit, lost in zip(batch.pairs, run.logits.tolist(), failed, strict=True):
                job.logits[index] = logit
                job.unscored -= 1
                if lost and not job.dropped:
                    self._drop(job)
                    answers.append((job, ScoringFailed("The model failed on this batch.")))
                elif not job.unscored and not job.dropped:
                    answers.append((job, _checked(job.logits)))
        self._answer(answers)
        self._on_batch(BatchReport(len(failed), tokens, batch.given / self._batch_tokens, seconds, sum(failed)))

    def _probed(self) -> bool:
        """Whether the device can score what is tried while it is failing."""
        pairs = self._probe()
        return bool(pairs) and not self._pipeline.score(pairs).failed

    def _note_success(self, success: bool) -> None:
        """Count failures in a row, and log when they begin to matter and when they end."""
        failing = self.failing
        self.failures = 0 if success else self.failures + 1
        if self.failing and not failing:
            self.failing_since = time.monotonic()
            log.error("nothing could be scored in %d batches in a row: not ready", self.failures)
        elif failing and success:
            self.failing_since = 0.0
            log.warning("scoring works again: ready")

    def _answer(self, answers: Sequence[tuple[Job, Logits | ScoringFailed]]) -> None:
        """Hand results to the event loop, all of a batch in one go: waking it costs a system call."""
        if answers:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits for an answer
                self._loop.call_soon_threadsafe(_resolve, answers)


def smoothed(rate: float, measured: float) -> float:
    """The next estimate of a speed. It follows slower measurements sooner than faster ones: under pressure the queue
    fills up to every peak of the estimate, and would be too long by the time it is scored."""
    return measured if not rate else rate + (measured - rate) * (0.1 if measured < rate else 0.02)


def _deadline(job: Job) -> int:
    return job.deadline


def _checked(logits: Logits) -> Logits | ScoringFailed:
    """The logits, or the failure if one is not a number: JSON has no NaN, and such a ranking means nothing."""
    bad = int(np.count_nonzero(~np.isfinite(logits)))
    if not bad:
        return logits
    log.error("%d of %d logits of a request are not finite", bad, len(logits))
    return ScoringFailed("The model answered something that is not a finite number.")


def _resolve(answers: Sequence[tuple[Job, Logits | ScoringFailed]]) -> None:
    """Wake the requests, on the event loop's thread."""
    for job, answer in answers:
        if job.future.done():
            continue
        if isinstance(answer, ScoringFailed):
            job.future.set_exception(answer)
        else:
            job.future.set_result(answer)
