"""POST /v1/rerank over real HTTP: what is answered, what is refused and in which words."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import requests

from tests.server.fakes import FakeReranker, rerank, serving

GOOD = {"query": "fruit", "documents": ["1 apple", "3 pears", "2 plums"]}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(FakeReranker()) as base:
        yield base


def raw(url: str, body: bytes, content_type: str | None = "application/json", **headers: str) -> httpx.Response:
    if content_type is not None:
        headers["Content-Type"] = content_type
    return httpx.post(url + "/v1/rerank", content=body, headers=headers, timeout=30)


def refused(response: httpx.Response, status: int = 400) -> str:
    """The message of an answer that must be an error of this status, in SGLang's flat shape."""
    body = response.json()
    assert response.status_code == status, body
    assert set(body) >= {"object", "message", "type", "param", "code"}
    assert (body["object"], body["param"], body["code"]) == ("error", None, status)
    assert len(body["message"]) < 400
    return body["message"]


def order(response: httpx.Response) -> list[int]:
    assert response.status_code == 200, response.text
    return [result["index"] for result in response.json()]


class TestAnswer:
    def test_best_first_with_documents_and_token_counts(self, url: str) -> None:
        response = rerank(url, {"model": "any/name", **GOOD})
        assert response.status_code == 200
        assert response.headers["content-type"] == "application/json"
        meta = {"prompt_tokens": 7, "truncated_tokens": 0}
        assert response.json() == [
            {"score": 3.0, "document": "3 pears", "index": 1, "meta_info": meta},
            {"score": 2.0, "document": "2 plums", "index": 2, "meta_info": meta},
            {"score": 1.0, "document": "1 apple", "index": 0, "meta_info": meta},
        ]

    def test_the_client_of_sglangs_documentation(self, url: str) -> None:
        payload = {"model": "m", "query": "what is panda?", "documents": ["hi", "The giant panda"], "top_n": 1}
        for item in requests.post(url + "/v1/rerank", json={**payload, "return_documents": True}).json():
            assert f"Score: {item['score']:.2f} - Document: '{item['document']}'" == (
                "Score: 15.00 - Document: 'The giant panda'"
            )

    def test_put(self, url: str) -> None:
        assert order(httpx.put(url + "/v1/rerank", json=GOOD)) == [1, 2, 0]

    def test_ties_keep_the_order_of_the_request(self, url: str) -> None:
        assert order(rerank(url, {"query": "q", "documents": ["1 a", "2 b", "1 c", "2 d", "1 e"]})) == [1, 3, 0, 2, 4]

    @pytest.mark.parametrize("top_n, count", [(1, 1), (2, 2), (3, 3), (4, 3), (10**40, 3), (None, 3), ("2", 2)])
    def test_top_n(self, url: str, top_n: Any, count: int) -> None:
        assert order(rerank(url, {**GOOD, "top_n": top_n})) == [1, 2, 0][:count]

    def test_no_document_key_unless_returned(self, url: str) -> None:
        assert all("document" not in result for result in rerank(url, {**GOOD, "return_documents": False}).json())

    def test_null_is_the_default(self, url: str) -> None:
        fields = ["top_n", "return_documents", "truncate", "truncation", "instruct", "instruction", "model"]
        nulls = dict.fromkeys(fields)
        assert rerank(url, {**GOOD, **nulls}).json() == rerank(url, GOOD).json()

    def test_unknown_fields_are_ignored(self, url: str) -> None:
        extra = {"model": 5, "instruct": "x", "priority": [{}], "user": None, "cache_salt": "?", "\ud800": "\ud800"}
        assert rerank(url, {**GOOD, **extra}).json() == rerank(url, GOOD).json()

    def test_documents_as_objects_and_parts(self, url: str) -> None:
        documents = [{"text": "1 a", "id": 7}, [{"type": "text", "text": "3 b"}, {"text": " c"}], "2 d"]
        answer = rerank(url, {"query": [{"type": "text", "text": "q"}], "documents": documents}).json()
        assert [result["document"] for result in answer] == ["3 b c", "2 d", "1 a"]

    def test_the_last_of_duplicate_keys_counts(self, url: str) -> None:
        assert order(raw(url, b'{"query": "a", "documents": ["1"], "query": "b", "documents": ["1", "2"]}')) == [1, 0]

    def test_nul_bytes_and_many_scripts(self, url: str) -> None:
        documents = ["5 \0 nul", "6 \U0001f600 Ελλ 北京 \u202e", "7 </s> \x7f \u2028"]
        for body in (json.dumps, lambda body: json.dumps(body, ensure_ascii=False)):
            answer = raw(url, body({"query": "\0", "documents": documents}).encode()).json()
            assert [result["document"] for result in answer] == documents[::-1]

    def test_utf8_with_bom_and_charset(self, url: str) -> None:
        body = b"\xef\xbb\xbf" + json.dumps(GOOD).encode()
        assert order(raw(url, body, "Application/JSON; charset=utf-8")) == [1, 2, 0]

    def test_long_documents_are_cut_and_the_cut_is_told(self, url: str) -> None:
        meta = rerank(url, {"query": "12345", "documents": ["x" * 600]}).json()[0]["meta_info"]
        assert meta == {"prompt_tokens": 495, "truncated_tokens": 105}

    @pytest.mark.parametrize("field", ["truncate", "truncation"])
    def test_unless_cutting_is_refused(self, url: str, field: str) -> None:
        message = refused(rerank(url, {"query": "q", "documents": ["x" * 600], field: False}))
        assert message == "This model's maximum context length is 500 tokens. one pair is too long"

    def test_the_models_own_refusal(self, url: str) -> None:
        assert refused(rerank(url, {**GOOD, "query": "refuse"})) == "the query says so; ask for something else"

    def test_probabilities_of_other_models(self) -> None:
        documents = ["-1e4 a", "0 b", "2 c", "1e4 d"]
        with serving(FakeReranker(logits=False)) as base:
            scores = {r["index"]: r["score"] for r in rerank(base, {"query": "q", "documents": documents}).json()}
        assert scores == pytest.approx({0: 0.0, 1: 0.5, 2: 0.880797, 3: 1.0}, abs=1e-6)


