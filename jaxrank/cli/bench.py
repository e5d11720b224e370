"""`jaxrank bench`: puts load on a running server, and writes a table of the results."""

from __future__ import annotations

import argparse
import json
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from jaxrank.cli.numbers import count, time_span
from jaxrank.cli.serve import DIALECTS

if TYPE_CHECKING:
    from jaxrank.bench import Outcome, Query, Report


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the command's flags to a parser."""
    command.add_argument(
        "url", nargs="?", default="http://127.0.0.1:30000", help="URL of the server; default: %(default)s"
    )
    command.add_argument(
        "--dialect", choices=DIALECTS, default="sglang", help="whose client to act as; default: %(default)s"
    )
    loop = command.add_mutually_exclusive_group()
    loop.add_argument("--clients", type=count, default=8, metavar="N",
                      help="closed loop: clients that ask again after each answer; default: 8")  # fmt: skip
    loop.add_argument("--rate", type=time_span, metavar="R",
                      help="open loop: requests a second at random times, without waiting for answers")  # fmt: skip
    command.add_argument(
        "--connections", type=count, default=256, metavar="N", help="most connections of an open loop; default: 256"
    )
    command.add_argument(
        "--duration",
        type=time_span,
        metavar="SECONDS",
        help="how long to send requests; default: 30, without --requests",
    )
    command.add_argument("--requests", type=count, metavar="N", help="stop after this number of requests")
    command.add_argument("--documents", type=count, default=10, metavar="N", help="documents in a request; default: 10")
    command.add_argument(
        "--words", type=count, default=100, metavar="N", help="words in a document on average; default: 100"
    )
    command.add_argument("--file", metavar="FILE",
                         help='your own requests, one a line: {"query": "...", "documents": ["...", ...]}')  # fmt: skip
    command.add_argument(
        "--model", metavar="NAME", help="model name in requests; default: the name that /v1/models answers"
    )
    command.add_argument("--api-key", metavar="KEY")
    command.add_argument(
        "--timeout", type=time_span, default=60.0, metavar="SECONDS", help="most seconds for one answer; default: 60"
    )
    command.add_argument("--output", metavar="FILE", help="also write the results as JSON")
    command.add_argument("--no-progress", action="store_true", help="show no progress bar")


def run(arguments: argparse.Namespace) -> int:
    """Run the command.

    Returns:
        0 if every request was answered or refused as busy, else 1.
    """
    from jaxrank import bench
    from jaxrank.server.http.access import hide_from_process_list

    if arguments.api_key:
        hide_from_process_list([arguments.api_key])
    asked = dict(dialect=arguments.dialect, api_key=arguments.api_key, timeout_s=arguments.timeout)
    model = bench.Target(arguments.url, **asked).served_model()
    target = bench.Target(arguments.url, model=arguments.model or model, **asked)
    queries = read(Path(arguments.file)) if arguments.file else bench.made_up(64, arguments.documents, arguments.words)
    bodies = [target.body(query) for query in queries]
    duration = arguments.duration or (float("inf") if arguments.requests else 30.0)
    bench.closed_loop(target, bodies, 1, requests=2)  # warm up the connection and the server
    with Progress(duration, arguments.requests, shown=not arguments.no_progress) as progress:
        options: dict[str, Any] = dict(requests=arguments.requests, duration_s=duration, tick=progress.tick)
        if arguments.rate:
            outcomes = bench.open_loop(
                target, bodies, arguments.rate, connections=arguments.connections, **options
            )  # fmt: skip
        else:
            outcomes = bench.closed_loop(target, bodies, arguments.clients, **options)
    result = bench.report(outcomes, [len(query.documents) for query in queries])
    write_table(result, sys.stdout)
    if arguments.output:
        loop = {"rate": arguments.rate} if arguments.rate else {"clients": arguments.clients}
        said = {"url": arguments.url, "dialect": arguments.dialect, "model": target.model, **loop, **asdict(result)}
        Path(arguments.output).write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
    return 1 if result.failed else 0


def read(file: Path) -> list[Query]:
    """Return the requests in a file of JSON lines.

    Raises:
        RequestError: A line is not a request, or there are none. The message has the line's number.
    """
    from jaxrank.bench import Query
    from jaxrank.errors import RequestError
    from jaxrank.offline.rows import json_object, lines

    queries: list[Query] = []
    for number, _, line in lines(file):
        raw = json_object(line)
        query, documents = (None, None) if isinstance(raw, str) else (raw.get("query"), raw.get("documents"))
        if not isinstance(query, str) or not isinstance(documents, list) or not documents or not all(
            isinstance(one, str) for one in documents
        ):  # fmt: skip
            raise RequestError(
                f'{file} line {number}: no request; one looks like {{"query": "...", "documents": ["...", "..."]}}'
            )
        queries.append(Query(query, documents))
    if not queries:
        raise RequestError(f"{file}: no requests; give one JSON object a line")
    return queries


class Progress:
    """A bar on standard error, in seconds, or in requests if their number is set."""

    def __init__(self, duration_s: float, requests: int | None, *, shown: bool) -> None:
        from tqdm import tqdm

        self.lock = threading.Lock()
        self.counts = {"answered": 0, "refused": 0, "failed": 0}
        self.requests = requests
        self.began: float | None = None
        self.bar: Any = tqdm(
            total=requests or duration_s, unit="request" if requests else "s", disable=not shown, file=sys.stderr,
            bar_format=None if requests else "{percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s {postfix}",
        )  # fmt: skip

    def tick(self, outcome: Outcome) -> None:
        """Count one answer, and move the bar. Thread-safe."""
        with self.lock:
            self.counts[outcome.kind] += 1
            self.began = outcome.sent if self.began is None else self.began
            self.bar.set_postfix(self.counts, refresh=False)
            if self.requests:
                self.bar.update(1)
            else:
                self.bar.update(min(outcome.ended - self.began, self.bar.total) - self.bar.n)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()


def write_table(result: Report, out: TextIO) -> None:
    """Write one line for each figure."""
    rows = [
        ("requests", f"{result.requests} in {result.seconds:.1f} s"),
        ("answered", f"{result.answered}, {result.requests_per_s:g} a second, {result.pairs_per_s:g} pairs a second"),
        ("latency", milliseconds(result.latency_ms)),
        ("refused", f"{result.refused}, {result.without_retry_after} of them without Retry-After"),
        ("refusals after", milliseconds(result.refusal_ms)),
        ("sent late by", f"at most {result.sent_late_ms:g} ms"),
        ("failed", ", ".join([str(result.failed), *(f"{count} x {what}" for what, count in result.problems.items())])),
    ]
    for name, value in rows:
        print(f"{name:>15}  {value}", file=out)


def milliseconds(values: tuple[float, float, float] | None) -> str:
    """Return the percentiles as text, or a dash."""
    if values is None:
        return "-"
    return ", ".join(f"p{p} {value:.1f} ms" for p, value in zip((50, 90, 99), values, strict=True))
