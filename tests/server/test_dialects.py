"""The clients of eight servers over real HTTP: what each is answered, in which scale, and how it is refused."""

from __future__ import annotations

import itertools
import json
import math
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from jaxrank.server import create_app
from jaxrank.server.dialects.resolve import DIALECTS
from jaxrank.server.settings import encode_threads_for, usable_cores
from jaxrank.version import __version__
from tests.server.fakes import FakeReranker, serving, until

GOOD = {"query": "fruit", "documents": ["1 apple", "3 pears", "2 plums"]}
NAMES = sorted(DIALECTS)
LOGITS = [1.0, 3.0, 2.0]
OBJECTS = ("vllm", "cohere", "jina", "infinity", "llamacpp")
RAW = ("sglang", "llamacpp")


def sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-logit))


SIGMOIDS = [sigmoid(logit) for logit in LOGITS]


@pytest.fixture(scope="module")
def fake() -> FakeReranker:
    return FakeReranker()


@pytest.fixture(scope="module")
def url(fake: FakeReranker) -> Iterator[str]:
    with serving(fake, max_documents=50) as base:
        yield base


def post(url: str, path: str, body: Any, **headers: str) -> httpx.Response:
    return httpx.post(
        url + path, json=body, headers=headers, timeout=30, verify=False
    )  # loading certificates takes 50 ms


def ask(url: str, name: str, **body: Any) -> Any:
    """The answer to GOOD with other fields, in one dialect by its base URL."""
    answer = post(url, f"/{name}/v1/rerank", GOOD | body)
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-rerank-dialect"] == name
    return answer.json()


def results(answer: Any) -> list[dict[str, Any]]:
    """Of an answer in any dialect."""
    return answer if isinstance(answer, list) else answer.get("results") or answer["data"]


def scores(answer: Any) -> list[float]:
    """In the order of the request."""
    found = {r["index"]: r["score"] if "score" in r else r["relevance_score"] for r in results(answer)}
    return [found[index] for index in range(len(found))]


class TestAnswers:
    """Whole answers, as the contracts have them."""

    def test_sglang(self, url: str) -> None:
        meta = {"prompt_tokens": 7, "truncated_tokens": 0}
        assert ask(url, "sglang", top_n=1) == [{"score": 3.0, "document": "3 pears", "index": 1, "meta_info": meta}]

    @pytest.mark.parametrize("name", OBJECTS)
    def test_objects(self, url: str, name: str) -> None:
        answer = ask(url, name, top_n=2)
        prefix, _, identity = answer.pop("id").partition("-")
        assert prefix == ("infinity" if name == "infinity" else "rerank")
        assert len(identity) == 32
        assert answer.pop("created") > 1.7e9
        values = LOGITS if name in RAW else SIGMOIDS
        found = answer.pop("results")
        documents = [result.pop("document", None) for result in found]
        assert documents == {
            "vllm": [{"text": "3 pears", "multi_modal": None}, {"text": "2 plums", "multi_modal": None}],
            "jina": [{"text": "3 pears", "multi_modal": None}, {"text": "2 plums", "multi_modal": None}],
        }.get(name, [None, None])
        assert found == [
            {"index": 1, "relevance_score": pytest.approx(values[1])},
            {"index": 2, "relevance_score": pytest.approx(values[2])},
        ]
        assert answer == {
            "object": "rerank",
            "model": "fake/reranker",
            "usage": {"prompt_tokens": 21, "total_tokens": 21},
            "meta": {
                "api_version": {"version": "2"},
                "billed_units": {"search_units": 1},
                "tokens": {"input_tokens": 21},
            },
        }

    def test_documents_of_each(self, url: str) -> None:
        documents = ["1 a", {"text": "2 b", "id": 7}]
        shown = {"text": "1 a", "multi_modal": None}
        wanted = {
            "sglang": ["1 a", "2 b"],
            "voyage": ["1 a", "2 b"],
            "infinity": ["1 a", "2 b"],
            "tei": ["1 a", "2 b"],
        }
        for name in NAMES:
            answer = results(ask(url, name, documents=documents, return_documents=True))
            got = [r.get("document", r.get("text")) for r in reversed(answer)]
            assert got == wanted.get(name, [shown, {"text": "2 b", "id": 7, "multi_modal": None}])
            for said in ({"return_documents": False}, {"return_text": False}):
                without = results(ask(url, name, documents=documents, **said))
                assert not any("document" in r or "text" in r for r in without)

    def test_voyage(self, url: str) -> None:
        assert ask(url, "voyage", top_k=1) == {
            "object": "list",
            "data": [{"relevance_score": pytest.approx(SIGMOIDS[1]), "index": 1}],
            "model": "fake/reranker",
            "usage": {"prompt_tokens": 21, "total_tokens": 21},
        }

    def test_tei(self, url: str) -> None:
        body = {"query": "fruit", "texts": GOOD["documents"], "return_text": True}
        answer = [
            {"index": index, "text": GOOD["documents"][index], "score": pytest.approx(SIGMOIDS[index])}
            for index in (1, 2, 0)
        ]
        for path in ("/rerank", "/v1/rerank", "/tei/rerank"):
            assert post(url, path, body).json() == answer

    def test_texts_of_llamacpp(self, url: str) -> None:
        answer = post(url, "/llamacpp/rerank", {"query": "q", "texts": ["1 a", "2 b"]}).json()
        assert answer == [{"index": 1, "score": 2.0}, {"index": 0, "score": 1.0}]

    def test_a_hundred_documents_are_a_unit(self) -> None:
        with serving(FakeReranker()) as base:
            answer = post(base, "/v2/rerank", {"query": "q", "documents": ["a"] * 101}).json()
        assert answer["meta"]["billed_units"] == {"search_units": 2}

    @pytest.mark.parametrize("name", NAMES)
    def test_ties_keep_the_order_of_the_request(self, url: str, name: str) -> None:
        answer = ask(url, name, documents=["1 a", "2 b", "1 c", "2 d", "1 e"])
        assert [r["index"] for r in results(answer)] == [1, 3, 0, 2, 4]

    def test_request_ids_are_those_of_the_client(self, url: str) -> None:
        assert post(url, "/rerank", GOOD, **{"X-Request-Id": "mine-7"}).json()["id"] == "rerank-mine-7"


