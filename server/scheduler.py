"""Pairs of many requests scored together: a queue on the event loop's side, one thread on the device's side.

Order. A request's deadline is the number of tokens that the device had been given when the request came, plus the
request's own tokens; the earliest deadline goes first. So requests of one size are served first come, first served
(each is finished before the next is begun, which keeps the mean wait low and the clients out of step), a request of
one document overtakes one of a thousand that came before it, and the large one cannot starve: newcomers overtake it
only until the device has been given as many tokens as it has itself.

Batches. The thread chooses its next batch the moment it is free, so that the batch holds all who came meanwhile. It
takes, in order of deadline, the longest pair that still fits, until nothing does: rows come out full to a few tokens.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
import time
from bisect import bisect_right, insort
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from jaxrank.server.errors import Closing, Overloaded, ScoringFailed
from jaxrank.types import Encoded

log = logging.getLogger(__name__)

Logits = np.ndarray
Score = Callable[[Sequence[Encoded]], Logits]


class Job:
    """One request in the queue.

    waiting: indices of the pairs that no batch has taken yet, shortest first, lengths in step: of their own tokens,
    since a batch computes the prefix that they share but once. logits: float32, one a
    pair, filled batch by batch. unscored: how many are still missing. deadline: see the module.
    """

    __slots__ = ("deadline", "dropped", "encoded", "future", "lengths", "logits", "prefix", "unscored", "waiting")

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

    def take(self, room: int) -> tuple[int, int] | None:
        """The longest waiting pair of at most `room` own tokens, as (index, length); None if there is none."""
        at = bisect_right(self.lengths, room) - 1
        return (self.waiting.pop(at), self.lengths.pop(at)) if at >= 0 else None


Batch = list[tuple[Job, int]]
"""(request, index of its pair) in the order in which they are scored."""


class Scheduler:
    """Scores the pairs of all requests on one thread. All methods are for the event loop's thread.

    score: scores any number of pairs, called from the device thread only. batch_tokens: most tokens in one call of it
    (a longer single pair goes alone). max_tokens, max_requests: no request is admitted while the queue holds that many.
    prepare: run on the device thread before anything is scored. on_failure: told when prepare failed or the thread
    died; nothing will be scored any more.
    """

    def __init__(
        self,
        score: Score,
        *,
        batch_tokens: int,
        max_tokens: int,
        max_requests: int,
        prepare: Callable[[], None] = lambda: None,
        on_failure: Callable[[BaseException], None] = lambda error: None,
    ) -> None:
        self._score = score
        self._batch_tokens = batch_tokens
        self._max_tokens = max_tokens
        self._max_requests = max_requests
        self._prepare = prepare
        self._on_failure = on_failure
        self._thread = threading.Thread(target=self._main, name="jaxrank-device", daemon=True)
        self._idle = asyncio.Event()
        self._idle.set()
        self._closing = False
        self.ready = False
        self.failed = False
        self.requests = 0  # admitted and not answered
        # Shared with the device thread, under _change:
        self._change = threading.Condition()
        self._jobs: list[Job] = []  # with waiting pairs, by deadline
        self._clock = 0  # tokens ever given to the device
        self._stop = False
        self.tokens = 0  # submitted and not scored
        self._rate = 0.0  # tokens a second, smoothed

    def start(self) -> None:
        """Start the device thread. Raises RuntimeError outside an event loop, or on a second call."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def close(self) -> None:
        """Take nothing new, finish what was admitted, end the thread."""
        self._closing = True
        if not self.failed:
            await self._idle.wait()
        with self._change:
            self._stop = True
            self._change.notify()
        await asyncio.to_thread(self._thread.join)

    @property
    def stopping(self) -> bool:
        """Whether close() was called."""
        return self._closing

    @contextlib.contextmanager
    def admit(self) -> Iterator[None]:
        """Hold a place in the queue, from before tokenising until the answer. Raises Overloaded or Closing.

        A request is judged by the queue that it finds, not by its own size, so that a large one is never refused for
        good; the queue holds at most `max_tokens` and one request a place already held.
        """
        if self._closing:
            raise Closing
        if self.failed:
            raise ScoringFailed("Scoring has stopped for good. The server has to be restarted.")
        if self.requests >= self._max_requests or self.tokens >= self._max_tokens:
            raise Overloaded(self._retry_after())
        self.requests += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.requests -= 1
            if not self.requests:
                self._idle.set()

    async def submit(self, encoded: Sequence[Encoded]) -> Logits:
        """Logits of the pairs, float32, in order; call it inside admit(). Raises ScoringFailed.

        When the caller is cancelled, pairs that no batch holds yet are never scored.
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

    def _retry_after(self) -> int:
        """Whole seconds until about half of the queue is scored, 1 to 60."""
        return min(60, max(1, math.ceil(self.tokens / 2 / self._rate))) if self._rate else 1

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
        batch: Batch = []
        try:
            self._prepare()
            self.ready = True
            while batch := self._next_batch():
                self._run(batch)
        except BaseException as error:
            with self._change:
                self.failed, self.ready = True, False
                jobs = self._jobs + [job for job, _ in batch]
            if not self._closing:  # a warm-up that was told to stop is no failure
                self._on_failure(error)
            failure = ScoringFailed("Scoring has stopped for good. The server has to be restarted.")
            self._answer([(job, failure) for job in jobs])

    def _next_batch(self) -> Batch:
        """The next batch, waiting for one; empty when told to stop and nothing is left."""
        with self._change:
            while not self._jobs and not self._stop:
                self._change.wait()
            batch: Batch = []
            room = self._batch_tokens
            for job in self._jobs:
                prefix = job.prefix
                # Only the first pair of a batch may be longer than the batch: it goes alone.
                while taken := job.take(room - prefix if batch else max(room - prefix, job.lengths[-1])):
                    batch.append((job, taken[0]))
                    room -= prefix + taken[1]
                    prefix = 0
                if room <= 0:
                    break
            self._jobs = [job for job in self._jobs if job.waiting]
            self._clock += self._batch_tokens - room
            return batch

    def _run(self, batch: Batch) -> None:
        """Score one batch and answer the requests that it completes, or fails."""
        pairs = [job.encoded[index] for job, index in batch]
        started = time.perf_counter()
        error: ScoringFailed | None = None
        try:
            logits = np.asarray(self._score(pairs), np.float32)
            if logits.shape != (len(pairs),):
                raise RuntimeError(f"{len(pairs)} pairs were scored as an array of shape {logits.shape}")
        except Exception as cause:
            log.exception("scoring a batch of %d pairs failed", len(pairs))
            logits = np.full(len(pairs), np.nan, np.float32)
            error = ScoringFailed("The model failed on this batch.")
            error.__cause__ = cause
        tokens = sum(len(pair.tokens) for pair in pairs)
        rate = tokens / max(time.perf_counter() - started, 1e-6)
        answers: list[tuple[Job, Logits | ScoringFailed]] = []
        with self._change:
            self.tokens -= tokens
            self._rate += (rate - self._rate) * (0.2 if self._rate else 1)
            for (job, index), logit in zip(batch, logits.tolist(), strict=True):
                job.logits[index] = logit
                job.unscored -= 1
                if error and not job.dropped:
                    self._drop(job)
                    answers.append((job, error))
                elif not job.unscored and not job.dropped:
                    answers.append((job, _checked(job.logits)))
        self._answer(answers)

    def _answer(self, answers: Sequence[tuple[Job, Logits | ScoringFailed]]) -> None:
        """Hand results to the event loop, all of a batch in one go: waking it costs a system call."""
        if answers:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits for an answer
                self._loop.call_soon_threadsafe(_resolve, answers)


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
