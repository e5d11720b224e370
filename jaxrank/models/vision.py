"""The vision tower of Qwen3-VL: patches of images and video steps in, features of media tokens out.

Qwen Team 2025, "Qwen3-VL Technical Report". The computation is that of transformers' Qwen3VLVisionModel. A learned
table of positions is read between its entries. Heads are turned by row and column. A patch sees the patches of its own
image or video step. Blocks of merge x merge patches become one token. This is done after the last layer, and after some
earlier layers for the first text layers (Meng et al. 2024, "DeepStack").
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from jaxrank.errors import UnsupportedError
from jaxrank.kernels import attention
from jaxrank.kernels.rotary import Rotary, grid_rotary, turn
from jaxrank.models.layers import (
    LayerNorm,
    Projection,
    add_by_heads,
    add_drawn,
    einsum,
    gelu,
    in_runs,
    refuse,
    rounded_product,
    run_layers,
    some_heads,
    table_rows,
    weight,
)
from jaxrank.types import ArrayLike, AttentionShape, Config, Layout, PatchRow

EPS = 1e-6
"""The eps of every norm of the tower. config.json does not give it."""


@dataclass(frozen=True)
class VisionConfig:
    """The settings of the tower.

    Attributes:
        layers: the number of layers of the whole tower.
        deepstack: the layers, counted from 0, after which features are taken.
        side: the number of rows and of columns of the position table.
        out_width: the text model's width.
        channels: the channels of a patch's values.
        steps: the frames of a patch's values.
    """

    width: int
    layers: int
    heads: int
    ffn: int
    out_width: int
    side: int
    merge: int
    patch: int
    steps: int
    channels: int
    theta: float
    deepstack: tuple[int, ...]

    @property
    def head_size(self) -> int:
        return self.width // self.heads

    @property
    def attention(self) -> AttentionShape:
        return AttentionShape(self.heads, self.heads, self.head_size)

    @property
    def values(self) -> int:
        """E, the number of values of a patch: channels, frames, rows, columns."""
        return self.channels * self.steps * self.patch**2

    @property
    def stages(self) -> list[tuple[int, int]]:
        """The first layer of each stage, and the layer after its last. Features are taken where a stage ends."""
        return list(pairwise([0, *(i + 1 for i in self.deepstack), self.layers]))

    @property
    def features(self) -> int:
        """U, the number of feature vectors of a media token."""
        return 1 + len(self.deepstack)

    @classmethod
    def read(cls, config: Config) -> VisionConfig:
        """Read the vision_config of config.json.

        Raises:
            UnsupportedError: a field has a value that would change the result and is not implemented.
        """
        width, heads, depth = config["hidden_size"], config["num_heads"], config["depth"]
        entries, deepstack = config["num_position_embeddings"], tuple(config["deepstack_visual_indexes"])
        side = math.isqrt(entries)
        rotary = config.get("rope_parameters") or {}
        refuse(
            {
                "vision_config.hidden_act": (config["hidden_act"], "gelu_pytorch_tanh"),
                "vision_config.rope_type": (rotary.get("rope_type", "axial"), "axial"),
                "vision_config.num_position_embeddings": (entries, side**2),
                "vision_config.deepstack_visual_indexes": (deepstack, tuple(sorted({*deepstack} & {*range(depth)}))),
            }
        )
        if width % heads or width // heads % 4:
            raise UnsupportedError(
                f"config.json: vision_config.hidden_size {width} is not num_heads {heads} times a multiple of 4"
            )
        return cls(
            width=width,
            layers=depth,
            heads=heads,
            ffn=config["intermediate_size"],
            out_width=config["out_hidden_size"],
            side=side,
            merge=config["spatial_merge_size"],
            patch=config["patch_size"],
            steps=config["temporal_patch_size"],
            channels=config["in_channels"],
            theta=float(rotary.get("rope_theta", 10_000.0)),
            deepstack=deepstack,
        )


class Attention(nnx.Module):
    """Attention with queries, keys and values in one kernel, as they are published. Queries and keys are turned."""

    def __init__(self, config: VisionConfig, dtype: DTypeLike, rngs: nnx.Rngs | None, implementation: str | None):
        wide, size = config.width, config.head_size
        self.norm = LayerNorm(wide, EPS, implementation)
        self.qkv = Projection(wide, 3 * wide, dtype, rngs, shard=-1, members=3, size=size)
        self.out = Projection(wide, wide, dtype, rngs, shard=-2, size=size)
        self.size = size
        self.implementation = implementation

    def __call__(self, x: Float32[Array, "P D"], layout: Layout, rotary: Rotary) -> Float32[Array, "P D"]:
        """Return x plus the attention among its rows. In a long row a few heads are computed at a time."""
        size, asking = self.size, x
        how: Any = dict(used=layout.used, implementation=self.implementation)

        def add_heads(i: Array | int, group: int, x: Array) -> Array:
            kernel, bias = (some_heads(weights[...], i, group, size, 3) for weights in (self.qkv.kernel, self.qkv.bias))

            def some(_: Any, y: Array, *by: Array) -> list[Array]:
                z = rounded_product(self.norm(y), kernel, self.implementation, bias)
                q, k, v = (part.reshape(len(z), group, size) for part in jnp.split(z, 3, 1))
                q, k = (turn(part.astype(jnp.float32), Rotary(*by)).astype(z.dtype) for part in (q, k))
                return [q, k, v]

            q, k, v = in_runs(some, None, asking, *rotary, **how)
            drawn = attention(q, k, v, layout, scale=size**-0.5, implementation=self.implementation)
            return add_drawn(x, drawn, some_heads(self.out.kernel[...], i, group, size, 1, axis=-2), **how)

        heads = self.out.kernel.shape[0] // size
        return add_by_heads(add_heads, x, heads, len(x), self.implementation) + self.out.bias[...]


class Layer(nnx.Module):
    """Pre-norm transformer layer in which attention goes in both directions."""

    def __init__(self, config: VisionConfig, dtype: DTypeLike, rngs: nnx.Rngs | None, implementation: str | None):
        self.attention = Attention(config, dtype, rngs, implementation)
        self.norm = LayerNorm(config.width, EPS, implementation)
        self.up = Projection(config.width, config.ffn, dtype, rngs, shard=-1)
        self.down = Projection(config.ffn, config.width, dtype, rngs, shard=-2)
        self.implementation = implementation

    def __call__(self, x: Float32[Array, "P D"], layout: Layout, rotary: Rotary) -> Float32[Array, "P D"]:
        return in_runs(
            self.feed_forward,
            self.attention(x, layout, rotary),
            used=layout.used,
            implementation=self.implementation,
        )

    def feed_forward(self, x: Float32[Array, "P D"]) -> Float32[Array, "P D"]:
        inner = jax.nn.gelu(self.up.rounded(self.norm(x), self.implementation), approximate=True)
        return self.down.add_to(x, inner)


class Merger(nnx.Module):
    """Merge blocks of patches that stand together into one vector of the text model's width.

    The norm is over each patch for the main features, and over the whole block for the features of deepstack.
    """

    def __init__(
        self,
        config: VisionConfig,
        dtype: DTypeLike,
        rngs: nnx.Rngs | None,
        implementation: str | None,
        *,
        norm_block: bool,
    ):
        block = config.merge**2 * config.width
        self.norm = LayerNorm(block if norm_block else config.width, EPS, implementation)
        self.up = Projection(block, block, dtype, rngs, shard=-1)
        self.down = Projection(block, config.out_width, dtype, rngs, shard=-2)
        self.patches = config.merge**2
        self.implementation = implementation

    def __call__(self, x: Float32[Array, "P D"], used: ArrayLike) -> Float[Array, "R out"]:
        """Return R = P / merge^2 vectors in the matrices' dtype. `used` is the number of patches without filler."""

        def some(_: Array, blocks: Array) -> Array:
            normed = self.norm(blocks.reshape(-1, len(self.norm.scale))).reshape(blocks.shape)
            return self.down(gelu(self.up.rounded(normed, self.implementation))).astype(self.down.kernel.dtype)

        blocks = x.reshape(len(x) // self.patches, -1)
        empty = jnp.zeros((len(blocks), self.down.kernel.shape[-1]), self.down.kernel.dtype)
        return in_runs(some, empty, blocks, used=used // self.patches, implementation=self.implementation)


class Vision(nnx.Module):
    """The tower: a row of P patches in, features [P / merge^2, U, D of the text model] out.

    The features are in the dtype of the matrices, as word embeddings are. The first feature stands in a word's place.
    The first text layers add the others.

    Matrices and what is multiplied with them are in `dtype`. The residual stream, norms, biases and all sums are
    float32. `implementation` is that of kernels.attention. A stage is the layers up to one whose output is merged.
    Stages can be stacked one by one (see layers.stack).
    """

    def __init__(
        self, config: VisionConfig, *, dtype: DTypeLike, rngs: nnx.Rngs | None, implementation: str | None = None
    ):
        self.config = config
        self.implementation = implementation
        self.patch = weight(rngs, (config.width, config.values), dtype)
        self.patch_bias = nnx.Param(jnp.zeros(config.width, jnp.float32))
        self.position = weight(rngs, (config.side**2, config.width), dtype)
        self.stages = nnx.List(
            [
                nnx.List([Layer(config, dtype, rngs, implementation) for _ in range(start, end)])
                for start, end in config.stages
            ]
        )
        self.mergers = nnx.List(
            [Merger(config, dtype, rngs, implementation, norm_block=True) for _ in config.deepstack]
        )
        self.merger = Merger(config, dtype, rngs, implementation, norm_block=False)

    def embed(self, row: PatchRow) -> tuple[Float32[Array, "P D"], tuple[Any, ...]]:
        """Return the first layer's input, and the other arguments of every layer."""

        def some(_: Array, pixels: Array, corners: Array, weights: Array) -> Array:
            x = einsum("PE,DE->PD", pixels.astype(self.patch.dtype), self.patch[...]) + self.patch_bias[...]
            for i in range(corners.shape[1]):
                x += weights[:, i, None] * table_rows(self.position[...], corners[:, i], self.implementation)
            return x

        empty = jnp.zeros((len(row.pixels), self.config.width), jnp.float32)
        sources = row.pixels, row.corners, row.weights
        x = in_runs(some, empty, *sources, used=row.layout.used, implementation=self.implementation)
        return x, (row.layout, grid_rotary(row.positions, self.config.head_size, self.config.theta))

    def __call__(self, row: PatchRow) -> Float[Array, "R U D"]:
        x, shared = self.embed(row)
        features = []
        for stage, merger in zip(self.stages, [*self.mergers, self.merger], strict=True):
            x = run_layers(stage, x, *shared)
            features.append(merger(x, row.layout.used))
        return jnp.stack([features[-1], *features[:-1]], 1)
