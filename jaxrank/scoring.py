"""The jitted, bucketed scoring function: one compiled program for each row length, and the compilation cache."""

from __future__ import annotations

import os
import stat
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float32

from jaxrank.errors import ModelError
from jaxrank.models.layers import stack
from jaxrank.packing import bucket_of, buckets, pack, plan
from jaxrank.types import Encoded

WINDOW = 2048
"""Pairs planned together. More would fill rows no better, and planning takes pairs times rows."""

IN_FLIGHT = 2
"""Rows handed to the device before the first result is awaited: one runs, the next one waits ready."""


class CompilationCounter:
    """Counts XLA compilations in this process (those answered by the cache too) for as long as it lives."""

    def __init__(self) -> None:
        counter = [0]

        def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
            if event == "/jax/core/compile/backend_compile_duration":
                counter[0] += 1

        self._counter = counter
        jax.monitoring.register_event_duration_secs_listener(listen)
        weakref.finalize(self, jax.monitoring.unregister_event_duration_listener, listen)

    @property
    def count(self) -> int:
        return self._counter[0]


def use_compilation_cache(folder: Path) -> None:
    """Turn on JAX's persistent compilation cache for all programs of this process, unless one is already set.

    Compiled programs are code: the folder is made readable and writable for its owner alone, and one that others
    can write to is refused with ModelError.
    """
    if jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]
        return
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ModelError(
            f"compilation cache {folder}: other users can write there, and what lies there is run as code. "
            f"Make it yours alone (chmod 700), name another folder, or turn the cache off"
        )
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


class Scorer:
    """Logits of encoded pairs, from packed rows of a few static lengths.

    `row_tokens` is the usual row; longer ones exist only for single pairs up to `max_length` tokens. Programs are
    compiled by `warm_up`, or at first use.
    """

    def __init__(self, model: nnx.Module, *, max_length: int, row_tokens: int):
        if jax.default_backend() != "cpu":
            # a scan over stacked layers compiles faster; on CPU, XLA would convert the whole stack at every call
            model.layers = stack(model.layers)  # pyright: ignore[reportAttributeAccessIssue]
        self.graph, self.state = nnx.split(model)
        self.buckets = buckets(row_tokens, max_length)
        self.row_tokens = next(t for t in self.buckets if t >= row_tokens)
        self.programs: dict[int, Any] = {}
        self._counter = CompilationCounter()
        self._counted_from = 0

    @property
    def compilations(self) -> int:
        """XLA compilations since warm-up ended (or since this scorer was made); those of other models count too."""
        return self._counter.count - self._counted_from

    def warm_up(self, progress: Callable[[str], None] | None = None) -> None:
        """Compile every bucket, or load it from the cache, and run it once. One line a bucket goes to `progress`."""
        for i, tokens in enumerate(self.buckets):
            start = time.perf_counter()
            program = self._program(tokens)
            compiled = time.perf_counter()
            program(self.state, pack([], tokens)).block_until_ready()
            if progress:
                progress(
                    f"bucket {tokens} tokens ({i + 1}/{len(self.buckets)}): compiled in {compiled - start:.2f} s, "
                    f"a row takes {(time.perf_counter() - compiled) * 1e3:.0f} ms at first"
                )
        self._counted_from = self._counter.count

    def _program(self, tokens: int) -> Any:
        if tokens not in self.programs:
            graph = self.graph

            def score(state: Any, batch: Any) -> jax.Array:
                return nnx.merge(graph, state)(batch)

            self.programs[tokens] = jax.jit(score).lower(self.state, pack([], tokens)).compile()
        return self.programs[tokens]

    def rows(self, pairs: Sequence[Encoded]) -> Iterator[tuple[list[int], Float32[np.ndarray, " n"]]]:
        """(indices into `pairs`, their logits) row by row, in the order in which rows are computed."""
        waiting: list[tuple[list[int], jax.Array]] = []
        for first in range(0, len(pairs), WINDOW):
            window = pairs[first : first + WINDOW]
            for row in plan([len(pair) for pair in window], self.row_tokens):
                chosen = [window[i] for i in row]
                tokens = bucket_of(sum(map(len, chosen)), len(chosen), self.buckets)
                logits = self._program(tokens)(self.state, pack(chosen, tokens))
                waiting.append(([first + i for i in row], logits))
                if len(waiting) >= IN_FLIGHT:
                    yield _fetch(*waiting.pop(0))
        for item in waiting:
            yield _fetch(*item)

    def __call__(self, pairs: Sequence[Encoded]) -> Float32[np.ndarray, " n"]:
        """float32 logits of all pairs, in their order."""
        logits = np.empty(len(pairs), np.float32)
        for indices, values in self.rows(pairs):
            logits[indices] = values
        return logits


def _fetch(indices: list[int], logits: jax.Array) -> tuple[list[int], Float32[np.ndarray, " n"]]:
    return indices, np.asarray(logits)[: len(indices)]
