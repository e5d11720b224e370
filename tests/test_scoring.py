"""What is compiled, when, and what the next start finds; that nothing is compiled after the warm-up."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrank import convert
from jaxrank.errors import ModelError, RequestError
from jaxrank.runtime.compile_cache import CompilationCounter, use_compilation_cache
from jaxrank.runtime.packing import pack
from jaxrank.runtime.programs import compile_whole
from jaxrank.runtime.scorer import WINDOW, Scorer
from jaxrank.types import Encoded
from tests.checkpoints import make_bge

MAX_LENGTH, ROW_TOKENS = 384, 256


def pairs(lengths: list[int], seed: int = 0) -> list[Encoded]:
    rng = np.random.default_rng(seed)
    return [Encoded(np.array([0, *rng.integers(5, 400, length - 2), 2], np.int32)) for length in lengths]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bge(tmp_path_factory.mktemp("bge"))


@pytest.fixture(scope="module")
def warm(folder: Path) -> tuple[Scorer, list[str]]:
    """A scorer after its warm-up, and the lines that the warm-up told."""
    lines: list[str] = []
    scorer = Scorer(convert.load(folder, dtype="float32"), max_length=MAX_LENGTH, row_tokens=ROW_TOKENS)
    scorer.warm_up(lines.append)
    return scorer, lines


class TestCompilations:
    def test_every_bucket_is_compiled_with_a_line(self, warm: tuple[Scorer, list[str]]) -> None:
        scorer, lines = warm
        assert scorer.buckets == [128, 192, 256, 384], "up to the longest pair, which is longer than the usual row"
        assert list(scorer.programs) == [(tokens, False) for tokens in scorer.buckets]
        assert [line.split(":")[0] for line in lines] == [
            f"bucket {tokens} tokens ({i}/4)" for i, tokens in enumerate(scorer.buckets, 1)
        ]
        assert all("compiled in" in line for line in lines)

    def test_no_mix_of_lengths_and_counts_compiles_after_the_warm_up(self, warm: tuple[Scorer, list[str]]) -> None:
        scorer, _ = warm
        rng = np.random.default_rng(1)
        mixes = [[MAX_LENGTH], [3] * 70, [3], [MAX_LENGTH, 3, 100], [64] * 9, [128], [129], [192, 256, 257], []]
        mixes += [rng.integers(3, MAX_LENGTH + 1, rng.integers(1, 20)).tolist() for _ in range(20)]
        for seed, lengths in enumerate(mixes):
            logits = scorer(pairs(lengths, seed))
            assert logits.shape == (len(lengths),)
            assert np.isfinite(logits).all()
        assert scorer.compilations == 0

    def test_the_counter_sees_a_program_that_is_not_there(self, folder: Path, warm: tuple[Scorer, list[str]]) -> None:
        """The zero of the test before is worth something only if a late compilation would have shown."""
        cold = Scorer(convert.load(folder, dtype="float32"), max_length=128, row_tokens=128)
        before = warm[0].compilations
        expected = warm[0](pairs([100]))
        assert warm[0].compilations == before
        np.testing.assert_array_equal(cold(pairs([100])), expected)
        assert cold.compilations > 0
        assert warm[0].compilations - before >= cold.compilations, "compilations of the whole process count"
        cold.warm_up()
        assert cold.compilations == 0

    def test_the_counter_counts_each_program_once(self) -> None:
        argument = jnp.arange(3.0)
        jax.block_until_ready(argument)
        counter = CompilationCounter()
        for factor in (2, 3):
            double = jax.jit(lambda x, factor=factor: x * factor + 1)
            double(argument)
            double(argument)
        assert counter.count == 2


class TestScorer:
    def test_more_pairs_than_are_planned_together(self, warm: tuple[Scorer, list[str]]) -> None:
        """Logits find their way home over the border between two windows."""
        distinct = pairs([3, 5, 40, 9, 17, 4, 6], seed=2)
        expected = warm[0](distinct)
        assert expected.std() > 0.1
        order = np.random.default_rng(3).integers(0, len(distinct), WINDOW + 60)
        logits = warm[0]([distinct[i] for i in order])
        np.testing.assert_allclose(logits, expected[order], atol=1e-5)

    def test_rows_come_with_their_pairs(self, warm: tuple[Scorer, list[str]]) -> None:
        encoded = pairs([200, 30, 370, 5, 5, 90], seed=4)
        rows = list(warm[0].rows(encoded))
        assert sorted(i for indices, _ in rows for i in indices) == list(range(6))
        expected = warm[0](encoded)
        for indices, logits in rows:
            np.testing.assert_array_equal(logits, expected[indices])

    def test_accelerators_program_gives_the_same_logits(self, folder: Path, warm: tuple[Scorer, list[str]]) -> None:
        encoded = pairs([50, 60], seed=5)
        row = pack(encoded, 128)
        logits = compile_whole(convert.load(folder, dtype="float32"))(pack([], 128))(row)
        np.testing.assert_allclose(np.asarray(logits)[:2], warm[0](encoded), atol=1e-5)

    @pytest.mark.parametrize("row_tokens", [-1, 0, 49_153])
    def test_rows_of_a_length_that_has_no_bucket(self, folder: Path, row_tokens: int) -> None:
        model = convert.load(folder, dtype="float32")
        with pytest.raises(RequestError, match=f"row_tokens is {row_tokens}; a row takes 1 to 49152 tokens"):
            Scorer(model, max_length=64, row_tokens=row_tokens)


START = """
import collections, json, os, sys
os.umask(0)
import jax
events = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: events.update([event.split("/")[-1]]))
jax.numpy.zeros(3)  # a program that used JAX before is no reason for the cache to stay off
from jaxrank import Reranker
events.clear()
reranker = Reranker.from_pretrained(
    sys.argv[1], dtype="float32", max_length=64, row_tokens=192, compile_cache=sys.argv[2], **json.loads(sys.argv[3])
)
reranker.warm_up()
logits = reranker.score("what is panda?", ["hi", "a bear"], raw=True)
asked, hits, misses = (events[name] for name in ("compile_requests_use_cache", "cache_hits", "cache_misses"))
late = reranker.compilations
print(json.dumps(dict(asked=asked, hits=hits, misses=misses, late=late, logits=logits.tolist())))
"""


def run(*arguments: Any) -> str:
    """What Python prints in a process of its own, with four devices."""
    environment = {name: value for name, value in os.environ.items() if "CACHE" not in name}
    environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
    command = [sys.executable, *map(str, arguments)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def start(folder: Path, cache: Path, **settings: Any) -> dict[str, Any]:
    """Load, warm up and score in a process of its own; what JAX counted."""
    return json.loads(run("-c", START, folder, cache, json.dumps(settings)))


def test_a_second_start_compiles_nothing(folder: Path, tmp_path: Path) -> None:
    """By JAX's own count of hits and misses, and by the files: a second start adds none."""
    cache = tmp_path / "parent" / "compiled"
    first = start(folder, cache)
    assert first["misses"] == first["asked"] >= 2
    assert first["hits"] == first["late"] == 0
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700, "programs are code: nobody else may read or write them"
    files = sorted(path.name for path in cache.glob("*-cache"))
    assert len(files) == first["asked"]

    second = start(folder, cache)
    assert second == {**first, "hits": first["asked"], "misses": 0}
    assert sorted(path.name for path in cache.glob("*-cache")) == files


