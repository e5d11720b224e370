"""Parts that every model family shares: products in float32, norms, activations, and running a stack of layers."""

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
"""On GPUs, layers are unrolled in rows up to this length; see `run_layers`."""
HEAD_GROUP = 4
"""The number of key/value heads that are computed together, with their query heads, in a long row."""


def refuse(fields: Mapping[str, tuple[Any, Any]]) -> None:
    """Check that config.json asks only for what is implemented.

    Args:
        fields: by name, (what config.json says or implies, what is implemented).

    Raises:
        UnsupportedError: some values differ. The message names all of them.
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
    """Return a normally distributed parameter, for training from scratch and tests.

    Without rngs it is zero, for outlines.

    Axes are counted from the last.

    Args:
        rngs: the source of random numbers, or None.
        shape: the shape.
        dtype: the dtype.
        shard: the axis that several devices share (see jaxrank.sharding).
        members: the number of members that stand side by side on that axis.
        size: the size of the heads of a member.
        scale_over: the axes that share a scale where the parameter is quantised. These are the axes that products sum
            over, or a table's columns. Without any, the parameter is never quantised.
    """
    declared: dict[str, Any] = dict(shard=shard, members=members, size=size, scale_over=tuple(scale_over))
    if rngs is None:
        return nnx.Param(jnp.zeros(tuple(shape), dtype), **declared)
    values = jax.random.normal(rngs.params(), tuple(shape), jnp.float32).astype(dtype) * INIT_SCALE
    return nnx.Param(values, **declared)


def einsum(spec: str, x: Array, kernel: Matrix) -> Float32[Array, ...]:
    """Return a product with float32 accumulation and result, whatever the operands' dtype.

    The kernel's axes that are not summed over must be the result's last.
    """
    if isinstance(kernel, Quantized):
        product = einsum(spec, x, kernel.values.astype(x.dtype))
        return product * kernel.scale.reshape(product.shape[1:])
    return jnp.einsum(spec, x, kernel, preferred_element_type=jnp.float32)


def rounded_product(
    x: Float[Array, "R D"], kernel: Matrix, implementation: str | None, bias: Float32[Array, " F"] | None = None
) -> Float[Array, "R F"]:
    """Return x @ kernel [D, F] + bias, accumulated in float32, for results that are rounded to the kernel's dtype at
    once.

    On accelerators the result has that dtype. On CPU it is float32, because this form reaches XLA's bfloat16 kernels. A
    GPU also rounds before the bias is added. Otherwise it would write a float32 product and read it again. A TPU adds
    the bias to the product while it makes it.

    Args:
        x: the input.
        kernel: the kernel [D, F].
        implementation: that of attention.
        bias: the bias, or None.
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
    """Return table[at] in float32.

    On CPU a bfloat16 table is read as integers. XLA would not fuse its reading with what follows otherwise. A TPU would
    copy the whole table for that.

    Args:
        table: the table.
        at: the indices of the rows.
        implementation: that of attention.
    """
    if isinstance(table, Quantized):
        return table.values[at].astype(jnp.float32) * table.scale[at]
    if table.dtype != jnp.bfloat16 or not is_for_cpu(implementation):
        return table[at].astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(table, jnp.uint16)[at]
    return jax.lax.bitcast_convert_type(bits, jnp.bfloat16).astype(jnp.float32)


class Projection(nnx.Module):
    """Compute x @ kernel [D, F] + bias [F]. The result is float32.

    Args:
        wide: D.
        out: F. 0 stands for a kernel [D] and one number for each row.
        dtype: the dtype of the kernel.
        rngs: the source of random numbers, or None.
        shard: the axis of the kernel that several devices share, -2 for D, -1 for F.
        members: as in `weight`.
        size: as in `weight`.
        quantizes: whether --quantization applies to it.
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
        """Return x + y @ kernel + bias, added in this order.

        XLA then adds x where it makes the product, and does not read x again.
        """
        product = einsum("RD,DF->RF", y.astype(self.kernel.dtype), self.kernel[...])
        return x + (sum_over_shards(product) if self.sums_shards else product) + self.bias[...]

    def rounded(self, x: Array, implementation: str | None) -> Float32[Array, "R F"]:
        """Return the same as a call, from a product that is rounded at once.

        No device may have only a part of the sum.
        """
        return rounded_product(x, self.kernel[...], implementation).astype(jnp.float32) + self.bias[...]


class LayerNorm(nnx.Module):
    """Layer normalisation over D in float32 (Ba, Kiros, Hinton 2016).

    On TPU the variance is the mean of squares minus the square of the mean. XLA computes both where it makes the
    product before. This form keeps float32's precision as long as the mean is not many times the deviation, as in a
    residual stream. On GPUs the other form is used, because XLA makes fewer kernels for it.

    Args:
        width: D.
        eps: the term that is added to the variance.
        implementation: that of attention.
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
    """Return x as it is. On TPU it is written to memory before it is used.

    Otherwise XLA would make x and the product after it one fusion there, which takes more time than both.
    `implementation` is that of attention.
    """
    return jax.lax.optimization_barrier(x) if is_for_tpu(implementation) else x


