"""What each dialect's documentation says, held against what its clients send and get, refusals of every kind too."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from pydantic import TypeAdapter

from jaxrank.server.api.schemas import content_schemas
from jaxrank.server.dialects.resolve import DIALECTS
from tests.server.fakes import FakeReranker, serving, until

NAMES = sorted(DIALECTS)
KEY = {"Authorization": "Bearer k"}
JSON = {**KEY, "Content-Type": "application/json"}
GOOD = {"query": "fruit", "documents": ["1 apple", "3 pears"]}
WAITING = ("cohere", "jina", "voyage", "tei", "infinity")
"""Those whose clients come back after 429."""


@pytest.fixture(scope="module")
def fake() -> FakeReranker:
    return FakeReranker()


@pytest.fixture(scope="module")
def url(fake: FakeReranker) -> Iterator[str]:
    with serving(fake, api_keys=["k"], max_queue_requests=1, max_documents=50, max_headers=40) as base:
        yield base


@pytest.fixture(scope="module")
def hasty() -> Iterator[str]:
    """A server that waits for no body; others do, as even a quick client is slow on a busy machine."""
    with serving(FakeReranker(), api_keys=["k"], body_timeout_s=0.2) as base:
        yield base


@pytest.fixture(scope="module")
def documents(url: str) -> dict[str, Any]:
    """The OpenAPI documents, "" for that of all dialects."""
    return {
        name: httpx.get(f"{url}/{name}/openapi.json".replace("//o", "/o"), headers=KEY).json() for name in ["", *NAMES]
    }


class TestExamples:
    """Requests as the packages of these clients put them, optional fields and nulls with them."""

    @pytest.mark.parametrize(
        "name, path, body, best",
        [
            ("sglang", "/v1/rerank", {"model": "m", **GOOD, "instruct": None}, {"document": "3 pears", "score": 3.0}),
            (
                "sglang",
                "/v1/rerank",
                {
                    "query": [{"type": "text", "text": "q"}],
                    "documents": [[{"type": "text", "text": "2 a"}]],
                    "top_n": 2,
                },
                {"document": "2 a", "index": 0},
            ),
            ("vllm", "/rerank", {"model": "m", **GOOD, "truncate_prompt_tokens": -1}, {"index": 1}),
            (
                "vllm",
                "/v2/rerank",
                {
                    "model": "m",
                    "query": "q",
                    "documents": {"content": [{"type": "text", "text": "4"}, {"type": "text", "text": " a"}]},
                    "chat_template_kwargs": {"instruction": "i"},
                },
                {"index": 0, "document": {"text": "4 a", "multi_modal": None}},
            ),
            (
                "cohere",
                "/v1/rerank",
                {
                    "model": "rerank-v3.5",
                    "query": "q",
                    "documents": [{"text": "1 a", "id": "x"}, {"text": "2 b"}],
                    "top_n": 1,
                    "rank_fields": ["text"],
                    "return_documents": True,
                    "max_chunks_per_doc": 10,
                },
                {"index": 1, "document": {"text": "2 b", "multi_modal": None}},
            ),
            (
                "cohere",
                "/v2/rerank",
                {"model": "m", **GOOD, "top_n": None, "max_tokens_per_doc": 4096, "priority": 0},
                {"index": 1},
            ),
            (
                "jina",
                "/v1/rerank",
                {
                    "model": "jina-reranker-m0",
                    "query": {"text": "q"},
                    "documents": [{"text": "1 a"}, "2 b"],
                    "return_documents": True,
                },
                {"index": 1, "document": {"text": "2 b", "multi_modal": None}},
            ),
            (
                "voyage",
                "/v1/rerank",
                {**GOOD, "model": "rerank-2", "top_k": None, "truncation": True},
                {"index": 1},
            ),
            (
                "tei",
                "/rerank",
                {
                    "query": "q",
                    "texts": ["1 a", "2 b"],
                    "raw_scores": True,
                    "return_text": True,
                    "truncate": False,
                    "truncation_direction": "Right",
                },
                {"index": 1, "text": "2 b", "score": 2.0},
            ),
            (
                "infinity",
                "/rerank",
                {
                    "model": "default/not-specified",
                    **GOOD,
                    "return_documents": True,
                    "raw_scores": False,
                    "top_n": None,
                },
                {"index": 1, "document": "3 pears"},
            ),
            ("llamacpp", "/reranking", {"model": "m", **GOOD, "top_n": 1}, {"index": 1, "relevance_score": 3.0}),
            (
                "llamacpp",
                "/v1/rerank",
                {"query": "q", "texts": ["1 a"], "return_text": True},
                {"text": "1 a", "score": 1.0},
            ),
        ],
        ids=str,
    )
    def test_of_each_client(self, url: str, name: str, path: str, body: dict[str, Any], best: dict[str, Any]) -> None:
        answer = httpx.post(f"{url}/{name}{path}", json=body, headers=KEY, timeout=30)
        assert answer.status_code == 200, answer.text
        said = answer.json()
        TypeAdapter(DIALECTS[name].answered).validate_python(said, strict=True)
        first = said[0] if isinstance(said, list) else (said.get("results") or said["data"])[0]
        assert first.items() >= best.items()


class TestRefusals:
    """Whatever the reason, a client reads it where it looks, and the documentation has its status."""

    def check(self, documents: dict[str, Any], name: str, answer: httpx.Response, status: int) -> str:
        """The type of the error."""
        assert answer.status_code == status, answer.text
        body = answer.json()
        TypeAdapter(DIALECTS[name].error_body).validate_python(body, strict=True)
        assert name == "tei" or body["code"] == status
        if status not in (404, 405):
            responses = documents[name]["paths"]["/v1/rerank"]["post"]["responses"]
            assert str(status) in responses
            assert set(responses[str(status)].get("headers", {})) <= {key.title() for key in answer.headers} | {
                "WWW-Authenticate"
            }
            assert str(status) in documents[""]["paths"]["/v1/rerank"]["post"]["responses"]
        return body["error_type"] if name == "tei" else body["error"]["type"]

    @pytest.mark.parametrize("name", NAMES)
    def test_before_it_is_read(self, url: str, hasty: str, documents: dict[str, Any], name: str) -> None:
        own = {
            "tei": ["Validation"] * 5,
            "llamacpp": ["authentication_error", "not_found_error", *["invalid_request_error"] * 3],
        }
        path = f"{url}/{name}/v1/rerank"
        many = {**KEY, **{f"X-Number-{i}": "1" for i in range(60)}}
        found = [
            self.check(documents, name, httpx.post(path, json=GOOD), 401),
            self.check(documents, name, httpx.post(path + "s", json=GOOD, headers=KEY), 404),
            self.check(documents, name, httpx.delete(path, headers=KEY), 405),
            self.check(documents, name, httpx.post(path, json=GOOD, headers=many), 431),
            self.check(documents, name, slow(hasty, f"/{name}/v1/rerank"), 408),
        ]
        assert found == own.get(
            name, ["Unauthorized", "NotFound", "MethodNotAllowed", "RequestHeaderFieldsTooLarge", "RequestTimeout"]
        )

    @pytest.mark.parametrize("name", NAMES)
    def test_after(self, url: str, documents: dict[str, Any], fake: FakeReranker, name: str) -> None:
        path = f"{url}/{name}/v1/rerank"

        def post(body: Any, **headers: str) -> httpx.Response:
            return httpx.post(path, content=json.dumps(body), headers=JSON | headers, timeout=30)

        tei = name == "tei"
        self.check(documents, name, post([]), 400)
        self.check(documents, name, post({"query": 5}), 422 if tei else 400)
        self.check(documents, name, post({"query": "q", "documents": ["a"] * 51}), 422 if tei else 413)
        crash = self.check(documents, name, post({"query": "crash", "documents": ["a"]}), 500)
        boom = self.check(documents, name, post({"query": "q", "documents": ["boom"]}), 424 if tei else 500)
        kinds = {"tei": "Backend", "llamacpp": "server_error"}
        assert crash == boom == kinds.get(name, "InternalServerError")
        fake.gate.clear()
        self.check(documents, name, post(GOOD, **{"X-Request-Timeout": "0.05"}), 504)
        held = threading.Thread(target=post, args=(GOOD,))
        held.start()
        until(lambda: httpx.get(url + "/ready").json()["queued_requests"] == 1)
        self.check(documents, name, post(GOOD), 429 if name in WAITING else 503)
        fake.gate.set()
        held.join()

    def test_before_it_is_warm(self, documents: dict[str, Any]) -> None:
        warm = threading.Event()
        kinds = {"tei": "Unhealthy", "llamacpp": "unavailable_error", "vllm": "Service Unavailable"}

        def wait(progress: Any) -> None:
            warm.wait(30)

        with serving(FakeReranker(warm_up=wait), wait=False) as base:
            for name in NAMES:
                answer = httpx.post(f"{base}/{name}/v1/rerank", json=GOOD)
                assert self.check(documents, name, answer, 503) == kinds.get(name, "ServiceUnavailable")
            warm.set()


def slow(url: str, path: str) -> httpx.Response:
    """The answer to a body that does not come."""
    host, port = url.removeprefix("http://").split(":")
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n"
    with socket.create_connection((host, int(port)), timeout=10) as client:
        client.sendall(f"{head}Authorization: Bearer k\r\n\r\n".encode())
        received = b""
        while piece := client.recv(65536):
            received += piece
    top, _, body = received.partition(b"\r\n\r\n")
    lines = [line.split(": ", 1) for line in top.decode().split("\r\n")[1:]]
    return httpx.Response(int(top.split()[1]), headers=[(key, value) for key, value in lines], content=body)


class TestDocuments:
    STATUSES = ("400", "401", "408", "413", "431", "500", "503", "504")

    @pytest.mark.parametrize("name", ["", *NAMES])
    def test_statuses_are_those_of_the_dialect(self, documents: dict[str, Any], name: str) -> None:
        more = {"tei": ["422", "424", "429"], "": ["422", "424", "429"]}.get(name, ["429"] if name in WAITING else [])
        for path in ("/v1/rerank", "/score", "/tokenize"):
            responses = documents[name]["paths"][path]["post"]["responses"]
            assert list(responses) == sorted(["200", *self.STATUSES, *more])
            assert set(responses["503"]["content"]) == {"application/json", "text/plain"}
        for path, status in (("/info", "200"), ("/ready", "503")):
            operation = documents[name]["paths"][path]["get"]
            assert status in operation["responses"]
            assert ("401" in operation["responses"]) == (path == "/info") == ("security" not in operation)

    def test_metrics_that_are_open(self) -> None:
        with serving(FakeReranker(), api_keys=["k"], open_metrics=True) as base:
            document = httpx.get(base + "/openapi.json", headers=KEY).json()
        operation = document["paths"]["/metrics"]["get"]
        assert operation["security"] == []
        assert "401" not in operation["responses"]

    @pytest.mark.parametrize("name", NAMES)
    def test_what_has_no_effect_is_not_there(self, documents: dict[str, Any], name: str) -> None:
        """A prefix is stronger than the header."""

        def headers(document: dict[str, Any]) -> set[str]:
            return {parameter["name"] for parameter in document["paths"]["/rerank"]["post"]["parameters"]}

        assert headers(documents[""]) - headers(documents[name]) == {"X-Rerank-Dialect"}

    @pytest.mark.parametrize("sees", [False, True])
    def test_contents_are_those_that_the_model_takes(self, sees: bool) -> None:
        schemas = content_schemas(sees, 9)
        named = set(re.findall(r"#/components/schemas/(\w+)", json.dumps(schemas)))
        assert named <= set(schemas)
        assert ("ImagePart" in named) == ("VideoPart" in named) == sees
        assert {"Part", "Content", "FilledContent", "Documents", "FilledDocuments"} <= set(schemas)
        assert schemas["FilledDocuments"]["anyOf"][0] == {
            "type": "array", "items": {"$ref": "#/components/schemas/FilledContent"}, "minItems": 1, "maxItems": 9,
        }  # fmt: skip

    @pytest.mark.parametrize("name", NAMES)
    def test_which_documents_may_be_empty(self, documents: dict[str, Any], name: str) -> None:
        fields = documents[name]["components"]["schemas"][DIALECTS[name].request.__name__]["properties"]
        field = "texts" if name == "tei" else "documents"
        kind = "FilledDocuments" if name == "sglang" else "Documents"
        assert fields[field] == {"$ref": f"#/components/schemas/{kind}"}
        assert fields["query"]["$ref"] == "#/components/schemas/FilledContent"

    def test_limits(self, documents: dict[str, Any], fake: FakeReranker) -> None:
        schemas = documents["vllm"]["components"]["schemas"]
        assert schemas["Documents"]["anyOf"][0]["maxItems"] == 50
        whole, length, null = schemas["VllmRequest"]["properties"]["truncate_prompt_tokens"]["anyOf"]
        assert (whole, null) == ({"const": -1}, {"type": "null"})
        assert (length["minimum"], length["maximum"]) == (fake.min_length, fake.max_length)
