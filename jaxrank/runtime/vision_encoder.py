"""Runs the vision tower: images and video in, features of their tokens out, by programs of a few static sizes."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Float

from jaxrank.media.grid import PATCH_LADDER
from jaxrank.models.vision import VisionConfig
from jaxrank.runtime.attention import settle
from jaxrank.runtime.patch_packing import USUAL_PATCHES, cut_features, pack_patches, patch_bucket, plan_patches
from jaxrank.runtime.programs import Batched, ahead_of_time, fetched, one_by_one, side_by_side, whole_tower
from jaxrank.sharding import DATA
from jaxrank.types import ArrayLike, Patches, PatchRow

Program = Callable[[PatchRow], ArrayLike]
"""A program compiled for one size: a row of patches in, features [P / merge^2, U, D] out."""


def compile_whole(vision: Any) -> Callable[[PatchRow], Program]:
    """Return the compiler for accelerators: a size is one program, with a scan over the layers of each stage."""
    return ahead_of_time(*whole_tower(vision))


def compile_in_parts(vision: Any) -> Callable[[PatchRow], Program]:
    """Return the compiler for CPU: a size is four programs.

    One is for what comes before the layers, one for each of the layers, and two for the two kinds of mergers. For the
    reason see programs.compile_in_parts.
    """
    graph, state = nnx.split(vision)
    ends: Any = nnx.merge(graph, state)
    stages = [[nnx.split(layer) for layer in stage] for stage in ends.stages]
    mergers = [nnx.split(merger) for merger in [*ends.mergers, ends.merger]]
    for name in ("stages", "mergers", "merger"):
        delattr(ends, name)
    ends_graph, ends_state = nnx.split(ends)
    layers = [layer for stage in stages for layer in stage]

    def compile(sample: PatchRow) -> Program:
        def embed(state: Any, row: PatchRow) -> Any:
            return nnx.merge(ends_graph, state).embed(row)

        def run(graph: Any, state: Any, x: jax.Array, *args: Any) -> Any:
            return nnx.merge(graph, state)(x, *args)

        def compiled(part: tuple[Any, Any], *args: Any, **options: Any) -> Any:
            return jax.jit(partial(run, part[0]), **options).lower(part[1], *args).compile()

        x, shared = jax.eval_shape(embed, ends_state, sample)
        used = np.asarray(sample.layout.used)
        first = jax.jit(embed).lower(ends_state, sample).compile()
        between = [compiled(layer, x, *shared, donate_argnums=1) for layer in layers[:1]]
        deep, main = (compiled(merger, x, used) for merger in (mergers[0], mergers[-1]))
        merge = [deep] * (len(mergers) - 1) + [main]

        def program(row: PatchRow) -> np.ndarray:
            x, shared = first(ends_state, row)
            features = []
            for stage, merged, (_, merger) in zip(stages, merge, mergers, strict=True):
                for _, state in stage:
                    # Wait for the result, because calls that wait in line hold their memory.
                    x = between[0](state, x, *shared).block_until_ready()
                features.append(np.asarray(merged(merger, x, np.asarray(row.layout.used))))
            return np.stack([features[-1], *features[:-1]], 1)

        return program

    return compile


class Tower:
    """Compute features of images and video, from rows of a few static sizes.

    The tower gets its attention body here, and `attention` names it (see jaxrank.runtime.attention.settle). Programs
    are compiled by `warm_up`, or at first use.

    Args:
        vision: a model's tower. It is taken apart.
        ladder: the static sizes, in patches.
        row_patches: images share rows of up to this number of patches.
        mesh: the devices, if there are several. Each copy of the weights takes a row of its own.
    """

    def __init__(
        self,
        vision: Any,
        *,
        ladder: Sequence[int] = PATCH_LADDER,
        row_patches: int = USUAL_PATCHES,
        mesh: Mesh | None = None,
    ):
        self.config: VisionConfig = vision.config
        self.ladder, self.row_patches = ladder, row_patches
        self.copies = 1 if mesh is None else mesh.shape[DATA]
        self.attention = settle(vision, causal=False, dtype=vision.position.dtype, mesh=mesh)
        if mesh is not None:
            self.compile = side_by_side(*whole_tower(vision, mesh), mesh)
        else:
            one = compile_in_parts(vision) if jax.default_backend() == "cpu" else compile_whole(vision)
            self.compile = one_by_one(one)
        self.programs: dict[int, Batched] = {}
        self.encoded = 0
        self._made: weakref.WeakKeyDictionary[Patches, Any] = weakref.WeakKeyDictionary()

    def warm_up(self, progress: Callable[[str], None] | None = None) -> None:
        """Compile every size, or load it from the cache.

        Args:
            progress: a function that is called with one line of text for each size.
        """
        for patches in self.ladder:
            start = time.perf_counter()
            self._program(patches)
            if progress:
                progress(f"row of {patches} patches: compiled in {time.perf_counter() - start:.2f} s")

    def _row(self, media: Sequence[Patches], patches: int) -> PatchRow:
        config = self.config
        sizes: dict[str, int] = dict(values=config.values, merge=config.merge, side=config.side)
        return pack_patches(media, patches, **sizes, implementation=self.attention.implementation)

    def _program(self, patches: int) -> Batched:
        if patches not in self.programs:
            self.programs[patches] = self.compile(self._row([], patches))
        return self.programs[patches]

    def of(self, media: Iterable[Patches]) -> dict[Patches, Float[np.ndarray, "tokens U D"]]:
        """Return the features of each of `media`.

        They are computed once for as long as something holds the patches. This helps large requests, whose parts are
        scored in several turns. `encoded` counts the items that were computed.

        Raises:
            ValueError: as in a call.
        """
        wanted = dict.fromkeys(media)
        new = [one for one in wanted if one not in self._made]
        self._made.update(zip(new, self(new), strict=True))
        self.encoded += len(new)
        return {one: self._made[one] for one in wanted}

    def __call__(self, media: Sequence[Patches]) -> list[Float[np.ndarray, "tokens U D"]]:
        """Return the features of each of `media`, in their order and in the dtype of the matrices.

        Raises:
            ValueError: an item fits no row, or its pixels do not fit its grid.
        """
        features: list[Any] = [None] * len(media)
        rows = plan_patches(media, self.row_patches)
        sizes = [patch_bucket(sum(len(media[i].pixels) for i in row), self.ladder) for row in rows]
        order = sorted(range(len(rows)), key=lambda i: -sizes[i])
        for first in range(0, len(order), self.copies):
            together = order[first : first + self.copies]  # all get the size of the largest one
            patches = sizes[together[0]]
            packed = [self._row([media[i] for i in rows[row]], patches) for row in together]
            packed += [self._row([], patches)] * (self.copies - len(together))
            made = fetched(self._program(patches)(packed))
            for row, mine in zip(together, made, strict=False):  # There may be fewer rows than copies.
                cut = cut_features(mine, [media[i].grid for i in rows[row]], self.config.merge)
                for i, one in zip(rows[row], cut, strict=True):
                    features[i] = one
        return features
