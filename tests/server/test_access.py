"""Who gets in: every route with every method, hostile requests over raw sockets, key files, other origins."""

from __future__ import annotations

import http.client
import logging
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient

from jaxrank.errors import RequestError
from jaxrank.server import create_app
from jaxrank.server.http.access import open_to_all, read_keys
from tests.server.fakes import FakeReranker, rerank, serving

GOOD = {"query": "fruit", "documents": ["1 apple", "3 pears"]}
KEY = {"Authorization": "Bearer key one"}
ROOT = Path(__file__).parents[2]

ORIGIN = "https://shop.example"


@pytest.fixture(scope="module")
def guarded() -> Iterator[str]:
    with serving(FakeReranker(), api_keys=["key one", "key two"], cors_origins=[ORIGIN, "http://[::1]:81"]) as base:
        yield base


def ask(base: str, target: str, method: str = "GET", host: str | None = None, body: bytes = b"", **headers: str) -> int:
    """The status that a request gets whose target and Host stand on the wire exactly so."""
    connection = http.client.HTTPConnection(base.removeprefix("http://"), timeout=10)
    try:
        connection.putrequest(method, target, skip_host=True, skip_accept_encoding=True)
        connection.putheader("Host", host or "x")
        connection.putheader("Content-Length", str(len(body)))
        for name, value in headers.items():
            connection.putheader(name.replace("_", "-"), value)
        connection.endheaders(body)
        return connection.getresponse().status
    finally:
        connection.close()


class TestEveryRoute:
    def test_no_route_but_the_named_ones_is_open(self, guarded: str) -> None:
        """By asking each, whatever the routes are: a new one that is open has to be named here."""
        document = httpx.get(guarded + "/openapi.json", headers=KEY).json()
        asked: list[tuple[str, str]] = [("GET", "/"), ("GET", "/docs"), ("GET", "/openapi.json"), ("PUT", "/v1/rerank")]
        asked += [(method.upper(), path) for path, methods in document["paths"].items() for method in methods]
        opened = {path for method, path in asked if httpx.request(method, guarded + path).status_code != 401}
        assert opened == {"/", "/health", "/ready"}
        assert len(asked) >= 8
        assert {"/metrics", "/v1/models", "/v1/rerank"} <= {path for _, path in asked}

    def test_either_key_opens_each(self, guarded: str) -> None:
        for key in ("key one", "key two"):
            headers = {"Authorization": f"Bearer {key}"}
            assert rerank(guarded, GOOD, headers=headers).status_code == 200
            assert httpx.get(guarded + "/metrics", headers=headers).status_code == 200

    def test_metrics_are_open_by_flag_alone(self) -> None:
        with serving(FakeReranker(), api_keys=["k"], open_metrics=True) as base:
            assert httpx.get(base + "/metrics").status_code == 200
            assert httpx.get(base + "/v1/models").status_code == 401

    @pytest.mark.parametrize(
        "target",
        [
            "//v1/rerank", "/v1//rerank", "/v1/rerank/", "/v1/./rerank", "/health/../v1/rerank",
            "/health/..;/v1/rerank", "/%76%31/rerank", "/v1%2frerank", "/v1/rerank%00", "/v1/rerank?x=/health",
            "/v1/rerank#/health", "http://x/v1/rerank", "http://x/health/../v1/rerank", "http://x/health?/v1/rerank",
            "/V1/RERANK", "/v1\\rerank", "/health%2f..%2fv1%2frerank", "/v1/rerank;/health", "*",
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("host", ["x", "x/health?", "x/?#", "x/health#", "[::1]/health", "health", "", "x@/health"])
    def test_no_way_of_writing_the_address_scores_without_a_key(self, guarded: str, target: str, host: str) -> None:
        body = b'{"query": "q", "documents": ["1"]}'
        status = ask(guarded, target, "POST", host, body, Content_Type="application/json", X_Original_URL="/health",
                     X_Rewrite_URL="/health", X_Forwarded_Prefix="/health", X_HTTP_Method_Override="GET")  # fmt: skip
        assert status in (400, 401, 404, 405)

    @pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "TRACE", "PATCH", "DELETE", "PROPFIND", "post", "X"])
    @pytest.mark.parametrize("target", ["/v1/rerank", "/v1/models", "/metrics", "/docs"])
    def test_odd_methods(self, guarded: str, method: str, target: str) -> None:
        assert ask(guarded, target, method) in (401, 405)

    def test_routes_that_dependencies_do_not_reach(self, caplog: pytest.LogCaptureFixture) -> None:
        """A mount and a plain Starlette route, added without a thought, are closed all the same."""
        inner = FastAPI()

        @inner.get("/deep")
        async def deep() -> str:
            return "secret"

        async def plain(request: Request) -> PlainTextResponse:
            return PlainTextResponse("secret")

        app = create_app(FakeReranker(), api_keys=["k"])
        app.mount("/inner", inner)
        app.add_route("/plain", plain)
        with TestClient(app) as client:
            for path in ("/inner/deep", "/plain"):
                refused = client.get(path)
                assert (refused.status_code, "secret" in refused.text) == (401, False)
                assert client.get(path, headers={"Authorization": "Bearer k"}).text.strip('"') == "secret"
        assert "asks for no key" in caplog.text

    def test_a_new_route_is_closed_and_a_marked_one_is_open(self) -> None:
        app = create_app(FakeReranker(), api_keys=["k"])

        @app.get("/new")
        async def new() -> str:
            return "new"

        @app.get("/page")
        @open_to_all
        async def page() -> str:
            return "page"

        with TestClient(app) as client:
            assert client.get("/new").status_code == 401
            assert client.get("/new", headers={"Authorization": "Bearer k"}).status_code == 200
            assert client.get("/page").status_code == 200


