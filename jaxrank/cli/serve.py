"""`jaxrank serve`: answers POST /v1/rerank over HTTP."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

from jaxrank.cli import model
from jaxrank.cli.model import SIZE_FLAGS, long_document_argument, model_arguments
from jaxrank.cli.numbers import count, seconds, time_span

IGNORED_FLAGS: dict[str, int] = {
    "--attention-backend": 1,
    "--chunked-prefill-size": 1,
    "--disable-radix-cache": 0,
    "--enable-metrics": 0,
    "--enforce-eager": 0,
    "--gpu-memory-utilization": 1,
    "--hf-overrides": 1,
    "--is-embedding": 0,
    "--limit-mm-data-per-request": 1,
    "--limit-mm-per-prompt": 1,
    "--max-batch-requests": 1,
    "--max-batch-tokens": 1,
    "--max-num-batched-tokens": 1,
    "--max-num-seqs": 1,
    "--media-io-kwargs": 1,
    "--mem-fraction-static": 1,
    "--mm-process-config": 1,
    "--mm-processor-kwargs": 1,
    "--pooling": 1,
    "--root-path": 1,
    "--runner": 1,
    "--skip-server-warmup": 0,
    "--task": 1,
    "--trust-remote-code": 0,
}
"""Flags of the launch lines of SGLang, vLLM and TEI that have no effect here, and how many values each takes."""

DIALECTS = ("sglang", "vllm", "cohere", "jina", "voyage", "tei", "infinity", "llamacpp")
"""The dialects of jaxrank.server.dialects, which is too heavy to import here."""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the command's flags to a parser."""
    command.add_argument("model", nargs="?", help="Hugging Face id or folder; default: the built-in model")
    command.add_argument("--model-path", "--model", "--model-id", dest="model_flag", metavar="MODEL",
                         action="append", default=[], help="the model, under the flags of other servers")  # fmt: skip
    command.add_argument("--host", "--hostname", default="127.0.0.1")
    command.add_argument("--port", type=int, default=30000)
    command.add_argument("--served-model-name", metavar="NAME", help="name of the model in answers, such as /v1/models")
    command.add_argument("--dialect", choices=["auto", *DIALECTS], default="auto",
                         help="the server whose clients ask, if neither path nor header names it")  # fmt: skip
    command.add_argument("--auto-truncate", nargs="?", choices=["true", "false"], const="true", default="true",
                         help="cut pairs that are too long, if a request does not say; false refuses them")  # fmt: skip
    command.add_argument("--allow-auto-truncate", dest="auto_truncate", action="store_const", const="true",
                         help="the same as --auto-truncate, under SGLang's name")  # fmt: skip
    long_document_argument(command, ", if a request does not say")
    model_arguments(command)
    _access_arguments(command.add_argument_group("who may ask"))
    _limit_arguments(command.add_argument_group("limits"))
    _insight_arguments(command.add_argument_group("logs, metrics, traces"))
    _media_arguments(command.add_argument_group("images and videos, for models that see"))
    ignored = command.add_argument_group("accepted from other servers' launch lines, without meaning here")
    for flag, values in IGNORED_FLAGS.items():
        if values:
            ignored.add_argument(flag, metavar="X")
        else:
            ignored.add_argument(flag, action="store_true")


def _access_arguments(group: Any) -> None:
    group.add_argument("--api-key", action="append", default=[], metavar="KEY",
                       help="require `Authorization: Bearer KEY`; may be given several times")  # fmt: skip
    group.add_argument("--api-key-file", metavar="FILE",
                       help="the same for every line of a file, except lines that begin with #")  # fmt: skip
    group.add_argument("--open-metrics", action="store_true", help="answer /metrics without a key")
    group.add_argument("--cors-origins", "--cors-allow-origin", metavar="A,B",
                       help="let web pages of these origins send requests, such as https://a.example")  # fmt: skip


