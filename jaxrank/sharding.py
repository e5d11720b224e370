"""One model on several devices: rows over the mesh axis "data", heads and feed-forward over the axis "model".

The metadata `shard` of a parameter says which of its axes is cut. It is counted from the last axis, so it holds for
stacked layers too. An axis may hold several members side by side (`members`), such as queries, keys and values. Each
member consists of heads that cannot be cut (`size`); see `arranged`.

Everything runs in one jax.shard_map. Each device computes its own row with its own heads and ffn columns, and partial
sums are added up twice a layer (Shoeybi et al. 2019, "Megatron-LM").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrank.errors import UnsupportedError

DATA, MODEL = "data", "model"

ROOM = 0.75
"""The share of a device's memory that weights may take.

The rest is for the programs and for what a row needs. The largest row needs 2.7 GB, for 8B's shape at 16,384 tokens.
"""


def make_mesh(devices: Sequence[Any], model: int = 1) -> Mesh:
    """Return a mesh of all JAX devices, with `model` neighbouring devices for each copy of the weights.

    Raises:
        UnsupportedError: the devices cannot be split into such groups.
    """
    if len(devices) % model:
        raise UnsupportedError(f"{len(devices)} devices cannot be split into groups of {model}; choose a divisor")
    return Mesh(np.array(devices).reshape(-1, model), (DATA, MODEL))


def choose_mesh(
    model: nnx.Module, devices: Sequence[Any], data: int | None = None, tensor: int | None = None
) -> Mesh | None:
    """Choose the mesh for a model's outline. None means one device alone.

    Args:
        model: the outline.
        devices: the devices.
        data: the number of copies of the weights. The default is as many as the devices allow.
        tensor: the number of devices that share a copy. The default is the smallest number on which the weights fit.

    Raises:
        UnsupportedError: the devices do not allow it, or one of several processes would have no part in it.
    """
    count, state = len(devices), nnx.state(model)
    least = [1 if number is None else number for number in (data, tensor)]
    if min(least) < 1 or math.prod(least) > count:
        raise UnsupportedError(
            f"{least[0]} copies of the weights, each on {least[1]} devices, are asked for; there are {count} devices"
        )
    own = [device for device in devices if device.process_index == jax.process_index()]  # only own devices can be asked
    memory = min((device.memory_stats() or {}).get("bytes_limit", math.inf) for device in own)
    shares = [tensor] if tensor else [n for n in range(1, count // least[0] + 1) if count % n == 0]
    refused: UnsupportedError | None = None
    for share in shares:
        try:
            need = bytes_each(state, share)
        except UnsupportedError as error:  # so many devices cannot share the heads
            refused = error
            continue
        if tensor or need <= ROOM * memory:
            copies = data or count // share
            kept = devices[: copies * share]
            if idle := {device.process_index for device in devices} - {device.process_index for device in kept}:
                raise UnsupportedError(
                    f"{copies} copies of the weights, each on {share} devices, leave process {min(idle)} without one; "
                    f"use all {count} devices, or start fewer processes"
                )
            return None if len(kept) == 1 else make_mesh(kept, share)
        refused = UnsupportedError(
            f"the weights take {need / 1e9:.1f} GB on each of {share} devices, of {memory / 1e9:.1f} GB each; take "
            "more or larger devices, fewer copies, or a smaller model"
        )
    raise refused or UnsupportedError(f"{count} devices cannot be shared; choose how many share a copy")


def bytes_each(state: Any, parts: int) -> int:
    """Return the bytes of a model's state on each of the devices that share it.

    Raises:
        UnsupportedError: as in `specs`.
    """

    def each(array: Any, axis: int | None) -> int:
        return array.size * array.dtype.itemsize // (1 if axis is None else parts)

    return sum(jax.tree.leaves(_map_cuts(each, state, parts)))


def specs(state: Any, mesh: Mesh) -> Any:
    """Return how each array of a model's state lies on the mesh, as a state of PartitionSpecs.

    Raises:
        UnsupportedError: an axis that is to be cut is not a multiple of the mesh's "model" axis.
    """

    def spec(array: Any, axis: int | None) -> PartitionSpec:
        return PartitionSpec() if axis is None else PartitionSpec(*[None] * (len(array.shape) + axis), MODEL)

    return _map_cuts(spec, state, mesh.shape[MODEL])


def shardings(state: Any, mesh: Mesh) -> Any:
    """Return `specs` as a tree of NamedShardings, for jax.device_put."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs(state, mesh))


