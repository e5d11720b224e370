"""The jitted, bucketed scoring function: what is compiled for each row length, and the compilation cache."""

from __future__ import annotations

import ctypes
import os
import stat
import sys
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float32

from jaxrank.attention import settle
from jaxrank.calls import Call, Fetch, Scored, has_room
from jaxrank.errors import ModelError, RequestError
from jaxrank.kernels import is_for_tpu
from jaxrank.models.layers import stack_layers
from jaxrank.packing import LADDER, Features, bucket_of, buckets, media_buckets, pack, plan, row_size
from jaxrank.sharding import DATA, MODEL, arranged, over_mesh, shardings
from jaxrank.types import Encoded, Packed, Work

WINDOW = 2048
"""Pairs planned together. More would fill rows no better, and planning takes pairs times rows."""

WIDE = 2048
"""Models of at least this width get 64 MiB of on-chip memory for a product's tiles on TPU, others 32; 16 are usual. By
the compiler's estimate a layer of Qwen3-Reranker-4B takes 40 % less time for it on v5e and 32 % less on v6e, one of
bge-reranker-v2-m3 2 % less on v5e and 21 % less on v5p."""

Program = Callable[[Packed], jax.Array]
"""Compiled for one bucket: a packed row in, float32 logits [S] out."""


class CompilationCounter:
    """Counts XLA compilations in this process (those answered by the cache too) for as long as it lives."""

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
        """Those of them that the persistent cache answered."""
        return self._counter["/jax/compilation_cache/cache_hits"]


def use_compilation_cache(folder: Path) -> None:
    """Turn on JAX's persistent compilation cache for all programs of this process, unless one is already set.

    Compiled programs are code: the folder is made readable and writable for its owner alone, and one that others
    can write to is refused with ModelError.
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


def take_tower(model: Any) -> Any:
    """The vision tower of the model, taken out of it: programs that read tokens must not carry its weights. None if the
    model has none."""
    tower = getattr(model, "vision", None)
    if tower is not None:
        del model.vision
    return tower


def compile_whole(model: nnx.Module) -> Callable[[Packed], Program]:
    """For accelerators: a bucket is one program, with a scan over the stacked layers."""
    return ahead_of_time(*whole(model))


def ahead_of_time(run: Any, state: Any) -> Callable[[Any], Callable[[Any], jax.Array]]:
    """From a jitted (state, row) -> result, and the state, to what compiles it for rows shaped as a sample."""
    return lambda sample: partial(run.lower(state, sample).compile(), state)


Batched = Callable[[Sequence[Any]], Sequence[Any] | jax.Array]
"""Compiled for rows of one size: so many as run side by side in, as many results out, listed or on a leading axis."""


def side_by_side(run: Any, state: Any, mesh: Mesh) -> Callable[[Any], Batched]:
    """The same for a mesh: what is compiled takes as many rows as there are copies of the weights."""
    apart = NamedSharding(mesh, PartitionSpec(DATA))
    places = shardings(state, mesh)
    if is_outline(state):
        outline = jax.ShapeDtypeStruct
        state = jax.tree.map(
            lambda at, of: jax.tree.map(lambda leaf: outline(leaf.shape, leaf.dtype, sharding=at), of), places, state
        )
    else:
        state = jax.device_put(state, places)

    def compile(sample: Any) -> Batched:
        outlines = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((mesh.shape[DATA], *np.shape(leaf)), leaf.dtype, sharding=apart), sample
        )
        program = run.lower(state, outlines).compile()

        def put(*leaves: Any) -> jax.Array:
            together = np.stack(leaves)
            # jax.device_put would have several processes compare it first
            return jax.make_array_from_callback(together.shape, apart, lambda cut: together[cut])

        return lambda rows: program(state, jax.tree.map(put, *rows))

    return compile


def is_outline(state: Any) -> bool:
    """Whether a model's state has shapes in place of numbers: its programs can be compiled, not run."""
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(state))