def _limit_arguments(group: Any) -> None:
    group.add_argument(
        "--max-documents",
        "--max-client-batch-size",
        type=count,
        default=1000,
        metavar="N",
        help="most documents in one request",
    )
    group.add_argument("--max-windows", type=count, default=1024, metavar="N",
                       help="most windows in one request, for documents that do not fit and are split")  # fmt: skip
    group.add_argument("--max-body-bytes", "--payload-limit", type=count, metavar="N",
                       help="most bytes of a request; default: 8 MB, or 40 MB for models that see images")  # fmt: skip
    group.add_argument(
        "--max-header-bytes",
        type=count,
        default=32_768,
        metavar="N",
        help="most bytes of a request's address and headers",
    )
    group.add_argument(
        "--max-connections", type=count, default=1000, metavar="N", help="most connections at the same time"
    )
    group.add_argument("--encode-threads", "--tokenization-workers", type=count, metavar="N",
                       help="threads that tokenise; default: the cores minus one, from 2 to 8")  # fmt: skip
    group.add_argument("--max-queue-requests", "--max-queued-requests", "--max-concurrent-requests",
                       "--max-num-queued-reqs", type=count, default=512, metavar="N",
                       help="most requests in the queue; more are refused, with Retry-After")  # fmt: skip
    group.add_argument(
        "--max-queue-tokens",
        "--max-num-queued-tokens",
        type=count,
        default=2**20,
        metavar="N",
        help="the same, in tokens",
    )
    group.add_argument("--max-queue-bytes", type=count, default=512_000_000, metavar="N", help="the same, in bytes")
    group.add_argument("--max-queue-seconds", type=time_span, default=math.inf, metavar="SECONDS",
                       help="the same, in seconds of work at the measured speed; default: no limit")  # fmt: skip
    group.add_argument("--request-timeout", type=time_span, default=60.0, metavar="SECONDS",
                       help="most seconds from a request's arrival to its answer")  # fmt: skip
    group.add_argument(
        "--body-timeout", type=time_span, default=60.0, metavar="SECONDS", help="most seconds for a request to arrive"
    )
    group.add_argument("--shutdown-grace", type=seconds, default=30.0, metavar="SECONDS",
                       help="seconds to finish the accepted requests when the server stops")  # fmt: skip


def _insight_arguments(group: Any) -> None:
    group.add_argument("--log-format", choices=["text", "json"], default="text")
    group.add_argument("--otlp-endpoint", metavar="URL",
                       help="send traces here, such as http://host:4318/v1/traces; needs jaxrank[otel]")  # fmt: skip


def _media_arguments(group: Any) -> None:
    for flag, (name, said) in SIZE_FLAGS.items():
        group.add_argument(flag, type=float if name == "fps" else int, metavar="N", help=said)
    group.add_argument("--no-remote-media", action="store_true", help="fetch nothing from the web")
    group.add_argument("--allowed-media-domains", metavar="A,B", help="fetch only from these hosts, exactly")
    group.add_argument("--allow-private-media", action="store_true",
                       help="fetch also from addresses that are not on the public internet")  # fmt: skip
    group.add_argument("--allowed-media-path", "--allowed-local-media-path", metavar="DIR",
                       help="let requests name files in this folder")  # fmt: skip
    group.add_argument("--max-media", type=int, default=256, metavar="N", help="most images and videos in one request")
    group.add_argument(
        "--max-media-bytes", type=int, default=20_000_000, metavar="N", help="most bytes of one image or video"
    )
    group.add_argument("--max-media-request-bytes", type=int, default=200_000_000, metavar="N",
                       help="most bytes of all images and videos in one request")  # fmt: skip
    group.add_argument(
        "--media-workers", type=int, default=2, metavar="N", help="processes that decode images and videos"
    )
    group.add_argument(
        "--media-timeout", type=float, default=20.0, metavar="SECONDS", help="most seconds to fetch one image or video"
    )
    group.add_argument(
        "--max-image-pixels",
        type=int,
        default=40_000_000,
        metavar="N",
        help="most pixels of an image, before it is shrunk",
    )
    group.add_argument(
        "--max-video-seconds", type=float, default=600.0, metavar="SECONDS", help="most seconds of a video's length"
    )
    group.add_argument(
        "--media-decode-seconds",
        type=float,
        default=20.0,
        metavar="SECONDS",
        help="most seconds to decode one image or video",
    )