def _map_cuts(f: Callable[[Any, int | None], Any], state: Any, parts: int) -> Any:
    """Return the state with f(array, axis) for every array.

    The axis, counted from the last, is the one that `parts` devices share. It is None where each device has the whole
    array. This includes the scales of int8 weights that hold for the whole axis.
    """

    def of(parameter: nnx.Variable[Any]) -> nnx.Variable[Any]:
        metadata = parameter.get_metadata()
        axis = metadata.get("shard")
        size = 1 if axis is None else parameter.shape[axis]
        heads = size // (metadata.get("members", 1) * metadata.get("size", 1))
        if axis is not None and heads % parts:
            raise UnsupportedError(
                f"the model has {heads} heads or ffn columns, which {parts} devices cannot share evenly; "
                "choose a divisor of its key/value heads"
            )
        return jax.tree.map(
            lambda array: f(array, None if axis is None or array.shape[axis] < size else axis), parameter
        )

    return jax.tree.map(of, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def placed_order(members: int, columns: int, shards: int) -> np.ndarray:
    """Return the order of columns, member by member, after placement for so many devices.

    Each device has its part of every member, one after the other.
    """
    return np.arange(columns).reshape(members, shards, -1).swapaxes(0, 1).ravel()


def arranged(state: Any, shards: int) -> Any:
    """Return a model's state with its columns in the order for so many devices that share an axis.

    In this order the parts of all members that a device has lie side by side. So its part of the axis is one cut. The
    metadata `shards` of a parameter says for how many devices it is arranged.
    """

    def of(parameter: nnx.Variable[Any]) -> nnx.Variable[Any]:
        metadata = parameter.get_metadata()
        members, now, axis = (metadata.get(name, 1) for name in ("members", "shards", "shard"))
        if members == 1 or now == shards:
            return parameter
        size = parameter.shape[axis]
        order = np.argsort(placed_order(members, size, now))[placed_order(members, size, shards)]

        def moved(array: Any) -> Any:
            if array.shape[axis] < size or isinstance(array, jax.ShapeDtypeStruct):
                return array
            return jnp.take(array, order, axis=axis)

        return parameter.replace(jax.tree.map(moved, parameter.get_value()), shards=shards)

    return jax.tree.map(of, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def over_mesh(score: Callable[[Any, Any], jax.Array], state: Any, mesh: Mesh) -> Callable[[Any, Any], jax.Array]:
    """Turn a program for one device into one for the mesh.

    The program is (state, packed row) -> logits [S]. The result is (state, rows stacked on a leading axis) -> logits
    [rows, S]. The number of rows is the size of the mesh's "data" axis. If several processes have the mesh's devices,
    each gets all logits.
    """
    spread = mesh.is_multi_process and mesh.shape[DATA] > 1

    def one_row(state: Any, rows: Any) -> jax.Array:
        logits = score(state, jax.tree.map(lambda leaf: leaf[0], rows))[None]
        return jax.lax.all_gather(logits, DATA, tiled=True) if spread else logits

    return jax.shard_map(
        one_row,
        mesh=mesh,
        in_specs=(specs(state, mesh), PartitionSpec(DATA)),
        out_specs=PartitionSpec(None if spread else DATA),
        check_vma=False,
    )


def sum_over_shards(x: jax.Array) -> jax.Array:
    """Return the whole sum over heads or ffn columns, of which every device has a part.

    On one device this is x itself.
    """
    mesh = jax.sharding.get_abstract_mesh()  # it is empty outside over_mesh
    return jax.lax.psum(x, MODEL) if MODEL in mesh.manual_axes and mesh.shape[MODEL] > 1 else x
