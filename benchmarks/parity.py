"""Qwen3-VL-Reranker's shape as a whole beside transformers' own class, on the same random weights in float32.

    python benchmarks/parity.py [--shape qwen3-vl-2b] [--output benchmarks/results/parity-qwen3-vl.json]

Both models do not fit a small machine's memory together, so each runs in a process of its own: the first writes the
checkpoint, the second keeps what transformers makes of it, the third compares. Compared are the tower's features and
each deepstack feature, positions, and logits, of images of different sizes, a video of an odd number of frames, and
texts, on both sides, documents sharing rows. Ends in one JSON line, and with status 1 if a difference, by the largest
value of its kind, is above 1e-3.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

AIM = 1e-3

TEXTS = [
    "The giant panda is a bear species endemic to China.",
    "Der Große Panda lebt in den Bergwäldern Zentralchinas und frisst Bambus.",
    "大熊猫生活在中国中部的山区。",
]


def requests() -> list[tuple[Any, list[Any]]]:
    """Queries with their documents, drawn anew and the same in each process."""
    from PIL import Image

    rng = np.random.default_rng(0)

    def picture(width: int, height: int) -> Any:
        small = rng.integers(0, 256, (max(height // 32, 2), max(width // 32, 2), 3), np.uint8)
        return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)

    video = {"video": [picture(160, 96) for _ in range(5)]}
    return [
        ("what is panda?", [picture(320, 240), TEXTS[0], [TEXTS[1], picture(64, 400)], video]),
        ([picture(200, 200), "Where is this?"], [TEXTS[2], [picture(96, 64), "and", picture(333, 121)], video]),
    ]


def encode(folder: Path) -> tuple[Any, list[Any]]:
    """A Reranker without weights, and the pairs of all requests."""
    from jaxrank import Reranker

    outline = Reranker.from_pretrained(folder, dtype="float32", weights=False, compile_cache=None)
    return outline, [pair for query, documents in requests() for pair in outline.encode(query, documents)]


def written(pair: Any) -> tuple[np.ndarray, list[Any], np.ndarray]:
    """A pair without sharing: its ids, its media, its positions."""
    ids = np.concatenate([pair.prefix, pair.tokens])
    runs = [(pair.prefix_media, len(pair.prefix)), (pair.media, len(pair.tokens))]
    media = [one for run, _ in runs if run is not None for one in run.patches]
    positions = np.zeros((3, 0), np.int64)
    for run, length in runs:
        more = np.arange(length)[None] + positions.shape[1] if run is None else run.positions
        positions = np.concatenate([positions, np.broadcast_to(more, (3, length))], 1)
    return ids, media, positions


def theirs(folder: Path, kept: Path) -> None:
    """What transformers makes of every pair, kept as arrays."""
    from publisher_vl import Prompt, PublishedVL

    _, pairs = encode(folder)
    model = PublishedVL(folder)
    arrays: dict[str, np.ndarray] = {}
    for i, pair in enumerate(pairs):
        ids, media, _ = written(pair)
        prompt = Prompt(ids, tuple(media))
        arrays[f"positions {i}"] = model.positions(prompt)
        arrays[f"logits {i}"] = np.array(model.logit(prompt))
        for j, one in enumerate(media):
            arrays[f"features {i} {j}"] = model.features([one])
    save: Any = np.savez  # whose annotations take no mapping
    save(kept, **arrays)


def ours(folder: Path, kept: Path) -> dict[str, Any]:
    """The largest differences by kind, each relative to the largest value of its kind."""
    from jaxrank import Reranker

    expected = np.load(kept)
    reranker = Reranker.from_pretrained(folder, dtype="float32", compile_cache=None)
    assert reranker.tower is not None
    pairs = [pair for query, documents in requests() for pair in reranker.encode(query, documents)]
    found: dict[str, np.ndarray] = {}
    logits = reranker.score_encoded(pairs)
    for i, pair in enumerate(pairs):
        _, media, found[f"positions {i}"] = written(pair)
        found[f"logits {i}"] = logits[i]
        made = reranker.tower.of(media)
        found |= {f"features {i} {j}": made[one] for j, one in enumerate(media)}
    assert sorted(found) == sorted(expected.files)
    kinds: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for name, value in found.items():
        kind = name.split()[0]
        if kind == "features":
            for level in range(value.shape[1]):
                label = f"deepstack {level}" if level else "features"
                kinds.setdefault(label, []).append((value[:, level], expected[name][:, level]))
        else:
            kinds.setdefault(kind, []).append((value, expected[name]))
    differences = {}
    for kind, couples in sorted(kinds.items()):
        most = max(float(np.abs(b).max()) for _, b in couples)
        differences[kind] = max(float(np.abs(a - b).max()) for a, b in couples) / most
    values = [float(expected[f"logits {i}"]) for i in range(len(pairs))]
    return {"pairs": len(pairs), "logits": values, "relative_differences": differences}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", default="qwen3-vl-2b", help="of checkpoints.QWEN3_VL_SHAPES")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--step", choices=["write", "theirs"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.step == "write":
        from checkpoints import qwen3_vl_checkpoint

        qwen3_vl_checkpoint(arguments.folder, arguments.shape, TEXTS)
        return
    if arguments.step == "theirs":
        theirs(arguments.folder, arguments.folder / "theirs.npz")
        return
    from machine import finish

    with tempfile.TemporaryDirectory() as scratch:
        for step in ("write", "theirs"):
            command = [sys.executable, __file__, "--shape", arguments.shape, "--step", step, "--folder", scratch]
            subprocess.run(command, check=True)
        result = ours(Path(scratch), Path(scratch) / "theirs.npz")
    finish(
        {"benchmark": "parity", "shape": arguments.shape, "dtype": "float32", "aim": AIM, **result}, arguments.output
    )
    worst = max(result["relative_differences"].values())
    if worst > AIM:
        raise SystemExit(f"a difference of {worst:.2g} is above {AIM}")


if __name__ == "__main__":
    main()
