"""Every attention body against float64, then small models on every body against the same on the dense form.

A row of the result is "ok" or not; only "ok" is what the driver goes by. Inputs are random, and what no row may see is
poisoned: NaN in queries and keys, 1e30 in values (a product of a weight 0 with NaN is NaN in any body, so values have
to be finite). Filler's output must be exactly 0, or it would reach other rows through the next layer's values.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.gpu_parts.part import Part
from benchmarks.gpu_parts.reference import cases, filled, reference
from benchmarks.shapes import bge, qwen3
from jaxrank.kernels import attention, make_layout
from jaxrank.runtime.packing import pack
from jaxrank.runtime.programs import compile_whole
from jaxrank.types import Encoded

HEADS = {"64": (4, 4, 64), "72": (2, 2, 72), "128 GQA": (4, 1, 128)}
"""Query heads, key/value heads and their size."""
LIMITS = {"bfloat16": (6e-3, 2e-2), "float32": (1e-5, 1e-4)}
"""Of the error's norm over the reference's: of all rows, and of the worst row."""
MODEL_LIMITS = {"bfloat16": 0.1, "float32": 0.01}
"""Of the largest difference from the dense form over the range of its logits; of so small models in bfloat16, whose
rounding alone moves logits by 0.05 of it, only gross faults are seen."""
SCALE_UP = 8.0
"""What random weights are multiplied with so that a small model's logits differ by more than 1."""
MODELS = {
    "bge-reranker-v2-m3": bge(256, 3, 4, 512),
    "qwen3-reranker-0.6b": qwen3(256, 3, 4, 512, tied=True, kv_heads=2, head_size=128),
}
"""The families, with heads as wide as the true ones."""


def operands(case: str, spans: np.ndarray, keys: int, heads: tuple[int, int, int], dtype: str, seed: int) -> Any:
    """q, k and v, poisoned."""
    query_heads, kv_heads, size = heads
    rng = np.random.default_rng([seed, size, len(case)])
    shapes = [(len(spans), query_heads, size), (keys, kv_heads, size), (keys, kv_heads, size)]
    q, k, v = (rng.standard_normal(shape, np.float32).astype(jnp.dtype(dtype)) for shape in shapes)
    seen = np.zeros(keys + 1, np.int64)
    for lo, hi in (spans[:, :2].T, spans[:, 2:].T):
        np.add.at(seen, lo, hi > lo)
        np.add.at(seen, hi, -(hi > lo).astype(np.int64))
    unseen = np.cumsum(seen)[:keys] == 0
    q[~filled(spans)], k[unseen], v[unseen] = np.nan, np.nan, 1e30
    return q, k, v


def compare(
    got: np.ndarray, again: np.ndarray, want: np.ndarray, rows: np.ndarray, spans: np.ndarray
) -> dict[str, Any]:
    """Relative norms of the error, and whether filler is 0 and a second call gave the same bits."""
    error = got[rows].astype(np.float64) - want
    norms = np.linalg.norm(want.reshape(len(rows), -1), axis=1)
    errors = np.linalg.norm(error.reshape(len(rows), -1), axis=1)
    return {
        "relative_norm": float(np.linalg.norm(errors) / np.linalg.norm(norms)),
        "worst_row": float((errors / norms).max()),
        "finite": bool(np.isfinite(got.astype(np.float32)).all()),
        "filler_is_zero": not got[~filled(spans)].astype(np.float32).any(),
        "twice_the_same": got.tobytes() == again.tobytes(),
    }


def is_right(row: dict[str, Any], dtype: str) -> bool:
    whole, worst = LIMITS[dtype]
    # written so that NaN is wrong
    near = row["relative_norm"] <= whole and row["worst_row"] <= worst
    return near and row["finite"] and row["filler_is_zero"] and row["twice_the_same"]


