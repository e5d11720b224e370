"""Which attention body a model takes: lines of devices, the check on the device, and what follows where it fails."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrank import ModelError, RequestError, Reranker, convert
from jaxrank.kernels import IMPLEMENTATIONS, Implementation, line, rotary, tiles, xla
from jaxrank.runtime.attention import Choice, Failure, Sample, choose, settle, use_implementation
from jaxrank.runtime.compile_cache import CompilationCounter
from jaxrank.runtime.scorer import Scorer
from jaxrank.types import AttentionShape, Layout
from tests.checkpoints import TEXT, make_bge, make_qwen3
from tests.media import photo
from tests.server.fakes import FakeReranker, rerank, serving
from tests.server.test_metrics import samples
from tests.test_sharding import SIZES, make_vl

EVERY = {"tiled", "dense", "tpu", "triton", "mosaic"}
SHAPE = AttentionShape(4, 2, 32, norm_rotary=True)
SETTINGS: dict[str, Any] = dict(dtype="float32", row_tokens=256, max_length=400, compile_cache=None)
SMALL: dict[str, Any] = SETTINGS | dict(row_tokens=128, max_length=128)
QUERY = "Where do pandas live?"

Body = Callable[..., Any]


def dense(q: Any, k: Any, v: Any, layout: Layout, *, scale: float) -> Any:
    """Right, and not one of those that are known to run on CPU."""
    return xla.dense(q, k, v, layout, scale=scale)


def too_sharp(q: Any, k: Any, v: Any, layout: Layout, *, scale: float) -> Any:
    return dense(q, k, v, layout, scale=scale * 1.2)


def one_key_too_many(q: Any, k: Any, v: Any, layout: Layout, *, scale: float) -> Any:
    return dense(q, k, v, replace(layout, spans=layout.spans + jnp.array([0, 0, 0, 1])), scale=scale)


def no_prefix(q: Any, k: Any, v: Any, layout: Layout, *, scale: float) -> Any:
    return dense(q, k, v, replace(layout, spans=layout.spans * jnp.array([0, 0, 1, 1])), scale=scale)


def one_tile_forgotten(q: Any, k: Any, v: Any, layout: Layout, *, scale: float) -> Any:
    return dense(q, k, v, layout, scale=scale).at[128:256, 0].set(0)


def filler_left_over(q: Any, k: Any, v: Any, layout: Layout, *, scale: float) -> Any:
    filled = (jnp.asarray(layout.spans) > 0).any(1)[:, None, None]
    return jnp.where(filled, dense(q, k, v, layout, scale=scale), 1)


def heads_exchanged(q: Any, k: Any, v: Any, layout: Layout, *, scale: float) -> Any:
    return dense(q, k[:, ::-1], v[:, ::-1], layout, scale=scale)


def wrong_where_scored(q: Any, k: Any, v: Any, layout: Layout, *, scale: float) -> Any:
    return dense(q, k, v, layout, scale=scale) * (1.05 if len(q) < len(k) else 1)


def nan(q: Any, k: Any, v: Any, layout: Layout, *, scale: float) -> Any:
    return dense(q, k, v, layout, scale=scale).at[7].set(jnp.nan)


def raising(q: Any, k: Any, v: Any, layout: Layout, *, scale: float) -> Any:
    raise NotImplementedError("no such instruction\nand much more")


def half_turned(x: Any, scale: Any, by: Any, *, eps: float, dtype: Any) -> Any:
    return rotary.xla(x, scale, by._replace(sin=by.sin / 2), eps=eps, dtype=dtype)


WRONG: dict[str, tuple[Body, str]] = {
    "too sharp": (too_sharp, r"attention is off by \d+\.\d% of its norm"),
    "one key too many": (one_key_too_many, "attention has NaN"),
    "no prefix": (no_prefix, "attention is off by"),
    "one tile forgotten": (one_tile_forgotten, "attention is off by"),
    "filler left over": (filler_left_over, "attention is off by"),
    "heads exchanged": (heads_exchanged, "attention is off by"),
    "wrong where scored": (wrong_where_scored, r"attention of scored rows is off by 5\.0%"),
    "nan": (nan, "attention has NaN or infinity"),
    "raising": (raising, "NotImplementedError: no such instruction"),
}


@pytest.fixture
def put(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Register a body as the first of this device's line."""

    def put(name: str, body: Body, **more: Any) -> None:
        monkeypatch.setitem(IMPLEMENTATIONS, name, Implementation(body, tiles.make_layout, **more))
        monkeypatch.setattr("jaxrank.runtime.attention.default_line", lambda dtype: (name, "tiled"))

    return put


