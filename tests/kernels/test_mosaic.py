"""The kernel for Hopper in JAX's interpreter for GPUs, against the float64 reference.

What the interpreter cannot see: jaxrank/kernels/mosaic.py.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu

from jaxrank.kernels import IMPLEMENTATIONS, attention, make_layout, mosaic
from jaxrank.kernels.grid import FULL, make_grid
from jaxrank.types import Layout
from tests.kernels.test_attention import GPU, bidirectional, reference, star

plgpu: Any = mosaic_gpu
NAME, SCALE = "mosaic-interpreted", 0.2
needs_interpreter = pytest.mark.skipif(
    not mosaic.AVAILABLE, reason="JAX's interpreter for GPUs is there from 0.11.2 on"
)


def test_names_are_there_where_jax_has_what_they_need() -> None:
    names = {"mosaic", "mosaic-interpreted"}
    assert names & IMPLEMENTATIONS.keys() == (names if jax.__version_info__ >= (0, 11, 2) else set())


def far_apart(keys: int) -> np.ndarray:
    """Rows of the first warpgroup see the beginning alone, those of the second the end, two of them nothing at all."""
    spans = np.zeros((128, 4), np.int32)
    spans[:64, :2] = 3, 50
    spans[64:126, 2:] = keys - 90, keys
    return spans


def two_keys(rows: int) -> np.ndarray:
    """Every row sees one key in each span: spans begin and end everywhere."""
    at = np.arange(rows, dtype=np.int32)
    return np.stack([at, at + 1, 199 - at, 200 - at], 1)


# spans of the query rows, heads, keys
CASES = {
    "bidirectional, ragged": (bidirectional([3, 150, 1, 20], 180), (2, 2, 64), 180),
    "causal, GQA": (star([(150, []), (40, [])], 190), (4, 2, 64), 190),
    "star, GQA, full tiles": (star([(130, [100, 3, 23])], 256), (2, 1, 128), 256),
    "star, head of 72": (star([(20, [50, 1]), (9, [40, 30])], 170), (1, 1, 72), 170),
    "score rows": (star([(130, [200, 1, 50])], 390)[[0, 129, 130, 329, 330, 340, 380, 385]], (4, 2, 64), 390),
    "more key tiles than stages, most of them full": (bidirectional([690], 690)[600:], (1, 1, 64), 690),
    "warpgroups that see different keys": (far_apart(500), (1, 1, 64), 500),
    "two keys a row": (two_keys(128), (1, 1, 64), 200),
    "query tiles of nothing but filler": (bidirectional([30], 290), (1, 1, 64), 290),
}


def inputs(
    rows: int, heads: tuple[int, int, int], keys: int, dtype: str = "bfloat16"
) -> tuple[jax.Array, jax.Array, jax.Array]:
    shapes = ((rows, heads[0]), (keys, heads[1]), (keys, heads[1]))
    some = zip(jax.random.split(jax.random.key(rows + keys), 3), shapes, strict=True)
    q, k, v = (jax.random.normal(key, (*shape, heads[2])).astype(dtype) for key, shape in some)
    return q, k, v


def run(q: Any, k: Any, v: Any, layout: Layout, body: Any = None) -> np.ndarray:
    body = body or partial(attention, implementation=NAME)
    return np.asarray(jax.jit(partial(body, scale=SCALE))(q, k, v, layout), np.float64)


def racing() -> Any:
    """The interpreter's parameters for finding races."""
    return plgpu.InterpretGPUParams(detect_races=True)


def assert_close(got: np.ndarray, want: np.ndarray) -> None:
    """No element is further off than the largest one's bfloat16 can be: 2**-8 of it."""
    assert np.abs(got - want).max() <= 2**-8 * np.abs(want).max()


