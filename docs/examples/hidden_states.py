"""The states of a pair's tokens after every layer, and what the model's head would say of them.

    python docs/examples/hidden_states.py [MODEL] [--query TEXT] [--document TEXT ...] [--layer N]

First a "logit lens" (nostalgebraist 2020, "interpreting GPT: the logit lens"): the scored token's state after each
layer goes through the head, as if the model ended there. Then, for the first document, which of its tokens has the
state most like that of each query token after layer N, by cosine.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Array, Float32

from jaxrank import Reranker
from jaxrank.research import each_layer, hidden_states, own_tokens
from jaxrank.runtime.packing import pack, row_size
from jaxrank.types import Packed

DOCUMENTS = [
    "The giant panda is a bear that lives in the mountains of central China.",
    "A giant among banks, it was founded in Shanghai.",
    "Gravity attracts two bodies towards each other.",
]


all_states = nnx.jit(hidden_states)


@partial(nnx.jit, static_argnames="layer")
def states_after(model: Any, batch: Packed, layer: int) -> Float32[Array, "T D"]:
    """Those after one layer alone: what is behind it is not computed."""
    return hidden_states(model, batch)[layer]


def lens(reranker: Reranker, query: str, documents: Sequence[str]) -> Float32[np.ndarray, "layers n"]:
    """The logit of each document, read from the embeddings (line 0) and after each layer; the last line is the score.

    All documents lie in one packed row: batch.score_at says where the scored token of each is.
    """
    model, pairs = reranker.model, reranker.encode(query, documents)
    size = max(row_size(pairs), 16 * len(pairs))
    batch = pack(pairs, size, causal=model.causal, implementation=model.implementation)
    return np.stack([np.asarray(model.classify(x[batch.score_at]))[: len(pairs)] for x in all_states(model, batch)])


def token_states(reranker: Reranker, query: str, document: str, layer: int) -> Float32[np.ndarray, "T D"]:
    """The states of all tokens of one pair, its frame's too, after `layer` layers."""
    pairs = reranker.encode(query, [document])
    model, size = reranker.model, max(row_size(pairs), 16)
    batch = pack(pairs, size, causal=model.causal, implementation=model.implementation)
    return np.asarray(states_after(model, batch, layer))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a Hugging Face id or folder; the built-in model if left out")
    parser.add_argument("--query", default="Where do giant pandas live?")
    parser.add_argument("--document", dest="documents", action="append", help="may be repeated")
    parser.add_argument("--layer", type=int, default=1)
    given = parser.parse_args(arguments)
    documents = given.documents or DOCUMENTS
    reranker = Reranker.from_pretrained(given.model, dtype="float32")
    if not 0 <= given.layer <= (layers := len(each_layer(reranker.model.layers)) + 1):
        parser.error(f"--layer is {given.layer}; this model has {layers} layers, and 0 stands for their input")

    print("logit, read after each layer:")
    for layer, logits in enumerate(lens(reranker, given.query, documents)):
        print(f"{layer:5d}  " + "  ".join(f"{logit:8.3f}" for logit in logits))

    ((pair,), (no_query,), (no_document,)) = (
        reranker.encode(query, [document])
        for query, document in ((given.query, documents[0]), ("", documents[0]), (given.query, ""))
    )
    states = token_states(reranker, given.query, documents[0], given.layer)
    states = states / np.linalg.norm(states, axis=-1, keepdims=True)
    query, document = own_tokens(pair, no_query), own_tokens(pair, no_document)
    likeness = states[query] @ states[document].T
    text = reranker.tokenizer.tokenizer.decode
    print(f"\nafter layer {given.layer}, each query token and the document's token with the state most like its own:")
    for i, row in zip(query, likeness, strict=True):
        j = document[int(row.argmax())]
        print(f"{text([pair.tokens[i]]):>16}  {text([pair.tokens[j]]):16}  {row.max():.3f}")


if __name__ == "__main__":
    main()
