"""The tensors of transformers' XLMRobertaForSequenceClassification: bge-reranker-base, -large, -v2-m3."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from jaxrank.convert.rules import FLAT, LINEAR, ROW, SAME, Rule, layer_places, members
from jaxrank.models.xlm_roberta import XLMRobertaConfig

LAYER = (
    Rule("attention.output.dense.weight", "attention/out/kernel", LINEAR),
    Rule("attention.output.dense.bias", "attention/out/bias"),
    Rule("attention.output.LayerNorm.weight", "attention_norm/scale"),
    Rule("attention.output.LayerNorm.bias", "attention_norm/bias"),
    Rule("intermediate.dense.weight", "up/kernel", LINEAR),
    Rule("intermediate.dense.bias", "up/bias"),
    Rule("output.dense.weight", "down/kernel", LINEAR),
    Rule("output.dense.bias", "down/bias"),
    Rule("output.LayerNorm.weight", "norm/scale"),
    Rule("output.LayerNorm.bias", "norm/bias"),
)

ENDS = (
    Rule("roberta.embeddings.word_embeddings.weight", "word"),
    Rule("roberta.embeddings.position_embeddings.weight", "position"),
    Rule("roberta.embeddings.token_type_embeddings.weight", "token_type", ROW),
    Rule("roberta.embeddings.LayerNorm.weight", "embedding_norm/scale"),
    Rule("roberta.embeddings.LayerNorm.bias", "embedding_norm/bias"),
    Rule("classifier.dense.weight", "dense/kernel", LINEAR),
    Rule("classifier.dense.bias", "dense/bias"),
    Rule("classifier.out_proj.weight", "head/kernel", LINEAR),
    Rule("classifier.out_proj.bias", "head/bias", FLAT),
)

# These are a buffer that counts 0, 1, 2 ..., and a pooler that the classification head does not use.
IGNORED = frozenset(["roberta.embeddings.position_ids", "roberta.pooler.dense.weight", "roberta.pooler.dense.bias"])


def rules(config: XLMRobertaConfig, folder: Path, tensors: Collection[str]) -> list[Rule]:
    """Return the whole table for a model of that many layers. The last layer has a place of its own in the model."""
    places = enumerate(layer_places(config.layers))
    layer = [*LAYER, *qkv(config.width // config.heads)]
    layers = (rule.under(f"roberta.encoder.layer.{i}.", place) for i, place in places for rule in layer)
    return [*ENDS, *layers]


def qkv(size: int) -> list[Rule]:
    """Return the rules for queries, keys and values of a layer with heads of that size.

    The model has them in one parameter.
    """
    found = []
    for i, name in enumerate(("query", "key", "value")):
        for tensor, parameter, transform in (("weight", "kernel", LINEAR), ("bias", "bias", SAME)):
            own = members(transform, 3, i, i + 1, size)
            found.append(Rule(f"attention.self.{name}.{tensor}", f"attention/qkv/{parameter}", own))
    return found
