"""Whole-model scoring on one NVIDIA GPU beside PyTorch on the same card, in one run of under 8 minutes.

    python benchmarks/gpu.py --output OUT.json [--models bge-reranker-v2-m3 qwen3-reranker-8b] [--smoke]

Runs from a bare checkout with jax, flax, jaxtyping, torch and transformers, without network: weights and token ids are
random. Before anything is timed, the attention kernel is compared with the dense form, and a small model on the kernel
with the same on the dense form. Then for each model, in bfloat16: pairs of 512 tokens, and pairs of mixed lengths
(lognormal, mean 250, at most 512, as XQuAD's). Both sides get the same lengths. PyTorch runs transformers' class with
SDPA, sorted by length in batches that hold as many tokens as our rows, and once more compiled (torch.compile, dynamic).
Utilisation: FLOPs of the model's matrices and needed attention scores on real tokens, over seconds, over the matmul
rate that the card shows in this run. The JSON is written after every row. --smoke: toy sizes, on any device.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # a bare checkout: jaxrank is not installed
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch wants memory too

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from machine import finish, matmul_rate, median_seconds, save
from shapes import MODELS, TOY, model_flops

from jaxrank.kernels import attention, make_layout
from jaxrank.packing import LADDER, bucket_of, pack, plan, row_size
from jaxrank.scoring import compile_whole
from jaxrank.types import Encoded

ATTENTION = "triton" if jax.default_backend() == "gpu" else None


def pairs_of(lengths: Sequence[int], vocab: int, seed: int = 0) -> list[Encoded]:
    rng = np.random.default_rng(seed)
    return [Encoded(rng.integers(3, vocab, n).astype(np.int32), n - 1) for n in lengths]


def check_attention() -> dict[str, Any]:
    """Largest difference between the attention that is timed and the dense form, in bfloat16."""
    worst = 0.0
    for heads, kv_heads, size in ((16, 16, 64), (16, 8, 128), (4, 2, 72)):
        for causal in (False, True):
            pairs = pairs_of([3, 200, 77, 1, 300, 129], 9)
            spans = np.asarray(pack(pairs, 768, causal=causal).layout.spans)
            keys = jax.random.split(jax.random.key(size), 3)
            shapes = [(768, heads, size), (768, kv_heads, size), (768, kv_heads, size)]
            q, k, v = (jax.random.normal(key, s, jnp.bfloat16) for key, s in zip(keys, shapes, strict=True))
            results = [
                attention(q, k, v, make_layout(spans, 768, name), scale=size**-0.5, implementation=name)
                for name in (ATTENTION, "dense")
            ]
            worst = max(worst, float(jnp.abs(results[0].astype(jnp.float32) - results[1].astype(jnp.float32)).max()))
    assert worst < 0.03, f"attention differs from the dense form by {worst}"
    return {"part": "check attention", "largest_difference": worst}


def check_model(name: str) -> dict[str, Any]:
    """A toy model on the attention that is timed against the same on the dense form, float32."""
    module, config = TOY[name]
    row = pairs_of([3, 60, 40, 20], 1000)
    logits = []
    for implementation in (ATTENTION, "dense"):
        model = module(config, dtype="float32", rngs=nnx.Rngs(0), implementation=implementation)
        program = compile_whole(model)
        packed = pack(row, 128, causal=module.causal, implementation=implementation)  # pyright: ignore[reportAttributeAccessIssue]
        logits.append(np.asarray(program(packed)(packed))[: len(row)])
    worst = float(np.abs(logits[0] - logits[1]).max())
    # float32 products run in TF32 on GPUs unless told otherwise
    assert worst < 2e-2 * (1 + float(np.ptp(logits[1]))), f"{name} differs from its dense form by {worst}"
    return {"part": "check model", "model": name, "largest_difference": worst, "range": float(np.ptp(logits[1]))}


def ours(
    name: str, models: dict[str, Any], sets: dict[str, list[int]], row_tokens: int, turns: int
) -> dict[str, float]:
    """Median seconds for each set of lengths."""
    module, config = models[name]
    model = module(config, dtype="bfloat16", rngs=nnx.Rngs(0), implementation=ATTENTION)
    compile = compile_whole(model)
    ladder = [int(t) for t in LADDER if t <= row_tokens]
    programs: dict[int, Any] = {}
    seconds = {}
    for label, lengths in sets.items():
        pairs = pairs_of(lengths, config.vocab_size)

        def score(pairs: list[Encoded] = pairs) -> None:
            waiting = []
            for row in plan(pairs, row_tokens):
                chosen = [pairs[i] for i in row]
                tokens = bucket_of(row_size(chosen), len(chosen), ladder)
                packed = pack(chosen, tokens, causal=module.causal, implementation=ATTENTION)
                if tokens not in programs:
                    programs[tokens] = compile(packed)
                waiting.append(programs[tokens](packed))
            jax.block_until_ready(waiting)

        seconds[label] = median_seconds(score, turns)
    return seconds


def theirs(
    name: str, models: dict[str, Any], sets: dict[str, list[int]], row_tokens: int, turns: int, compiled: bool
) -> dict[str, float]:
    """Median seconds of transformers' class for each set of lengths."""
    from transformers import Qwen3Config, Qwen3ForCausalLM, XLMRobertaConfig, XLMRobertaForSequenceClassification

    module, c = models[name]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    common = dict(
        vocab_size=c.vocab_size, hidden_size=c.width, num_hidden_layers=c.layers, num_attention_heads=c.heads,
        intermediate_size=c.ffn, attn_implementation="sdpa",
    )  # fmt: skip
    with torch.device(device):
        if module.causal:
            model: Any = Qwen3ForCausalLM(
                Qwen3Config(**common, num_key_value_heads=c.kv_heads, head_dim=c.head_size, tie_word_embeddings=c.tied,
                            max_position_embeddings=c.max_length)
            )  # fmt: skip
        else:
            more = {"max_position_embeddings": c.position_rows, "type_vocab_size": 1, "num_labels": 1}
            model = XLMRobertaForSequenceClassification(XLMRobertaConfig(**common, **more))
    model = model.to(torch.bfloat16).eval()
    last = {"logits_to_keep": 1} if module.causal else {}
    call = torch.compile(model, dynamic=True) if compiled else model
    seconds = {}
    for label, lengths in sets.items():
        ordered = sorted(lengths, reverse=True)
        batches: list[list[int]] = [[]]
        for length in ordered:
            if batches[-1] and batches[-1][0] * (len(batches[-1]) + 1) > row_tokens:
                batches.append([])
            batches[-1].append(length)
        inputs = []
        for batch in batches:
            ids = torch.randint(3, c.vocab_size, (len(batch), batch[0]), device=device)
            places, ends = torch.arange(batch[0], device=device), torch.tensor(batch, device=device)[:, None]
            # decoders are padded on the left, as the publisher's script does
            mask = (places >= batch[0] - ends if module.causal else places < ends).long()
            inputs.append((ids, mask))

        @torch.inference_mode()
        def score(inputs: list[Any] = inputs) -> None:
            for ids, mask in inputs:
                _ = call(input_ids=ids, attention_mask=mask, **last).logits
            if device == "cuda":
                torch.cuda.synchronize()

        seconds[label] = median_seconds(score, turns)
    return seconds


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--smoke", action="store_true", help="toy sizes, on any device")
    parser.add_argument("--minutes", type=float, default=7.5, help="no further model is begun after so long")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args(argv)
    began = time.perf_counter()
    models = TOY if arguments.smoke else MODELS
    row_tokens, count, turns = (256, 6, 1) if arguments.smoke else (16384, 256, 5)
    most = 60 if arguments.smoke else 512
    mixed = np.clip(np.random.default_rng(0).lognormal(5.45, 0.4, count), 8, most).astype(int).tolist()
    sets = {f"{most} tokens": [most] * count, "mixed": mixed}
    rate = matmul_rate(256 if arguments.smoke else 8192, turns)
    rows: list[dict[str, Any]] = [
        {"part": "matmul", "tflops_per_s": round(rate / 1e12, 2)},
        check_attention(),
        *(check_model(name) for name in arguments.models),
    ]

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        save({"benchmark": "gpu", "rows": rows}, arguments.output)

    for name in arguments.models:
        if time.perf_counter() - began > 60 * arguments.minutes:
            add({"part": "skipped", "model": name, "why": "the time is over"})
            continue
        module, config = models[name]
        seconds = {"jaxrank": ours(name, models, sets, row_tokens, turns)}
        gc.collect()
        jax.clear_caches()
        for side, compiled in (("pytorch", False), ("pytorch_compiled", True)):
            if compiled and (arguments.smoke or time.perf_counter() - began > 45 * arguments.minutes):
                continue
            seconds[side] = theirs(name, models, sets, row_tokens, turns, compiled)
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        for label, lengths in sets.items():
            mine = seconds["jaxrank"][label]
            add(
                {
                    "part": "scoring",
                    "model": name,
                    "lengths": label,
                    "pairs": len(lengths),
                    "tokens": sum(lengths),
                    "pairs_per_s": round(len(lengths) / mine, 1),
                    "tokens_per_s": round(sum(lengths) / mine),
                    "utilisation": round(model_flops(config, lengths, module.causal) / mine / rate, 3),
                    "ratios": {side: round(s[label] / mine, 2) for side, s in seconds.items() if side != "jaxrank"},
                    "seconds": {side: round(s[label], 4) for side, s in seconds.items()},
                }
            )
    finish({"benchmark": "gpu", "rows": rows}, arguments.output)


if __name__ == "__main__":
    main()
