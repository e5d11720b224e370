"""Seconds until the server is ready, first and second start, and the memory that serving takes at its peak.

    python benchmarks/start.py [--shape v2-m3] [--output benchmarks/results/start-cpu.json]

A random checkpoint of the shape is written as float32 safetensors, as models are published, and converted to bfloat16.
From each, `jaxrank serve --dtype bfloat16` is started with an empty compilation cache, then REPEATS times with the
filled one. The first and the last of these servers score short documents, then more than a row of them, then one of the
longest pairs that they take. Peak memory is VmHWM (Linux) of the server's process, in bytes and as a ratio to the
bfloat16 weights. Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from checkpoints import BGE_SHAPES, bge_checkpoint
from machine import finish
from serve import serving, state

from jaxrank import cli

AIM_MEMORY, AIM_START = 1.6, 0.5
REPEATS = 3

REQUESTS = {
    "two short documents": ["hi", "The giant panda is a bear endemic to China."],
    "24 documents of 300 tokens": ["a b c " * 100] * 24,
    "the longest document": ["panda " * 9000],
}


def peak(pid: int) -> int:
    """The most memory that the process has had so far, in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def post(port: int, documents: list[str]) -> int:
    """The number of tokens that the server scored."""
    connection = HTTPConnection("127.0.0.1", port, timeout=600)
    body = json.dumps({"query": "what is panda?", "documents": documents}).encode()
    connection.request("POST", "/v1/rerank", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    answer = json.load(response)
    assert response.status == 200, answer
    return sum(result["meta_info"]["prompt_tokens"] for result in answer)


def start(folder: Path, cache: Path, weights: int, requests: dict[str, list[str]]) -> dict[str, Any]:
    """One start and the requests."""
    begin = time.perf_counter()
    with serving([str(folder), "--dtype", "bfloat16", "--compile-cache", str(cache)], cache / "log") as (port, pid):
        result: dict[str, Any] = {"seconds_to_ready": round(time.perf_counter() - begin, 1)}
        memory = {"ready": peak(pid)}
        for name, documents in requests.items():
            result[f"tokens: {name}"] = post(port, documents)
            memory[name] = peak(pid)
        result["peak_bytes"] = memory
        result["peak_to_weights"] = round(peak(pid) / weights, 3)
        result["compilations_after_ready"] = state(port)["compilations_after_ready"]
    return result


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", choices=list(BGE_SHAPES), default="v2-m3", help="of a random checkpoint")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        published, converted = Path(scratch) / "published", Path(scratch) / "converted"
        bge_checkpoint(published, arguments.shape)
        weights = (published / "model.safetensors").stat().st_size // 2
        cli.main(["convert", str(published), str(converted), "--dtype", "bfloat16", "--no-progress"])
        sources: dict[str, Any] = {}
        for folder in (published, converted):
            cache = Path(scratch) / f"cache of {folder.name}"
            cache.mkdir(mode=0o700)
            first = start(folder, cache, weights, REQUESTS)
            later = [start(folder, cache, weights, REQUESTS if i == REPEATS - 1 else {}) for i in range(REPEATS)]
            seconds = statistics.median(run["seconds_to_ready"] for run in later)
            ratio = round(seconds / first["seconds_to_ready"], 3)
            sources[folder.name] = {"first": first, "later": later, "later_to_first": ratio}
            peaks = [run["peak_to_weights"] for run in (first, later[-1])]
            print(
                f"{folder.name}: ready after {first['seconds_to_ready']} s, then {seconds} s "
                f"({ratio}; aim {AIM_START}); peak memory {peaks[0]} and {peaks[1]} times the weights "
                f"(aim {AIM_MEMORY})"
            )
    finish({"benchmark": "start", "shape": arguments.shape, "weights_bytes": weights, **sources}, arguments.output)


if __name__ == "__main__":
    main()
