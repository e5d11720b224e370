"""The end of a server's process: under load, when time runs out, in a hurry. Every answer counted by its id."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.fakes import until

ROOT = Path(__file__).parents[2]
GOOD = {"query": "fruit", "documents": ["1 apple", "3 pears"]}


@dataclass
class Process:
    """A server in a process of its own. lines: what it has logged, as JSON objects."""

    process: subprocess.Popen[str]
    lines: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    other: list[str] = field(default_factory=list[str])
    url: str = ""

    def read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            try:
                self.lines.append(json.loads(line))
            except ValueError:
                self.other.append(line)

    @property
    def answered(self) -> Counter[tuple[str, int]]:
        """How often the server says that it answered each request with each status, by id."""
        lines = [line for line in self.lines if line["logger"] == "jaxrank.access" and "v1/rerank" in line["path"]]
        return Counter((line["request_id"], line["status"]) for line in lines)


@contextlib.contextmanager
def start(fake: str = "FakeReranker()", **settings: Any) -> Iterator[Process]:
    program = f"""
        from tests.server.fakes import FakeReranker
        from jaxrank.server import serve
        serve({fake}, port=0, log_format="json", batch_rows=1, **{settings!r})
    """
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(program)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as running:
        server = Process(running)
        reader = threading.Thread(target=server.read)
        reader.start()
        try:
            until(lambda: [line for line in server.lines if line["message"].startswith("listening")], 30)
            port = next(found[1] for line in server.lines if (found := re.search(r"port (\d+)", line["message"])))
            server.url = f"http://127.0.0.1:{port}"
            until(lambda: httpx.get(server.url + "/ready").status_code == 200)
            yield server
        finally:
            running.kill()
            reader.join()


class Clients:
    """Threads that send requests without a pause until one finds nobody. got: the answers, by id."""

    def __init__(self, url: str, count: int) -> None:
        self.url = url
        self.got: Counter[tuple[str, int]] = Counter()
        self.refused: list[str] = []
        self.threads = [threading.Thread(target=self.run, args=(f"c{i}",)) for i in range(count)]
        for thread in self.threads:
            thread.start()

    def run(self, name: str) -> None:
        with httpx.Client(timeout=30) as client:
            for number in range(10_000):
                identity = f"{name}-{number}"
                try:
                    answer = client.post(self.url + "/v1/rerank", json=GOOD, headers={"X-Request-Id": identity})
                except httpx.TransportError:
                    self.refused.append(identity)
                    return
                assert answer.headers["x-request-id"] == identity
                if answer.status_code == 200:
                    assert [result["index"] for result in answer.json()] == [1, 0]
                self.got[identity, answer.status_code] += 1

    def join(self) -> None:
        for thread in self.threads:
            thread.join(30)
            assert not thread.is_alive()


def test_the_end_under_load() -> None:
    """Every request that the server took was answered once, and its client has that answer; nothing else was sent."""
    with start("FakeReranker(row_tokens=100, delay_s=0.01)") as server:
        clients = Clients(server.url, 32)
        until(lambda: len(clients.got) > 300)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0
        clients.join()
    assert server.other == []
    assert server.lines[-1]["message"] == "stopped"
    assert clients.got == server.answered
    assert set(clients.got.values()) == {1}
    assert {status for _, status in clients.got} <= {200, 503}
    assert sum(status == 200 for _, status in clients.got) > 300
    assert not {identity for identity, _ in clients.got} & set(clients.refused)


def test_the_log_says_where_the_seconds_of_the_start_went() -> None:
    with start("FakeReranker(warm_up=lambda progress: __import__('time').sleep(0.3))") as server:
        (line,) = (line for line in server.lines if line["message"].startswith("ready after"))
    assert (line["programs_compiled"], line["programs_from_cache"]) == (0, 0)
    assert line["seconds"].keys() == {"server", "programs"}, "what comes before is the loading's, which a fake has not"
    assert 0.3 <= line["seconds"]["programs"] < 3
    assert re.fullmatch(
        r"ready after [\d.]+ s \(server [\d.]+, programs [\d.]+\): 0 programs compiled, 0 from the cache",
        line["message"],
    )


def test_what_the_grace_does_not_suffice_for_is_answered_503() -> None:
    """Those that are scored, tokenised later, or not even sent whole."""
    with start("FakeReranker(row_tokens=10, delay_s=1.5)", shutdown_grace_s=0.5) as server:
        answers: list[httpx.Response] = []
        ask = lambda: answers.append(httpx.post(server.url + "/v1/rerank", json=GOOD, timeout=30))  # noqa: E731
        threads = [threading.Thread(target=ask) for _ in range(6)]
        for thread in threads:
            thread.start()
        until(lambda: httpx.get(server.url + "/ready").json()["queued_requests"] == 6)
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as unsent:
            unsent.sendall(b"POST /v1/rerank HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
            unsent.sendall(b"Content-Length: 99\r\n\r\n{")
            time.sleep(0.1)
            begin = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            until(lambda: not listens(host, int(port)), 5)
            assert unsent.recv(12) == b"HTTP/1.1 503"
        for thread in threads:
            thread.join(10)
        assert server.process.wait(20) == 0
        assert 0.5 < time.monotonic() - begin < 8
    statuses = Counter(answer.status_code for answer in answers)
    assert set(statuses) <= {200, 503}
    assert statuses[503] >= 4
    assert statuses.total() == 6
    refused = next(answer for answer in answers if answer.status_code == 503)
    assert "The server is shutting down" in refused.json()["message"]
    assert server.other == []


def test_a_client_that_takes_no_answer_does_not_hold_the_end_up() -> None:
    documents = ["x" * 100_000] * 70
    with start("FakeReranker()", shutdown_grace_s=0.2) as server:
        data = json.dumps({"query": "q", "documents": documents}).encode()
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as client:
            head = b"POST /v1/rerank HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n"
            client.sendall(head % len(data) + b"\r\n" + data)
            until(lambda: server.answered)
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(10) == 0


def test_a_second_ctrl_c_ends_it_at_once() -> None:
    with start("FakeReranker(delay_s=20)") as server:
        sender = threading.Thread(target=ask_in_vain, args=(server.url,))
        sender.start()
        until(lambda: httpx.get(server.url + "/ready").json()["queued_requests"] == 1)
        server.process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert server.process.poll() is None
        begin = time.monotonic()
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(5) == -signal.SIGINT
        assert time.monotonic() - begin < 1
        sender.join()


def listens(host: str, port: int) -> bool:
    with contextlib.suppress(ConnectionRefusedError), socket.create_connection((host, port)):
        return True
    return False


def ask_in_vain(url: str) -> None:
    with pytest.raises(httpx.TransportError):
        httpx.post(url + "/v1/rerank", json=GOOD, timeout=30)