class TestRefusals:
    @pytest.mark.parametrize(
        "change, message",
        [
            ({"query": ""}, "Query cannot be empty"),
            ({"query": []}, "Query cannot be empty"),
            ({"query": " \t\n\u3000"}, "Query cannot be empty or whitespace only"),
            ({"documents": []}, "Documents cannot be empty"),
            ({"documents": ["a", ""]}, "Each document must be a non-empty string"),
            ({"documents": ["a", []]}, "Each document must be a non-empty string"),
            ({"documents": ["a", " \n"]}, "Each document cannot be empty or whitespace only"),
            ({"documents": ["a", {"text": " "}]}, "Each document cannot be empty or whitespace only"),
        ],
    )
    def test_sglangs_own_texts(self, url: str, change: dict[str, Any], message: str) -> None:
        assert refused(rerank(url, {**GOOD, **change})) == message

    @pytest.mark.parametrize(
        "field, values",
        [
            ("query", [None, 5, True, {}, {"text": 5}, ["a"], [{"type": "text"}], [[{"text": "a"}]]]),
            ("documents", [None, 5, True, {}, [None], [5], [["a"]], [{}], [{"text": None}], [[[]]]]),
            ("top_n", ["x", "", 1.5, [1], {}, 0, -1, -(10**30), float("nan"), float("inf")]),
            ("return_documents", ["perhaps", 2, [True], {}]),
            ("truncate", ["perhaps", 2, [], {}]),
            ("truncation", ["perhaps", 2, [], {}]),
            ("instruct", [5, [], {}]),
            ("instruction", [5, [], {}]),
        ],
    )
    def test_wrong_types_name_the_field(self, url: str, field: str, values: list[Any]) -> None:
        for value in values:
            message = refused(raw(url, json.dumps({**GOOD, field: value}).encode()))
            assert message.startswith(field)
            assert "must be" in message

    def test_the_document_is_named(self, url: str) -> None:
        message = refused(rerank(url, {"query": "q", "documents": ["a", "b", 7]}))
        assert message.startswith("documents[2] must be a string")
        assert message.endswith("got 7.")

    @pytest.mark.parametrize("field", ["query", "documents"])
    def test_missing_fields(self, url: str, field: str) -> None:
        body = {key: value for key, value in GOOD.items() if key != field}
        assert refused(rerank(url, body)).startswith(f"The field {field} is missing")

    @pytest.mark.parametrize(
        "media",
        [
            [{"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}],
            [{"type": "text", "text": "a"}, {"type": "video_url", "video_url": {"url": "file:///etc/passwd"}}],
            {"image": "data:"},
            {"text": "a", "image": "data:"},
        ],
    )
    def test_media_are_refused_not_dropped(self, url: str, media: Any) -> None:
        message = refused(rerank(url, {"query": "q", "documents": ["a", media]}))
        assert message == "documents[1] holds an image, video or sound, and this model takes text only."
        assert refused(rerank(url, {"query": media, "documents": ["a"]})).startswith("query holds")

    def test_lone_surrogates(self, url: str) -> None:
        for bad in ("\ud800", "a\udc00b", "\udc00\ud800"):
            assert refused(rerank(url, {"query": bad, "documents": ["a"]})).startswith(
                "query contains a lone surrogate"
            )
            message = refused(rerank(url, {"query": "q", "documents": ["a", {"text": bad}]}))
            assert message.startswith("documents[1] contains a lone surrogate (invalid Unicode)")

    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b"{",
            b"nonsense",
            b"[]",
            b'"text"',
            b"null",
            b"5",
            b'{"query": "a", "documents": ["a"],}',
            b'{"query": "\\x", "documents": ["a"]}',
            b'{"query": "a\n", "documents": ["a"]}',
            b'{"query": "\xff", "documents": ["a"]}',
            b'{"query": "\xed\xa0\x80", "documents": ["a"]}',
            '{"query": "a", "documents": ["a"]}'.encode("utf-16"),
            b"[" * 100_000,
            b'{"a":' * 100_000,
            b'{"query": "q", "documents": ["a"], "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
            b'{"query": "q", "documents": [' + b"[" * 100_000 + b"]" * 100_000 + b"]}",
            b'{"query": "q", "documents": ["a"], "top_n": ' + b"9" * 10_000 + b"}",
        ],
    )
    def test_bodies_that_are_no_request(self, url: str, body: bytes) -> None:
        response = raw(url, body)
        assert refused(response).startswith("The body")
        assert response.json()["type"] == "Bad Request"

    @pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded", "json", ""])
    def test_content_type(self, url: str, content_type: str | None) -> None:
        assert refused(raw(url, json.dumps(GOOD).encode(), content_type)).startswith("The Content-Type must be")

    def test_content_encoding(self, url: str) -> None:
        headers = {"Content-Encoding": "gzip"}
        assert refused(raw(url, b"\x1f\x8b", **headers)).startswith("The Content-Encoding must be")

    def test_errors_do_not_echo_the_request(self, url: str) -> None:
        secret = "hunter2" * 200
        for body in (
            {"query": secret, "documents": {secret: secret}},
            {"query": secret, "documents": ["a"], "truncation_side": secret, "rank_fields": secret},
            {"query": secret, "documents": [{secret: secret}], "rank_fields": ["other"]},
            {"query": [secret], "documents": [{secret: secret}]},
            {"query": "q", "documents": [[{"type": secret, "text": "a"}]], "top_n": secret},
            {"query": {secret: 1}, "documents": ["a"]},
            {"query": "crash" + secret, "documents": ["a"]},
        ):
            response = rerank(url, body)
            assert response.status_code in (400, 500)
            assert "hunter2" not in response.text


