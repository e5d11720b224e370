"""Log lines to standard error: for people, or one JSON object a line for machines. No line has text of a request."""

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
    """One object a line: time (UTC), level, logger, message, what a line's `extra={"fields": {...}}` has, exception."""

    def format(self, record: logging.LogRecord) -> str:
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
    """Show what the server logs, and what libraries warn of, unless the program has set up logging itself.

    log_format: one of FORMATS. Raises ValueError for others.
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
