"""XLM-RoBERTa cross-encoder with one label: bge-reranker-base, -large, -v2-m3, and the built-in model.

Conneau et al. 2019, "Unsupervised Cross-lingual Representation Learning at Scale". The computation is that of
transformers' XLMRobertaForSequenceClassification, on packed rows instead of padded batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from jaxrank.errors import UnsupportedError
from jaxrank.kernels import attention, heads_of
from jaxrank.models.layers import (
    LayerNorm,
    Projection,
    add_by_heads,
    add_drawn,
    apart,
    gelu,
    in_runs,
    refuse,
    rounded_product,
    run_layers,
    some_heads,
    table_rows,
    weight,
)
from jaxrank.types import ArrayLike, AttentionShape, Config, Layout, Packed


@dataclass(frozen=True)
class XLMRobertaConfig:
    """The settings of the model."""

    vocab_size: int
    width: int
    layers: int
    heads: int
    ffn: int
    position_rows: int
    pad_id: int
    eps: float

    @property
    def max_length(self) -> int:
        """The most tokens of a pair.

        Positions count from pad_id + 1, so the rows of the table before that are never used.
        """
        return self.position_rows - self.pad_id - 1

    @property
    def default_length(self) -> int:
        return self.max_length

    @property
    def attention(self) -> AttentionShape:
        return AttentionShape(self.heads, self.heads, self.width // self.heads)

    @classmethod
    def read(cls, config: Config) -> XLMRobertaConfig:
        """Read config.json.

        Raises:
            UnsupportedError: a field has a value that would change the result and is not implemented.
        """
        refuse(
            {
                "hidden_act": (config.get("hidden_act", "gelu"), "gelu"),
                "position_embedding_type": (config.get("position_embedding_type", "absolute"), "absolute"),
                "type_vocab_size": (config.get("type_vocab_size", 1), 1),
                "is_decoder": (config.get("is_decoder", False), False),
                "add_cross_attention": (config.get("add_cross_attention", False), False),
                "num_labels": (config.get("num_labels", len(config.get("id2label") or "1")), 1),
                "quantization_config": (config.get("quantization_config"), None),
            }
        )
        if config["hidden_size"] % config["num_attention_heads"]:
            raise UnsupportedError(
                f"config.json: hidden_size {config['hidden_size']} is not a multiple of "
                f"num_attention_heads {config['num_attention_heads']}"
            )
        return cls(
            vocab_size=config["vocab_size"],
            width=config["hidden_size"],
            layers=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            ffn=config["intermediate_size"],
            position_rows=config["max_position_embeddings"],
            pad_id=config.get("pad_token_id", 1),
            eps=config.get("layer_norm_eps", 1e-12),
        )


class Attention(nnx.Module):
    """Attention with queries, keys and values in one product."""

    def __init__(self, config: XLMRobertaConfig, dtype: DTypeLike, rngs: nnx.Rngs | None, implementation: str | None):
        wide, size = config.width, config.width // config.heads
        self.qkv = Projection(wide, 3 * wide, dtype, rngs, shard=-1, members=3, size=size, quantizes=True)
        self.out = Projection(wide, wide, dtype, rngs, shard=-2, size=size, quantizes=True)
        self.size = size
        self.implementation = implementation

    def __call__(self, x: Float32[Array, "R D"], row: Float[Array, "T D"], layout: Layout) -> Float32[Array, "R D"]:
        """Return x plus the attention of its rows over `row`. In a long row a few heads are computed at a time."""
        size, asking = self.size, x
        how: Any = dict(used=layout.used, implementation=self.implementation)

        def add_heads(i: Array | int, group: int, x: Array) -> Array:
            def project(y: Array, start: int, stop: int) -> list[Any]:
                kernel, bias = (
                    some_heads(weights[...], i, group, size, 3, start, stop)
                    for weights in (self.qkv.kernel, self.qkv.bias)
                )

                def some(_: Any, y: Array) -> list[Any]:
                    z = rounded_product(y, kernel, self.implementation, bias)
                    members = range(stop - start)
                    return [heads_of(z, member * group, group, size, self.implementation) for member in members]

                return in_runs(some, None, y, **how)

            q, k, v = project(row, 0, 3) if asking is row else project(asking, 0, 1) + project(row, 1, 3)
            drawn = attention(q, k, v, layout, scale=size**-0.5, implementation=self.implementation)
            return add_drawn(x, drawn, some_heads(self.out.kernel[...], i, group, size, 1, axis=-2), **how)

        heads = self.out.kernel.shape[0] // size
        return add_by_heads(add_heads, x, heads, len(row), self.implementation) + self.out.bias[...]


class Layer(nnx.Module):
    """Post-norm transformer layer: the residual is added, and the sum is normalised."""

    def __init__(self, config: XLMRobertaConfig, dtype: DTypeLike, rngs: nnx.Rngs | None, implementation: str | None):
        self.attention = Attention(config, dtype, rngs, implementation)
        self.attention_norm = LayerNorm(config.width, config.eps, implementation)
        self.up = Projection(config.width, config.ffn, dtype, rngs, shard=-1, quantizes=True)
        self.down = Projection(config.ffn, config.width, dtype, rngs, shard=-2, quantizes=True)
        self.norm = LayerNorm(config.width, config.eps, implementation)
        self.implementation = implementation

    def __call__(self, x: Float[Array, "T D"], layout: Layout, rows: ArrayLike | None = None) -> Float[Array, "R D"]:
        """Compute all rows of x, or only those at `rows`, because the last layer needs no others.

        `layout` must match these rows.
        """
        mine = x if rows is None else x[rows]
        return in_runs(
            self.feed_forward, self.attention(mine, x, layout), used=layout.used, implementation=self.implementation
        )

    def feed_forward(self, x: Float[Array, "R D"]) -> Float[Array, "R D"]:
        """Compute the rest of the layer, from the sum after attention."""
        x = self.attention_norm(x)
        inner = gelu(self.up.rounded(x, self.implementation)).astype(self.down.kernel.dtype)
        return self.norm(self.down.add_to(x, apart(inner, self.implementation)))


class XLMRoberta(nnx.Module):
    """The model: a packed row in, one float32 logit for each slot out.

    Matrices and what is multiplied with them are in `dtype`. The residual stream, norms, biases, the classifier and all
    sums are float32. `implementation` is that of kernels.attention. Gradients need "dense".
    """

    causal = False

    def __init__(
        self, config: XLMRobertaConfig, *, dtype: DTypeLike, rngs: nnx.Rngs | None, implementation: str | None = None
    ):
        self.config = config
        self.implementation = implementation
        self.word = weight(rngs, (config.vocab_size, config.width), dtype, scale_over=(-1,))
        self.position = weight(rngs, (config.position_rows, config.width), dtype)
        self.token_type = weight(rngs, (config.width,), jnp.float32)
        self.embedding_norm = LayerNorm(config.width, config.eps, implementation)
        self.layers = nnx.List([Layer(config, dtype, rngs, implementation) for _ in range(config.layers - 1)])
        self.last = Layer(config, dtype, rngs, implementation)
        self.dense = Projection(config.width, config.width, jnp.float32, rngs)
        self.head = Projection(config.width, 0, jnp.float32, rngs)

    def token_embeddings(self, batch: Packed) -> Float32[Array, "T D"]:
        """Return the rows of the word table."""
        return table_rows(self.word[...], batch.tokens, self.implementation)

    def embed(
        self, batch: Packed, embeddings: Float32[Array, "T D"] | None = None
    ) -> tuple[Float[Array, "T D"], tuple[Layout]]:
        """Return the first layer's input, and the other arguments of every layer.

        `embeddings` are used instead of token_embeddings.
        """
        word = self.token_embeddings(batch) if embeddings is None else embeddings
        position = table_rows(self.position[...], batch.positions + self.config.pad_id + 1, self.implementation)
        x = in_runs(
            self.embedding_norm,
            word + position + self.token_type[...],
            used=batch.layout.used,
            implementation=self.implementation,
        )
        return x, (batch.layout,)

    def finish(self, x: Float[Array, "T D"], batch: Packed) -> Float32[Array, " S"]:
        """Compute the last layer, at the scored rows only, and the classifier."""
        return self.classify(self.last(x, batch.score_layout, batch.score_at))

    def classify(self, x: Float[Array, "S D"]) -> Float32[Array, " S"]:
        """Return the logits of states that left the last layer."""
        return self.head(jax.nn.tanh(self.dense(x)))

    def __call__(self, batch: Packed, embeddings: Float32[Array, "T D"] | None = None) -> Float32[Array, " S"]:
        x, shared = self.embed(batch, embeddings)
        return self.finish(run_layers(self.layers, x, *shared), batch)
