"""Features of images and video in rows of a few sizes, against the tower called on each alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrank.models.vision import Vision, VisionConfig
from jaxrank.runtime.compile_cache import CompilationCounter
from jaxrank.runtime.patch_packing import pack_patches
from jaxrank.runtime.vision_encoder import Tower, compile_in_parts, compile_whole
from jaxrank.types import Patches

SIZES: dict[str, Any] = dict(
    width=32, layers=3, heads=2, ffn=64, out_width=16, side=6, merge=2, patch=4, steps=2, channels=3, theta=1e4
)
GRIDS = [(1, 4, 6), (3, 6, 4), (1, 2, 2), (1, 12, 8), (1, 8, 40), (1, 4, 4)]


def vision(deepstack: tuple[int, ...], dtype: str = "float32") -> Any:
    """A random tower whose features differ."""
    tower = Vision(VisionConfig(**SIZES, deepstack=deepstack), dtype=dtype, rngs=nnx.Rngs(0))
    graph, state = nnx.split(tower)
    return nnx.merge(graph, jax.tree.map(lambda leaf: leaf * 5 if leaf.ndim > 1 else leaf, state))


@pytest.fixture(scope="module")
def media() -> list[Patches]:
    rng = np.random.default_rng(0)
    return [Patches(rng.normal(size=(t * h * w, 96)).astype(np.float32), (t, h, w)) for t, h, w in GRIDS]


def row(media: list[Patches], patches: int) -> Any:
    return pack_patches(media, patches, values=96, merge=2, side=6)


@pytest.mark.parametrize("deepstack", [(0, 1), (1, 2), (2,), ()])
@pytest.mark.parametrize("compile", [compile_in_parts, compile_whole])
def test_programs(media: list[Patches], compile: Callable[..., Any], deepstack: tuple[int, ...]) -> None:
    want = np.asarray(vision(deepstack)(jax.tree.map(jnp.asarray, row(media[:4], 256))))[:49]
    assert want.shape == (49, 1 + len(deepstack), 16)
    assert want.std(0).min() > 0.05
    got = np.asarray(compile(vision(deepstack))(row([], 256))(row(media[:4], 256)))[:49]
    assert np.abs(got - want).max() <= 1e-5


def test_each_medium_gets_its_own(media: list[Patches]) -> None:
    """In rows that hold several, whatever their order."""
    tower = Tower(vision((0, 1)), ladder=(64, 128, 512), row_patches=128)
    features = tower(media)
    assert sorted(tower.programs) == [128, 512]
    for one, got in zip(media, features, strict=True):
        assert got.shape == (len(one.pixels) // 4, 3, 16)
        assert np.abs(got - tower([one])[0]).max() <= 1e-5
    assert np.abs(features[0][:4] - features[5]).max() > 0.1, "else an exchange would not be seen"


def test_nothing_is_compiled_after_warm_up(media: list[Patches]) -> None:
    tower, lines = Tower(vision((0, 1)), ladder=(128, 512), row_patches=128), []
    tower.warm_up(lines.append)
    assert [line.partition(":")[0] for line in lines] == ["row of 128 patches", "row of 512 patches"]
    counter = CompilationCounter()
    tower(media)
    assert counter.count == 0


def test_dtype_is_that_of_the_matrices(media: list[Patches]) -> None:
    [features] = Tower(vision((0,), "bfloat16"), ladder=(64,))(media[:1])
    assert features.dtype == jnp.bfloat16


def test_no_media() -> None:
    assert Tower(vision(()), ladder=(64,))([]) == []


def test_too_large(media: list[Patches]) -> None:
    with pytest.raises(ValueError, match=r"320 patches fit no row of \[64\]"):
        Tower(vision(()), ladder=(64,), row_patches=64)(media)
