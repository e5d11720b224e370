"""What is compiled for each row length: whole models over stacked layers, or models in parts on CPU."""

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
"""Models of at least this width get 64 MiB of on-chip memory for the tiles of a product on TPU.

Other models get 32 MiB; the usual amount is 16 MiB. By the compiler's estimate, a layer of Qwen3-Reranker-4B takes 40 %
less time with 64 MiB than with 16 on v5e, and 32 % less on v6e. A layer of bge-reranker-v2-m3 takes 2 % less with 32
MiB on v5e, and 21 % less on v5p.
"""

Program = Callable[[Packed], jax.Array]
"""A program compiled for one bucket: a packed row in, float32 logits [S] out."""


def take_tower(model: Any) -> Any:
    """Take the vision tower out of the model and return it. Return None if the model has none.

    Programs that read tokens must not hold the tower's weights.
    """
    tower = getattr(model, "vision", None)
    if tower is not None:
        del model.vision
    return tower


def compile_whole(model: nnx.Module) -> Callable[[Packed], Program]:
    """Return the compiler for accelerators: a bucket is one program, over the stacked layers."""
    return ahead_of_time(*whole(model))


def ahead_of_time(run: Any, state: Any) -> Callable[[Any], Callable[[Any], jax.Array]]:
    """Return a function that compiles a program for one device, for rows with the shape of a sample.

    Args:
        run: the jitted function (state, row) -> result.
        state: the state.
    """
    return lambda sample: partial(run.lower(state, sample).compile(), state)


Batched = Callable[[Sequence[Any]], Sequence[Any] | jax.Array]
"""A program compiled for rows of one size.

It takes as many rows as run side by side, and gives as many results, in a list or on a leading axis.
"""


def side_by_side(run: Any, state: Any, mesh: Mesh) -> Callable[[Any], Batched]:
    """Return a function that compiles a program for a mesh, for rows with the shape of a sample.

    The program takes as many rows as there are copies of the weights.

    Args:
        run: the jitted function (state, rows) -> result.
        state: the state.
        mesh: the mesh.
    """
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
            # jax.device_put would make several processes compare it first
            return jax.make_array_from_callback(together.shape, apart, lambda cut: together[cut])

        return lambda rows: program(state, jax.tree.map(put, *rows))

    return compile


def is_outline(state: Any) -> bool:
    """Return whether a model's state has shapes in place of numbers. Its programs can be compiled but not run."""
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(state))


def one_by_one(compile: Callable[[Any], Callable[[Any], Any]]) -> Callable[[Any], Batched]:
    """Turn a compiler of programs for one row into a compiler of programs for a list of one row."""

    def compile_for_lists(sample: Any) -> Batched:
        program = compile(sample)
        return lambda rows: [program(*rows)]

    return compile_for_lists


def fetched(results: Sequence[Any] | jax.Array) -> Sequence[Any] | np.ndarray:
    """Return the results of rows that ran side by side, on the host, by row."""
    return np.asarray(results) if isinstance(results, jax.Array) else [np.asarray(result) for result in results]


def whole(model: Any, mesh: Mesh | None = None) -> tuple[Any, Any]:
    """Return the jitted (state, packed row) -> logits over the stacked layers, and the state; see layers.run_layers.

    The layers are taken out of the model. A model of outlines gives a state of outlines. For a mesh see
    sharding.over_mesh.
    """
    stack_layers(model)
    return _jitted(model, mesh)


def whole_tower(tower: Any, mesh: Mesh | None = None) -> tuple[Any, Any]:
    """Return the jitted (state, row of patches) -> features over the stacked layers of each stage, and the state.

    It is to a tower what `whole` is to a text model. The layers are taken out of the tower.
    """
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
    """Return the compiler for CPU: a bucket is three programs, and all layers but the last run through the same one.

    XLA's CPU backend converts a stacked bfloat16 array as a whole at every call, so a scan is slow there. One program
    of all 24 layers takes 70 MB and many seconds of compilation in every bucket.
    """
    graph, state = nnx.split(model)
    ends: Any = nnx.merge(graph, state)
    split = [nnx.split(layer) for layer in ends.layers]
    layers = [state for _, state in split]
    ends.layers = nnx.List([])
    ends_graph, ends_state = nnx.split(ends)

    def compile(sample: Packed) -> Program:
        # These functions are made anew for every bucket. JAX keeps what it traced and lowered for as long as a function
        # lives.
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
                # Wait for the result, because calls that wait in line hold their memory.
                x = between[0](state, x, shared).block_until_ready()
            return last(ends_state, x, batch)

        return program

    return compile