class TestLimits:
    def test_a_document_of_ten_megabytes(self, url: str) -> None:
        response = requests.post(url + "/v1/rerank", json={"query": "q", "documents": ["x" * 10_000_000]})
        assert response.status_code == 413
        assert response.json()["code"] == 413
        assert "8000000 bytes" in response.json()["message"]

    def test_a_chunked_body_is_counted(self, url: str) -> None:
        def chunks() -> Iterator[bytes]:
            yield b'{"query": "q", "documents": ["'
            for _ in range(90):
                yield b"x" * 100_000
            yield b'"]}'

        response = requests.post(url + "/v1/rerank", data=chunks(), headers={"Content-Type": "application/json"})
        assert response.status_code == 413
        small = iter([b'{"query": "q", ', b'"documents": ["1", "2"]}'])
        response = requests.post(url + "/v1/rerank", data=small, headers={"Content-Type": "application/json"})
        assert [result["index"] for result in response.json()] == [1, 0]

    def test_too_many_documents(self, url: str) -> None:
        message = refused(rerank(url, {"query": "q", "documents": ["a"] * 100_000}), 413)
        assert message.startswith("The request has 100000 documents; this server takes at most 1000")
        assert refused(rerank(url, {"query": "q", "documents": ["a"] * 1001}), 413)
        assert len(rerank(url, {"query": "q", "documents": ["a"] * 1000}).json()) == 1000

    def test_a_body_that_does_not_arrive(self) -> None:
        def chunks() -> Iterator[bytes]:
            yield b"{"
            time.sleep(0.5)
            yield b"}"

        with serving(FakeReranker(), body_timeout_s=0.1) as base:
            response = httpx.post(base + "/v1/rerank", content=chunks(), headers={"Content-Type": "application/json"})
            assert refused(response, 408) == "The body did not arrive within 0.1 s."
