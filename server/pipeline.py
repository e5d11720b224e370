"""The device as the scheduler's thread uses it: at most two batches are under way, so that the device never waits.

The calls of a batch are handed over one by one, and fetched in the same order. When fewer than `ahead` tokens wait
behind the running call, the next call is planned, packed and handed over. If a batch has no call left, the next batch
is begun. So a batch is chosen when the last full row of the batch before begins. The device computes that row
meanwhile. With ahead = 0, one call is under way at a time. A batch is then begun when the batch before is finished.

Failures. A batch fails if its calls cannot be handed over, or if they fail on the device. It is then halved once, when
nothing else is under way, and each half is tried by itself. The other batch loses nothing, because its calls that are
under way are fetched first.
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
"""Turns pairs into the calls that score them. Each call is planned and packed when it is requested."""

AT_ONCE = 2
"""Batches under way: one runs, and one is handed over."""


class Run:
    """A batch under way.

    Attributes:
        logits: float32, one a pair. NaN for a pair without a logit.
        lost: Which pairs have no logit because they failed twice. It is valid when the batch is finished.
        disturbed: Whether another batch failed meanwhile, so that the time of this one says nothing.
    """

    __slots__ = ("calls", "disturbed", "failed", "logits", "lost", "over", "pairs", "scored", "sees", "under_way")

    def __init__(self, pairs: Sequence[Encoded]) -> None:
        self.pairs = pairs
        self.logits = np.full(len(pairs), np.nan, np.float32)
        self.lost = np.zeros(len(pairs), bool)
        self.sees = any(pair.media is not None or pair.prefix_media is not None for pair in pairs)
        self.calls: Iterator[Call] | None = None  # None until the batch is begun
        self.under_way = 0  # calls handed over but not fetched
        self.over = False  # it has no more calls
        self.scored = 0
        self.failed = False
        self.disturbed = False

    @property
    def through(self) -> bool:
        """Whether the batch is finished. If it failed, its halves are still to be tried."""
        return not self.under_way and (self.failed or self.over or self.scored == len(self.pairs))

    def take(self, scored: Scored) -> None:
        """Note the logits of some pairs.

        Args:
            scored: Indices of pairs, and their logits of shape (pairs,).

        Raises:
            RuntimeError: There is not one logit a pair.
        """
        indices, values = scored
        if values.shape != (len(indices),):
            raise RuntimeError(f"{len(indices)} pairs were scored as an array of shape {values.shape}")
        self.logits[indices] = values
        self.scored += len(indices)

    def fail(self) -> None:
        """Log the current exception. No more calls are handed over, and calls under way do not count."""
        if not self.failed:
            log.exception("scoring %d pairs failed", len(self.pairs))
        self.failed = True
        self.calls = iter(())

    def close(self) -> None:
        """Note whether pairs are missing, now that the batch is finished."""
        if not self.failed and self.scored < len(self.pairs):
            log.error("%d of %d pairs were scored", self.scored, len(self.pairs))
            self.failed = True


class Pipeline:
    """All batches that are under way. For one thread only.

    Args:
        calls: Of a Reranker.
        ahead: Of a Reranker, in tokens.
    """

    def __init__(self, calls: Calls, ahead: int) -> None:
        self._calls = calls
        self._ahead = ahead
        self._runs: deque[Run] = deque()  # oldest first; only the last may still have calls to hand over
        self._under_way: deque[tuple[Run, int, Fetch]] = deque()  # batch, tokens of the call, fetch; oldest first

    def begin(self, pairs: Sequence[Encoded]) -> Run:
        """Put a batch behind the others. Call it when `fill` returned True."""
        self._runs.append(run := Run(pairs))
        return run

    def fill(self) -> bool:
        """Hand over as many calls as there is room for. Return whether another batch should be begun as well."""
        while not any(run.failed for run in self._runs) and self._has_room():
            if not self._runs:
                return True
            run = self._runs[-1]
            if run.calls is None and run.sees and self._under_way:
                return False  # the vision tower blocks, and would delay the answers of the batch before
            if not self._hand_over(run):
                return bool(self._under_way) and len(self._runs) < AT_ONCE
        return False

    def next_through(self) -> Run | None:
        """Wait for the oldest call. Return the batch that is finished then, or None."""
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
        """Score pairs while nothing else is under way, one call at a time. Nothing is tried twice."""
        run = Run(pairs)
        while not run.through and self._hand_over(run):
            while self._under_way:
                self._fetch()
        run.close()
        return run

    def _has_room(self) -> bool:
        return has_room([tokens for _, tokens, _ in self._under_way], self._ahead)

    def _hand_over(self, run: Run) -> bool:
        """Plan, pack and run the next call. Return False if there was none left, True also if it failed."""
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
        """Score the two halves of a failed batch, split by tokens. A single pair is not tried again."""
        pairs = run.pairs
        run.lost[:] = True
        if len(pairs) == 1:
            return
        ends = np.cumsum([len(pair) for pair in pairs])
        middle = min(int(np.searchsorted(ends, ends[-1] / 2)) + 1, len(pairs) - 1)
        for half in (slice(0, middle), slice(middle, len(pairs))):
            again = self.score(pairs[half])
            run.logits[half], run.lost[half] = again.logits, again.failed
