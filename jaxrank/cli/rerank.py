"""`jaxrank rerank`: ranks documents of standard input or a file, the requests of a file, or the candidates of a run."""

from __future__ import annotations

import argparse
import bisect
import itertools
import json
import re
import shutil
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from jaxrank.cli import model
from jaxrank.cli.model import long_document_argument, model_arguments
from jaxrank.cli.numbers import count
from jaxrank.version import __version__

if TYPE_CHECKING:
    from jaxrank.offline.rows import BadRows
    from jaxrank.offline.sources import Source


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the command's flags to a parser."""
    command.add_argument("query", nargs="?", help="the query, without --requests, --run and --beir")
    command.add_argument("file", nargs="?", default="-", help="one document a line; default: standard input")
    command.add_argument("--model", help="Hugging Face id or folder; default: the built-in model")
    command.add_argument(
        "--top-n", type=int, metavar="N", help="write only the best N, for a query on the command line"
    )
    command.add_argument("--format", choices=["auto", "table", "jsonl", "trec"], default="auto",
                         help="auto: a run for a run; else a table on a terminal, JSON lines elsewhere")  # fmt: skip
    command.add_argument("--no-progress", action="store_true", help="show no progress bar")
    files = command.add_argument_group("files", "After an interruption, the same command continues where it stopped.")
    files.add_argument("--requests", metavar="FILE", help='one {"query": "...", "documents": [...]} a line')
    files.add_argument("--run", metavar="FILE", help="candidates as a TREC run, with --corpus and --queries or --beir")
    files.add_argument("--corpus", metavar="FILE", help='one {"_id": "...", "title": "...", "text": "..."} a line')
    files.add_argument("--queries", metavar="FILE", help='one {"_id": "...", "text": "..."} a line, or id, tab, text')
    files.add_argument("--beir", metavar="FOLDER",
                       help="corpus.jsonl, queries.jsonl and qrels/; without --run, BM25 finds candidates")  # fmt: skip
    files.add_argument("--split", default="test", help="split of --beir whose judged queries are ranked; default: test")
    files.add_argument("--output", metavar="FILE", help="file for the ranking")
    files.add_argument("--depth", type=count, default=100, metavar="N", help="candidates of a query; default: 100")
    files.add_argument(
        "--batch-tokens",
        type=count,
        metavar="N",
        help="tokens that are packed together; more tokens are packed tighter",
    )
    files.add_argument("--tag", default="jaxrank", help="name of the run that is written")
    files.add_argument("--skip-bad", action="store_true", help="leave out bad rows and count them, instead of stopping")
    files.add_argument("--restart", action="store_true", help="start again from the beginning, and replace the output")
    long_document_argument(command)
    model_arguments(command)


def run(arguments: argparse.Namespace) -> int:
    """Run the command and return its exit status.

    Raises:
        RequestError: A flag or an input is not valid.
    """
    given = [f"--{name}" for name in ("requests", "run", "corpus", "queries", "beir") if getattr(arguments, name)]
    if given:
        return _files(arguments, given)
    return _lines(arguments)


def _lines(arguments: argparse.Namespace) -> int:
    """Rank the lines of one file for one query."""
    from jaxrank.errors import RequestError

    if arguments.query is None:
        raise RequestError("no query; give one, or files with --requests, --run or --beir")
    if arguments.output or arguments.format == "trec":
        raise RequestError("--output and --format trec are for files; a query's ranking goes to standard output")
    source = "standard input" if arguments.file == "-" else arguments.file
    try:
        content = sys.stdin.buffer.read() if arguments.file == "-" else Path(arguments.file).read_bytes()
        text = content.decode("utf-8")
    except OSError as error:
        raise RequestError(f"{source}: {error.strerror}; give a text file with one document a line") from None
    except UnicodeDecodeError as error:
        raise RequestError(f"{source}: not UTF-8 text at byte {error.start}; give UTF-8, one document a line") from None
    # splitlines() would also split at form feeds and Unicode's separators
    documents = [line for line in re.split(r"\r\n|\n|\r", text) if line.strip()]
    if not documents:
        raise RequestError(f"{source}: no documents; one a line is read, blank lines are skipped")
    reranker = model.load(arguments, arguments.model, progress=False if arguments.no_progress else None)
    ranked = reranker.rank(
        arguments.query, documents, top_n=arguments.top_n, long_document=arguments.long_document,
        progress=not arguments.no_progress,
    )  # fmt: skip
    as_table = arguments.format == "table" or (arguments.format == "auto" and sys.stdout.isatty())
    (write_table if as_table else write_jsonl)(ranked, sys.stdout)
    return 0


