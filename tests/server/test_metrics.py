"""What a server tells of itself: metrics, the dashboard over them, logs as JSON, traces."""

from __future__ import annotations

import contextlib
import http.server
import importlib
import io
import json
import logging
import re
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from jaxrank.errors import RequestError
from jaxrank.reranker import Reranker
from jaxrank.server import create_app
from jaxrank.server.observe import logs
from tests.checkpoints import make_qwen3
from tests.server.fakes import FakeReranker, rerank, serving, until

ROOT = Path(__file__).parents[2]
GOOD = {"query": "fruit", "documents": ["1 apple", "3 pears"]}

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def samples(base: str) -> Samples:
    text = httpx.get(base + "/metrics").text
    families = text_string_to_metric_families(text)
    return {(one.name, frozenset(one.labels.items())): one.value for family in families for one in family.samples}


def value(found: Samples, name: str, **labels: str) -> float:
    return found.get((name, frozenset(labels.items())), 0.0)


class TestMetrics:
    def test_requests_stages_and_batches(self) -> None:
        with serving(FakeReranker(row_tokens=100)) as base:
            for _ in range(3):
                assert rerank(base, GOOD).status_code == 200
            rerank(base, {"query": "", "documents": ["1"]})
            httpx.post(base + "/v1/rerank", content=b"{", headers={"Content-Type": "application/json"})
            httpx.get(base + "/nowhere")
            found = samples(base)
            other = samples(base)
        assert value(found, "jaxrank_requests_total", dialect="sglang", status="200") == 3
        assert value(found, "jaxrank_requests_total", dialect="sglang", status="400") == 2
        assert value(found, "jaxrank_requests_total", dialect="none", status="404") == 1
        assert value(found, "jaxrank_request_seconds_count", dialect="sglang") == 5
        assert value(found, "jaxrank_refusals_total", reason="BadRequest") == 1
        assert value(found, "jaxrank_refusals_total", reason="Malformed") == 1
        for stage, count in {"wait": 3, "score": 3, "tokenise": 5, "answer": 3, "media": 0}.items():
            assert value(found, "jaxrank_stage_seconds_count", stage=stage) == count, stage
        assert value(found, "jaxrank_batch_seconds_count") == 3
        assert value(found, "jaxrank_batch_fill_ratio_sum") == pytest.approx(3 * 14 / 100)
        assert value(found, "jaxrank_scored_pairs_total") == 6
        assert value(found, "jaxrank_rows_total") == 3
        assert value(found, "jaxrank_row_tokens_total") == 300
        assert value(found, "jaxrank_computed_tokens_total") == value(found, "jaxrank_pair_tokens_total") == 42
        assert value(found, "jaxrank_ready") == 1
        assert value(found, "jaxrank_queue_requests") == 0
        assert value(found, "jaxrank_drain_tokens_per_second") > 0
        assert value(other, "jaxrank_requests_total", dialect="none", status="200") > value(
            found, "jaxrank_requests_total", dialect="none", status="200"
        )

    def test_the_queue_and_refusals_under_load(self) -> None:
        fake = FakeReranker()
        with serving(fake, max_queue_requests=2) as base, ThreadPoolExecutor(2) as pool:
            fake.gate.clear()
            held = [pool.submit(rerank, base, GOOD) for _ in range(2)]
            until(lambda: value(samples(base), "jaxrank_queue_tokens") == 28)
            assert rerank(base, GOOD).status_code == 503
            found = samples(base)
            fake.gate.set()
            assert all(one.result().status_code == 200 for one in held)
        assert value(found, "jaxrank_queue_requests") == 2
        assert value(found, "jaxrank_refusals_total", reason="Overloaded") == 1

    def test_keys_and_failures_are_counted(self) -> None:
        with serving(FakeReranker(), api_keys=["k"], open_metrics=True) as base:
            rerank(base, GOOD)
            rerank(base, {"query": "q", "documents": ["boom"]}, headers={"Authorization": "Bearer k"})
            until(lambda: value(samples(base), "jaxrank_failed_pairs_total") == 1)
            found = samples(base)
        assert value(found, "jaxrank_refusals_total", reason="Unauthorized") == 1
        assert value(found, "jaxrank_refusals_total", reason="ScoringFailed") == 1

    def test_two_applications_share_nothing(self) -> None:
        with serving(FakeReranker()) as one, serving(FakeReranker()) as other:
            rerank(one, GOOD)
            assert value(samples(one), "jaxrank_scored_pairs_total") == 2
            assert value(samples(other), "jaxrank_scored_pairs_total") == 0

    def test_filler_and_shared_prefixes_of_a_model(self, tmp_path: Path) -> None:
        """Against what the encoded pairs say."""
        folder = make_qwen3(tmp_path)
        reranker = Reranker.from_pretrained(folder, dtype="float32", row_tokens=256, max_length=256, compile_cache=None)
        pairs = reranker.encode("what is panda?", ["a bear", "a car"])
        prefix, own = len(pairs[0].prefix), [len(pair.tokens) for pair in pairs]
        assert prefix > 10
        for rows in (1, 2):
            reranker.score_encoded(pairs)
            work = reranker.work
            assert (work.rows, work.pair_tokens) == (rows, rows * (2 * prefix + sum(own)))
            assert work.computed_tokens == rows * (prefix + sum(own))
            assert work.row_tokens / rows in (128, 192, 256)
            assert work.computed_tokens < work.row_tokens


