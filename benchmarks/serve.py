"""Throughput and latency over HTTP with 1, 8 and 64 clients, and what share that is of offline throughput.

    python benchmarks/serve.py --xquad DIR [--shape base | --model FOLDER] [--output benchmarks/results/serve-cpu.json]

Offline is Reranker.predict on the pairs of all requests at once, tokenising included, in this process. HTTP is
`jaxrank serve` in a process of its own. Both get the same requests: an English XQuAD question with its own paragraph
and others. Clients are jaxrank.bench's closed loop. The first answers of a stint, one a client, are its warm-up; the
last ones, after new requests have ceased, do not count either. An offline pass stands before every stint and after the
last, and the share is tokens/s over HTTP by the median pass's. Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
from checkpoints import BGE_SHAPES, bge_checkpoint
from machine import finish
from score import xquad_pairs

from jaxrank import Reranker
from jaxrank.bench import Outcome, Query, Target, closed_loop

AIM = 0.85
"""The share of offline throughput that 64 clients should get."""


@dataclass
class Stint:
    """What one number of clients got, all turns together. seconds: between the first and last counted answers."""

    clients: int
    counted: list[Outcome] = field(default_factory=list[Outcome])
    others: list[Outcome] = field(default_factory=list[Outcome])
    bodies: list[tuple[int, bytes]] = field(default_factory=list[tuple[int, bytes]])
    seconds: float = 0.0
    client_cpu: list[float] = field(default_factory=list[float])


def make_requests(xquad: Path, count: int, documents: int) -> list[Query]:
    """`count` questions spread over XQuAD, each with its own paragraph and others from anywhere, in random order."""
    random = np.random.default_rng(0)
    paragraphs = list(dict.fromkeys(paragraph for _, paragraph in xquad_pairs(xquad, 1190)))  # all there are
    requests: list[Query] = []
    for question, own in xquad_pairs(xquad, count):
        drawn = [paragraphs[i] for i in random.permutation(len(paragraphs))[:documents].tolist()]
        if own not in drawn:
            drawn[random.integers(documents)] = own
        requests.append(Query(question, drawn))
    return requests


def launch(arguments: Sequence[str], log: Path) -> tuple[subprocess.Popen[bytes], int]:
    """`jaxrank serve` as a process that writes to `log`, and its port, once it is ready."""
    command = [sys.executable, "-m", "jaxrank", "serve", *arguments, "--port", "0"]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out)
    try:
        port = 0
        while not (port and state(port)["ready"]):
            if process.poll() is not None:
                raise SystemExit(f"the server ended with status {process.returncode}:\n{log.read_text()[-2000:]}")
            time.sleep(0.2)
            found = re.search(r"listening on \S+ port (\d+)", log.read_text())
            port = int(found[1]) if found else 0
    except BaseException:
        process.kill()
        raise
    return process, port


@contextlib.contextmanager
def serving(arguments: Sequence[str], log: Path) -> Iterator[tuple[int, int]]:
    """`launch`, as the port and the process id; the server is stopped in the end."""
    process, port = launch(arguments, log)
    with process:
        try:
            yield port, process.pid
        finally:
            process.terminate()


def state(port: int) -> dict[str, Any]:
    """What the server's GET /ready answers, with status 503 too."""
    connection = HTTPConnection("127.0.0.1", port, timeout=30)
    with contextlib.closing(connection):
        connection.request("GET", "/ready")
        return json.load(connection.getresponse())


def drive(target: Target, bodies: Sequence[bytes], stint: Stint, count: int) -> None:
    """Let the clients run until `count` answers have come after the warm-up's, and add them to the stint."""

    def keep(which: int, status: int, body: bytes) -> None:
        if status == 200:
            stint.bodies.append((which, body))

    cpu, start = time.process_time(), time.perf_counter()
    first, last = stint.clients, stint.clients + count
    outcomes = closed_loop(target, bodies, stint.clients, requests=last + stint.clients, observe=keep)
    stint.client_cpu.append((time.process_time() - cpu) / (time.perf_counter() - start))
    stint.counted += outcomes[first:last]
    stint.others += outcomes[:first] + outcomes[last:]
    stint.seconds += outcomes[last - 1].ended - outcomes[first - 1].ended


