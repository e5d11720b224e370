"""What Ray's proxies have around them, without Ray: an application that ends without an answer is asked again."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from starlette.types import Message, Receive, Scope, Send

from jaxrank.server.on_ray import retry as ray_retry
from jaxrank.server.on_ray.retry import TRIES, Retry


class Proxy:
    """Ends without an answer as often as told, at different points; then answers what it was sent.

    ends: for each request, "before", "body" (once it has read some of it), or "start" (of its own answer).
    """

    def __init__(self, ends: Sequence[str] = ()) -> None:
        self.ends = list(ends)
        self.asked = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.asked += 1
        end = self.ends.pop(0) if self.ends else None
        if end == "before":
            return
        reading = asyncio.ensure_future(receive())  # as Ray's proxy does, which cancels it when the replica is gone
        message = await reading
        if end == "body":
            reading = asyncio.ensure_future(receive())
            await asyncio.sleep(0)
            reading.cancel()
            return
        body = message["body"]
        while message.get("more_body"):
            message = await receive()
            body += message["body"]
        headers = [(b"x-request-id", b"ours"), (b"X-Request-ID", b"theirs"), (b"content-type", b"text/plain")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        if end != "start":
            await send({"type": "http.response.body", "body": body})


WHOLE = b"piece 0 piece 1 piece 2 piece 3 piece 4 "


@dataclass
class Answer:
    status: int
    headers: list[tuple[bytes, bytes]]
    content: bytes


def ask(proxy: Proxy) -> Answer:
    """WHOLE, which arrives in pieces, as uvicorn hands it on: a reader that is cancelled takes nothing with it."""

    async def post() -> None:
        pieces: asyncio.Queue[Message] = asyncio.Queue()

        async def arrive() -> None:
            for i in range(5):
                await asyncio.sleep(0.001)
                pieces.put_nowait({"type": "http.request", "body": b"piece %d " % i, "more_body": i < 4})

        async def send(message: Message) -> None:
            sent.append(message)

        arriving = asyncio.create_task(arrive())
        await Retry(proxy)({"type": "http", "headers": []}, pieces.get, send)
        await arriving

    sent: list[Message] = []
    asyncio.run(post())
    start, *bodies = sent
    return Answer(start["status"], start["headers"], b"".join(one["body"] for one in bodies))


@pytest.mark.parametrize("ends", [[], ["before"], ["body"], ["start"], ["body", "start"], ["start", "before"]])
def test_one_answer_to_the_whole_request(ends: list[str]) -> None:
    proxy = Proxy(ends)
    answer = ask(proxy)
    assert (answer.status, answer.content) == (200, WHOLE)
    assert proxy.asked == len(ends) + 1
    assert answer.headers == [(b"x-request-id", b"ours"), (b"content-type", b"text/plain")]


def test_not_for_ever() -> None:
    """A request may be what kills the replicas."""
    proxy = Proxy(["body"] * 100)
    answer = ask(proxy)
    assert proxy.asked == TRIES
    assert answer.status == 503
    assert (b"retry-after", b"5") in answer.headers
    assert "Try again" in json.loads(answer.content)["error"]["message"]


def test_large_bodies_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_retry, "KEPT_BYTES", 10)
    assert ask(Proxy()).content == WHOLE
    proxy = Proxy(["start"])
    assert ask(proxy).status == 503
    assert proxy.asked == 1


def test_nobody_is_asked_for_a_client_that_left() -> None:
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    asked = 0

    async def proxy(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal asked
        asked += 1
        assert (await receive())["type"] == "http.disconnect"

    asyncio.run(Retry(proxy)({"type": "http", "headers": []}, receive, send))
    assert (asked, sent) == (1, [])


def test_streams_are_passed_on() -> None:
    """Nothing but the beginning of an answer is held back."""
    sent: list[Message] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        assert sent == []
        await send({"type": "http.response.body", "body": b"a", "more_body": True})
        assert [one["type"] for one in sent] == ["http.response.start", "http.response.body"]
        await send({"type": "http.response.body", "body": b"b"})

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.request", "body": b""}

    asyncio.run(Retry(app)({"type": "http", "headers": []}, receive, send))
    assert [one.get("body") for one in sent] == [None, b"a", b"b"]
