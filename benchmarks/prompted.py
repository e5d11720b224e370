"""Qwen3-Reranker's part of benchmarks/score.py: stars against full prompts, and against the publisher's own way.

The publisher's way is its script in transformers: prompts padded on the left in batches of 16, logits of the whole
vocabulary at every token. It is also run with the logits of the last token alone, which the script could do.
"""

from __future__ import annotations

import json
import re
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from publisher import Script

from jaxrank import Reranker
from jaxrank.runtime.packing import bucket_of, plan, row_size
from jaxrank.types import NO_PREFIX, Encoded

Requests = list[tuple[str, list[str]]]


def all_paragraphs(xquad: Path) -> list[str]:
    """XQuAD's paragraphs in all languages."""
    return [paragraph for file in sorted(xquad.glob("*.json")) for paragraph in paragraphs(file)]


def paragraphs(file: Path) -> list[str]:
    articles = json.loads(file.read_text(encoding="utf-8"))["data"]
    return [paragraph["context"] for article in articles for paragraph in article["paragraphs"]]


def workloads(xquad: Path) -> dict[str, Requests]:
    """Requests of English XQuAD: a question with 20 or 100 paragraphs; two paragraphs together with 20 sentences."""
    articles = json.loads((xquad / "en.json").read_text(encoding="utf-8"))["data"]
    question = articles[0]["paragraphs"][0]["qas"][0]["question"]
    texts = paragraphs(xquad / "en.json")
    sentences = [s for text in texts[100:] for s in re.split(r"(?<=[.!?]) ", text) if len(s) > 60]
    spread = [texts[i] for i in np.linspace(0, len(texts) - 1, 100).astype(int)]
    return {
        "1 query x 20 documents": [(question, spread[::5])],
        "1 query x 100 documents": [(question, spread)],
        "2 long queries x 20 sentences": [
            (" ".join(texts[10 + 2 * i : 12 + 2 * i]), sentences[20 * i : 20 * i + 20]) for i in range(2)
        ],
    }


def full(pairs: list[Encoded]) -> list[Encoded]:
    """The same prompts without sharing."""
    return [
        replace(p, tokens=np.concatenate([p.prefix, p.tokens]), score_at=p.score_at + len(p.prefix), prefix=NO_PREFIX)
        for p in pairs
    ]


def computed(reranker: Reranker, pairs: list[Encoded]) -> int:
    """Tokens that are computed for these pairs, filler included."""
    rows = [[pairs[i] for i in row] for row in plan(pairs, reranker.row_tokens)]
    return sum(bucket_of(row_size(row), len(row), reranker.scorer.buckets) for row in rows)


def compare(folder: Path, shape: str, dtype: str, xquad: Path, turns: int) -> Iterator[dict[str, Any]]:
    """One row of the table for each workload: all sides' seconds on the same requests, taking turns."""
    ours = Reranker.from_pretrained(folder, dtype=dtype, max_length=2048)
    ours.warm_up()
    theirs = Script(folder)
    model = theirs.model(getattr(torch, dtype))
    for name, requests in workloads(xquad).items():

        def encode(requests: Requests = requests) -> list[Encoded]:
            return [pair for query, documents in requests for pair in ours.encode(query, documents)]

        texts = [(query, document) for query, documents in requests for document in documents]
        sides: dict[str, Callable[[], np.ndarray]] = {
            "stars": lambda: ours.score_encoded(encode()),
            "full_prompts": lambda: ours.score_encoded(full(encode())),
            "transformers": partial(theirs.in_batches, model, texts, last=False),
            "transformers_last_token": partial(theirs.in_batches, model, texts, last=True),
        }
        taken: dict[str, list[float]] = {side: [] for side in sides}
        logits = {}
        for _ in range(turns):
            for side, work in sides.items():
                start = time.perf_counter()
                logits[side] = work()
                taken[side].append(time.perf_counter() - start)
        medians = {side: statistics.median(seconds) for side, seconds in taken.items()}
        pairs = encode()
        row = {
            "shape": shape,
            "dtype": dtype,
            "workload": name,
            "pairs": len(pairs),
            "tokens": sum(map(len, pairs)),
            "tokens_computed": {"stars": computed(ours, pairs), "full_prompts": computed(ours, full(pairs))},
            "prefix_tokens": len(pairs[0].prefix),
            "stars_pairs_per_s": round(len(pairs) / medians["stars"], 2),
            "ratios_to_stars": {side: round(medians[side] / medians["stars"], 2) for side in sides},
            "seconds": {side: [round(t, 2) for t in seconds] for side, seconds in taken.items()},
            "largest_logit_difference": {
                side: float(np.abs(logits[side] - logits["stars"]).max()) for side in sides if side != "stars"
            },
            "logit_range": float(np.ptp(logits["stars"])),
            "compilations_after_warm_up": ours.compilations,
        }
        print(f"{shape} {dtype:>8}  {name}: stars are faster by {row['ratios_to_stars']}", flush=True)
        yield row