class TestResolution:
    FRAMED = (
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
        'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
        "<Instruct>: i\n<Query>: q\n"
    )

    @pytest.mark.parametrize(
        "path, body, name",
        [
            ("/v1/rerank", {}, "sglang"),
            ("/rerank", {}, "vllm"),
            ("/v2/rerank", {}, "cohere"),
            ("/reranking", {}, "llamacpp"),
            ("/v1/reranking", {}, "llamacpp"),
            ("/v1/rerank", {"top_k": 1}, "voyage"),
            ("/v1/rerank", {"truncation": True}, "voyage"),
            ("/v1/rerank", {"raw_scores": False}, "infinity"),
            ("/v1/rerank", {"truncate_prompt_tokens": -1}, "vllm"),
            ("/v1/rerank", {"truncation_side": "left"}, "vllm"),
            ("/v1/rerank", {"max_tokens_per_doc": 4096}, "vllm"),
            ("/v1/rerank", {"max_tokens_per_query": 9}, "vllm"),
            ("/v1/rerank", {"use_activation": True}, "vllm"),
            ("/v1/rerank", {"mm_processor_kwargs": {}}, "vllm"),
            ("/v1/rerank", {"instruction": "i"}, "vllm"),
            ("/v1/rerank", {"query": {"content": [{"type": "text", "text": "q"}]}}, "vllm"),
            ("/v1/rerank", {"documents": ["a", {"content": [{"text": "d"}]}]}, "vllm"),
            ("/v1/rerank", {"documents": {"content": [{"text": "d"}]}}, "vllm"),
            ("/v1/rerank", {"query": FRAMED}, "vllm"),
            ("/v1/rerank", {"truncation": None, "top_k": None, "raw_scores": None, "instruction": None}, "sglang"),
            ("/v1/rerank", {"top_n": 1, "return_documents": True, "instruct": "i", "truncate": True}, "sglang"),
            ("/rerank", {"top_k": 1, "raw_scores": True}, "vllm"),
        ],
    )
    def test_by_path_and_body(self, url: str, path: str, body: dict[str, Any], name: str) -> None:
        answer = post(url, path, GOOD | body)
        assert (answer.status_code, answer.headers["x-rerank-dialect"]) == (200, name), answer.text

    @pytest.mark.parametrize("name", NAMES)
    def test_prefix_then_header_then_flag(self, url: str, name: str) -> None:
        other = NAMES[NAMES.index(name) - 1]
        paths = ("/v1/rerank", "/rerank", "/v2/rerank", "/reranking", "/v1/reranking")
        for path, body in itertools.product(paths, ({}, {"top_k": 1}, {"instruction": "i"})):
            by_prefix = post(url, f"/{name}{path}", GOOD | body, **{"X-Rerank-Dialect": other})
            assert by_prefix.headers["x-rerank-dialect"] == name
            assert (
                post(url, path, GOOD | body, **{"X-Rerank-Dialect": name.upper()}).headers["x-rerank-dialect"] == name
            )
        with serving(FakeReranker(), dialect=name) as base:
            assert post(base, "/v2/rerank", GOOD | {"top_k": 1}).headers["x-rerank-dialect"] == name
            assert post(base, "/rerank", GOOD, **{"X-Rerank-Dialect": other}).headers["x-rerank-dialect"] == other
            assert post(base, f"/{other}/rerank", GOOD).headers["x-rerank-dialect"] == other

    def test_unknown_names(self, url: str) -> None:
        refused = post(url, "/v1/rerank", GOOD, **{"X-Rerank-Dialect": "grpc"})
        assert refused.status_code == 400
        assert refused.json()["message"].startswith("X-Rerank-Dialect names no dialect that this server speaks; one of")
        assert post(url, "/grpc/v1/rerank", GOOD).status_code == 404
        assert post(url, "/cohere/vllm/v1/rerank", GOOD).status_code == 404
        with pytest.raises(ValueError, match="dialect 'grpc' is unknown; one of auto, sglang"):
            create_app(FakeReranker(), dialect="grpc")


