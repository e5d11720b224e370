"""The scheduler scores pairs of many requests together: a queue for the event loop, and one thread for the device.

Order. A request gets a deadline, counted in tokens. It is the number of tokens that the device had received when the
request came, plus the request's own tokens. The earliest deadline goes first, which has three effects:

- Requests of one size are served first come, first served. Each is finished before the next is begun. This keeps the
  mean wait low, and the clients out of step.
- A request of one document overtakes a request of a thousand documents that came before it.
- The large request cannot starve. Newcomers overtake it only until the device has received as many tokens as the large
  request has itself.

Batches. The thread chooses its next batch when the last full row of the batch before begins. So the batch holds all
requests that came until then, and the device goes on without a gap (see pipeline). If rows run one at a time, as on
CPU, the thread chooses when the batch before is finished. In order of deadline, it takes the longest pair that still
fits, until no pair fits. So rows are full except for a few tokens.

Failures. A batch that fails is halved once, and each half is tried. If a half fails again, its requests fail. Another
batch that is under way at that time goes on. If nothing could be scored in several batches in a row, the scheduler is
`failing`. It still scores the requests that come. If none come, it scores a probe of its own, so that it notices when
the device works again.
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
"""Called when a stage is over, with its name, begin and end. Times are by time.perf_counter()."""


@dataclass(frozen=True, slots=True)
class BatchReport:
    """A batch that is finished.

    Args:
        pairs: The number of its pairs.
        tokens: The number of tokens of its pairs.
        fill: Its tokens divided by the most tokens of a batch.
        seconds: The time since the batch was chosen. If the batch before was still running then, the time since that
            one finished.
        failed_pairs: The number of pairs that could not be scored.
    """

    pairs: int
    tokens: int
    fill: float
    seconds: float
    failed_pairs: int


class Job:
    """One request in the queue.

    Attributes:
        waiting: Indices of the pairs that no batch has taken yet, shortest first.
        lengths: The lengths of the waiting pairs, in the same order. They count a pair's own tokens only, since a batch
            computes the shared prefix once.
        logits: float32, one a pair. Each batch fills in its part.
        unscored: The number of pairs without a logit.
        deadline: In tokens; the module describes it.
        submitted: When the request came, by time.perf_counter().
        begun: When a batch first took one of its pairs, by time.perf_counter().
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
        """Remove the longest waiting pair that fits.

        Args:
            room: Most tokens of the pair, without the prefix.

        Returns:
            The pair as (index, length), or None if none fits.
        """
        at = bisect_right(self.lengths, room) - 1
        return (self.waiting.pop(at), self.lengths.pop(at)) if at >= 0 else None


@dataclass(frozen=True, slots=True)
class Batch:
    """The pairs that are scored together.

    Args:
        pairs: One (request, index of its pair) for each pair, in order.
        given: The number of tokens that the device computes for the batch.
        chosen: When the batch was chosen, by time.perf_counter().
    """

    pairs: list[tuple[Job, int]]
    given: int
    chosen: float