class Attentions:
    """All programs and references, made side by side while the first of them run."""

    def __init__(self, part: Part, pool: ThreadPoolExecutor):
        self.seeds = range(1 if part.smoke else 3)
        self.keys = {"long": 256 if part.smoke else 8192}
        self.usual = 128 if part.smoke else 2048
        self.spans = cases(self.usual, self.keys["long"], 8 if part.smoke else 128)
        self.pool = pool
        self.programs: dict[Any, Future[Any]] = {}
        self.references: dict[Any, Future[Any]] = {}
        kinds = [("bfloat16", heads) for heads in HEADS] + [("float32", "64")]
        kinds = kinds[2:3] if part.smoke else kinds
        self.todo = [(dtype, heads, case) for dtype, heads in kinds for case in self.spans]
        for body in part.bodies:
            for dtype, heads, case in self.todo:
                key = (body, dtype, heads, len(self.spans[case]), self._keys(case))
                if key not in self.programs:
                    self.programs[key] = pool.submit(self._compile, *key, case)
        for seed, (dtype, heads, case) in product(self.seeds, self.todo):
            self.references[seed, dtype, heads, case] = pool.submit(self._reference, seed, dtype, heads, case)

    def _keys(self, case: str) -> int:
        return self.keys.get(case, self.usual)

    def _compile(self, body: str, dtype: str, heads: str, rows: int, keys: int, case: str) -> Any:
        query_heads, kv_heads, size = HEADS[heads]
        q = jax.ShapeDtypeStruct((rows, query_heads, size), dtype)
        k = jax.ShapeDtypeStruct((keys, kv_heads, size), dtype)
        call = jax.jit(partial(attention, scale=size**-0.5, implementation=body))
        with jax.default_matmul_precision("highest"):
            return call.lower(q, k, k, make_layout(self.spans[case], keys, body)).compile()

    def _reference(self, seed: int, dtype: str, heads: str, case: str) -> Any:
        spans = self.spans[case]
        rows = np.flatnonzero(filled(spans))
        if case == "long":  # a fifth of the rows: some of every tile of any body
            rows = np.unique(np.concatenate([rows[::5], rows[-64:]]))
        q, k, v = operands(case, spans, self._keys(case), HEADS[heads], dtype, seed)
        return rows, (q, k, v), reference(q, k, v, spans, HEADS[heads][2] ** -0.5, rows)

    def check(self, part: Part, body: str) -> None:
        for dtype, heads, case in self.todo:
            spans, keys = self.spans[case], self._keys(case)
            with part.row(what="attention", body=body, dtype=dtype, heads=heads, case=case, ok=False) as row:
                program = self.programs[body, dtype, heads, len(spans), keys].result()
                layout = make_layout(spans, keys, body)
                found = []
                for seed in self.seeds:
                    rows, inputs, want = self.references[seed, dtype, heads, case].result()
                    got, again = (np.asarray(program(*inputs, layout)) for _ in range(2))
                    found.append(compare(got, again, want, rows, spans))
                row.update({key: max(one[key] for one in found) for key in ("relative_norm", "worst_row")})
                row.update({key: all(one[key] for one in found) for key in found[0] if key not in row})
                row["ok"] = all(is_right(one, dtype) for one in found)


def toy_pairs(causal: bool) -> list[Encoded]:
    """Eight pairs, in a model that reads one way a star and some without a prefix."""
    rng = np.random.default_rng(0)
    draw: Callable[[int], np.ndarray] = lambda n: rng.integers(3, 1000, n).astype(np.int32)  # noqa: E731
    prefix = draw(21)
    pairs = []
    for i, length in enumerate((3, 60, 40, 20, 1, 33, 17, 29)):
        shared: dict[str, Any] = {"prefix": prefix} if causal and i < 5 else {}
        pairs.append(Encoded(draw(length), length - 1 if causal else 0, **shared))
    return pairs


def toy_logits(name: str, body: str, dtype: str) -> np.ndarray:
    """A model with larger weights than it is born with, all else as in service."""
    module, config = MODELS[name]
    config = replace(config, vocab_size=1000, **({"position_rows": 514} if hasattr(config, "position_rows") else {}))
    model = module(config, dtype=dtype, rngs=nnx.Rngs(0), implementation=body)
    # what is not random, norms' ones and biases' zeros, stays
    larger = lambda x: x * SCALE_UP if float(jnp.std(x.astype(jnp.float32))) > 0 else x  # noqa: E731
    nnx.update(model, jax.tree.map(larger, nnx.state(model, nnx.Param)))
    pairs = toy_pairs(module.causal)
    packed = pack(pairs, 256, causal=module.causal, implementation=body)
    with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
        return np.asarray(compile_whole(model)(packed)(packed))[: len(pairs)]


def check_models(part: Part, body: str, futures: dict[Any, Future[np.ndarray]]) -> None:
    for dtype, name in [(dtype, name) for one, dtype, name in futures if one == body]:
        with part.row(what="model", body=body, dtype=dtype, model=name, ok=False) as row:
            want = futures["dense", dtype, name].result()
            got = futures[body, dtype, name].result()
            row["range"] = float(np.ptp(want))
            row["difference_over_range"] = float(np.abs(got - want).max() / np.ptp(want))
            row["ok"] = row["difference_over_range"] <= MODEL_LIMITS[dtype] and row["range"] > 1


def run(part: Part) -> None:
    with ThreadPoolExecutor(2 if part.smoke else os.cpu_count()) as pool:
        attentions = Attentions(part, pool)
        models: dict[Any, Future[np.ndarray]] = {}
        for body in part.bodies:
            attentions.check(part, body)
            dtypes = ["float32"] if part.smoke else list(MODEL_LIMITS)
            for one, dtype, name in product(("dense", body), dtypes, MODELS):
                if (one, dtype, name) not in models:
                    models[one, dtype, name] = pool.submit(toy_logits, name, one, dtype)
            check_models(part, body, models)
