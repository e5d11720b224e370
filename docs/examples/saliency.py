"""Which of a document's tokens the score hangs on: the gradient of the logit with respect to their embeddings.

    python docs/examples/saliency.py [MODEL] [--query TEXT] [--document TEXT]

A token's weight is the length of its gradient (Simonyan, Vedaldi, Zisserman 2014, "Deep Inside Convolutional Networks";
Li et al. 2016, "Visualizing and Understanding Neural Models in NLP"). Beside it stands gradient times embedding, which
has a sign: to first order, how much the logit would fall if the embedding became 0.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float32

from jaxrank import Reranker
from jaxrank.research import own_tokens, with_attention
from jaxrank.runtime.packing import pack
from jaxrank.types import Packed

QUERY = "Where do giant pandas live?"
DOCUMENT = "They eat bamboo all day. Wild giant pandas live in the mountains of central China, in cool and wet forests."


class Saliency(NamedTuple):
    """Of a document's tokens: their ids, embeddings, and the logit's gradient with respect to these."""

    ids: list[int]
    embeddings: Float32[np.ndarray, "n D"]
    gradient: Float32[np.ndarray, "n D"]

    @property
    def weights(self) -> Float32[np.ndarray, " n"]:
        return np.linalg.norm(self.gradient, axis=-1)

    @property
    def signed(self) -> Float32[np.ndarray, " n"]:
        return (self.gradient * self.embeddings).sum(-1)


@nnx.jit
def gradient(model: Any, batch: Packed, embeddings: Float32[Array, "T D"]) -> Float32[Array, "T D"]:
    """Of the logit in slot 0. nnx.jit takes the model as an argument, so that weights are not compiled in."""
    return jax.grad(lambda embeddings: model(batch, embeddings)[0])(embeddings)


def saliency(reranker: Reranker, query: str, document: str) -> Saliency:
    model = with_attention(reranker.model, "dense")  # the one that has gradients
    (pair,), (blank,) = (reranker.encode(query, [text]) for text in (document, ""))
    batch = pack([pair], max(len(pair), 16), causal=model.causal, implementation="dense")
    embeddings = model.token_embeddings(batch)
    slopes = gradient(model, batch, embeddings)
    at = own_tokens(pair, blank)
    return Saliency(pair.tokens[at].tolist(), np.asarray(embeddings)[at], np.asarray(slopes)[at])


def shared(reranker: Reranker, query: str, ids: Sequence[int]) -> np.ndarray:
    """Which of the ids are words of the query too: bool [n]. A token without a letter or digit is no word."""
    tokenizer = reranker.tokenizer.tokenizer
    words = {token.id for spelling in (query, f" {query}") for token in reranker.tokens_of(spelling)}
    return np.array([i in words and any(map(str.isalnum, tokenizer.decode([i]))) for i in ids], bool)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a Hugging Face id or folder; the built-in model if left out")
    parser.add_argument("--query", default=QUERY)
    parser.add_argument("--document", default=DOCUMENT)
    given = parser.parse_args(arguments)
    reranker = Reranker.from_pretrained(given.model, dtype="float32")

    found = saliency(reranker, given.query, given.document)
    common, weights = shared(reranker, given.query, found.ids), found.weights
    print("  weight  times embedding  token (* also in the query)")
    for i, weight, signed, is_common in zip(found.ids, weights, found.signed, common, strict=True):
        bar = "#" * round(30 * weight / weights.max())
        text = reranker.tokenizer.tokenizer.decode([i])
        print(f"{weight:8.4f}  {signed:+15.4f}  {'*' if is_common else ' '} {text:16} {bar}")
    if common.any() and not common.all():
        inside, others = weights[common].mean(), weights[~common].mean()
        print(f"\nmean weight of tokens that are in the query too: {inside:.4f}; of the others: {others:.4f}")


if __name__ == "__main__":
    main()
