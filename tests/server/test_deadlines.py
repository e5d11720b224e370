"""Requests that end before their answer: their time is up, their client leaves; at every stage of their way."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from jaxrank.media.images import Preprocessing
from jaxrank.server.errors import ClientGone
from jaxrank.server.http.leash import Leash
from jaxrank.server.media.fetch import MediaAccess
from jaxrank.types import Encoded
from tests.server.fakes import FakeReranker, rerank, serving, until


def body(*documents: str, query: str = "q") -> dict[str, Any]:
    return {"query": query, "documents": documents}


def queued(base: str) -> tuple[int, int]:
    state = httpx.get(base + "/ready").json()
    return state["queued_requests"], state["queued_tokens"]


class SlowToEncode(FakeReranker):
    """Tokenising waits for `door`, and tells by `inside` that it has begun."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.door = threading.Event()
        self.inside = threading.Semaphore(0)
        self.encoded = 0

    def encode(self, query: str, documents: Sequence[str], **options: Any) -> list[Encoded]:
        self.inside.release()
        assert self.door.wait(10)
        self.encoded += 1
        return super().encode(query, documents, **options)


class TestTimeout:
    def test_what_waits_is_not_scored(self) -> None:
        fake = FakeReranker(row_tokens=100)
        with serving(fake, request_timeout_s=0.4) as base, ThreadPoolExecutor(2) as pool:
            fake.gate.clear()
            begun = pool.submit(rerank, base, body(*["x" * 10] * 30))
            assert fake.waiting.wait(5)
            late = pool.submit(rerank, base, body(*["y" * 10] * 20))
            for answer in (begun.result(), late.result()):
                assert answer.status_code == 504
                assert answer.json()["type"] == "DeadlineExceeded"
                assert answer.json()["message"].startswith("The request was not finished within 0.4 s. Send fewer")
            assert queued(base) == (0, 100), "what the device already has"
            fake.gate.set()
            until(lambda: queued(base) == (0, 0))
            assert rerank(base, body("1")).status_code == 200
        assert [len(batch) for batch in fake.batches] == [10, 1]

    def test_a_request_may_ask_for_less(self) -> None:
        fake = FakeReranker()
        with serving(fake, request_timeout_s=20) as base:
            fake.gate.clear()
            begin = time.monotonic()
            answer = rerank(base, body("1"), headers={"X-Request-Timeout": "0.2"})
            assert answer.status_code == 504
            assert "within 0.2 s" in answer.json()["message"]
            assert time.monotonic() - begin < 5
            fake.gate.set()

    def test_but_not_for_more(self) -> None:
        fake = FakeReranker()
        with serving(fake, request_timeout_s=0.2) as base:
            fake.gate.clear()
            for seconds in ("3600", "inf", "1e400"):
                answer = rerank(base, body("1"), headers={"X-Request-Timeout": seconds})
                assert (answer.status_code, "within 0.2 s" in answer.text) == (504, True)
            fake.gate.set()

    @pytest.mark.parametrize("given", ["0", "-1", "nan", "soon", "", "1 s"])
    def test_what_is_no_time(self, given: str) -> None:
        with serving(FakeReranker()) as base:
            answer = rerank(base, body("1"), headers={"X-Request-Timeout": given})
        assert answer.status_code == 400
        assert "X-Request-Timeout must be a number of seconds above 0" in answer.json()["message"]

    def test_it_counts_while_tokenising(self) -> None:
        fake = SlowToEncode()
        settings = {"request_timeout_s": 0.3, "inline_bytes": 0, "encode_threads": 1}
        with serving(fake, **settings) as base, ThreadPoolExecutor() as pool:
            first, second = (pool.submit(rerank, base, body("1 x")) for _ in range(2))
            assert (first.result().status_code, second.result().status_code) == (504, 504)
            assert queued(base) == (0, 0)
            fake.door.set()
            until(lambda: fake.encoded == 1)
            assert rerank(base, body("1 x")).status_code == 200
        assert fake.encoded == 2, "one was begun, the one behind it was dropped"
        assert len(fake.batches) == 1


class TestHangUp:
    def send(self, base: str, content: dict[str, Any]) -> socket.socket:
        """A client that has sent its request and reads nothing."""
        host, port = base.removeprefix("http://").split(":")
        client = socket.create_connection((host, int(port)))
        data = json.dumps(content).encode()
        head = f"POST /v1/rerank HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
        client.sendall(head.encode() + b"\r\n\r\n" + data)
        return client

    def test_while_tokenising(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO, "jaxrank.access")
        fake = SlowToEncode()
        with serving(fake, inline_bytes=0, encode_threads=1) as base:
            with self.send(base, body("1 x")), self.send(base, body("2 x")):
                assert fake.inside.acquire(timeout=5)
                until(lambda: queued(base)[0] == 2)
            until(lambda: queued(base) == (0, 0))  # before tokenising ends
            assert not fake.encoded
            fake.door.set()
            assert rerank(base, body("3 x")).json()[0]["score"] == 3
        assert fake.batches == [[3]]
        assert fake.encoded == 2, "the second was never begun"
        assert caplog.text.count(" 499 ") == 2

    @pytest.mark.parametrize("timeout_s", [20, 2])
    def test_while_media_are_fetched(self, timeout_s: float) -> None:
        """By a site that never answers: the connection to it is closed at once, too."""
        fake = FakeReranker()
        fake.preprocessing = Preprocessing()
        with (
            socket.create_server(("127.0.0.1", 0)) as site,
            serving(fake, media=MediaAccess(private=True), request_timeout_s=timeout_s) as base,
        ):
            image = {"image": f"http://127.0.0.1:{site.getsockname()[1]}/panda.png"}
            with self.send(base, {"query": "q", "documents": [image]}) as client:
                site.settimeout(5)
                fetch, _ = site.accept()
                assert fetch.recv(9) == b"GET /pand"
                assert queued(base) == (1, 0)
                if timeout_s < 20:
                    assert client.recv(12) == b"HTTP/1.1 504"
            until(lambda: queued(base) == (0, 0), 3)
            with fetch:
                fetch.settimeout(3)
                while fetch.recv(1000):
                    pass
        assert not fake.batches

    def test_before_the_body_is_whole(self) -> None:
        with serving(FakeReranker(), max_queue_bytes=100) as base:
            with self.send(base, body("1")) as client:
                client.sendall(b"POST /v1/rerank HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
                client.sendall(b"Content-Length: 90\r\n\r\n" + b" " * 80)
                time.sleep(0.1)
                assert rerank(base, body("1" * 30)).status_code == 503, "its bytes count while it is there"
            until(lambda: rerank(base, body("1" * 30)).status_code == 200)


class TestLeash:
    def test_a_cancellation_from_elsewhere_goes_on(self) -> None:
        async def main() -> None:
            async def work() -> None:
                with Leash():
                    await asyncio.sleep(10)

            task = asyncio.create_task(work())
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        asyncio.run(main())

    def test_the_first_reason_counts_and_the_task_goes_on(self) -> None:
        async def cut_twice() -> None:
            loop = asyncio.get_running_loop()
            with Leash() as leash:
                loop.call_soon(leash.cut, ClientGone())
                loop.call_soon(leash.cut, TimeoutError())
                await asyncio.sleep(10)

        async def main() -> None:
            with pytest.raises(ClientGone):
                await cut_twice()
            await asyncio.sleep(0)  # it is not cancelled any more
            with Leash() as leash:
                leash.cut_after(0.01, TimeoutError())
            await asyncio.sleep(0.02)  # nor does a timer outlive its block

        asyncio.run(main())
