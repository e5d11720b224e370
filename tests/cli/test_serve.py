"""`jaxrank serve`: flags, launch lines of SGLang, ports."""

from __future__ import annotations

import math
import shlex
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jaxrank import cli
from jaxrank.media.images import Limits
from jaxrank.reranker import DEFAULT_CACHE
from jaxrank.server.dialects.resolve import DIALECTS
from jaxrank.server.media.fetch import MediaAccess
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
    --max-image-pixels 5000 --max-video-seconds 60 --media-decode-seconds 4
    --max-media-request-bytes 5000 --media-workers 3 --image-min-pixels 2048 --image-max-pixels 4096 --video-fps 0.5
    --video-max-frames 32 --video-max-pixels 500000 --dp 2 --tensor-parallel-size 4 --open-metrics
    --cors-origins https://a.example,http://b:81 --max-header-bytes 2000 --max-connections 20 --encode-threads 6
    --max-queue-requests 30
    --max-queue-tokens 4000 --max-queue-bytes 5000 --request-timeout 1.5 --body-timeout 2.5 --shutdown-grace 0
    --max-queue-seconds 3.5
    --log-format json --otlp-endpoint http://c --dialect cohere --auto-truncate false --load-format pt
    --quantization int8 --long-document window --max-windows 77"""


class Loaded(dict[str, Any]):
    """What from_pretrained was told."""

    takes_instruct = False


class TestServe:
    @pytest.fixture
    def served(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """What would be loaded and how it would be served, instead of doing it."""
        calls: list[tuple[dict[str, Any], dict[str, Any]]] = []

        def load(model: str | None, *, progress: Any, stages: Any, **settings: Any) -> Loaded:
            assert callable(progress)
            assert list(stages) == ["imports"]
            return Loaded(model=model, **settings)

        monkeypatch.setattr("jaxrank.reranker.Reranker.from_pretrained", staticmethod(load))
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
            f"jaxrank: {flag} is accepted for other servers' launch lines and means nothing here"
            for flag in meaningless
        ]

    def test_every_flag_reaches_its_place(self, run: Run, served: list[Any], tmp_path: Path) -> None:
        keys = tmp_path / "keys"
        keys.touch(0o600)
        keys.write_text("three\n")
        assert run("serve") == run("serve", *ALL_FLAGS.split(), "--api-key-file", keys) == (0, "", "")
        assert served[0] == (
            dict(model=None, dtype="bfloat16", quantization=None, max_length=None, row_tokens=None, prompt=None,
                 chat_template=None,
                 instruct=None, preprocessing=None, revision=None, load_format="auto", weights=True,
                 compile_cache=DEFAULT_CACHE, data_parallel=None, tensor_parallel=None),
            dict(host="127.0.0.1", port=30000, served_model_name=None, api_keys=[], open_metrics=False, cors_origins=[],
                 dialect="auto", truncate=True,
                 long_document="truncate", max_windows=1024, max_documents=1000, max_body_bytes=None,
                 max_header_bytes=32768, max_connections=1000, max_queue_requests=512, max_queue_tokens=1048576,
                 max_queue_bytes=512_000_000, max_queue_s=math.inf, encode_threads=None, request_timeout_s=60.0,
                 body_timeout_s=60.0, shutdown_grace_s=30.0, log_format="text", otlp_endpoint=None,
                 media=MediaAccess(), limits=Limits(), media_workers=2),
        )  # fmt: skip
        assert served[1] == (
            dict(model="some/model", dtype="float32", quantization="int8", max_length=300, row_tokens=512,
                 prompt="vllm", chat_template="x.jinja", instruct="judge",
                 preprocessing=dict(min_pixels=2048, max_pixels=4096, fps=0.5, max_frames=32, video_pixels=500000),
                 revision="v2", load_format="torch", weights=True, compile_cache="x", data_parallel=2,
                 tensor_parallel=4),
            dict(host="::1", port=8001, served_model_name="bge", api_keys=["one", "two", "three"],
                 open_metrics=True, cors_origins=["https://a.example", "http://b:81"], dialect="cohere", truncate=False,
                 long_document="window", max_windows=77, max_documents=7,
                 max_body_bytes=1000, max_header_bytes=2000, max_connections=20, max_queue_requests=30,
                 max_queue_tokens=4000, max_queue_bytes=5000, max_queue_s=3.5, encode_threads=6, request_timeout_s=1.5,
                 body_timeout_s=2.5,
                 shutdown_grace_s=0.0, log_format="json", otlp_endpoint="http://c",
                 media=MediaAccess(remote=False, domains=("a.example", "b.example"), private=True, folder=Path("/"),
                                   max_items=3, max_bytes=1000, max_request_bytes=5000, total_s=2.5),
                 limits=Limits(max_bytes=1000, max_pixels=5000, max_seconds=60.0, seconds=4.0),
                 media_workers=3),
        )  # fmt: skip
        run("serve", *NO_CACHE)
        assert served[2][0]["compile_cache"] is None

    @pytest.mark.parametrize(
        "line, loaded, served_as, meaningless",
        [
            (  # vLLM-Ascend's documentation of Qwen3-VL-Reranker
                """Qwen/Qwen3-VL-Reranker-8B \\
    --runner pooling \\
    --max-model-len 4096 \\
    --hf_overrides '{"architectures": ["Qwen3VLForSequenceClassification"],"classifier_from_token": ["no", "yes"]}' \\
    --chat-template ./qwen3_vl_reranker.jinja""",
                dict(model="Qwen/Qwen3-VL-Reranker-8B", max_length=4096, chat_template=None),
                dict(),
                ["--hf-overrides", "--runner"],
            ),
            (
                "m --dtype half --tensor-parallel-size 2 --gpu-memory-utilization=0.9 --max-num-seqs 64 "
                "--max-num-batched-tokens 8192 --allowed-local-media-path / --served-model-name n --enforce-eager "
                "--max-num-queued-reqs 5 --max-num-queued-tokens 6 --limit-mm-per-prompt '{\"image\": 1}' "
                "--mm-processor-kwargs={} --data_parallel_size 1 --root-path /x --media-io-kwargs {}",
                dict(dtype="bfloat16", data_parallel=1, tensor_parallel=2),
                dict(max_queue_requests=5, max_queue_tokens=6, media=MediaAccess(folder=Path("/"))),
                ["--enforce-eager", "--gpu-memory-utilization", "--limit-mm-per-prompt",
                 "--max-num-batched-tokens", "--max-num-seqs", "--media-io-kwargs", "--mm-processor-kwargs",
                 "--root-path"],
            ),
            (
                "--model-id m --revision r --dtype float16 --max-concurrent-requests 77 --max-batch-tokens 16384 "
                "--max-client-batch-size 32 --auto-truncate --payload-limit 2000000 --api-key k --hostname 0.0.0.0 "
                "--port 3000 --cors-allow-origin https://example.com --tokenization-workers 4",
                dict(model="m", revision="r", dtype="bfloat16"),
                dict(host="0.0.0.0", port=3000, max_queue_requests=77, max_documents=32, max_body_bytes=2000000,
                     truncate=True, api_keys=["k"], cors_origins=["https://example.com"], encode_threads=4),
                ["--max-batch-tokens"],
            ),
            (
                "--model-path m --context-length 512 --tp 2 --dp 1 --max-queued-requests 3 --allow-auto-truncate "
                "--enable-metrics --mm-process-config {} --limit-mm-data-per-request {} --dtype float",
                dict(max_length=512, dtype="float32", data_parallel=1, tensor_parallel=2),
                dict(max_queue_requests=3, truncate=True),
                ["--enable-metrics", "--limit-mm-data-per-request", "--mm-process-config"],
            ),
        ],
        ids=["seed", "vllm", "tei", "sglang"],
    )  # fmt: skip
    def test_launch_lines_of_others(
        self, run: Run, served: list[Any], line: str, loaded: dict[str, Any], served_as: dict[str, Any],
        meaningless: list[str],
    ) -> None:  # fmt: skip
        status, out, err = run("serve", *shlex.split(line.replace("\\\n", " ")))
        assert (status, out) == (0, "")
        got, how = served[0]
        assert {name: got[name] for name in loaded} == loaded
        assert {name: how[name] for name in served_as} == served_as
        notices = [line.split()[1] for line in err.splitlines() if "launch lines and means nothing here" in line]
        assert notices == meaningless

    def test_dialects_are_those_of_the_server(self) -> None:
        assert tuple(DIALECTS) == cli.serve.DIALECTS

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
            ("--media-workers 0", "--media-workers is 0; it must be at least 1"),
            (
                "--api-key-file nowhere",
                "--api-key-file nowhere: No such file or directory; name a file with one key a line",
            ),
            ("--api-key-file=", "Is a directory; name a file with one key a line"),
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
        monkeypatch.setattr("jaxrank.cli.model.load", lambda *_, **__: SimpleNamespace(name="m", takes_instruct=False))
        out_of_range = complaint(run("serve", "--port", 70000))
        assert "cannot listen on 127.0.0.1 port 70000: bind(): port must be 0-65535" in out_of_range
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            line = complaint(run("serve", "--port", port))
        assert f"cannot listen on 127.0.0.1 port {port}: Address already in use. Choose another port" in line
