"""Pieces that every model family shares: products in float32, norms, activations, running a stack of layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32, Shaped

from jaxrank.errors import UnsupportedError
from jaxrank.kernels import LONG_ROW, is_for_cpu, is_for_gpu, is_for_tpu, operand_dtype
from jaxrank.models.quantized import Matrix, Quantized
from jaxrank.sharding import sum_over_shards
from jaxrank.types import ArrayLike

INIT_SCALE = 0.02
RUN = 1024
UNROLLED = 2048
"""Rows up to which layers are unrolled on GPUs: see `run_layers`."""
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
    members: int = 1,
    size: int = 1,
    scale_over: Sequence[int] = (),
) -> nnx.Param[Array]:
    """A normal-distributed parameter, for training from scratch and tests; zeros without rngs, for outlines.

    Axes are counted from the last. shard: the one that several devices share, with so many members side by side, of
    heads of that size (see jaxrank.sharding). scale_over: those
    that share a scale where the parameter is quantised, the ones that products sum over, or a table's columns; without
    any it never is.
    """
    declared: dict[str, Any] = dict(shard=shard, members=members, size=size, scale_over=tuple(scale_over))
    if rngs is None:
        return nnx.Param(jnp.zeros(tuple(shape), dtype), **declared)
    values = jax.random.normal(rngs.params(), tuple(shape), jnp.float32).astype(dtype) * INIT_SCALE
    return nnx.Param(values, **declared)


def einsum(spec: str, x: Array, kernel: Matrix) -> Float32[Array, ...]:
    """A product with float32 accumulation and result, whatever the operands' dtype. The kernel's axes that are not
    summed over are the result's last.
    """
    if isinstance(kernel, Quantized):
        product = einsum(spec, x, kernel.values.astype(x.dtype))
        return product * kernel.scale.reshape(product.shape[1:])
    return jnp.einsum(spec, x, kernel, preferred_element_type=jnp.float32)


def rounded_product(
    x: Float[Array, "R D"], kernel: Matrix, implementation: str | None, bias: Float32[Array, " F"] | None = None
) -> Float[Array, "R F"]:
    """x @ kernel [D, F] + bias for what is rounded to the kernel's dtype at once; accumulated in float32.

    On accelerators the result has that dtype. On CPU it is float32, which is what reaches XLA's bfloat16 kernels. A GPU
    rounds before the bias is added too: it would write a float32 product and read it again, where a TPU adds the bias
    to what it makes. implementation: that of attention.
    """
    dtype = operand_dtype(kernel.dtype, implementation)
    x = x.astype(kernel.dtype)
    if is_for_gpu(implementation) and not isinstance(kernel, Quantized):
        product = jnp.einsum("RD,DF->RF", x, kernel, preferred_element_type=dtype)
    else:
        product = einsum("RD,DF->RF", x, kernel)
    return (product if bias is None else product + bias).astype(dtype)


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
    """x @ kernel [D, F] + bias [F]; the result is float32. F = 0 stands for a kernel [D] and one number a row.

    shard: the axis of the kernel that several devices share, -2 for D, -1 for F; members, size: as `weight` has them.
    quantizes: whether --quantization is for it.
    """

    def __init__(
        self,
        wide: int,
        out: int,
        dtype: DTypeLike,
        rngs: nnx.Rngs | None,
        *,
        shard: int | None = None,
        members: int = 1,
        size: int = 1,
        quantizes: bool = False,
    ):
        cut: dict[str, Any] = dict(members=members, size=size)
        shape = (wide, out) if out else (wide,)
        self.kernel = weight(rngs, shape, dtype, shard=shard, scale_over=(-2,) if quantizes else (), **cut)
        self.bias = nnx.Param(jnp.zeros(shape[1:], jnp.float32), shard=-1 if shard == -1 else None, **cut)
        self.sums_shards = shard == -2

    def __call__(self, x: Array) -> Float32[Array, "R ..."]:
        product = einsum("RD,D...->R...", x.astype(self.kernel.dtype), self.kernel[...])
        return (sum_over_shards(product) if self.sums_shards else product) + self.bias[...]

    def add_to(self, x: Float32[Array, "R F"], y: Array) -> Float32[Array, "R F"]:
        """x + y @ kernel + bias, in this order: XLA then adds x where it makes the product, and reads it no more."""
        product = einsum("RD,DF->RF", y.astype(self.kernel.dtype), self.kernel[...])
        return x + (sum_over_shards(product) if self.sums_shards else product) + self.bias[...]

    def rounded(self, x: Array, implementation: str | None) -> Float32[Array, "R F"]:
        """The same where no device has a part of the sum, from a product that is rounded at once."""
        return rounded_product(x, self.kernel[...], implementation).astype(jnp.float32) + self.bias[...]


class LayerNorm(nnx.Module):
    """Layer normalisation over D in float32 (Ba, Kiros, Hinton 2016).

    implementation: that of attention. For TPU the variance is the mean of squares less the square of the mean: XLA
    finds both where it makes the product before. It keeps float32's precision where the mean is not many times the
    deviation, as in a residual stream. XLA's GPU backend makes fewer kernels of the other form.
    """

    def __init__(self, width: int, eps: float, implementation: str | None = None):
        self.scale = nnx.Param(jnp.ones(width, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(width, jnp.float32))
        self.eps = eps
        self.implementation = implementation

    def __call__(self, x: Float32[Array, "R D"]) -> Float32[Array, "R D"]:
        mean = x.mean(-1, keepdims=True)
        centred = x - mean
        if is_for_tpu(self.implementation):
            variance = jnp.maximum(jnp.square(x).mean(-1, keepdims=True) - jnp.square(mean), 0.0)
        else:
            variance = jnp.square(centred).mean(-1, keepdims=True)
        return centred * jax.lax.rsqrt(variance + self.eps) * self.scale[...] + self.bias[...]


def apart(x: Array, implementation: str | None) -> Array:
    """x as it is; on TPU it is written before it is used. XLA would make x and the product after it one fusion there,
    which takes more time than both. implementation: that of attention."""
    return jax.lax.optimization_barrier(x) if is_for_tpu(implementation) else x


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
    f: Callable[..., Any],
    out: Any,
    *sources: Shaped[ArrayLike, "R ..."],
    used: ArrayLike,
    implementation: str | None,
) -> Any:
    """f(out, *sources) for an f that treats every row alone and returns what takes the place of `out`: an array
    [R, ...], or several; zeros of their shapes where `out` is None.

    Where memory is saved, rows go through f in runs, and only as many as hold the first `used` rows: the others stay
    what they are.
    """
    rows = len(sources[0] if out is None else out)
    if not save_memory(rows, implementation):
        return f(out, *sources)
    if out is None:
        shapes = jax.eval_shape(partial(f, None), *sources)
        out = jax.tree.map(lambda made: jnp.zeros(made.shape, made.dtype), shapes)
    size = next(n for n in range(RUN, 0, -1) if rows % n == 0)

    def one_run(i: Array, out: Any) -> Any:
        runs = jax.tree.map(lambda y: jax.lax.dynamic_slice_in_dim(y, i * size, size), (out, *sources))
        put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=i * size, axis=0)
        return jax.tree.map(put, out, f(*runs))

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


def some_heads(
    weights: Any,
    i: Array | int,
    group: int,
    size: int,
    members: int,
    start: int = 0,
    stop: int | None = None,
    *,
    axis: int = -1,
) -> Any:
    """Of members start to stop on that axis of weights, key heads i * group to (i + 1) * group, each of that size."""
    stop = members if stop is None else stop

    def some(part: Array) -> Array:
        at = part.ndim + axis
        if part.shape[at] == 1:  # of int8 weights: a scale for all heads
            return part
        heads = part.shape[at] // (members * size)
        if group == heads:  # TPU would copy the whole array for the reshaping below
            return jax.lax.slice_in_dim(part, start * heads * size, stop * heads * size, axis=at)
        apart = part.reshape(*part.shape[:at], members, heads, size, *part.shape[at + 1 :])
        apart = jax.lax.slice_in_dim(apart, start, stop, axis=at)
        apart = jax.lax.dynamic_slice_in_dim(apart, i * group, group, at + 1)
        return apart.reshape(*part.shape[:at], -1, *part.shape[at + 1 :])

    return jax.tree.map(some, weights)


def add_drawn(
    x: Float[Array, "R D"],
    drawn: Float[Array, "R heads H"],
    out: Matrix,
    *,
    used: ArrayLike,
    implementation: str | None,
) -> Float[Array, "R D"]:
    """x plus the output projection of these heads' results; out is their part [heads * H, D] of it."""

    def some(x: Array, drawn: Array) -> Array:
        return x + sum_over_shards(einsum("RF,FD->RD", drawn.reshape(len(drawn), -1).astype(out.dtype), out))

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

    On a GPU a scan copies each layer's parameters out of the stack. Short rows, where that takes longest beside the
    layer's work, go through a loop that reads them in place, and run as one CUDA graph; XLA takes several times as long
    to compile it. In longer rows a layer's vectors are one copy.
    added: what comes to x after each layer.
    """
    if isinstance(layers, nnx.List):
        for i, layer in enumerate(layers):
            x = layer(x, *args)
            x = x if added is None else x + added[i].astype(x.dtype)
        return x
    graph, state = nnx.split(layers)
    on_gpu = is_for_gpu(layers.implementation)
    unroll = on_gpu and len(x) <= UNROLLED
    stacked, layer_state = _with_one_vector(state) if on_gpu and not unroll else (state, lambda now: now)

    def one(x: Array, now: tuple[Any, Array | None]) -> tuple[Array, None]:
        params, more = now
        x = nnx.merge(graph, layer_state(params))(x, *args)
        return (x if more is None else x + more.astype(x.dtype)), None

    return jax.lax.scan(one, x, (stacked, added), unroll=unroll)[0]


def _with_one_vector(state: Any) -> tuple[Any, Callable[[Any], Any]]:
    """Stacked layers whose vectors [layers, ...] are one array, and what makes a layer's own state of one of them."""
    leaves, tree = jax.tree.flatten(state)
    vectors = [leaf for leaf in leaves if leaf.ndim == 2]
    ends = [int(end) for end in np.cumsum([vector.shape[1] for vector in vectors])]

    def layer_state(now: tuple[Array, list[Array]]) -> Any:
        some, others = iter(jnp.split(now[0], ends[:-1])), iter(now[1])
        return jax.tree.unflatten(tree, [next(some if leaf.ndim == 2 else others) for leaf in leaves])

    return (jnp.concatenate(vectors, 1), [leaf for leaf in leaves if leaf.ndim != 2]), layer_state
