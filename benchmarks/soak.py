"""A server under more load than it can take, then among all kinds of clients for long, then killed in two ways.

    python benchmarks/soak.py [--overload-s 300] [--soak-s 1200] [--output benchmarks/results/soak-cpu.json]

1. Overload: latency unloaded (one client) and capacity (8 clients), then an open loop at three times the capacity,
   then latency again. Accepted requests may take four times the unloaded p99 and the queue's bound in seconds
   (--queue-seconds, the server's --max-queue-seconds); refusals are to come in 20 ms; memory stays within 5 %. The
   number of requests that the server says it answered 200 must be the number that the clients got.
2. Soak: every dialect with requests of 1 to 200 documents, while others hang up on what they asked, send and read by
   drops, or send what is no request. Memory's slope is by least squares over the last two thirds; when all have left,
   queue, threads, files and connections must be as before.
3. kill -9 under load, and a new start from the caches.
4. kill -TERM under load: everybody who was let in is answered.

Everything runs on the same machine and shares its cores. Ends in one JSON line, and with status 1 if anything of this
does not hold.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import re
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from machine import finish
from serve import launch

from jaxrank import bench
from jaxrank.bench import Client, Outcome, Target

PARTS = ("overload", "soak", "endings")

PROBLEMS_KEPT = 20


@dataclass
class Running:
    """A server's process."""

    process: subprocess.Popen[bytes]
    port: int
    ready_s: float
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def metrics(self) -> dict[str, float]:
        """All values of /metrics by name and labels."""
        with contextlib.closing(HTTPConnection("127.0.0.1", self.port, timeout=30)) as connection:
            connection.request("GET", "/metrics")
            text = connection.getresponse().read().decode()
        pairs = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    def answered(self) -> float:
        """Requests answered 200 that scored something."""
        return sum(
            value
            for name, value in self.metrics().items()
            if re.fullmatch(r'jaxrank_requests_total\{dialect="(?!none).*status="200"\}', name)
        )

    def usage(self) -> dict[str, float]:
        """Memory in MB, and counts."""
        process = psutil.Process(self.process.pid)
        return {
            "rss_mb": process.memory_info().rss / 1e6,
            "threads": process.num_threads(),
            "files": process.num_fds(),
        }


def start(options: Sequence[str], log: Path) -> Running:
    """`jaxrank serve`, ready."""
    began = time.perf_counter()
    process, port = launch(options, log)
    return Running(process, port, time.perf_counter() - began, log)


@contextlib.contextmanager
def sampled(running: Running, every_s: float) -> Iterator[list[tuple[float, float]]]:
    """Seconds and memory in MB, noted as long as the block runs."""
    samples: list[tuple[float, float]] = []
    over = threading.Event()
    began = time.perf_counter()

    def note() -> None:
        while not over.wait(every_s):
            samples.append((time.perf_counter() - began, running.usage()["rss_mb"]))

    thread = threading.Thread(target=note, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        over.set()
        thread.join()


def overload(running: Running, seconds: float, queue_s: float) -> dict[str, Any]:
    """Part 1."""
    target = Target(running.url)
    queries = bench.made_up(64, 10, 100)
    bodies = [target.body(query) for query in queries]
    documents = [len(query.documents) for query in queries]

    def measure(run: Callable[[], list[Outcome]]) -> tuple[bench.Report, float]:
        before = running.answered()
        result = bench.report(run(), documents)
        return result, running.answered() - before

    def tokens() -> float:
        return running.metrics()["jaxrank_pair_tokens_total"]

    before, _ = measure(lambda: bench.closed_loop(target, bodies, 1, duration_s=20))
    capacity, _ = measure(lambda: bench.closed_loop(target, bodies, 8, duration_s=20))
    rate, scored = 3 * capacity.requests_per_s, tokens()
    print(f"{capacity.requests_per_s} requests/s; {rate:.0f} requests/s from here on", flush=True)
    with sampled(running, 1.0) as samples:
        loaded, counted = measure(
            lambda: bench.open_loop(target, bodies, rate, connections=512, duration_s=seconds)
        )  # fmt: skip
    tokens_per_s = (tokens() - scored) / loaded.seconds
    after, _ = measure(lambda: bench.closed_loop(target, bodies, 1, duration_s=20))
    assert before.latency_ms
    assert loaded.latency_ms
    assert loaded.refusal_ms
    assert after.latency_ms
    bound_ms = 4 * before.latency_ms[2] + queue_s * 1e3
    settled = [memory for at, memory in samples if at > seconds / 5]
    return {
        "unloaded": asdict(before),
        "capacity": asdict(capacity),
        "tokens_per_s_under_load": round(tokens_per_s),
        "queue_seconds": queue_s,
        "rate": round(rate, 1),
        "loaded": asdict(loaded),
        "latency_bound_ms": round(bound_ms),
        "answered_by_the_servers_count": counted,
        "rss_mb": {"least": round(min(settled)), "most": round(max(settled))},
        "afterwards": asdict(after),
        "holds": {
            "p99 of the accepted": loaded.latency_ms[2] <= bound_ms,
            "refusals in 20 ms at the median": loaded.refusal_ms[0] < 20,
            "refusals say when to come back": loaded.without_retry_after == 0,
            "memory within 5 %": max(settled) <= 1.05 * min(settled),
            "latency back to normal": after.latency_ms[0] <= 1.3 * before.latency_ms[0],
            "everybody answered, and once": loaded.failed == 0 and counted == loaded.answered,
        },
    }


@dataclass
class Tally:
    """What the clients of the soak saw. wrong: what must not be, the first of each kind in words."""

    counts: Counter[str] = field(default_factory=Counter[str])
    wrong: list[str] = field(default_factory=list[str])
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, kind: str, wrong: str = "") -> None:
        with self.lock:
            self.counts[kind] += 1
            if wrong and len(self.wrong) < PROBLEMS_KEPT:
                self.wrong.append(f"{kind}: {wrong}")


