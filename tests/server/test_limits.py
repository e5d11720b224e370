"""What one client may take of the server: headers, JSON, connections, time, memory. Over real sockets."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from jaxrank.server.errors import Refusal
from jaxrank.server.http.json_input import load_json
from tests.server.fakes import FakeReranker, rerank, serving, until

HEAD = b"POST /v1/rerank HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"


def body(*documents: str) -> dict[str, Any]:
    return {"query": "q", "documents": documents}


def connect(base: str, data: bytes = b"") -> socket.socket:
    host, port = base.removeprefix("http://").split(":")
    client = socket.create_connection((host, int(port)), timeout=10)
    client.sendall(data)
    return client


def answer(client: socket.socket) -> bytes:
    """All that comes until the server closes the connection."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := client.recv(65536):
            received += piece
    return received


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(FakeReranker(), max_headers=20, max_header_bytes=2000, connections={"max_header_bytes": 2000}) as base:
        yield base


class TestHeaders:
    @pytest.mark.parametrize("count, size, status", [(10, 10, 200), (30, 10, 431), (1, 1500, 200), (1, 2500, 431)])
    def test_number_and_size(self, url: str, count: int, size: int, status: int) -> None:
        headers = {f"X-Number-{i}": "x" * size for i in range(count)}
        response = httpx.get(url + "/v1/models", headers=headers)
        assert response.status_code == status
        if status == 431:
            assert response.json()["message"].endswith("Send at most 20 headers and 2000 bytes.")
            assert response.headers["connection"] == "close"

    def test_a_long_address(self, url: str) -> None:
        assert httpx.get(f"{url}/v1/models?{'x' * 2500}").status_code == 431
        assert httpx.get(f"{url}/v1/models?{'x' * 500}").status_code == 200

    def test_headers_without_end(self, url: str) -> None:
        with connect(url, b"GET /health HTTP/1.1\r\nHost: x\r\n") as client:
            with contextlib.suppress(ConnectionError):
                for i in range(10_000):
                    client.sendall(b"X-%d: %b\r\n" % (i, b"y" * 50))
            assert client.recv(12) in (b"HTTP/1.1 400", b"")
        assert httpx.get(url + "/health").status_code == 200


class TestJson:
    @pytest.mark.parametrize(
        "content, allowed",
        [
            ("[" * 32 + "]" * 32, True),
            ("[" * 33 + "]" * 33, False),
            ('{"a":' * 32 + "1" + "}" * 32, True),
            ('{"a":' * 33 + "1" + "}" * 33, False),
            ('["' + "[" * 100_000 + '"]', True),
            ('["\\"' + "[" * 100 + '"]', True),
            ('["\\\\",' + "[" * 33 + "]" * 33 + "]", False),
            ('["\\\\\\"' + "[" * 100 + '"]', True),
            ("[" + "[],[[]]," * 20_000 + "0]", True),
            ("[" * 100_000, False),
        ],
    )
    def test_depth(self, content: str, allowed: bool) -> None:
        if allowed:
            assert load_json(content.encode()) == json.loads(content)
        else:
            with pytest.raises(Refusal, match="nested too deeply; 32 levels are allowed"):
                load_json(content.encode())

    @pytest.mark.parametrize(
        "content, allowed",
        [
            ("[" + "0," * 149_998 + "0]", True),
            ("[" + "0," * 150_000 + "0]", False),
            ("[" + "[]," * 80_000 + "0]", False),
            ("[" + '"",' * 149_990 + "0]", True),
            ('["' + "," * 1_000_000 + '"]', True),
            ('["' + '\\",' * 500_000 + '"]', True),
            ('"' * 1_000_000, False),
            ("{" + ",".join(f'"{i}":[]' for i in range(80_000)) + "}", False),
        ],
    )
    def test_values(self, content: str, allowed: bool) -> None:
        if allowed:
            assert load_json(content.encode()) == json.loads(content)
        else:
            with pytest.raises(Refusal, match="more than 150,000 values") as caught:
                load_json(content.encode())
            assert caught.value.status == 413

    def test_over_http(self) -> None:
        with serving(FakeReranker()) as base:
            deep: Any = "1"
            for _ in range(40):
                deep = [deep]
            response = rerank(base, {**body("1"), "extra": deep})
            assert response.status_code == 400
            assert "nested too deeply" in response.json()["message"]
            assert rerank(base, {**body("1"), "extra": [0] * 200_000}).status_code == 413
            assert rerank(base, {**body("1"), "extra": [[[0]]] * 1000}).status_code == 200