def gelu(x: Float[Array, ...]) -> Float[Array, ...]:
    """Return exact gelu, x * Phi(x) (Hendrycks and Gimpel 2016).

    It uses erf, and not erfc as jax.nn.gelu does, because erf takes half the time on CPU. The difference is an absolute
    1e-7 * |x| for negative x, below the rounding of what follows. PyTorch computes the same form.
    """
    return 0.5 * x * (1.0 + jax.lax.erf(x * math.sqrt(0.5)))


def save_memory(rows: int, implementation: str | None) -> bool:
    """Return whether a row is so long that its layers are computed piece by piece.

    This happens on CPU, where the memory left by weights and programs is the limit and small pieces cost no time.
    `implementation` is that of attention.
    """
    return rows > LONG_ROW and is_for_cpu(implementation)


def in_runs(
    f: Callable[..., Any],
    out: Any,
    *sources: Shaped[ArrayLike, "R ..."],
    used: ArrayLike,
    implementation: str | None,
) -> Any:
    """Return f(out, *sources), for an f that treats every row alone.

    Where memory is saved, rows go through f in runs. Then only the runs that hold the first `used` rows are computed,
    and the other rows stay as they are.

    Args:
        f: the function. It returns what takes the place of `out`.
        out: an array [R, ...], or several. None is for zeros of the shapes that f returns.
        sources: further arrays with R rows.
        used: the number of rows to compute.
        implementation: that of attention.
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
    """Return x with what attention's heads add to it.

    All heads are computed at once. Only in a row with so many `keys` that memory is saved, a few are computed at a
    time.

    Args:
        add: add(i, group, x) adds the output of heads i * group to (i + 1) * group.
        x: the input.
        heads: the number of key/value heads.
        keys: the number of keys of the row.
        implementation: that of attention.
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
    """Return a part of weights: key heads i * group to (i + 1) * group of members start to stop on that axis.

    Each head has that size.
    """
    stop = members if stop is None else stop

    def some(part: Array) -> Array:
        at = part.ndim + axis
        if part.shape[at] == 1:  # in int8 weights this is a scale for all heads
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
    """Return x plus the output projection of these heads' results.

    Args:
        x: the input.
        drawn: the results of the heads.
        out: the heads' part [heads * H, D] of the projection.
        used: as in `in_runs`.
        implementation: that of attention.
    """

    def some(x: Array, drawn: Array) -> Array:
        return x + sum_over_shards(einsum("RF,FD->RD", drawn.reshape(len(drawn), -1).astype(out.dtype), out))

    return in_runs(some, x, drawn, used=used, implementation=implementation)


def stack(layers: nnx.List, *, free: bool = False) -> Any:
    """Return one layer whose parameters have a leading axis over `layers`. `run_layers` scans over it.

    Args:
        layers: the layers.
        free: whether each parameter's memory is freed once it is stacked. The layers cannot be used afterwards.
    """

    def stacked(*leaves: Array) -> Array:
        together = jnp.stack(leaves)
        for leaf in leaves if free else ():
            leaf.delete()
        return together

    graph, _ = nnx.split(layers[0])
    return nnx.merge(graph, jax.tree.map(stacked, *(nnx.state(layer) for layer in layers)))


def stack_layers(model: Any) -> None:
    """Stack the layers of a model or a vision tower, or their outlines, in place, if they are not stacked yet.

    The last layer is not stacked, and neither are the layers of Qwen3-VL that add features. The layers of a tower are
    stacked stage by stage.
    """
    for name in ("adding", "layers"):
        if hasattr(model, name):
            setattr(model, name, _stacked(getattr(model, name)))
    if hasattr(model, "vision"):
        stack_layers(model.vision)
    if hasattr(model, "stages"):
        model.stages = nnx.List([_stacked(stage) for stage in model.stages])


def _stacked(layers: Any) -> Any:
    """Return layers as one with a leading axis. No layers stay no layers.

    The layers are used up: each parameter is freed once it is stacked. So a device needs little more memory than the
    weights.
    """
    if not isinstance(layers, nnx.List) or not len(layers):
        return layers
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(nnx.state(layers))):
        return nnx.eval_shape(stack, layers)
    return stack(layers, free=True)


def run_layers(
    layers: Any, x: Float[Array, "T D"], *args: Any, added: Float[Array, "layers T D"] | None = None
) -> Float[Array, "T D"]:
    """Return x after all layers, by a plain loop over a list, or a lax.scan over a stacked layer (see `stack`).

    On a GPU a scan copies each layer's parameters out of the stack. In short rows this takes long compared with the
    layer's work. So they go through a loop that reads the parameters in place, and run as one CUDA graph. XLA takes
    several times as long to compile it. In longer rows a layer's vectors are one copy.

    Args:
        added: what is added to x after each layer.
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
    """Join the vectors [layers, ...] of stacked layers into one array.

    Returns:
        The layers, and a function that makes a layer's own state from one of them.
    """
    leaves, tree = jax.tree.flatten(state)
    vectors = [leaf for leaf in leaves if leaf.ndim == 2]
    ends = [int(end) for end in np.cumsum([vector.shape[1] for vector in vectors])]

    def layer_state(now: tuple[Array, list[Array]]) -> Any:
        some, others = iter(jnp.split(now[0], ends[:-1])), iter(now[1])
        return jax.tree.unflatten(tree, [next(some if leaf.ndim == 2 else others) for leaf in leaves])

    return (jnp.concatenate(vectors, 1), [leaf for leaf in leaves if leaf.ndim != 2]), layer_state
