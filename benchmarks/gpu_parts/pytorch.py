"""transformers' classes on the same pairs, in bfloat16 with random weights, in every way that PyTorch has here.

padded   batches of pairs sorted by length, as many tokens in each as our rows have, with a padding mask (SDPA)
no mask  the same on pairs of one length, which need none: SDPA may take its fastest kernel
varlen   pairs side by side in one row, torch.nn.attention.varlen
nested   the same, SDPA on nested tensors
Each end to end, from token ids on the host to logits on the host, and with inputs made before. Neither way of PyTorch
computes a shared prefix once: its prompts are whole.
"""

from __future__ import annotations

import gc
import inspect
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import (
    AttentionInterface,
    Qwen3Config,
    Qwen3ForCausalLM,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
)

from benchmarks.gpu_parts.part import Part
from benchmarks.gpu_parts.workloads import FULL, TOY, Load, loads, tokens_of
from benchmarks.shapes import MODELS
from benchmarks.shapes import TOY as TOY_MODELS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INSIDE = {
    "device only": "the model alone: ids, masks and offsets made and on the device before",
    "end to end": "from token ids on the host to logits on the host: sort, batch, pad or join, transfer, model, fetch",
}
Batch = dict[str, Any]
"""What the model is called with."""


@dataclass
class Documents:
    """Where documents begin and end in the row that the packed ways attend in."""

    offsets: Any = None
    longest: int = 0
    causal: bool = False
    places: list[int] = field(default_factory=list)


def register(now: Documents) -> None:
    """The packed ways of attention, as transformers calls them; they look up `now`."""

    def repeated(x: torch.Tensor, heads: int) -> torch.Tensor:
        return x if x.shape[-2] == heads else x.repeat_interleave(heads // x.shape[-2], dim=-2)

    def rows(*arrays: torch.Tensor) -> list[torch.Tensor]:
        return [x[0].transpose(0, 1) for x in arrays]

    def varlen(_: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float | None = None, **__: Any) -> Any:
        from torch.nn.attention.varlen import varlen_attn

        known = inspect.signature(varlen_attn).parameters
        attend: Any = varlen_attn
        q, k, v = rows(q, k, v)
        options: dict[str, Any] = {"window_size": (-1, 0 if now.causal else -1)}
        if "is_causal" in known:  # of older PyTorch
            options = {"is_causal": now.causal}
        if "enable_gqa" in known:
            options["enable_gqa"] = k.shape[1] != q.shape[1]
        else:
            k, v = repeated(k, q.shape[1]), repeated(v, q.shape[1])
        return attend(q, k, v, now.offsets, now.offsets, now.longest, now.longest, **options)[None], None

    def nested(_: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float | None = None, **__: Any) -> Any:
        q, k, v = rows(q, k, v)
        k, v = repeated(k, q.shape[1]), repeated(v, q.shape[1])
        q, k, v = (
            torch.nested.nested_tensor_from_jagged(x, now.offsets, min_seqlen=1, max_seqlen=now.longest).transpose(1, 2)
            for x in (q, k, v)
        )
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=now.causal, scale=scaling)
        return out.transpose(1, 2).values()[None], None

    AttentionInterface.register("varlen", varlen)
    AttentionInterface.register("nested", nested)