def one_by_one(compile: Callable[[Any], Callable[[Any], Any]]) -> Callable[[Any], Batched]:
    """What compiles for one row, as what compiles for a list of one."""

    def compile_for_lists(sample: Any) -> Batched:
        program = compile(sample)
        return lambda rows: [program(*rows)]

    return compile_for_lists


def fetched(results: Sequence[Any] | jax.Array) -> Sequence[Any] | np.ndarray:
    """Results of rows that ran side by side, on the host, by row."""
    return np.asarray(results) if isinstance(results, jax.Array) else [np.asarray(result) for result in results]


def whole(model: Any, mesh: Mesh | None = None) -> tuple[Any, Any]:
    """The jitted (state, packed row) -> logits with a scan over the stacked layers, and the state. Takes the model's
    layers away. A model of outlines gives a state of outlines. With a mesh: see sharding.over_mesh."""
    stack_layers(model)
    return _jitted(model, mesh)


def whole_tower(tower: Any, mesh: Mesh | None = None) -> tuple[Any, Any]:
    """The jitted (state, row of patches) -> features, and the state, as `whole` has it for a model of text: with a scan
    over the layers of each stage. Takes the tower's layers away."""
    stack_layers(tower)
    return _jitted(tower, mesh)


def _jitted(module: Any, mesh: Mesh | None) -> tuple[Any, Any]:
    graph, state = nnx.split(module)
    if mesh is not None:
        state = arranged(state, mesh.shape[MODEL])

    def run(state: Any, batch: Any) -> jax.Array:
        return nnx.merge(graph, state)(batch)

    options = None
    if is_for_tpu(module.implementation):
        options = {"xla_tpu_scoped_vmem_limit_kib": str((64 if module.config.width >= WIDE else 32) * 1024)}
    return jax.jit(run if mesh is None else over_mesh(run, state, mesh), compiler_options=options), state


def compile_in_parts(model: nnx.Module) -> Callable[[Packed], Program]:
    """For CPU: a bucket is three programs, and all layers but the last run through the same one.

    XLA's CPU backend converts a stacked bfloat16 array as a whole at every call, so a scan is slow there, and a program
    of all 24 layers takes 70 MB and many seconds of compilation in every bucket.
    """
    graph, state = nnx.split(model)
    ends: Any = nnx.merge(graph, state)
    split = [nnx.split(layer) for layer in ends.layers]
    layers = [state for _, state in split]
    ends.layers = nnx.List([])
    ends_graph, ends_state = nnx.split(ends)

    def compile(sample: Packed) -> Program:
        # functions made anew for every bucket: JAX keeps what it traced and lowered for as long as a function lives
        def embed(state: Any, batch: Packed) -> Any:
            return nnx.merge(ends_graph, state).embed(batch)

        def run(state: Any, x: jax.Array, shared: Any) -> Any:
            return nnx.merge(split[0][0], state)(x, *shared)

        def finish(state: Any, x: jax.Array, batch: Packed) -> Any:
            return nnx.merge(ends_graph, state).finish(x, batch)

        x, shared = jax.eval_shape(embed, ends_state, sample)
        first = jax.jit(embed).lower(ends_state, sample).compile()
        last = jax.jit(finish).lower(ends_state, x, sample).compile()
        between = [jax.jit(run, donate_argnums=1).lower(state, x, shared).compile() for state in layers[:1]]

        def program(batch: Packed) -> jax.Array:
            x, shared = first(ends_state, batch)
            for state in layers:
                # waited for, since calls that wait in line hold their memory
                x = between[0](state, x, shared).block_until_ready()
            return last(ends_state, x, batch)

        return program

    return compile


class Scorer:
    """Logits of encoded pairs, from packed rows of a few static lengths.

    `row_tokens` is the usual row; longer ones exist only for single pairs up to `max_length` tokens. Programs are
    compiled by `warm_up`, or at first use. features: the shape of what a vision tower makes of media, for models that
    see; rows with media have programs of their own, so that rows of text cost what they cost without. mesh: the
    devices, where they are several (see jaxrank.sharding); each copy of the weights takes a row of its own. The model
    gets its attention body here, and with it `attention` (see jaxrank.attention.settle).
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