class TestConnections:
    def test_no_more_than_allowed(self) -> None:
        with serving(FakeReranker(), connections={"max_connections": 3}) as base:
            held = [connect(base) for _ in range(3)]
            try:
                time.sleep(0.1)
                with connect(base) as one_more:
                    refused = answer(one_more)
                assert refused.startswith(b"HTTP/1.1 503 ")
                assert b"Too many connections" in refused
            finally:
                for client in held:
                    client.close()
            until(lambda: httpx.get(base + "/health").status_code == 200)
            assert 'jaxrank_refusals_total{reason="TooManyConnections"} 1.0' in httpx.get(base + "/metrics").text

    @pytest.mark.parametrize("data", [b"", b"GET /hea", b"POST /v1/rerank HTTP/1.1\r\nHost: x\r\n"])
    def test_heads_must_arrive(self, data: bytes) -> None:
        with serving(FakeReranker(), connections={"head_timeout_s": 0.3}) as base:
            begin = time.monotonic()
            with connect(base, data) as client:
                assert answer(client).startswith(b"HTTP/1.1 408 ")
            assert 0.2 < time.monotonic() - begin < 5

    def test_heads_drop_by_drop_between_requests(self) -> None:
        request = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
        with serving(FakeReranker(), connections={"head_timeout_s": 0.4}) as base, connect(base, request) as client:
            assert client.recv(15) == b"HTTP/1.1 200 OK"
            begin = time.monotonic()
            with contextlib.suppress(ConnectionError):
                for byte in request * 10:
                    client.sendall(bytes([byte]))
                    time.sleep(0.03)
            assert time.monotonic() - begin < 5, "it was closed on the way"

    def test_requests_that_take_long_are_no_late_heads(self) -> None:
        fake = FakeReranker()
        with serving(fake, connections={"head_timeout_s": 0.2}) as base:
            fake.gate.clear()
            threading.Timer(0.8, fake.gate.set).start()
            assert rerank(base, body("1")).status_code == 200

    def test_a_client_that_takes_nothing_of_its_answer(self) -> None:
        """Its connection ends, and what was to be sent is forgotten."""
        fake = FakeReranker()
        fake.max_length = 10
        documents = body("1", *["x" * 100_000] * 70)
        data = json.dumps(documents).encode()
        with serving(fake, connections={"write_timeout_s": 1.0}, request_timeout_s=5) as base:
            with connect(base, HEAD % len(data) + data) as client:
                until(lambda: fake.batches)
                time.sleep(3)
                received = answer(client)
            assert len(received) < len(data)


class TestMemory:
    def test_bodies_that_are_held_are_counted(self) -> None:
        fake = FakeReranker()
        with serving(fake, max_queue_bytes=10_000) as base, ThreadPoolExecutor(4) as pool:
            fake.gate.clear()
            held = [pool.submit(rerank, base, body("1 " + "x" * 4000)) for _ in range(2)]
            assert fake.waiting.wait(5)
            until(lambda: httpx.get(base + "/ready").json()["queued_requests"] == 2)
            response = rerank(base, body("1 " + "x" * 4000))
            assert response.status_code == 503
            assert int(response.headers["retry-after"]) >= 1
            small = pool.submit(rerank, base, body("1"))
            until(lambda: httpx.get(base + "/ready").json()["queued_requests"] == 3)
            fake.gate.set()
            assert [one.result().status_code for one in (*held, small)] == [200] * 3
            assert rerank(base, body("1 " + "x" * 20_000)).status_code == 200, "alone, it may be larger"

    def test_a_full_queue_refuses_before_it_reads(self) -> None:
        fake = FakeReranker()
        with serving(fake, max_queue_requests=1) as base, ThreadPoolExecutor(1) as pool:
            fake.gate.clear()
            first = pool.submit(rerank, base, body("1"))
            assert fake.waiting.wait(5)
            with connect(base, HEAD % 70_000) as client:  # smaller ones tell in which dialect to refuse
                assert client.recv(12) == b"HTTP/1.1 503"
            fake.gate.set()
            assert first.result().status_code == 200
