"""The `jaxrank` command: serve, convert, rerank. Heavy imports wait until a subcommand needs them."""

from __future__ import annotations

import argparse
import bisect
import contextlib
import itertools
import json
import logging
import os
import re
import shutil
import sys
import threading
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from jaxrank.version import __version__

IGNORED_FLAGS: dict[str, int] = {
    "--attention-backend": 1,
    "--chunked-prefill-size": 1,
    "--disable-radix-cache": 0,
    "--is-embedding": 0,
    "--mem-fraction-static": 1,
    "--skip-server-warmup": 0,
    "--trust-remote-code": 0,
}
"""Flags of SGLang's launch lines that mean nothing here, and how many values each takes."""


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(prog="jaxrank", description="Rerank documents with JAX.")
    top.add_argument("--version", action="version", version=f"jaxrank {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _serve_arguments(commands.add_parser("serve", help="answer POST /v1/rerank over HTTP"))
    _convert_arguments(commands.add_parser("convert", help="write a folder that loads fast"))
    _rerank_arguments(commands.add_parser("rerank", help="rank documents from a file or standard input"))
    return top


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments. Before Python 3.13, argparse takes an optional FILE only where it follows QUERY at once."""
    top = parser()
    arguments, rest = top.parse_known_args(argv)
    if rest and getattr(arguments, "file", None) == "-" and not rest[0].startswith("-"):
        arguments.file = rest.pop(0)
    if rest:
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    return arguments


def _model_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--dtype", choices=["auto", "bfloat16", "float32"], default="auto",
                         help="of matrices and activations; auto is bfloat16")  # fmt: skip
    command.add_argument("--max-model-len", "--context-length", type=int, metavar="TOKENS", dest="max_length",
                         help="longest pair of query and document; default: what the model can")  # fmt: skip
    command.add_argument("--row-tokens", type=int, metavar="TOKENS", help="tokens scored together in one packed row")
    command.add_argument("--prompt", choices=["official", "sglang", "vllm", "none"],
                         help="how models that read a prompt are asked; default: the publisher's way")  # fmt: skip
    command.add_argument("--chat-template", metavar="FILE", help="a Jinja file of one's own instead of --prompt")
    command.add_argument("--instruct", metavar="TEXT", help="what is to be judged, where a request does not say it")
    command.add_argument("--revision", help="branch, tag or commit of a Hugging Face id")
    command.add_argument("--compile-cache", metavar="FOLDER",
                         help='where compiled programs are kept for the next start; "none" for nowhere')  # fmt: skip


def _serve_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", nargs="?", help="Hugging Face id or folder; default: the built-in model")
    command.add_argument("--model-path", "--model", "--model-id", dest="model_flag", metavar="MODEL",
                         action="append", default=[], help="the same, as other servers name it")  # fmt: skip
    command.add_argument("--host", default="127.0.0.1")
    command.add_argument("--port", type=int, default=30000)
    command.add_argument("--api-key", action="append", default=[], metavar="KEY",
                         help="require `Authorization: Bearer KEY`; may be given several times")  # fmt: skip
    command.add_argument("--served-model-name", metavar="NAME", help="name that /v1/models answers")
    command.add_argument("--max-documents", type=int, default=1000, metavar="N", help="documents in one request")
    command.add_argument("--max-body-bytes", type=int, metavar="N",
                         help="size of one request; default: 8 MB, or 40 MB for models that see images")  # fmt: skip
    _model_arguments(command)
    _media_arguments(command.add_argument_group("images and videos, for models that see"))
    ignored = command.add_argument_group("accepted from SGLang's launch lines, without meaning here")
    for flag, values in IGNORED_FLAGS.items():
        if values:
            ignored.add_argument(flag, metavar="X")
        else:
            ignored.add_argument(flag, action="store_true")


def _media_arguments(group: Any) -> None:
    group.add_argument("--no-remote-media", action="store_true", help="fetch nothing from the web")
    group.add_argument("--allowed-media-domains", metavar="A,B", help="fetch from these hosts alone, exactly")
    group.add_argument("--allow-private-media", action="store_true",
                       help="fetch also from addresses that are not on the public internet")  # fmt: skip
    group.add_argument("--allowed-media-path", metavar="DIR", help="let requests name files in this folder")
    group.add_argument("--max-media", type=int, default=256, metavar="N", help="images and videos in one request")
    group.add_argument("--max-media-bytes", type=int, default=20_000_000, metavar="N", help="size of one of them")
    group.add_argument("--media-timeout", type=float, default=20.0, metavar="SECONDS", help="to fetch one of them")
    group.add_argument("--max-image-pixels", type=int, default=40_000_000, metavar="N", help="before it is shrunk")
    group.add_argument("--max-video-seconds", type=float, default=600.0, metavar="SECONDS", help="length of a video")
    group.add_argument("--media-decode-seconds", type=float, default=20.0, metavar="SECONDS", help="to decode one")


def media_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Where media may come from and what of them is refused, as create_app takes it."""
    from jaxrank.errors import RequestError
    from jaxrank.media import Limits
    from jaxrank.server.fetch import MediaAccess

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
        total_s=arguments.media_timeout,
    )
    limits = Limits(
        max_bytes=arguments.max_media_bytes,
        max_pixels=arguments.max_image_pixels,
        max_seconds=arguments.max_video_seconds,
        seconds=arguments.media_decode_seconds,
    )
    return {"media": access, "limits": limits}


