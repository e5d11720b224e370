"""QK-norm and rotary embedding against an independent float64 reference: complex numbers, head by head."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrank.kernels import IMPLEMENTATIONS, norm_rotary
from jaxrank.kernels.rotary import Rotary, rotary

EPS = 1e-3
THETA = 1e4
HEADS = {"one head": (1, 128), "GQA 128": (4, 128), "256 wide": (2, 256), "64 wide": (3, 64), "16 wide": (2, 16)}
RUNNABLE = [
    name
    for name, one in IMPLEMENTATIONS.items()
    if one.platform in (None, jax.default_backend()) and name != "mosaic-interpreted"
]


def reference(x: np.ndarray, scale: np.ndarray, positions: np.ndarray) -> np.ndarray:
    x = np.asarray(x, np.float64)
    half = x.shape[2] // 2
    out = np.empty_like(x)
    for row, position in enumerate(positions):
        for head in range(x.shape[1]):
            y = x[row, head] / np.sqrt(np.mean(x[row, head] ** 2) + EPS) * np.asarray(scale, np.float64)
            turned = (y[:half] + 1j * y[half:]) * np.exp(1j * position * THETA ** (-np.arange(half) / half))
            out[row, head] = np.concatenate([turned.real, turned.imag])
    return out


def case(rows: int, heads: int, size: int) -> tuple[jax.Array, jax.Array, np.ndarray]:
    """Rows of very different sizes, one of zeros, at positions that begin anew and reach 8,000."""
    rng = np.random.default_rng(rows)
    x = rng.normal(size=(rows, heads, size)) * 10.0 ** rng.uniform(-3, 3, (rows, heads, 1))
    x[rows // 2] = 0
    positions = np.concatenate([np.arange(rows // 2), rng.integers(0, 8000, rows - rows // 2)]).astype(np.int32)
    return jnp.asarray(x, jnp.float32), jnp.asarray(rng.normal(1, 0.3, size), jnp.float32), positions


@pytest.mark.parametrize("implementation", RUNNABLE)
class TestNormRotary:
    @pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
    @pytest.mark.parametrize("rows", [8, 12, 256, 700])
    def test_equals_reference(self, implementation: str, rows: int, heads: tuple[int, int]) -> None:
        x, scale, positions = case(rows, *heads)
        by = rotary(positions, heads[1], THETA)
        got = norm_rotary(x, scale, by, eps=EPS, dtype="float32", implementation=implementation)
        # a float32 angle of 8,000 is known to 5e-4
        tolerance = 1e-5 + 1e-6 * positions[:, None, None]
        assert (np.abs(np.asarray(got) - reference(np.asarray(x), np.asarray(scale), positions)) <= tolerance).all()

    def test_result_in_bfloat16_is_the_rounded_one(self, implementation: str) -> None:
        x, scale, positions = case(64, 2, 128)
        by = rotary(positions, 128, THETA)
        exact, rounded = (
            norm_rotary(x, scale, by, eps=EPS, dtype=dtype, implementation=implementation)
            for dtype in ("float32", "bfloat16")
        )
        assert rounded.dtype == jnp.bfloat16
        np.testing.assert_array_equal(rounded, exact.astype(jnp.bfloat16))


def test_lowers_for_tpu() -> None:
    x, scale, table = (jax.ShapeDtypeStruct(shape, "float32") for shape in ((1536, 16, 128), (128,), (1536, 128)))
    by: Any = Rotary(table, table)  # pyright: ignore[reportArgumentType]
    call = jax.jit(partial(norm_rotary, eps=EPS, dtype="bfloat16", implementation="tpu"))
    allowed = [jax.export.DisabledSafetyCheck.custom_call("tpu_custom_call")]
    exported = jax.export.export(call, platforms=["tpu"], disabled_checks=allowed)(x, scale, by)
    assert "tpu_custom_call" in exported.mlir_module()


def test_tables_of_another_size_are_refused() -> None:
    x, scale, positions = case(12, 2, 64)
    for by in (rotary(positions[:8], 64, THETA), rotary(positions, 32, THETA)):
        with pytest.raises(ValueError, match=r"norm_rotary: got x .*want \[R, N, H\]"):
            norm_rotary(x, scale, by, eps=EPS, dtype="float32")
