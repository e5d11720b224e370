"""Logits of encoded pairs: planned, packed, and run by the program of their row length."""

from __future__ import annotations

import ctypes
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Float32

from jaxrank.errors import RequestError
from jaxrank.runtime.attention import settle
from jaxrank.runtime.calls import Call, Fetch, Scored, has_room
from jaxrank.runtime.compile_cache import CompilationCounter
from jaxrank.runtime.packing import LADDER, Features, bucket_of, buckets, media_buckets, pack, plan, row_size
from jaxrank.runtime.programs import (
    Batched,
    compile_in_parts,
    compile_whole,
    fetched,
    is_outline,
    one_by_one,
    side_by_side,
    whole,
)
from jaxrank.sharding import DATA
from jaxrank.types import Encoded, Packed, Work

WINDOW = 2048
"""Pairs planned together. More would fill rows no better, and planning takes pairs times rows."""


class Scorer:
    """Logits of encoded pairs, from packed rows of a few static lengths.

    `row_tokens` is the usual row; longer ones exist only for single pairs up to `max_length` tokens. Programs are
    compiled by `warm_up`, or at first use. features: the shape of what a vision tower makes of media, for models that
    see; rows with media have programs of their own, so that rows of text cost what they cost without. mesh: the
    devices, where they are several (see jaxrank.sharding); each copy of the weights takes a row of its own. The model
    gets its attention body here, and with it `attention` (see jaxrank.runtime.attention.settle).
    """

    def __init__(
        self,
        model: Any,
        *,
        max_length: int,
        row_tokens: int,
        features: Features | None = None,
        mesh: Mesh | None = None,
    ):
        if not 1 <= row_tokens <= LADDER[-1]:
            raise RequestError(f"row_tokens is {row_tokens}; a row takes 1 to {LADDER[-1]:.0f} tokens")
        if max_length > LADDER[-1]:
            raise RequestError(f"max_length is {max_length}; a row takes at most {LADDER[-1]:.0f} tokens")
        self.on_cpu = jax.default_backend() == "cpu"
        self.buckets = buckets(row_tokens, max_length, long_steps=not self.on_cpu)
        self.row_tokens = next(t for t in self.buckets if t >= row_tokens)
        # rows handed to the device before the first result is awaited: one runs, on accelerators another waits ready
        self.in_flight = 1 if self.on_cpu else 2
        self.causal: bool = model.causal
        self.attention = settle(model, causal=self.causal, dtype=model.word.dtype, mesh=mesh)
        self.is_outline = is_outline(nnx.state(model))
        self.features = features
        self.copies = 1 if mesh is None else mesh.shape[DATA]
        if mesh is not None:
            self.compile = side_by_side(*whole(model, mesh), mesh)
        else:
            self.compile = one_by_one(compile_in_parts(model) if self.on_cpu else compile_whole(model))
        self.programs: dict[tuple[int, bool], Batched] = {}
        self.work = Work()
        self._counter = CompilationCounter()
        self._counted_from = 0

    @property
    def compilations(self) -> int:
        """XLA compilations since warm-up ended (or since this scorer was made); those of other models count too."""
        return self._counter.count - self._counted_from

    @property
    def compiled(self) -> tuple[int, int]:
        """Programs compiled since this scorer was made, and how many more came from the compilation cache; those of
        other models count too."""
        return self._counter.count - self._counter.from_cache, self._counter.from_cache

    def warm_up(self, progress: Callable[[str], None] | None = None) -> None:
        """Compile every bucket, or load it from the cache. One line a bucket goes to `progress`.

        Then every bucket is run once, so that memory that does not suffice shows now; on CPU, where the largest rows
        take many seconds, the smallest alone; nothing of a model's outline.
        """
        kinds = [(tokens, False) for tokens in self.buckets]
        if self.features is not None:
            kinds += [(tokens, True) for tokens in media_buckets(self.buckets)]
        for i, (tokens, media) in enumerate(kinds):
            start = time.perf_counter()
            program = self._program(tokens, media)
            line = (
                f"bucket {tokens} tokens{' with media' if media else ''} ({i + 1}/{len(kinds)}): "
                f"compiled in {time.perf_counter() - start:.2f} s"
            )
            if not self.is_outline and (i == 0 or not self.on_cpu):
                start = time.perf_counter()
                row = self._pack([], tokens, self.features if media else None)
                jax.block_until_ready(program([row] * self.copies))
                line += f", a row takes {(time.perf_counter() - start) * 1e3:.0f} ms at first"
            _return_freed_memory()
            if progress:
                progress(line)
        self._counted_from = self._counter.count

    def _pack(self, pairs: Sequence[Encoded], tokens: int, features: Features | None) -> Packed:
        implementation = self.attention.implementation
        return pack(pairs, tokens, causal=self.causal, implementation=implementation, features=features)

    def _program(self, tokens: int, media: bool) -> Batched:
        if (tokens, media) not in self.programs:
            self.programs[tokens, media] = self.compile(self._pack([], tokens, self.features if media else None))
        return self.programs[tokens, media]

    @property
    def ahead(self) -> int:
        """Tokens that may wait on the device behind the row that runs, see calls.has_room; 0 is one row at a time."""
        return (self.in_flight - 1) * self.row_tokens

    def rows(self, pairs: Sequence[Encoded], features: Features | None = None) -> Iterator[Scored]:
        """(indices into `pairs`, their logits) row by row, in the order in which rows are computed. features: of the
        pairs' images and videos, if there are any."""
        under_way: deque[tuple[int, Fetch]] = deque()
        for call in self.calls(pairs, features):
            while not has_room([tokens for tokens, _ in under_way], self.ahead):
                yield from under_way.popleft()[1]()
            under_way.append((call.tokens, call.run()))
        for _, fetch in under_way:
            yield from fetch()

    def calls(self, pairs: Sequence[Encoded], features: Features | None = None) -> Iterator[Call]:
        """The calls of the device that score `pairs`, each planned and packed when it is asked for, to be run in this
        order. features: as in `rows`."""
        for first in range(0, len(pairs), WINDOW):
            window = pairs[first : first + WINDOW]
            for rows, tokens, media in self._batches(window):
                for row in rows:
                    chosen = [window[i] for i in row]
                    self.work = self.work.plus(tokens, row_size(chosen), sum(map(len, chosen)))
                packed = [self._pack([window[i] for i in row], tokens, features if media else None) for row in rows]
                packed += [self._pack([], tokens, self.features if media else None)] * (self.copies - len(rows))
                indices = [[first + i for i in row] for row in rows]
                yield Call(tokens, partial(self._run, packed, indices, tokens, media))

    def _run(self, packed: Sequence[Packed], indices: list[list[int]], tokens: int, media: bool) -> Fetch:
        return partial(_fetch, indices, self._program(tokens, media)(packed))

    def _batches(self, pairs: Sequence[Encoded]) -> list[tuple[list[list[int]], int, bool]]:
        """The rows for `pairs` that run side by side, of one length, with it and whether they have media; indices."""
        most = self.row_tokens
        if self.copies > 1:  # what would fill less than a row for each copy is shared out among shorter rows
            share = max(*map(len, pairs), sum(len(pair.tokens) for pair in pairs) // self.copies + len(pairs[0].prefix))
            most = min(most, next(tokens for tokens in self.buckets if tokens >= min(share, self.buckets[-1])))
        sized: list[tuple[list[int], int, bool]] = []
        for row in plan(pairs, most):
            chosen = [pairs[i] for i in row]
            media = any(pair.media is not None for pair in chosen)
            lengths = media_buckets(self.buckets) if media else self.buckets
            sized.append((row, bucket_of(row_size(chosen), len(chosen), lengths), media))
        sized.sort(key=lambda item: (item[2], -item[1]))
        batches: list[tuple[list[list[int]], int, bool]] = []
        for row, tokens, media in sized:
            if batches and batches[-1][2] == media and len(batches[-1][0]) < self.copies:
                batches[-1][0].append(row)
            else:
                batches.append(([row], tokens, media))
        return batches

    def __call__(self, pairs: Sequence[Encoded], features: Features | None = None) -> Float32[np.ndarray, " n"]:
        """float32 logits of all pairs, in their order; features as in `rows`."""
        logits = np.empty(len(pairs), np.float32)
        for indices, values in self.rows(pairs, features):
            logits[indices] = values
        return logits


def _fetch(rows: list[list[int]], logits: Any) -> list[Scored]:
    # rows may be fewer than copies
    return [(row, values[: len(row)]) for row, values in zip(rows, fetched(logits), strict=False)]


def _return_freed_memory() -> None:
    """Give back what compilation freed, which glibc would keep: 90 MB for a model of 24 layers."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
