"""`jaxrank serve`: flags, launch lines of SGLang, ports."""

from __future__ import annotations

import shlex
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jaxrank import cli
from jaxrank.media import Limits
from jaxrank.reranker import DEFAULT_CACHE
from jaxrank.server.fetch import MediaAccess
from tests.cli.commands import NO_CACHE, Run, complaint

LAUNCH = r"""
python3 -m sglang.launch_server \
  --model-path BAAI/bge-reranker-v2-m3 \
  --host 0.0.0.0 \
  --disable-radix-cache \
  --chunked-prefill-size -1 \
  --attention-backend triton \
  --is-embedding \
  --port 30000
"""
"""SGLang's documented launch line for BGE, the same in its older and its newer documentation."""

ALL_FLAGS = """some/model --host ::1 --port 8001 --api-key one --api-key two --served-model-name bge --dtype float32
    --max-documents 7 --max-body-bytes 1000 --max-model-len 300 --row-tokens 512 --revision v2 --compile-cache x
    --prompt vllm --chat-template x.jinja --instruct judge --no-remote-media --allowed-media-domains A.example,b.example
    --allow-private-media --allowed-media-path / --max-media 3 --max-media-bytes 1000 --media-timeout 2.5
    --max-image-pixels 5000 --max-video-seconds 60 --media-decode-seconds 4"""


class Loaded(dict[str, Any]):
    """What from_pretrained was told."""

    takes_instruct = False


class TestServe:
    @pytest.fixture
    def served(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """What would be loaded and how it would be served, instead of doing it."""
        calls: list[tuple[dict[str, Any], dict[str, Any]]] = []
        load = staticmethod(lambda model, **settings: Loaded(model=model, **settings))
        monkeypatch.setattr("jaxrank.reranker.Reranker.from_pretrained", load)
        monkeypatch.setattr("jaxrank.server.serve", lambda loaded, **how: calls.append((loaded, how)) or 0)
        return calls

    @pytest.mark.parametrize("more", ["", " --trust-remote-code --mem-fraction-static 0.8 --skip-server-warmup"])
    def test_launch_lines_of_sglang(self, run: Run, served: list[Any], more: str) -> None:
        """Only the program's name changes."""
        line = LAUNCH.replace("python3 -m sglang.launch_server", "jaxrank serve").replace("\\\n", " ") + more
        program, *argv = shlex.split(line)
        assert program == "jaxrank"
        status, out, err = run(*argv)
        assert (status, out) == (0, "")
        ((loaded, how),) = served
        assert loaded["model"] == "BAAI/bge-reranker-v2-m3"
        assert (how["host"], how["port"], how["api_keys"]) == ("0.0.0.0", 30000, [])
        flags = [word for word in argv if word.startswith("--")]
        meaningless = sorted(flag for flag in flags if flag not in ("--model-path", "--host", "--port"))
        assert err.splitlines() == [
            f"jaxrank: {flag} is accepted for SGLang's launch lines and means nothing here" for flag in meaningless
        ]

    def test_every_flag_reaches_its_place(self, run: Run, served: list[Any]) -> None:
        assert run("serve") == run("serve", *ALL_FLAGS.split()) == (0, "", "")
        assert served[0] == (
            dict(model=None, dtype="bfloat16", max_length=None, row_tokens=None, prompt=None, chat_template=None,
                 instruct=None, revision=None, compile_cache=DEFAULT_CACHE),
            dict(host="127.0.0.1", port=30000, served_model_name=None, api_keys=[], max_documents=1000,
                 max_body_bytes=None, media=MediaAccess(), limits=Limits()),
        )  # fmt: skip
        assert served[1] == (
            dict(model="some/model", dtype="float32", max_length=300, row_tokens=512, prompt="vllm",
                 chat_template="x.jinja", instruct="judge", revision="v2", compile_cache="x"),
            dict(host="::1", port=8001, served_model_name="bge", api_keys=["one", "two"], max_documents=7,
                 max_body_bytes=1000,
                 media=MediaAccess(remote=False, domains=("a.example", "b.example"), private=True, folder=Path("/"),
                                   max_items=3, max_bytes=1000, total_s=2.5),
                 limits=Limits(max_bytes=1000, max_pixels=5000, max_seconds=60.0, seconds=4.0)),
        )  # fmt: skip
        run("serve", *NO_CACHE)
        assert served[2][0]["compile_cache"] is None

    @pytest.mark.parametrize("line", ["m", "--model-path m", "--model m", "--model-id m", "m --model m --model-id m"])
    def test_a_model_by_any_name(self, run: Run, served: list[Any], line: str) -> None:
        assert run("serve", *line.split()) == (0, "", "")
        assert served[0][0]["model"] == "m"

    @pytest.mark.parametrize(
        "line, message",
        [
            ("a --model-path b", "2 models named, a and b; name one"),
            ("--model a --model-id b", "2 models named, a and b; name one"),
            ("--api-key=", "--api-key is empty; give a key"),
            ("--allowed-media-path nowhere", "--allowed-media-path nowhere is no folder; name one"),
        ],
    )
    def test_contradictions(self, run: Run, served: list[Any], line: str, message: str) -> None:
        assert message in complaint(run("serve", *line.split()))
        assert served == []

    def test_embedding_models_alone_take_is_embedding(
        self, run: Run, served: list[Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """SGLang's named pitfall."""
        monkeypatch.setattr(Loaded, "name", "Qwen/Qwen3-Reranker-0.6B", raising=False)
        monkeypatch.setattr(Loaded, "takes_instruct", True)
        line = complaint(run("serve", "--model-path", "Qwen/Qwen3-Reranker-0.6B", "--is-embedding"))
        assert "Qwen/Qwen3-Reranker-0.6B answers yes or no to a prompt. Launch it without --is-embedding" in line
        assert served == []

    @pytest.mark.parametrize("name", ["qwen3_reranker.jinja", "qwen3_vl_reranker.jinja"])
    def test_a_missing_template_is_an_error_unless_its_prompt_is_built_in(
        self, run: Run, served: list[Any], name: str
    ) -> None:
        file = f"examples/chat_template/{name}"
        status, out, err = run("serve", "m", "--chat-template", file)
        assert (status, out) == (0, "")
        assert err == (
            f"jaxrank: there is no {file}; it is not needed, since the publisher's own prompt is built in and used\n"
        )
        assert served[0][0]["chat_template"] is None
        run("serve", "m", "--chat-template", "mine.jinja")
        assert served[1][0]["chat_template"] == "mine.jinja"

    def test_ports_that_cannot_be_had(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cli, "load", lambda *_: SimpleNamespace(name="m", takes_instruct=False))
        out_of_range = complaint(run("serve", "--port", 70000))
        assert "cannot listen on 127.0.0.1 port 70000: bind(): port must be 0-65535" in out_of_range
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            line = complaint(run("serve", "--port", port))
        assert f"cannot listen on 127.0.0.1 port {port}: Address already in use. Choose another port" in line
