"""The tensors of transformers' Qwen3VLForConditionalGeneration: Qwen3-VL-Reranker, all sizes."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from jaxrank.convert.qwen3 import body, head
from jaxrank.convert.rules import LINEAR, SAME, Rule, Transform, in_order, layer_places
from jaxrank.models.qwen3_vl import Qwen3VLConfig
from jaxrank.models.vision import VisionConfig

VISION_LAYER = (
    Rule("norm1.weight", "attention/norm/scale"),
    Rule("norm1.bias", "attention/norm/bias"),
    Rule("attn.qkv.weight", "attention/qkv/kernel", in_order(LINEAR, 3)),
    Rule("attn.qkv.bias", "attention/qkv/bias", in_order(SAME, 3)),
    Rule("attn.proj.weight", "attention/out/kernel", LINEAR),
    Rule("attn.proj.bias", "attention/out/bias"),
    Rule("norm2.weight", "norm/scale"),
    Rule("norm2.bias", "norm/bias"),
    Rule("mlp.linear_fc1.weight", "up/kernel", LINEAR),
    Rule("mlp.linear_fc1.bias", "up/bias"),
    Rule("mlp.linear_fc2.weight", "down/kernel", LINEAR),
    Rule("mlp.linear_fc2.bias", "down/bias"),
)

MERGER = (
    Rule("norm.weight", "norm/scale"),
    Rule("norm.bias", "norm/bias"),
    Rule("linear_fc1.weight", "up/kernel", LINEAR),
    Rule("linear_fc1.bias", "up/bias"),
    Rule("linear_fc2.weight", "down/kernel", LINEAR),
    Rule("linear_fc2.bias", "down/bias"),
)


def rules(config: Qwen3VLConfig, folder: Path, tensors: Collection[str]) -> list[Rule]:
    """Return the whole table. Newer checkpoints put both halves under "model.", and older ones only the text model."""
    is_new = any(name.startswith("model.language_model.") for name in tensors)
    model, visual = ("model.language_model.", "model.visual.") if is_new else ("model.", "visual.")
    adding = config.vision.features - 1
    places = [*(f"adding/{i}/" for i in range(adding)), *layer_places(config.text.layers - adding)]
    tower = (rule.under(visual, "vision/") for rule in vision_rules(config.vision))
    return [*body(config.text, places, model), head(config.text, folder, model), *tower]


def vision_rules(config: VisionConfig) -> list[Rule]:
    """Return the tower's part. A patch embedding that is published as a convolution over whole patches is a matrix."""
    patch = (config.channels, config.steps, config.patch, config.patch)
    ends = [
        Rule("patch_embed.proj.weight", "patch", Transform(lambda shape: (shape[0], *patch))),
        Rule("patch_embed.proj.bias", "patch_bias"),
        Rule("pos_embed.weight", "position"),
    ]
    places = [f"stages/{s}/{i}/" for s, (start, end) in enumerate(config.stages) for i in range(end - start)]
    layers = [rule.under(f"blocks.{i}.", place) for i, place in enumerate(places) for rule in VISION_LAYER]
    mergers = [("merger.", "merger/")]
    mergers += [(f"deepstack_merger_list.{i}.", f"mergers/{i}/") for i in range(len(config.deepstack))]
    return [*ends, *layers, *(rule.under(*names) for names in mergers for rule in MERGER)]
