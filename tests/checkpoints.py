"""Random checkpoints as publishers ship them, made with transformers' own classes, and small tokenizers for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
)

from benchmarks.checkpoints import make_qwen_tokenizer

TEXT = [
    "The giant panda (Ailuropoda melanoleuca), sometimes called a panda bear or simply panda, is endemic to China.",
    "Paris ist die Hauptstadt von Frankreich. 北京是中国的首都。 Москва - столица России. กรุงเทพมหานคร",
    "What is the capital of France? Where do pandas live? Gravity attracts two bodies towards each other.",
    "def rerank(query, documents): return sorted(documents, key=score)  # <s> and </s> are markup 0123456789",
]


def make_tokenizer(folder: Path, max_length: int = 512, vocab_size: int = 400) -> None:
    """A Unigram tokenizer with XLM-R's special tokens, normalisation and pair template, saved the way hubs carry it."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(" {2,}", " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    tokenizer.train_from_iterator(
        TEXT * 4,
        trainers.UnigramTrainer(
            vocab_size=vocab_size, special_tokens=[*special, "<mask>"], unk_token="<unk>", show_progress=False
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        cls_token="<s>",
        eos_token="</s>",
        sep_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
        model_max_length=max_length,
    ).save_pretrained(folder)


def make_bge(folder: Path, *, seed: int = 0, tokenizer: bool = True, gain: float = 1.2, **config: Any) -> Path:
    """A random XLM-R cross-encoder folder: config.json, model.safetensors, tokenizer.json.

    Matrices are drawn with a deviation of gain / sqrt(hidden_size), and norms and biases at random too, so that
    logits differ widely between pairs and every parameter matters.
    """
    settings: dict[str, Any] = dict(
        vocab_size=400,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=514,
        type_vocab_size=1,
        num_labels=1,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
        layer_norm_eps=1e-5,
    )
    settings.update(config)
    torch.manual_seed(seed)
    model = XLMRobertaForSequenceClassification(XLMRobertaConfig(**settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, gain / settings["hidden_size"] ** 0.5)
            elif name.endswith("weight"):
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 0.1)
    model.save_pretrained(folder)
    if tokenizer:
        make_tokenizer(folder, settings["max_position_embeddings"] - 2, min(400, settings["vocab_size"]))
    return folder


def make_qwen3(
    folder: Path, *, seed: int = 0, tokenizer: bool = True, gain: float = 1.0, classifier: bool = False, **config: Any
) -> Path:
    """A random Qwen3-Reranker folder; with `classifier`, the sequence classification that some convert it to.

    Matrices are drawn with a deviation of gain / sqrt(inputs) and norms at random, so that logits differ widely
    between pairs and every parameter matters.
    """
    settings: dict[str, Any] = dict(
        vocab_size=600,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=96,
        max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=True,
    )
    settings.update(config)
    torch.manual_seed(seed)
    if classifier:
        model: Any = Qwen3ForSequenceClassification(
            Qwen3Config(**{**settings, "num_labels": 1, "pad_token_id": 0})
        ).eval()
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed_tokens" in name or "lm_head" in name:
                parameter.normal_(0, settings["hidden_size"] ** -0.5)  # logits of about one unit
            elif parameter.ndim == 2:
                parameter.normal_(0, gain / parameter.shape[1] ** 0.5)
            else:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    if tokenizer:
        make_qwen_tokenizer(folder, settings["vocab_size"], TEXT)
    return folder


def make_qwen3_vl(
    folder: Path,
    *,
    seed: int = 0,
    tokenizer: bool = True,
    gain: float = 1.0,
    tied: bool = True,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
) -> Path:
    """A random Qwen3-VL-Reranker folder; text, vision: what differs in the two halves of config.json.

    Drawn as make_qwen3 draws, biases and the position table at random too. The token ids of media are those of the
    folder's tokenizer.
    """
    rotary = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    text = dict(
        vocab_size=600,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=128,
        max_position_embeddings=262_144,
        rope_parameters=rotary,
    ) | (text or {})
    vision = dict(
        depth=4,
        hidden_size=64,
        num_heads=4,
        intermediate_size=128,
        out_hidden_size=text["hidden_size"],
        num_position_embeddings=36,
        deepstack_visual_indexes=[0, 2],
    ) | (vision or {})
    ids: dict[str, Any] = {}
    if tokenizer:
        make_qwen_tokenizer(folder, text["vocab_size"], TEXT)
        known = Tokenizer.from_file(str(folder / "tokenizer.json"))
        ids = {f"{name}_token_id": known.token_to_id(f"<|{name}_pad|>") for name in ("image", "video")}
    torch.manual_seed(seed)
    config = Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied, **ids)
    model = Qwen3VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed_tokens" in name or "lm_head" in name:
                parameter.normal_(0, text["hidden_size"] ** -0.5)
            elif "pos_embed" in name:
                parameter.normal_()
            elif parameter.ndim > 1:
                parameter.normal_(0, gain / parameter[0].numel() ** 0.5)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1)
            else:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    """Change fields of a folder's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
