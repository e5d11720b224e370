"""Attention alone: the host's tile lists, and the default device's body against the dense form.

    python benchmarks/attention.py [--smoke] [--output benchmarks/results/attention-cpu.json]

Rows are full of documents with the lengths of XQuAD's English pairs (mean 250 tokens, spread as a lognormal), also as
stars with a shared prefix of 90 tokens. Least tiles: those in which any row sees any key, by looking at every one.
Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from machine import finish, median_seconds

from jaxrank.kernels import attention, make_layout
from jaxrank.kernels.tpu import tile_size
from jaxrank.runtime.packing import pack
from jaxrank.types import Encoded


def documents(tokens: int, prefix: int = 0, seed: int = 0) -> list[Encoded]:
    """Pairs that fill a row of so many tokens."""
    rng = np.random.default_rng(seed)
    shared, left, pairs = np.zeros(prefix, np.int32), tokens - prefix, []
    while (length := min(int(np.clip(rng.lognormal(5.45, 0.4), 40, 512)), left)) > 0:
        pairs.append(Encoded(np.zeros(length, np.int32), length - 1, prefix=shared))
        left -= length
    return pairs


def spans_of(tokens: int, prefix: int) -> np.ndarray:
    return np.asarray(pack(documents(tokens, prefix), tokens, causal=prefix > 0).layout.spans)


def lists(tokens: int, prefix: int, turns: int) -> dict[str, Any]:
    """How long the host takes for a row's tile list, and how many tiles beyond the least possible are on it."""
    spans = spans_of(tokens, prefix)
    layout, size = make_layout(spans, tokens, "tpu"), tile_size(tokens)
    keys = np.arange(tokens)
    least = 0
    for start in range(0, tokens, size):
        a0, a1, b0, b1 = (spans[start : start + size, i, None] for i in range(4))
        seen = ((keys >= a0) & (keys < a1) | (keys >= b0) & (keys < b1)).any(0)
        least += int(seen.reshape(-1, size).any(1).sum()) or 1
    return {
        "part": "list",
        "tokens": tokens,
        "prefix": prefix,
        "tiles": int(layout.starts[-1]),
        "tiles_over_least": round(int(layout.starts[-1]) / least, 3),
        "of_all_tiles": round(int(layout.starts[-1]) / len(layout.tiles), 4),
        "grid_ms": round(1e3 * median_seconds(lambda: make_layout(spans, tokens, "tpu"), turns), 3),
        "xla_list_ms": round(1e3 * median_seconds(lambda: make_layout(spans, tokens, "tiled"), turns), 3),
    }


def operands(tokens: int, heads: tuple[int, int, int], dtype: str) -> list[jax.Array]:
    """Random q, k and v for so many query heads and key/value heads of that size."""
    query_heads, kv_heads, size = heads
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(tokens, query_heads, size), (tokens, kv_heads, size), (tokens, kv_heads, size)]
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def beside_dense(tokens: int, prefix: int, heads: tuple[int, int, int], turns: int) -> dict[str, Any]:
    """The default device's attention against the dense form, float32, in turns."""
    size = heads[2]
    q, k, v = operands(tokens, heads, "float32")
    spans = spans_of(tokens, prefix)
    call = jax.jit(attention, static_argnames=("scale", "implementation"))

    def run(implementation: str | None) -> Callable[[], jax.Array]:
        layout = make_layout(spans, tokens, implementation)
        return lambda: call(q, k, v, layout, scale=size**-0.5, implementation=implementation)

    ours, dense = run(None), run("dense")
    difference = float(jnp.abs(ours() - dense()).max())
    seconds = [(median_seconds(ours, 1), median_seconds(dense, 1)) for _ in range(turns)]
    mine, theirs = (statistics.median(column) for column in zip(*seconds, strict=True))
    return {
        "part": "beside dense",
        "tokens": tokens,
        "prefix": prefix,
        "heads": heads,
        "ms": round(mine * 1e3, 2),
        "dense_ms": round(theirs * 1e3, 2),
        "ratio": round(theirs / mine, 2),
        "largest_difference": difference,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="small and short, to see that it runs")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args(argv)
    turns = 1 if arguments.smoke else 7
    rows = [lists(t, prefix, 3 * turns) for t in ((1024,) if arguments.smoke else (2048, 16384)) for prefix in (0, 90)]
    kinds = {"bge": (0, (16, 16, 64)), "qwen3": (90, (16, 8, 128))}
    for prefix, heads in kinds.values():
        rows.append(beside_dense(512 if arguments.smoke else 2048, prefix, heads, turns))
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    finish({"benchmark": "attention", "rows": rows}, arguments.output)


if __name__ == "__main__":
    main()
