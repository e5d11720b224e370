"""Qwen3-VL-Reranker's part of benchmarks/score.py: one query with eight documents, images among them, beside
transformers.

The publisher's way is its script's: one pair after the other, with all of its images each time. Both sides start from
decoded pictures of 640 x 480 and end in scores.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from prompted import paragraphs
from publisher_vl import Prompt, PublishedVL

from jaxrank import Reranker


def pictures(count: int) -> list[Image.Image]:
    """Different ones, with large shapes."""
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize((640, 480), Image.Resampling.BICUBIC)
        for _ in range(count)
    ]


def workloads(xquad: Path) -> dict[str, tuple[Any, list[Any]]]:
    texts = paragraphs(xquad / "en.json")[:8]
    query, *images = pictures(9)
    return {
        "text query x 8 images": ("A view of the town from the river.", images),
        "image query x 8 texts": ([query, "What does this show?"], texts),
        "image query x 8 images": (query, images),
    }


def published(model: PublishedVL, ours: Reranker, query: Any, documents: list[Any]) -> np.ndarray:
    """One pair after the other; the ids and pixels of a pair are made anew for each, as in the script."""
    logits = []
    for document in documents:
        (pair,) = ours.encode(query, [document])
        media = () if pair.media is None else pair.media.patches
        logits.append(model.logit(Prompt(pair.tokens, media)))
    return np.array(logits)


def compare(folder: Path, shape: str, dtype: str, xquad: Path, turns: int) -> Iterator[dict[str, Any]]:
    """One row of the table for each workload: both sides' seconds on the same request, taking turns."""
    ours = Reranker.from_pretrained(folder, dtype=dtype)
    theirs = PublishedVL(folder, getattr(torch, dtype))
    for name, (query, documents) in workloads(xquad).items():
        sides: dict[str, Callable[[], np.ndarray]] = {
            "jaxrank": lambda q=query, d=documents: ours.score(q, d, raw=True, progress=False),
            "transformers": lambda q=query, d=documents: published(theirs, ours, q, d),
        }
        sides["jaxrank"]()  # compiles what it needs
        taken: dict[str, list[float]] = {side: [] for side in sides}
        logits = {}
        assert ours.tower is not None
        encoded = ours.tower.encoded
        for _ in range(turns):
            for side, work in sides.items():
                start = time.perf_counter()
                logits[side] = work()
                taken[side].append(time.perf_counter() - start)
        encoded = (ours.tower.encoded - encoded) / turns
        mine, other = (statistics.median(taken[side]) for side in sides)
        pairs = ours.encode(query, documents)
        row = {
            "shape": shape,
            "dtype": dtype,
            "workload": name,
            "pairs": len(pairs),
            "tokens": sum(map(len, pairs)),
            "images_encoded": encoded,
            "jaxrank_pairs_per_s": round(len(pairs) / mine, 3),
            "jaxrank_images_per_s": round(encoded / mine, 3),
            "transformers_pairs_per_s": round(len(pairs) / other, 3),
            "ratio": round(other / mine, 2),
            "seconds": {side: [round(t, 2) for t in seconds] for side, seconds in taken.items()},
            "largest_logit_difference": float(np.abs(logits["jaxrank"] - logits["transformers"]).max()),
            "logit_range": float(np.ptp(logits["transformers"])),
        }
        print(f"{shape} {dtype:>8}  {name}: {row['jaxrank_pairs_per_s']} pairs/s, ratio {row['ratio']}", flush=True)
        yield row
