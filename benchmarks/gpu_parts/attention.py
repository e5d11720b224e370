"""Attention alone: every body on rows of 16,384 tokens, and cuDNN where its form of input allows, as the ceiling."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu_parts.part import Part, seconds_a_call
from benchmarks.gpu_parts.workloads import FULL, TOY, Request, Sizes, mixed, uniform
from benchmarks.machine import chained
from jaxrank.kernels import IMPLEMENTATIONS, make_layout
from jaxrank.kernels.grid import make_grid
from jaxrank.runtime.packing import pack
from jaxrank.types import Encoded

CHAIN = 10
HEADS = {False: (16, 16, 64), True: (16, 8, 128)}
"""By whether the model reads one way: v2-m3's and 0.6B's query heads, key/value heads and their size."""
VARIANTS = {"key_tile": (64, 128), "stages": (2, 3, 4)}
"""What bodies are tried with that have parameters of these names."""


def rows_of(sizes: Sizes, causal: bool) -> dict[str, np.ndarray]:
    """Spans by name."""
    every = {
        "uniform": uniform(sizes)[0],
        "mixed": mixed(sizes)[0],
        "one long": Request(0, [sizes.row_tokens // 2]),
        **({"stars": mixed(sizes, prefix=sizes.prefix)[0]} if causal else {}),
    }
    spans = {}
    for name, request in every.items():
        prefix = np.zeros(request.prefix, np.int32)
        pairs = [Encoded(np.zeros(n, np.int32), n - 1, prefix=prefix) for n in request.own]
        spans[name] = np.asarray(pack(pairs, sizes.row_tokens, causal=causal, implementation="dense").layout.spans)
    return spans


def variants(body: str) -> Iterator[dict[str, int]]:
    """The body as it is used, then with every combination of its parameters that VARIANTS names."""
    yield {}
    function = IMPLEMENTATIONS[body].body
    known = [name for name in VARIANTS if name in inspect.signature(function).parameters]
    if known:
        for values in product(*(VARIANTS[name] for name in known)):
            yield dict(zip(known, values, strict=True))


def layout_for(body: str, spans: np.ndarray, options: dict[str, int]) -> Any:
    """The body's own, or one with key tiles of that size."""
    if "key_tile" not in options:
        return make_layout(spans, len(spans), body)
    made: Any = IMPLEMENTATIONS[body].make_layout
    # what the body's own layouts are made with, but for the size of key tiles
    given = getattr(made, "keywords", {}) | {"key_tile_size": lambda _: options["key_tile"]}
    return getattr(made, "func", make_grid)(spans, len(spans), **given)


def operands(sizes: Sizes, causal: bool) -> list[jax.Array]:
    query_heads, kv_heads, size = HEADS[causal]
    shapes = [(sizes.row_tokens, heads, size) for heads in (query_heads, kv_heads, kv_heads)]
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True)]


def time_body(part: Part, sizes: Sizes, causal: bool, body: str, options: dict[str, int]) -> None:
    """A row for each kind of row; one program serves them all."""
    q, k, v = operands(sizes, causal)
    heads, _, size = HEADS[causal]
    once = partial(IMPLEMENTATIONS[body].body, scale=size**-0.5, **options)
    many = jax.jit(chained(once, CHAIN))
    for name, spans in rows_of(sizes, causal).items():
        labels = {"what": "attention", "body": body, "options": options, "causal": causal, "lengths": name}
        with part.row(hangs_after=45, **labels) as row:
            layout = jax.device_put(layout_for(body, spans, options))
            turns = 1 if part.smoke else 5
            seconds = seconds_a_call(lambda: many(q, k, v, layout), turns) / CHAIN  # noqa: B023
            needed = 4.0 * heads * size * float((spans[:, 1] - spans[:, 0] + spans[:, 3] - spans[:, 2]).sum())
            row["ms"] = round(seconds * 1e3, 4)
            row["tflops_per_s"] = round(needed / seconds / 1e12, 1)
            row["inside"] = f"{CHAIN} calls in a program on device arrays; FLOPs of the scores that are needed"


def time_cudnn(part: Part, sizes: Sizes, causal: bool) -> None:
    """On pairs of one length, which it takes as a batch."""
    heads, _, size = HEADS[causal]
    length = sizes.length if not part.smoke else 32
    many = sizes.row_tokens // length
    batch = [x[: many * length].reshape(many, length, *x.shape[1:]) for x in operands(sizes, causal)]
    name = "cudnn" if jax.default_backend() == "gpu" else "xla"
    with part.row(what="attention", body=name, options={}, causal=causal, lengths="uniform") as row:
        once = partial(jax.nn.dot_product_attention, scale=size**-0.5, is_causal=causal, implementation=name)
        call = jax.jit(chained(once, CHAIN))
        seconds = seconds_a_call(lambda: call(*batch), 1 if part.smoke else 5) / CHAIN
        needed = 4.0 * heads * size * many * length * (length + 1 if causal else 2 * length) / 2
        row["ms"] = round(seconds * 1e3, 4)
        row["tflops_per_s"] = round(needed / seconds / 1e12, 1)
        row["inside"] = f"{CHAIN} calls in a program on device arrays; jax.nn.dot_product_attention"


def run(part: Part) -> None:
    sizes = TOY if part.smoke else FULL
    bodies = [body for body in part.bodies if body != "dense"]  # whose scores alone would take 17 GB
    for causal in HEADS:
        for body in bodies:
            time_body(part, sizes, causal, body, {})
        time_cudnn(part, sizes, causal)
    for causal, body in product(HEADS, bodies):
        for options in list(variants(body))[1:]:
            time_body(part, sizes, causal, body, options)
