"""The device as the scheduler's thread uses it: calls of at most two batches under way, so that it need not wait.

A batch's calls are handed over one by one and fetched in the same order. When less than `ahead` tokens wait behind the
call that runs, the next one is planned, packed and handed over; where a batch has none left, the next batch is begun.
So a batch is chosen when the last full row of the one before begins, and the device has that row to do meanwhile. With
ahead = 0 one call is under way at a time, and a batch is begun when the one before is through.

Failures. A batch whose calls cannot be handed over, or fail on the device, is halved once when nothing else is under
way, and each half is tried by itself. The other batch loses nothing by that: what it has under way is fetched first.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from jaxrank.runtime.calls import Call, Fetch, Scored, has_room
from jaxrank.types import Encoded

log = logging.getLogger(__name__)

Calls = Callable[[Sequence[Encoded]], Iterator[Call]]
"""Makes of pairs the calls that score them, each planned and packed when it is asked for."""

AT_ONCE = 2
"""Batches: one runs, one is handed over."""


class Run:
    """A batch on its way through the device.

    logits: float32, one a pair, NaN where there is none. lost: which pairs have none because they failed twice, once it
    is through. disturbed: another batch failed meanwhile, so its time says nothing.
    """

    __slots__ = ("calls", "disturbed", "failed", "logits", "lost", "over", "pairs", "scored", "sees", "under_way")

    def __init__(self, pairs: Sequence[Encoded]) -> None:
        self.pairs = pairs
        self.logits = np.full(len(pairs), np.nan, np.float32)
        self.lost = np.zeros(len(pairs), bool)
        self.sees = any(pair.media is not None or pair.prefix_media is not None for pair in pairs)
        self.calls: Iterator[Call] | None = None  # not begun
        self.under_way = 0  # calls handed over and not fetched
        self.over = False  # it has no more calls
        self.scored = 0
        self.failed = False
        self.disturbed = False

    @property
    def through(self) -> bool:
        """Whether nothing is left to do but to try halves of it, where it failed."""
        return not self.under_way and (self.failed or self.over or self.scored == len(self.pairs))

    def take(self, scored: Scored) -> None:
        """Note the logits of some pairs. Raises RuntimeError where they are not one a pair."""
        indices, values = scored
        if values.shape != (len(indices),):
            raise RuntimeError(f"{len(indices)} pairs were scored as an array of shape {values.shape}")
        self.logits[indices] = values
        self.scored += len(indices)

    def fail(self) -> None:
        """Note the exception at hand. Nothing more is handed over, and what is under way does not count."""
        if not self.failed:
            log.exception("scoring %d pairs failed", len(self.pairs))
        self.failed = True
        self.calls = iter(())

    def close(self) -> None:
        """Note whether pairs are missing, now that it is through."""
        if not self.failed and self.scored < len(self.pairs):
            log.error("%d of %d pairs were scored", self.scored, len(self.pairs))
            self.failed = True


class Pipeline:
    """All batches that are under way. For one thread. calls, ahead: of a Reranker."""

    def __init__(self, calls: Calls, ahead: int) -> None:
        self._calls = calls
        self._ahead = ahead
        self._runs: deque[Run] = deque()  # oldest first; only the last may have calls to hand over
        self._under_way: deque[tuple[Run, int, Fetch]] = deque()  # with the tokens of the call, oldest first

    def begin(self, pairs: Sequence[Encoded]) -> Run:
        """Put a batch behind the others. Call it when `fill` said that there is room."""
        self._runs.append(run := Run(pairs))
        return run

    def fill(self) -> bool:
        """Hand over what there is room for; whether another batch should be begun as well."""
        while not any(run.failed for run in self._runs) and self._has_room():
            if not self._runs:
                return True
            run = self._runs[-1]
            if run.calls is None and run.sees and self._under_way:
                return False  # the vision tower is waited for, and the answers of the batch before would wait with it
            if not self._hand_over(run):
                return bool(self._under_way) and len(self._runs) < AT_ONCE
        return False

    def next_through(self) -> Run | None:
        """Wait for the oldest call; the batch that is through then, or None."""
        if self._under_way:
            self._fetch()
        run = self._runs[0]
        if not run.through:
            return None
        run.close()
        if run.failed:
            while self._under_way:
                self._fetch()
            self._halve(run)
            for other in self._runs:
                other.disturbed = other is not run
        return self._runs.popleft()

    def score(self, pairs: Sequence[Encoded]) -> Run:
        """Score pairs while nothing else is under way, one call at a time; nothing is tried twice."""
        run = Run(pairs)
        while not run.through and self._hand_over(run):
            while self._under_way:
                self._fetch()
        run.close()
        return run

    def _has_room(self) -> bool:
        return has_room([tokens for _, tokens, _ in self._under_way], self._ahead)

    def _hand_over(self, run: Run) -> bool:
        """Plan, pack and run the next call. Whether there was one left, or it failed."""
        try:
            if run.calls is None:
                run.calls = self._calls(run.pairs)
            if (call := next(run.calls, None)) is None:
                run.over = True
                return False
            self._under_way.append((run, call.tokens, call.run()))
            run.under_way += 1
        except Exception:
            run.fail()
        return True

    def _fetch(self) -> None:
        """Wait for the oldest call."""
        run, _, fetch = self._under_way.popleft()
        run.under_way -= 1
        try:
            for scored in fetch():
                run.take(scored)
        except Exception:
            run.fail()

    def _halve(self, run: Run) -> None:
        """Score the halves of a batch that failed, by tokens. A single pair is not tried again."""
        pairs = run.pairs
        run.lost[:] = True
        if len(pairs) == 1:
            return
        ends = np.cumsum([len(pair) for pair in pairs])
        middle = min(int(np.searchsorted(ends, ends[-1] / 2)) + 1, len(pairs) - 1)
        for half in (slice(0, middle), slice(middle, len(pairs))):
            again = self.score(pairs[half])
            run.logits[half], run.lost[half] = again.logits, again.failed
