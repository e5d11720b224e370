"""Research access to a model: its layers one by one, the states between them, attention with gradients."""

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
    """Return the model with another of kernels.IMPLEMENTATIONS, and the same parameters.

    Rows must be packed for it too.

    "dense" is the one that has gradients, on CPU in rows of up to kernels.LONG_ROW tokens. It takes memory in
    proportion to T x T.

    Raises:
        ValueError: the name is unknown.
    """
    pick(implementation)
    other = nnx.merge(*nnx.split(model))
    use_implementation(other, implementation)
    return other


def each_layer(layers: Any) -> list[Any]:
    """Return the layers of model.layers as a list.

    They are a list already on CPU. On accelerators they are stacked in one module with a leading axis.
    """
    if isinstance(layers, nnx.List):
        return list(layers)
    graph, state = nnx.split(layers)
    count = len(jax.tree.leaves(state)[0])
    return [nnx.merge(graph, jax.tree.map(lambda leaf, i=i: leaf[i], state)) for i in range(count)]


def hidden_states(
    model: Any, batch: Packed, embeddings: Float32[Array, "T D"] | None = None
) -> list[Float32[Array, "T D"]]:
    """Return the input of the first layer and the output of each layer, for all tokens of a packed row.

    These are layers + 1 states, in the order of transformers' hidden_states. In decoders, the last of the latter is
    also normalised. The logits are model.classify(states[-1][batch.score_at]). Under jit, layers behind the last state
    that is used are not computed. The layers of Qwen3-VL that add features of images come before the first state.

    Args:
        embeddings: used instead of model.token_embeddings(batch).
    """
    x, shared = model.embed(batch, embeddings)
    states = [x]
    for layer in (*each_layer(model.layers), model.last):
        states.append(layer(states[-1], *shared))
    return states


def own_tokens(pair: Encoded, blank: Encoded) -> range:
    """Return which of a pair's tokens are a text's own.

    The tokens that both pairs share at the beginning and at the end are left out. A BPE token across the text's border
    counts as the text's.

    Args:
        pair: the pair. It must be encoded as a request of one document, so that it has no shared prefix.
        blank: the same pair with that text left empty, encoded in the same way.

    Raises:
        ValueError: a pair has a shared prefix.
    """
    if len(pair.prefix) or len(blank.prefix):
        raise ValueError("own_tokens: the pairs have a shared prefix; encode each as a request of one document")
    ids, empty = pair.tokens, blank.tokens
    most = min(len(ids), len(empty))
    first = _alike(ids[:most], empty[:most])
    last = _alike(ids[::-1][: most - first], empty[::-1][: most - first])
    return range(first, len(ids) - last)


def _alike(a: np.ndarray, b: np.ndarray) -> int:
    """Return the length of the common prefix of both."""
    different = np.flatnonzero(a != b)
    return int(different[0]) if len(different) else len(a)
