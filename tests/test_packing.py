import jax
import numpy as np
import pytest

from jaxrank.media.grid import PATCH_LADDER
from jaxrank.runtime.packing import LADDER, bucket_of, buckets, media_buckets, pack, plan, row_size, slots
from jaxrank.types import NO_PREFIX, Encoded


def pairs(lengths):
    rng = np.random.default_rng(1)
    return [Encoded(rng.integers(5, 100, n).astype(np.int32)) for n in lengths]


class TestPlan:
    @pytest.mark.parametrize("most", [3, 60, 200, 512, 3000])
    @pytest.mark.parametrize("count", [1, 2, 100, 700])
    def test_every_pair_once_and_rows_within_bounds(self, count, most):
        lengths = np.random.default_rng(count).integers(1, most + 1, count).tolist()
        rows = plan(pairs(lengths), 1024)
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
            for row in plan(pairs(lengths), 2048):
                tokens = sum(lengths[i] for i in row)
                used, spent = used + tokens, spent + bucket_of(tokens, len(row), ladder)
        assert spent / used <= 1.08


class TestStarPlan:
    def stars(self, sizes, prefix=80, seed=0):
        """Requests of so many documents of 5 to 200 tokens each, in turns."""
        rng = np.random.default_rng(seed)
        prefixes = [rng.integers(5, 100, prefix).astype(np.int32) for _ in sizes]
        places = [(turn, i) for i, size in enumerate(sizes) for turn in range(size)]
        return [
            Encoded(rng.integers(5, 100, rng.integers(5, 200)).astype(np.int32), prefix=prefixes[i])
            for _, i in sorted(places)
        ]

    @pytest.mark.parametrize("sizes", [[1], [100], [2, 2], [30, 1, 1, 7, 64], [3] * 40])
    def test_every_pair_once_and_rows_within_bounds(self, sizes):
        pairs = self.stars(sizes)
        rows = plan(pairs, 1024)
        assert sorted(i for row in rows for i in row) == list(range(len(pairs)))
        for row in rows:
            assert len(row) <= slots(1024)
            assert row_size([pairs[i] for i in row]) <= 1024

    def test_a_request_that_fits_a_row_is_not_torn(self):
        pairs = self.stars([3] * 40)
        rows = plan(pairs, 1024)
        for prefix in {pair.prefix.tobytes() for pair in pairs}:
            assert sum(any(pairs[i].prefix.tobytes() == prefix for i in row) for row in rows) == 1

    def test_a_large_request_repeats_its_prefix_once_a_row(self):
        pairs = self.stars([100])
        rows = plan(pairs, 1024)
        own = sum(len(pair.tokens) for pair in pairs)
        assert len(rows) <= -(-own // (1024 - 80)) + 1
        assert sum(row_size([pairs[i] for i in row]) for row in rows) == own + 80 * len(rows)

    def test_a_pair_longer_than_a_row(self):
        pairs = [Encoded(np.zeros(n, np.int32), prefix=np.ones(900, np.int32)) for n in (500, 20, 30)]
        assert plan(pairs, 1024) == [[0], [2, 1]]


class TestBuckets:
    def test_ladder(self):
        assert buckets(2048, 512) == [128, 192, 256, 384, 512, 768, 1024, 1536, 2048]
        assert buckets(1024, 8192)[-4:] == [3072, 4096, 6144, 8192]
        assert buckets(1000, 514)[-1] == 1024

    def test_one_bucket_above_the_usual_row(self):
        assert buckets(1000, 8192, long_steps=False)[-3:] == [768, 1024, 8192]
        assert buckets(2048, 2048, long_steps=False) == buckets(2048, 512)
        assert buckets(128, 130, long_steps=False) == [128, 192]

    def test_programs_are_less_than_40(self) -> None:
        """Those of text, those with media, and the vision tower's, whatever lengths are asked for."""
        for row_tokens in map(int, LADDER):
            for max_length in map(int, LADDER):
                usual = buckets(row_tokens, max_length)
                with_media = media_buckets(usual)
                assert with_media[-1] == usual[-1]
                assert set(with_media) <= set(usual)
                assert len(usual) + len(with_media) + len(PATCH_LADDER) < 40

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

    def test_star(self):
        shared = np.array([7, 8], np.int32)
        a, b, c = (Encoded(np.array(ids, np.int32), len(ids) - 1, prefix=p)
                   for ids, p in (([1, 2], shared), ([3], shared), ([4, 5, 6], NO_PREFIX)))  # fmt: skip
        row = pack([a, b, c], 128, causal=True)
        assert row.tokens[:9].tolist() == [7, 8, 1, 2, 3, 4, 5, 6, 0]
        assert row.positions[:9].tolist() == [0, 1, 2, 3, 2, 0, 1, 2, 0]
        assert row.score_at[:4].tolist() == [3, 4, 7, 0]
        assert row.layout.spans[:9].tolist() == [
            [0, 0, 0, 1],
            [0, 0, 0, 2],
            [0, 2, 2, 3],
            [0, 2, 2, 4],
            [0, 2, 4, 5],
            [0, 0, 5, 6],
            [0, 0, 5, 7],
            [0, 0, 5, 8],
            [0, 0, 0, 0],
        ]
        assert row.score_layout.spans[:3].tolist() == [[0, 2, 2, 4], [0, 2, 4, 5], [0, 0, 5, 8]]

    def test_equal_prefixes_of_two_requests_stand_once(self):
        a, b = (Encoded(np.array([1], np.int32), prefix=np.array([7, 8], np.int32)) for _ in range(2))
        assert pack([a, b], 128, causal=True).tokens[:5].tolist() == [7, 8, 1, 1, 0]

    def test_no_prefix_without_causality(self):
        with pytest.raises(ValueError, match="cannot share a prefix"):
            pack([Encoded(np.zeros(3, np.int32), prefix=np.zeros(2, np.int32))], 128)

    def test_shapes_depend_on_the_bucket_alone(self):
        for tokens in (128, 1024):
            shapes = [[x.shape for x in jax.tree.leaves(pack(pairs(n), tokens))] for n in ([], [100], [1] * 8)]
            assert shapes[0] == shapes[1] == shapes[2]

    def test_too_much(self):
        with pytest.raises(ValueError, match="do not fit a row of 128"):
            pack(pairs([100, 29]), 128)
        with pytest.raises(ValueError, match="do not fit a row of 128"):
            pack(pairs([1] * 9), 128)
