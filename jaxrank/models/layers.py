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
from jaxrank.models.quantized import Matrix, Quantized
from jaxrank.sharding import sum_over_shards
from jaxrank.types import ArrayLike

INIT_SCALE = 0.02
RUN = 1024
HEAD_GROUP = 4
"""Key/value heads that are computed together, with their query heads, in a long row."""


def refuse(fields: Mapping[str, tuple[Any, Any]]) -> None:
    """UnsupportedError that names every field of config.json whose value is not the one that is implemented.

    fields: by name, (what config.json says or implies, what is implemented).
    """
    refused = [f"{name} = {came!r} (implemented: {known!r})" for name, (came, known) in fields.items() if came != known]
    if refused:
        raise UnsupportedError("config.json asks for what jaxrank does not compute: " + "; ".join(refused))


def weight(
    rngs: nnx.Rngs | None,
    shape: Sequence[int],
    dtype: DTypeLike,
    *,
    shard: int | None = None,
    scale_over: Sequence[int] = (),
) -> nnx.Param[Array]:
    """A normal-distributed parameter, for training from scratch and tests; zeros without rngs, for outlines.

    Axes are counted from the last. shard: the one that several devices share (see jaxrank.sharding). scale_over: those
    that share a scale where the parameter is quantised, the ones that products sum over, or a table's columns; without
    any it never is.
    """
    declared: dict[str, Any] = {"shard": shard, "scale_over": tuple(scale_over)}
    if rngs is None:
        return nnx.Param(jnp.zeros(tuple(shape), dtype), **declared)
    values = jax.random.normal(rngs.params(), tuple(shape), jnp.float32).astype(dtype) * INIT_SCALE
    return nnx.Param(values, **declared)


def einsum(spec: str, x: Array, kernel: Matrix) -> Float32[Array, ...]:
    """A product with float32 accumulation and result, whatever the operands' dtype. The kernel's axes that are not
    summed over are the result's last.

    Free on TPU and GPU; on CPU it is what reaches XLA's bfloat16 kernels.
    """
    if isinstance(kernel, Quantized):
        product = einsum(spec, x, kernel.values.astype(x.dtype))
        return product * kernel.scale.reshape(product.shape[1:])
    return jnp.einsum(spec, x, kernel, preferred_element_type=jnp.float32)


def table_rows(
    table: Float[Array, "V D"] | Quantized, at: Int32[ArrayLike, " R"], implementation: str | None
) -> Float32[Array, "R D"]:
    """table[at] in float32. On CPU a bfloat16 table is read as integers, since XLA would not fuse its reading with what
    follows; a TPU would copy the whole table for that. implementation: that of attention."""
    if isinstance(table, Quantized):
        return table.values[at].astype(jnp.float32) * table.scale[at]
    if table.dtype != jnp.bfloat16 or not is_for_cpu(implementation):
        return table[at].astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(table, jnp.uint16)[at]
    return jax.lax.bitcast_convert_type(bits, jnp.bfloat16).astype(jnp.float32)


class Projection(nnx.Module):
    """x @ kernel + bias with any number of axes on either side; the result is float32.

    shard: the letter in spec of the axis that several devices share. quantizes: whether --quantization is for it.
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
        quantizes: bool = False,
    ):
        self.spec = spec
        _, kernel, out = spec.replace("->", ",").split(",")
        self.kernel = weight(
            rngs,
            shape,
            dtype,
            shard=kernel.index(shard) - len(kernel) if shard else None,
            scale_over=[i - len(kernel) for i, axis in enumerate(kernel) if axis not in out] if quantizes else (),
        )
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


def add_by_heads(
    add: Callable[[Array | int, int, Array], Array],
    x: Float[Array, "R D"],
    heads: int,
    keys: int,
    implementation: str | None,
) -> Float[Array, "R D"]:
    """x with what attention's heads add to it: add(i, group, x) adds that of heads i * group to (i + 1) * group.

    All at once, but for a row of so many `keys` that memory is saved: there a few at a time. heads: key/value heads.
    """
    group = HEAD_GROUP if save_memory(keys, implementation) and heads % HEAD_GROUP == 0 else heads
    if group == heads:
        return add(0, group, x)
    return jax.lax.fori_loop(0, heads // group, lambda i, x: add(i, group, x), x)


def some_heads(weights: nnx.Variable[Any], i: Array | int, group: int, axis: int) -> Any:
    """Heads i * group to (i + 1) * group of weights that have them on that axis."""

    def some(part: Array) -> Array:
        return part if part.shape[axis] == 1 else jax.lax.dynamic_slice_in_dim(part, i * group, group, axis)

    return jax.tree.map(some, weights[...])  # of int8 weights: the scales too, which may be one for all heads


def add_drawn(
    x: Float[Array, "R D"],
    drawn: Float[Array, "R heads H"],
    out: Float[Array, "heads H D"] | Quantized,
    *,
    used: ArrayLike,
    implementation: str | None,
) -> Float[Array, "R D"]:
    """x plus what these heads have drawn, through their part of the output projection."""

    def some(x: Array, drawn: Array) -> Array:
        return x + sum_over_shards(einsum("RNH,NHD->RD", drawn.astype(out.dtype), out))

    return in_runs(some, x, drawn, used=used, implementation=implementation)


def stack(layers: nnx.List, *, free: bool = False) -> Any:
    """One layer whose parameters carry a leading axis over `layers`, for `run_layers` to scan over.

    free: give each parameter's memory back once it is stacked; the layers are no use then.
    """

    def stacked(*leaves: Array) -> Array:
        together = jnp.stack(leaves)
        for leaf in leaves if free else ():
            leaf.delete()
        return together

    graph, _ = nnx.split(layers[0])
    return nnx.merge(graph, jax.tree.map(stacked, *(nnx.state(layer) for layer in layers)))


def stack_layers(model: Any) -> None:
    """Stack a model's or a vision tower's layers, or outlines of layers, in place, where they are not yet: all but the
    last, those of Qwen3-VL that add features by themselves, those of a tower stage by stage."""
    for name in ("adding", "layers"):
        if hasattr(model, name):
            setattr(model, name, _stacked(getattr(model, name)))
    if hasattr(model, "vision"):
        stack_layers(model.vision)
    if hasattr(model, "stages"):
        model.stages = nnx.List([_stacked(stage) for stage in model.stages])


def _stacked(layers: Any) -> Any:
    """Layers as one with a leading axis; none stay none. The layers are used up: each parameter is freed once it is
    stacked, so that a device needs little more than the weights."""
    if not isinstance(layers, nnx.List) or not len(layers):
        return layers
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(nnx.state(layers))):
        return nnx.eval_shape(stack, layers)
    return stack(layers, free=True)


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
