"""Logits against transformers' Qwen3ForCausalLM with the same random weights, prompt by prompt; stars against full
prompts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen3ForSequenceClassification

from benchmarks.publisher import Script
from jaxrank import convert
from jaxrank.errors import UnsupportedError
from jaxrank.models.qwen3 import Qwen3Config
from jaxrank.runtime.packing import pack
from jaxrank.runtime.programs import compile_whole
from jaxrank.runtime.scorer import Scorer
from jaxrank.types import NO_PREFIX, Encoded
from tests.checkpoints import make_qwen3

WIDE = dict(hidden_size=1024, num_attention_heads=16, num_key_value_heads=8, head_dim=128, intermediate_size=3072)
CONFIGS: dict[str, dict[str, Any]] = {
    "1 layer, tied": dict(num_hidden_layers=1),
    "3 layers, untied": dict(num_hidden_layers=3, tie_word_embeddings=False),
    "no grouping": dict(num_hidden_layers=2, num_key_value_heads=4),
    "one key/value head": dict(num_hidden_layers=2, num_key_value_heads=1, head_dim=32),
    "0.6B's widths, a third of its layers": dict(num_hidden_layers=10, **WIDE),
}


def full(pairs: list[Encoded]) -> list[Encoded]:
    """The same prompts without sharing."""
    return [
        replace(p, tokens=np.concatenate([p.prefix, p.tokens]), score_at=p.score_at + len(p.prefix), prefix=NO_PREFIX)
        for p in pairs
    ]


def request(rng: np.random.Generator, prefix: int, lengths: list[int], vocab: int = 600) -> list[Encoded]:
    """Prompts that begin with the same random tokens."""
    shared = rng.integers(0, vocab, prefix).astype(np.int32)
    return [Encoded(rng.integers(0, vocab, n).astype(np.int32), n - 1, prefix=shared) for n in lengths]


def requests(seed: int = 0) -> list[Encoded]:
    """Two requests of several documents, one of a single long one, one without a prefix."""
    rng = np.random.default_rng(seed)
    return [
        *request(rng, 40, [10, 1, 100, 37, 60]),
        *request(rng, 7, [20, 300, 3]),
        *request(rng, 90, [400]),
        *request(rng, 0, [50, 2]),
    ]


def published(folder: Path, pairs: list[Encoded]) -> np.ndarray:
    return Script(folder).logits([p.tokens.tolist() for p in full(pairs)])


def scorer(folder: Path, dtype: str = "float32", row_tokens: int = 512, max_length: int = 768) -> Scorer:
    return Scorer(convert.load(folder, dtype=dtype), max_length=max_length, row_tokens=row_tokens)


@pytest.fixture(scope="module", params=CONFIGS.values(), ids=list(CONFIGS))
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Encoded], np.ndarray, Scorer]:
    folder = make_qwen3(tmp_path_factory.mktemp("qwen3"), **request.param)
    pairs = requests()
    return folder, pairs, published(folder, pairs), scorer(folder)


Case = tuple[Path, list[Encoded], np.ndarray, Scorer]


class TestParity:
    def test_float32(self, case: Case) -> None:
        _, pairs, want, score = case
        assert want.std() > 0.2, "logits that hardly differ would prove nothing: 2,000 times the tolerance"
        assert np.abs(score(pairs) - want).max() <= 1e-4

    def test_stars_equal_full_prompts(self, case: Case) -> None:
        _, pairs, _, score = case
        assert np.abs(score(pairs) - score(full(pairs))).max() <= 1e-5

    def test_bfloat16(self, case: Case) -> None:
        """Closer to float32 than transformers' own bfloat16 is, since the residual stream and the head are float32."""
        folder, pairs, want, _ = case
        theirs = Script(folder).logits([p.tokens.tolist() for p in full(pairs)], torch.bfloat16)
        ours = scorer(folder, "bfloat16")(pairs)
        assert np.abs(ours - want).mean() < np.abs(theirs - want).mean()
        assert np.abs(ours - want).max() < 0.15 * want.std()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen3(tmp_path_factory.mktemp("tiny"), num_hidden_layers=3)


