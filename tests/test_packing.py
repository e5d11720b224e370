import jax
import numpy as np
import pytest

from jaxrank.packing import bucket_of, buckets, pack, plan, slots
from jaxrank.types import Encoded


def pairs(lengths):
    rng = np.random.default_rng(1)
    return [Encoded(rng.integers(5, 100, n).astype(np.int32)) for n in lengths]


class TestPlan:
    @pytest.mark.parametrize("most", [3, 60, 200, 512, 3000])
    @pytest.mark.parametrize("count", [1, 2, 100, 700])
    def test_every_pair_once_and_rows_within_bounds(self, count, most):
        lengths = np.random.default_rng(count).integers(1, most + 1, count).tolist()
        rows = plan(lengths, 1024)
        assert sorted(i for row in rows for i in row) == list(range(count))
        for row in rows:
            assert len(row) <= slots(1024)
            assert sum(lengths[i] for i in row) <= 1024 or len(row) == 1

    def test_nothing(self):
        assert plan([], 1024) == []

    @pytest.mark.parametrize("mean", [100, 200, 400])
    def test_little_filler(self, mean):
        """design.md's simulation: 100 documents a request, lognormal lengths; at most 1.08 tokens per useful token."""
        rng = np.random.default_rng(mean)
        ladder = buckets(2048, 512)
        used = spent = 0
        for _ in range(20):
            lengths = np.clip(rng.lognormal(np.log(mean) - 0.18, 0.6, 100), 8, 512).astype(int).tolist()
            for row in plan(lengths, 2048):
                tokens = sum(lengths[i] for i in row)
                used, spent = used + tokens, spent + bucket_of(tokens, len(row), ladder)
        assert spent / used <= 1.08


class TestBuckets:
    def test_ladder(self):
        assert buckets(2048, 512) == [128, 192, 256, 384, 512, 768, 1024, 1536, 2048]
        assert buckets(1024, 8192)[-4:] == [3072, 4096, 6144, 8192]
        assert buckets(1000, 514)[-1] == 1024

    def test_one_bucket_above_the_usual_row(self):
        assert buckets(1000, 8192, long_steps=False)[-3:] == [768, 1024, 8192]
        assert buckets(2048, 2048, long_steps=False) == buckets(2048, 512)
        assert buckets(128, 130, long_steps=False) == [128, 192]

    def test_smallest_that_fits(self):
        ladder = buckets(1024, 512)
        assert bucket_of(128, 1, ladder) == 128
        assert bucket_of(129, 1, ladder) == 192
        assert bucket_of(30, 10, ladder) == 192, "slots run out before tokens do"
        with pytest.raises(ValueError, match="fit no bucket"):
            bucket_of(2000, 1, ladder)


class TestPack:
    def test_row(self):
        a, b = pairs([3, 5])
        row = pack([a, b], 128)
        assert row.tokens[:8].tolist() == [*a.tokens, *b.tokens]
        assert row.positions[:8].tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
        assert row.score_at.tolist() == [0, 3, 0, 0, 0, 0, 0, 0]
        assert row.layout.spans[:9].tolist() == [[0, 0, 0, 3]] * 3 + [[0, 0, 3, 8]] * 5 + [[0, 0, 0, 0]]
        assert row.score_layout.spans[:3].tolist() == [[0, 0, 0, 3], [0, 0, 3, 8], [0, 0, 0, 0]]

    def test_shapes_depend_on_the_bucket_alone(self):
        for tokens in (128, 1024):
            shapes = [[x.shape for x in jax.tree.leaves(pack(pairs(n), tokens))] for n in ([], [100], [1] * 8)]
            assert shapes[0] == shapes[1] == shapes[2]

    def test_too_much(self):
        with pytest.raises(ValueError, match="do not fit a row of 128"):
            pack(pairs([100, 29]), 128)
        with pytest.raises(ValueError, match="do not fit a row of 128"):
            pack(pairs([1] * 9), 128)
