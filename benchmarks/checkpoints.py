"""Random checkpoints at true shapes, made with transformers' own classes, and tokenizers for them."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
)

from jaxrank.reranker import BUILTIN

BGE_SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128},
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
}
BGE_SHAPES["v2-m3"] = {**BGE_SHAPES["large"], "max_position_embeddings": 8194}

QWEN3_SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-tiny": dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                       head_dim=16, intermediate_size=128),
    "qwen3-0.6b": dict(hidden_size=1024, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8,
                       head_dim=128, intermediate_size=3072),
    "qwen3-4b": dict(hidden_size=2560, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8,
                     head_dim=128, intermediate_size=9728),
}  # fmt: skip

QWEN3_VL_SHAPES: dict[str, dict[str, dict[str, Any]]] = {
    "qwen3-vl-tiny": {
        "text": dict(hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
                     intermediate_size=128),
        "vision": dict(hidden_size=64, depth=4, num_heads=4, intermediate_size=128, deepstack_visual_indexes=[0, 1, 2]),
    },
    "qwen3-vl-2b": {
        "text": dict(hidden_size=2048, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8,
                     head_dim=128, intermediate_size=6144),
        "vision": dict(hidden_size=1024, depth=24, num_heads=16, intermediate_size=4096,
                       deepstack_visual_indexes=[5, 11, 17]),
    },
}  # fmt: skip
"""The text model's and the vision tower's."""
QWEN3_VL_SHAPES["qwen3-vl-2b-quarter"] = {
    "text": QWEN3_VL_SHAPES["qwen3-vl-2b"]["text"] | {"num_hidden_layers": 7},
    "vision": QWEN3_VL_SHAPES["qwen3-vl-2b"]["vision"] | {"depth": 6, "deepstack_visual_indexes": [1, 2, 4]},
}
"""The 2B shape with a quarter of its layers."""


def bge_checkpoint(folder: Path, shape: str) -> None:
    """A random checkpoint of a bge-reranker's shape, with the built-in model's tokenizer."""
    torch.manual_seed(0)
    config = XLMRobertaConfig(
        vocab_size=250002 if shape != "tiny" else 20000,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        id2label={0: "LABEL_0"},  # one label
        **{"max_position_embeddings": 514, **BGE_SHAPES[shape]},
    )
    XLMRobertaForSequenceClassification(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUILTIN / name, folder / name)


def qwen3_config(shape: str, **changes: Any) -> Qwen3Config:
    """Of a Qwen3-Reranker of that shape."""
    return Qwen3Config(
        vocab_size=151669,
        max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=True,
        **{**QWEN3_SHAPES[shape], **changes},
    )


def qwen3_checkpoint(folder: Path, shape: str, texts: Iterable[str]) -> None:
    """A random checkpoint of a Qwen3-Reranker's shape, with a tokenizer of its kind trained on these texts."""
    torch.manual_seed(0)
    Qwen3ForCausalLM(qwen3_config(shape)).bfloat16().save_pretrained(folder)  # the publisher's dtype
    make_qwen_tokenizer(folder, 40_000, texts)


def grow_qwen_tokenizer(folder: Path, size: int) -> None:
    """Give a folder's tokenizer random merges until it has so many tokens, for what depends on a vocabulary's size."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    vocab, merges, added = content["model"]["vocab"], content["model"]["merges"], content["added_tokens"]
    first, known, draw = len(vocab), list(vocab), random.Random(0)
    while len(vocab) + len(added) < size:
        a, b = draw.choices(known, k=2)
        if a + b not in vocab:
            vocab[a + b] = len(vocab)
            known += [a + b] if len(a + b) < 12 else []
            merges.append([a, b])
    for token in added:
        token["id"] += len(vocab) - first
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def qwen3_vl_checkpoint(folder: Path, shape: str, texts: Iterable[str]) -> None:
    """The same of a Qwen3-VL-Reranker's shape; in float32, since it is compared in both dtypes."""
    torch.manual_seed(0)
    make_qwen_tokenizer(folder, 20_000, texts)
    known = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids: dict[str, Any] = {f"{name}_token_id": known.token_to_id(f"<|{name}_pad|>") for name in ("image", "video")}
    sizes = QWEN3_VL_SHAPES[shape]
    heads = sizes["text"]["head_dim"] // 2
    config = Qwen3VLConfig(
        text_config=dict(
            vocab_size=151936,
            max_position_embeddings=262144,
            rope_parameters={
                "rope_type": "default", "rope_theta": 5_000_000.0, "mrope_interleaved": True,
                "mrope_section": [heads - 2 * (heads * 5 // 16), heads * 5 // 16, heads * 5 // 16],
            },
            **sizes["text"],
        ),
        vision_config=dict(
            out_hidden_size=sizes["text"]["hidden_size"], patch_size=16, spatial_merge_size=2, temporal_patch_size=2,
            num_position_embeddings=2304, **sizes["vision"],
        ),
        tie_word_embeddings=True,
        **ids,
    )  # fmt: skip
    Qwen3VLForConditionalGeneration(config).save_pretrained(folder)


QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def make_qwen_tokenizer(folder: Path, vocab_size: int, texts: Iterable[str]) -> None:
    """A byte-level BPE tokenizer as Qwen3's: NFC, its words, markup beside the vocabulary, some of it not "special"."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
    special += ["<|image_pad|>", "<|video_pad|>"]
    other = ["<think>", "</think>", "<tool_call>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(special) - len(other),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts, *["yes", "no", "user", "system", "assistant"] * 10_000], trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in other])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="left"
    ).save_pretrained(folder)
