"""Lines of files that strangers made: what is wrong with one is said by file and line."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxrank.errors import RequestError

SHOWN = 20


class BadRow(RequestError):
    """A line that cannot be used."""


@dataclass
class BadRows:
    """What becomes of bad rows: the first one ends the work, or with `skip` the first few are told and all counted."""

    skip: bool
    count: int = 0

    def add(self, path: Path, line: int, what: str) -> None:
        """Raises BadRow unless bad rows are skipped."""
        said = f"{path} line {line}: {what}"
        if not self.skip:
            raise BadRow(f"{said}; mend it, or leave such rows out with --skip-bad")
        self.count += 1
        if self.count <= SHOWN:
            print(f"jaxrank: skipped {said}", file=sys.stderr)
        if self.count == SHOWN:
            print("jaxrank: further bad rows are counted, not shown", file=sys.stderr)


def lines(path: Path, start: int = 0) -> Iterator[tuple[int, int, bytes]]:
    """Number (from 1), offset in bytes and content of each line that is not blank, from the offset `start` on.

    Raises RequestError if the file cannot be read. Line numbers count from `start`.
    """
    try:
        with path.open("rb") as file:
            file.seek(start)
            offset = start
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, offset, line
                offset += len(line)
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror}") from None


def json_object(line: bytes) -> dict[str, Any] | str:
    """The JSON object in a line, or what is wrong with it."""
    try:
        value = json.loads(line)
    except UnicodeDecodeError as error:
        return f"not UTF-8 at byte {error.start}"
    except ValueError as error:
        return f"no JSON: {error}"
    return value if isinstance(value, dict) else "no JSON object"


def text_of(value: Any) -> str | None:
    """A text that a tokenizer can read, or None."""
    if not isinstance(value, str):
        return None
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return None
    return value