class TestScale:
    @pytest.mark.parametrize("name", NAMES)
    def test_and_its_opt_outs(self, url: str, name: str) -> None:
        own = LOGITS if name in RAW else SIGMOIDS
        for said, want, scale in (
            ({}, own, "logit" if name in RAW else "probability"),
            ({"raw_scores": True}, LOGITS, "logit"),
            ({"raw_scores": False}, SIGMOIDS, "probability"),
            ({"use_activation": False}, LOGITS, "logit"),
            ({"use_activation": True}, SIGMOIDS, "probability"),
        ):
            answer = post(url, f"/{name}/rerank", GOOD | said)
            assert scores(answer.json()) == pytest.approx(want)
            assert answer.headers["x-score-scale"] == scale

    def test_models_that_answer_yes_or_no(self) -> None:
        with serving(FakeReranker(logits=False)) as base:
            for name in NAMES:
                assert scores(ask(base, name)) == pytest.approx(SIGMOIDS)
                assert scores(ask(base, name, raw_scores=True)) == LOGITS


class TestRequests:
    NULLS = (
        "model", "top_n", "top_k", "return_documents", "return_text", "truncate", "truncation", "max_chunks_per_doc",
        "truncate_prompt_tokens", "truncation_side", "truncation_direction", "max_tokens_per_doc", "max_doc_length",
        "max_tokens_per_query", "instruct", "instruction", "chat_template_kwargs", "raw_scores", "use_activation",
        "rank_fields", "mm_processor_kwargs", "padding", "priority", "user", "cache_salt", "request_id",
    )  # fmt: skip

    @pytest.mark.parametrize("name", NAMES)
    def test_nulls_are_defaults_and_unknown_fields_nothing(self, url: str, name: str) -> None:
        plain = results(ask(url, name))
        assert results(ask(url, name, **dict.fromkeys(self.NULLS))) == plain
        assert results(ask(url, name, padding="do_not_pad", priority=3, user="me", nonsense=[{}])) == plain

    @pytest.mark.parametrize("name", NAMES)
    def test_documents_in_every_form(self, url: str, name: str) -> None:
        forms: list[Any] = [
            "1 a",
            {"text": "2 b"},
            {"text": "3 c", "id": 4, "more": {"x": [1]}},
            {"content": [{"type": "text", "text": "4"}, {"type": "text", "text": " d"}]},
            [{"type": "text", "text": "5 e"}],
            [{"text": "6"}, {"text": " f"}],
        ]
        answer = ask(url, name, documents=forms, query={"content": [{"text": "q"}]}, raw_scores=True)
        assert scores(answer) == [1, 2, 3, 4, 5, 6]
        for lone, score in (("7 g", 7), ({"text": "8 h"}, 8), ({"content": [{"text": "9"}, {"text": " i"}]}, 9)):
            assert scores(ask(url, name, documents=lone, raw_scores=True)) == [score]

    def test_rank_fields(self, url: str) -> None:
        documents: list[Any] = [
            {"title": "apples", "number": 2, "type": 5, "text": "8 t"},
            {"title": "pears", "number": "3.5"},
            "4 plums",
            {"number": 1.5, "title": None, "text": ["not asked for"]},
        ]
        for name in NAMES:
            answer = ask(url, name, documents=documents, rank_fields=["number", "title"], raw_scores=True)
            assert scores(answer) == [2, 3.5, 4, 1.5]
        shown = ask(url, "cohere", documents=documents[:2], rank_fields=["number", "title"], return_documents=True)
        assert [result["document"] for result in shown["results"]] == [
            {"title": "pears", "number": "3.5", "text": "3.5\npears", "multi_modal": None},
            {"title": "apples", "number": 2, "type": 5, "text": "8 t", "multi_modal": None},
        ]
        for bad, why in (
            ([{"text": "a"}], "documents[0] has none of the fields that rank_fields names."),
            (["a", {"title": {}}], "documents[1] has arrays or objects in rank_fields"),
        ):
            refused = post(url, "/v1/rerank", {"query": "q", "documents": bad, "rank_fields": ["title"]})
            assert (refused.status_code, refused.json()["message"][: len(why)]) == (400, why)

    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("field", ["top_n", "top_k"])
    def test_how_many(self, url: str, name: str, field: str) -> None:
        for most, count in ((1, 1), (3, 3), (4, 3), (10**30, 3)):
            assert [r["index"] for r in results(ask(url, name, **{field: most}))] == [1, 2, 0][:count]
        refused = post(url, f"/{name}/v1/rerank", GOOD | {field: -1})
        assert refused.status_code == (422 if name == "tei" else 400)
        assert f"{field} must be a whole number" in refused.text

    def test_zero_is_all_for_vllm_alone(self, url: str) -> None:
        assert len(ask(url, "vllm", top_n=0)["results"]) == 3
        assert post(url, "/cohere/v1/rerank", GOOD | {"top_n": 0}).status_code == 400

    def test_instructs(self) -> None:
        reranker = FakeReranker(logits=False)
        said: list[dict[str, Any]] = [
            {"instruct": "i"},
            {"instruction": "i"},
            {"chat_template_kwargs": {"instruction": "i", "enable_thinking": False}},
            {"chat_template_kwargs": {"instruct": "i"}},
            {"instruct": "", "instruction": "i"},
        ]
        with serving(reranker) as base:
            for name, fields in itertools.product(NAMES, said):
                ask(base, name, **fields)
            ask(base, "vllm", chat_template_kwargs={})
            for kwargs, why in (
                ({"chat_template": "{{ x }}"}, "chat_template_kwargs must not hold chat_template"),
                ({"tokenize": True}, "chat_template_kwargs must not hold tokenize"),
                ({"instruction": 5}, "chat_template_kwargs.instruction must be a string or null; got 5."),
                ("x", "chat_template_kwargs must be an object or null; got a string."),
            ):
                for more in ({}, {"instruct": "i"}):
                    refused = post(base, "/v1/rerank", GOOD | more | {"chat_template_kwargs": kwargs})
                    assert (refused.status_code, refused.json()["message"][: len(why)]) == (400, why)
        assert reranker.instructs == ["i"] * len(NAMES) * len(said) + [None]

    def test_how_images_are_read_is_not_for_requests(self, url: str) -> None:
        refused = post(url, "/v1/rerank", GOOD | {"mm_processor_kwargs": {"max_pixels": 9}})
        assert refused.status_code == 400
        assert refused.json()["message"].startswith("mm_processor_kwargs must be empty")


