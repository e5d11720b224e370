"""The kernel of jaxrank.kernels.mosaic. It has a file of its own because the import of Mosaic GPU takes time.

A block of threads is one (head, query tile). It has a warpgroup for each 64 rows, which computes, and one more. The
latter makes the TMA copy keys and values of the listed tiles into a ring of buffers. The two warpgroups that compute
take turns: the tensor cores work for one while the other computes its softmax (Shah et al. 2024).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu
from jaxtyping import Array, Float, Int32

from jaxrank.kernels.grid import key_tile

plgpu: Any = mosaic_gpu
"""The module without its types, because these lack a part of what it has."""
WARPGROUP = 64
"""The rows that a warpgroup computes."""
MATRIX = plgpu.Layout.WGMMA
ROWS = MATRIX.reduce(1)
"""Where a warpgroup's registers hold scores and sums, and where they hold one value for each row."""
MASKED = -1e30
COMPUTE_REGISTERS, COPY_REGISTERS = 232, 40
"""The registers of a thread, if two warpgroups compute. With the warpgroup that copies, they use all that there are."""


class _Arrays(NamedTuple):
    """The arrays in global memory."""

    items: Any
    starts: Any
    spans: Any
    q: Any
    k: Any
    v: Any
    out: Any


class _Shared(NamedTuple):
    """The contents of shared memory: buffers, and barriers.

    The barriers say when buffers may be read (ready) and filled again (used).

    Attributes:
        turn: used where two warpgroups compute.
        weights: used by the interpreter.
    """

    query: Any
    keys: Any
    values: Any
    query_ready: Any
    keys_ready: Any
    values_ready: Any
    keys_used: Any
    values_used: Any
    turn: Any
    weights: Any


class _Static(NamedTuple):
    """The static settings of the kernel.

    Attributes:
        width: the keys of a tile.
        stages: the places in the ring.
        kv_heads: the number of key heads. Query head n uses key head n mod kv_heads.
        scale: the factor of the scores, with log2(e).
    """

    width: int
    stages: int
    kv_heads: int
    scale: float
    interpreted: bool


