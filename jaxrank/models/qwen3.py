"""Qwen3 decoder with one float32 vector as its head: Qwen3-Reranker 0.6B, 4B and 8B.

Qwen Team 2025, "Qwen3 Technical Report" and "Qwen3 Embedding: Advancing Text Embedding and Reranking Through Foundation
Models".

The computation is that of transformers' Qwen3ForCausalLM read at the last token, as in the publisher's script. Softmax
over the logits of "no" and "yes" is the sigmoid of their difference. So the product with the whole vocabulary becomes a
product with W[yes] - W[no]. Qwen3ForSequenceClassification with one label is the same with its own vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from jaxrank.errors import UnsupportedError
from jaxrank.kernels import attention, heads_of, norm_rotary, operand_dtype
from jaxrank.kernels.rotary import Rotary, rotary
from jaxrank.models.layers import (
    add_by_heads,
    add_drawn,
    apart,
    einsum,
    in_runs,
    refuse,
    rounded_product,
    run_layers,
    some_heads,
    table_rows,
    weight,
)
from jaxrank.sharding import sum_over_shards
from jaxrank.types import ArrayLike, AttentionShape, Config, Layout, Packed

PUBLISHED_LENGTH = 8192
"""The longest prompt of the publisher, in tokens. The models' position limit is far above."""


@dataclass(frozen=True)
class Qwen3Config:
    """The settings of the model."""

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    ffn: int
    max_length: int
    theta: float
    eps: float
    tied: bool

    @property
    def default_length(self) -> int:
        return min(PUBLISHED_LENGTH, self.max_length)

    @property
    def attention(self) -> AttentionShape:
        return AttentionShape(self.heads, self.kv_heads, self.head_size, norm_rotary=True)

    @classmethod
    def read(cls, config: Config) -> Qwen3Config:
        """Read config.json. The rotary settings are in rope_theta in old files, and in rope_parameters in new ones.

        Raises:
            UnsupportedError: a field has a value that would change the result and is not implemented.
        """
        heads = config["num_attention_heads"]
        kv_heads = config.get("num_key_value_heads", heads)
        rotary = config.get("rope_parameters") or {
            "rope_theta": config["rope_theta"],
            **(config.get("rope_scaling") or {}),
        }
        is_classifier = config.get("architectures") == ["Qwen3ForSequenceClassification"]
        labels = config.get("num_labels", len(config.get("id2label") or "1")) if is_classifier else 1
        windows = set(config.get("layer_types") or ()) - {"full_attention"}
        refuse(
            {
                "hidden_act": (config.get("hidden_act", "silu"), "silu"),
                "attention_bias": (config.get("attention_bias", False), False),
                "use_sliding_window": (config.get("use_sliding_window", False), False),
                "layer_types": (", ".join(sorted(windows)) or "full_attention", "full_attention"),
                "rope_type": (rotary.get("rope_type", rotary.get("type", "default")), "default"),
                "partial_rotary_factor": (rotary.get("partial_rotary_factor", 1), 1),
                "quantization_config": (config.get("quantization_config"), None),
                "num_labels": (labels, 1),
            }
        )
        if heads % kv_heads:
            raise UnsupportedError(
                f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
            )
        return cls(
            vocab_size=config["vocab_size"],
            width=config["hidden_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=kv_heads,
            head_size=config.get("head_dim") or config["hidden_size"] // heads,
            ffn=config["intermediate_size"],
            max_length=config["max_position_embeddings"],
            theta=float(rotary["rope_theta"]),
            eps=config.get("rms_norm_eps", 1e-6),
            tied=config.get("tie_word_embeddings", False),
        )


class RMSNorm(nnx.Module):
    """Return x divided by its root mean square, in float32 (Zhang and Sennrich 2019)."""

    def __init__(self, width: int, eps: float):
        self.scale = nnx.Param(jnp.ones(width, jnp.float32))
        self.eps = eps

    def __call__(self, x: Float32[Array, "... D"]) -> Float32[Array, "... D"]:
        return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.eps) * self.scale[...]


