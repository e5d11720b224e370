"""What a benchmark's figures were measured on, for the JSON that is committed beside them."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

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


def peak(pid: int) -> int:
    """The most memory that the process has had so far, in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def chained(f: Callable[..., jax.Array], times: int) -> Callable[..., jax.Array]:
    """What calls f `times` times on the same arguments, each call after the one before, and returns the last result:
    as one program, it has the time of f in it and next to nothing of a launch."""

    def many(*arguments: jax.Array) -> jax.Array:
        def again(_: jax.Array, carry: Any) -> Any:
            # the barrier makes the arguments of the next call wait for this one's result, so that none is left out
            return jax.lax.optimization_barrier((carry[0], f(*carry[0])))

        kind = jax.eval_shape(f, *arguments)
        return jax.lax.fori_loop(0, times, again, (arguments, jnp.zeros(kind.shape, kind.dtype)))[1]

    return many


def versions(names: Sequence[str]) -> dict[str, str | None]:
    """Of installed packages; None for those that are not."""
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def facts() -> dict[str, Any]:
    """Date, processor, cores, accelerator and versions."""
    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        "versions": versions(LIBRARIES),
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
