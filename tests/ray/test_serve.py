"""`serve run jaxrank.server.on_ray.app:build`: the plain server's answers, and replicas that die under load."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import KEY, Cluster, until

DEPLOY = Path(__file__).parent.parent.parent / "deploy"

GOOD = {
    "query": "what is panda?",
    "documents": ["hi", "The giant panda is a bear species endemic to China.", "Paris is in France."],
}
TEXTS = {"query": GOOD["query"], "texts": GOOD["documents"]}
MANY = {"query": "q", "documents": ["d"] * 31}
BEARER = {"Authorization": f"Bearer {KEY}"}
NAMES = ("sglang", "vllm", "cohere", "jina", "voyage", "tei", "infinity", "llamacpp")

PATHS = ("", "health", "ready", "v1/models", "version", "openapi.json")

REQUESTS: dict[str, dict[str, Any]] = {
    **{f"good {name}": dict(url=f"/{name}/v1/rerank", json=GOOD) for name in NAMES},
    **{f"too many {name}": dict(url=f"/{name}/v1/rerank", json=MANY) for name in NAMES},
    **{f"no query {name}": dict(url=f"/{name}/v1/rerank", json={"documents": ["a"]}) for name in NAMES},
    **{f"no key {name}": dict(url=f"/{name}/v1/rerank", json=GOOD, headers={}) for name in NAMES},
    "plain": dict(url="/v1/rerank", json=GOOD),
    "tei": dict(url="/rerank", json=TEXTS),
    "cohere v2": dict(url="/v2/rerank", json=GOOD),
    "score": dict(url="/v1/score", json={"text_1": "a", "text_2": ["b", "c"]}),
    "tokenize": dict(url="/tokenize?render=true", json=GOOD),
    "put": dict(method="PUT", url="/v1/rerank", json=GOOD),
    "no JSON": dict(url="/v1/rerank", content=b"{", headers={**BEARER, "Content-Type": "application/json"}),
    "no content type": dict(url="/v1/rerank", content=b"{}", headers=BEARER),
    "too large": dict(url="/v1/rerank", json={"query": "x" * 8_100_000, "documents": ["a"]}),
    "own id": dict(url="/v1/rerank", json=GOOD, headers={**BEARER, "X-Request-Id": "mine-1"}),
    "many headers": dict(url="/v1/rerank", json=GOOD, headers={**BEARER, **{f"x-{i}": "1" for i in range(110)}}),
    "wrong method": dict(method="DELETE", url="/v1/rerank"),
    "no route": dict(method="GET", url="/nothing"),
    **{f"get {path}": dict(method="GET", url="/" + path) for path in PATHS},
    "ready without a key": dict(method="GET", url="/ready", headers={}),
    "models without a key": dict(method="GET", url="/v1/models", headers={}),
}


def ask(base: str, asked: dict[str, Any]) -> httpx.Response:
    asked = {"method": "POST", "headers": BEARER, **asked}
    return httpx.request(asked.pop("method"), base + asked.pop("url"), timeout=60, **asked)


def lasting(answer: httpx.Response) -> tuple[int, str, dict[str, str]]:
    """Status, body and headers, without what differs from one request to the next."""
    text = re.sub(r"[0-9a-f]{8}(-?[0-9a-f]{4}){3}-?[0-9a-f]{12}", "ID", answer.text)
    text = re.sub(r'"created": ?[0-9.]+', "CREATED", text)
    passing = ("date", "server", "x-request-id", "content-length", "connection", "transfer-encoding")
    timed = re.compile("x-.*-time")
    headers = {k: v for k, v in answer.headers.items() if k not in passing and not timed.fullmatch(k)}
    if "allow" in headers:  # from a set
        headers["allow"] = ", ".join(sorted(headers["allow"].split(", ")))
    return answer.status_code, text, headers


@pytest.mark.parametrize("name", REQUESTS)
def test_answers_are_those_of_the_plain_server(cluster: Cluster, plain: str, name: str) -> None:
    theirs, ours = ask(plain, REQUESTS[name]), ask(cluster.url, REQUESTS[name])
    assert lasting(ours) == lasting(theirs)
    identities = [value for key, value in ours.headers.multi_items() if key == "x-request-id"]
    assert len(identities) == 1
    wanted = REQUESTS[name].get("headers", {}).get("X-Request-Id")
    assert identities[0] == wanted if wanted else len(identities[0]) >= 32


def test_metrics_are_those_of_a_replica(cluster: Cluster) -> None:
    answer = ask(cluster.url, dict(method="GET", url="/metrics", headers={}))
    assert answer.status_code == 200
    assert "jaxrank_ready 1.0" in answer.text


def test_a_full_queue_is_refused_by_the_replicas(cluster: Cluster) -> None:
    """Ray's own bound is higher, so that the refusal is ours, and says when to come back."""
    body = {"query": "q", "documents": ["the giant panda is a bear " * 30] * 30}

    def post(_: int) -> httpx.Response:
        return httpx.post(cluster.url + "/v1/rerank", json=body, headers=BEARER, timeout=120)

    with ThreadPoolExecutor(80) as pool:
        answers = list(pool.map(post, range(80)))
    assert {answer.status_code for answer in answers} == {200, 503}
    for answer in answers:
        if answer.status_code == 503:
            assert answer.json()["message"].startswith("The request queue is full.")
            assert int(answer.headers["retry-after"]) >= 1