class TestStars:
    def test_alone_packed_and_in_any_order(self, tiny: Path) -> None:
        pairs, score = requests(1), scorer(tiny)
        alone = np.concatenate([score([pair]) for pair in pairs])
        assert np.abs(score(pairs) - alone).max() <= 1e-5
        order = np.random.default_rng(2).permutation(len(pairs))
        assert np.abs(score([pairs[i] for i in order]) - alone[order]).max() <= 1e-5

    def test_a_request_larger_than_a_row(self, tiny: Path) -> None:
        rng = np.random.default_rng(3)
        pairs = request(rng, 50, rng.integers(1, 150, 100).tolist())
        score = scorer(tiny)
        assert np.abs(score(pairs) - score(full(pairs))).max() <= 1e-5

    def test_interleaved(self, tiny: Path) -> None:
        rng = np.random.default_rng(4)
        a, b = request(rng, 30, [20] * 8), request(rng, 60, [35] * 8)
        pairs = [pair for two in zip(a, b, strict=True) for pair in two]
        score = scorer(tiny)
        assert np.abs(score(pairs) - score(full(pairs))).max() <= 1e-5

    def test_a_long_prompt_goes_piece_by_piece(self, tiny: Path) -> None:
        rng = np.random.default_rng(5)
        pairs = request(rng, 2500, [500, 700]) + request(rng, 0, [3100])
        score = scorer(tiny, row_tokens=512, max_length=4096)
        assert np.abs(score(pairs) - published(tiny, pairs)).max() <= 1e-4

    def test_as_one_program_with_a_scan_over_layers(self, tiny: Path) -> None:
        """What accelerators run."""
        pairs = requests(6)[:5]
        row = pack(pairs, 256, causal=True)
        logits = compile_whole(convert.load(tiny, dtype="float32"))(pack([], 256, causal=True))(row)
        assert np.abs(np.asarray(logits)[: len(pairs)] - published(tiny, pairs)).max() <= 1e-4


def test_sequence_classification(tmp_path: Path) -> None:
    folder = make_qwen3(tmp_path, classifier=True)
    pairs = requests(7)
    model = Qwen3ForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        # pad_token_id is one of the random tokens' ids: without an id it takes the last token, as it should
        model.config.pad_token_id = None
        want = [model(torch.tensor(p.tokens[None].astype(np.int64))).logits.item() for p in full(pairs)]
    assert np.abs(scorer(folder)(pairs) - np.array(want)).max() <= 1e-4


CONFIG: dict[str, Any] = dict(
    architectures=["Qwen3ForCausalLM"],
    vocab_size=600,
    hidden_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=96,
    max_position_embeddings=40960,
    rope_theta=1_000_000,
    rope_scaling=None,
    sliding_window=4096,
    use_sliding_window=False,
)


class TestConfig:
    def test_old_and_new_files(self) -> None:
        new = {k: v for k, v in CONFIG.items() if k not in ("rope_theta", "rope_scaling")}
        new["rope_parameters"] = {"rope_type": "default", "rope_theta": 1_000_000.0}
        old = Qwen3Config.read(CONFIG)
        assert old == Qwen3Config.read(new)
        assert (old.theta, old.max_length, old.default_length, old.tied) == (1e6, 40960, 8192, False)

    def test_a_missing_theta_is_no_default(self) -> None:
        with pytest.raises(KeyError, match="rope_theta"):
            Qwen3Config.read({k: v for k, v in CONFIG.items() if k != "rope_theta"})

    @pytest.mark.parametrize(
        "change, message",
        [
            ({"attention_bias": True}, "attention_bias = True (implemented: False)"),
            ({"use_sliding_window": True}, "use_sliding_window = True"),
            ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types = 'sliding_attention'"),
            ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type = 'yarn' (implemented: 'default')"),
            (
                {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}},
                "rope_type = 'linear'",
            ),
            ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
            ({"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4}"),
            ({"num_key_value_heads": 3}, "is not a multiple of num_key_value_heads 3"),
            (
                {"architectures": ["Qwen3ForSequenceClassification"], "id2label": {"0": "no", "1": "yes"}},
                "num_labels = 2",
            ),
        ],
    )
    def test_what_is_not_computed_is_refused_by_name(self, change: dict[str, Any], message: str) -> None:
        with pytest.raises(UnsupportedError) as caught:
            Qwen3Config.read({**CONFIG, **change})
        assert message in str(caught.value)