def build(config: Any, causal: bool) -> Any:
    """On the device, in bfloat16 from the start."""
    common = dict(
        vocab_size=config.vocab_size, hidden_size=config.width, num_hidden_layers=config.layers,
        num_attention_heads=config.heads, intermediate_size=config.ffn, attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(DEVICE):
            if causal:
                more = {"num_key_value_heads": config.kv_heads, "head_dim": config.head_size}
                more |= {"tie_word_embeddings": config.tied, "max_position_embeddings": config.max_length}
                return Qwen3ForCausalLM(Qwen3Config(**common, **more)).eval()
            more = {"max_position_embeddings": config.position_rows, "type_vocab_size": 1, "num_labels": 1}
            return XLMRobertaForSequenceClassification(XLMRobertaConfig(**common, **more)).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def padded_batches(pairs: list[np.ndarray], most: int, causal: bool, mask: bool) -> list[tuple[list[int], Batch]]:
    """(which pairs, what the model is called with), the longest first; decoders are padded on the left, as the
    publisher's script does."""
    order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i]))
    groups: list[list[int]] = [[]]
    for i in order:
        if groups[-1] and len(pairs[groups[-1][0]]) * (len(groups[-1]) + 1) > most:
            groups.append([])
        groups[-1].append(i)
    batches = []
    for group in groups:
        ids = np.ones((len(group), len(pairs[group[0]])), np.int64)
        seen = np.zeros_like(ids)
        for row, i in enumerate(group):
            at = slice(ids.shape[1] - len(pairs[i]), None) if causal else slice(len(pairs[i]))
            ids[row, at], seen[row, at] = pairs[i], 1
        batch: Batch = {"input_ids": ids, **({"attention_mask": seen} if mask else {})}
        batches.append((group, {**batch, **({"use_cache": False, "logits_to_keep": 1} if causal else {})}))
    return batches


def packed_batches(pairs: list[np.ndarray], most: int, causal: bool) -> list[tuple[list[int], Batch]]:
    """The same for the packed ways: as many whole pairs in a row as `most` tokens hold, in the order that they come."""
    groups: list[list[int]] = [[]]
    for i, pair in enumerate(pairs):
        if groups[-1] and sum(len(pairs[j]) for j in groups[-1]) + len(pair) > most:
            groups.append([])
        groups[-1].append(i)
    batches = []
    for group in groups:
        lengths = [len(pairs[i]) for i in group]
        ends = np.cumsum(lengths)
        batch: Batch = {
            "input_ids": np.concatenate([pairs[i] for i in group]).astype(np.int64)[None],
            # XLM-RoBERTa's positions count from 2
            "position_ids": np.concatenate([np.arange(n) + (0 if causal else 2) for n in lengths])[None],
            "offsets": np.concatenate([[0], ends]).astype(np.int32),
            "places": ends - 1 if causal else ends - lengths,
            "longest": max(lengths),
        }
        batches.append((group, batch))
    return batches


def to_device(batch: Batch) -> Batch:
    return {key: torch.from_numpy(x).to(DEVICE) if isinstance(x, np.ndarray) else x for key, x in batch.items()}


class Scorer:
    """A model in one of the ways."""

    def __init__(self, model: Any, way: str, now: Documents, causal: bool, compiled: bool = False):
        model.set_attn_implementation("sdpa" if way in ("padded", "no mask") else way)
        self.model: Any = torch.compile(model, dynamic=True, backend=compiled_by()) if compiled else model
        self.way, self.now, self.causal = way, now, causal

    def batches(self, pairs: list[np.ndarray], most: int) -> list[tuple[list[int], Batch]]:
        if self.way in ("varlen", "nested"):
            return packed_batches(pairs, most, self.causal)
        return padded_batches(pairs, most, self.causal, mask=self.way == "padded")

    def logits(self, batch: Batch) -> torch.Tensor:
        """Of a batch on the device: one value a pair, of a decoder the last token's for two words' difference."""
        if "places" not in batch:
            out = self.model(**batch).logits
            return out[:, -1, 1] - out[:, -1, 0] if self.causal else out[:, 0]
        self.now.offsets, self.now.longest, self.now.causal = batch["offsets"], batch["longest"], self.causal
        inputs = {key: batch[key] for key in ("input_ids", "position_ids")}
        if self.causal:
            out = self.model(**inputs, use_cache=False, logits_to_keep=batch["places"]).logits[0]
            return out[:, 1] - out[:, 0]
        states = self.model.roberta(**inputs).last_hidden_state
        return self.model.classifier(states[0, batch["places"]][:, None])[:, 0]

    def score(self, pairs: list[np.ndarray], most: int) -> np.ndarray:
        """End to end."""
        results = [(group, self.logits(to_device(batch))) for group, batch in self.batches(pairs, most)]
        found = np.empty(len(pairs), np.float32)
        for group, logits in results:
            found[group] = logits.float().cpu().numpy()
        return found


def compiled_by() -> str:
    """Inductor; on a CPU, where it is only seen whether all runs, Dynamo alone."""
    return "inductor" if DEVICE == "cuda" else "eager"