class TestOddRequests:
    @pytest.mark.parametrize("name", NAMES)
    def test_what_is_echoed_is_json(self, url: str, name: str) -> None:
        """Fields that nobody reads may hold anything that Python's JSON reader takes."""
        inner: Any = "deep"
        for _ in range(25):
            inner = [inner]
        odd = {"text": "1 a", "x": float("nan"), "y": ["\ud800", float("inf")], "ß": {"\udfff": "ü"}, "z": inner}
        body = json.dumps({"query": "q", "documents": [odd], "return_documents": True})
        headers = {"Content-Type": "application/json"}
        answer = httpx.post(f"{url}/{name}/rerank", content=body, headers=headers)
        assert answer.status_code == 200, answer.text

        def no_constant(name: str) -> None:
            raise AssertionError(name)

        (result,) = results(json.loads(answer.content, parse_constant=no_constant))
        if isinstance(result.get("document"), dict):
            shown = {"text": "1 a", "x": None, "y": ["?", None], "ß": {"?": "ü"}, "z": inner, "multi_modal": None}
            assert result["document"] == shown

    @pytest.mark.parametrize("path", ["/rerank", "/score", "/tokenize", "/v1/rerank"])
    @pytest.mark.parametrize("levels, status", [(29, 200), (30, 400), (500, 400)])
    def test_nesting(self, url: str, path: str, levels: int, status: int) -> None:
        """With the body's object, the array of documents and the document itself: 32 levels at most."""
        deep = '{"text": "a", "x": ' + "[" * levels + "]" * levels + "}"
        body = f'{{"query": {deep}, "documents": [{deep}], "data_1": {deep}, "data_2": {deep}, "items": {deep}}}'
        response = httpx.post(url + path, content=body, headers={"Content-Type": "application/json"})
        assert response.status_code == status, response.text
        if status == 400:
            assert response.json()["message"] == "The body's JSON is nested too deeply; 32 levels are allowed."


