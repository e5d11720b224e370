"""How much a score hangs on each token of the query: noise on its embedding, and the query without it.

    python docs/examples/perturb.py [MODEL] [--query TEXT] [--document TEXT] [--draws 16] [--noise 0.5]

All noisy scores come from one jitted call, vmapped over tokens and draws. Leaving tokens out needs no vmap: the pairs
of different lengths lie side by side in packed rows, as documents do.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float32, Int32

from jaxrank import Reranker
from jaxrank.research import own_tokens, with_attention
from jaxrank.runtime.packing import pack
from jaxrank.types import Encoded, Packed

QUERY = "Where do giant pandas live?"
DOCUMENT = "Wild giant pandas live in the mountains of central China, in cool and wet forests."


@nnx.jit
def noisy_logits(
    model: Any, batch: Packed, tokens: Int32[Array, " n"], noise: Float32[Array, "draws D"]
) -> Float32[Array, "n draws"]:
    """The logit of the pair in slot 0 with each noise on the embedding of each of the tokens.

    Noise is in units of the embedding's root mean square.
    """
    embeddings = model.token_embeddings(batch)

    def logit(token: Array, noise: Array) -> Array:
        size = jnp.sqrt(jnp.square(embeddings[token]).mean())
        return model(batch, embeddings.at[token].add(size * noise))[0]

    return jax.vmap(jax.vmap(logit, (None, 0)), (0, None))(tokens, noise)


def perturbed(
    reranker: Reranker, query: str, document: str, noise: Float32[np.ndarray, "draws D"]
) -> tuple[list[int], Float32[np.ndarray, "n draws"]]:
    """The ids of the query's tokens, and the logits of the pair with each noise on each of them."""
    pair, at = query_tokens(reranker, query, document)
    model = with_attention(reranker.model, "dense")  # vmap works with each, TPU's kernel excepted
    batch = pack([pair], max(len(pair), 16), causal=model.causal, implementation="dense")
    return pair.tokens[at].tolist(), np.asarray(noisy_logits(model, batch, jnp.array(at), jnp.asarray(noise)))


def without_each(reranker: Reranker, query: str, document: str) -> Float32[np.ndarray, " n"]:
    """The logits of the pair without each of the query's tokens."""
    pair, at = query_tokens(reranker, query, document)
    return reranker.score_encoded(
        [replace(pair, tokens=np.delete(pair.tokens, i), score_at=pair.score_at - (i < pair.score_at)) for i in at]
    )


def query_tokens(reranker: Reranker, query: str, document: str) -> tuple[Encoded, range]:
    (pair,), (blank,) = (reranker.encode(text, [document]) for text in (query, ""))
    return pair, own_tokens(pair, blank)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a Hugging Face id or folder; the built-in model if left out")
    parser.add_argument("--query", default=QUERY)
    parser.add_argument("--document", default=DOCUMENT)
    parser.add_argument("--draws", type=int, default=16)
    parser.add_argument("--noise", type=float, default=0.5, help="in units of an embedding's root mean square")
    given = parser.parse_args(arguments)
    reranker = Reranker.from_pretrained(given.model, dtype="float32")

    (logit,) = reranker.score(given.query, [given.document], raw=True)
    noise = np.random.default_rng(0).normal(0, given.noise, (given.draws, reranker.model.word.shape[1]))
    ids, logits = perturbed(reranker, given.query, given.document, noise.astype(np.float32))
    print(f"logit {logit:.3f}\n  noise: deviation   without it: change   token")
    for i, row, without in zip(ids, logits, without_each(reranker, given.query, given.document), strict=True):
        text = reranker.tokenizer.tokenizer.decode([i])
        print(f"{np.sqrt(np.square(row - logit).mean()):18.3f} {without - logit:+21.3f}   {text}")


if __name__ == "__main__":
    main()
