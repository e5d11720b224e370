"""How the time of a start is spent."""

from __future__ import annotations

import time


class Stages(dict[str, float]):
    """Seconds by stage, in the order in which the stages came.

    The clock is time.perf_counter(). It runs from `begin`.
    """

    def __init__(self, begin: float | None = None) -> None:
        super().__init__()
        self.since = time.perf_counter() if begin is None else begin

    def lap(self, name: str | None) -> None:
        """Count the time since the last lap for the stage `name`.

        A stage that comes again adds up. With None the time counts for no stage.
        """
        now = time.perf_counter()
        if name is not None:
            self[name] = self.get(name, 0.0) + now - self.since
        self.since = now

    @property
    def total(self) -> float:
        return sum(self.values())

    def rounded(self) -> dict[str, float]:
        """Return the seconds rounded to milliseconds, for machines."""
        return {name: round(seconds, 3) for name, seconds in self.items()}

    def __str__(self) -> str:
        return f"{self.total:.1f} s ({', '.join(f'{name} {seconds:.1f}' for name, seconds in self.items())})"