class TestKeyFile:
    def write(self, folder: Path, content: bytes, mode: int = 0o600) -> Path:
        file = folder / "keys"
        file.write_bytes(content)
        file.chmod(mode)
        return file

    def test_lines(self, tmp_path: Path) -> None:
        file = self.write(tmp_path, "\ufeff# ours\r\none\r\n\n  two#2  \n# theirs\nschlüssel".encode())
        assert read_keys(file) == ["one", "two#2", "schlüssel"]

    @pytest.mark.parametrize(
        "content, mode, message",
        [
            (b"", 0o600, "has no key"),
            (b"# nothing\n\n", 0o600, "has no key"),
            (b"\xff\xfe", 0o600, "not UTF-8"),
            (b"key", 0o602, "can be written by everyone"),
        ],
    )
    def test_refused(self, tmp_path: Path, content: bytes, mode: int, message: str) -> None:
        with pytest.raises(RequestError, match=message):
            read_keys(self.write(tmp_path, content, mode))

    def test_unreadable(self, tmp_path: Path) -> None:
        for file in (tmp_path, tmp_path / "none"):
            with pytest.raises(RequestError, match="name a file with one key a line"):
                read_keys(file)

    def test_readable_by_all_is_complained_about(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        assert read_keys(self.write(tmp_path, b"hunter2", 0o644)) == ["hunter2"]
        assert "can be read by everyone" in caplog.text
        assert "hunter2" not in caplog.text


def test_keys_do_not_stay_in_the_process_list() -> None:
    program = """
        import sys
        from jaxrank.server.http.access import hide_from_process_list
        hide_from_process_list(["hunter2", "other=2", "serve"])
        print(open("/proc/self/cmdline").read().split(chr(0))[3:])
        print(sys.argv[1:])
    """
    if not os.path.exists("/proc/self/cmdline"):
        pytest.skip("no /proc")
    argv = ["run", "--api-key", "hunter2", "--api-key=other=2", "--name", "hunter22", "served"]
    command = [sys.executable, "-c", textwrap.dedent(program), *argv]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    shown, own = subprocess.run(command, capture_output=True, text=True, env=environment).stdout.splitlines()
    hidden = ["run", "--api-key", "*" * 7, "--api-key=" + "*" * 7, "--name", "hunter22", "served", ""]
    assert (shown, own) == (str(hidden), str(argv))


class TestOrigins:
    def preflight(self, base: str, origin: str) -> httpx.Response:
        headers = {
            "Origin": origin,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type,x-request-timeout",
        }
        return httpx.options(base + "/v1/rerank", headers=headers)

    @pytest.mark.parametrize("origin", [ORIGIN, "http://[::1]:81"])
    def test_named_ones_may_ask(self, guarded: str, origin: str) -> None:
        asked = self.preflight(guarded, origin)
        assert asked.status_code == 200
        assert asked.headers["access-control-allow-origin"] == origin
        for headers, status in ((KEY, 200), ({}, 401)):
            answer = rerank(guarded, GOOD, headers={**headers, "Origin": origin})
            assert answer.status_code == status
            assert answer.headers["access-control-allow-origin"] == origin
            assert "access-control-allow-credentials" not in answer.headers

    @pytest.mark.parametrize("origin", ["https://shop.example.evil", "http://shop.example", "null", ORIGIN + ":444"])
    def test_others_may_not(self, guarded: str, origin: str) -> None:
        assert self.preflight(guarded, origin).status_code == 400
        assert "access-control-allow-origin" not in rerank(guarded, GOOD, headers={**KEY, "Origin": origin}).headers

    def test_off_by_default(self) -> None:
        with serving(FakeReranker()) as base:
            assert self.preflight(base, ORIGIN).status_code == 405
            assert "access-control-allow-origin" not in rerank(base, GOOD, headers={"Origin": ORIGIN}).headers

    @pytest.mark.parametrize("origin", ["shop.example", ORIGIN + "/", "*.shop.example", "https://*", "", "null"])
    def test_what_is_no_origin(self, origin: str) -> None:
        with pytest.raises(RequestError, match="is not an origin"):
            create_app(FakeReranker(), cors_origins=[origin])


def test_keys_are_in_no_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with serving(FakeReranker(), api_keys=["hunter2"]) as base:
        for key in ("hunter2", "hunter3"):
            headers: dict[str, Any] = {"Authorization": f"Bearer {key}"}
            rerank(base, {"query": "crash", "documents": ["1"]}, headers=headers)
            httpx.get(base + "/metrics", headers=headers)
    ours = [record.getMessage() for record in caplog.records if record.name.startswith(("jaxrank", "uvicorn"))]
    assert ours
    assert "hunter" not in "\n".join(ours)