@contextmanager
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """What is warned of in the block; filled when it ends."""
    told: list[str] = []
    caplog.clear()
    with caplog.at_level(logging.WARNING, "jaxrank"):
        yield told
    told += [record.getMessage() for record in caplog.records if record.name == "jaxrank.runtime.attention"]


class TestLine:
    @pytest.mark.parametrize(
        "platform, capability, dtype, bodies",
        [
            ("cpu", "", "bfloat16", "tiled"),
            ("tpu", "", "bfloat16", "tpu tiled"),
            ("tpu", "", "float32", "tpu tiled"),
            ("gpu", "9.0", "bfloat16", "mosaic triton tiled"),
            ("gpu", "9.0", "float32", "triton tiled"),
            ("gpu", "8.0", "bfloat16", "triton tiled"),
            ("gpu", "8.9", "bfloat16", "triton tiled"),
            ("gpu", "10.0", "bfloat16", "triton tiled"),
            ("gpu", "12.1", "float32", "triton tiled"),
            ("gpu", "7.5", "bfloat16", "tiled"),
            ("gpu", "gfx942", "bfloat16", "tiled"),
            ("gpu", "", "bfloat16", "tiled"),
        ],
    )
    def test_of_each_device(self, platform: str, capability: str, dtype: str, bodies: str) -> None:
        assert line(platform, capability, dtype, EVERY) == tuple(bodies.split())

    def test_what_is_not_registered_is_left_out(self) -> None:
        assert line("gpu", "9.0", "bfloat16", EVERY - {"mosaic"}) == ("triton", "tiled")
        assert line("gpu", "9.0", jnp.bfloat16, {"tiled"}) == ("tiled",)

    def test_names_are_those_of_implementations(self) -> None:
        assert {"tiled", "dense", "tpu", "triton"} <= set(IMPLEMENTATIONS)