def _files(arguments: argparse.Namespace, given: Sequence[str]) -> int:
    """Rank the contents of files into one file."""
    from jaxrank.errors import RequestError
    from jaxrank.offline import journal
    from jaxrank.offline.rerank import as_jsonl, as_trec, rerank
    from jaxrank.offline.rows import BadRows

    if arguments.query is not None:
        raise RequestError(f"a query and {' and '.join(given)}; give one or the other")
    if arguments.output is None:
        raise RequestError("no --output; name the file where the ranking goes")
    if arguments.format == "table" or arguments.top_n is not None:
        raise RequestError("--format table and --top-n are for a query on the command line; see --depth")
    output = Path(arguments.output)
    if output.exists() and not arguments.restart:
        raise RequestError(f"{output} is there already; name another, or replace it with --restart")
    if arguments.restart:
        journal.forget(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    bad = BadRows(arguments.skip_bad)
    source = _source(arguments, output, bad)
    try:
        reranker = model.load(arguments, arguments.model)
        work = {
            "version": __version__, "model": reranker.name, "dtype": reranker.dtype, "row_tokens": reranker.row_tokens,
            "max_length": reranker.max_length, "prompt": arguments.prompt, "chat_template": arguments.chat_template,
            "instruct": arguments.instruct, "depth": arguments.depth, "tag": arguments.tag, "format": arguments.format,
            "long_document": arguments.long_document,
        }  # fmt: skip
        as_run = arguments.format == "trec" or (arguments.format == "auto" and not arguments.requests)
        write = as_trec(arguments.tag) if as_run else as_jsonl
        pairs = rerank(
            reranker, source, output, write, batch_tokens=arguments.batch_tokens, work=work,
            long_document=arguments.long_document, progress=not arguments.no_progress,
        )  # fmt: skip
    finally:
        source.close()
    output.with_name(output.name + ".index").unlink(missing_ok=True)
    skipped = f", {bad.count} bad rows left out" if bad.count else ""
    print(f"wrote {output}: {pairs} pairs scored{skipped}")
    return 0


def _source(arguments: argparse.Namespace, output: Path, bad: BadRows) -> Source:
    """Return the source that the arguments name."""
    from jaxrank.errors import RequestError
    from jaxrank.offline.sources import RequestSource, RunSource

    if arguments.requests:
        if arguments.run or arguments.corpus or arguments.queries or arguments.beir:
            raise RequestError("--requests has its documents in it; leave out --run, --corpus, --queries and --beir")
        return RequestSource(Path(arguments.requests), depth=arguments.depth, bad=bad)
    corpus, queries, only = arguments.corpus, arguments.queries, None
    first = arguments.run
    if arguments.beir:
        from jaxrank.offline.trec import read_qrels

        folder = Path(arguments.beir)
        corpus, queries = corpus or folder / "corpus.jsonl", queries or folder / "queries.jsonl"
        only = read_qrels(folder / "qrels" / f"{arguments.split}.tsv")
        first = first or _bm25_run(arguments, output, Path(corpus), Path(queries), only)
    missing = [name for name, value in [("run", first), ("corpus", corpus), ("queries", queries)] if not value]
    if missing:
        raise RequestError(f"no --{missing[0]}; a run needs --run, --corpus and --queries, or --beir")
    return RunSource(
        Path(first), Path(corpus), Path(queries), depth=arguments.depth, bad=bad, only=only,
        index=output.with_name(output.name + ".index"), progress=not arguments.no_progress,
    )  # fmt: skip


def _bm25_run(arguments: argparse.Namespace, output: Path, corpus: Path, queries: Path, only: Any) -> Path:
    """Write BM25's run beside the output, and keep it for comparison."""
    from jaxrank.offline.bm25 import write_bm25_run
    from jaxrank.offline.corpus import read_queries
    from jaxrank.offline.rows import BadRows

    first = output.with_name(output.name + ".bm25")
    if not output.with_name(output.name + ".journal").exists():
        texts = read_queries(queries, BadRows(arguments.skip_bad))
        judged = {identity: text for identity, text in texts.items() if identity in only}
        write_bm25_run(corpus, judged, first, depth=arguments.depth, progress=not arguments.no_progress)
    return first


def write_jsonl(ranked: Sequence[Any], out: TextIO) -> None:
    """Write one JSON object a line, with index, score and document, and with the window if documents were split."""
    for item in ranked:
        said = {name: value for name, value in asdict(item).items() if name != "window" or value is not None}
        print(json.dumps(said, ensure_ascii=False), file=out)


def write_table(ranked: Sequence[Any], out: TextIO) -> None:
    """Write a table of the ranked documents.

    Its columns are the rank, the score, the document's index in the input, and the part of the document that fits the
    line. The index does not count blank lines.
    """
    width = max(shutil.get_terminal_size().columns - 24, 20)
    print(f"{'rank':>4}  {'score':>7}  {'index':>6}  document", file=out)
    for rank, item in enumerate(ranked, 1):
        print(f"{rank:>4}  {item.score:>7.4f}  {item.index:>6}  {shorten(item.document, width)}", file=out)


def shorten(text: str, width: int) -> str:
    """Return `text` on one line, cut to the width.

    Control characters become spaces.

    Args:
        text: The text.
        width: The number of columns. Wide characters take two.
    """
    text = " ".join("".join(" " if unicodedata.category(c) == "Cc" else c for c in text).split())
    ends = list(itertools.accumulate(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text))
    if not ends or ends[-1] <= width:
        return text
    return text[: bisect.bisect_right(ends, width - 1)] + "…"
