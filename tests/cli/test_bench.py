"""`jaxrank bench` against servers that do well, are busy, lie, and are not there."""

from __future__ import annotations

import http.server
import itertools
import json
import select
import statistics
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from jaxrank import bench, cli
from jaxrank.bench import Outcome, Query, Target
from tests.cli.commands import Run, complaint
from tests.server.fakes import FakeReranker, serving, until

QUIET = "--no-progress"


@contextmanager
def answering(status: int, body: bytes, **headers: str) -> Iterator[str]:
    """A server that says the same to everybody."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


class TestCommand:
    @pytest.mark.parametrize("dialect", cli.serve.DIALECTS)
    def test_every_dialect(self, run: Run, tmp_path: Path, dialect: str) -> None:
        fake = FakeReranker()
        out = tmp_path / "out.json"
        with serving(fake) as base:
            done = run("bench", base, "--dialect", dialect, "--clients", "3", "--requests", "20", "--documents", "4",
                       "--words", "10", QUIET, "--output", str(out))  # fmt: skip
        assert done.status == 0
        assert "20 in " in done.out
        written = json.loads(out.read_text())
        assert (written["requests"], written["answered"], written["failed"]) == (20, 20, 0)
        assert written["dialect"] == dialect
        assert written["model"] == "fake/reranker"
        assert 0 < written["latency_ms"][0] <= written["latency_ms"][2]
        assert written["pairs_per_s"] == pytest.approx(4 * written["requests_per_s"], rel=0.01)
        assert sum(map(len, fake.batches)) == 22 * 4  # two requests to warm up

    def test_dialects_are_the_servers(self) -> None:
        assert set(bench.PATHS) == set(cli.serve.DIALECTS)

    def test_own_requests_and_a_key(self, run: Run, tmp_path: Path) -> None:
        fake = FakeReranker()
        file = tmp_path / "requests.jsonl"
        rows = [{"query": "q", "documents": ["1"]}, {"query": "ü", "documents": ["1", "2", "3"]}]
        file.write_text("\n\n".join(map(json.dumps, rows)) + "\n")
        with serving(fake, api_keys=["hunter2"]) as base:
            done = run("bench", base, "--file", str(file), "--requests", "4", "--api-key", "hunter2", QUIET)
            without = run("bench", base, "--file", str(file), "--requests", "4", QUIET)
        assert done.status == 0
        assert sum(map(len, fake.batches)) == 3 * 4
        assert without.status == 1
        assert "4 x 401" in without.out

    def test_an_open_loop_under_overload(self, run: Run, tmp_path: Path) -> None:
        out = tmp_path / "out.json"
        with serving(FakeReranker(delay_s=0.1), max_queue_requests=1) as base:
            done = run("bench", base, "--rate", "100", "--duration", "1", QUIET, "--output", str(out))
        written = json.loads(out.read_text())
        assert done.status == 0
        assert 60 < written["requests"] < 150
        assert written["refused"] > 40
        assert written["without_retry_after"] == 0
        assert written["requests"] == written["answered"] + written["refused"]

    def test_a_bar_on_stderr(self, run: Run) -> None:
        with serving(FakeReranker()) as base:
            done = run("bench", base, "--requests", "5")
        assert "5/5" in done.err
        assert "answered=5" in done.err

    def test_nobody_there(self, run: Run) -> None:
        assert "start the server first" in complaint(run("bench", "http://127.0.0.1:9", QUIET))

    @pytest.mark.parametrize("url", ["localhost:30000", "ftp://a.example", "http://"])
    def test_no_url(self, run: Run, url: str) -> None:
        assert "is no URL of a server" in complaint(run("bench", url, QUIET))

    @pytest.mark.parametrize(
        "line", ["{", "[]", "{}", '{"query": 1, "documents": ["a"]}', '{"query": "q", "documents": []}',
                 '{"query": "q", "documents": "a"}', '{"query": "q", "documents": [1]}', '"\\ud800']
    )  # fmt: skip
    def test_bad_requests_in_a_file(self, run: Run, tmp_path: Path, line: str) -> None:
        file = tmp_path / "requests.jsonl"
        file.write_text('{"query": "q", "documents": ["a"]}\n' + line + "\n")
        with serving(FakeReranker()) as base:
            said = complaint(run("bench", base, "--file", str(file), QUIET))
        assert "requests.jsonl line 2: no request" in said

    def test_no_requests_in_a_file(self, run: Run, tmp_path: Path) -> None:
        file = tmp_path / "requests.jsonl"
        file.write_text("\n")
        with serving(FakeReranker()) as base:
            assert "no requests" in complaint(run("bench", base, "--file", str(file), QUIET))


class TestWrongAnswers:
    @pytest.mark.parametrize(
        "body, what",
        [
            (b"[]", "0 results for 2 documents"),
            (b'{"results": [{"index": 0}, {"index": 0}]}', "2 results for 2 documents"),
            (b'{"results": 1}', "no ranking"),
            (b"<html>", "no ranking"),
        ],
    )
    def test_answers(self, body: bytes, what: str) -> None:
        with answering(200, body) as base:
            (outcome,) = bench.closed_loop(Target(base), [Target(base).body(Query("q", ["a", "b"]))], 1, requests=1)
        assert (outcome.status, outcome.wrong) == (200, what)
        assert bench.report([outcome], [2]).problems == {f"200 {what}": 1}

    def test_somebody_elses_answer(self) -> None:
        with answering(200, b'[{"index": 0}]', X_Request_Id="another") as base:
            (outcome,) = bench.closed_loop(Target(base), [Target(base).body(Query("q", ["a"]))], 1, requests=1)
        assert outcome.wrong.startswith("answer to another instead of ")

    def test_refusals_without_retry_after(self) -> None:
        with answering(503, b"{}") as base:
            outcomes = bench.closed_loop(Target(base), [Target(base).body(Query("q", ["a"]))], 2, requests=6)
        result = bench.report(outcomes, [1])
        assert (result.refused, result.without_retry_after, result.failed, result.latency_ms) == (6, 6, 0, None)

    def test_a_server_that_dies(self) -> None:
        fake = FakeReranker()
        with serving(fake) as base:
            target = Target(base)
        outcomes = bench.closed_loop(target, [target.body(Query("q", ["a"]))], 2, requests=4)
        assert [(one.status, one.wrong) for one in outcomes] == [(0, "ConnectionRefusedError")] * 4


class TestOpenLoop:
    def test_waiting_for_a_connection_counts(self) -> None:
        """A generator that falls behind does not hide that users would have waited."""
        with serving(FakeReranker(delay_s=0.1)) as base:
            target = Target(base)
            bodies = [target.body(Query("q", ["1 document"]))]
            outcomes = bench.open_loop(target, bodies, 1000.0, connections=1, requests=8)
        assert len(outcomes) == 8
        assert outcomes[-1].seconds > 0.6
        assert statistics.median(one.ended - one.sent for one in outcomes) < 0.4
        assert bench.report(outcomes, [1]).sent_late_ms > 500

    def test_arrivals(self) -> None:
        """At random, at the rate that was asked for, in any order of answers."""
        with answering(200, b'[{"index": 0}]') as base:
            target = Target(base)
            bodies = [target.body(Query("q", ["1"]))] * 3
            outcomes = bench.open_loop(target, bodies, 200.0, connections=8, requests=200)
        planned = sorted(one.planned for one in outcomes)
        gaps = [late - early for early, late in itertools.pairwise(planned)]
        mean = sum(gaps) / len(gaps)
        assert mean == pytest.approx(1 / 200, rel=0.25)
        assert 0.5 < (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5 / mean < 1.5  # 1 if exponential
        assert {one.which for one in outcomes} == {0, 1, 2}


def test_idle_connections_that_the_server_has_closed() -> None:
    """The request that finds out is sent again, on a new connection."""
    with serving(FakeReranker(), connections={"timeout_keep_alive": 0}) as base:
        target = Target(base)
        client = bench.Client(target, [target.body(Query("q", ["1"]))])
        with closing(client):
            first = client.ask(0)
            assert client.connection.sock is not None
            until(lambda: _closed_by_peer(client))
            second = client.ask(0)
    assert [(one.status, one.wrong) for one in (first, second)] == [(200, ""), (200, "")]


def _closed_by_peer(client: bench.Client) -> bool:
    return bool(select.select([client.connection.sock], [], [], 0)[0])


def test_report() -> None:
    outcomes = [Outcome(i % 2, 10.0, 10.0 + i / 100, 10.5 + i / 100, 200) for i in range(100)]
    result = bench.report([*outcomes, Outcome(0, 11.0, 11.0, 11.01, 429, "", True)], [1, 3])
    assert (result.answered, result.refused, result.failed) == (100, 1, 0)
    assert result.seconds == 1.49
    assert result.pairs_per_s == pytest.approx(200 / 1.49, abs=0.01)
    assert result.latency_ms is not None
    assert result.latency_ms[0] == pytest.approx(995, abs=1)
    assert result.refusal_ms == (10.0, 10.0, 10.0)
    assert result.sent_late_ms == 990


def test_made_up_requests() -> None:
    queries = bench.made_up(50, 7, 40)
    lengths = [len(document.split()) for query in queries for document in query.documents]
    assert {len(query.documents) for query in queries} == {7}
    assert (min(lengths), max(lengths)) == (20, 60)
    assert queries == bench.made_up(50, 7, 40)
    assert len({query.query for query in queries}) == 50