class Attention(nnx.Module):
    """Grouped-query attention. Queries and keys are normalised for each head before they are turned.

    Queries, keys and values are one product. Its kernel has G members of queries, one of keys and one of values. Query
    head g * K + k uses key head k. So devices can share the key heads, each with its query heads.
    """

    def __init__(self, config: Qwen3Config, dtype: DTypeLike, rngs: nnx.Rngs | None, implementation: str | None):
        wide, size, queries = config.width, config.head_size, config.heads // config.kv_heads
        self.norm = RMSNorm(wide, config.eps)
        cut: Any = dict(size=size, scale_over=(-2,))
        joined = (config.heads + 2 * config.kv_heads) * size
        self.qkv = weight(rngs, (wide, joined), dtype, shard=-1, members=queries + 2, **cut)
        self.query_norm = RMSNorm(size, config.eps)
        self.key_norm = RMSNorm(size, config.eps)
        self.out = weight(rngs, (config.heads * size, wide), dtype, shard=-2, members=queries, **cut)
        self.queries, self.size = queries, size
        self.implementation = implementation

    def __call__(
        self,
        x: Float32[Array, "R D"],
        row: Float32[Array, "T D"],
        layout: Layout,
        query_rotary: Rotary,
        key_rotary: Rotary,
    ) -> Float32[Array, "R D"]:
        """Return x plus the attention of its rows over `row`. In a long row a few heads are computed at a time."""
        queries, members, size, asking = self.queries, self.queries + 2, self.size, x
        dtype = operand_dtype(self.out.dtype, self.implementation)
        how: Any = dict(used=layout.used, implementation=self.implementation)

        def turned(z: Any, norm: RMSNorm, by: Sequence[Array]) -> Float[Array, "R heads H"]:
            made: Any = dict(eps=norm.eps, dtype=dtype, implementation=self.implementation)
            return norm_rotary(z, norm.scale[...], Rotary(*by), **made)

        def add_heads(i: Array | int, group: int, x: Array) -> Array:
            def project(y: Array, by: Rotary, start: int, stop: int) -> list[Any]:
                """Return the members of the product (queries, keys, values) as attention takes them."""
                kernel = some_heads(self.qkv[...], i, group, size, members, start, stop)

                def some(_: Any, y: Array, *by: Array) -> list[Any]:
                    z = rounded_product(self.norm(y), kernel, self.implementation)

                    def heads(first: int, count: int) -> Any:
                        return heads_of(z, (first - start) * group, count * group, size, self.implementation)

                    asked = [turned(heads(0, queries), self.query_norm, by)] if start < queries else []
                    if stop == queries:
                        return asked
                    return [*asked, turned(heads(queries, 1), self.key_norm, by), heads(queries + 1, 1)]

                return in_runs(some, None, y, *by, **how)

            if asking is row:
                q, k, v = project(row, key_rotary, 0, members)
            else:
                q, k, v = project(asking, query_rotary, 0, queries) + project(row, key_rotary, queries, members)
            drawn = attention(q, k, v, layout, scale=size**-0.5, implementation=self.implementation)
            return add_drawn(x, drawn, some_heads(self.out[...], i, group, size, queries, axis=-2), **how)

        kv_heads = self.out.shape[0] // (queries * size)
        return add_by_heads(add_heads, x, kv_heads, len(row), self.implementation)


class FeedForward(nnx.Module):
    """Gated SiLU (Shazeer 2020, "GLU Variants Improve Transformer")."""

    def __init__(self, config: Qwen3Config, dtype: DTypeLike, rngs: nnx.Rngs | None, implementation: str | None):
        self.norm = RMSNorm(config.width, config.eps)
        self.gate = weight(rngs, (config.width, config.ffn), dtype, shard=-1, scale_over=(-2,))
        self.up = weight(rngs, (config.width, config.ffn), dtype, shard=-1, scale_over=(-2,))
        self.down = weight(rngs, (config.ffn, config.width), dtype, shard=-2, scale_over=(-2,))
        self.implementation = implementation

    def __call__(self, x: Float32[Array, "R D"]) -> Float32[Array, "R D"]:
        y = self.norm(x).astype(self.gate.dtype)
        gate, up = (rounded_product(y, kernel[...], self.implementation) for kernel in (self.gate, self.up))
        # Otherwise XLA for TPU would write the gate in float32.
        gate = apart(gate, self.implementation).astype(jnp.float32)
        inner = (jax.nn.silu(gate) * up.astype(jnp.float32)).astype(self.down.dtype)
        return x + sum_over_shards(einsum("TF,FD->TD", apart(inner, self.implementation), self.down[...]))


