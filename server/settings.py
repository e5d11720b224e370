"""The settings of an application, and what it finds out about the machine."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from jaxrank.media.images import Limits
from jaxrank.server.dialects.dialect import Dialect
from jaxrank.server.http.gate import GateLimits
from jaxrank.server.media.fetch import MediaAccess


@dataclass(frozen=True)
class Settings:
    """The arguments of create_app, which describes them."""

    model: str
    dialect: Dialect | None
    truncate: bool
    long_document: str
    max_documents: int
    max_windows: int
    gate: GateLimits
    max_queue_tokens: int
    max_queue_requests: int
    max_queue_s: float
    batch_rows: int
    inline_bytes: int
    encode_threads: int
    fail_after: int
    probe_s: float
    media: MediaAccess
    limits: Limits
    media_workers: int
    on_ready: Callable[[], None]
    on_failure: Callable[[BaseException], None]


def usable_cores() -> int:
    """Return the number of cores that this process may use, which in a container can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def encode_threads_for(cores: int) -> int:
    """Return the number of threads that tokenise, from 2 to 8.

    There are at least two, so that one long request does not block all others. One core is left for the event loop and
    the device's thread. There are at most eight, because the other work for a request holds Python's lock.

    Args:
        cores: The number of usable cores.
    """
    return min(8, max(2, cores - 1))
