"""What to rerank: a run over a corpus, or requests with their documents in them.

All of it is checked before anything is scored, so that bad rows are found at once.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from jaxrank.errors import RequestError
from jaxrank.offline.corpus import Corpus, document_text, identity_of, read_queries
from jaxrank.offline.rows import BadRows, json_object, lines, text_of
from jaxrank.offline.trec import read_run


def stamp(path: Path) -> list[int]:
    """Return the size and time of a file, by which it is recognised later.

    Raises:
        RequestError: the file cannot be read.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror}") from None
    return [found.st_size, found.st_mtime_ns]


@dataclass(frozen=True)
class Job:
    """A query with its candidates. `after` is where the next job begins, for `Source.jobs`."""

    id: str
    query: str
    ids: list[str]
    documents: list[str]
    after: int


class Source(Protocol):
    """Jobs in a fixed order. They can start at any of them."""

    @property
    def pairs(self) -> int: ...
    @property
    def files(self) -> list[Path]: ...
    def jobs(self, start: int = 0) -> Iterator[Job]: ...
    def close(self) -> None: ...


class RunSource:
    """The `depth` best candidates of every query of a run, best first. Equal ones are in the order of the file.

    Args:
        index: a database file. It is made, or a finished one from an interrupted start of the same work is used.
        bad: how bad rows of all three files are handled.
        only: the queries that count. The default is all.

    Raises:
        RequestError: a file cannot be read, or there are no candidates.
        BadRow: a row is bad, and `bad` does not skip it.
    """

    def __init__(
        self,
        run: Path,
        corpus: Path,
        queries: Path,
        *,
        depth: int,
        index: Path,
        bad: BadRows,
        only: Mapping[str, Any] | None = None,
        progress: bool = True,
    ) -> None:
        self.files = [run, corpus, queries]
        self.depth = depth
        self.database = sqlite3.connect(index, check_same_thread=False)  # jobs are read on a thread
        # What is lost by a crash is made again, because the table `finished` comes last.
        self.database.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -32000")
        self.corpus = Corpus(corpus, self.database)
        signature = json.dumps([[str(path), *stamp(path)] for path in self.files] + [bad.skip, sorted(only or ())])
        if self._finished() != signature:
            for name in ("finished", "corpus", "queries", "candidates"):
                self.database.execute(f"DROP TABLE IF EXISTS {name}")
            self.corpus.build(bad, progress=progress)
            self._read(run, read_queries(queries, bad), bad, only)
            finished = "CREATE TABLE finished AS SELECT ? AS signature, ? AS bad"
            self.database.execute(finished, (signature, bad.count))
            self.database.commit()
        (bad.count,) = self.database.execute("SELECT bad FROM finished").fetchone()
        counts = self.database.execute("SELECT min(count(*), ?) FROM candidates GROUP BY query", (depth,))
        self.pairs = sum(count for (count,) in counts)
        if not self.pairs:
            raise RequestError(f"{run}: no candidates")

    def _finished(self) -> str | None:
        """Return what the database is the finished index of."""
        try:
            return self.database.execute("SELECT signature FROM finished").fetchone()[0]
        except sqlite3.DatabaseError:
            return None

    def _read(self, run: Path, queries: Mapping[str, str], bad: BadRows, only: Mapping[str, Any] | None) -> None:
        self.database.execute("CREATE TABLE queries (number INTEGER PRIMARY KEY, id TEXT, text TEXT)")
        self.database.execute(
            "CREATE TABLE candidates (query INTEGER, score REAL, line INTEGER, document TEXT, UNIQUE (query, document))"
        )
        numbers: dict[str, int] = {}
        insert = "INSERT OR IGNORE INTO candidates VALUES (?, ?, ?, ?)"
        for line, query, document, score in read_run(run, bad):
            if only is not None and query not in only:
                continue
            if query not in queries:
                bad.add(run, line, f"query {query} is not in {self.files[2]}")
                continue
            if not self.corpus.has(document):
                bad.add(run, line, f"document {document} is not in {self.corpus.path}")
                continue
            if query not in numbers:
                numbers[query] = len(numbers)
                row = (numbers[query], query, queries[query])
                self.database.execute("INSERT INTO queries VALUES (?, ?, ?)", row)
            if not self.database.execute(insert, (numbers[query], score, line, document)).rowcount:
                bad.add(run, line, f"document {document} is there twice for query {query}")

    def jobs(self, start: int = 0) -> Iterator[Job]:
        """Yield the jobs from query number `start` on.

        Raises:
            RequestError: a document cannot be read any more.
        """
        best = "SELECT document FROM candidates WHERE query = ? ORDER BY score DESC, line LIMIT ?"
        number = start
        while row := self.database.execute("SELECT id, text FROM queries WHERE number = ?", (number,)).fetchone():
            ids = [document for (document,) in self.database.execute(best, (number, self.depth))]
            number += 1
            yield Job(row[0], row[1], ids, [self.corpus.text(one) for one in ids], number)

    def close(self) -> None:
        """Close database and corpus."""
        self.corpus.close()
        self.database.close()


class RequestSource:
    """JSON Lines of {"_id": "...", "query": "...", "documents": [...]}. Without an id the line's offset in bytes is
    used.

    Documents are strings or objects as in a corpus. At most `depth` of each request count. Places are offsets.

    Raises:
        RequestError: the file cannot be read, or there is nothing to rank.
        BadRow: a row is bad, and `bad` does not skip it.
    """

    def __init__(self, path: Path, *, depth: int, bad: BadRows) -> None:
        self.path = path
        self.files = [path]
        self.depth = depth
        self.pairs = 0
        for number, offset, line in lines(path):
            job = self._job(line, offset)
            if isinstance(job, str):
                bad.add(path, number, job)
            else:
                self.pairs += len(job.ids)
        if not self.pairs:
            raise RequestError(f"{path}: nothing to rank")

    def jobs(self, start: int = 0) -> Iterator[Job]:
        """Yield the jobs from the line at the offset `start` on."""
        for _, offset, line in lines(self.path, start):
            job = self._job(line, offset)
            if not isinstance(job, str):
                yield job

    def _job(self, line: bytes, offset: int) -> Job | str:
        row = json_object(line)
        if isinstance(row, str):
            return row
        query, documents = text_of(row.get("query")), row.get("documents")
        if query is None or not isinstance(documents, list) or not documents:
            return 'no request; one looks like {"query": "...", "documents": ["...", "..."]}'
        ids: list[str] = []
        texts: list[str] = []
        for place, document in enumerate(documents[: self.depth]):
            text = document_text(document) if isinstance(document, dict) else text_of(document)
            if text is None:
                return f"documents[{place}] is no text and no object with one"
            texts.append(text)
            ids.append((identity_of(document) if isinstance(document, dict) else None) or str(place))
        return Job(identity_of(row) or str(offset), query, ids, texts, offset + len(line))

    def close(self) -> None:
        """Do nothing, because no file is open."""
