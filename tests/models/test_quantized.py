"""Logits of int8 weights are those of the published classes with the rounding written out (see tests.dequantised)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks.publisher import Script
from benchmarks.publisher_vl import PublishedVL
from jaxrank import convert
from jaxrank.models import layers
from jaxrank.models.quantized import Quantized, largest_magnitudes, rounded, scales
from jaxrank.runtime.scorer import Scorer
from jaxrank.weights import converted as checkpoint
from tests.checkpoints import make_bge, make_qwen3, make_qwen3_vl
from tests.dequantised import dequantised, round_rows
from tests.models import test_qwen3, test_qwen3_vl, test_xlm_roberta

Logits = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Of int8, of the published class with the rounding written out, and of that class as published."""


def bge(folder: Path) -> Logits:
    make_bge(folder, tokenizer=False, num_hidden_layers=3)
    pairs = test_xlm_roberta.pairs([3, 200, 4, *range(20, 40)])
    score = Scorer(convert.load(folder, dtype="float32", quantization="int8"), max_length=512, row_tokens=512)
    want, unrounded = (
        test_xlm_roberta.published(one, pairs) for one in (dequantised(folder, folder / "rounded"), folder)
    )
    return score(pairs), want, unrounded


def qwen3(folder: Path) -> Logits:
    make_qwen3(folder, num_hidden_layers=3)
    pairs = test_qwen3.requests()
    prompts = [pair.tokens.tolist() for pair in test_qwen3.full(pairs)]
    score = Scorer(convert.load(folder, dtype="float32", quantization="int8"), max_length=768, row_tokens=512)
    want, unrounded = (Script(one).logits(prompts) for one in (dequantised(folder, folder / "rounded"), folder))
    return score(pairs), want, unrounded


def qwen3_vl(folder: Path, whole: bool = False) -> Logits:
    """With images and video, whose tower is not rounded."""
    make_qwen3_vl(folder)
    media = test_qwen3_vl.some_media(np.random.default_rng(0))
    published = PublishedVL(dequantised(folder, folder / "rounded"))
    write = test_qwen3_vl.Writer(published, 1)
    prefix = write.prompt(20, media[3], 3)
    documents = [write.prompt(25), write.prompt(4, media[0], 5), write.prompt(2, media[1], 6)]
    ours = test_qwen3_vl.Ours(folder, published, whole=whole, quantization="int8")
    full = [test_qwen3_vl.join(prefix, document) for document in documents]
    want, unrounded = (np.array([one.logit(prompt) for prompt in full]) for one in (published, PublishedVL(folder)))
    return ours.logits(prefix, documents), want, unrounded


@pytest.mark.parametrize("family", [bge, qwen3, qwen3_vl])
def test_logits(tmp_path: Path, family: Any) -> None:
    got, want, unrounded = family(tmp_path / "model")
    assert want.std() > 0.05, "logits that hardly differ would prove nothing: 500 times the tolerance"
    assert np.abs(got - want).max() <= 1e-4
    assert np.abs(want - unrounded).max() > 3e-3, "rounding must show, or it was not tested"


@pytest.mark.parametrize("on_gpu, unrolled", [(False, 0), (True, 0), (True, 2048)], ids=["scan", "vectors", "unrolled"])
def test_logits_with_stacked_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_gpu: bool, unrolled: int
) -> None:
    """What accelerators run, also where layers add features."""
    monkeypatch.setattr(layers, "is_for_gpu", lambda implementation: on_gpu)
    monkeypatch.setattr(layers, "UNROLLED", unrolled)
    got, want, _ = qwen3_vl(tmp_path / "model", whole=True)
    assert np.abs(got - want).max() <= 1e-4


def test_long_rows_a_few_heads_at_a_time(tmp_path: Path) -> None:
    """On CPU the matrices, and the scales that are not one for all heads, are cut into groups of four heads."""
    folder = make_bge(tmp_path / "model", tokenizer=False, num_hidden_layers=3, max_position_embeddings=8194,
                      num_attention_heads=8, hidden_size=96)  # fmt: skip
    pairs = test_xlm_roberta.pairs([9, 2049, 100])
    score = Scorer(convert.load(folder, dtype="float32", quantization="int8"), max_length=4096, row_tokens=1024)
    want = test_xlm_roberta.published(dequantised(folder, tmp_path / "rounded"), pairs)
    assert np.abs(score(pairs) - want).max() <= 1e-4


