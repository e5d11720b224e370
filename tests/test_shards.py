"""Each device's part is filled from rows of the tensor alone, however tensor and parameter differ."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jaxrank.convert.rules import FLAT, LINEAR, ROW, SAME, Transform, in_order, members
from jaxrank.sharding import arranged, make_mesh
from jaxrank.weights.shards import Building, Slot, slot_of

# A parameter's shape, the axis that is cut, the transform, and its tensor, written out by hand.
CASES: dict[str, tuple[tuple[int, ...], int | None, Transform, Callable[[np.ndarray], np.ndarray]]] = {
    "columns of a projection": ((6, 16), 1, LINEAR, lambda p: p.T),
    "its rows": ((16, 6), 0, LINEAR, lambda p: p.T),
    "a bias": ((16,), 0, SAME, lambda p: p),
    "scales, a column each": ((1, 16), 1, FLAT, lambda p: p[0]),
    "as it is": ((8, 3, 5), 0, SAME, lambda p: p),
    "as it is, its last axis cut": ((3, 5, 8), 2, SAME, lambda p: p),
    "whole": ((7, 4), None, LINEAR, lambda p: p.T),
    "a row, whole": ((7,), None, ROW, lambda p: p[None]),
    "one column, whole": ((7,), None, LINEAR, lambda p: p[None]),
    "a number": ((), None, FLAT, lambda p: p.reshape(1)),
}


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_every_device_has_its_part(name: str, stacked: bool) -> None:
    shape, axis, transform, tensor_of = CASES[name]
    rng = np.random.default_rng(0)
    whole = rng.normal(size=(3, *shape) if stacked else shape).astype(np.float32)
    mesh = make_mesh(jax.devices(), 4)
    spec: list[str | None] = [None] * whole.ndim
    if axis is not None:
        spec[axis + stacked] = "model"
    place = NamedSharding(mesh, PartitionSpec(*spec))
    building = Building(whole.shape, np.dtype(np.float32), place)
    assert len(building.parts) == (1 if axis is None else 4), "the two copies are filled once"
    for i in range(3) if stacked else [None]:
        tensor = tensor_of(whole if i is None else whole[i])
        views, first = building.views(i, transform.flat, transform.transposed), 0
        while first < len(tensor):
            rows = tensor[first : first + int(rng.integers(1, 8))]
            for view in views:
                view.write(first, rows)
            first += len(rows)
    array = building.finish()
    assert array.sharding == place
    np.testing.assert_array_equal(np.asarray(array), whole)
    for shard in array.addressable_shards:
        assert shard.data.size == whole.size // (1 if axis is None else 4)
        np.testing.assert_array_equal(np.asarray(shard.data), whole[shard.index])


def test_slots() -> None:
    model = dict.fromkeys(["layers/norm", "last/norm", "mergers/0/norm", "stages/0/up", "stages/1/up", "adding/2/up"])
    assert slot_of("layers/12/norm", model) == Slot("layers/norm", 12)
    assert slot_of("last/norm", model) == Slot("last/norm")
    assert slot_of("mergers/0/norm", model) == Slot("mergers/0/norm")
    assert slot_of("stages/0/1/up", model) == Slot("stages/0/up", 1)
    assert slot_of("adding/2/up", model) == Slot("adding/2/up")


# Three queries, a key and a value for each of 4 key heads of size 5.
D, K, H = 6, 4, 5
QUERIES, KEYS, VALUES = (members(LINEAR, 5, *own, H) for own in ((0, 3), (3, 4), (4, 5)))
RNG = np.random.default_rng(1)
Q, KEY, V = RNG.normal(size=(K * 3 * H, D)), RNG.normal(size=(K * H, D)), RNG.normal(size=(K * H, D))
OUT, ALL = RNG.normal(size=(D, K * 3 * H)), RNG.normal(size=(3 * K * H, D))


def heads_of(device: int, shards: int) -> range:
    return range(device * K // shards, (device + 1) * K // shards)


def q_k_v(device: int, shards: int) -> np.ndarray:
    """[D, columns], head by head: query 0 of each key head, query 1, query 2, the keys, the values."""
    q, k, v = Q.reshape(K, 3, H, D), KEY.reshape(K, H, D), V.reshape(K, H, D)
    mine = [q[head, query] for query in range(3) for head in heads_of(device, shards)]
    mine += [x[head] for x in (k, v) for head in heads_of(device, shards)]
    return np.concatenate(mine).T


def output(device: int, shards: int) -> np.ndarray:
    out = OUT.reshape(D, K, 3, H)
    return np.concatenate([out[:, head, query].T for query in range(3) for head in heads_of(device, shards)])


def fused(device: int, shards: int) -> np.ndarray:
    mine = ALL.reshape(3, K, H, D)
    return np.concatenate([mine[member, head] for member in range(3) for head in heads_of(device, shards)]).T


MEMBERS: dict[str, tuple[tuple[int, int], int, list[tuple[Transform, np.ndarray]], Any]] = {
    "queries, keys, values": ((D, 5 * K * H), 1, [(QUERIES, Q), (KEYS, KEY), (VALUES, V)], q_k_v),
    "the output's rows": ((3 * K * H, D), 0, [(members(LINEAR, 3, 0, 3, H, axis=-2), OUT)], output),
    "one tensor of all": ((D, 3 * K * H), 1, [(in_order(LINEAR, 3), ALL)], fused),
}


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("name", MEMBERS)
def test_members_of_one_parameter(name: str, shards: int) -> None:
    """What the checkpoint has in several tensors, or in another order, lies where its device wants it."""
    shape, axis, parts, want = MEMBERS[name]
    place = NamedSharding(
        make_mesh(jax.devices(), shards), PartitionSpec(*["model" if i == axis else None for i in (0, 1)])
    )
    building = Building(shape, np.dtype(np.float64), place)
    for memory in building.parts.values():
        memory[...] = np.nan
    for transform, tensor in parts:
        assert transform.source_shape(shape) == tensor.shape
        for view in building.views(None, transform.flat, transform.transposed, transform.part):
            for first in range(0, len(tensor), 7):
                view.write(first, tensor[first : first + 7])
    for cut, memory in building.parts.items():
        np.testing.assert_array_equal(memory, want(cut[axis].start // len(cut[axis]), shards))
    together = sum(transform.fills(shape).astype(int) for transform, _ in parts)
    np.testing.assert_array_equal(together, 1)


@pytest.mark.parametrize("now, then", [(1, 4), (4, 1), (2, 4), (2, 2)])
def test_columns_arranged_for_other_devices(now: int, then: int) -> None:
    """As when a model that was loaded for one device is spread, or one that was spread is saved."""

    def of(shards: int) -> np.ndarray:
        return np.concatenate([q_k_v(device, shards) for device in range(shards)], 1)

    parameter = nnx.Param(jnp.asarray(of(now)), shard=-1, members=5, size=H, shards=now)
    state = arranged({"qkv": parameter, "other": nnx.Param(jnp.ones(3))}, then)
    np.testing.assert_array_equal(state["qkv"].get_value(), of(then).astype(np.float32))
    assert state["qkv"].get_metadata()["shards"] == then