class Layer(nnx.Module):
    """Pre-norm transformer layer: attention and feed-forward read the normalised residual and are added to it."""

    def __init__(self, config: Qwen3Config, dtype: DTypeLike, rngs: nnx.Rngs | None, implementation: str | None):
        self.attention = Attention(config, dtype, rngs, implementation)
        self.feed_forward = FeedForward(config, dtype, rngs, implementation)
        self.implementation = implementation

    def __call__(
        self, x: Float32[Array, "T D"], layout: Layout, rotary: Rotary, rows: ArrayLike | None = None
    ) -> Float32[Array, "R D"]:
        """Compute all rows of x, or only those at `rows`, because the last layer needs no others.

        `layout` must match these rows.
        """
        mine, mine_rotary = (x, rotary) if rows is None else (x[rows], Rotary(rotary.cos[rows], rotary.sin[rows]))
        return in_runs(
            self.feed_forward,
            self.attention(mine, x, layout, mine_rotary, rotary),
            used=layout.used,
            implementation=self.implementation,
        )


class Qwen3(nnx.Module):
    """The model: a packed row in, one float32 logit for each slot out.

    The logit is logit("yes") - logit("no") at the slot's token. Matrices and what is multiplied with them are in
    `dtype`. The residual stream, norms, rotary tables, the head and all sums are float32. Near a logit of 18, bfloat16
    has steps of 0.07, which would make documents equal or swap them. `implementation` is that of kernels.attention.
    """

    causal = True

    def __init__(
        self, config: Qwen3Config, *, dtype: DTypeLike, rngs: nnx.Rngs | None, implementation: str | None = None
    ):
        self.config = config
        self.implementation = implementation
        self.word = weight(rngs, (config.vocab_size, config.width), dtype, scale_over=(-1,))
        self.layers = nnx.List([Layer(config, dtype, rngs, implementation) for _ in range(config.layers - 1)])
        self.last = Layer(config, dtype, rngs, implementation)
        self.norm = RMSNorm(config.width, config.eps)
        self.head = weight(rngs, (config.width,), jnp.float32)

    def _rotary(self, batch: Packed) -> Rotary:
        return rotary(batch.positions, self.config.head_size, self.config.theta)

    def token_embeddings(self, batch: Packed) -> Float32[Array, "T D"]:
        """Return the rows of the word table."""
        return table_rows(self.word[...], batch.tokens, self.implementation)

    def embed(
        self, batch: Packed, embeddings: Float32[Array, "T D"] | None = None
    ) -> tuple[Float32[Array, "T D"], tuple[Any, ...]]:
        """Return the first layer's input, and the other arguments of every layer.

        `embeddings` are used instead of token_embeddings.
        """
        x = self.token_embeddings(batch) if embeddings is None else embeddings
        return x, (batch.layout, self._rotary(batch))

    def finish(self, x: Float32[Array, "T D"], batch: Packed) -> Float32[Array, " S"]:
        """Compute the last layer, at the scored rows only, and the head."""
        return self.classify(self.last(x, batch.score_layout, self._rotary(batch), batch.score_at))

    def classify(self, x: Float32[Array, "S D"]) -> Float32[Array, " S"]:
        """Return the logits of states that left the last layer."""
        return einsum("SD,D->S", self.norm(x), self.head[...])

    def __call__(self, batch: Packed, embeddings: Float32[Array, "T D"] | None = None) -> Float32[Array, " S"]:
        x, shared = self.embed(batch, embeddings)
        return self.finish(run_layers(self.layers, x, *shared), batch)
