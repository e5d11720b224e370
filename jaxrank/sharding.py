"""One model over several devices: rows over the mesh axis "data", heads and feed-forward over the axis "model".

Which axis of a parameter is cut stands beside the parameter, as its metadata `shard` (counted from the last axis, so
that it holds for stacked layers too). Everything runs in one jax.shard_map: each device computes its own row with its
own heads and ffn columns, and partial sums are added up twice a layer (Shoeybi et al. 2019, "Megatron-LM").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from jaxrank.errors import UnsupportedError

DATA, MODEL = "data", "model"


def make_mesh(devices: Sequence[Any], model: int = 1) -> Mesh:
    """All JAX devices, `model` of them to a copy of the weights, neighbours together."""
    if len(devices) % model:
        raise UnsupportedError(f"{len(devices)} devices cannot be split into groups of {model}; choose a divisor")
    return Mesh(np.array(devices).reshape(-1, model), (DATA, MODEL))


def specs(state: Any, mesh: Mesh) -> Any:
    """How each parameter of a model's state lies on the mesh, as a tree of PartitionSpecs.

    UnsupportedError if an axis that is to be cut is no multiple of the mesh's "model" axis.
    """
    parts = mesh.shape[MODEL]

    def spec(parameter: nnx.Variable[Any]) -> PartitionSpec:
        axis = parameter.get_metadata().get("shard")
        if axis is None:
            return PartitionSpec()
        size = parameter.shape[axis]
        if size % parts:
            raise UnsupportedError(
                f"the model has {size} heads or ffn columns, which {parts} devices cannot share evenly; "
                "choose a divisor of its key/value heads"
            )
        before = len(parameter.shape) + axis
        return PartitionSpec(*[None] * before, MODEL)

    return jax.tree.map(spec, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def over_mesh(score: Callable[[Any, Any], jax.Array], state: Any, mesh: Mesh) -> Callable[[Any, Any], jax.Array]:
    """(state, packed row) -> logits [S] of one device, as (state, rows stacked on a leading axis) -> logits [rows, S]
    of the mesh; as many rows as its "data" axis has devices."""

    def one_row(state: Any, rows: Any) -> jax.Array:
        return score(state, jax.tree.map(lambda leaf: leaf[0], rows))[None]

    return jax.shard_map(
        one_row,
        mesh=mesh,
        in_specs=(specs(state, mesh), PartitionSpec(DATA)),
        out_specs=PartitionSpec(DATA),
        check_vma=False,
    )


def sum_over_shards(x: jax.Array) -> jax.Array:
    """A sum over heads or ffn columns, of which every device has a part, as the whole sum; x itself on one device."""
    mesh = jax.sharding.get_abstract_mesh()  # empty outside over_mesh
    return jax.lax.psum(x, MODEL) if MODEL in mesh.manual_axes and mesh.shape[MODEL] > 1 else x
