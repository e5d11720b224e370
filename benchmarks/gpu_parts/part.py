"""What every part does: its rows are saved one by one, a call that hangs ends it, and work on a device is timed."""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write(path: Path, result: dict[str, Any]) -> None:
    """As JSON, at once or not at all: a part may be killed at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(beside, path)


def read(path: Path) -> dict[str, Any]:
    """What `write` wrote; nothing if it never did."""
    return json.loads(path.read_text()) if path.exists() else {}


class Part:
    """The rows of a part, in FOLDER/NAME.json as soon as they are there.

    smoke: toy sizes. seconds: what the part may take. bodies: the attention bodies to measure; None for all that run
    on this device.
    """

    def __init__(self, name: str, folder: Path, smoke: bool, seconds: float, bodies: list[str] | None = None):
        self.name = name
        self.folder = folder
        self.smoke = smoke
        self.rows: list[dict[str, Any]] = []
        self._bodies = bodies
        self._end = time.perf_counter() + seconds

    @property
    def left(self) -> float:
        """Seconds until the part is ended from outside."""
        return self._end - time.perf_counter()

    @property
    def bodies(self) -> list[str]:
        """The attention bodies to measure, the newest last: should it take the process with it, the rest is saved."""
        if self._bodies is not None:
            return self._bodies
        import jax

        from jaxrank.kernels import IMPLEMENTATIONS

        order = ["dense", "tiled", "tpu", "triton", "mosaic"]
        runnable = [name for name, one in IMPLEMENTATIONS.items() if one.platform in (None, jax.default_backend())]
        return sorted(set(runnable) & set(order), key=order.index)

    def save(self, state: str = "running", doing: dict[str, Any] | None = None) -> None:
        write(self.folder / f"{self.name}.json", {"part": self.name, "state": state, "doing": doing, "rows": self.rows})

    @contextmanager
    def row(self, *, hangs_after: float = 90.0, **labels: Any) -> Iterator[dict[str, Any]]:
        """A row to fill in. An exception becomes the row's "error", and the part goes on.

        After `hangs_after` seconds the process ends with a traceback: a kernel that waits for ever must not take the
        time of the rest. The labels of the row are in the JSON by then, as what was being done.
        """
        row: dict[str, Any] = dict(labels)
        self.save(doing=labels)
        # toy sizes run where others run besides: what hangs there is left to the time limit of the part
        if not self.smoke:
            faulthandler.dump_traceback_later(hangs_after, exit=True)
        try:
            yield row
        except Exception as error:
            traceback.print_exc()
            row["error"] = f"{type(error).__name__}: {error}"[:500]
            del error
            gc.collect()
        finally:
            faulthandler.cancel_dump_traceback_later()
        self.rows.append(row)
        self.save()
        print(self.name, *(f"{key}={value}" for key, value in row.items() if key != "kernels"), flush=True)


def seconds_a_call(call: Callable[[], Any], turns: int, calls: int = 1) -> float:
    """Median over `turns` of what one of `calls` calls takes that are handed over one behind the other and waited for
    together, after one warm-up: where a call is short, the host's share is hidden."""
    import jax

    jax.block_until_ready(call())
    taken = []
    for _ in range(turns):
        start = time.perf_counter()
        last = None
        for _ in range(calls):
            last = call()
        jax.block_until_ready(last)
        taken.append((time.perf_counter() - start) / calls)
    return statistics.median(taken)
