"""Lines of files from any source. A message about a bad line has its file and number."""

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
    """A line cannot be used."""


@dataclass
class BadRows:
    """How bad rows are handled.

    The first one ends the work. With `skip` the first few are printed and all are counted.
    """

    skip: bool
    count: int = 0

    def add(self, path: Path, line: int, what: str) -> None:
        """Handle one bad row.

        Raises:
            BadRow: bad rows are not skipped.
        """
        said = f"{path} line {line}: {what}"
        if not self.skip:
            raise BadRow(f"{said}; mend it, or leave such rows out with --skip-bad")
        self.count += 1
        if self.count <= SHOWN:
            print(f"jaxrank: skipped {said}", file=sys.stderr)
        if self.count == SHOWN:
            print("jaxrank: further bad rows are counted, not shown", file=sys.stderr)


def lines(path: Path, start: int = 0) -> Iterator[tuple[int, int, bytes]]:
    """Yield the number (from 1), the offset in bytes and the content of each line that is not blank.

    It begins at the offset `start`, and line numbers count from there.

    Raises:
        RequestError: the file cannot be read.
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
    """Return the JSON object in a line, or what is wrong with it."""
    try:
        value = json.loads(line)
    except UnicodeDecodeError as error:
        return f"not UTF-8 at byte {error.start}"
    except ValueError as error:
        return f"no JSON: {error}"
    return value if isinstance(value, dict) else "no JSON object"


def text_of(value: Any) -> str | None:
    """Return a text that a tokenizer can read, or None."""
    if not isinstance(value, str):
        return None
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return None
    return value
