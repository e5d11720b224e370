"""Log lines on standard error: text for people, or one JSON object a line for machines. No line quotes a request."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

FORMATS = ("text", "json")


class JsonFormatter(logging.Formatter):
    """Formats a line as one JSON object.

    Its fields are time (UTC), level, logger, message, the fields of the line's `extra={"fields": {...}}`, and
    exception.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the line for a record."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


@contextlib.contextmanager
def to_stderr(log_format: str = "text") -> Iterator[None]:
    """Show the server's log and the libraries' warnings, unless the program has set up logging itself.

    Args:
        log_format: One of FORMATS.

    Raises:
        ValueError: log_format is unknown.
    """
    if log_format not in FORMATS:
        raise ValueError(f"log_format is {log_format!r}; one of {', '.join(FORMATS)}")
    root, ours = logging.getLogger(), logging.getLogger("jaxrank")
    if ours.hasHandlers():
        yield
        return
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    handler.setFormatter(JsonFormatter() if log_format == "json" else text)
    level = ours.level
    root.addHandler(handler)
    ours.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.removeHandler(handler)
        ours.setLevel(level)