class TestCheck:
    def choose(self, *names: str, shape: AttentionShape = SHAPE, causal: bool = True, dtype: str = "float32") -> Choice:
        return choose(names, Sample(shape, causal, dtype), jax.devices()[3])

    @pytest.mark.parametrize("kind", WRONG)
    def test_wrong_bodies(self, put: Any, caplog: pytest.LogCaptureFixture, kind: str) -> None:
        body, fault = WRONG[kind]
        put("fake", body)
        with warnings(caplog) as told:
            choice = self.choose("fake", "dense")
        assert choice.implementation == "dense"
        [failure] = choice.failed
        assert failure.implementation == "fake"
        assert re.match(fault, failure.reason), failure.reason
        assert told == [f"attention: fake fails on this device, so dense takes its place: {failure.reason}"]
        assert str(choice) == "dense (fake failed)"

    def test_a_wrong_norm(self, put: Any) -> None:
        put("fake", dense, norm_rotary=half_turned)
        [failure] = self.choose("fake", "dense").failed
        assert re.match("norm_rotary of (queries|keys) is off by", failure.reason)
        assert self.choose("fake", shape=SHAPE._replace(norm_rotary=False)) == Choice("fake"), "it is not used there"

    @pytest.mark.parametrize(
        "shape, causal, dtype", [(SHAPE, True, "bfloat16"), (AttentionShape(2, 2, 72), False, "float32")]
    )
    def test_right_bodies(
        self, put: Any, caplog: pytest.LogCaptureFixture, shape: AttentionShape, causal: bool, dtype: str
    ) -> None:
        put("fake", dense)
        with warnings(caplog) as told:
            for name in ("fake", "tiled", "tpu-interpreted", "triton-interpreted"):
                assert self.choose(name, "dense", shape=shape, causal=causal, dtype=dtype) == Choice(name)
        assert told == []

    def test_nothing_is_right(self, put: Any) -> None:
        put("fake", raising)
        put("other", nan)
        with pytest.raises(
            ModelError,
            match=r"^attention is wrong on this device \(cpu\): fake: NotImplementedError: no such instruction; "
            r"other: attention has NaN or infinity\. Update JAX .*\(JAX_PLATFORMS=cpu\)$",
        ):
            self.choose("fake", "other")

    def test_processes_take_the_same(self) -> None:
        sample, asked = Sample(SHAPE, True, "float32"), []

        def agree(right: bool) -> bool:
            asked.append(right)
            return len(asked) == 2

        choice = choose(("dense", "tiled"), sample, jax.devices()[0], agree)
        assert choice == Choice("tiled", (Failure("dense", "it fails in another process"),))
        assert asked == [True, True]

    def test_it_costs_two_programs(self, put: Any) -> None:
        put("fake", dense)
        self.choose("fake", "tiled")
        counter = CompilationCounter()
        self.choose("fake", "tiled")
        assert counter.count == 2


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of heads that eight devices can share."""
    return {
        "bge": make_bge(tmp_path_factory.mktemp("bge"), **SIZES),
        "qwen3": make_qwen3(tmp_path_factory.mktemp("qwen3"), num_key_value_heads=8, **SIZES),
        "qwen3_vl": make_vl(tmp_path_factory.mktemp("qwen3_vl")),
    }


def documents(family: str) -> list[Any]:
    return [*TEXT, photo(64, 96, 0), photo(160, 96, 1)] if family == "qwen3_vl" else [*TEXT]


def score(reranker: Reranker, family: str) -> np.ndarray:
    return reranker.score(QUERY, documents(family), raw=True, progress=False)


def implementations(module: Any) -> set[str | None]:
    return {getattr(one, "implementation", "none") for _, one in nnx.iter_modules(module)} - {"none"}


@pytest.fixture(scope="module")
def ordinary(folders: dict[str, Path]) -> dict[str, np.ndarray]:
    found = {}
    for family, folder in folders.items():
        reranker = Reranker.from_pretrained(folder, **SETTINGS)
        assert reranker.attention == dict.fromkeys(reranker.attention, Choice("tiled"))
        found[family] = score(reranker, family)
        assert found[family].std() > 0.03
    return found


class TestReranker:
    @pytest.mark.parametrize(
        "family, kind, share", [("bge", "too sharp", None), ("qwen3", "raising", 4), ("qwen3_vl", "nan", None)]
    )
    def test_falls_back(
        self,
        folders: Any,
        ordinary: Any,
        put: Any,
        caplog: pytest.LogCaptureFixture,
        family: str,
        kind: str,
        share: int | None,
    ) -> None:
        body, _ = WRONG[kind]
        put("fake", body)
        with warnings(caplog) as told:
            reranker = Reranker.from_pretrained(folders[family], tensor_parallel=share, **SETTINGS)
        assert list(reranker.attention) == (["text", "vision"] if family == "qwen3_vl" else ["text"])
        assert [str(choice) for choice in reranker.attention.values()] == ["tiled (fake failed)"] * len(told)
        assert len(told) == len(reranker.attention)
        assert np.abs(score(reranker, family) - ordinary[family]).max() <= (1e-5 if share else 0)

    @pytest.mark.parametrize("family, share", [("bge", 4), ("qwen3", None), ("qwen3_vl", 4)])
    def test_a_right_one_is_kept(self, folders: Any, ordinary: Any, put: Any, family: str, share: int | None) -> None:
        """Over a mesh, too, where it is checked with the heads that one device has."""
        heads = []

        def body(q: Any, k: Any, v: Any, layout: Layout, *, scale: float) -> Any:
            heads.append((q.shape[1], k.shape[1]))
            return dense(q, k, v, layout, scale=scale)

        put("fake", body)
        reranker = Reranker.from_pretrained(folders[family], tensor_parallel=share, **SETTINGS)
        assert set(reranker.attention.values()) == {Choice("fake")}
        assert implementations(reranker.model) == {"fake"}
        checked = set(heads)
        assert checked == {(8 // (share or 1), 8 // (share or 1))}
        heads.clear()
        got = score(reranker, family)
        assert np.abs(got - ordinary[family]).max() <= 1e-5
        assert heads
        assert set(heads) == checked

    def test_an_outline_is_checked(self, folders: Any, put: Any) -> None:
        put("fake", nan)
        outline = Reranker.from_pretrained(folders["qwen3_vl"], weights=False, **SETTINGS)
        assert [str(choice) for choice in outline.attention.values()] == ["tiled (fake failed)"] * 2

    def test_nothing_is_compiled_after_warm_up(self, folders: Any, put: Any) -> None:
        put("fake", nan)
        reranker = Reranker.from_pretrained(folders["bge"], **SMALL)
        assert reranker.compilations == 0, "nor does the check count before"
        reranker.warm_up()
        score(reranker, "bge")
        assert reranker.compilations == 0

    def test_one_that_is_named(self, folders: Any, ordinary: Any) -> None:
        reranker = Reranker.from_pretrained(folders["qwen3"], implementation="tpu-interpreted", **SETTINGS)
        assert reranker.attention == {"text": Choice("tpu-interpreted")}
        assert np.abs(score(reranker, "qwen3") - ordinary["qwen3"]).max() <= 1e-4

    def test_one_that_is_named_and_fails(self, folders: Any, put: Any) -> None:
        put("fake", nan)
        with pytest.raises(ModelError, match=r"\(cpu\): fake: attention has NaN or infinity\. .* name another impl"):
            Reranker.from_pretrained(folders["bge"], implementation="fake", **SETTINGS)
        with pytest.raises(ModelError, match=r"triton: ValueError"):
            Reranker.from_pretrained(folders["bge"], implementation="triton", **SETTINGS)

    def test_one_that_is_unknown(self, folders: Any) -> None:
        with pytest.raises(RequestError, match="implementation 'magic' is unknown; one of tiled, dense"):
            Reranker.from_pretrained(folders["bge"], implementation="magic", **SETTINGS)

    def test_one_that_the_model_was_made_with(self, folders: Any) -> None:
        model = convert.load(folders["bge"], dtype="float32")
        assert settle(model, causal=False, dtype="float32") == Choice("tiled")
        assert implementations(model) == {"tiled"}
        model = convert.load(folders["bge"], dtype="float32")
        use_implementation(model, "dense")
        scorer = Scorer(model, max_length=128, row_tokens=128)
        assert scorer.attention == Choice("dense")


class TestServer:
    FAILED = Failure("fake", "NotImplementedError: no such instruction")

    def test_what_it_tells(self, folders: Any, ordinary: Any, put: Any, caplog: pytest.LogCaptureFixture) -> None:
        put("fake", raising)
        reranker = Reranker.from_pretrained(folders["bge"], **SETTINGS)
        with caplog.at_level(logging.INFO, "jaxrank"), serving(reranker, patience_s=300) as base:
            info = httpx.get(base + "/info").json()
            found = samples(base)
            answer = rerank(base, {"query": QUERY, "documents": [*TEXT]}).json()
        assert info["attention"] == {"text": {"implementation": "tiled", "failed": [self.FAILED._asdict()]}}
        labels = {"part": "text", "implementation": "tiled", "fallback_from": "fake"}
        assert found["jaxrank_attention_info", frozenset(labels.items())] == 1
        assert found["jaxrank_compilations_after_ready", frozenset()] == 0
        assert "on 1 device (cpu), attention: tiled (fake failed) for text" in caplog.text
        assert answer[0]["score"] == pytest.approx(ordinary["bge"].max(), abs=1e-5)

    def test_of_models_that_see(self, caplog: pytest.LogCaptureFixture) -> None:
        fake = FakeReranker()
        failed = self.FAILED, Failure("triton", "attention has NaN or infinity")
        fake.attention = {"text": Choice("mosaic"), "vision": Choice("tiled", failed)}
        with caplog.at_level(logging.INFO, "jaxrank"), serving(fake) as base:
            info = httpx.get(base + "/info").json()
            found = samples(base)
        assert info["attention"]["text"] == {"implementation": "mosaic", "failed": []}
        told = [one._asdict() for one in failed]
        assert info["attention"]["vision"] == {"implementation": "tiled", "failed": told}
        bodies = {labels: value for (name, labels), value in found.items() if name == "jaxrank_attention_info"}
        text = {"part": "text", "implementation": "mosaic", "fallback_from": ""}
        vision = {"part": "vision", "implementation": "tiled", "fallback_from": "fake,triton"}
        assert bodies == {frozenset(labels.items()): 1 for labels in (text, vision)}
        assert "attention: mosaic for text, tiled (fake, triton failed) for vision" in caplog.text
