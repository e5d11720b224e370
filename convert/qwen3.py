"""The tensors of transformers' Qwen3ForCausalLM and Qwen3ForSequenceClassification: Qwen3-Reranker, all sizes."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from tokenizers import Tokenizer

from jaxrank.convert.rules import LINEAR, ROW, Rule, layer_places, members, row_difference
from jaxrank.errors import CheckpointError
from jaxrank.models.qwen3 import Qwen3Config
from jaxrank.text.tokenizer import load_tokenizer

LAYER = (
    Rule("input_layernorm.weight", "attention/norm/scale"),
    Rule("self_attn.q_norm.weight", "attention/query_norm/scale"),
    Rule("self_attn.k_norm.weight", "attention/key_norm/scale"),
    Rule("post_attention_layernorm.weight", "feed_forward/norm/scale"),
    Rule("mlp.down_proj.weight", "feed_forward/down", LINEAR),
)

# Some checkpoints save it, although it is the same as the embedding.
IGNORED = frozenset(["lm_head.weight"])


def rules(config: Qwen3Config, folder: Path, tensors: Collection[str]) -> list[Rule]:
    """Return the whole table of a causal model. Its head is W[yes] - W[no] of its own tokenizer's tokens.

    Raises:
        CheckpointError: as in `answer_id`.
    """
    return [*body(config, layer_places(config.layers)), head(config, folder)]


def classifier_rules(config: Qwen3Config, folder: Path, tensors: Collection[str]) -> list[Rule]:
    """Return the whole table of a sequence classifier. It has a head of its own."""
    return [*body(config, layer_places(config.layers)), Rule("score.weight", "head", ROW)]


def body(config: Qwen3Config, places: list[str], model: str = "model.") -> list[Rule]:
    """Return all but the head, for layers at those places. `model` is the beginning of the tensors' names."""
    layer = [*LAYER, *joined(config)]
    layers = (rule.under(f"{model}layers.{i}.", place) for i, place in enumerate(places) for rule in layer)
    return [Rule(f"{model}embed_tokens.weight", "word"), Rule(f"{model}norm.weight", "norm/scale"), *layers]


def joined(config: Qwen3Config) -> list[Rule]:
    """Return the rules for parameters that join several tensors of the checkpoint, or have another order."""
    grouped, size = config.heads // config.kv_heads, config.head_size
    qkv = {"q": (0, grouped), "k": (grouped, grouped + 1), "v": (grouped + 1, grouped + 2)}
    return [
        *(
            Rule(f"self_attn.{name}_proj.weight", "attention/qkv", members(LINEAR, grouped + 2, *own, size))
            for name, own in qkv.items()
        ),
        Rule("self_attn.o_proj.weight", "attention/out", members(LINEAR, grouped, 0, grouped, size, axis=-2)),
        Rule("mlp.gate_proj.weight", "feed_forward/gate", LINEAR),
        Rule("mlp.up_proj.weight", "feed_forward/up", LINEAR),
    ]


def head(config: Qwen3Config, folder: Path, model: str = "model.") -> Rule:
    """Return the rule for a head that is W[yes] - W[no]. A tied head comes from the embedding."""
    tokenizer, _ = load_tokenizer(folder)
    yes, no = (answer_id(tokenizer, folder, answer, config.vocab_size) for answer in ("yes", "no"))
    table = f"{model}embed_tokens.weight" if config.tied else "lm_head.weight"
    return Rule(table, "head", row_difference(config.vocab_size, yes, no))


def answer_id(tokenizer: Tokenizer, folder: Path, answer: str, vocab_size: int) -> int:
    """Return the id of an answer. It must be one token, because the model's scores would mean nothing otherwise.

    Raises:
        CheckpointError: it is not one token.
    """
    ids = tokenizer.encode(answer, add_special_tokens=False).ids
    if len(ids) != 1 or ids[0] >= vocab_size:
        raise CheckpointError(
            f"{folder}: its tokenizer writes {answer!r} as the tokens {ids}; a yes/no reranker needs one token of its "
            f"{vocab_size}. Use the tokenizer that was published with the model"
        )
    return ids[0]