def test_the_dashboard_and_the_manual_name_metrics_that_exist() -> None:
    with serving(FakeReranker()) as base:
        text = httpx.get(base + "/metrics").text
    found = text_string_to_metric_families(text)
    families = {family.name: family.type for family in found if not family.name.endswith("_created")}
    endings = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"]}
    exist = {name + end for name, kind in families.items() for end in endings[kind]}
    dashboard = json.loads((ROOT / "docs/grafana.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    queries.append(dashboard["templating"]["list"][1]["query"])
    named = set(re.findall(r"\b(?:jaxrank|process)_[a-z_]+", " ".join(queries)))
    assert named <= exist
    assert len(named) > 20
    manual = (ROOT / "docs/operations.md").read_text()
    ours = {name + ("_total" if kind == "counter" else "") for name, kind in families.items() if "jaxrank" in name}
    assert set(re.findall(r"`(jaxrank_[a-z_]+)`", manual)) == ours
    missing = {name for name in ours if not any(name in query for query in queries)}
    assert missing == {"jaxrank_attention_info"}, "all that changes while a server runs is on the dashboard"


class TestLogs:
    @contextlib.contextmanager
    def json_lines(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
        """What logs.to_stderr writes in the block; filled when it ends."""
        root, out, lines = logging.getLogger(), io.StringIO(), []
        monkeypatch.setattr(root, "handlers", [])  # pytest's own, which would be left alone
        monkeypatch.setattr(sys, "stderr", out)
        with logs.to_stderr("json"):
            yield lines
        lines += [json.loads(line) for line in out.getvalue().splitlines()]

    def test_one_object_a_line_with_ids(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with self.json_lines(monkeypatch) as lines, serving(FakeReranker()) as base:
            rerank(base, GOOD, headers={"X-Request-Id": "good"})
            rerank(base, {"query": "crash hunter2", "documents": ["1\nhunter2"]}, headers={"X-Request-Id": "bad"})
            rerank(base, {"query": "q", "documents": ["boom hunter2"]}, headers={"X-Request-Id": "failed"})
            httpx.get(base + "/a%0Ab?hunter2")
        good = next(line for line in lines if line.get("request_id") == "good")
        assert good.pop("ms") >= 0
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", good.pop("time"))
        assert re.fullmatch(r"127\.0\.0\.1 POST /v1/rerank 200 [\d.]+ms good", good.pop("message"))
        assert good == {
            "level": "info", "logger": "jaxrank.access", "request_id": "good", "client": "127.0.0.1", "method": "POST",
            "path": "/v1/rerank", "status": 200, "dialect": "sglang",
        }  # fmt: skip
        errors = {line["request_id"] for line in lines if line["level"] == "error" and "request_id" in line}
        assert errors == {"bad", "failed"}
        assert any("the device is on fire" in line.get("exception", "") for line in lines)
        assert any(line.get("path") == "/a%0Ab" for line in lines)
        assert "hunter2" not in json.dumps(lines)

    def test_a_program_that_logs_itself_is_left_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        theirs = logging.NullHandler()
        monkeypatch.setattr(logging.getLogger(), "handlers", [theirs])
        with logs.to_stderr("json"):
            assert logging.getLogger().handlers == [theirs]

    def test_other_formats(self) -> None:
        with pytest.raises(ValueError, match="one of text, json"), logs.to_stderr("xml"):
            pass


class Collector(http.server.BaseHTTPRequestHandler):
    """An OTLP collector that keeps what is posted."""

    posted: list[tuple[str, bytes]]

    def do_POST(self) -> None:
        self.posted.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


class TestTraces:
    @contextlib.contextmanager
    def collector(self) -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
        posted: list[tuple[str, bytes]] = []
        handler = type("Handler", (Collector,), {"posted": posted})
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1/traces", posted
        finally:
            server.shutdown()
            thread.join()
            server.server_close()

    def test_spans(self) -> None:
        trace_service: Any = importlib.import_module("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
        trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
        with self.collector() as (endpoint, posted):
            with serving(FakeReranker(), otlp_endpoint=endpoint) as base:
                headers = {"traceparent": f"00-{trace}-{parent}-01", "X-Request-Id": "mine"}
                rerank(base, {"query": "hunter2", "documents": ["1 hunter2"]}, headers=headers)
                rerank(base, {"query": "q", "documents": ["boom"]})
            assert {path for path, _ in posted} == {"/v1/traces"}
        spans = []
        for _, content in posted:
            assert b"hunter2" not in content
            request = trace_service.ExportTraceServiceRequest.FromString(content)
            spans += [s for resource in request.resource_spans for scope in resource.scope_spans for s in scope.spans]
        ours = {span.name: span for span in spans if span.trace_id.hex() == trace}
        assert set(ours) == {"request", "tokenise", "queue", "score", "answer"}
        root = ours["request"]
        assert root.parent_span_id.hex() == parent
        attributes = {one.key: one.value.string_value or one.value.int_value for one in root.attributes}
        assert attributes == {
            "http.request.method": "POST", "jaxrank.request_id": "mine", "http.response.status_code": 200,
            "jaxrank.dialect": "sglang",
        }  # fmt: skip
        order = [ours[name] for name in ("tokenise", "queue", "score", "answer")]
        for span in order:
            assert span.parent_span_id == root.span_id
            assert root.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano
            assert span.end_time_unix_nano <= root.end_time_unix_nano
        starts = [span.start_time_unix_nano for span in order]
        assert starts == sorted(starts)
        failed = [span for span in spans if span.name == "request" and span.status.code == 2]
        assert len(failed) == 1

    def test_a_collector_that_is_away_harms_nobody(self) -> None:
        with serving(FakeReranker(), otlp_endpoint="http://127.0.0.1:9/v1/traces") as base:
            assert rerank(base, GOOD).status_code == 200

    def test_without_the_extra(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
        with pytest.raises(RequestError, match=r"pip install 'jaxrank\[otel\]'"):
            create_app(FakeReranker(), otlp_endpoint="http://localhost:4318/v1/traces")
        with pytest.raises(RequestError, match="must be a URL"):
            create_app(FakeReranker(), otlp_endpoint="localhost:4318")