class TestTruncation:
    """The fake counts characters as tokens, and takes 500 of query and document together."""

    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize(
        "said, left",
        [
            ({}, "a" * 300 + "b" * 195),
            ({"truncate": True}, "a" * 300 + "b" * 195),
            ({"truncation_side": "right"}, "a" * 300 + "b" * 195),
            ({"truncation_side": "left"}, "a" * 195 + "b" * 300),
            ({"truncation_direction": "Left"}, "a" * 195 + "b" * 300),
            ({"truncation_direction": "Right"}, "a" * 300 + "b" * 195),
            ({"truncate_prompt_tokens": -1}, "a" * 300 + "b" * 195),
            ({"truncate_prompt_tokens": 400}, "a" * 300 + "b" * 95),
            ({"truncate_prompt_tokens": 400, "truncation_side": "left"}, "a" * 95 + "b" * 300),
            ({"max_tokens_per_doc": 20}, "a" * 20),
            ({"max_doc_length": 20, "truncate": False}, "a" * 20),
            ({"max_tokens_per_doc": 20, "truncation_side": "left"}, "b" * 20),
            ({"max_tokens_per_doc": 0}, "a" * 300 + "b" * 195),
            ({"max_tokens_per_doc": 500}, "a" * 300 + "b" * 195),
            ({"max_tokens_per_doc": 4096, "max_tokens_per_query": 10**30}, "a" * 300 + "b" * 195),
        ],
        ids=str,
    )
    def test_every_field_acts(self, url: str, name: str, said: dict[str, Any], left: str) -> None:
        body = {"query": "fruit", "documents": ["a" * 300 + "b" * 300], **said}
        shown = post(url, f"/{name}/tokenize", body)
        assert shown.json()["tokens"] == [[ord(character) for character in left]], shown.text
        ranked = post(url, f"/{name}/rerank", body)
        assert ranked.headers["x-truncated-tokens"] == str(600 - len(left))

    def test_limits_reach_the_model(self, url: str, fake: FakeReranker) -> None:
        ask(
            url, "vllm", max_tokens_per_query=7, max_tokens_per_doc=9, truncate_prompt_tokens=99, truncation_side="left"
        )
        cut = fake.cuts[-1]
        assert (cut.query, cut.document, cut.pair, cut.keep_end) == (7, 9, 99, True)

    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize(
        "said", [{"truncate": False}, {"truncation": False}, {"truncate": True, "truncation": False}]
    )
    def test_refused(self, url: str, name: str, said: dict[str, Any]) -> None:
        refused = post(url, f"/{name}/rerank", {"query": "q", "documents": ["x" * 600], **said})
        if name == "tei":
            assert refused.status_code == 422
            error = "`inputs` must have less than 500 tokens. Given: 601"
            assert refused.json() == {"error": error, "error_type": "Validation"}
        else:
            assert refused.status_code == 400
            assert refused.json()["error"]["message"].startswith("This model's maximum context length is 500 tokens.")
            assert refused.json()["type"] == ("exceed_context_size_error" if name == "llamacpp" else "BadRequestError")

    def test_a_server_that_does_not_truncate_unless_asked(self) -> None:
        body = {"query": "q", "documents": ["x" * 600]}
        with serving(FakeReranker(), truncate=False) as base:
            assert httpx.get(base + "/info").json()["auto_truncate"] is False
            assert post(base, "/tei/rerank", body).status_code == 422
            assert post(base, "/vllm/rerank", body | {"truncate": None}).status_code == 400
            for said in ({"truncate": True}, {"truncation": True}, {"truncate_prompt_tokens": -1}):
                assert post(base, "/vllm/rerank", body | said).status_code == 200

    def test_limits_that_are_none(self, url: str) -> None:
        for value, why in (
            (501, "truncate_prompt_tokens is 501; this model takes at most 500 tokens. Please request a smaller trunc"),
            (3, "truncate_prompt_tokens is 3; this model needs at least 4 tokens. -1 or null: what it takes."),
            (0, "truncate_prompt_tokens is 0; this model needs at least 4 tokens."),
            (-2, "truncate_prompt_tokens must be a whole number of at least -1, or null; got -2."),
        ):
            refused = post(url, "/v1/rerank", GOOD | {"truncate_prompt_tokens": value})
            assert (refused.status_code, refused.json()["message"][: len(why)]) == (400, why)


def texts_in(error: dict[str, Any]) -> set[str]:
    """What clients of all dialects but TEI's read of an error: vLLM's and OpenAI's, SGLang's and Cohere's, Jina's and
    Voyage's."""
    return {error["error"]["message"], error["message"], error["detail"]}