def soak(running: Running, seconds: float) -> dict[str, Any]:
    """Part 2."""
    tally, over = Tally(), threading.Event()
    target = Target(running.url)  # large bodies by many clients fill the server's pools, whose threads then stay
    large = [target.body(query) for query in bench.made_up(4, 100, 1500)]
    bench.closed_loop(target, large, 16, duration_s=5)
    before, ticks = running.usage(), running.metrics()
    kinds = [lambda d=dialect: _good(running, d, tally, over) for dialect in bench.PATHS]
    kinds += [lambda work=work: work(running, tally, over) for work in (_leaver, _leaver, _dripper, _slow_reader, _bad)]
    threads = [threading.Thread(target=work, daemon=True) for work in kinds]
    with sampled(running, 2.0) as samples:
        for thread in threads:
            thread.start()
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            time.sleep(min(60.0, max(0.0, until - time.perf_counter())))
            print(f"{seconds - (until - time.perf_counter()):.0f} s: {dict(tally.counts)}", flush=True)
        over.set()
        for thread in threads:
            thread.join(120)
    stuck = sum(thread.is_alive() for thread in threads)
    time.sleep(8.0)  # idle connections are closed after 5 s
    after, metrics = running.usage(), running.metrics()
    at, memory = np.array([sample for sample in samples if sample[0] > seconds / 3]).T
    slope, offset = np.polyfit(at, memory, 1).tolist()
    noise = float(np.std(memory - slope * at - offset))
    late = {
        bound: int(metrics[name] - ticks[name])
        for bound in ("0.02", "0.05", "0.1", "+Inf")
        for name in [f'jaxrank_event_loop_stall_seconds_bucket{{le="{bound}"}}']
    }
    log = running.log.read_text()
    return {
        "seconds": seconds,
        "requests": dict(sorted(tally.counts.items())),
        "wrong": tally.wrong,
        "rss_mb": {"first": round(samples[0][1]), "last": round(samples[-1][1])},
        "rss_slope_mb_per_hour": round(slope * 3600, 1),
        "rss_noise_mb": round(noise, 1),
        "before": before,
        "after": after,
        "event_loop_ticks_late_by_at_most_s": late,
        "holds": {
            "nothing wrong": not tally.wrong,
            "no client stuck": stuck == 0,
            "queue empty": metrics["jaxrank_queue_requests"] == 0 and metrics["jaxrank_queue_tokens"] == 0,
            "threads as before": after["threads"] <= before["threads"] + 2,
            "files as before": after["files"] <= before["files"] + 2,
            "memory's slope within noise": slope * float(at[-1] - at[0]) < max(2 * noise, 0.02 * float(memory[0])),
            "no tracebacks in the log": "Traceback" not in log and "never retrieved" not in log,
        },
    }