class Load:
    """Clients that ask and ask. answers: how often each id was answered. wrong: what was not as it should be."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.answers: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.slowest = 0.0
        self._stop = threading.Event()
        self._clients = [threading.Thread(target=self._ask, args=(number,)) for number in range(8)]

    def __enter__(self) -> Load:
        for client in self._clients:
            client.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for client in self._clients:
            client.join(120)
            assert not client.is_alive()

    def more(self, count: int) -> None:
        """Wait for so many more answers."""
        before = len(self.answers)
        until(lambda: len(self.answers) >= before + count, 120, "answers")

    def _ask(self, number: int) -> None:
        with httpx.Client(base_url=self.cluster.url, headers=BEARER, timeout=120) as http:
            for turn in count():
                if self._stop.is_set():
                    return
                identity = f"client-{number}-{turn}"
                documents = [f"{identity} document {i}: " + "the giant panda is a bear " * 12 for i in range(20)]
                began = time.monotonic()
                answer = http.post(
                    "/v1/rerank", json={"query": identity, "documents": documents}, headers={"X-Request-Id": identity}
                )
                self.slowest = max(self.slowest, time.monotonic() - began)
                self.answers[identity] += 1
                if answer.status_code != 200 or answer.headers.get_list("x-request-id") != [identity]:
                    self.wrong.append(f"{identity}: {answer.status_code} {answer.text[:200]}")
                elif sorted(one["document"] for one in answer.json()) != sorted(documents):
                    self.wrong.append(f"{identity}: not its documents")


AGAIN = "a replica ended before its answer"
"""What ray_retry logs."""


def test_requests_on_a_replica_that_is_killed_are_answered_by_another(cluster: Cluster) -> None:
    """Every id gets one answer, 200, with its own documents; two replicas are there again after a while."""
    before, tried = cluster.replicas(), cluster.proxy_log().count(AGAIN)
    victim = min(before)
    with Load(cluster) as load:
        load.more(16)
        os.kill(victim, signal.SIGKILL)
        until(lambda: len(cluster.replicas() - before) == 1, 180, "a new replica")
        load.more(16)
    assert load.wrong == []
    assert set(load.answers.values()) == {1}
    tried = cluster.proxy_log().count(AGAIN) - tried
    print(f"\n{len(load.answers)} requests, {tried} of them tried again, slowest {load.slowest:.1f} s")
    assert tried >= 1, "nothing was under way on the killed replica: this test has shown nothing"
    assert victim not in cluster.replicas()


def test_a_new_version_takes_over_without_losing_a_request(cluster: Cluster) -> None:
    before, tried = cluster.replicas(), cluster.proxy_log().count(AGAIN)
    with Load(cluster) as load:
        load.more(16)
        cluster.deploy(max_documents=31)
        until(lambda: len(cluster.replicas()) == 2 and not cluster.replicas() & before, 240, "two new replicas")
        load.more(16)
    assert load.wrong == []
    assert set(load.answers.values()) == {1}
    assert cluster.proxy_log().count(AGAIN) == tried, "replicas ended before they had answered"
    assert ask(cluster.url, dict(url="/v1/rerank", json=MANY)).status_code == 200
    print(f"\n{len(load.answers)} requests, slowest {load.slowest:.1f} s")
