"""A model opened up, for research: its layers one by one, states between them, attention with gradients."""

from __future__ import annotations

from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float32

from jaxrank.kernels import pick
from jaxrank.runtime.attention import use_implementation
from jaxrank.types import Encoded, Packed

Model = TypeVar("Model", bound=nnx.Module)


def with_attention(model: Model, implementation: str | None) -> Model:
    """The model with another of kernels.IMPLEMENTATIONS, around the same parameters; rows must be packed for it too.

    "dense" is the one that has gradients (on CPU in rows of up to kernels.LONG_ROW tokens); it takes memory in
    proportion to T x T. Raises ValueError on an unknown name.
    """
    pick(implementation)
    other = nnx.merge(*nnx.split(model))
    use_implementation(other, implementation)
    return other


def each_layer(layers: Any) -> list[Any]:
    """The layers of model.layers as a list, whether they are one already, as on CPU, or stacked in one module with a
    leading axis, as on accelerators."""
    if isinstance(layers, nnx.List):
        return list(layers)
    graph, state = nnx.split(layers)
    count = len(jax.tree.leaves(state)[0])
    return [nnx.merge(graph, jax.tree.map(lambda leaf, i=i: leaf[i], state)) for i in range(count)]


def hidden_states(
    model: Any, batch: Packed, embeddings: Float32[Array, "T D"] | None = None
) -> list[Float32[Array, "T D"]]:
    """What enters the first layer, and what leaves each of them, for all tokens of a packed row: layers + 1 states.

    Their order is that of transformers' hidden_states, whose last one, of decoders, is normalised besides. The logits
    are those of model.classify(states[-1][batch.score_at]). embeddings: instead of model.token_embeddings(batch).
    Under jit, layers behind the last state that is used are not computed. Of Qwen3-VL, the layers that add features of
    images are behind the first state.
    """
    x, shared = model.embed(batch, embeddings)
    states = [x]
    for layer in (*each_layer(model.layers), model.last):
        states.append(layer(states[-1], *shared))
    return states


def own_tokens(pair: Encoded, blank: Encoded) -> range:
    """Which of a pair's tokens are a text's own. blank: the same pair with that text left empty.

    What both begin and end with alike is left out. Both must be encoded as requests of one document, so that they have
    no shared prefix. A BPE token across the text's border counts as the text's.
    """
    if len(pair.prefix) or len(blank.prefix):
        raise ValueError("own_tokens: the pairs have a shared prefix; encode each as a request of one document")
    ids, empty = pair.tokens, blank.tokens
    most = min(len(ids), len(empty))
    first = _alike(ids[:most], empty[:most])
    last = _alike(ids[::-1][: most - first], empty[::-1][: most - first])
    return range(first, len(ids) - last)


def _alike(a: np.ndarray, b: np.ndarray) -> int:
    """The length of the common prefix of both."""
    different = np.flatnonzero(a != b)
    return int(different[0]) if len(different) else len(a)
