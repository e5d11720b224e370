"""What is compiled for each row length: whole models over stacked layers, or in parts on CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrank.kernels import is_for_tpu
from jaxrank.models.layers import stack_layers
from jaxrank.sharding import DATA, MODEL, arranged, over_mesh, shardings
from jaxrank.types import Packed

WIDE = 2048
"""Models of at least this width get 64 MiB of on-chip memory for a product's tiles on TPU, others 32; 16 are usual. By
the compiler's estimate a layer of Qwen3-Reranker-4B takes 40 % less time for it on v5e and 32 % less on v6e, one of
bge-reranker-v2-m3 2 % less on v5e and 21 % less on v5p."""

Program = Callable[[Packed], jax.Array]
"""Compiled for one bucket: a packed row in, float32 logits [S] out."""


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
    """Turns a compiler of programs for one row into a compiler of programs for a list of one row."""

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
