"""A profile of JAX reduced to a table of kernels."""

from __future__ import annotations

import gzip
import json
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

LONGEST = 160
"""Characters of a kernel's name that are kept."""


def kernels(call: Callable[[], Any], most: int = 60) -> dict[str, Any]:
    """Of one call, which must have run before: kernels by time, and the sum.

    microseconds: of all kernels. span: from the first one's start to the last one's end. table: (name, how often,
    microseconds) of the `most` longest.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(call())
        [path] = Path(folder).rglob("*.trace.json.gz")
        return reduced(json.loads(gzip.decompress(path.read_bytes()))["traceEvents"], most)


def reduced(events: list[dict[str, Any]], most: int) -> dict[str, Any]:
    """The table of a trace's events: those of a GPU's streams, or where there is no GPU of XLA's own threads."""
    processes, threads = {}, {}
    for event in events:
        if event.get("ph") == "M" and event["name"] == "process_name":
            processes[event["pid"]] = event["args"]["name"]
        elif event.get("ph") == "M" and event["name"] == "thread_name":
            threads[event["pid"], event["tid"]] = event["args"]["name"]
    on_gpu = any("/device:GPU" in name for name in processes.values())

    def counts(event: dict[str, Any]) -> bool:
        # a GPU's process has further lines, that tell the same time again by operation and by module
        process = processes.get(event["pid"], "")
        thread = threads.get((event["pid"], event["tid"]), "")
        return "/device:GPU" in process and thread.startswith("Stream") if on_gpu else thread.startswith("tf_XLA")

    times, often = defaultdict(float), defaultdict(int)
    starts, ends = [], []
    for event in events:
        if event.get("ph") == "X" and counts(event):
            name = event["name"][:LONGEST]
            times[name] += event["dur"]
            often[name] += 1
            starts.append(event["ts"])
            ends.append(event["ts"] + event["dur"])
    table = [(name, often[name], round(times[name], 2)) for name in sorted(times, key=lambda name: -times[name])]
    return {
        "count": sum(often.values()),
        "microseconds": round(sum(times.values()), 1),
        "span": round(max(ends) - min(starts), 1) if ends else 0.0,
        "table": table[:most],
        **({} if table else {"none in": sorted({*processes.values(), *threads.values()})}),
    }
