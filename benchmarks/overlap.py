"""How busy the scheduler keeps a device that works by itself, while it chooses, plans and packs what comes next.

    python benchmarks/overlap.py [--seconds 8] [--output benchmarks/results/overlap.json]

The device is a clock: a row of 16,384 tokens takes 20 ms, a shorter one less, from when it was handed over or the one
before ended, and who fetches it sleeps until then. Begins and ends are noted. Scheduler, planning and packing are the
real ones, with the layouts of the kernels for GPUs. Clients are tasks that ask again PAUSE_S after their answer, which
stands for the network, JSON and tokenising. Three ways:

one at a time      a row is packed when the one before is fetched, as on CPU
within batches     the rows of a batch overlap, and the next batch is chosen when all of the one before is fetched
across batches     the next batch is handed over while the last row of the one before runs, as on accelerators

busy: the share of time in which the device had a row, without the first and last rows. dry: the share of rows before
which it had none. Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from machine import finish

from jaxrank import Reranker
from jaxrank.runtime.calls import Call
from jaxrank.runtime.packing import pack, slots
from jaxrank.runtime.scorer import Scorer
from jaxrank.server.scheduler import Scheduler
from jaxrank.types import Encoded, Packed

ROW_TOKENS, ROW_S, BATCH_ROWS = 16_384, 0.020, 2
PAUSE_S = 0.005
LOADS: dict[str, tuple[int, int, int, int]] = {
    "paragraphs": (64, 16, 60, 300),
    "sentences": (64, 64, 16, 48),
    "few": (64, 4, 60, 200),
    "one client": (1, 16, 60, 300),
}
"""Clients, documents of a request, and least and most tokens of a pair."""

ENDS = 5
"""Rows that do not count, at the begin and at the end."""


class Device:
    """Runs rows one after the other. log: begin and end of each, by time.perf_counter()."""

    def __init__(self, row_s: float) -> None:
        self.row_s = row_s
        self.log: list[tuple[float, float]] = []

    def __call__(self, rows: Sequence[Packed]) -> list[Result]:
        """Hand a row over, as a compiled program does."""
        (row,) = rows
        begin = max(time.perf_counter(), self.log[-1][1] if self.log else 0.0)
        end = begin + self.row_s * len(row.tokens) / ROW_TOKENS
        self.log.append((begin, end))
        return [Result(slots(len(row.tokens)), end)]


@dataclass
class Result:
    """An array that is there when the device is done with it."""

    size: int
    end: float

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        time.sleep(max(self.end - time.perf_counter(), 0.0))  # as JAX waits, without Python's lock
        return np.zeros(self.size, np.float32)


def within_batches(scorer: Scorer) -> Callable[[Sequence[Encoded]], Iterator[Call]]:
    """All rows of a batch as one call, which is planned and packed when it is waited for."""

    def calls(pairs: Sequence[Encoded]) -> Iterator[Call]:
        yield Call(ROW_TOKENS, lambda: lambda: scorer.rows(pairs))

    return calls


def make_requests(documents: int, least: int, most: int) -> Iterator[list[Encoded]]:
    """Pairs of random lengths, over and over."""
    random = np.random.default_rng(0)
    made = [
        [Encoded(np.full(length, 5, np.int32)) for length in random.integers(least, most + 1, documents).tolist()]
        for _ in range(256)
    ]
    return itertools.cycle(made)


async def load(scheduler: Scheduler, clients: int, requests: Iterator[list[Encoded]], seconds: float) -> list[float]:
    """The seconds of every answer."""
    taken: list[float] = []
    end = time.perf_counter() + seconds

    async def client() -> None:
        while (asked := time.perf_counter()) < end:
            await scheduler.submit(next(requests))
            taken.append(time.perf_counter() - asked)
            await asyncio.sleep(PAUSE_S)

    scheduler.start()
    await asyncio.gather(*[client() for _ in range(clients)])
    await scheduler.close()
    return taken


def busy(log: Sequence[tuple[float, float]]) -> dict[str, float]:
    """How often and how long the device had no row."""
    rows = log[ENDS:-ENDS]
    gaps = np.array([after[0] - before[1] for before, after in itertools.pairwise(rows)])
    share = 1 - gaps.sum() / (rows[-1][1] - rows[0][0])
    longest_ms = round(float(gaps.max()) * 1e3, 1)
    return {"busy": round(float(share), 4), "dry": round(float((gaps > 0).mean()), 3), "longest_gap_ms": longest_ms}


def measure(scorer: Scorer, name: str, way: str, seconds: float, row_s: float) -> dict[str, Any]:
    """One row of the table."""
    clients, *sizes = LOADS[name]
    device = Device(row_s)
    scorer.programs.clear()
    scorer.compile = lambda sample: device
    scorer._pack = lambda pairs, tokens, features: pack(pairs, tokens, implementation="triton")
    scorer.in_flight = 1 if way == "one at a time" else 2
    calls = within_batches(scorer) if way == "within batches" else scorer.calls
    scheduler = Scheduler(
        calls,
        ahead=scorer.ahead if way == "across batches" else 0,
        batch_tokens=BATCH_ROWS * ROW_TOKENS,
        max_tokens=2**30,
        max_requests=10**6,
    )
    taken = asyncio.run(load(scheduler, clients, make_requests(*sizes), seconds))
    p50, p99 = (np.quantile(taken, [0.5, 0.99]) * 1e3).round(1).tolist()
    return {
        "load": name,
        "clients": clients,
        "way": way,
        **busy(device.log),
        "rows": len(device.log),
        "requests_per_s": round(len(taken) / seconds, 1),
        "p50_ms": p50,
        "p99_ms": p99,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each row of the table")
    parser.add_argument("--row-ms", type=float, default=ROW_S * 1e3, help=f"of {ROW_TOKENS:,} tokens")
    parser.add_argument("--loads", nargs="+", choices=list(LOADS), default=list(LOADS))
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    scorer = Reranker.from_pretrained(row_tokens=ROW_TOKENS, compile_cache=None).scorer
    rows: list[dict[str, Any]] = []
    for name in args.loads:
        for way in ("one at a time", "within batches", "across batches"):
            rows.append(measure(scorer, name, way, args.seconds, args.row_ms / 1e3))
            print(rows[-1], flush=True)
    settings = {"row_tokens": ROW_TOKENS, "row_ms": args.row_ms, "batch_rows": BATCH_ROWS}
    finish({**settings, "load_average": os.getloadavg()[0], "rows": rows}, args.output)


if __name__ == "__main__":
    main()
