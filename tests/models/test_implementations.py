"""Whole models on every kernel that runs here, packed row for packed row, against transformers' logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import XLMRobertaForSequenceClassification

from benchmarks.publisher import Script
from jaxrank import convert
from jaxrank.kernels import IMPLEMENTATIONS
from jaxrank.models import layers, settings_of
from jaxrank.runtime.packing import pack
from jaxrank.runtime.programs import whole
from jaxrank.types import Encoded
from jaxrank.weights.converted import read_config
from tests.checkpoints import make_bge, make_qwen3

RUNNABLE = [
    name
    for name, one in IMPLEMENTATIONS.items()
    if one.platform in (None, jax.default_backend()) and name != "mosaic-interpreted"
]
TOKENS = 384
LENGTHS = [3, 90, 1, 40, 64, 7]


@pytest.fixture(scope="module")
def bge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads of 64, two of which share a TPU's block of lanes."""
    return make_bge(tmp_path_factory.mktemp("bge"), tokenizer=False, num_hidden_layers=4, hidden_size=128,
                    num_attention_heads=2)  # fmt: skip


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads of 128, as published, so that TPU's kernel for norm and rotary embedding takes part."""
    return make_qwen3(tmp_path_factory.mktemp("qwen3"), num_hidden_layers=4, head_dim=128)


def logits(folder: Path, pairs: list[Encoded], implementation: str) -> np.ndarray:
    """Of one packed row, by a model built for that implementation."""
    family, settings = settings_of(read_config(folder))
    model: Any = family.module(settings, dtype="float32", rngs=None, implementation=implementation)
    nnx.update(model, nnx.state(convert.load(folder, dtype="float32")))
    score, state = whole(model)
    return np.asarray(score(state, pack(pairs, TOKENS, causal=model.causal, implementation=implementation)))


@pytest.fixture(params=[*RUNNABLE, "triton-interpreted in a long row"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With models written as they are compiled for that device. GPUs run a scan over the layers of long rows alone;
    the last stands for that."""
    name, _, long = request.param.partition(" ")
    if name == "tpu-interpreted":
        monkeypatch.setattr(layers, "is_for_tpu", lambda implementation: True)
    if long:
        monkeypatch.setattr(layers, "UNROLLED", 0)
    return name


class TestWholeModels:
    def test_bge(self, bge: Path, implementation: str) -> None:
        rng = np.random.default_rng(0)
        pairs = [Encoded(np.array([0, *rng.integers(5, 400, n), 2], np.int32)) for n in LENGTHS]
        model = XLMRobertaForSequenceClassification.from_pretrained(bge, dtype=torch.float32).eval()
        with torch.no_grad():
            want = [model(torch.tensor(p.tokens[None], dtype=torch.int64)).logits.item() for p in pairs]
        got = logits(bge, pairs, implementation)
        assert np.std(want) > 0.05
        assert np.abs(got[: len(pairs)] - want).max() <= 1e-4
        assert np.isfinite(got).all(), "slots that no pair has must not be left unwritten"

    def test_qwen3_stars(self, qwen3: Path, implementation: str) -> None:
        rng = np.random.default_rng(1)
        prefix, texts = rng.integers(0, 600, 70).astype(np.int32), [rng.integers(0, 600, n) for n in LENGTHS]
        pairs = [Encoded(text.astype(np.int32), len(text) - 1, prefix=prefix) for text in texts]
        want = Script(qwen3).logits([[*prefix.tolist(), *text.tolist()] for text in texts])
        got = logits(qwen3, pairs, implementation)
        assert np.std(want) > 0.05
        assert np.abs(got[: len(pairs)] - want).max() <= 1e-4
        assert np.isfinite(got).all(), "slots that no pair has must not be left unwritten"
