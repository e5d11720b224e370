"""Scores in float32 beside bfloat16: how far apart, how many pairs of documents change places, how many tie.

    python docs/examples/precision.py [MODEL] [--query TEXT] [--documents FILE]

The third column takes bfloat16 one step further than jaxrank does: logits that leave the model in bfloat16, as a head
in that type would give them. FILE has a document a line.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32

from jaxrank import Reranker

WHO = ("giant pandas", "pandas", "polar bears", "bears", "penguins", "banks", "red foxes", "snow leopards")
WHERE = ("the mountains of China", "cool and wet forests", "the Arctic", "Paris", "deep water", "zoos")
DOCUMENTS = [f"{who.capitalize()} {verb} {where}." for who, verb, where in product(WHO, ("live in", "are from"), WHERE)]


def logits(model: str | None, query: str, documents: Sequence[str]) -> dict[str, Float32[np.ndarray, " n"]]:
    """By precision, the documents' logits."""
    found = {
        dtype: Reranker.from_pretrained(model, dtype=dtype).score(query, documents, raw=True)
        for dtype in ("float32", "bfloat16")
    }
    rounded = np.asarray(jnp.asarray(found["bfloat16"]).astype(jnp.bfloat16).astype(jnp.float32))
    return {**found, "bfloat16, rounded": rounded}


def ties(logits: Float32[np.ndarray, " n"]) -> int:
    """Pairs of documents with the same logit."""
    _, counts = np.unique(logits, return_counts=True)
    return int((counts * (counts - 1) // 2).sum())


def swaps(a: Float32[np.ndarray, " n"], b: Float32[np.ndarray, " n"]) -> int:
    """Pairs of documents that a and b put in opposite orders; ties are in no order."""
    opposite = np.sign(a[:, None] - a) * np.sign(b[:, None] - b) < 0
    return int(opposite.sum()) // 2


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a Hugging Face id or folder; the built-in model if left out")
    parser.add_argument("--query", default="Where do giant pandas live?")
    parser.add_argument("--documents", type=Path, help="a file with a document a line")
    given = parser.parse_args(arguments)
    documents = given.documents.read_text(encoding="utf-8").splitlines() if given.documents else DOCUMENTS

    found = logits(given.model, given.query, documents)
    exact = found["float32"]
    print(" ".join(f"{name:>18}" for name in found) + "  document")
    for i in np.argsort(-exact, kind="stable")[:10].tolist():
        print(" ".join(f"{values[i]:18.5f}" for values in found.values()) + f"  {documents[i]}")
    pairs = len(documents) * (len(documents) - 1) // 2
    print(f"\n{len(documents)} documents, {pairs} pairs of them; float32 logits have a deviation of {exact.std():.3f}")
    for name, values in found.items():
        apart = np.abs(values - exact)
        print(
            f"{name:>18}: difference {apart.mean():.5f} on average, {apart.max():.5f} at most; "
            f"{swaps(exact, values)} pairs swapped, {ties(values)} tied"
        )


if __name__ == "__main__":
    main()
