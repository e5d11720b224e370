"""The attention body of a model. It is chosen once, checked on the model's device, and written into its modules.

A body is right if its result agrees with that of `dense` in float32, for one small packed row with the model's own
heads. The check costs two small programs, and one more for each body that fails.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from jaxrank.errors import ModelError, RequestError
from jaxrank.kernels import IMPLEMENTATIONS, attention, default_line, heads_of, is_for_cpu, norm_rotary, operand_dtype
from jaxrank.kernels.rotary import rotary
from jaxrank.runtime.packing import pack
from jaxrank.sharding import MODEL, specs
from jaxrank.types import AttentionShape, Encoded, Packed

TOLERANCE = 0.02
"""The largest difference that is allowed, as a share of the norm of a result.

Operands in bfloat16 give 0.002 to 0.005. One wrong tile gives more than the tolerance.
"""

TOKENS = 512
STARS = ((70, (33, 1, 90)), (130, (64, 17)))
"""Two requests, as (tokens of the prefix, tokens of each document).

With them in the row, 107 tokens are filler.
"""
DOCUMENTS = ((0, (190, 1, 64, 129, 21)),)
"""The same for a model whose tokens attend in both directions."""
LARGE = 1e30

log = logging.getLogger(__name__)


class Failure(NamedTuple):
    """An attention body that is not used, and the reason."""

    implementation: str
    reason: str


class Choice(NamedTuple):
    """The attention body that is used, and the faster ones that failed on this device."""

    implementation: str
    failed: tuple[Failure, ...] = ()

    def __str__(self) -> str:
        failed = ", ".join(one.implementation for one in self.failed)
        return f"{self.implementation} ({failed} failed)" if failed else self.implementation


def settle(module: Any, *, causal: bool, dtype: DTypeLike, mesh: Mesh | None = None) -> Choice:
    """Choose the attention body of a model, a vision tower or an outline, and write its name into the modules.

    If the modules name a body already, that one is kept. Otherwise the first body in the device's line that is right is
    taken. On CPU the bodies of XLA are not checked, because nothing else is in line there.

    Args:
        module: the model, tower or outline.
        causal: whether rows hold prefixes with several documents, and each token sees what stands before it. Otherwise
            rows hold documents whose tokens attend in both directions.
        dtype: the dtype of the matrices.
        mesh: the devices, if there are several.

    Returns:
        The chosen body, and those that failed.

    Raises:
        RequestError: the name is unknown.
        ModelError: the named body is wrong, or all bodies in line are wrong.
    """
    named: str | None = module.implementation
    if named is not None and named not in IMPLEMENTATIONS:
        raise RequestError(f"attention: implementation {named!r} is unknown; one of {', '.join(IMPLEMENTATIONS)}")
    line = default_line(dtype) if named is None else (named,)
    if len(line) == 1 and is_for_cpu(line[0]):
        choice = Choice(line[0])
    else:
        device = jax.local_devices()[0] if mesh is None else mesh.local_devices[0]
        agree = everywhere if mesh is not None and mesh.is_multi_process else bool
        sample = Sample(shape_of_part(module, mesh), causal, dtype)
        choice = choose(line, sample, device, agree)
    use_implementation(module, choice.implementation)
    return choice


def use_implementation(module: nnx.Module, implementation: str | None) -> None:
    """Write the name of an attention body into all modules that have a field for it."""
    for _, one in nnx.iter_modules(module):
        if hasattr(one, "implementation"):
            setattr(one, "implementation", implementation)  # noqa: B010  # nnx.Module declares no such attribute


def shape_of_part(module: Any, mesh: Mesh | None) -> AttentionShape:
    """Return the shape of one device's part of a module's heads.

    Raises:
        UnsupportedError: the devices cannot share the heads.
    """
    shape: AttentionShape = module.config.attention
    if mesh is None or mesh.shape[MODEL] == 1:
        return shape
    specs(nnx.state(module), mesh)
    parts = mesh.shape[MODEL]
    return shape._replace(heads=shape.heads // parts, kv_heads=shape.kv_heads // parts)


def everywhere(right: bool) -> bool:
    """Return whether `right` is true in all processes. Every process must call this function."""
    return bool(multihost_utils.process_allgather(np.array(right)).all())


class Sample:
    """A packed row with filler at its end, and the operands of attention: normal numbers with a fixed seed.

    Attributes:
        drawn: q, k and v in `dtype`, the model's. Their filler holds values that no result may contain. These are NaN
            in q and k, and large numbers in v, because a weight of 0 times NaN is NaN.
        normed: queries, keys and scale for norm_rotary. It is empty where a model does not use norm_rotary.
    """

    def __init__(self, shape: AttentionShape, causal: bool, dtype: DTypeLike) -> None:
        self.dtype = dtype
        self.causal = causal
        rng = np.random.default_rng(0)
        sizes = (TOKENS, shape.heads, shape.size), *[(TOKENS, shape.kv_heads, shape.size)] * 2
        q, k, v = (rng.standard_normal(size, np.float32) for size in sizes)
        self.pairs = [
            Encoded(np.zeros(own, np.int32), own - 1, prefix=np.zeros(prefix, np.int32))
            for prefix, documents in (STARS if causal else DOCUMENTS)
            for own in documents
        ]
        used = int(self.row("dense").layout.used)
        q[used:], k[used:], v[used:] = np.nan, np.nan, LARGE
        self.drawn: tuple[Float[np.ndarray, "T heads H"], ...] = tuple(x.astype(jnp.dtype(dtype)) for x in (q, k, v))
        self.normed: tuple[Float32[np.ndarray, ...], ...] = ()
        if shape.norm_rotary:
            self.normed = tuple(rng.standard_normal(size, np.float32) for size in (*sizes[:2], shape.size))

    def row(self, implementation: str) -> Packed:
        """Return the packed row for that body."""
        return pack(self.pairs, TOKENS, causal=self.causal, implementation=implementation)


def choose(line: Sequence[str], sample: Sample, device: Any, agree: Callable[[bool], bool] = bool) -> Choice:
    """Return the first attention body in the line that is right on the device. A warning names each one that is not.

    Args:
        line: the names of the bodies, the fastest first.
        sample: the input of the check.
        device: the device.
        agree: a function from "the body is right here" to "it is right in every process".

    Raises:
        ModelError: no body in the line is right.
    """
    want = results("dense", sample, jnp.float32, device)
    failed: list[Failure] = []
    for i, name in enumerate(line):
        fault = find_fault(name, sample, want, device)
        if agree(fault is None):
            return Choice(name, tuple(failed))
        failed.append(Failure(name, fault or "it fails in another process"))
        if i + 1 < len(line):
            message = "attention: %s fails on this device, so %s takes its place: %s"
            log.warning(message, name, line[i + 1], failed[-1].reason)
    faults = "; ".join(f"{one.implementation}: {one.reason}" for one in failed)
    raise ModelError(
        f"attention is wrong on this device ({device.device_kind}): {faults}. Update JAX and the device's driver, name "
        "another implementation, or compute on CPU (JAX_PLATFORMS=cpu)"
    )


Results = dict[str, np.ndarray]
"""The results of a body for a sample, by their names. They are float64."""


def find_fault(implementation: str, sample: Sample, want: Results, device: Any) -> str | None:
    """Return in one line what is wrong with that body on the device, or None if it is right.

    Args:
        want: the right results.
    """
    try:
        got = results(implementation, sample, operand_dtype(sample.dtype, implementation), device)
    except Exception as error:  # compilers and drivers raise all kinds of exceptions
        said = str(error).strip().partition("\n")[0][:200]
        return f"{type(error).__name__}: {said}"
    for part, mine in got.items():
        if not np.isfinite(mine).all():
            return f"{part} has NaN or infinity"
        difference = np.linalg.norm(mine - want[part]) / np.linalg.norm(want[part])
        if not difference <= TOLERANCE:  # NaN is no match either
            return f"{part} is off by {difference:.1%} of its norm"
    return None


def results(implementation: str, sample: Sample, dtype: DTypeLike, device: Any) -> Results:
    """Run a body on the sample in a program of its own.

    Args:
        dtype: the dtype of q, k and v.
    """
    program = jax.jit(partial(compute, implementation=implementation, dtype=dtype))
    with jax.default_matmul_precision("highest") if implementation == "dense" else nullcontext():
        made = program(*jax.device_put((sample.row(implementation), sample.drawn, sample.normed), device))
    return {part: np.asarray(value).astype(np.float64) for part, value in made.items()}


def compute(
    row: Packed, drawn: Sequence[Array], normed: Sequence[Array], *, implementation: str, dtype: DTypeLike
) -> dict[str, Array]:
    """Compute attention of all rows and of the scored rows, and norm_rotary where a model has it.

    All operands are read as models have them, as parts of one product.
    """
    q, k, v = side_by_side(drawn, dtype, implementation)
    size = q.shape[-1]
    draw: Any = partial(attention, scale=size**-0.5, implementation=implementation)
    made = {
        "attention": draw(q, k, v, row.layout),
        "attention of scored rows": draw(drawn[0].astype(dtype)[row.score_at], k, v, row.score_layout),
    }
    if normed:
        queries, keys = side_by_side(normed[:2], dtype, implementation)
        turn: Any = partial(norm_rotary, eps=1e-6, dtype=dtype, implementation=implementation)
        by = rotary(row.positions, size, theta=1e6)
        made |= {
            "norm_rotary of queries": turn(queries, normed[2], by),
            "norm_rotary of keys": turn(keys, normed[2], by),
        }
    return made


def side_by_side(parts: Sequence[Array], dtype: DTypeLike, implementation: str) -> list[Any]:
    """Return arrays [T, heads, H] in the form in which attention reads columns of one array."""
    together = jnp.concatenate([part.astype(dtype).reshape(len(part), -1) for part in parts], 1)
    found, first = [], 0
    for part in parts:
        found.append(heads_of(together, first, part.shape[1], part.shape[2], implementation))
        first += part.shape[1]
    return found