def row(stint: Stint, tokens: np.ndarray, logits: np.ndarray, offline: float) -> dict[str, Any]:
    """One row of the table. tokens, logits: [request, document], as they are offline; offline: tokens a second."""
    good = [answer for answer in stint.counted if answer.status == 200]
    every = stint.counted + stint.others
    difference = 0.0
    for which, body in stint.bodies:
        scores = {result["index"]: result["score"] for result in json.loads(body)}
        ours = [scores[i] for i in range(len(scores))]
        difference = max(difference, float(np.abs(logits[which] - ours).max()))
    rate = sum(int(tokens[answer.which].sum()) for answer in good) / stint.seconds
    percentiles = np.percentile([answer.seconds * 1e3 for answer in stint.counted], (50, 95, 99)).tolist()
    return {
        "clients": stint.clients,
        "requests": len(stint.counted),
        "errors": sum(answer.status != 200 or bool(answer.wrong) for answer in every),
        "requests_per_s": round(len(good) / stint.seconds, 2),
        "pairs_per_s": round(len(good) * tokens.shape[1] / stint.seconds, 1),
        "tokens_per_s": round(rate),
        **{f"p{p}_ms": round(ms, 1) for p, ms in zip((50, 95, 99), percentiles, strict=True)},
        "share_of_offline": round(rate / offline, 3),
        "client_cores": round(statistics.mean(stint.client_cpu), 3),
        "largest_score_difference": difference,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--xquad", type=Path, required=True, help="folder with XQuAD's en.json")
    parser.add_argument("--shape", choices=list(BGE_SHAPES), default="base", help="of a random checkpoint")
    parser.add_argument("--model", help="a folder or Hugging Face id instead of a shape; builtin: the built-in model")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--documents", type=int, default=4, help="documents in a request")
    parser.add_argument("--requests", type=int, default=32, help="different requests; all of them are one offline pass")
    parser.add_argument("--count", type=int, default=64, help="answers counted in a stint, but at least one a client")
    parser.add_argument("--turns", type=int, default=2, help="stints of every number of clients")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args(argv)
    requests = make_requests(arguments.xquad, arguments.requests, arguments.documents)
    pairs = [(one.query, document) for one in requests for document in one.documents]
    stints = [Stint(clients) for clients in arguments.clients]
    passes: list[float] = []

    with tempfile.TemporaryDirectory() as scratch:
        model: str | None = None if arguments.model == "builtin" else arguments.model or f"{scratch}/model"
        if not arguments.model:
            bge_checkpoint(Path(f"{scratch}/model"), arguments.shape)
        reranker = Reranker.from_pretrained(model, dtype=arguments.dtype)
        reranker.warm_up()
        shape = (len(requests), arguments.documents)
        logits = reranker.predict(pairs, raw=True, progress=False).reshape(shape)  # the warm-up of offline, too
        tokens = np.array([len(pair) for pair in reranker.encode_pairs(pairs)]).reshape(shape)

        def offline() -> None:
            start = time.perf_counter()
            reranker.predict(pairs, raw=True, progress=False)
            passes.append(time.perf_counter() - start)

        options = [*([model] if model else []), "--dtype", arguments.dtype]
        with serving(options, Path(scratch) / "server.log") as (port, _):
            target = Target(f"http://127.0.0.1:{port}", timeout_s=600)
            bodies = [target.body(one) for one in requests]
            for stint in stints * arguments.turns:
                offline()
                drive(target, bodies, stint, max(arguments.count, stint.clients))
            offline()
            compilations = state(port)["compilations_after_ready"]

    seconds = statistics.median(passes)
    rate = float(tokens.sum()) / seconds
    rows = [row(stint, tokens, logits, rate) for stint in stints]
    print(
        f"\noffline: {len(pairs) / seconds:.1f} pairs/s, {rate:.0f} tokens/s; compilations after ready: {compilations}"
    )
    names = list(rows[0])
    print(*(f"{name.removesuffix('_of_offline'):>14}" for name in names[:-1]))
    for each in rows:
        print(*(f"{each[name]:>14}" for name in names[:-1]))
    print(f"share: tokens/s by offline tokens/s; 1.00 if HTTP, JSON, queue and clients cost nothing. Aim at 64: {AIM}")
    result = {
        "benchmark": "serve",
        "model": arguments.model or arguments.shape,
        "dtype": arguments.dtype,
        "documents_per_request": arguments.documents,
        "tokens_per_pair": {"mean": round(float(tokens.mean()), 1), "min": int(tokens.min()), "max": int(tokens.max())},
        "offline_tokens_per_s": round(rate),
        "offline_pairs_per_s": round(len(pairs) / seconds, 1),
        "offline_seconds": [round(one, 3) for one in passes],
        "compilations_after_ready": compilations,
        "score_range": float(np.ptp(logits)),
        "rows": rows,
    }
    finish(result, arguments.output)
    if compilations or any(each["errors"] for each in rows):
        raise SystemExit("requests failed, or programs were compiled after the server was ready: see the line above")


if __name__ == "__main__":
    main()
