"""Everything around the rerank route over real HTTP: keys, states, routes, failures, the process as a whole."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from jaxrank.server import create_app
from jaxrank.server.settings import encode_threads_for, usable_cores
from tests.server.fakes import FakeReranker, rerank, serving, until

GOOD = {"query": "fruit", "documents": ["1 apple", "3 pears"]}
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(FakeReranker()) as base:
        yield base


@pytest.fixture(scope="module")
def guarded() -> Iterator[str]:
    with serving(FakeReranker(), api_keys=["key one", "schlüssel"], served_model_name="mine") as base:
        yield base


class TestEncodeThreads:
    @pytest.mark.parametrize(("cores", "threads"), [(1, 2), (2, 2), (3, 2), (4, 3), (9, 8), (16, 8), (192, 8)])
    def test_one_core_is_left_to_others(self, cores: int, threads: int) -> None:
        assert encode_threads_for(cores) == threads

    def test_cores_are_those_that_the_process_may_use(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "cpu_count", lambda: 64)
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5, 8}, raising=False)
        assert usable_cores() == 3
        monkeypatch.delattr(os, "sched_getaffinity")
        assert usable_cores() == 64

    def test_what_is_asked_for_wins(self) -> None:
        for asked, threads in ((5, 5), (1, 1), (None, encode_threads_for(usable_cores()))):
            settings = create_app(FakeReranker(), encode_threads=asked).state.service.settings
            assert settings.encode_threads == threads


class TestRoutes:
    def test_states(self, url: str) -> None:
        assert httpx.get(url + "/health").json() == {"status": "alive"}
        state = httpx.get(url + "/ready").json()
        assert state["ready"] is True
        assert state["compilations_after_ready"] == 0
        assert (state["queued_requests"], state["queued_tokens"]) == (0, 0)

    def test_models(self, url: str) -> None:
        body = httpx.get(url + "/v1/models").json()
        assert body["object"] == "list"
        assert [(model["id"], model["max_model_len"]) for model in body["data"]] == [("fake/reranker", 500)]

    @pytest.mark.parametrize("path", ["/nope", "/v1/rerank/", "/v1", "/health/", "/%0a%0dx", "/redoc"])
    def test_unknown_routes(self, url: str, path: str) -> None:
        response = httpx.post(url + path, json=GOOD)
        assert response.status_code == 404
        assert response.json()["code"] == 404
        assert response.json()["type"] == "NotFound"

    @pytest.mark.parametrize(
        "method, path, allowed",
        [("GET", "/v1/rerank", {"POST", "PUT"}), ("POST", "/health", {"GET"}), ("POST", "/", {"GET"})],
    )
    def test_wrong_methods(self, url: str, method: str, path: str, allowed: set[str]) -> None:
        response = httpx.request(method, url + path)
        assert response.status_code == 405
        assert response.json()["object"] == "error"
        assert set(response.headers["allow"].split(", ")) == allowed

    def test_documentation(self, url: str) -> None:
        assert "openapi.json" in httpx.get(url + "/docs").text
        document = httpx.get(url + "/openapi.json").json()
        schemas = document["components"]["schemas"]
        operation = document["paths"]["/v1/rerank"]["post"]
        tei = {"422", "424"}
        expected = {"200", "400", "408", "413", "429", "431", "500", "503", "504"} | tei
        assert set(operation["responses"]) == expected
        names = {"SglangRequest", "SglangResult", "CohereRequest", "MetaInfo", "Part", "ErrorBody", "TeiError", "Ready"}
        assert set(schemas) >= names
        references = set(re.findall(r"#/components/schemas/(\w+)", str(document)))
        assert references <= set(schemas)
        for name in ("SglangResult", "MetaInfo"):
            fields = schemas[name]["properties"]
            assert all("description" in field or "$ref" in field for field in fields.values())

    def test_request_ids(self, url: str) -> None:
        def identify(given: str) -> str:
            return httpx.get(url + "/health", headers={"X-Request-Id": given}).headers["x-request-id"]

        assert identify("abc-1") == "abc-1"
        assert re.fullmatch("[0-9a-f]{32}", identify("with space"))
        assert re.fullmatch("[0-9a-f]{32}", identify("x" * 129))
        assert httpx.get(url + "/nope").headers["x-request-id"] != httpx.get(url + "/nope").headers["x-request-id"]


class TestKeys:
    @pytest.mark.parametrize(
        "headers, status",
        [
            ([], 401),
            ([("Authorization", "Bearer key one")], 200),
            ([("Authorization", "bearer  key one")], 200),
            ([("Authorization", "Bearer schlüssel")], 200),
            ([("Authorization", "Bearer key on")], 401),
            ([("Authorization", "Bearer key one ü")], 401),
            ([("Authorization", "Bearer KEY ONE")], 401),
            ([("Authorization", "Bearer")], 401),
            ([("Authorization", "Basic key one")], 401),
            ([("Authorization", "key one")], 401),
            ([("Authorization", "Bearer wrong"), ("Authorization", "Bearer key one")], 401),
            ([("Authorization", "Bearer key one"), ("Authorization", "Bearer key one")], 401),
            ([("X-Api-Key", "key one")], 401),
            ([("Host", "x/?#")], 401),
            ([("Host", "x/health?")], 401),
            ([("Host", "x/health#"), ("X-Forwarded-Prefix", "/health")], 401),
            ([("Host", "x/?#"), ("Authorization", "Bearer key one")], 200),
        ],
    )
    @pytest.mark.parametrize("method, path", [("POST", "/v1/rerank"), ("PUT", "/v1/rerank"), ("GET", "/v1/models")])
    def test_table(self, guarded: str, headers: list[tuple[str, str]], status: int, method: str, path: str) -> None:
        encoded = [(name.encode(), value.encode()) for name, value in headers]
        response = httpx.request(method, guarded + path, json=GOOD, headers=encoded)
        assert response.status_code == status
        if status == 401:
            body = response.json()
            assert (body["error"]["type"], body["object"], body["code"]) == ("Unauthorized", "error", 401)
            assert response.headers["www-authenticate"] == "Bearer"

    def test_which_routes_are_open(self, guarded: str) -> None:
        for path, status in {"/health": 200, "/ready": 200, "/docs": 401, "/openapi.json": 401}.items():
            assert httpx.get(guarded + path).status_code == status

    def test_names_and_documentation(self, guarded: str) -> None:
        headers = {"Authorization": "Bearer key one"}
        assert httpx.get(guarded + "/v1/models", headers=headers).json()["data"][0]["id"] == "mine"
        assert "securitySchemes" in httpx.get(guarded + "/openapi.json", headers=headers).json()["components"]

    def test_an_empty_key_is_refused(self) -> None:
        with pytest.raises(ValueError, match="empty"):
            create_app(FakeReranker(), api_keys=["good", ""])


class TestStates:
    def test_not_ready(self) -> None:
        warm = threading.Event()

        def warm_up(progress: Callable[[str], None]) -> None:
            progress("bucket 1 of 2")
            warm.wait()

        with serving(FakeReranker(warm_up=warm_up), wait=False) as base:
            assert httpx.get(base + "/health").status_code == 200
            until(lambda: httpx.get(base + "/ready").json()["progress"] == "bucket 1 of 2")
            state = httpx.get(base + "/ready")
            assert (state.status_code, state.json()["ready"], state.json()["state"]) == (503, False, "warming up")
            response = rerank(base, GOOD)
            assert response.status_code == 503
            assert int(response.headers["retry-after"]) > 0
            assert response.json()["object"] == "error"
            warm.set()
            until(lambda: httpx.get(base + "/ready").status_code == 200)
            assert rerank(base, GOOD).status_code == 200

    def test_a_shutdown_stops_the_warm_up(self) -> None:
        steps: list[int] = []
        failures: list[BaseException] = []
        begun = threading.Event()

        def warm_up(progress: Callable[[str], None]) -> None:
            for step in range(1000):
                begun.wait(0.02)
                progress(f"bucket {step}")
                steps.append(step)

        with serving(FakeReranker(warm_up=warm_up), wait=False, on_failure=failures.append):
            until(lambda: steps)
        assert len(steps) < 500
        assert not failures

    def test_a_failed_warm_up(self, caplog: pytest.LogCaptureFixture) -> None:
        def warm_up(progress: Callable[[str], None]) -> None:
            raise RuntimeError("no such device")

        failures: list[BaseException] = []
        with serving(FakeReranker(warm_up=warm_up), wait=False, on_failure=failures.append) as base:
            until(lambda: failures)
            assert str(failures[0]) == "no such device"
            assert httpx.get(base + "/health").status_code == 503
            assert httpx.get(base + "/ready").json()["state"] == "failed"
            response = rerank(base, GOOD)
            assert response.status_code == 500
            assert "no such device" not in response.text
        assert "no such device" in caplog.text

    def test_logs_have_no_text_of_requests(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.DEBUG, "jaxrank")
        with serving(FakeReranker()) as base:
            response = rerank(base, {"query": "crash hunter2", "documents": ["boom hunter2"]})
            identity = response.headers["x-request-id"]
            assert response.status_code == 500
            assert identity in response.json()["message"]
            assert rerank(base, {"query": "q", "documents": ["boom hunter2"]}).status_code == 500
            httpx.get(base + "/a%0Ab?key=hunter2", headers={"X-Request-Id": "mine"})
        assert "hunter2" not in caplog.text
        assert f"request {identity}: unforeseen ValueError" in caplog.text
        lines = [record.getMessage() for record in caplog.records if record.name == "jaxrank.access"]
        assert re.fullmatch(r"127\.0\.0\.1 GET /a%0Ab 404 [\d.]+ms mine", lines[-1])

    def test_probes_are_logged_for_debugging_alone(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.DEBUG, "jaxrank")
        with serving(FakeReranker()) as base:
            for path in ("/ready", "/health", "/v1/models"):
                httpx.get(base + path)
        lines = [(r.levelname, r.getMessage().split()[2]) for r in caplog.records if r.name == "jaxrank.access"]
        assert set(lines) == {("DEBUG", "/ready"), ("DEBUG", "/health"), ("INFO", "/v1/models")}


class TestProcess:
    """serve() in a process of its own."""

    @contextlib.contextmanager
    def start(self, port: int, prelude: str = "fake = FakeReranker()") -> Iterator[subprocess.Popen[str]]:
        program = f"""
            from tests.server.fakes import FakeReranker
            from jaxrank.server import serve
            {prelude}
            serve(fake, port={port})
        """
        command = [sys.executable, "-W", "error", "-c", textwrap.dedent(program)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
            try:
                yield process
            finally:
                process.kill()

    @staticmethod
    def port_of(process: subprocess.Popen[str]) -> int:
        assert process.stderr is not None
        for line in process.stderr:
            if found := re.search(r"listening on \S+ port (\d+)", line):
                return int(found[1])
        raise AssertionError("the server did not start")

    @pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
    def test_signals_end_it_after_the_work(self, which: signal.Signals) -> None:
        with self.start(0, "fake = FakeReranker(delay_s=1.0)") as process:
            base = f"http://127.0.0.1:{self.port_of(process)}"
            until(lambda: httpx.get(base + "/ready").status_code == 200)
            answers: list[httpx.Response] = []
            client = threading.Thread(target=lambda: answers.append(rerank(base, GOOD)))
            client.start()
            until(lambda: httpx.get(base + "/ready").json()["queued_requests"] == 1)
            process.send_signal(which)
            _, errors = process.communicate(timeout=20)
            client.join()
        assert process.returncode == 0
        assert "Traceback" not in errors
        assert errors.rstrip().endswith("stopped")
        assert [answer.status_code for answer in answers] == [200]

    def test_a_port_in_use(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            with self.start(port) as process:
                _, errors = process.communicate(timeout=20)
        assert process.returncode == 1
        assert f"cannot listen on 127.0.0.1 port {port}: Address already in use" in errors
        assert "Traceback" not in errors

    def test_a_failed_warm_up_ends_it(self) -> None:
        prelude = """
            def warm_up(progress):
                raise RuntimeError("no such device")
            fake = FakeReranker(warm_up=warm_up)
        """
        with self.start(0, textwrap.dedent(prelude).replace("\n", "\n            ")) as process:
            _, errors = process.communicate(timeout=20)
        assert process.returncode == 1
        assert errors.rstrip().endswith("jaxrank: scoring stopped: RuntimeError: no such device")
