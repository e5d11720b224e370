"""A reranker without a model, and a real HTTP server around it."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import httpx
import numpy as np
import uvicorn

from jaxrank.errors import RequestError, TooLongError
from jaxrank.server import create_app
from jaxrank.types import Encoded


class FakeReranker:
    """One token a character. A document's logit is its number, as in "3.5 apples", or else its length.

    "nan" scores as NaN and "boom" fails its whole batch. batches: the documents' token counts of every call, in order.
    gate: while cleared, scoring waits. delay_s: seconds that scoring a batch takes. row_tokens: tokens of a batch, as
    the tests give batch_rows = 1.
    """

    def __init__(
        self,
        *,
        row_tokens: int = 1000,
        delay_s: float = 0.0,
        logits: bool = True,
        warm_up: Callable[[Callable[[str], None]], None] = lambda progress: None,
    ) -> None:
        self.name = "fake/reranker"
        self.preprocessing = None
        self.max_length = 500
        self.row_tokens = row_tokens
        self.scores_are_logits = logits
        self.takes_instruct = not logits
        self.instructs: list[str | None] = []
        self.compilations = 0
        self.delay_s = delay_s
        self.batches: list[list[int]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.waiting = threading.Event()
        self._warm_up = warm_up

    def warm_up(self, progress: Callable[[str], None] | None = None) -> None:
        self._warm_up(progress or (lambda text: None))

    def encode(
        self, query: str, documents: Sequence[str], *, truncate: bool = True, instruct: str | None = None
    ) -> list[Encoded]:
        self.instructs.append(instruct)
        if "refuse" in query:
            raise RequestError("the query says so; ask for something else")
        if "crash" in query:
            raise ValueError(f"secret {query}")
        room = self.max_length - len(query)
        if not truncate and any(len(document) > room for document in documents):
            raise TooLongError("one pair is too long")
        return [self._encode(document, room) for document in documents]

    def _encode(self, document: str, room: int) -> Encoded:
        codes = np.fromiter(map(ord, document[:room]), np.int32)
        return Encoded(codes, dropped=len(document) - len(codes))

    def score_encoded(self, encoded: Sequence[Encoded]) -> np.ndarray:
        self.waiting.set()
        self.gate.wait()
        self.batches.append([len(pair) for pair in encoded])
        if self.delay_s:
            time.sleep(self.delay_s)
        return np.array([_logit("".join(map(chr, pair.tokens))) for pair in encoded], np.float32)


def _logit(document: str) -> float:
    if document.startswith("boom"):
        raise RuntimeError("the device is on fire")
    try:
        return float(document.split()[0])
    except (ValueError, IndexError):
        return float(len(document))


@contextlib.contextmanager
def serving(reranker: Any, *, wait: bool = True, patience_s: float = 10, **settings: Any) -> Iterator[str]:
    """A uvicorn server in a thread, on a free port; yields its base URL, once it is ready unless wait = False."""
    app = create_app(reranker, **{"batch_rows": 1, **settings})
    config = uvicorn.Config(app, log_config=None, access_log=False, ws="none", lifespan="on")
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0), backlog=512) as listener:
        url = "http://{}:{}".format(*listener.getsockname())
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            until(lambda: server.started)
            if wait:
                until(lambda: httpx.get(url + "/ready").status_code == 200, patience_s)
            yield url
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


def until(condition: Callable[[], object], timeout_s: float = 10.0) -> None:
    """Wait until `condition` holds; AssertionError when it does not in time."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def rerank(url: str, body: Any, **options: Any) -> httpx.Response:
    """POST /v1/rerank with a JSON body, in ASCII, so that lone surrogates travel too."""
    headers = {"Content-Type": "application/json", **options.pop("headers", {})}
    return httpx.post(url + "/v1/rerank", content=json.dumps(body), headers=headers, timeout=30, **options)
