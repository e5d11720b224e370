"""What an application was told, and what it finds of the machine."""

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
    """What create_app was told; see there."""

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
    """Those that this process may run on, which in a container can be fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def encode_threads_for(cores: int) -> int:
    """Threads that tokenise. Two at least, so that no long request holds up all others. One core is left to the event
    loop and the device's thread. Eight at most: what a request does beside tokenising holds Python's lock."""
    return min(8, max(2, cores - 1))
