"""Logits of encoded pairs. The pairs are planned, packed, and run by the program of their row length."""

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
"""The number of pairs that are planned together.

More would not fill rows better, and the time of planning grows with pairs times rows.
"""


class Scorer:
    """Compute logits of encoded pairs, from packed rows of a few static lengths.

    The model gets its attention body here, and `attention` names it (see jaxrank.runtime.attention.settle). Programs
    are compiled by `warm_up`, or at first use.

    Args:
        model: the model.
        max_length: the most tokens of a pair.
        row_tokens: the tokens of the usual row. Longer rows exist only for single pairs of up to `max_length` tokens.
        features: the shape of a vision tower's features, for models that see. Rows with media have programs of their
            own, so they do not make rows of text slower.
        mesh: the devices, if there are several (see jaxrank.sharding). Each copy of the weights takes a row of its own.

    Raises:
        RequestError: `row_tokens` or `max_length` is out of range, or the attention body is unknown.
        ModelError: the attention body is wrong on the device.
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
        # Rows that the device gets before the first result is awaited. One runs, and on accelerators another waits.
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
        """The number of XLA compilations since warm-up ended, or since this scorer was made.

        Those of other models count too.
        """
        return self._counter.count - self._counted_from

    @property
    def compiled(self) -> tuple[int, int]:
        """The number of programs compiled since this scorer was made, and the number that came from the compilation
        cache.

        Programs of other models count too.
        """
        return self._counter.count - self._counter.from_cache, self._counter.from_cache

    def warm_up(self, progress: Callable[[str], None] | None = None) -> None:
        """Compile every bucket, or load it from the cache, and then run it once.

        The run shows at once whether the memory is too small. On CPU only the smallest bucket runs, because the largest
        rows take many seconds there. The outline of a model does not run.

        Args:
            progress: a function that is called with one line of text for each bucket.
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
        """The number of tokens that may wait on the device behind the row that runs (see calls.has_room).

        With 0 there is one row at a time.
        """
        return (self.in_flight - 1) * self.row_tokens

    def rows(self, pairs: Sequence[Encoded], features: Features | None = None) -> Iterator[Scored]:
        """Yield (indices into `pairs`, their logits) row by row, in the order in which rows are computed.

        Args:
            pairs: the pairs.
            features: the features of the pairs' images and videos, if there are any.
        """
        under_way: deque[tuple[int, Fetch]] = deque()
        for call in self.calls(pairs, features):
            while not has_room([tokens for tokens, _ in under_way], self.ahead):
                yield from under_way.popleft()[1]()
            under_way.append((call.tokens, call.run()))
        for _, fetch in under_way:
            yield from fetch()

    def calls(self, pairs: Sequence[Encoded], features: Features | None = None) -> Iterator[Call]:
        """Yield the device calls that score `pairs`. Run them in this order.

        Each call is planned and packed when it is asked for.

        Args:
            pairs: the pairs.
            features: as in `rows`.
        """
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
        """Return the rows that run side by side: (the indices of their pairs, their common length, whether they have
        media)."""
        most = self.row_tokens
        if self.copies > 1:  # If there is less than a row for each copy, the pairs are shared out among shorter rows.
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
        """Return the logits of all pairs, in their order. `features` is as in `rows`."""
        logits = np.empty(len(pairs), np.float32)
        for indices, values in self.rows(pairs, features):
            logits[indices] = values
        return logits


def _fetch(rows: list[list[int]], logits: Any) -> list[Scored]:
    # There may be fewer rows than copies.
    return [(row, values[: len(row)]) for row, values in zip(rows, fetched(logits), strict=False)]


def _return_freed_memory() -> None:
    """Return to the system the memory that compilation freed. glibc would keep it: 90 MB for a model of 24 layers."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