class TestErrors:
    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize(
        "method, path, body, status, tei",
        [
            ("POST", "/v1/rerank", b"{", 400, (400, "Validation")),
            ("POST", "/v1/rerank", b"[]", 400, (400, "Validation")),
            ("POST", "/v1/rerank", b'{"query": 5, "documents": ["a"]}', 400, (422, "Validation")),
            ("POST", "/v1/rerank", b'{"documents": ["a"]}', 400, (422, "Validation")),
            ("POST", "/v1/rerank", b'{"query": "q"}', 400, (422, "Validation")),
            ("POST", "/v1/rerank", b'{"query": " ", "documents": ["a"]}', 400, (400, "Validation")),
            ("POST", "/v1/rerank", b'{"query": "q", "documents": []}', 400, (400, "Empty")),
            ("POST", "/v1/rerank", b'{"query": "refuse", "documents": ["a"]}', 400, (400, "Validation")),
            (
                "POST",
                "/v1/rerank",
                json.dumps({"query": "q", "documents": ["a"] * 51}).encode(),
                413,
                (422, "Validation"),
            ),
            ("POST", "/v1/rerank", b"x" * 8_000_001, 413, (413, "Validation")),
            ("POST", "/v1/rerank", b'{"query": "crash", "documents": ["a"]}', 500, (500, "Backend")),
            ("POST", "/v1/rerank", b'{"query": "q", "documents": ["boom"]}', 500, (424, "Backend")),
            ("POST", "/v1/rerank", b'{"query": "q", "documents": ["nan"]}', 500, (424, "Backend")),
            ("POST", "/v1/nothing", b"{}", 404, (404, "Validation")),
            ("DELETE", "/v1/rerank", b"", 405, (405, "Validation")),
        ],
        ids=str,
    )
    def test_in_the_dialect_of_the_request(
        self, url: str, name: str, method: str, path: str, body: bytes, status: int, tei: tuple[int, str]
    ) -> None:
        asked = ((f"/{name}{path}", {}), (path, {"X-Rerank-Dialect": name}))
        for where, headers in asked:
            headers = {"Content-Type": "application/json", **headers}
            response = httpx.request(method, url + where, content=body, headers=headers, timeout=30)
            error = response.json()
            if name == "tei":
                assert (response.status_code, error["error_type"]) == tei
                assert set(error) == {"error", "error_type"}
                assert isinstance(error["error"], str)
            else:
                assert response.status_code == status == error["code"] == error["error"]["code"]
                assert len(texts_in(error)) == 1
                assert error["object"] == "error"
                assert error["type"] == error["error"]["type"]
            assert 5 < len(str(error)) < 1500

    @pytest.mark.parametrize(
        "name, field, value, text",
        [
            ("sglang", "query", "", "Query cannot be empty"),
            ("sglang", "query", "\n", "Query cannot be empty or whitespace only"),
            ("sglang", "documents", [], "Documents cannot be empty"),
            ("sglang", "documents", [""], "Each document must be a non-empty string"),
            ("sglang", "documents", [" "], "Each document cannot be empty or whitespace only"),
            ("cohere", "query", "", "invalid request: query must not be empty or be only whitespace"),
            ("cohere", "query", None, "invalid request: query must not be empty or be only whitespace"),
            ("cohere", "documents", [], "invalid request: list of documents must not be empty"),
            ("cohere", "documents", None, "invalid request: list of documents must not be empty"),
            ("llamacpp", "query", None, '"query" must be provided'),
            ("llamacpp", "documents", [], '"documents" must be a non-empty string array'),
            ("llamacpp", "documents", None, '"documents" must be a non-empty string array'),
            ("tei", "documents", [], "`texts` cannot be empty"),
            ("tei", "documents", ["a"] * 51, "batch size 51 > maximum allowed batch size 50"),
        ],
    )
    def test_texts_that_clients_know(self, url: str, name: str, field: str, value: Any, text: str) -> None:
        error = post(url, f"/{name}/rerank", GOOD | {field: value}).json()
        assert error["error" if name == "tei" else "message"] == text

    def test_llamacpp_s_types(self, url: str) -> None:
        def kind(path: str, **body: Any) -> str:
            return post(url, f"/llamacpp{path}", GOOD | body).json()["error"]["type"]

        assert kind("/rerank", query=5) == "invalid_request_error"
        assert kind("/nothing") == "not_found_error"
        assert kind("/rerank", documents=["boom"]) == "server_error"

    def test_empty_documents_are_scored_where_they_are_not_refused(self, url: str) -> None:
        for name in NAMES:
            if name != "sglang":
                answer = ask(url, name, documents=["1 a", "", {"text": " "}], raw_scores=True)
                assert scores(answer) == [1, 0, 1]

    def test_documents_are_named_as_the_request_names_them(self, url: str) -> None:
        for body in ({"texts": ["a", 5]}, {"texts": ["a", "\ud800"]}):
            response = httpx.post(
                url + "/tei/rerank",
                content=json.dumps({"query": "q", **body}),
                headers={"Content-Type": "application/json"},
            )
            assert response.json()["error"].startswith("texts[1] ")

    @pytest.mark.parametrize("name", NAMES)
    def test_overload(self, name: str) -> None:
        reranker = FakeReranker()
        status = 503 if name in ("sglang", "vllm", "llamacpp") else 429
        with serving(reranker, max_queue_requests=1) as base:
            reranker.gate.clear()
            first = threading.Thread(target=ask, args=(base, name))
            first.start()
            until(lambda: httpx.get(base + "/ready").json()["queued_requests"] == 1)
            by_prefix = post(base, f"/{name}/v1/rerank", GOOD)
            known = {"tei": {"texts": ["a"]}, "voyage": {"top_k": 1}, "infinity": {"raw_scores": True}}
            by_body = post(base, "/v1/rerank", GOOD | known.get(name, {}))
            reranker.gate.set()
            first.join()
        assert by_prefix.status_code == status
        assert by_body.status_code == (status if name in known else 503)
        assert all(int(refused.headers["retry-after"]) >= 1 for refused in (by_prefix, by_body))
        if name == "tei":
            assert by_prefix.json()["error_type"] == by_body.json()["error_type"] == "Overloaded"
        else:
            assert "queue is full" in by_prefix.json()["message"]

    @pytest.mark.parametrize("name", NAMES)
    def test_keys_are_wanted_under_every_prefix(self, name: str) -> None:
        posts = (
            "/v1/rerank",
            "/rerank",
            "/v2/rerank",
            "/reranking",
            "/v1/reranking",
            "/score",
            "/v1/score",
            "/tokenize",
        )
        gets = ("/v1/models", "/models", "/info", "/version", "/ping", "/openapi.json", "/docs")
        with serving(FakeReranker(), api_keys=["k"]) as base, httpx.Client(base_url=base) as client:
            for prefix in ("", f"/{name}"):
                for method, path in [("POST", path) for path in posts] + [("GET", path) for path in gets]:
                    refused = client.request(method, prefix + path, json=GOOD)
                    assert refused.status_code == 401, path
                    assert refused.headers["www-authenticate"] == "Bearer"
                    allowed = client.request(method, prefix + path, json=GOOD, headers={"Authorization": "Bearer k"})
                    assert allowed.status_code in (200, 400, 422), path
                error = client.post(prefix + "/rerank", json=GOOD).json()
                if prefix == "/tei":
                    assert set(error) == {"error", "error_type"}
                else:
                    assert len(texts_in(error)) == 1
                for path in ("/health", "/ready"):
                    assert client.get(prefix + path).status_code == 200


