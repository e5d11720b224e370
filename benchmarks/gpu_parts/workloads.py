"""What is measured: shapes of products, and lengths of pairs, the same for jaxrank and for PyTorch. Needs no JAX."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Request(NamedTuple):
    """A query's documents: the tokens that all their prompts begin with, and how many follow in each."""

    prefix: int
    own: list[int]

    @property
    def prompts(self) -> list[int]:
        """The lengths of the whole prompts."""
        return [self.prefix + length for length in self.own]

    @property
    def computed(self) -> int:
        """Tokens with the prefix counted once."""
        return self.prefix + sum(self.own)


Load = list[Request]
"""Some requests, each of which about fills a row."""


class Sizes(NamedTuple):
    """row_tokens: of a row. rows: how many of them a load fills. length: of every pair of the uniform load, and the
    longest of a mixed one. mean: about, of the lengths of a mixed load. prefix: of a star."""

    row_tokens: int
    rows: int
    length: int
    mean: int
    prefix: int


GEMMS: dict[tuple[int, int], str] = {
    (1024, 3072): "bge-reranker-v2-m3 qwen3-reranker-0.6b",
    (1024, 4096): "bge-reranker-v2-m3 qwen3-reranker-0.6b",
    (4096, 1024): "bge-reranker-v2-m3",
    (4096, 12288): "qwen3-reranker-8b",
    (12288, 4096): "qwen3-reranker-8b",
}
"""(K, N) of products that the models are made of, and whose a card's rate at our shapes is taken over."""

FULL = Sizes(row_tokens=16384, rows=4, length=512, mean=250, prefix=90)
TOY = Sizes(row_tokens=256, rows=2, length=60, mean=30, prefix=10)


def uniform(sizes: Sizes) -> Load:
    """Pairs of one length, as many as fill the rows."""
    return [Request(0, [sizes.length] * (sizes.row_tokens // sizes.length)) for _ in range(sizes.rows)]


def mixed(sizes: Sizes, prefix: int = 0, seed: int = 0) -> Load:
    """Lengths spread as a lognormal, as those of XQuAD's English pairs, each request 98 % of a row: so much lets first
    fit need no further row. prefix: of the request, besides."""
    rng = np.random.default_rng(seed)
    load = []
    for _ in range(sizes.rows):
        left, own = int(0.98 * sizes.row_tokens) - prefix, []
        while left > 0:
            length = int(np.clip(rng.lognormal(np.log(sizes.mean) - 0.08, 0.4), 4, sizes.length))
            own.append(min(length, left))
            left -= own[-1]
        load.append(Request(prefix, own))
    return load


def loads(causal: bool, smoke: bool, rows: int | None = None) -> dict[str, Load]:
    """By name; stars for causal models alone. rows: instead of the usual number."""
    sizes = TOY if smoke else FULL
    sizes = sizes._replace(rows=rows or sizes.rows)
    every = {"uniform": uniform(sizes), "mixed": mixed(sizes)}
    return {**every, "stars": mixed(sizes, prefix=sizes.prefix)} if causal else every


def tokens_of(load: Load, vocab: int, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """(prefix, own tokens) of every pair, random; pairs of one request have one prefix."""
    rng = np.random.default_rng(seed)
    pairs = []
    for request in load:
        prefix = rng.integers(3, vocab, request.prefix, dtype=np.int32)
        pairs += [(prefix, rng.integers(3, vocab, length, dtype=np.int32)) for length in request.own]
    return pairs