def _good(running: Running, dialect: str, tally: Tally, over: threading.Event) -> None:
    """Asks for rankings of all sizes, and pauses."""
    draw = random.Random(dialect)
    target = Target(running.url, dialect)
    sizes = [(1, 300), (3, 20), (10, 100), (30, 50), (100, 40), (200, 8)]
    queries = [bench.made_up(1, documents, words, seed=n)[0] for n, (documents, words) in enumerate(sizes * 4)]
    with contextlib.closing(Client(target, [target.body(query) for query in queries])) as client:
        while not over.wait(draw.expovariate(1.0)):
            outcome = client.ask(draw.randrange(len(queries)))
            wrong = f"{outcome.status} {outcome.wrong}" if outcome.kind == "failed" else ""
            tally.add("refused" if outcome.kind == "refused" else f"ranked, {dialect}", wrong)


def _leaver(running: Running, tally: Tally, over: threading.Event) -> None:
    """Asks and hangs up before the answer, at any moment."""
    draw = random.Random(1)
    body = Target(running.url).body(bench.made_up(1, 60, 60)[0])
    message = _message("/v1/rerank", body)
    while not over.wait(draw.expovariate(1.0)):
        with socket.create_connection(("127.0.0.1", running.port), 30) as connection:
            connection.sendall(message[: draw.choice([20, len(message) // 2, len(message), len(message)])])
            time.sleep(draw.random() * 0.3)
        tally.add("left")


def _dripper(running: Running, tally: Tally, over: threading.Event) -> None:
    """Sends its request by drops, and is answered."""
    draw = random.Random(2)
    while not over.wait(draw.random()):
        message = _message("/v1/rerank", b'{"query": "a", "documents": ["b", "c"]}', close=True)
        with socket.create_connection(("127.0.0.1", running.port), 60) as connection:
            for i in range(0, len(message), 8):
                connection.sendall(message[i : i + 8])
                time.sleep(0.05)
            status = _status(_all(connection))
        tally.add("dripped", "" if status in (200, *bench.REFUSED) else f"status {status}")


def _slow_reader(running: Running, tally: Tally, over: threading.Event) -> None:
    """Takes a large answer by drops."""
    draw = random.Random(3)
    body = json.dumps({"query": "a", "documents": ["b" * 4000] * 200}).encode()
    while not over.wait(draw.random()):
        with socket.create_connection(("127.0.0.1", running.port), 60) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.sendall(_message("/v1/rerank", body, close=True))
            received = b""
            while chunk := connection.recv(16_384):
                received += chunk
                time.sleep(0.02)
        status = _status(received)
        whole = status != 200 or received.rstrip().endswith((b"]", b"}"))
        tally.add("read slowly", "" if status in (200, *bench.REFUSED) and whole else f"status {status}")


def _bad(running: Running, tally: Tally, over: threading.Event) -> None:
    """Sends what is no request; each is refused, and with a reason."""
    draw = random.Random(4)
    good = b'{"query": "a", "documents": ["b", "c"]}'
    bodies = [
        b"", b"{", good[:-5], b"[" * 10_000, b"null", b'{"query": 1, "documents": ["a"]}', b'{"documents": ["a"]}',
        b'{"query": "a", "documents": {}}', b"\xff\xfe" * 50, b"x" * 9_000_000, b'{"query": "a", "documents": []}',
        json.dumps({"query": "a", "documents": ["b"] * 1001}).encode(), b'{"a": ' * 40 + b"1" + b"}" * 40,
        b"[" + b"[]," * 200_000 + b"1]",
    ]  # fmt: skip
    messages = [_message("/v1/rerank", body, close=True) for body in bodies]
    messages += [
        b"GARBAGE\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 20,
        _message("/nowhere", good, close=True),
        _message("/v1/rerank", good, close=True).replace(b"POST", b"DELETE", 1),
        _message("/v1/rerank", good, close=True).replace(b"application/json", b"text/html", 1),
        _message("/v1/rerank", good, close=True).replace(
            b"\r\n\r\n", b"\r\nX-Large: " + b"x" * 40_000 + b"\r\n\r\n", 1
        ),
        _message("/v1/rerank", good, close=True).replace(b"Content-Length: ", b"Content-Length: -", 1),
    ]
    while not over.wait(draw.random() * 0.5):
        message = draw.choice(messages)
        received = b""
        try:
            with socket.create_connection(("127.0.0.1", running.port), 60) as connection:
                with contextlib.suppress(ConnectionResetError, BrokenPipeError):  # refused before all was sent
                    connection.sendall(message)
                received = _all(connection)
        except ConnectionResetError:
            tally.add("bad, cut off")
            continue
        status = _status(received)
        tally.add("bad", "" if 400 <= status < 500 or status == 503 else f"status {status} for {message[:60]!r}")


def _message(path: str, body: bytes, *, close: bool = False) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    return f"{head}{'Connection: close' if close else 'X-A: b'}\r\n\r\n".encode() + body


def _all(connection: socket.socket) -> bytes:
    received = b""
    while chunk := connection.recv(65_536):
        received += chunk
    return received


def _status(received: bytes) -> int:
    found = re.match(rb"HTTP/1\.1 (\d+)", received)
    return int(found[1]) if found else 0


def killed(running: Running, how: signal.Signals) -> tuple[bench.Report, list[Outcome], int, float]:
    """Load by 16 clients for 4 seconds, half of them after the signal: what came of it, and the server's end."""
    target = Target(running.url)
    bodies = [target.body(query) for query in bench.made_up(16, 10, 100)]
    outcomes: list[Outcome] = []
    thread = threading.Thread(
        target=lambda: outcomes.extend(bench.closed_loop(target, bodies, 16, duration_s=4.0)), daemon=True
    )
    thread.start()
    time.sleep(2.0)
    at = time.perf_counter()
    running.process.send_signal(how)
    status = running.process.wait(60)
    seconds = time.perf_counter() - at
    thread.join(60)
    return bench.report(outcomes, [10] * 16), [one for one in outcomes if one.sent < at], status, seconds


def endings(options: Sequence[str], running: Running, scratch: Path) -> dict[str, Any]:
    """Parts 3 and 4."""
    _, _, crashed, _ = killed(running, signal.SIGKILL)
    again = start(options, scratch / "again.log")
    compilations = again.log.read_text().count("compiled in")
    loaded, accepted, status, seconds = killed(again, signal.SIGTERM)
    statuses = Counter(one.status for one in accepted)
    unanswered = Counter(one.wrong for one in accepted if not one.status)
    return {
        "kill -9": {"status": crashed, "first_start_s": round(running.ready_s, 1), "start_s": round(again.ready_s, 1)},
        "compiled_or_loaded": compilations,
        "kill -TERM": {
            "status": status,
            "seconds": round(seconds, 2),
            "sent_before": {str(key): value for key, value in sorted(statuses.items())},
            "not_answered": dict(unanswered),
            "all": asdict(loaded),
        },
        "holds": {
            "killed": crashed == -signal.SIGKILL,
            "ended with status 0": status == 0,
            "what was sent before SIGTERM is answered": not unanswered and set(statuses) <= {200, 503},
        },
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", help="a folder or Hugging Face id; default: the built-in model")
    parser.add_argument("--overload-s", type=float, default=300.0)
    parser.add_argument("--soak-s", type=float, default=1200.0)
    parser.add_argument("--queue-seconds", type=float, default=0.5, help="the server's --max-queue-seconds")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args(argv)
    model = [arguments.model] if arguments.model else []
    options = [*model, "--max-queue-seconds", str(arguments.queue_seconds)]
    work = {
        "overload": lambda: overload(running, arguments.overload_s, arguments.queue_seconds),
        "soak": lambda: soak(running, arguments.soak_s),
        "endings": lambda: endings(options, running, Path(scratch)),
    }
    with tempfile.TemporaryDirectory() as scratch:
        running = start(options, Path(scratch) / "server.log")
        try:
            result: dict[str, Any] = {"benchmark": "soak", "model": arguments.model or "builtin"}
            for part in arguments.parts:
                result[part] = work[part]()
                print(json.dumps(result[part], indent=1), flush=True)
        finally:
            running.process.kill()
    failed = [
        f"{part}: {name}" for part in arguments.parts for name, holds in result[part]["holds"].items() if not holds
    ]
    finish({**result, "failed": failed}, arguments.output)
    if failed:
        raise SystemExit("does not hold: " + "; ".join(failed))


if __name__ == "__main__":
    main()
