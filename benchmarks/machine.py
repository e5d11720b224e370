"""What a benchmark's figures were measured on, for the JSON that is committed beside them."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

LIBRARIES = ("jax", "flax", "numpy", "torch", "transformers", "sentence-transformers", "tokenizers")


def median_seconds(work: Callable[[], Any], turns: int) -> float:
    """Of `work`, with its result waited for, after one warm-up."""
    jax.block_until_ready(work())
    taken = []
    for _ in range(turns):
        start = time.perf_counter()
        jax.block_until_ready(work())
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def facts() -> dict[str, Any]:
    """Date, processor, cores, accelerator and versions."""
    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        "versions": versions,
    }


def save(result: dict[str, Any], output: Path | None) -> dict[str, Any]:
    """The result with the machine's facts, and in a file if one is named: so far, if the run is not over."""
    result = {**result, **facts()}
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=1) + "\n")
    return result


def finish(result: dict[str, Any], output: Path | None) -> None:
    """As save, and the result as the last line of output."""
    print(json.dumps(save(result, output)))
