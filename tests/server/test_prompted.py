"""Qwen3-Reranker over HTTP: SGLang's documented launch line and request, instructs, and requests that are framed."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from benchmarks.publisher import PREFIX, Script
from jaxrank.reranker import Reranker
from tests.checkpoints import TEXT, make_qwen3
from tests.server.fakes import FakeReranker, rerank, serving, until

LAUNCH = r"""
python3 -m sglang.launch_server \
  --model-path Qwen/Qwen3-Reranker-0.6B \
  --trust-remote-code \
  --disable-radix-cache \
  --host 0.0.0.0 \
  --port 8001 \
  --chat-template examples/chat_template/qwen3_reranker.jinja
"""
REQUEST = """{
    "model": "Qwen3-Reranker-0.6B",
    "query": "法国首都是哪里?",
    "documents": [
      "法国的首都是巴黎。",
      "德国的首都是柏林。",
      "香蕉是黄色的水果。"
    ],
    "instruct": "Given a web search query, retrieve relevant passages that answer the query.",
    "top_n": 2,
    "return_documents": true
  }"""


def published(folder: Path, query: str, documents: list[str], instruct: str | None = None) -> np.ndarray:
    """The script's probabilities of yes."""
    script = Script(folder)
    return 1 / (1 + np.exp(-script.logits([script.ids(query, text, instruct) for text in documents])))


