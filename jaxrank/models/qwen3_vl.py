"""Qwen3-VL with one float32 vector as its head: Qwen3-VL-Reranker 2B and 8B.

Qwen Team 2025, "Qwen3-VL Technical Report". The computation is that of transformers' Qwen3VLForConditionalGeneration
read at the last token, with the head of Qwen3-Reranker. The text model is Qwen3's with positions in three dimensions.
The vision tower's features of a media token stand in the place of its word. The first layers add more features to it
(Meng et al. 2024, "DeepStack").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float32

from jaxrank.errors import UnsupportedError
from jaxrank.kernels.rotary import Rotary, rotary
from jaxrank.models.layers import einsum, refuse, run_layers, table_rows, weight
from jaxrank.models.qwen3 import Layer, Qwen3Config, RMSNorm
from jaxrank.models.vision import Vision, VisionConfig
from jaxrank.types import AttentionShape, Config, Packed

PUBLISHED_LENGTH = 10_240
"""The longest prompt of the publisher, in tokens. The models' position limit is far above."""

PUBLISHED_SECTIONS = (24, 20, 20)


@dataclass(frozen=True)
class Qwen3VLConfig:
    """The settings of the model.

    Attributes:
        sections: the numbers of rotary frequencies that turn by time, height and width.
    """

    text: Qwen3Config
    vision: VisionConfig
    sections: tuple[int, ...]

    @property
    def width(self) -> int:
        return self.text.width

    @property
    def ffn(self) -> int:
        return self.text.ffn

    @property
    def vocab_size(self) -> int:
        return self.text.vocab_size

    @property
    def max_length(self) -> int:
        return self.text.max_length

    @property
    def default_length(self) -> int:
        return min(PUBLISHED_LENGTH, self.max_length)

    @property
    def attention(self) -> AttentionShape:
        return self.text.attention

    @classmethod
    def read(cls, config: Config) -> Qwen3VLConfig:
        """Read an old or new config.json.

        Raises:
            UnsupportedError: a field has a value that would change the result and is not implemented.
        """
        tied = {"tie_word_embeddings": config["tie_word_embeddings"]} if "tie_word_embeddings" in config else {}
        text = Qwen3Config.read({**config["text_config"], **tied})
        vision = VisionConfig.read(config["vision_config"])
        by = config["text_config"].get("rope_parameters") or config["text_config"].get("rope_scaling") or {}
        sections = tuple(by.get("mrope_section", PUBLISHED_SECTIONS))
        refuse(
            {
                "mrope_interleaved": (by.get("mrope_interleaved", True), True),
                "quantization_config": (config.get("quantization_config"), None),
                "vision_config.out_hidden_size": (vision.out_width, text.width),
            }
        )
        if len(sections) != 3 or sum(sections) != text.head_size // 2:
            raise UnsupportedError(
                f"config.json: mrope_section {list(sections)} does not share out the {text.head_size // 2} frequencies "
                f"of a head of {text.head_size} among time, height and width"
            )
        if text.layers < vision.features:
            raise UnsupportedError(
                f"config.json: num_hidden_layers {text.layers} leaves no layer after those that add the features of "
                f"{len(vision.deepstack)} deepstack_visual_indexes"
            )
        return cls(text=text, vision=vision, sections=sections)


class Qwen3VL(nnx.Module):
    """The model: a packed row in, one float32 logit for each slot out.

    The logit is logit("yes") - logit("no") at the slot's token. Rows of text alone (media None, positions [T]) run
    through the same layers with nothing added. The dtypes are those of Qwen3. `implementation` is that of
    kernels.attention.

    `vision` makes the features of the rows' media tokens. It has programs of its own and is no part of this one. So
    take it away before you compile this program (see programs.take_tower).
    """

    causal = True

    def __init__(
        self, config: Qwen3VLConfig, *, dtype: DTypeLike, rngs: nnx.Rngs | None, implementation: str | None = None
    ):
        text, adding = config.text, config.vision.features - 1
        self.config = config
        self.implementation = implementation
        self.vision = Vision(config.vision, dtype=dtype, rngs=rngs, implementation=implementation)
        self.word = weight(rngs, (text.vocab_size, text.width), dtype, scale_over=(-1,))
        self.adding = nnx.List([Layer(text, dtype, rngs, implementation) for _ in range(adding)])
        self.layers = nnx.List([Layer(text, dtype, rngs, implementation) for _ in range(text.layers - 1 - adding)])
        self.last = Layer(text, dtype, rngs, implementation)
        self.norm = RMSNorm(text.width, text.eps)
        self.head = weight(rngs, (text.width,), jnp.float32)

    def _rotary(self, batch: Packed) -> Rotary:
        text = self.config.text
        return rotary(batch.positions, text.head_size, text.theta, self.config.sections)

    def token_embeddings(self, batch: Packed) -> Float32[Array, "T D"]:
        """Return the rows of the word table, for media tokens too. Features will take the place of the latter."""
        return table_rows(self.word[...], batch.tokens, self.implementation)

    def embed(
        self, batch: Packed, embeddings: Float32[Array, "T D"] | None = None
    ) -> tuple[Float32[Array, "T D"], tuple[Any, ...]]:
        """Return the residual stream after the layers that add features, and the other arguments of every layer.

        `embeddings` are used instead of token_embeddings.
        """
        x, added = self.token_embeddings(batch) if embeddings is None else embeddings, None
        if batch.media is not None:
            here, features = batch.media.here, jnp.asarray(batch.media.features)
            x = jnp.where(here[:, None], features[:, 0].astype(x.dtype), x)
            added = features[:, 1:].swapaxes(0, 1)
        shared = batch.layout, self._rotary(batch)
        return run_layers(self.adding, x, *shared, added=added), shared

    def finish(self, x: Float32[Array, "T D"], batch: Packed) -> Float32[Array, " S"]:
        """Compute the last layer, at the scored rows only, and the head."""
        return self.classify(self.last(x, batch.score_layout, self._rotary(batch), batch.score_at))

    def classify(self, x: Float32[Array, "S D"]) -> Float32[Array, " S"]:
        """Return the logits of states that left the last layer."""
        return einsum("SD,D->S", self.norm(x), self.head[...])

    def __call__(self, batch: Packed, embeddings: Float32[Array, "T D"] | None = None) -> Float32[Array, " S"]:
        x, shared = self.embed(batch, embeddings)
        return self.finish(run_layers(self.layers, x, *shared), batch)
