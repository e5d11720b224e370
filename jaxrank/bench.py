"""Sends load to a rerank server over HTTP, in any dialect, and reports the results.

Clients are threads on http.client with ready-made bodies, because the load often shares the cores with the server. They
take 0.1 to 0.4 ms of CPU for each request. Asynchronous clients take 1 to 6 ms.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import queue
import random
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any, cast
from urllib.parse import urlsplit

import numpy as np

from jaxrank.errors import RequestError

PATHS = {
    "sglang": "/v1/rerank",
    "vllm": "/v1/rerank",
    "cohere": "/v2/rerank",
    "jina": "/v1/rerank",
    "voyage": "/v1/rerank",
    "tei": "/rerank",
    "infinity": "/rerank",
    "llamacpp": "/v1/reranking",
}
"""The path of the requests of each dialect."""

REFUSED = (429, 503)
"""The statuses of a server that is too busy."""


@dataclass(frozen=True)
class Query:
    """The content of one request. The documents are texts."""

    query: str
    documents: Sequence[str]


@dataclass(frozen=True)
class Target:
    """The server that gets the requests, and the form of the requests.

    Args:
        url: the server's address. It may have a path, which comes before the dialect's.
        dialect: one of PATHS.
        model: the name of the model in requests.
        api_key: the key in requests, or None.
        timeout_s: the seconds to wait for a connection or an answer.

    Raises:
        RequestError: the dialect is unknown, or the address is not valid.
    """

    url: str
    dialect: str = "sglang"
    model: str = "model"
    api_key: str | None = None
    timeout_s: float = 60.0

    def __post_init__(self) -> None:
        if self.dialect not in PATHS:
            raise RequestError(f"dialect {self.dialect!r} is unknown; one of {', '.join(PATHS)}")
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise RequestError(f"{self.url!r} is no URL of a server; it looks like http://127.0.0.1:30000")

    def connect(self) -> HTTPConnection:
        """Return a connection. It opens at the first request."""
        parts = urlsplit(self.url)
        kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        return kind(cast(str, parts.hostname), parts.port, timeout=self.timeout_s)

    @property
    def path(self) -> str:
        """The path of requests."""
        return urlsplit(self.url).path.rstrip("/") + PATHS[self.dialect]

    @property
    def headers(self) -> dict[str, str]:
        """The headers of every request."""
        named = {"Content-Type": "application/json", "X-Rerank-Dialect": self.dialect}
        return named if self.api_key is None else {**named, "Authorization": f"Bearer {self.api_key}"}

    def body(self, query: Query) -> bytes:
        """Return the body of a request in the dialect."""
        documents = "texts" if self.dialect == "tei" else "documents"
        asked: dict[str, Any] = {"query": query.query, documents: list(query.documents)}
        if self.dialect != "tei":
            asked["model"] = self.model
        if self.dialect in ("sglang", "jina", "vllm"):
            asked["return_documents"] = False
        return json.dumps(asked).encode()

    def served_model(self) -> str:
        """Return the first name that GET /v1/models lists, or "model" if it lists none.

        Raises:
            RequestError: nobody answers.
        """
        with contextlib.closing(self.connect()) as connection:
            try:
                connection.request("GET", urlsplit(self.url).path.rstrip("/") + "/v1/models", headers=self.headers)
                answer = json.load(connection.getresponse())
                return str(answer["data"][0]["id"])
            except OSError as error:
                raise RequestError(f"nobody answers at {self.url}: {error}; start the server first") from None
            except (HTTPException, ValueError, LookupError, TypeError):
                return "model"


@dataclass(frozen=True)
class Outcome:
    """The result of one request. Times are of time.perf_counter().

    Attributes:
        which: the request's place among the bodies.
        planned: the time when it was to be sent. In a closed loop this is the time when it was sent.
        status: the HTTP status, or 0 if no answer came.
        wrong: what is wrong with the answer itself, or "".
        retry_after: whether the server said when to come back.
    """

    which: int
    planned: float
    sent: float
    ended: float
    status: int
    wrong: str = ""
    retry_after: bool = False

    @property
    def kind(self) -> str:
        """One of "answered", "refused" because the server is busy, or "failed"."""
        if self.status in REFUSED:
            return "refused"
        return "failed" if self.status != 200 or self.wrong else "answered"

    @property
    def seconds(self) -> float:
        """The seconds from the time when it was to be sent. So a generator that is late does not hide waiting time."""
        return self.ended - self.planned


class Client:
    """One connection, used by one thread. `observe` is called with every request's place, status and answer."""

    def __init__(
        self, target: Target, bodies: Sequence[bytes], observe: Callable[[int, int, bytes], None] | None = None
    ) -> None:
        self.target = target
        self.bodies = bodies
        self.observe = observe
        self.connection = target.connect()
        self.fresh = True

    def ask(self, which: int, planned: float | None = None) -> Outcome:
        """Send bodies[which] and wait for the answer."""
        identity = uuid.uuid4().hex
        headers = {**self.target.headers, "X-Request-Id": identity}
        sent = time.perf_counter()
        planned = sent if planned is None else planned
        status, body, wrong, retry_after = 0, b"", "", False
        try:
            response = self._exchange(self.bodies[which], headers)
            status, body = response.status, response.read()
            retry_after = "retry-after" in response.headers
            named = response.headers.get("x-request-id")
            wrong = f"answer to {named} instead of {identity}" if named not in (None, identity) else ""
        except (OSError, HTTPException) as error:
            self.close()
            status, wrong = 0, type(error).__name__
        ended = time.perf_counter()
        if status == 200 and not wrong:
            wrong = _wrong(body, _count(self.bodies[which]))
        if self.observe is not None:
            self.observe(which, status, body)
        return Outcome(which, planned, sent, ended, status, wrong, retry_after)

    def _exchange(self, body: bytes, headers: dict[str, str]) -> HTTPResponse:
        """Send the request, and send it again if the server has closed an idle connection.

        It has not seen the request then.
        """
        idle, self.fresh = not self.fresh, False
        try:
            self.connection.request("POST", self.target.path, body, headers)
            return self.connection.getresponse()
        except (ConnectionResetError, BrokenPipeError, ConnectionAbortedError):  # RemoteDisconnected is the first
            if not idle:
                raise
            self.connection.close()
            self.connection.request("POST", self.target.path, body, headers)
            return self.connection.getresponse()

    def close(self) -> None:
        """Close the connection. The next request opens it again."""
        self.connection.close()
        self.fresh = True