def attention(
    q: Float[Array, "R N H"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    spans: Int32[Array, "R 4"],
    items: Int32[Array, " I"],
    starts: Int32[Array, " starts"],
    *,
    tiles: tuple[int, int],
    stages: int,
    scale: float,
    interpret: Any,
) -> Float[Array, "R N H"]:
    """Compute attention. R and T are multiples of the sizes of a query and a key tile.

    These sizes are 64 or 128, and so is H. `stages` is the number of key tiles in shared memory at a time.
    """
    rows, heads, size = q.shape
    height, width = tiles
    workers = height // WARPGROUP
    static = _Static(width, stages, k.shape[1], scale * math.log2(math.e), bool(interpret))
    swizzled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    buffer = functools.partial(plgpu.SMEM, dtype=q.dtype, transforms=swizzled)
    shared = _Shared(
        query=buffer((workers, WARPGROUP, size)),
        keys=buffer((stages, width, size)),
        values=buffer((stages, width, size)),
        query_ready=plgpu.Barrier(num_barriers=workers),
        keys_ready=plgpu.Barrier(num_barriers=stages),
        values_ready=plgpu.Barrier(num_barriers=stages),
        keys_used=plgpu.Barrier(num_arrivals=workers, num_barriers=stages),
        values_used=plgpu.Barrier(num_arrivals=workers, num_barriers=stages),
        turn=plgpu.Barrier(num_arrivals=workers) if workers == 2 else None,
        weights=buffer((workers, WARPGROUP, width)) if interpret else None,
    )
    if interpret is True:
        interpret = plgpu.InterpretGPUParams()

    def block(*arrays: Any) -> None:
        pl.run_scoped(functools.partial(_block, _Arrays(*arrays), static), shared, collective_axes="warpgroup")

    return plgpu.kernel(
        block,
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid=(heads, rows // height),
        grid_names=("heads", "tiles"),
        num_threads=workers + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret or None,
        kernel_name="packed_attention",
    )(items, starts, spans, q, k, v)


def _block(arrays: _Arrays, static: _Static, shared: _Shared) -> None:
    """Run each warpgroup of a (head, query tile) whose items are [begin, begin + count)."""
    workers = shared.query.shape[0]
    warpgroup, tile = lax.axis_index("warpgroup"), lax.axis_index("tiles")
    begin = arrays.starts[tile]
    count = arrays.starts[tile + 1] - begin

    @pl.when(warpgroup < workers)
    def _() -> None:
        if shared.turn is not None:
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        _compute(arrays, static, shared, begin, count)

    @pl.when(warpgroup == workers)
    def _() -> None:
        if shared.turn is not None:
            plgpu.set_max_registers(COPY_REGISTERS, action="decrease")
        _copy_keys(arrays, static, shared, begin, count)


def _slot(i: Array, static: _Static) -> Array:
    """Return the place in the ring of the i-th key tile."""
    return lax.rem(i, jnp.int32(static.stages))


def _copy_keys(arrays: _Arrays, static: _Static, shared: _Shared, begin: Array, count: Array) -> None:
    """Copy every item's keys and values, as soon as a place in the ring is free."""
    head = lax.rem(lax.axis_index("heads"), jnp.int32(static.kv_heads))
    rings = (
        (arrays.k, shared.keys, shared.keys_ready, shared.keys_used),
        (arrays.v, shared.values, shared.values_ready, shared.values_used),
    )

    @pl.loop(0, count)
    def _(i: Array) -> None:
        slot = _slot(i, static)
        rows = pl.ds(key_tile(arrays.items[begin + i]) * static.width, static.width)
        for source, buffers, ready, used in rings:
            pl.when(i >= static.stages)(functools.partial(plgpu.barrier_wait, used.at[slot]))
            plgpu.copy_gmem_to_smem(source.at[rows, head], buffers.at[slot], ready.at[slot])

    if static.interpreted:  # the interpreter needs a wait for every arrival

        @pl.loop(jnp.maximum(count - static.stages, 0), count)
        def _(i: Array) -> None:
            for *_, used in rings:
                plgpu.barrier_wait(used.at[_slot(i, static)])


def _compute(arrays: _Arrays, static: _Static, shared: _Shared, begin: Array, count: Array) -> None:
    """Compute this warpgroup's rows of the query tile over all its key tiles, with a running maximum and sum."""
    worker, head = lax.axis_index("warpgroup"), lax.axis_index("heads")
    workers, height, size = shared.query.shape
    rows = pl.ds((lax.axis_index("tiles") * workers + worker) * height, height)
    query = shared.query.at[worker]
    plgpu.copy_gmem_to_smem(arrays.q.at[rows, head], query, shared.query_ready.at[worker])
    bounds = [plgpu.load(arrays.spans.at[rows, i], layout=ROWS, optimized=False) for i in range(4)]
    plgpu.barrier_wait(shared.query_ready.at[worker])
    plgpu.barrier_wait(shared.keys_ready.at[0])

    def arrive() -> None:
        if shared.turn is not None:
            plgpu.barrier_arrive(shared.turn)

    def take_turn() -> None:
        if shared.turn is not None:
            plgpu.barrier_wait(shared.turn)

    def swap() -> None:
        arrive()
        take_turn()

    def one_item(i: Array, carry: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        item, highest, total, sums = carry
        slot = _slot(i, static)
        # The load runs one step ahead, because a load from global memory takes time.
        next_item = arrays.items[begin + jnp.minimum(i + 1, count - 1)]
        scores = _multiply(query, shared.keys.at[slot].transpose((1, 0)), (height, static.width), swap)
        plgpu.barrier_arrive(shared.keys_used.at[slot])
        # An item below 0 is FULL.
        scores = lax.cond(item < 0, lambda: scores, lambda: _mask(scores, key_tile(item), bounds, static))
        highest, total, sums, weights = lax.optimization_barrier(_softmax(scores, highest, total, sums, static))
        arrive()
        plgpu.barrier_wait(shared.values_ready.at[slot])
        take_turn()

        def wait_for_keys() -> None:
            pl.when(i + 1 < count)(lambda: plgpu.barrier_wait(shared.keys_ready.at[_slot(i + 1, static)]))

        buffer = shared.weights.at[worker] if static.interpreted else None
        sums = _add_product(sums, weights.astype(query.dtype), shared.values.at[slot], buffer, wait_for_keys)
        plgpu.barrier_arrive(shared.values_used.at[slot])
        return next_item, highest, total, sums

    pl.when(worker == 1)(swap)
    # The maximum starts below all scores but above MASKED. So MASKED weighs 0 even in a row that has seen no key yet.
    carry = (arrays.items[begin], _filled(MASKED / 2, height), _filled(0.0, height), _filled(0.0, height, size))
    _, _, total, sums = lax.fori_loop(0, count, one_item, carry)
    pl.when(worker == 0)(swap)
    sums *= _wide(jnp.where(total > 0, 1 / jnp.where(total > 0, total, 1), 0), sums)
    query[...] = sums.astype(query.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(query, arrays.out.at[rows, head])
    plgpu.wait_smem_to_gmem(0)


def _filled(value: float, *shape: int) -> Array:
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), ROWS if len(shape) == 1 else MATRIX)


def _wide(x: Array, like: Array) -> Array:
    """Spread one value for each row over all columns."""
    return lax.broadcast_in_dim(x, like.shape, [0])


def _mask(scores: Array, tile: Array, bounds: list[Array], static: _Static) -> Array:
    """Set the scores of keys outside the row's spans to MASKED.

    In MATRIX a thread has the columns 8 j + lane and 8 j + lane + 1 of a row, at most 32. What depends only on row and
    lane is computed once: a word with a bit for each column. A column then takes two instructions. A comparison with
    the bounds would take five.
    """
    column = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=MATRIX)
    lane, bit = column & 6, (column >> 3 << 1) | (column & 1)

    def before(bound: Array) -> Array:
        """Return the bits of columns before the bound. 1 is shifted three times, because a shift by 32 is undefined."""
        at = jnp.clip(_wide(bound - tile * static.width, scores) - lane, 0, static.width)
        eights = at >> 3
        return ((1 << eights << eights) << jnp.minimum(at & 7, 2)) - 1

    a0, a1, b0, b1 = (before(bound) for bound in bounds)
    seen = (a1 & ~a0) | (b1 & ~b0)
    return jnp.where((seen & (1 << bit)) != 0, scores, MASKED / static.scale)


def _softmax(scores: Array, highest: Array, total: Array, sums: Array, static: _Static) -> tuple[Array, ...]:
    """Return the running maximum and sum with these scores, the earlier sums for the new maximum, and the weights."""
    higher = jnp.maximum(highest, scores.max(axis=1) * static.scale)
    shrink = jnp.exp2(highest - higher)
    weights = jnp.exp2(scores * static.scale - _wide(higher, scores))
    return higher, total * shrink + weights.sum(axis=1), sums * _wide(shrink, sums), weights


def _multiply(left: Any, right: Any, shape: tuple[int, ...], meanwhile: Callable[[], None]) -> Array:
    """Return left @ right, in float32. `meanwhile` runs when the tensor cores have begun."""

    def multiply(out: Any) -> Array:
        plgpu.wgmma(out, left, right)
        meanwhile()
        return out[...]

    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))


def _add_product(sums: Array, weights: Array, values: Any, buffer: Any, meanwhile: Callable[[], None]) -> Array:
    """Return sums + weights @ values.

    The interpreter uses `buffer`, because it has no wgmma with weights in registers.
    """
    if buffer is not None:
        buffer[...] = weights
        plgpu.commit_smem()
        return sums + _multiply(buffer, values, sums.shape, meanwhile)

    def multiply(out: Any) -> None:
        plgpu.wgmma(out, weights, values)
        meanwhile()

    return pl.run_state(multiply)(plgpu.ACC.init(sums))