class TestScores:
    @pytest.mark.parametrize("path", ["/score", "/v1/score", "/vllm/score"])
    @pytest.mark.parametrize(
        "names", [("queries", "documents"), ("queries", "items"), ("data_1", "data_2"), ("text_1", "text_2")]
    )
    @pytest.mark.parametrize(
        "left, right",
        [
            ("q", "2 a"),
            ("q", ["2 a", "-1 b", "0 c"]),
            (["q"], ["2 a", "-1 b"]),
            (["q", "p", "q"], ["2 a", "-1 b", "0 c"]),
        ],
        ids=["1:1", "1:N", "[1]:N", "N:N"],
    )
    def test_vllm(self, url: str, path: str, names: tuple[str, str], left: Any, right: Any) -> None:
        answer = post(url, path, dict(zip(names, (left, right), strict=True)))
        assert answer.status_code == 200, answer.text
        body = answer.json()
        assert body.pop("id").startswith("score-")
        assert body.pop("created") > 1.7e9
        texts = right if isinstance(right, list) else [right]
        tokens = sum(map(len, texts))
        assert body == {
            "object": "list",
            "model": "fake/reranker",
            "data": [
                {"index": i, "object": "score", "score": pytest.approx(sigmoid(float(text.split()[0])))}
                for i, text in enumerate(texts)
            ],
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }

    @pytest.mark.parametrize(
        "body, why",
        [
            ({"queries": ["a", "b"], "documents": ["a"]}, "Input lengths must be either 1:1, 1:N or N:N; got 2:1."),
            ({"queries": "a"}, "The two sides of the pairs are missing: give one of queries and documents,"),
            ({"queries": "a", "items": []}, "queries and items cannot be empty"),
            ({"queries": ["a", ""], "items": ["a", "b"]}, "Query cannot be empty"),
            ({"queries": ["a", "b"], "items": ["a", 5]}, "items[1] must be a string"),
            ({"text_1": ["a", "b"], "text_2": ["a", {"image": "x"}]}, "text_2[1] holds an image"),
            ({"text_1": ["a", "b"], "text_2": ["a", "\ud800"]}, "text_2[1] contains a lone surrogate"),
        ],
    )
    def test_refused(self, url: str, body: dict[str, Any], why: str) -> None:
        headers = {"Content-Type": "application/json"}
        refused = httpx.post(url + "/score", content=json.dumps(body), headers=headers)
        assert (refused.status_code, refused.json()["message"][: len(why)]) == (400, why)

    def test_one_failure_fails_the_request(self, url: str) -> None:
        refused = post(url, "/score", {"queries": ["a", "b"], "documents": ["1 a", "boom"]})
        assert refused.status_code == 500
        assert scores(ask(url, "sglang")) == LOGITS

    def test_sglang(self, url: str) -> None:
        for path in ("/v1/score", "/score", "/sglang/v1/score"):
            body = {"query": "q", "items": ["2 a", "-1 b"], "model": "m", "apply_softmax": False, "item_first": False}
            assert post(url, path, body).json() == {
                "scores": [[2.0], [-1.0]],
                "model": "fake/reranker",
                "usage": {"prompt_tokens": 7, "total_tokens": 7},
                "object": "scoring",
            }
        for more in ({"label_token_ids": [9693, 2152]}, {"item_first": True}):
            refused = post(url, "/v1/score", body | more)
            assert refused.status_code == 400
            assert refused.json()["message"].startswith("A reranker ")
        assert post(url, "/v1/score", {"query": "q", "items": []}).json()["message"] == "Items cannot be empty"


