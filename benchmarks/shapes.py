"""The true shapes of the models, as (module, settings), from their publishers' config.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from jaxrank.models.qwen3 import Qwen3, Qwen3Config
from jaxrank.models.qwen3_vl import Qwen3VL, Qwen3VLConfig
from jaxrank.models.vision import VisionConfig
from jaxrank.models.xlm_roberta import XLMRoberta, XLMRobertaConfig


def qwen3(
    width: int, layers: int, heads: int, ffn: int, *, tied: bool, kv_heads: int = 8, head_size: int = 128
) -> tuple[type, Any]:
    return Qwen3, Qwen3Config(
        vocab_size=151669, width=width, layers=layers, heads=heads, kv_heads=kv_heads, head_size=head_size, ffn=ffn,
        max_length=40960, theta=1e6, eps=1e-6, tied=tied,
    )  # fmt: skip


def bge(width: int, layers: int, heads: int, ffn: int) -> tuple[type, Any]:
    return XLMRoberta, XLMRobertaConfig(
        vocab_size=250002, width=width, layers=layers, heads=heads, ffn=ffn, position_rows=8194, pad_id=1, eps=1e-5
    )


def qwen3_vl(
    width: int, layers: int, heads: int, ffn: int, *, tied: bool, vision: tuple[int, int, int, tuple[int, ...]]
) -> tuple[type, Any]:
    """vision: the tower's width, layers, ffn and deepstack."""
    text = Qwen3Config(
        vocab_size=151936, width=width, layers=layers, heads=heads, kv_heads=8, head_size=128, ffn=ffn,
        max_length=262144, theta=5e6, eps=1e-6, tied=tied,
    )  # fmt: skip
    tower = VisionConfig(
        width=vision[0], layers=vision[1], heads=16, ffn=vision[2], out_width=width, side=48, merge=2, patch=16,
        steps=2, channels=3, theta=1e4, deepstack=vision[3],
    )  # fmt: skip
    return Qwen3VL, Qwen3VLConfig(text=text, vision=tower, sections=(24, 20, 20))


MODELS: dict[str, tuple[type, Any]] = {
    "bge-reranker-v2-m3": bge(1024, 24, 16, 4096),
    "qwen3-reranker-0.6b": qwen3(1024, 28, 16, 3072, tied=True),
    "qwen3-reranker-4b": qwen3(2560, 36, 32, 9728, tied=True),
    "qwen3-reranker-8b": qwen3(4096, 36, 32, 12288, tied=False),
}
"""True shapes, from the publishers' config.json."""

VL_MODELS: dict[str, tuple[type, Any]] = {
    "qwen3-vl-reranker-2b": qwen3_vl(2048, 28, 16, 6144, tied=True, vision=(1024, 24, 4096, (5, 11, 17))),
    "qwen3-vl-reranker-8b": qwen3_vl(4096, 36, 32, 12288, tied=False, vision=(1152, 27, 4304, (8, 16, 24))),
}
"""The same of models that see."""


TOY = {
    name: (module, replace(config, vocab_size=1000))
    for name, (module, config) in {
        "bge-reranker-v2-m3": bge(64, 2, 4, 128),
        "qwen3-reranker-0.6b": qwen3(64, 2, 4, 128, tied=True, kv_heads=2, head_size=16),
        "qwen3-reranker-8b": qwen3(64, 2, 4, 128, tied=False, kv_heads=2, head_size=16),
    }.items()
}
"""The same families, small enough for a test."""


def model_flops(config: Any, lengths: Sequence[int], causal: bool) -> float:
    """Of matrices and needed scores, all layers; the head and the last layer's savings are not counted."""
    products = layer_flops(config, causal)
    config = getattr(config, "text", config)
    size = getattr(config, "head_size", config.width // config.heads)
    scores = sum(n * n for n in lengths) * (0.5 if causal else 1.0)
    return config.layers * (products * sum(lengths) + 4.0 * config.heads * size * scores)


def layer_flops(config: Any, causal: bool) -> float:
    """Of a layer's matrices, a token."""
    config = getattr(config, "text", config)
    size = getattr(config, "head_size", config.width // config.heads)
    kv_heads = getattr(config, "kv_heads", config.heads)
    return 2.0 * config.width * (size * 2 * (config.heads + kv_heads) + config.ffn * (3 if causal else 2))


def scoring_flops(config: Any, requests: Sequence[tuple[int, Sequence[int]]], causal: bool) -> float:
    """Of what scoring must compute: matrices on tokens and needed scores, the last layer's keys and values on all
    tokens, its other matrices and scores on scored rows alone. The head is not counted.

    requests: (prefix, own lengths of the documents); the prefix is computed once, every document sees it.
    """
    size = getattr(config, "head_size", config.width // config.heads)
    kv_heads = getattr(config, "kv_heads", config.heads)
    keys_values = 2 * config.width * size * kv_heads
    others = 2 * config.width * size * config.heads + config.width * config.ffn * (3 if causal else 2)
    share = 0.5 if causal else 1.0
    tokens = sum(prefix + sum(own) for prefix, own in requests)
    pairs = sum(len(own) for _, own in requests)
    scores = sum(share * prefix**2 + sum(n * prefix + share * n * n for n in own) for prefix, own in requests)
    scored = sum(prefix + n for prefix, own in requests for n in own)
    matrices = (config.layers - 1) * (keys_values + others) * tokens + keys_values * tokens + others * pairs
    return 2.0 * matrices + 4.0 * config.heads * size * ((config.layers - 1) * scores + scored)


def tower_flops(config: Any, lengths: Sequence[int]) -> float:
    """The same of a vision tower, for images or video steps of so many patches."""
    block = config.merge**2 * config.width
    layer = 4 * config.width**2 + 2 * config.width * config.ffn
    merger = (block**2 + block * config.out_width) / config.merge**2
    matrices = config.layers * layer + config.features * merger + config.values * config.width
    return 2.0 * matrices * sum(lengths) + 4.0 * config.layers * config.width * sum(n * n for n in lengths)
