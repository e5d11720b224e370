"""Pieces that every model family shares: products in float32, norms, activations, running a stack of layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32, Shaped

from jaxrank.errors import UnsupportedError
from jaxrank.kernels import LONG_ROW, is_for_cpu
from jaxrank.sharding import sum_over_shards
from jaxrank.types import ArrayLike

INIT_SCALE = 0.02
RUN = 1024


def refuse(fields: Mapping[str, tuple[Any, Any]]) -> None:
    """UnsupportedError that names every field of config.json whose value is not the one that is implemented.

    fields: by name, (what config.json says or implies, what is implemented).
    """
    refused = [f"{name} = {came!r} (implemented: {known!r})" for name, (came, known) in fields.items() if came != known]
    if refused:
        raise UnsupportedError("config.json asks for what jaxrank does not compute: " + "; ".join(refused))


def weight(
    rngs: nnx.Rngs | None, shape: Sequence[int], dtype: DTypeLike, *, shard: int | None = None
) -> nnx.Param[Array]:
    """A normal-distributed parameter, for training from scratch and tests; zeros without rngs, for outlines.

    shard: the axis, counted from the last, that several devices share (see jaxrank.sharding).
    """
    if rngs is None:
        return nnx.Param(jnp.zeros(tuple(shape), dtype), shard=shard)
    values = jax.random.normal(rngs.params(), tuple(shape), jnp.float32).astype(dtype) * INIT_SCALE
    return nnx.Param(values, shard=shard)


def einsum(spec: str, x: Array, kernel: Array) -> Float32[Array, ...]:
    """A product with float32 accumulation and result, whatever the operands' dtype.

    Free on TPU and GPU; on CPU it is what reaches XLA's bfloat16 kernels.
    """
    return jnp.einsum(spec, x, kernel, preferred_element_type=jnp.float32)


def table_rows(
    table: Float[Array, "V D"], at: Int32[ArrayLike, " R"], implementation: str | None
) -> Float32[Array, "R D"]:
    """table[at] in float32. On CPU a bfloat16 table is read as integers, since XLA would not fuse its reading with what
    follows; a TPU would copy the whole table for that. implementation: that of attention."""
    if table.dtype != jnp.bfloat16 or not is_for_cpu(implementation):
        return table[at].astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(table, jnp.uint16)[at]
    return jax.lax.bitcast_convert_type(bits, jnp.bfloat16).astype(jnp.float32)


class Projection(nnx.Module):
    """x @ kernel + bias with any number of axes on either side; the result is float32.

    shard: the letter in spec of the axis that several devices share.
    """

    def __init__(
        self,
        spec: str,
        shape: tuple[int, ...],
        bias: tuple[int, ...],
        dtype: DTypeLike,
        rngs: nnx.Rngs | None,
        *,
        shard: str = "",
    ):
        self.spec = spec
        _, kernel, out = spec.replace("->", ",").split(",")
        self.kernel = weight(rngs, shape, dtype, shard=kernel.index(shard) - len(kernel) if shard else None)
        cut = shard and shard in out
        self.bias = nnx.Param(jnp.zeros(bias, jnp.float32), shard=out.index(shard) - len(out) if cut else None)
        self.sums_shards = bool(shard) and not cut

    def __call__(self, x: Array) -> Float32[Array, "R ..."]:
        product = einsum(self.spec, x.astype(self.kernel.dtype), self.kernel[...])
        return (sum_over_shards(product) if self.sums_shards else product) + self.bias[...]


class LayerNorm(nnx.Module):
    """Layer normalisation over D in float32 (Ba, Kiros, Hinton 2016)."""

    def __init__(self, width: int, eps: float):
        self.scale = nnx.Param(jnp.ones(width, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(width, jnp.float32))
        self.eps = eps

    def __call__(self, x: Float32[Array, "R D"]) -> Float32[Array, "R D"]:
        centred = x - x.mean(-1, keepdims=True)
        variance = jnp.square(centred).mean(-1, keepdims=True)
        return centred * jax.lax.rsqrt(variance + self.eps) * self.scale[...] + self.bias[...]


def gelu(x: Float[Array, ...]) -> Float[Array, ...]:
    """Exact gelu, x * Phi(x) (Hendrycks and Gimpel 2016).

    Written with erf, not with the erfc of jax.nn.gelu: on CPU that takes half the time, and the difference, an
    absolute 1e-7 * |x| for negative x, is below the rounding of what follows. PyTorch computes the same form.
    """
    return 0.5 * x * (1.0 + jax.lax.erf(x * math.sqrt(0.5)))


def save_memory(rows: int, implementation: str | None) -> bool:
    """Whether a row is so long that its layers are computed piece by piece: on CPU, where memory is what weights and
    programs leave, and where small pieces cost no time. implementation: that of attention."""
    return rows > LONG_ROW and is_for_cpu(implementation)


def in_runs(
    f: Callable[..., Array],
    out: Float[Array, "R ..."],
    *sources: Shaped[ArrayLike, "R ..."],
    used: ArrayLike,
    implementation: str | None,
) -> Float[Array, "R ..."]:
    """f(out, *sources) for an f that treats every row alone and returns what takes the place of `out`.

    Where memory is saved, rows go through f in runs, and only as many as hold the first `used` rows: the others stay
    what they are.
    """
    if not save_memory(len(out), implementation):
        return f(out, *sources)
    size = next(n for n in range(RUN, 0, -1) if len(out) % n == 0)

    def one_run(i: Array, out: Array) -> Array:
        runs = (jax.lax.dynamic_slice_in_dim(y, i * size, size) for y in (out, *sources))
        return jax.lax.dynamic_update_slice_in_dim(out, f(*runs), i * size, 0)

    return jax.lax.fori_loop(0, (used + size - 1) // size, one_run, out)


def stack(layers: nnx.List) -> Any:
    """One layer whose parameters carry a leading axis over `layers`, for `run_layers` to scan over."""
    graph, _ = nnx.split(layers[0])
    return nnx.merge(graph, jax.tree.map(lambda *leaves: jnp.stack(leaves), *(nnx.state(layer) for layer in layers)))


def run_layers(
    layers: Any, x: Float[Array, "T D"], *args: Any, added: Float[Array, "layers T D"] | None = None
) -> Float[Array, "T D"]:
    """x through all layers: a plain loop over a list, a lax.scan over a stacked layer (see `stack`).

    added: what comes to x after each layer.
    """
    if isinstance(layers, nnx.List):
        for i, layer in enumerate(layers):
            x = layer(x, *args)
            x = x if added is None else x + added[i].astype(x.dtype)
        return x
    graph, state = nnx.split(layers)

    def one(x: Array, now: tuple[Any, Array | None]) -> tuple[Array, None]:
        params, more = now
        x = nnx.merge(graph, params)(x, *args)
        return (x if more is None else x + more.astype(x.dtype)), None

    return jax.lax.scan(one, x, (state, added))[0]
