"""Versions, the card, and what it can do: bytes copied a second, and the rates of matrix products at our shapes."""

from __future__ import annotations

import subprocess
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.gpu_parts.part import Part, seconds_a_call
from benchmarks.gpu_parts.workloads import GEMMS
from benchmarks.machine import chained, facts, versions

CHAIN = 10
"""Products in one program: the time of a single one would hold the time of its launch."""
PACKAGES = (
    "jaxlib", "jaxtyping", "jax-cuda13-plugin", "jax-cuda12-plugin", "nvidia-cublas", "nvidia-cudnn-cu13",
    "nvidia-cudnn-cu12", "triton",
)  # fmt: skip
FIELDS = (
    "name", "driver_version", "memory.total", "compute_cap", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw",
    "power.limit", "temperature.gpu", "clocks_event_reasons.active",
)  # fmt: skip
KINDS: dict[str, tuple[Any, Any]] = {
    "bf16->bf16": (jnp.bfloat16, jnp.bfloat16),
    "bf16->f32": (jnp.bfloat16, jnp.float32),
    "fp8->bf16": (jnp.float8_e4m3fn, jnp.bfloat16),
}
"""Dtypes of the operands and of the result; the sums are float32."""


def nvidia_smi() -> dict[str, str]:
    """The card's state as its driver tells it. Raises OSError or CalledProcessError where there is none."""
    query = [f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader"]
    done = subprocess.run(["nvidia-smi", *query], capture_output=True, text=True, check=True, timeout=20)
    return dict(zip(FIELDS, done.stdout.splitlines()[0].split(", "), strict=True))


def product(a: jax.Array, b: jax.Array, result: Any) -> jax.Array:
    """a [M, K] times b [N, K], whose layout is the one that fp8 products want."""
    sums = jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    return sums.astype(result)


def gemm(shape: tuple[int, int, int], kind: str, turns: int) -> float:
    """FLOP/s of products of [M, K] and [K, N], CHAIN in a program, of random numbers: zeros run faster."""
    rows, inner, columns = shape
    operand, result = KINDS[kind]
    keys = jax.random.split(jax.random.key(0))
    if kind.startswith("bf16"):
        a, b = (
            jax.random.normal(key, s, operand) for key, s in zip(keys, ((rows, inner), (inner, columns)), strict=True)
        )
        multiply = lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32).astype(result)  # noqa: E731
    else:
        sides = ((rows, inner), (columns, inner))
        a, b = (jax.random.normal(key, s, jnp.bfloat16).astype(operand) for key, s in zip(keys, sides, strict=True))
        multiply = partial(product, result=result)
    many = jax.jit(chained(multiply, CHAIN))
    return CHAIN * 2.0 * rows * inner * columns / seconds_a_call(lambda: many(a, b), turns)


def busy_state(turns: int) -> dict[str, str]:
    """What nvidia-smi says while the card multiplies."""
    a, b = (jax.random.normal(key, (8192, 8192), jnp.bfloat16) for key in jax.random.split(jax.random.key(0)))
    many = jax.jit(chained(jnp.matmul, CHAIN))
    jax.block_until_ready(many(a, b))
    waiting = [many(a, b) for _ in range(12 * turns)]
    state = nvidia_smi()
    jax.block_until_ready(waiting)
    return state


def run(part: Part) -> None:
    turns = 1 if part.smoke else 5
    with part.row(what="versions") as row:
        row.update(facts())
        row["versions"] |= versions(PACKAGES)
    on_gpu = jax.default_backend() == "gpu"
    if on_gpu:
        with part.row(what="idle") as row:
            row.update(nvidia_smi())
        with part.row(what="memory") as row:
            row.update(jax.local_devices()[0].memory_stats() or {})
    with part.row(what="copy") as row:
        x = jnp.ones(2**12 if part.smoke else 2**28, jnp.float32)
        copies = jax.jit(chained(lambda x: x + 1.0, CHAIN))
        row["gb_per_s"] = round(CHAIN * 2.0 * x.nbytes / seconds_a_call(lambda: copies(x), turns) / 1e9, 1)
        row["inside"] = f"{CHAIN} passes of a program over {x.nbytes} bytes, read and written"
        del x
    shapes = [(64, 32, 48)] if part.smoke else [(16384, *shape) for shape in GEMMS] + [(8192, 8192, 8192)]
    for kind in KINDS:
        for shape in shapes:
            with part.row(what="gemm", kind=kind, m=shape[0], k=shape[1], n=shape[2]) as row:
                row["tflops_per_s"] = round(gemm(shape, kind, turns) / 1e12, 6 if part.smoke else 1)
    if on_gpu:
        with part.row(what="busy") as row:
            row.update(busy_state(turns))