@torch.inference_mode()
def median_seconds(work: Callable[[], Any], turns: int) -> float:
    """After one warm-up."""

    def once() -> float:
        start = time.perf_counter()
        work()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    once()
    return statistics.median(once() for _ in range(turns))


def measure(part: Part, scorer: Scorer, labels: dict[str, Any], load: Load, config: Any, turns: int) -> None:
    """A row end to end and one of the device alone."""
    most = (TOY if part.smoke else FULL).row_tokens
    pairs = [np.concatenate(pair) for pair in tokens_of(load, config.vocab_size)]
    works = {
        "end to end": lambda: scorer.score(pairs, most),
        "device only": lambda: [scorer.logits(batch) for batch in ready],
    }
    for what, work in works.items():
        with part.row(what=what, way=scorer.way, hangs_after=240.0, **labels) as row:
            ready = [to_device(batch) for _, batch in scorer.batches(pairs, most)]
            seconds = median_seconds(work, turns)
            tokens = sum(map(len, pairs))
            row.update(seconds=round(seconds, 6), pairs=len(pairs), tokens=tokens, batches=len(ready))
            row.update(pairs_per_s=round(len(pairs) / seconds, 1), tokens_per_s=round(tokens / seconds))
            row["inside"] = INSIDE[what]


@torch.inference_mode()
def check_packed(part: Part, model: Any, way: str, now: Documents, config: Any, causal: bool) -> None:
    """The packed way's logits against the padded ones, on a few pairs."""
    rng = np.random.default_rng(1)
    pairs = [rng.integers(3, config.vocab_size, n).astype(np.int32) for n in (40, 3, 61, 17, 64, 9)]
    with part.row(what="beside padded", way=way, model=labels_of(config, part.smoke)) as row:
        want, got = (Scorer(model, one, now, causal).score(pairs, 256) for one in ("padded", way))
        row["difference_over_range"] = float(np.abs(got - want).max() / np.ptp(want))


def labels_of(config: Any, smoke: bool) -> str:
    """The model's name by its config."""
    every = TOY_MODELS if smoke else MODELS
    return next(name for name, (_, one) in every.items() if one is config)


def run_model(part: Part, name: str, compiled: bool, now: Documents) -> None:
    module, config = (TOY_MODELS if part.smoke else MODELS)[name]
    large = name == "qwen3-reranker-8b"
    turns = 1 if part.smoke else 3
    with part.row(what="model", model=name) as row:
        start = time.perf_counter()
        model = build(config, module.causal)
        row["weights_s"] = round(time.perf_counter() - start, 1)
    if "error" in part.rows[-1]:
        return
    every = loads(module.causal, part.smoke, rows=2 if large else None)
    ways = ["padded"] if compiled else ["padded", "no mask", "varlen", "nested"]
    if part.smoke and large:
        ways = ways[:1]
    for way in ways:
        if way in ("varlen", "nested"):
            check_packed(part, model, way, now, config, module.causal)
            if "error" in part.rows[-1]:
                continue
        scorer = Scorer(model, way, now, module.causal, compiled)
        for lengths, load in every.items():
            if (way == "no mask" and lengths != "uniform") or (compiled and lengths == "stars"):
                continue
            if part.smoke and (lengths, way) not in (("uniform", "no mask"), ("mixed", way), ("stars", "padded")):
                continue
            measure(part, scorer, {"model": name, "lengths": lengths}, load, config, turns)


def run(part: Part, compiled: bool) -> None:
    if part.smoke:
        torch.set_num_threads(1)  # threads that wait for each other are most of the time of so little work
    with part.row(what="versions") as row:
        row.update(torch=torch.__version__, cuda=torch.version.cuda, device=DEVICE)
        row["cudnn"] = torch.backends.cudnn.version()
    now = Documents()
    register(now)
    names = ["bge-reranker-v2-m3", "qwen3-reranker-0.6b", "qwen3-reranker-8b"]
    for name in names[: 1 if part.smoke else 2] if compiled else names:
        run_model(part, name, compiled, now)
        gc.collect()
        torch.cuda.empty_cache()