def _convert_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", help="Hugging Face id or folder of a published checkpoint")
    command.add_argument("folder", help="folder to write")
    command.add_argument("--dtype", choices=["auto", "bfloat16", "float32"], default="auto",
                         help="of the matrices written; auto keeps the source's")  # fmt: skip
    command.add_argument("--revision", help="branch, tag or commit of a Hugging Face id")
    command.add_argument("--overwrite", action="store_true", help="replace the folder if it exists")
    command.add_argument("--no-progress", action="store_true", help="no progress bar")


def _rerank_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("query")
    command.add_argument("file", nargs="?", default="-", help="one document a line; default: standard input")
    command.add_argument("--model", help="Hugging Face id or folder; default: the built-in model")
    command.add_argument("--top-n", type=int, metavar="N", help="only the best N")
    command.add_argument("--format", choices=["auto", "table", "jsonl"], default="auto",
                         help="auto: a table on a terminal, JSON lines in a pipe")  # fmt: skip
    command.add_argument("--no-progress", action="store_true", help="no progress bar")
    _model_arguments(command)


def load(arguments: argparse.Namespace, model: str | None) -> Any:
    """The Reranker that the arguments ask for."""
    import jax

    from jaxrank.reranker import DEFAULT_CACHE, Reranker

    # set before JAX first computes: on CPU, worker threads would keep what the last call on them took, 100 MB and more
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    cache = {None: DEFAULT_CACHE, "none": None}.get(arguments.compile_cache, arguments.compile_cache)
    return Reranker.from_pretrained(
        model,
        dtype="bfloat16" if arguments.dtype == "auto" else arguments.dtype,
        max_length=arguments.max_length,
        row_tokens=arguments.row_tokens,
        prompt=arguments.prompt,
        chat_template=chat_template(arguments),
        instruct=arguments.instruct,
        revision=arguments.revision,
        compile_cache=cache,
    )


PUBLISHED_TEMPLATES = ("qwen3_reranker.jinja", "qwen3_vl_reranker.jinja")
"""Files of SGLang's examples whose prompt is built in."""


def chat_template(arguments: argparse.Namespace) -> str | None:
    """The file of --chat-template; None for one of SGLang's launch lines that is not there, since it is not needed."""
    file = arguments.chat_template
    if file is None or Path(file).exists() or Path(file).name not in PUBLISHED_TEMPLATES:
        return file
    print(
        f"jaxrank: there is no {file}; it is not needed, since the publisher's own prompt is built in and used",
        file=sys.stderr,
    )
    return None


def serve(arguments: argparse.Namespace) -> int:
    from jaxrank.errors import RequestError

    models = list(dict.fromkeys(name for name in (arguments.model, *arguments.model_flag) if name))
    if len(models) > 1:
        raise RequestError(f"{len(models)} models named, {' and '.join(models)}; name one")
    if not all(arguments.api_key):
        raise RequestError("--api-key is empty; give a key of at least one character, or leave the flag out")
    from jaxrank import server

    media = media_settings(arguments)
    reranker = load(arguments, models[0] if models else None)
    if arguments.is_embedding and reranker.takes_instruct:
        raise RequestError(
            f"--is-embedding is for cross-encoders such as BGE; {reranker.name} answers yes or no to a prompt. Launch "
            "it without --is-embedding"
        )
    for flag in IGNORED_FLAGS:
        if getattr(arguments, flag[2:].replace("-", "_")) not in (None, False):
            print(f"jaxrank: {flag} is accepted for SGLang's launch lines and means nothing here", file=sys.stderr)
    return server.serve(
        reranker,
        host=arguments.host,
        port=arguments.port,
        served_model_name=arguments.served_model_name,
        api_keys=arguments.api_key,
        max_documents=arguments.max_documents,
        max_body_bytes=arguments.max_body_bytes,
        **media,
    )


