"""Offline throughput on real, mixed lengths beside sentence-transformers' CrossEncoder, in one run.

    python benchmarks/score.py --xquad DIR [--shapes base large] [--output benchmarks/results/score-cpu.json]

Pairs are English XQuAD questions with their paragraphs; checkpoints have a true shape and random weights, and the
built-in model's tokenizer. Both sides take texts and give scores, tokenising included, and take turns; the figure is
the median of the turns. CrossEncoder runs at its best setting: pairs sorted by length (it does that itself), batches
of 32. Where our time goes is measured apart: bare products of the same sizes, attention alone on the same rows,
tokenising alone; what remains is element-wise work, embedding and dispatch. Shapes of Qwen3-Reranker are compared as
benchmarks/prompted.py says, those of Qwen3-VL-Reranker as benchmarks/seeing.py does. Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import prompted
import seeing
import torch
from checkpoints import (
    BGE_SHAPES,
    QWEN3_SHAPES,
    QWEN3_VL_SHAPES,
    bge_checkpoint,
    qwen3_checkpoint,
    qwen3_vl_checkpoint,
)
from machine import finish, median_seconds, save
from sentence_transformers import CrossEncoder

from jaxrank import Reranker
from jaxrank.kernels import attention, operand_dtype
from jaxrank.runtime.packing import bucket_of, pack, plan, row_size

Pairs = list[tuple[str, str]]


def xquad_pairs(folder: Path, count: int) -> Pairs:
    """`count` (question, paragraph) pairs spread over English XQuAD."""
    articles = json.loads((folder / "en.json").read_text(encoding="utf-8"))["data"]
    pairs = [
        (question["question"], paragraph["context"])
        for article in articles
        for paragraph in article["paragraphs"]
        for question in paragraph["qas"]
    ]
    return [pairs[i] for i in np.linspace(0, len(pairs) - 1, count).astype(int)]


def breakdown(reranker: Reranker, pairs: Pairs, shape: str, dtype: str, whole: float) -> dict[str, float]:
    """Shares of `whole` seconds, each part measured alone on rows like those that were scored."""
    config = BGE_SHAPES[shape]
    wide, heads, ffn, layers = (
        config[k] for k in ("hidden_size", "num_attention_heads", "intermediate_size", "num_hidden_layers")
    )
    encoded = reranker.encode_pairs(pairs)
    rows = plan(encoded, reranker.row_tokens)
    tokens = [bucket_of(row_size([encoded[i] for i in row]), len(row), reranker.scorer.buckets) for row in rows]
    row = max(tokens)
    normal = np.random.default_rng(0).standard_normal
    multiply = jax.jit(lambda x, w: jnp.matmul(x, w, preferred_element_type=jnp.float32))
    products = 0.0
    for inner, outer, times in ((wide, wide, 4), (wide, ffn, 1), (ffn, wide, 1)):
        x, w = (jnp.asarray(normal(s, np.float32), dtype) for s in ((row, inner), (inner, outer)))
        products += times * median_seconds(lambda x=x, w=w: multiply(x, w), 5)
    # the last layer multiplies all rows by the key and value kernels alone
    last = 2 * wide * wide / (4 * wide * wide + 2 * wide * ffn)
    products *= (layers - 1 + last) * sum(tokens) / row

    q = jnp.asarray(normal((row, heads, wide // heads), np.float32), operand_dtype(dtype, None))
    attend = jax.jit(lambda q, layout: attention(q, q, q, layout, scale=0.1))
    layouts = [pack([encoded[i] for i in row], size).layout for row, size in zip(rows, tokens, strict=True)]
    attending = (layers - 1) * sum(
        median_seconds(lambda q=q[:size], layout=layout: attend(q, layout), 3)
        for size, layout in zip(tokens, layouts, strict=True)
    )
    tokenising = median_seconds(lambda: reranker.encode_pairs(pairs), 5)
    parts = {"products": products, "attention": attending, "tokenising": tokenising}
    parts["element-wise and rest"] = whole - sum(parts.values())
    return {name: round(part / whole, 3) for name, part in parts.items()}


def compare(folder: Path, shape: str, dtype: str, pairs: Pairs, turns: int) -> dict[str, Any]:
    """One row of the table: both sides' seconds on the same pairs, taking turns."""
    ours = Reranker.from_pretrained(folder, dtype=dtype)
    theirs = CrossEncoder(str(folder), max_length=512, device="cpu", model_kwargs={"dtype": getattr(torch, dtype)})
    ours.warm_up()
    theirs.predict(pairs[:32], batch_size=32, show_progress_bar=False)
    taken: dict[str, list[float]] = {"jaxrank": [], "cross_encoder": []}
    scores = {}
    for _ in range(turns):
        for name, predict in (
            ("jaxrank", lambda: ours.predict(pairs, progress=False)),
            ("cross_encoder", lambda: theirs.predict(pairs, batch_size=32, show_progress_bar=False)),
        ):
            start = time.perf_counter()
            scores[name] = predict()
            taken[name].append(time.perf_counter() - start)
    tokens = sum(len(e) for e in ours.encode_pairs(pairs))
    mine, other = (statistics.median(taken[name]) for name in taken)
    return {
        "shape": shape,
        "dtype": dtype,
        "pairs": len(pairs),
        "tokens": tokens,
        "jaxrank_pairs_per_s": round(len(pairs) / mine, 2),
        "jaxrank_tokens_per_s": round(tokens / mine),
        "cross_encoder_pairs_per_s": round(len(pairs) / other, 2),
        "cross_encoder_tokens_per_s": round(tokens / other),
        "ratio": round(other / mine, 2),
        "seconds": {name: [round(t, 3) for t in values] for name, values in taken.items()},
        "largest_score_difference": float(np.abs(scores["jaxrank"] - np.asarray(scores["cross_encoder"])).max()),
        "compilations_after_warm_up": ours.compilations,
        "share_of_time": breakdown(ours, pairs, shape, dtype, mine),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--xquad", type=Path, required=True, help="folder with XQuAD's en.json")
    parser.add_argument(
        "--shapes", nargs="+", choices=[*BGE_SHAPES, *QWEN3_SHAPES, *QWEN3_VL_SHAPES], default=["base", "large"]
    )
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--pairs", type=int, default=120, help="pairs a turn; a third of them at the large shapes")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    for shape in arguments.shapes:
        if shape not in BGE_SHAPES:
            make, compare_all = (
                (qwen3_checkpoint, prompted.compare) if shape in QWEN3_SHAPES else (qwen3_vl_checkpoint, seeing.compare)
            )
            with tempfile.TemporaryDirectory() as folder:
                make(Path(folder), shape, prompted.all_paragraphs(arguments.xquad))
                for dtype in arguments.dtypes:
                    for row in compare_all(Path(folder), shape, dtype, arguments.xquad, arguments.turns):
                        rows.append(row)
                        save({"benchmark": "score", "rows": rows}, arguments.output)
            continue
        pairs = xquad_pairs(arguments.xquad, arguments.pairs // 3 if shape in ("large", "v2-m3") else arguments.pairs)
        with tempfile.TemporaryDirectory() as folder:
            bge_checkpoint(Path(folder), shape)
            for dtype in arguments.dtypes:
                row = compare(Path(folder), shape, dtype, pairs, arguments.turns)
                rows.append(row)
                save({"benchmark": "score", "rows": rows}, arguments.output)
                print(
                    f"{shape:>6} {dtype:>9}  jaxrank {row['jaxrank_tokens_per_s']:>6} tokens/s, CrossEncoder "
                    f"{row['cross_encoder_tokens_per_s']:>6}, ratio {row['ratio']:.2f}  {row['share_of_time']}",
                    flush=True,
                )
    finish({"benchmark": "score", "rows": rows}, arguments.output)


if __name__ == "__main__":
    main()