@needs_interpreter
class TestAgainstReference:
    @pytest.mark.parametrize("spans, heads, keys", CASES.values(), ids=CASES)
    def test_equals_reference(self, spans: np.ndarray, heads: tuple[int, int, int], keys: int) -> None:
        q, k, v = inputs(len(spans), heads, keys)
        got = run(q, k, v, make_layout(spans, keys, NAME))
        assert_close(got, reference(q, k, v, spans, SCALE))
        np.testing.assert_array_equal(got[(spans[:, ::2] >= spans[:, 1::2]).all(1)], 0)

    def test_what_a_row_does_not_see_does_not_matter(self) -> None:
        """Keys of the tiles at hand, whole tiles beside them, and rows of filler."""
        spans = bidirectional([40, 50], 300)
        spans[:, 2:] += 140 * (spans[:, 3:] > 0)
        q, k, v = inputs(300, (1, 1, 64), 300)
        want = reference(q, k, v, spans, SCALE)
        seen = (np.arange(300) >= 140) & (np.arange(300) < 230)
        near = (np.arange(300) >= 128) & (np.arange(300) < 256)
        q = q.at[90:].set(jnp.nan)
        k = k.at[~seen].set(jnp.nan)
        v = v.at[near & ~seen].set(1e30).at[~near & (np.arange(300) >= 128)].set(jnp.nan)
        got = run(q, k, v.at[:100].set(1e30), make_layout(spans, 300, NAME))
        assert_close(got, want)
        np.testing.assert_array_equal(got[90:], 0)

    def test_other_tiles_and_more_stages_than_key_tiles(self) -> None:
        spans = star([(70, [80, 7])], 170)[60:160]
        q, k, v = inputs(100, (1, 1, 64), 170)
        layout = make_grid(spans, 170, lambda rows: 64, lambda keys: 64)
        body = partial(mosaic.attention, tiles=(64, 64), stages=4, interpret=True)
        assert_close(run(q, k, v, layout, body), reference(q, k, v, spans, SCALE))

    def test_float32_by_the_kernel_for_triton(self) -> None:
        for name in ("star, GQA, full tiles", "score rows"):
            spans, heads, keys = CASES[name]
            q, k, v = inputs(len(spans), heads, keys, "float32")
            got = run(q, k, v, make_layout(spans, keys, NAME))
            assert np.abs(got - reference(q, k, v, spans, SCALE)).max() <= 1e-5


@needs_interpreter
class TestFullTiles:
    def test_with_and_without_the_bit(self) -> None:
        spans, heads, keys = CASES["star, GQA, full tiles"]
        arrays = inputs(len(spans), heads, keys)
        layout = make_layout(spans, keys, NAME)
        items = np.asarray(layout.tiles)
        assert (items < 0).any()
        masked = Layout(spans, items & ~FULL, layout.starts)
        np.testing.assert_array_equal(run(*arrays, layout), run(*arrays, masked))

    def test_nothing_is_masked_where_it_is_set(self) -> None:
        spans = bidirectional([60, 68], 128)
        arrays = inputs(128, (1, 1, 64), 128)
        layout = make_layout(spans, 128, NAME)
        wrong = Layout(spans, np.asarray(layout.tiles) | np.int32(FULL), layout.starts)
        assert_close(run(*arrays, wrong), reference(*arrays, bidirectional([128], 128), SCALE))


@needs_interpreter
class TestRaces:
    def test_none(self, capfd: pytest.CaptureFixture[str]) -> None:
        """With two warpgroups, and key tiles that wait for a place in the ring."""
        spans = bidirectional([390], 390)[:100]
        arrays = inputs(100, (2, 1, 64), 390)
        got = run(*arrays, make_layout(spans, 390, NAME), partial(mosaic.attention, interpret=racing()))
        assert "RACE DETECTED" not in "".join(capfd.readouterr())
        assert_close(got, reference(*arrays, spans, SCALE))

    def test_one_would_be_found(self, capfd: pytest.CaptureFixture[str]) -> None:
        """Two warpgroups write the same place, and nothing says which of them is first."""

        def write(out: Any) -> None:
            out[...] = jnp.full(out.shape, jax.lax.axis_index("warpgroup"), jnp.int32)

        result = jax.ShapeDtypeStruct((128,), jnp.int32)
        plgpu.kernel(write, out_type=result, num_threads=2, thread_name="warpgroup", interpret=racing())()
        assert "RACE DETECTED" in "".join(capfd.readouterr())


@needs_interpreter
@pytest.mark.parametrize("heads", [(4, 4, 64), (4, 2, 128), (2, 2, 72)])
@pytest.mark.parametrize("rows", [1536, 96, 8])
def test_lowers(rows: int, heads: tuple[int, int, int]) -> None:
    """The compiler's first half, which finds the layout of everything in registers, needs no GPU."""
    layout = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), make_layout(np.zeros((rows, 4), np.int32), 1536, "mosaic")
    )
    q, k = (jax.ShapeDtypeStruct(shape, "bfloat16") for shape in ((rows, heads[0], heads[2]), (1536, *heads[1:])))
    call = jax.jit(partial(attention, scale=SCALE, implementation="mosaic"))
    allowed = [jax.export.DisabledSafetyCheck.custom_call(name) for name in ("mosaic_gpu", "mosaic_gpu_v2")]
    with jax.sharding.use_abstract_mesh(GPU):
        exported = jax.export.export(call, platforms=["cuda"], disabled_checks=allowed)(q, k, k, layout)
    assert "mosaic_gpu" in exported.mlir_module()


@needs_interpreter
def test_layouts_of_another_kernel_are_refused() -> None:
    q, k, v = inputs(300, (1, 1, 64), 300)
    layout = make_layout(bidirectional([300], 300), 300, "triton")
    with pytest.raises(ValueError, match="made for another implementation"):
        attention(q, k, v, layout, scale=SCALE, implementation="mosaic")