def convert(arguments: argparse.Namespace) -> int:
    from jaxrank import convert as converter

    dtype = None if arguments.dtype == "auto" else arguments.dtype
    source = converter.find(arguments.source, arguments.revision, allow_torch=True)
    with quiet_threads():
        converter.convert(
            source, Path(arguments.folder), dtype=dtype, progress=not arguments.no_progress,
            overwrite=arguments.overwrite,
        )  # fmt: skip
    print(f"wrote {arguments.folder}")
    return 0


@contextlib.contextmanager
def quiet_threads() -> Iterator[None]:
    """Where writing fails, Orbax's and TensorStore's threads print pages beside our one line. After a failure they stay
    quiet: some are late.
    """
    hooks = sys.unraisablehook, threading.excepthook
    loggers = [(logger, logger.level) for logger in map(logging.getLogger, ("absl", "asyncio"))]
    sys.unraisablehook = threading.excepthook = lambda *_: None
    for logger, _ in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    yield
    sys.unraisablehook, threading.excepthook = hooks
    for logger, level in loggers:
        logger.setLevel(level)


def rerank(arguments: argparse.Namespace) -> int:
    from jaxrank.errors import RequestError

    source = "standard input" if arguments.file == "-" else arguments.file
    try:
        content = sys.stdin.buffer.read() if arguments.file == "-" else Path(arguments.file).read_bytes()
        text = content.decode("utf-8")
    except OSError as error:
        raise RequestError(f"{source}: {error.strerror}; give a text file with one document a line") from None
    except UnicodeDecodeError as error:
        raise RequestError(f"{source}: not UTF-8 text at byte {error.start}; give UTF-8, one document a line") from None
    # not splitlines(), which would also cut documents at form feeds and Unicode's separators
    documents = [line for line in re.split(r"\r\n|\n|\r", text) if line.strip()]
    if not documents:
        raise RequestError(f"{source}: no documents; one a line is read, blank lines are skipped")
    ranked = load(arguments, arguments.model).rank(
        arguments.query, documents, top_n=arguments.top_n, progress=not arguments.no_progress
    )
    as_table = arguments.format == "table" or (arguments.format == "auto" and sys.stdout.isatty())
    (write_table if as_table else write_jsonl)(ranked, sys.stdout)
    return 0


def write_jsonl(ranked: Sequence[Any], out: TextIO) -> None:
    """One JSON object a line: index, score, document."""
    for item in ranked:
        print(json.dumps(asdict(item), ensure_ascii=False), file=out)


def write_table(ranked: Sequence[Any], out: TextIO) -> None:
    """Rank, score, the document's place in the input (blank lines not counted), and as much of it as fits the line."""
    width = max(shutil.get_terminal_size().columns - 24, 20)
    print(f"{'rank':>4}  {'score':>7}  {'index':>6}  document", file=out)
    for rank, item in enumerate(ranked, 1):
        print(f"{rank:>4}  {item.score:>7.4f}  {item.index:>6}  {shorten(item.document, width)}", file=out)


def shorten(text: str, width: int) -> str:
    """`text` on one line of `width` columns, of which wide characters take two, with spaces for control characters."""
    text = " ".join("".join(" " if unicodedata.category(c) == "Cc" else c for c in text).split())
    ends = list(itertools.accumulate(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text))
    if not ends or ends[-1] <= width:
        return text
    return text[: bisect.bisect_right(ends, width - 1)] + "…"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status. 1 where the work failed, 2 where the command line is wrong."""
    arguments = parse(argv)
    from jaxrank.errors import JaxrankError

    try:
        status = {"serve": serve, "convert": convert, "rerank": rerank}[arguments.command](arguments)
        print(end="", flush=True)
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader went away, as `head` does
        drop_output()
        return 0
    except (JaxrankError, OSError) as error:
        print(f"jaxrank: error: {error}", file=sys.stderr)
        drop_output()
        return 1


def drop_output() -> None:
    """If standard output is broken, let what is left to write go nowhere; Python would complain about it at its end."""
    try:
        print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
