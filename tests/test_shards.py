"""Each device's part is filled from rows of the tensor alone, however tensor and parameter differ."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxrank.convert.rules import FLAT, ROW, SAME, Transform, linear
from jaxrank.sharding import make_mesh
from jaxrank.shards import Building, Slot, slot_of

# A parameter's shape, the axis that is cut, the transform, and its tensor, written out by hand.
CASES: dict[str, tuple[tuple[int, ...], int | None, Transform, Callable[[np.ndarray], np.ndarray]]] = {
    "columns of a projection": ((6, 16), 1, linear(), lambda p: p.T),
    "its rows": ((16, 6), 0, linear(), lambda p: p.T),
    "heads of queries": ((6, 8, 5), 1, linear(), lambda p: p.reshape(6, 40).T),
    "heads of the output": ((8, 5, 6), 0, linear(inputs=2), lambda p: p.reshape(40, 6).T),
    "heads of three projections in one": ((6, 3, 8, 5), 2, linear(), lambda p: p.reshape(6, 120).T),
    "heads of a bias": ((8, 5), 0, FLAT, lambda p: p.reshape(40)),
    "heads of three biases in one": ((3, 8, 5), 1, FLAT, lambda p: p.reshape(120)),
    "as it is": ((8, 3, 5), 0, SAME, lambda p: p),
    "as it is, its last axis cut": ((3, 5, 8), 2, SAME, lambda p: p),
    "whole": ((7, 4), None, linear(), lambda p: p.T),
    "a row, whole": ((7,), None, ROW, lambda p: p[None]),
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
