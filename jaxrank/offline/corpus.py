"""Documents by id from a corpus that may be larger than memory. The offsets into its file are kept in SQLite."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

from tqdm import tqdm

from jaxrank.errors import RequestError
from jaxrank.offline.rows import BadRows, json_object, lines, text_of

ID_FIELDS, TEXT_FIELDS = ("_id", "id", "docid", "doc_id"), ("text", "contents", "body")


class Corpus:
    """A JSON Lines file in the form of BEIR, `{"_id": "...", "title": "...", "text": "..."}`. The title may be missing.

    The file is indexed once into `index`, a table of a database that the caller keeps. It takes 40 to 60 bytes a
    document.
    """

    def __init__(self, path: Path, index: sqlite3.Connection) -> None:
        self.path = path
        self.index = index
        self.file: Any = None

    def build(self, bad: BadRows, *, progress: bool) -> None:
        """Index the file.

        Raises:
            RequestError: the file cannot be read.
            BadRow: a line is bad, and `bad` does not skip it.
        """
        insert = "INSERT OR IGNORE INTO corpus VALUES (?, ?)"
        self.index.execute("CREATE TABLE corpus (id TEXT PRIMARY KEY, at INTEGER) WITHOUT ROWID")
        try:
            size = self.path.stat().st_size
        except OSError as error:
            raise RequestError(f"{self.path}: {error.strerror}") from None
        with tqdm(
            total=size, unit="B", unit_scale=True, desc=f"indexing {self.path.name}", disable=None if progress else True
        ) as bar:
            for number, offset, line in lines(self.path):
                bar.update(offset + len(line) - bar.n)
                found = entry(line)
                if isinstance(found, str):
                    bad.add(self.path, number, found)
                elif not self.index.execute(insert, (found[0], offset)).rowcount:
                    bad.add(self.path, number, f"document {found[0]} is there twice")
        self.index.commit()

    def has(self, identity: str) -> bool:
        """Return whether there is such a document."""
        return self.index.execute("SELECT 1 FROM corpus WHERE id = ?", (identity,)).fetchone() is not None

    def text(self, identity: str) -> str:
        """Return the title and text of a document.

        Raises:
            KeyError: there is no such document.
            RequestError: the file has changed since it was indexed.
        """
        found = self.index.execute("SELECT at FROM corpus WHERE id = ?", (identity,)).fetchone()
        if found is None:
            raise KeyError(identity)
        if self.file is None:
            self.file = self.path.open("rb")
        self.file.seek(found[0])
        now = entry(self.file.readline())
        if isinstance(now, str):
            raise RequestError(f"{self.path} has changed since it was indexed; start anew with --restart")
        return now[1]

    def close(self) -> None:
        """Close the file."""
        if self.file is not None:
            self.file.close()


def entry(line: bytes) -> tuple[str, str] | str:
    """Return the id and text of a line, or what is wrong with it.

    The line is of a corpus, or of queries in the same form.
    """
    row = json_object(line)
    if isinstance(row, str):
        return row
    identity, text = identity_of(row), document_text(row)
    if identity is None or text is None:
        return 'no document; one looks like {"_id": "...", "title": "...", "text": "..."}'
    return identity, text


def identity_of(row: dict[str, Any]) -> str | None:
    """Return the id of a document or query: text without spaces, or a number."""
    value = next((row[name] for name in ID_FIELDS if row.get(name) is not None), None)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    text = text_of(value)
    return text if text and not any(character.isspace() for character in text) else None


def document_text(row: dict[str, Any]) -> str | None:
    """Return title and text, joined as in BEIR."""
    text = next((row[name] for name in TEXT_FIELDS if row.get(name) is not None), None)
    title = row.get("title")
    body, head = text_of(text), "" if title is None else text_of(title)
    return None if body is None or head is None else f"{head} {body}".strip()


def read_queries(path: Path, bad: BadRows) -> dict[str, str]:
    """Return the texts of queries by id. The file has JSON Lines of `{"_id": "...", "text": "..."}`, or `id<tab>text`.

    Raises:
        RequestError: the file has no queries, or cannot be read.
        BadRow: a line is bad, and `bad` does not skip it.
    """
    queries: dict[str, str] = {}
    for number, _, line in lines(path):
        if line.lstrip().startswith(b"{"):
            found = entry(line)
            identity, text = (None, None) if isinstance(found, str) else found
        else:
            first, _, rest = line.decode("utf-8", "replace").rstrip("\r\n").partition("\t")
            identity, text = first.strip() or None, rest.strip() or None
        if identity is None or text is None:
            bad.add(path, number, 'no query; one looks like {"_id": "...", "text": "..."}, or id, tab, text')
            continue
        if identity in queries:
            bad.add(path, number, f"query {identity} is there twice")
            continue
        queries[identity] = text
    if not queries:
        raise RequestError(f"{path}: no queries")
    return queries
