"""int8 weights beside bfloat16 and float32: bytes, pairs a second, and what rounding does to scores and their order.

    python benchmarks/quantization.py --xquad DIR [--every 40] [--output benchmarks/results/quantization-cpu.json]

Bytes are counted from the shapes of published models. The built-in model ranks English XQuAD paragraphs, all or every
n-th (--documents 240 is all), for every n-th of their questions; a random checkpoint with the widths of
Qwen3-Reranker-0.6B and a few of its layers ranks a dozen. Kinds take turns, question by question, and the figure is the
median. Kendall's tau and the best document are those of a kind beside another's, by question, on average. "words in
bfloat16" is int8 with the table of words left as it was. Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from builtin_examples import read_xquad
from checkpoints import QWEN3_SHAPES, qwen3_checkpoint
from flax import nnx
from machine import finish, save
from shapes import MODELS, VL_MODELS
from train_builtin import mrr

from jaxrank import Reranker, convert
from jaxrank.models.quantized import quantized_outline
from jaxrank.reranker import BUILTIN
from jaxrank.weights import converted as checkpoint

KINDS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {},
    "int8": {"quantization": "int8"},
    "int8, words in bfloat16": {"quantization": "int8"},
}


def bytes_of(model: Any) -> int:
    return sum(array.size * array.dtype.itemsize for array in checkpoint.parameters(model).values())


def sizes() -> list[dict[str, Any]]:
    """Of published shapes, vision towers included, which stay in bfloat16."""
    rows = []
    for name, (module, config) in (MODELS | VL_MODELS).items():
        outline = nnx.eval_shape(lambda module=module, config=config: module(config, dtype="bfloat16", rngs=None))
        plain, small = bytes_of(outline), bytes_of(quantized_outline(outline))
        row = {"part": "bytes", "model": name, "bfloat16_gb": round(plain / 1e9, 3), "int8_gb": round(small / 1e9, 3)}
        rows.append(row | {"ratio": round(small / plain, 3)})
    return rows


def load(folder: Path, kind: str, max_length: int) -> Reranker:
    settings: dict[str, Any] = {"max_length": max_length, "compile_cache": None, **KINDS[kind]}
    reranker = Reranker.from_pretrained(folder, **settings)
    if "words" not in kind:
        return reranker
    model = convert.load(folder, dtype="bfloat16", quantization="int8")
    model.word = convert.load(folder, dtype="bfloat16").word
    return Reranker(model, reranker.tokenizer, name=reranker.name)


def tau(a: np.ndarray, b: np.ndarray) -> float:
    """Kendall's, of two lists of scores; a tie counts neither way."""
    pairs = np.triu_indices(len(a), 1)
    signs = [np.sign(x[:, None] - x[None, :])[pairs] for x in (a, b)]
    return float((signs[0] * signs[1]).mean())


def compare(folder: Path, name: str, asked: list[tuple[str, int]], documents: list[str], length: int) -> dict[str, Any]:
    """One row: every kind on the same questions. asked: with the place of the right document."""
    rerankers = {kind: load(folder, kind, length) for kind in KINDS}
    logits: dict[str, list[np.ndarray]] = {kind: [] for kind in KINDS}
    rates: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for reranker in rerankers.values():
        reranker.score(asked[0][0], documents, progress=False)  # compiles
    for question, _ in asked:
        for kind, reranker in rerankers.items():
            start = time.perf_counter()
            logits[kind].append(reranker.score(question, documents, raw=True, progress=False))
            rates[kind].append(len(documents) / (time.perf_counter() - start))
    scores = {kind: np.stack(rows) for kind, rows in logits.items()}
    right = np.array([place for _, place in asked])
    row: dict[str, Any] = {"part": "scores", "model": name, "questions": len(asked), "documents": len(documents)}
    row["logits_deviation"] = round(float(scores["float32"].std()), 4)
    row["kinds"] = {
        kind: {
            "bytes": bytes_of(rerankers[kind].model),
            "pairs_per_s": round(statistics.median(rates[kind]), 2),
            "mrr_at_10": round(mrr(scores[kind], right), 4),
        }
        for kind in KINDS
    }
    row["beside"] = [
        {
            "kind": kind,
            "beside": other,
            "largest_difference": round(float(np.abs(scores[kind] - scores[other]).max()), 5),
            "mean_difference": round(float(np.abs(scores[kind] - scores[other]).mean()), 5),
            "kendall_tau": round(float(np.mean([*map(tau, scores[kind], scores[other])])), 5),
            "same_best": round(float((scores[kind].argmax(1) == scores[other].argmax(1)).mean()), 4),
        }
        for kind, other in [(kind, other) for kind in KINDS for other in ("float32", "bfloat16") if kind != other]
        if (kind, other) != ("float32", "bfloat16")
    ]
    return row


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--xquad", type=Path, required=True, help="folder with XQuAD's xquad.XX.json as XX.json")
    parser.add_argument("--every", type=int, default=40, help="every n-th question for the built-in model")
    parser.add_argument("--documents", type=int, default=240, help="paragraphs, at most 240")
    parser.add_argument("--layers", type=int, default=4, help="of the random checkpoint; 0 leaves it out")
    parser.add_argument("--questions", type=int, default=4, help="for the random checkpoint, with 12 paragraphs each")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args(argv)
    paragraphs = read_xquad(arguments.xquad / "en.json")
    paragraphs = [paragraphs[i] for i in np.linspace(0, len(paragraphs) - 1, arguments.documents).astype(int)]
    documents = [paragraph["context"] for paragraph in paragraphs]
    asked = [(qa["question"], i) for i, paragraph in enumerate(paragraphs) for qa in paragraph["qas"]]
    rows = sizes()
    rows.append(compare(BUILTIN, "built-in", asked[:: arguments.every], documents, 512))
    save({"benchmark": "quantization", "rows": rows}, arguments.output)
    if arguments.layers:
        shape = f"qwen3-0.6b, {arguments.layers} layers"
        QWEN3_SHAPES[shape] = {**QWEN3_SHAPES["qwen3-0.6b"], "num_hidden_layers": arguments.layers}
        few = [(question, place) for question, place in asked if place < 12]
        few = few[:: len(few) // arguments.questions][: arguments.questions]
        with tempfile.TemporaryDirectory() as folder:
            qwen3_checkpoint(Path(folder), shape, documents)
            rows.append(compare(Path(folder), shape, few, documents[:12], 1024))
    finish({"benchmark": "quantization", "rows": rows}, arguments.output)


if __name__ == "__main__":
    main()
