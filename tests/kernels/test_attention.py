"""Every attention implementation against an independent float64 reference that loops over rows and heads."""

from contextlib import nullcontext
from functools import partial

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AbstractDevice, AbstractMesh

from jaxrank.kernels import IMPLEMENTATIONS, attention, make_layout, mosaic, tpu, triton
from jaxrank.kernels.grid import FIRST, FULL, LAST, key_tile, make_grid, query_tile
from jaxrank.kernels.tiles import classes, max_tiles

KEYS = 1400
"""More than the widest class of tiles, whose tiles run over their keys in pieces."""


def reference(q, k, v, spans, scale):
    """Softmax attention, row by row in float64; rows without keys give 0."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    for row, (a0, a1, b0, b1) in enumerate(spans):
        keys = sorted({*range(a0, a1), *range(b0, b1)})
        for head in range(k.shape[1]) if keys else []:
            mine = slice(head, None, k.shape[1])  # query head n belongs to key head n mod K
            scores = k[keys, head] @ q[row, mine].T * scale
            weights = np.exp(scores - scores.max(0))
            out[row, mine] = (weights / weights.sum(0)).T @ v[keys, head]
    return out


def bidirectional(lengths, total):
    spans = np.zeros((total, 4), np.int32)
    start = 0
    for length in lengths:
        spans[start : start + length, 2:] = start, start + length
        start += length
    return spans


def star(requests, total):
    """Causal documents that share a causal prefix: requests are (prefix length, [document lengths])."""
    spans = np.zeros((total, 4), np.int32)
    at = 0
    for prefix, documents in requests:
        first = at
        for i in range(prefix):
            spans[at + i] = 0, 0, first, at + i + 1
        at += prefix
        for length in documents:
            for i in range(length):
                spans[at + i] = first, first + prefix, at, at + i + 1
            at += length
    return spans


SPANS = {
    "one pair": bidirectional([KEYS], KEYS),
    "one token": bidirectional([1], KEYS),
    "all of one token": bidirectional([1] * KEYS, KEYS),
    "mixed": bidirectional([3, 190, 1, 64, 128, 129, 17, 100], KEYS),
    "longer than a square tile": bidirectional([1025, 300, 60], KEYS),
    "nothing but filler": np.zeros((KEYS, 4), np.int32),
    "star": star([(50, [10, 100, 7]), (130, [200, 1, 80])], KEYS),
    "star, long document": star([(5, [1300, 30])], KEYS),
    "star, long prefix": star([(1100, [20, 200, 1])], KEYS),
    "filler in the middle": bidirectional([100, 200], KEYS)
    + bidirectional([400, 1000], KEYS) * (np.arange(KEYS)[:, None] >= 400),
}
HEADS = {"MHA": (4, 4, 64), "GQA": (4, 2, 32), "one head": (1, 1, 128), "72 wide": (2, 2, 72), "GQA 128": (4, 2, 128)}
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


def inputs(rows, heads, dtype, seed=0, size=1.0):
    query_heads, kv_heads, head_dim = heads
    shapes = [(rows, query_heads, head_dim), (KEYS, kv_heads, head_dim), (KEYS, kv_heads, head_dim)]
    keys = jax.random.split(jax.random.key(seed), 3)
    return [(size * jax.random.normal(key, shape)).astype(dtype) for key, shape in zip(keys, shapes, strict=True)]


def run(q, k, v, spans, implementation):
    layout = make_layout(spans, len(k), implementation)
    call = jax.jit(attention, static_argnames=("scale", "implementation"))
    return np.asarray(call(q, k, v, layout, scale=0.2, implementation=implementation), np.float64)


RUNNABLE = [
    name
    for name, one in IMPLEMENTATIONS.items()
    if one.platform in (None, jax.default_backend()) and name != "mosaic-interpreted"
]
"""Without the one whose interpreter takes seconds a case, which has tests of its own."""


@pytest.mark.parametrize("implementation", RUNNABLE)
class TestAttention:
    @pytest.mark.parametrize("dtype", TOLERANCE)
    @pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
    @pytest.mark.parametrize("spans", SPANS.values(), ids=SPANS)
    def test_equals_reference(self, implementation, spans, heads, dtype):
        q, k, v = inputs(KEYS, heads, dtype)
        got, want = run(q, k, v, spans, implementation), reference(q, k, v, spans, 0.2)
        assert np.abs(got - want).max() <= TOLERANCE[dtype]

    @pytest.mark.parametrize("name", ["mixed", "longer than a square tile", "star, long document"])
    def test_scored_rows_alone(self, implementation, name):
        """A few query rows over all keys, as in the last layer."""
        spans = SPANS[name][[0, 3, 193, 194, 258, 386, 515, 600, 631, 631, 700]]
        q, k, v = inputs(len(spans), (4, 2, 64), "float32")
        assert np.abs(run(q, k, v, spans, implementation) - reference(q, k, v, spans, 0.2)).max() <= 1e-5

    def test_large_logits(self, implementation):
        q, k, v = inputs(KEYS, (2, 2, 64), "float32", size=30.0)
        got, want = run(q, k, v, SPANS["mixed"], implementation), reference(q, k, v, SPANS["mixed"], 0.2)
        assert np.isfinite(got).all()
        assert np.abs(got - want).max() <= 5e-2, "logits reach 1,000, float32 keeps 1e-4 of each, values reach 100"

    def test_keys_outside_the_spans_do_not_matter(self, implementation):
        spans = bidirectional([70, 90], KEYS)
        q, k, v = inputs(KEYS, (2, 2, 64), "float32")
        want = run(q, k, v, spans, implementation)
        bad_q, bad_k = q.at[160:].set(jnp.nan), k.at[160:].set(jnp.nan)
        got = run(bad_q, bad_k, v.at[160:].set(1e30), spans, implementation)
        np.testing.assert_array_equal(got[:160], want[:160])
        np.testing.assert_array_equal(got[160:], 0)


def test_what_an_interpreted_kernel_leaves_unwritten_is_nan():
    """So that the tests above fail where a kernel forgets a row."""

    def write_half(x, out):
        out[:4] = x[:4]

    written = pl.pallas_call(write_half, out_shape=jax.ShapeDtypeStruct((8, 128), "float32"), interpret=True)
    np.testing.assert_array_equal(np.isnan(written(jnp.ones((8, 128)))[:, 0]), [False] * 4 + [True] * 4)


class TestLayout:
    @pytest.mark.parametrize("spans", SPANS.values(), ids=SPANS)
    def test_tiles_write_each_row_once_and_hold_all_its_keys(self, spans):
        layout = make_layout(spans, KEYS, "tiled")
        kinds = classes(KEYS, len(spans))
        written = np.zeros(len(spans), int)
        for kind, (height, window) in enumerate(kinds):
            for q0, r0, r1, a0, an, b0, bn in np.asarray(layout.tiles)[layout.starts[kind] : layout.starts[kind + 1]]:
                assert 0 <= q0 <= r0 < r1 <= q0 + height <= len(spans)
                assert an + bn <= window or kind == len(kinds) - 1
                held = set(range(a0, a0 + an)) | set(range(b0, b0 + bn))
                assert len(held) == an + bn, "a key would be counted twice"
                for row in range(r0, r1):
                    s = spans[row]
                    assert {*range(s[0], s[1]), *range(s[2], s[3])} <= held
                written[r0:r1] += 1
        filled = (spans[:, 1] > spans[:, 0]) | (spans[:, 3] > spans[:, 2])
        assert (written[filled] == 1).all()
        assert written.max(initial=0) <= 1

    @pytest.mark.parametrize("keys", [128, 256, 1024, 8192])
    def test_bound_on_tiles(self, keys):
        rng = np.random.default_rng(keys)
        for longest in (1, 2, 63, 65, 127, 129, 200, 513, keys):
            lengths = []
            while sum(lengths) < keys:
                lengths.append(min(int(rng.integers(max(longest // 2, 1), longest + 1)), keys - sum(lengths)))
            layout = make_layout(bidirectional(lengths, keys), keys, "tiled")
            assert layout.starts[-1] <= max_tiles(keys, keys) == len(layout.tiles)

    def test_cost_follows_the_sum_of_squares(self):
        """Mixed lengths: the scores computed are at most twice those needed, 1/8 of the dense product here."""
        lengths = np.random.default_rng(0).integers(100, 300, 40)
        lengths = lengths[np.cumsum(lengths) <= 8192]
        layout = make_layout(bidirectional(lengths, 8192), 8192, "tiled")
        computed = sum(
            height * window * int(layout.starts[c + 1] - layout.starts[c])
            for c, (height, window) in enumerate(classes(8192, 8192))
        )
        assert computed <= 2 * (lengths**2).sum() <= 8192**2 / 8


class TestGrid:
    @pytest.mark.parametrize(
        "tile_size, key_tile_size",
        [
            (tpu.tile_size, tpu.tile_size),
            (triton.tile_size, triton.key_tile_size),
            (mosaic.tile_size, mosaic.key_tile_size),
        ],
        ids=["tpu", "triton", "mosaic"],
    )
    @pytest.mark.parametrize("spans", SPANS.values(), ids=SPANS)
    def test_pairs_are_those_in_which_a_row_sees_a_key(self, spans, tile_size, key_tile_size):
        layout = make_grid(spans, KEYS, tile_size, key_tile_size)
        height, width = tile_size(len(spans)), key_tile_size(KEYS)
        want = set()
        for row, (a0, a1, b0, b1) in enumerate(spans):
            want |= {(row // height, key // width) for key in (*range(a0, a1), *range(b0, b1))}
        down = -(-len(spans) // height)
        want |= {(tile, 0) for tile in range(down) if not any(tile == q for q, _ in want)}
        items = layout.tiles[: layout.starts[-1]]
        got = list(zip((items >> 16 & 0x3FFF).tolist(), (items >> 2 & 0x3FFF).tolist(), strict=True))
        assert got == sorted(want)
        assert not layout.tiles[layout.starts[-1] :].any()
        for tile in range(down):
            mine = items[layout.starts[tile] : layout.starts[tile + 1]]
            assert set(mine >> 16 & 0x3FFF) == {tile}
            assert [bool(item & FIRST) for item in mine] == [True] + [False] * (len(mine) - 1)
            assert [bool(item & LAST) for item in mine] == [False] * (len(mine) - 1) + [True]

    @pytest.mark.parametrize("spans", SPANS.values(), ids=SPANS)
    def test_full_pairs_are_those_in_which_every_row_sees_every_key(self, spans):
        """In the last tile, and in one of few rows, those that are there count."""
        for some in (spans, spans[:1290], spans[1000:1007]):
            layout = make_grid(some, KEYS, lambda rows: 64, lambda keys: 32)
            sees = np.zeros((len(some), KEYS), bool)
            for row, (a0, a1, b0, b1) in enumerate(some):
                sees[row, a0:a1] = sees[row, b0:b1] = True
            for item in layout.tiles[: layout.starts[-1]]:
                tile, keys = (int(of(jnp.int32(item))) for of in (query_tile, key_tile))
                block = sees[tile * 64 : tile * 64 + 64, keys * 32 : keys * 32 + 32]
                assert (item < 0) == bool(item & FULL) == (block.all() and block.shape[1] == 32)

    def test_a_pair_seen_through_two_spans_is_full(self):
        """Keys 32 to 63 are the end of the prefix and the beginning of the document behind it."""
        layout = make_grid(star([(40, [88, 64])], 192), 192, lambda rows: 64, lambda keys: 32)
        full = {(item >> 16 & 0x3FFF, item >> 2 & 0x3FFF) for item in layout.tiles.tolist() if item < 0}
        assert full == {(1, 0), (1, 1), (2, 0)}

    def test_shapes_depend_on_those_of_the_call_alone(self):
        shapes = {
            tuple(x.shape for x in jax.tree.leaves(make_grid(spans, KEYS, tpu.tile_size))) for spans in SPANS.values()
        }
        assert len(shapes) == 1

    @pytest.mark.parametrize(
        "rows, on_tpu, on_gpu",
        [
            (8, 128, 16),
            (12, 128, 16),
            (96, 128, 128),
            (192, 128, 128),
            (256, 256, 128),
            (384, 128, 128),
            (768, 256, 128),
            (1400, 128, 128),
            (320, 128, 128),
        ],
    )
    def test_tile_sizes(self, rows, on_tpu, on_gpu):
        assert (tpu.tile_size(rows), triton.tile_size(rows)) == (on_tpu, on_gpu)


GPU = AbstractMesh((1,), ("x",), abstract_device=AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu"))
"""From jax 0.11.2 on, the kernel is lowered for a kind of GPU."""


class TestLowering:
    """Where there is no such device, the compilers' first half runs all the same."""

    @pytest.mark.parametrize("dtype", TOLERANCE)
    @pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
    @pytest.mark.parametrize("rows", [1536, 96])
    @pytest.mark.parametrize(
        "name, platform, target", [("triton", "cuda", "__gpu$xla.gpu.triton"), ("tpu", "tpu", "tpu_custom_call")]
    )
    def test_lowers(self, name, platform, target, rows, heads, dtype):
        query_heads, kv_heads, size = heads
        spans = star([(50, [10, 100, 7]), (130, [200, 1, 80])], 1536)[:rows]
        layout = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), make_layout(spans, 1536, name))
        q, k = (jax.ShapeDtypeStruct(shape, dtype) for shape in ((rows, query_heads, size), (1536, kv_heads, size)))
        call = jax.jit(partial(attention, scale=0.2, implementation=name))
        allowed = [jax.export.DisabledSafetyCheck.custom_call(target)]
        with jax.sharding.use_abstract_mesh(GPU) if name == "triton" else nullcontext():
            exported = jax.export.export(call, platforms=[platform], disabled_checks=allowed)(q, k, k, layout)
        assert target in exported.mlir_module()


class TestChecks:
    def test_unknown_implementation(self):
        q, k, v = inputs(KEYS, (2, 2, 64), "float32")
        with pytest.raises(ValueError, match="'magic' is unknown; one of"):
            attention(q, k, v, make_layout(SPANS["mixed"], KEYS), scale=1.0, implementation="magic")

    def test_layouts_of_another_implementation(self):
        q, k, v = inputs(KEYS, (2, 2, 64), "float32")
        for name, other in (("tiled", "tpu"), ("triton", "dense"), ("triton", "tpu"), ("tpu", "triton")):
            layout = make_layout(SPANS["mixed"], KEYS, other)
            with pytest.raises(ValueError, match="made for another implementation"):
                attention(q, k, v, layout, scale=1.0, implementation=name)

    def test_shapes_that_do_not_match(self):
        q, k, v = inputs(KEYS, (3, 2, 64), "float32")
        with pytest.raises(ValueError, match=r"N % K == 0"):
            attention(q, k, v, make_layout(SPANS["mixed"], KEYS), scale=1.0)
