"""Logits against transformers' XLMRobertaForSequenceClassification with the same random weights, pair by pair."""

import numpy as np
import pytest
import torch
from transformers import XLMRobertaForSequenceClassification

from jaxrank import convert
from jaxrank.errors import UnsupportedError
from jaxrank.models.xlm_roberta import XLMRobertaConfig
from jaxrank.runtime.scorer import Scorer
from jaxrank.types import Encoded
from tests.checkpoints import make_bge

BASE = dict(hidden_size=768, num_attention_heads=12, intermediate_size=3072)
LARGE = dict(hidden_size=1024, num_attention_heads=16, intermediate_size=4096)
CONFIGS = {
    "tiny, 1 layer": dict(num_hidden_layers=1),
    "tiny, 3 layers, 1 head": dict(num_hidden_layers=3, num_attention_heads=1),
    "odd sizes": dict(num_hidden_layers=2, hidden_size=60, num_attention_heads=5, intermediate_size=100),
    "base width, 12 layers": dict(num_hidden_layers=12, **BASE),
    "large width, 24 layers": dict(num_hidden_layers=24, **LARGE),
}


def pairs(lengths, seed=0, vocab=400):
    rng = np.random.default_rng(seed)
    return [Encoded(np.array([0, *rng.integers(5, vocab, n - 2), 2], np.int32)) for n in lengths]


def published(folder, encoded):
    """float32 logits of the torch class, one pair at a time: no padding, no batch."""
    model = XLMRobertaForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return np.array([model(torch.tensor(e.tokens[None], dtype=torch.int64)).logits.item() for e in encoded])


def scorer(folder, dtype="float32", row_tokens=1024, max_length=512):
    return Scorer(convert.load(folder, dtype=dtype), max_length=max_length, row_tokens=row_tokens)


@pytest.fixture(scope="module", params=CONFIGS.values(), ids=list(CONFIGS))
def case(request, tmp_path_factory):
    """A checkpoint, its pairs of 3 to 512 tokens (64; fewer for the largest), published logits, and our scorer."""
    wide = request.param.get("hidden_size", 0) > 500
    # published initialisation (0.02 at width 1,024) for deep and wide, more for the tiny ones so that logits differ
    gain = 0.64 if wide else 1.2
    folder = make_bge(tmp_path_factory.mktemp("bge"), tokenizer=False, gain=gain, **request.param)
    lengths = [3, 512, 4, 7, *np.random.default_rng(1).integers(8, 120, 12 if wide else 60)]
    encoded = pairs(lengths)
    return folder, encoded, published(folder, encoded), scorer(folder)


class TestParity:
    def test_float32(self, case):
        _, encoded, want, score = case
        assert want.std() > 0.02, "logits that hardly differ would prove nothing: 200 times the tolerance"
        assert np.abs(score(encoded) - want).max() <= 1e-4

    def test_bfloat16(self, case):
        folder, encoded, want, _ = case
        got = scorer(folder, "bfloat16")(encoded)
        assert np.abs(got - want).max() <= 3e-2
        gaps = want[:, None] - want[None, :]
        assert (got[:, None] > got[None, :])[gaps > 3e-2].all(), "the order changed where float32 tells them apart"

    def test_alone_packed_and_shuffled(self, case):
        _, encoded, _, score = case
        together = score(encoded)
        order = np.random.default_rng(2).permutation(len(encoded))
        assert np.abs(score([encoded[i] for i in order]) - together[order]).max() <= 1e-5
        alone = np.array([score([e])[0] for e in encoded[:6]])
        assert np.abs(alone - together[:6]).max() <= 1e-5

    @pytest.mark.parametrize(
        "length, heads", [(513, 6), (1025, 4), (2049, 4), (2049, 6), (2049, 8), (3000, 8), (8190, 6), (8190, 8)]
    )
    def test_long_pairs(self, tmp_path, length, heads):
        """v2-m3's position table: up to 8,190 tokens in one pair, here beside short ones."""
        folder = make_bge(tmp_path, tokenizer=False, num_hidden_layers=3, max_position_embeddings=8194,
                          num_attention_heads=heads, hidden_size=96)  # fmt: skip
        encoded = pairs([9, length, 100])
        want = published(folder, encoded)
        assert np.abs(scorer(folder, max_length=8192)(encoded) - want).max() <= 1e-4
        assert np.abs(scorer(folder, "bfloat16", max_length=8192)(encoded) - want).max() <= 3e-2


GOOD = dict(
    vocab_size=400, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
    max_position_embeddings=514, pad_token_id=1, layer_norm_eps=1e-5, type_vocab_size=1,
    id2label={"0": "LABEL_0"}, hidden_act="gelu",
)  # fmt: skip


class TestConfig:
    def test_usable_length_is_two_less_than_the_table(self):
        assert XLMRobertaConfig.read(GOOD).max_length == 512

    @pytest.mark.parametrize(
        "change, message",
        [
            ({"hidden_act": "gelu_new"}, "hidden_act = 'gelu_new' .implemented: 'gelu'"),
            ({"position_embedding_type": "relative_key"}, "position_embedding_type = 'relative_key'"),
            ({"id2label": {"0": "a", "1": "b"}}, "num_labels = 2"),
            ({"type_vocab_size": 2}, "type_vocab_size = 2"),
            ({"is_decoder": True}, "is_decoder = True"),
            ({"quantization_config": {"bits": 4}}, "quantization_config"),
            ({"num_attention_heads": 5}, "48 is not a multiple of"),
        ],
    )
    def test_what_would_change_the_result_is_refused_by_name(self, change, message):
        with pytest.raises(UnsupportedError, match=message):
            XLMRobertaConfig.read({**GOOD, **change})