class TestTokens:
    def test_of_a_rerank_request(self, url: str) -> None:
        body = {"query": "q", "documents": ["ab", "c"]}
        wanted: dict[str, Any] = {
            "model": "fake/reranker",
            "max_model_len": 500,
            "count": 3,
            "tokens": [[97, 98], [99]],
        }
        assert post(url, "/tokenize", body).json() == wanted
        for flag in ("true", "1"):
            assert post(url, f"/tokenize?render={flag}", body).json() == wanted | {"prompts": ["ab", "c"]}
        assert post(url, "/tokenize?render=false", body).json() == wanted
        assert post(url, "/tokenize?render=perhaps", body).json()["message"] == "render must be true or false."

    def test_of_texts(self, url: str) -> None:
        def tokens(**body: Any) -> Any:
            return post(url, "/tokenize", body).json()

        assert tokens(prompt="ab") == {"tokens": [97, 98], "count": 2, "max_model_len": 500}
        assert tokens(prompt=["ab", "c"]) == {"tokens": [[97, 98], [99]], "count": [2, 1], "max_model_len": 500}
        assert tokens(content="ab") == {"tokens": [97, 98]}
        token = {"id": 97, "text": "a", "special": False, "start": 0, "stop": 1}
        assert tokens(inputs="a") == tokens(inputs=["a"]) == [[token]]
        assert tokens(prompt=[5])["message"] == "prompt must be a string or an array of strings; got an array."
        surrogate = httpx.post(
            url + "/tokenize", content=b'{"prompt": "\\ud800"}', headers={"Content-Type": "application/json"}
        )
        assert (surrogate.status_code, "lone surrogate" in surrogate.json()["message"]) == (400, True)
        assert tokens(content=["a"])["message"] == "content must be a string; got an array."
        assert tokens()["message"].startswith("The field query is missing")


class TestFacts:
    def test_info(self, url: str) -> None:
        info = httpx.get(url + "/info").json()
        assert info == {
            "model_id": "fake/reranker", "model_sha": None, "model_dtype": "float32",
            "served_model_name": "fake/reranker",
            "model_type": {"reranker": {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}},
            "max_concurrent_requests": 512, "max_input_length": 500, "max_batch_tokens": 1000,
            "max_batch_requests": None, "max_client_batch_size": 50, "auto_truncate": True,
            "tokenization_workers": encode_threads_for(usable_cores()),
            "version": __version__, "sha": None, "docker_label": None, "max_body_bytes": 8_000_000,
            "score_scale": "logit", "attention": {"text": {"implementation": "tiled", "failed": []}},
        }  # fmt: skip

    def test_the_rest(self, url: str) -> None:
        (model,) = httpx.get(url + "/infinity/models").json()["data"]
        (listed,) = httpx.get(url + "/infinity/v1/models").json()["data"]
        assert model.items() >= listed.items()
        assert model["capabilities"] == ["rerank"]
        stats = {"queue_fraction": 0.0, "queue_absolute": 0, "results_pending": 0, "batch_size": 50}
        assert model["stats"] == stats
        assert httpx.get(url + "/version").json() == {"version": __version__}
        for method in ("GET", "POST"):
            ping = httpx.request(method, url + "/ping")
            assert (ping.status_code, ping.content) == (200, b"")

    @pytest.mark.parametrize("name", ["", *NAMES])
    def test_documentation(self, url: str, name: str) -> None:
        prefix = f"/{name}" if name else ""
        document = httpx.get(f"{url}{prefix}/openapi.json").json()
        assert document["servers"] == [{"url": prefix or "/"}]
        rerank = document["paths"]["/v1/rerank"]["post"]
        asked = rerank["requestBody"]["content"]["application/json"]["schema"]
        if name:
            assert asked == {"$ref": f"#/components/schemas/{DIALECTS[name].request.__name__}"}
        else:
            assert len(asked["anyOf"]) == len(NAMES)
        answers = set(rerank["responses"])
        assert ("424" in answers) == (name in ("", "tei"))
        assert {"200", "400", "408", "413", "500", "503"} <= answers
        described = {
            part.removeprefix("#/components/schemas/") for part in json.dumps(document).split('"') if part[:2] == "#/"
        }
        assert described <= set(document["components"]["schemas"])