def media_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of create_app about media: where they may come from, and what of them is refused.

    Raises:
        RequestError: A flag is not valid.
    """
    from jaxrank.errors import RequestError
    from jaxrank.media.images import Limits
    from jaxrank.server.media.fetch import MediaAccess

    folder = arguments.allowed_media_path
    if folder is not None and not Path(folder).is_dir():
        raise RequestError(f"--allowed-media-path {folder} is no folder; name one, or leave the flag out")
    domains = tuple(name.strip().lower() for name in (arguments.allowed_media_domains or "").split(",") if name.strip())
    access = MediaAccess(
        remote=not arguments.no_remote_media,
        domains=domains,
        private=arguments.allow_private_media,
        folder=None if folder is None else Path(folder),
        max_items=arguments.max_media,
        max_bytes=arguments.max_media_bytes,
        max_request_bytes=arguments.max_media_request_bytes,
        total_s=arguments.media_timeout,
    )
    limits = Limits(
        max_bytes=arguments.max_media_bytes,
        max_pixels=arguments.max_image_pixels,
        max_seconds=arguments.max_video_seconds,
        seconds=arguments.media_decode_seconds,
    )
    if arguments.media_workers < 1:
        raise RequestError(f"--media-workers is {arguments.media_workers}; it must be at least 1")
    return {"media": access, "limits": limits, "media_workers": arguments.media_workers}


def app_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of create_app that the flags set.

    Raises:
        RequestError: A flag is not valid.
    """
    from jaxrank.server.http.access import read_keys

    keys = [*arguments.api_key, *([] if arguments.api_key_file is None else read_keys(Path(arguments.api_key_file)))]
    return dict(
        served_model_name=arguments.served_model_name,
        api_keys=keys,
        open_metrics=arguments.open_metrics,
        cors_origins=[one.strip() for one in (arguments.cors_origins or "").split(",") if one.strip()],
        dialect=arguments.dialect,
        truncate=arguments.auto_truncate == "true",
        long_document=arguments.long_document,
        max_documents=arguments.max_documents,
        max_windows=arguments.max_windows,
        max_body_bytes=arguments.max_body_bytes,
        max_header_bytes=arguments.max_header_bytes,
        max_queue_requests=arguments.max_queue_requests,
        max_queue_tokens=arguments.max_queue_tokens,
        max_queue_bytes=arguments.max_queue_bytes,
        max_queue_s=arguments.max_queue_seconds,
        encode_threads=arguments.encode_threads,
        request_timeout_s=arguments.request_timeout,
        body_timeout_s=arguments.body_timeout,
        otlp_endpoint=arguments.otlp_endpoint,
        **media_settings(arguments),
    )


def load(arguments: argparse.Namespace) -> Any:
    """Return the Reranker that the flags describe. Notices about flags without effect go to standard error.

    Raises:
        RequestError: The flags name several models, or the model cannot be loaded with them.
    """
    from jaxrank.errors import RequestError

    models = list(dict.fromkeys(name for name in (arguments.model, *arguments.model_flag) if name))
    if len(models) > 1:
        raise RequestError(f"{len(models)} models named, {' and '.join(models)}; name one")
    reranker = model.load(arguments, models[0] if models else None)
    if arguments.is_embedding and reranker.takes_instruct:
        raise RequestError(
            f"--is-embedding is for cross-encoders such as BGE; {reranker.name} answers yes or no to a prompt. Launch "
            "it without --is-embedding"
        )
    for flag in IGNORED_FLAGS:
        if getattr(arguments, flag[2:].replace("-", "_")) not in (None, False):
            print(
                f"jaxrank: {flag} is accepted for other servers' launch lines and means nothing here", file=sys.stderr
            )
    return reranker


def run(arguments: argparse.Namespace) -> int:
    """Run the server until a signal ends it, and return its exit status.

    Raises:
        RequestError: A flag is not valid.
        SystemExit: The port is not available, or the model cannot be warmed up, or scoring stopped for good.
    """
    from jaxrank.errors import RequestError

    if not all(arguments.api_key):
        raise RequestError("--api-key is empty; give a key of at least one character, or leave the flag out")
    from jaxrank import server
    from jaxrank.server.http.access import hide_from_process_list

    hide_from_process_list(arguments.api_key)
    settings = app_settings(arguments)  # first, so that no model is loaded for flags that are not valid
    return server.serve(
        load(arguments),
        host=arguments.host,
        port=arguments.port,
        max_connections=arguments.max_connections,
        shutdown_grace_s=arguments.shutdown_grace,
        log_format=arguments.log_format,
        **settings,
    )
