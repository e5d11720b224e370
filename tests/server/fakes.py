"""A reranker without a model, and a real HTTP server around it."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import httpx
import numpy as np

from jaxrank.errors import RequestError, TooLongError
from jaxrank.media.images import Preprocessing
from jaxrank.runtime.attention import Choice
from jaxrank.runtime.calls import Call, Fetch
from jaxrank.server import create_app
from jaxrank.server.http.connections import Config, Server
from jaxrank.stages import Stages
from jaxrank.text.tokenizer import NO_CUT, Cut, Token, check_text
from jaxrank.types import Encoded, Window, Work


class FakeReranker:
    """One token a character. A document's logit is its number, as in "3.5 apples", or else its length.

    "nan" scores as NaN and "boom" fails its whole batch. Documents that are to be split are cut into pieces side by
    side. batches: the documents' token counts of every call, in order. gate: while cleared, scoring waits. delay_s:
    seconds that scoring a batch takes. row_tokens: tokens of a batch, as the tests give batch_rows = 1.
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
        self.devices = "1 device (fake)"
        self.attention: dict[str, Choice] = {"text": Choice("tiled")}
        self.dtype = "float32"
        self.preprocessing: Preprocessing | None = None
        self.max_length = 500
        self.min_length = 4
        self.row_tokens = row_tokens
        self.ahead = 0
        self.scores_are_logits = logits
        self.takes_instruct = not logits
        self.instructs: list[str | None] = []
        self.cuts: list[Cut] = []
        self.compilations = 0
        self.compiled = (0, 0)
        self.stages = Stages()
        self.work = Work()
        self.delay_s = delay_s
        self.batches: list[list[int]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.waiting = threading.Event()
        self._warm_up = warm_up

    def warm_up(self, progress: Callable[[str], None] | None = None) -> None:
        self._warm_up(progress or (lambda text: None))

    def encode(
        self,
        query: str,
        documents: Sequence[str],
        *,
        truncate: bool = True,
        cut: Cut = NO_CUT,
        instruct: str | None = None,
        long_document: str = "truncate",
        max_windows: int | None = None,
    ) -> list[Encoded]:
        self.instructs.append(instruct)
        if "refuse" in query:
            raise RequestError("the query says so; ask for something else")
        if "crash" in query:
            raise ValueError(f"secret {query}")
        self.cuts.append(cut)
        limit = min(cut.pair or self.max_length, self.max_length)
        room = limit - len(query)
        if long_document == "window":
            starts = [range(0, len(document), min(cut.document or room, room)) for document in documents]
            if max_windows is not None and sum(map(len, starts)) > max_windows:
                raise RequestError(f"documents[0] and others come to more than {max_windows} windows")
            return [
                replace(
                    self._encode(document[i : i + s.step], room, False),
                    window=Window(i, min(i + s.step, len(document)), n),
                )
                for document, s in zip(documents, starts, strict=True)
                for n, i in enumerate(s)
            ]
        for document in documents:
            length = len(query) + min(len(document), cut.document or len(document))
            if not truncate and length > limit:
                raise TooLongError("one pair is too long", length, limit)
        return [self._encode(document, min(cut.document or room, room), cut.keep_end) for document in documents]

    def _encode(self, document: str, room: int, keep_end: bool) -> Encoded:
        kept = document[max(len(document) - room, 0) :] if keep_end else document[:room]
        return Encoded(np.fromiter(map(ord, kept), np.int32), dropped=len(document) - len(kept))

    def render(self, pair: Encoded) -> str:
        return "".join(map(chr, pair.tokens))

    def tokens_of(self, text: str) -> list[Token]:
        return [Token(ord(character), character, i, i + 1) for i, character in enumerate(check_text(text, "text"))]

    def score_encoded(self, encoded: Sequence[Encoded]) -> np.ndarray:
        self.waiting.set()
        self.gate.wait()
        tokens = [len(pair) for pair in encoded]
        self.batches.append(tokens)
        self.work = self.work.plus(self.row_tokens, sum(tokens), sum(tokens))
        if self.delay_s:
            time.sleep(self.delay_s)
        return np.array([_logit("".join(map(chr, pair.tokens))) for pair in encoded], np.float32)

    def calls(self, encoded: Sequence[Encoded]) -> Iterator[Call]:
        return one_call(self.score_encoded)(encoded)


def one_call(score: Callable[[Sequence[Encoded]], np.ndarray]) -> Callable[[Sequence[Encoded]], Iterator[Call]]:
    """What scores all pairs at once, waited for, as the calls of a reranker."""

    def calls(encoded: Sequence[Encoded]) -> Iterator[Call]:
        def run() -> Fetch:
            logits = score(encoded)
            return lambda: [(list(range(len(encoded))), logits)]

        yield Call(sum(map(len, encoded)), run)

    return calls


def _logit(document: str) -> float:
    if document.startswith("boom"):
        raise RuntimeError("the device is on fire")
    try:
        return float(document.split()[0])
    except (ValueError, IndexError):
        return float(len(document))


@contextlib.contextmanager
def serving(
    reranker: Any,
    *,
    wait: bool = True,
    patience_s: float = 10,
    connections: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Iterator[str]:
    """A server in a thread, on a free port; yields its base URL, once it is ready unless wait = False.

    connections: settings of connections.Config; the others are create_app's.
    """
    app = create_app(reranker, **{"batch_rows": 1, **settings})
    server = Server(Config(app, **(connections or {})))
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