class Scheduler:
    """Scores the pairs of all requests on one thread. Call its methods on the event loop's thread only.

    Args:
        calls: Of a Reranker. Only the device thread uses it.
        ahead: Of a Reranker. Only the device thread uses it.
        batch_tokens: Most tokens of a batch. A single pair that is longer goes alone.
        max_tokens: No request is admitted while the queue holds so many tokens.
        max_requests: No request is admitted while the queue holds so many requests.
        max_wait_s: No request is admitted while the queue's tokens would take so many seconds at the measured speed.
        prepare: Runs on the device thread before anything is scored.
        on_failure: Called when prepare failed or the thread died. Nothing is scored after that.
        on_batch: Called for every batch, on the device thread.
        fail_after: After so many batches in a row without any scored pair, the scheduler is `failing`.
        probe: Returns the pairs that are tried while the scheduler is failing.
        probe_s: Seconds between two probes.
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
        self.failures = 0  # batches in a row without any scored pair
        self.failing_since = 0.0  # by time.monotonic(); 0 if it is not failing
        self.requests = 0  # admitted and not answered
        # Shared with the device thread, under _change:
        self._change = threading.Condition()
        self._jobs: list[Job] = []  # those with waiting pairs, by deadline
        self._clock = 0  # all tokens that the device has received
        self._stop = False
        self.tokens = 0  # submitted and not scored
        self._rate = 0.0  # tokens a second, smoothed
        self._busy_since = 0.0  # when the device thread began to work on this batch, or on the rest of the last one
        self._batches: deque[Batch] = deque()  # under way, oldest first; only the device thread uses it

    def start(self) -> None:
        """Start the device thread.

        Raises:
            RuntimeError: No event loop runs, or the thread was started before.
        """
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def refuse_new(self) -> None:
        """Admit no more requests. The admitted requests are finished."""
        self._closing = True

    async def close(self, patience_s: float | None = None) -> None:
        """Admit no more requests, finish the admitted ones, and end the thread.

        Args:
            patience_s: Most seconds to wait for the running batch when all requests are gone. After that the thread is
                left alone, and ends with the process.
        """
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
        """Scored tokens a second, smoothed. It is 0 before the first batch."""
        return self._rate

    @property
    def wait_s(self) -> float:
        """Seconds until all waiting tokens are scored, at the measured speed. It is 0 before the first batch."""
        return self.tokens / self._rate if self._rate else 0.0

    @property
    def failing(self) -> bool:
        """Whether nothing could be scored in the last batches. One success ends this state."""
        return self.failures >= self._fail_after

    @contextlib.contextmanager
    def admit(self) -> Iterator[None]:
        """Hold a place in the queue, from before tokenising until the answer.

        Whether a request is admitted depends on the queue that it finds, not on its own size. So a large request is
        never refused for good. The queue holds at most `max_tokens`, plus one request for each place that is already
        held.

        Raises:
            Overloaded: The queue is full.
            Closing: The server is shutting down.
            ScoringFailed: Scoring has stopped for good.
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
        """Raise the error that admit() would raise now.

        Raises:
            Overloaded: The queue is full.
            Closing: The server is shutting down.
            ScoringFailed: Scoring has stopped for good.
        """
        if self._closing:
            raise Closing
        if self.failed:
            raise ScoringFailed("Scoring has stopped for good. The server has to be restarted.")
        if self.requests >= self._max_requests or self.tokens >= self._max_tokens or self.wait_s >= self._max_wait_s:
            raise Overloaded(self.retry_after())

    async def submit(self, encoded: Sequence[Encoded], stage: Stage = lambda name, begin, end: None) -> Logits:
        """Return the logits of the pairs. Call it inside admit().

        If the caller is cancelled, the pairs that no batch holds yet are never scored.

        Args:
            encoded: The pairs of one request.
            stage: Called for "wait", which lasts until a batch first takes one of the pairs. Called also for "score",
                which lasts from there to the last result.

        Returns:
            Logits, float32 of shape (pairs,), in the order of `encoded`.

        Raises:
            ScoringFailed: The model failed on these pairs, or scoring has stopped for good.
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
        """Return the whole seconds until about half of the queue is scored, from 1 to 60."""
        return min(60, max(1, math.ceil(self.wait_s / 2)))

    def _drop(self, job: Job) -> None:
        """Remove a job's pairs that no batch holds yet. The caller holds _change."""
        job.dropped = True
        if job.waiting and not self.failed:
            self.tokens -= sum(job.lengths)
            job.waiting.clear()
            job.lengths.clear()
            self._jobs.remove(job)

    # The methods below run on the device thread.

    def _main(self) -> None:
        """Prepare, then score until the scheduler is stopped. An error here ends the scheduler, not the process."""
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
            if not self._closing:  # a warm-up that a shutdown stops is no failure
                self._on_failure(error)
            failure = ScoringFailed("Scoring has stopped for good. The server has to be restarted.")
            self._answer([(job, failure) for job in jobs])

    def _advance(self) -> None:
        """Begin a batch if there is room for one, otherwise wait for the device."""
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
        """Return whether nothing is left and nothing will come."""
        with self._change:
            return self._stop and not self._jobs

    def _next_batch(self) -> Batch | None:
        """Return the next batch. While none is under way, wait for one.

        Returns:
            The batch. None if the scheduler is stopped and nothing is left, or if it is time to probe.
        """
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
                # Only the first pair may be longer than a batch. It goes alone.
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
        """Answer the requests that a batch completes or fails."""
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
        """Return whether the device can score the probe."""
        pairs = self._probe()
        return bool(pairs) and not self._pipeline.score(pairs).failed

    def _note_success(self, success: bool) -> None:
        """Count the failures in a row. Log when the scheduler starts failing, and when it recovers."""
        failing = self.failing
        self.failures = 0 if success else self.failures + 1
        if self.failing and not failing:
            self.failing_since = time.monotonic()
            log.error("nothing could be scored in %d batches in a row: not ready", self.failures)
        elif failing and success:
            self.failing_since = 0.0
            log.warning("scoring works again: ready")

    def _answer(self, answers: Sequence[tuple[Job, Logits | ScoringFailed]]) -> None:
        """Give the results of a batch to the event loop in one call, because each wake-up costs a system call."""
        if answers:
            with contextlib.suppress(RuntimeError):  # the loop is closed, so no request waits for an answer
                self._loop.call_soon_threadsafe(_resolve, answers)


def smoothed(rate: float, measured: float) -> float:
    """Return the next estimate of a speed.

    The estimate follows slow measurements faster than fast ones. Under load the queue fills up to every peak of the
    estimate. At too high an estimate, the queue would be too long by the time it is scored.

    Args:
        rate: The estimate so far. 0 if there is none.
        measured: The newest measurement, in the same unit.
    """
    return measured if not rate else rate + (measured - rate) * (0.1 if measured < rate else 0.02)


def _deadline(job: Job) -> int:
    return job.deadline


def _checked(logits: Logits) -> Logits | ScoringFailed:
    """Return the logits, or a failure if one of them is not finite.

    JSON has no NaN, and a ranking with NaN means nothing.
    """
    bad = int(np.count_nonzero(~np.isfinite(logits)))
    if not bad:
        return logits
    log.error("%d of %d logits of a request are not finite", bad, len(logits))
    return ScoringFailed("The model answered something that is not a finite number.")


def _resolve(answers: Sequence[tuple[Job, Logits | ScoringFailed]]) -> None:
    """Wake the requests. Runs on the event loop's thread."""
    for job, answer in answers:
        if job.future.done():
            continue
        if isinstance(answer, ScoringFailed):
            job.future.set_exception(answer)
        else:
            job.future.set_result(answer)
