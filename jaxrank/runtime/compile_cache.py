"""Counts XLA's compilations, and keeps compiled programs on disk."""

from __future__ import annotations

import os
import stat
import weakref
from collections import Counter
from pathlib import Path

import jax

from jaxrank.errors import ModelError


class CompilationCounter:
    """Count XLA compilations in this process for as long as it lives. Those that the cache answers count too."""

    def __init__(self) -> None:
        counter = Counter[str]()

        def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
            counter[event] += 1

        def hear(event: str, **kwargs: str | int) -> None:
            counter[event] += 1

        self._counter = counter
        jax.monitoring.register_event_duration_secs_listener(listen)
        jax.monitoring.register_event_listener(hear)
        weakref.finalize(self, jax.monitoring.unregister_event_duration_listener, listen)
        weakref.finalize(self, jax.monitoring.unregister_event_listener, hear)

    @property
    def count(self) -> int:
        return self._counter["/jax/core/compile/backend_compile_duration"]

    @property
    def from_cache(self) -> int:
        """The number of them that the persistent cache answered."""
        return self._counter["/jax/compilation_cache/cache_hits"]


def use_compilation_cache(folder: Path) -> None:
    """Turn on JAX's persistent compilation cache for all programs of this process, unless one is already set.

    Compiled programs are code. So only the owner may read and write the folder.

    Raises:
        ModelError: the folder cannot be made, or others can write to it.
    """
    if jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]
        return
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        raise ModelError(
            f"compilation cache {folder}: it cannot be made ({error.strerror}). "
            "Name another folder, or turn the cache off"
        ) from error
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ModelError(
            f"compilation cache {folder}: other users can write there, and what lies there is run as code. "
            f"Make it yours alone (chmod 700), name another folder, or turn the cache off"
        )
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