def test_bfloat16_activations(tmp_path: Path) -> None:
    """Rounding to int8 adds little to what bfloat16 loses: every int8 is exact in it."""
    folder = make_bge(tmp_path / "model", tokenizer=False)
    pairs = test_xlm_roberta.pairs([*range(20, 40)])
    model = convert.load(folder, dtype="bfloat16", quantization="int8")
    assert model.word.dtype == model.last.attention.qkv.kernel.dtype == jnp.bfloat16
    want = test_xlm_roberta.published(dequantised(folder, tmp_path / "rounded"), pairs)
    assert np.abs(Scorer(model, max_length=256, row_tokens=256)(pairs) - want).max() <= 3e-2


class TestRounding:
    def rows(self) -> np.ndarray:
        """Many sizes, one of them zeros, one of a single outlier, one of the smallest numbers."""
        rows = np.random.default_rng(0).normal(size=(40, 300)) * np.logspace(-20, 20, 40)[:, None]
        rows = np.concatenate([rows, np.zeros((1, 300)), np.eye(1, 300) * 1e4 + 1e-3, np.full((1, 300), -1e-44)])
        return rows.astype(np.float32)

    def test_half_a_step_at_most(self) -> None:
        x = self.rows()
        scale = scales(largest_magnitudes(x, 1))
        steps = rounded(x, scale)
        assert steps.dtype == np.int8
        assert scale.shape == (43, 1)
        assert (np.abs(steps).max(1)[:40] == 127).all()
        error = np.abs(steps.astype(np.float64) * scale - x)
        assert (error <= np.abs(x).max(1, keepdims=True).astype(np.float64) / 254 * (1 + 1e-6) + 1e-37).all()
        np.testing.assert_array_equal((steps.astype(np.float64) * scale).astype(np.float32)[:42], round_rows(x)[:42])

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_what_is_not_finite_is_refused(self, value: float) -> None:
        x = self.rows()
        x[7, 9] = value
        with pytest.raises(ValueError, match="not finite"):
            scales(largest_magnitudes(x, 1))


@pytest.mark.parametrize("make", [make_bge, make_qwen3, make_qwen3_vl])
def test_what_is_rounded(tmp_path: Path, make: Any) -> None:
    """Matrices of the text model's layers and the table of words alone, with a scale for each output channel."""
    folder = make(tmp_path / "model")
    model = convert.load(folder, dtype="bfloat16", quantization="int8")
    plain = checkpoint.parameters(convert.load(folder, dtype="bfloat16"))
    matrices = ("qkv", "out", "up", "gate", "down")
    seen = 0
    for path, value in checkpoint.by_path(nnx.state(model)).items():
        name = path.removesuffix("/kernel").split("/")
        expected = path == "word" or (name[0] in ("layers", "adding", "last") and name[-1] in matrices)
        assert isinstance(value, Quantized) == expected, path
        if not expected:
            np.testing.assert_array_equal(np.asarray(value), np.asarray(plain[path]), path)
            continue
        seen += 1
        shape = plain[path].shape
        if path == "word":
            assert value.scale.shape == (shape[0], 1)
        else:
            assert value.scale.shape == (1, shape[1])
        assert value.values.dtype == jnp.int8
        assert value.scale.dtype == jnp.float32
    assert seen >= 9


def test_half_the_memory(tmp_path: Path) -> None:
    """Bytes of 0.6B's widths, three layers, counted by hand: int8, a scale a channel, vectors in float32."""
    wide, ffn, words, layers = 1024, 3072, 151_669, 3
    folder = make_qwen3(
        tmp_path / "model", tokenizer=False, vocab_size=512, hidden_size=wide, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, intermediate_size=ffn, num_hidden_layers=layers,
    )  # fmt: skip
    config = {**checkpoint.read_config(folder), "vocab_size": words}

    def size(quantization: str | None) -> int:
        arrays = checkpoint.parameters(checkpoint.outline(config, "bfloat16", quantization))
        return sum(array.size * array.dtype.itemsize for array in arrays.values())

    matrices = layers * (2 * wide * 2048 + 2 * wide * 1024 + 3 * wide * ffn) + words * wide
    channels = layers * (2048 + 2 * 1024 + wide + 2 * ffn + wide) + words
    vectors = layers * (2 * wide + 2 * 128) + 2 * wide
    assert size(None) == 2 * matrices + 4 * vectors
    assert size("int8") == matrices + 4 * channels + 4 * vectors
    assert size("int8") < 0.51 * size(None)