def test_sglangs_launch_line_and_request(tmp_path: Path) -> None:
    """Only the program's name changes, and here the port; the template's file is not there, and not needed."""
    folder = make_qwen3(tmp_path / "Qwen" / "Qwen3-Reranker-0.6B", gain=1.5)
    line = LAUNCH.replace("python3 -m sglang.launch_server", "jaxrank serve").replace("8001", "0")
    program, *argv = shlex.split(line.replace("\\\n", " "))
    assert program == "jaxrank"
    log = tmp_path / "log"
    with log.open("wb") as out:
        command = [sys.executable, "-m", "jaxrank", *argv, "--dtype", "float32", "--compile-cache", "none"]
        server = subprocess.Popen([*command, "--row-tokens", "256", "--max-model-len", "512"], cwd=tmp_path, stderr=out)
    try:
        until(lambda: server.poll() is not None or "listening" in log.read_text(), 60)
        found = re.search(r"listening on 0.0.0.0 port (\d+)", log.read_text())
        assert found, log.read_text()
        url = f"http://127.0.0.1:{found[1]}"
        until(lambda: httpx.get(url + "/ready").status_code == 200, 60)
        headers = {"Content-Type": "application/json"}
        answer = httpx.post(url + "/v1/rerank", content=REQUEST, headers=headers, timeout=60).json()
        compilations = httpx.get(url + "/ready").json()["compilations_after_ready"]
    finally:
        server.terminate()
        assert server.wait(30) == 0
    assert "there is no examples/chat_template/qwen3_reranker.jinja; it is not needed" in log.read_text()
    body = json.loads(REQUEST)
    want = published(folder, body["query"], body["documents"], body["instruct"])
    assert [result["index"] for result in answer] == np.argsort(-want).tolist()[:2]
    for result in answer:
        assert result.keys() == {"score", "document", "index", "meta_info"}
        assert abs(result["score"] - want[result["index"]]) <= 1e-5
        assert result["document"] == body["documents"][result["index"]]
        ids = Script(folder).ids(body["query"], result["document"], body["instruct"])
        assert result["meta_info"] == {"prompt_tokens": len(ids), "truncated_tokens": 0}
    assert compilations == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen3(tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    reranker = Reranker.from_pretrained(
        folder, dtype="float32", compile_cache=None, row_tokens=256, max_length=512, instruct="Find animals"
    )
    with serving(reranker, batch_rows=2, patience_s=60) as base:
        yield base


def scores(answer: httpx.Response) -> list[float]:
    assert answer.status_code == 200, answer.text
    return [result["score"] for result in sorted(answer.json(), key=lambda result: result["index"])]


class TestRequests:
    def test_instruct_or_the_servers_default(self, url: str, folder: Path) -> None:
        body: dict[str, Any] = {"query": "Where do pandas live?", "documents": TEXT}
        for fields, instruct in (
            ({}, "Find animals"),
            ({"instruct": None}, "Find animals"),
            ({"instruct": ""}, "Find animals"),
            ({"instruct": "Find cities"}, "Find cities"),
            ({"instruction": "Find cities"}, "Find cities"),
            ({"chat_template_kwargs": {"instruction": "Find cities", "enable_thinking": False}}, "Find cities"),
        ):
            want = published(folder, body["query"], TEXT, instruct)
            np.testing.assert_allclose(scores(rerank(url + "/sglang", body | fields)), want, atol=1e-5)

    def test_framed_by_the_client(self, url: str, folder: Path) -> None:
        """As vLLM-Ascend's example does, in vLLM's dialect; documents come back as they were sent."""
        query = f"{PREFIX}<Instruct>: Find cities\n<Query>: Where is Paris?\n"
        documents = [f"<Document>: {text}<|im_end|>\n<|im_start|>assistant\n" for text in TEXT]
        answer = rerank(url, {"query": query, "documents": documents})
        assert answer.status_code == 200, answer.text
        results = sorted(answer.json()["results"], key=lambda result: result["index"])
        got = [result["relevance_score"] for result in results]
        np.testing.assert_allclose(got, published(folder, "Where is Paris?", TEXT, "Find cities"), atol=1e-5)
        assert [result["document"] for result in results] == [{"text": text, "multi_modal": None} for text in documents]

    def test_the_prompt_as_the_model_sees_it(self, url: str, folder: Path) -> None:
        body = {"query": "Where?", "documents": ["Paris </s>", "x"], "instruct": "Find cities"}
        shown = httpx.post(url + "/tokenize?render=true", json=body).json()
        script = Script(folder)
        assert shown["tokens"] == [script.ids("Where?", text, "Find cities") for text in body["documents"]]
        assert shown["count"] == sum(map(len, shown["tokens"]))
        end = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
        middle = "<Instruct>: Find cities\n<Query>: Where?\n<Document>: "
        assert shown["prompts"] == [f"{PREFIX}{middle}{text}{end}" for text in body["documents"]]
        plain = httpx.post(url + "/tokenize", json={"prompt": "Where?"}).json()
        assert plain["tokens"] == script.tokenizer.encode("Where?", add_special_tokens=False)

    def test_limits_of_query_and_document(self, url: str, folder: Path) -> None:
        """Scores of texts that the request has cut are those of the shorter texts."""
        tokenizer = Script(folder).tokenizer
        query, documents = " ".join(TEXT), [" ".join(TEXT) * 3, TEXT[0]]

        def first(text: str, most: int) -> str:
            places = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
            return text[: places[most][0]] if len(places) > most else text

        body = {"query": query, "documents": documents, "max_tokens_per_query": 9, "max_tokens_per_doc": 20}
        answer = httpx.post(url + "/rerank", json=body, timeout=60).json()
        got = [r["relevance_score"] for r in sorted(answer["results"], key=lambda result: result["index"])]
        asked, texts = first(query, 9), [first(text, 20) for text in documents]
        np.testing.assert_allclose(got, published(folder, asked, texts, "Find animals"), atol=1e-5)
        script = Script(folder)
        assert answer["usage"]["prompt_tokens"] == sum(len(script.ids(asked, t, "Find animals")) for t in texts)

    def test_long_documents_keep_the_frame(self, url: str, folder: Path) -> None:
        long = " ".join(TEXT) * 20
        answer = rerank(url, {"query": "q", "documents": [long, "d"], "instruct": "i"})
        script = Script(folder, 512)
        want = script.logits([script.ids("q", text, "i") for text in (long, "d")])
        np.testing.assert_allclose(scores(answer), 1 / (1 + np.exp(-want)), atol=1e-5)
        tokens = {result["index"]: result["meta_info"] for result in answer.json()}
        assert tokens[0]["prompt_tokens"] == 512
        assert tokens[0]["truncated_tokens"] > 0

    def test_wrong_instructs(self, url: str) -> None:
        body = {"query": "q", "documents": ["d"]}
        wrong_type = rerank(url, body | {"instruct": ["i"]})
        assert wrong_type.status_code == 400
        assert wrong_type.json()["message"] == "instruct must be a string or null; got an array."
        surrogate = rerank(url, body | {"instruct": "\ud800"})
        assert surrogate.status_code == 400
        assert "lone surrogate" in surrogate.json()["message"]


def test_models_without_a_prompt_ignore_instructs() -> None:
    """As SGLang's cross-encoders do."""
    reranker = FakeReranker()
    with serving(reranker) as base:
        assert rerank(base, {"query": "q", "documents": ["d"], "instruct": "i"}).status_code == 200
    assert reranker.instructs == [None]