@lru_cache(1024)  # the same bodies are sent again and again
def _count(body: bytes) -> int:
    asked = json.loads(body)
    return len(asked.get("documents") or asked["texts"])


def _wrong(body: bytes, documents: int) -> str:
    """Return what is wrong with a ranking of so many documents, or "" if nothing is."""
    try:
        answer = json.loads(body)
        results = answer if isinstance(answer, list) else answer.get("results", answer.get("data"))
        indices = sorted(result["index"] for result in results)
    except (ValueError, LookupError, TypeError, AttributeError):
        return "no ranking"
    return "" if indices == list(range(documents)) else f"{len(indices)} results for {documents} documents"


def closed_loop(
    target: Target,
    bodies: Sequence[bytes],
    clients: int,
    *,
    requests: int | None = None,
    duration_s: float = float("inf"),
    observe: Callable[[int, int, bytes], None] | None = None,
    tick: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Send requests from `clients` clients. Each sends the next request when it has the answer to the last one.

    The loop ends after so many requests or seconds.

    Returns:
        The outcomes, in the order of the answers.
    """
    numbers = itertools.count()
    outcomes: list[Outcome] = []
    end = time.perf_counter() + duration_s

    def work() -> None:
        client = Client(target, bodies, observe)
        with contextlib.closing(client):
            while (number := next(numbers)) < (requests or float("inf")) and time.perf_counter() < end:
                outcome = client.ask(number % len(bodies))
                outcomes.append(outcome)
                tick(outcome)
                if not outcome.status:
                    time.sleep(0.05)  # do not ask a dead server in a busy loop

    _in_threads(work, clients)
    return sorted(outcomes, key=lambda outcome: outcome.ended)


def open_loop(
    target: Target,
    bodies: Sequence[bytes],
    rate: float,
    *,
    connections: int = 256,
    requests: int | None = None,
    duration_s: float = float("inf"),
    observe: Callable[[int, int, bytes], None] | None = None,
    tick: Callable[[Outcome], None] = lambda outcome: None,
    seed: int = 0,
) -> list[Outcome]:
    """Send `rate` requests a second, whether answers come or not.

    Arrivals are random, as from many independent users (a Poisson process). At most `connections` requests are in
    progress. Others wait, which counts as their latency. The loop ends after so many requests or seconds.

    Returns:
        The outcomes, in the order of the answers.
    """
    outcomes: list[Outcome] = []
    due: queue.SimpleQueue[tuple[int, float] | None] = queue.SimpleQueue()

    def arrivals() -> Iterator[tuple[int, float]]:
        draw = random.Random(seed)
        at = start = time.perf_counter()
        for number in itertools.count():
            at += draw.expovariate(rate)
            if (requests is not None and number >= requests) or at > start + duration_s:
                return
            yield number, at

    def plan() -> None:
        for number, at in arrivals():
            time.sleep(max(0.0, at - time.perf_counter()))
            due.put((number, at))
        for _ in range(connections):
            due.put(None)

    def work() -> None:
        client = Client(target, bodies, observe)
        with contextlib.closing(client):
            while (one := due.get()) is not None:
                outcome = client.ask(one[0] % len(bodies), one[1])
                outcomes.append(outcome)
                tick(outcome)

    planner = threading.Thread(target=plan, daemon=True)
    planner.start()
    _in_threads(work, connections)
    planner.join()
    return sorted(outcomes, key=lambda outcome: outcome.ended)


def _in_threads(work: Callable[[], None], count: int) -> None:
    """Run the work in so many threads and wait. The threads do not continue after the main thread is interrupted."""
    threads = [threading.Thread(target=work, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@dataclass
class Report:
    """A summary of a run. Latencies are in milliseconds at the percentiles 50, 90 and 99.

    They are None if there are none.
    """

    requests: int
    answered: int
    refused: int
    failed: int
    seconds: float
    requests_per_s: float
    pairs_per_s: float
    latency_ms: tuple[float, float, float] | None
    refusal_ms: tuple[float, float, float] | None
    sent_late_ms: float
    without_retry_after: int
    problems: dict[str, int] = field(default_factory=dict[str, int])


def report(outcomes: Sequence[Outcome], documents: Sequence[int]) -> Report:
    """Summarise outcomes in the order of their ends. `documents` are the numbers of documents of each body."""
    good, refused, others = (
        [one for one in outcomes if one.kind == kind] for kind in ("answered", "refused", "failed")
    )
    begin = min((one.sent for one in outcomes), default=0.0)
    seconds = max((one.ended for one in outcomes), default=0.0) - begin
    return Report(
        requests=len(outcomes),
        answered=len(good),
        refused=len(refused),
        failed=len(others),
        seconds=round(seconds, 3),
        requests_per_s=round(len(good) / seconds, 2) if seconds else 0.0,
        pairs_per_s=round(sum(documents[one.which] for one in good) / seconds, 2) if seconds else 0.0,
        latency_ms=percentiles([one.seconds for one in good]),
        refusal_ms=percentiles([one.ended - one.sent for one in refused]),
        sent_late_ms=round(max((one.sent - one.planned for one in outcomes), default=0.0) * 1e3, 1),
        without_retry_after=sum(not one.retry_after for one in refused),
        problems=dict(Counter(f"{one.status or 'nothing came'} {one.wrong}".strip() for one in others)),
    )


def percentiles(seconds: Sequence[float]) -> tuple[float, float, float] | None:
    """Return the percentiles 50, 90 and 99, in milliseconds."""
    if not seconds:
        return None
    p50, p90, p99 = np.percentile(np.array(seconds) * 1e3, (50, 90, 99)).round(2).tolist()
    return p50, p90, p99


def made_up(requests: int, documents: int, words: int, seed: int = 0) -> list[Query]:
    """Return requests of English words in random order.

    Queries have 4 to 12 words. Documents have `words` words on average, and each has half to one and a half times as
    many.
    """
    draw = random.Random(seed)

    def text(low: int, high: int) -> str:
        return " ".join(draw.choices(_WORDS, k=draw.randint(max(low, 1), max(high, 1))))

    return [
        Query(text(4, 12), [text(words - words // 2, words + words // 2) for _ in range(documents)])
        for _ in range(requests)
    ]


_TEXT = (
    "the of and a to in is that it was for on are as with his they at be this from have or by one had not but what all "
    "were when we there can an your which their said if do will each about how up out them then she many some so these "
    "would other into has more her two like him see time could no make than first been its who now people my made over "
    "did down only way find use may water long little very after words called just where most know get through back "
    "much before go good new write our used me man too any day same right look think also around another came come "
    "work three word must because does part even place well such here take why things help put years different away "
    "again off went old number great tell men say small every found still between name should home big give air line"
)
_WORDS = _TEXT.split()