@pytest.mark.parametrize("devices", [{}, {"data_parallel": 2, "tensor_parallel": 2}], ids=["one device", "four"])
def test_what_jaxrank_compile_leaves_is_what_a_start_looks_for(
    folder: Path, tmp_path: Path, devices: dict[str, int]
) -> None:
    """The command compiles from shapes alone, from a folder without weights; not a program is missing then."""
    bare = tmp_path / "without weights"
    shutil.copytree(folder, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    flags = [f"--{name.replace('_', '-')}={count}" for name, count in devices.items()]
    line = f"-m jaxrank compile --dtype float32 --max-model-len 64 --row-tokens 192 --compile-cache {tmp_path}/cache"
    said = [run(*line.split(), *flags, bare) for _ in range(2)]
    found = start(folder, tmp_path / "cache", **devices)
    assert found["asked"] == found["hits"] >= 2
    assert (found["misses"], found["late"]) == (0, 0)
    where = "4 devices (cpu): 2 x the weights, each on 2" if devices else "1 device (cpu)"
    assert [text.partition(", after ")[0] for text in said] == [
        f"{found['asked']} programs compiled for {where}, 0 were there",
        f"0 programs compiled for {where}, {found['asked']} were there",
    ]
    seconds = r"[\d.]+ s \(imports [\d.]+, checks [\d.]+, weights [\d.]+, programs [\d.]+\)\n"
    assert re.fullmatch(seconds, said[1].partition(", after ")[2])


class TestCacheFolder:
    @pytest.fixture(autouse=True)
    def unset(self) -> Iterator[None]:
        """No cache is set in this process, before and after."""
        names = ("dir", "min_compile_time_secs", "min_entry_size_bytes")
        options = ["jax_compilation_cache_dir", *(f"jax_persistent_cache_{name}" for name in names[1:])]
        before = {name: getattr(jax.config, name) for name in options}
        jax.config.update("jax_compilation_cache_dir", None)
        yield
        for name, value in before.items():
            jax.config.update(name, value)

    @staticmethod
    def used() -> str | None:
        return jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]

    @pytest.mark.parametrize("mode", [0o770, 0o702, 0o1777])
    def test_refused_where_others_can_write(self, tmp_path: Path, mode: int) -> None:
        tmp_path.chmod(mode)
        with pytest.raises(ModelError, match=r"other users can write there.*chmod 700.*turn the cache off"):
            use_compilation_cache(tmp_path)
        assert self.used() is None

    def test_refused_where_it_is_somebody_elses(self, tmp_path: Path) -> None:
        folder = Path("/")  # root's
        if os.getuid() == 0:
            folder = tmp_path
            os.chown(folder, 65534, 65534)
        assert not stat.S_IMODE(folder.stat().st_mode) & 0o022
        with pytest.raises(ModelError, match=f"compilation cache {folder}: other users can write there"):
            use_compilation_cache(folder)
        assert self.used() is None

    def test_refused_where_it_cannot_be_made(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(ModelError, match=r"file/cache: it cannot be made \(Not a directory\)\. Name another"):
            use_compilation_cache(tmp_path / "file" / "cache")
        assert self.used() is None

    @pytest.mark.parametrize("mode", [0o700, 0o755])
    def test_a_folder_of_ones_own_is_taken(self, tmp_path: Path, mode: int) -> None:
        tmp_path.chmod(mode)
        use_compilation_cache(tmp_path)
        assert self.used() == str(tmp_path)

    def test_a_cache_that_is_set_already_stays(self, tmp_path: Path) -> None:
        jax.config.update("jax_compilation_cache_dir", str(tmp_path))
        use_compilation_cache(tmp_path / "other")
        assert self.used() == str(tmp_path)
        assert not (tmp_path / "other").exists()
