"""Seconds until the server is ready and has answered, first and second start, and the memory of serving at its peak.

    python benchmarks/start.py [--shape v2-m3] [--output benchmarks/results/start-cpu.json]

A random checkpoint of the shape is written as safetensors in the dtype in which such models are published (BGE's in
float32, Qwen3's in bfloat16; Qwen3's tokenizer has as many tokens as the published one), and converted to bfloat16.
From each, `jaxrank serve --dtype bfloat16` is started with an empty compilation cache, then REPEATS times with the
filled one. The first and the last of these servers score short documents, then more than a row of them, then one of the
longest pairs that they take. The first answer is that to two short documents; the seconds by stage are those of the
server's own log. Peak memory is VmHWM (Linux) of the server's process, in bytes and as a ratio to the
bfloat16 weights. Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from checkpoints import BGE_SHAPES, QWEN3_SHAPES, bge_checkpoint, grow_qwen_tokenizer, qwen3_checkpoint
from machine import finish, peak
from serve import serving, state

import jaxrank
from jaxrank import cli

AIM_MEMORY, AIM_START, AIM_ANSWER_S = 1.6, 0.5, 10.0
REPEATS = 3

REQUESTS = {
    "two short documents": ["hi", "The giant panda is a bear endemic to China."],
    "24 documents of 300 tokens": ["a b c " * 100] * 24,
    "the longest document": ["panda " * 9000],
}


def post(port: int, documents: list[str]) -> int:
    """The number of tokens that the server scored."""
    connection = HTTPConnection("127.0.0.1", port, timeout=600)
    body = json.dumps({"query": "what is panda?", "documents": documents}).encode()
    connection.request("POST", "/v1/rerank", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    answer = json.load(response)
    assert response.status == 200, answer
    return sum(result["meta_info"]["prompt_tokens"] for result in answer)


def processor_seconds(pid: int) -> float:
    """Of all cores, that the process has used so far: on a shared machine it says more than the clock."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def stages(log: Path) -> dict[str, Any]:
    """What the server's log says of its start."""
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    line = next(line for line in lines if line["message"].startswith("ready after"))
    return {name: line[name] for name in ("seconds", "programs_compiled", "programs_from_cache")}


def start(folder: Path, cache: Path, weights: int, requests: dict[str, list[str]]) -> dict[str, Any]:
    """One start and the requests."""
    begin = time.perf_counter()
    line = [str(folder), "--dtype", "bfloat16", "--compile-cache", str(cache), "--log-format", "json"]
    with serving(line, cache / "log") as (port, pid):
        result: dict[str, Any] = {"seconds_to_ready": round(time.perf_counter() - begin, 1)}
        post(port, REQUESTS["two short documents"])
        result["seconds_to_first_answer"] = round(time.perf_counter() - begin, 1)
        result["processor_seconds"] = round(processor_seconds(pid), 1)
        result["stages"] = stages(cache / "log")
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
    parser.add_argument("--shape", choices=[*BGE_SHAPES, *QWEN3_SHAPES], default="v2-m3", help="of a random checkpoint")
    parser.add_argument("--folders", nargs="+", choices=["published", "converted"], default=["published", "converted"])
    parser.add_argument("--start-only", action="store_true", help="nothing is scored but the first answer")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        published, converted = Path(scratch) / "published", Path(scratch) / "converted"
        if arguments.shape in QWEN3_SHAPES:
            # the prompt too, whose words would be letters otherwise: three times the published tokens
            prompt = (Path(jaxrank.__file__).parent / "text" / "templates" / "qwen3" / "official.jinja").read_text()
            qwen3_checkpoint(published, arguments.shape, [prompt, "what is panda?", *REQUESTS["two short documents"]])
            grow_qwen_tokenizer(published, 151_669)
        else:
            bge_checkpoint(published, arguments.shape)
        width = 2 if arguments.shape in QWEN3_SHAPES else 4
        weights = sum(path.stat().st_size for path in published.glob("*.safetensors")) * 2 // width
        cli.main(["convert", str(published), str(converted), "--dtype", "bfloat16", "--no-progress"])
        sources: dict[str, Any] = {}
        requests = {} if arguments.start_only else REQUESTS
        for folder in (Path(scratch) / name for name in arguments.folders):
            cache = Path(scratch) / f"cache of {folder.name}"
            cache.mkdir(mode=0o700)
            first = start(folder, cache, weights, requests)
            later = [start(folder, cache, weights, requests if i == REPEATS - 1 else {}) for i in range(REPEATS)]
            seconds = statistics.median(run["seconds_to_ready"] for run in later)
            ratio = round(seconds / first["seconds_to_ready"], 3)
            answer = statistics.median(run["seconds_to_first_answer"] for run in later)
            sources[folder.name] = {"first": first, "later": later, "later_to_first": ratio}
            peaks = [run["peak_to_weights"] for run in (first, later[-1])]
            print(
                f"{folder.name}: ready after {first['seconds_to_ready']} s, then {seconds} s "
                f"({ratio}; aim {AIM_START}), first answer after {answer} s "
                f"(aim {AIM_ANSWER_S}); peak memory {peaks[0]} and {peaks[1]} times the weights "
                f"(aim {AIM_MEMORY})"
            )
    result = {"benchmark": "start", "shape": arguments.shape, "weights_bytes": weights, "load_average": os.getloadavg()}
    finish({**result, **sources}, arguments.output)


if __name__ == "__main__":
    main()
