"""Whole models in bfloat16 with random weights: every attention body on the same pairs."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

from benchmarks.gpu_parts.part import Part, read, seconds_a_call
from benchmarks.gpu_parts.summary import by_speed
from benchmarks.gpu_parts.trace import kernels
from benchmarks.gpu_parts.workloads import FULL, TOY, Load, Sizes, loads, tokens_of
from benchmarks.shapes import MODELS, scoring_flops
from benchmarks.shapes import TOY as TOY_MODELS
from jaxrank.runtime.packing import pack, plan
from jaxrank.runtime.programs import compile_whole
from jaxrank.types import Encoded

IN_FLIGHT = 2
"""Rows handed over before the first result is fetched, as in jaxrank.runtime.scorer.Scorer."""
DEVICE = "the programs alone: rows packed and on the device before"
END_TO_END = "from token ids on the host to logits on the host: plan, pack, transfer, programs, fetch"


class Model:
    """A model on one attention body, its programs by row length, and the pairs that it scores."""

    def __init__(self, name: str, body: str, sizes: Sizes, smoke: bool):
        module, self.config = (TOY_MODELS if smoke else MODELS)[name]
        self.causal: bool = module.causal
        self.body = body
        self.row_tokens = sizes.row_tokens
        self.compile = compile_whole(module(self.config, dtype="bfloat16", rngs=nnx.Rngs(0), implementation=body))
        self.programs: dict[int, Any] = {}

    def pairs(self, load: Load) -> list[Encoded]:
        return [
            Encoded(own, len(own) - 1 if self.causal else 0, prefix=prefix)
            for prefix, own in tokens_of(load, self.config.vocab_size)
        ]

    def pack(self, pairs: list[Encoded], tokens: int) -> Any:
        return pack(pairs, tokens, causal=self.causal, implementation=self.body)

    def program(self, tokens: int) -> Any:
        if tokens not in self.programs:
            self.programs[tokens] = self.compile(self.pack([], tokens))
        return self.programs[tokens]

    def packed_rows(self, pairs: list[Encoded]) -> list[Any]:
        """On the device."""
        rows = plan(pairs, self.row_tokens)
        return [jax.device_put(self.pack([pairs[i] for i in row], self.row_tokens)) for row in rows]

    def score(self, pairs: list[Encoded], tokens: int) -> np.ndarray:
        """Logits of all pairs, as in service: a row is packed while those before it run."""
        logits = np.empty(len(pairs), np.float32)
        waiting: list[tuple[list[int], Any]] = []

        def fetch() -> None:
            row, values = waiting.pop(0)
            logits[row] = np.asarray(values)[: len(row)]

        for row in plan(pairs, tokens):
            if len(waiting) == IN_FLIGHT:
                fetch()
            waiting.append((row, self.program(tokens)(self.pack([pairs[i] for i in row], tokens))))
        while waiting:
            fetch()
        return logits


def rates(load: Load, seconds: float) -> dict[str, Any]:
    """tokens: of whole prompts, as a padded batch would count them. computed: with a shared prefix counted once."""
    pairs, tokens = sum(len(one.own) for one in load), sum(sum(one.prompts) for one in load)
    return {
        "seconds": round(seconds, 6),
        "pairs": pairs,
        "tokens": tokens,
        "computed_tokens": sum(one.computed for one in load),
        "pairs_per_s": round(pairs / seconds, 1),
        "tokens_per_s": round(tokens / seconds),
    }


def measure_loads(part: Part, model: Model, every: dict[str, Load], labels: dict[str, Any], turns: int) -> None:
    for lengths, load in every.items():
        pairs = model.pairs(load)
        flops = scoring_flops(model.config, load, model.causal)
        with part.row(what="device only", **labels, lengths=lengths) as row:
            packed, program = model.packed_rows(pairs), model.program(model.row_tokens)
            seconds = seconds_a_call(lambda: [program(one) for one in packed], turns)  # noqa: B023
            row.update(rows=len(packed), **rates(load, seconds), flops=flops, inside=DEVICE)
        with part.row(what="end to end", **labels, lengths=lengths) as row:
            seconds = seconds_a_call(lambda: model.score(pairs, model.row_tokens), turns)  # noqa: B023
            row.update(**rates(load, seconds), flops=flops, inside=END_TO_END)


def measure_latency(part: Part, model: Model, sizes: Sizes, labels: dict[str, Any], turns: int) -> None:
    """A request that comes alone: one document, and four, each of the uniform length."""
    for count, bucket in ((1, sizes.row_tokens // 32), (4, sizes.row_tokens // 8)):
        bucket = bucket if not part.smoke else sizes.row_tokens
        pairs = model.pairs([(loads(model.causal, part.smoke)["uniform"][0])._replace(own=[sizes.length] * count)])
        with part.row(what="latency", **labels, documents=count, length=sizes.length) as row:
            start = time.perf_counter()
            program = model.program(bucket)
            row["compile_s"] = round(time.perf_counter() - start, 1)
            packed = jax.device_put(model.pack(pairs, bucket))
            row["device_ms"] = round(1e3 * seconds_a_call(lambda: program(packed), turns, calls=10), 4)  # noqa: B023
            once: Callable[[], Any] = lambda: model.score(pairs, bucket)  # noqa: B023, E731
            row["ms"] = round(1e3 * seconds_a_call(once, 4 * turns), 4)
            row["inside"] = f"ms: {END_TO_END}. device_ms: {DEVICE}"


def bodies_for(part: Part, name: str) -> list[str]:
    """All but the dense one, whose scores take too much memory; for the largest model the two that were fastest."""
    bodies = [body for body in part.bodies if body != "dense"]
    if name != "qwen3-reranker-8b" or len(bodies) <= 2:
        return bodies
    before = by_speed(read(part.folder / "v2-m3.json").get("rows", []))
    return [*[body for body in before if body in bodies], *reversed(bodies)][:2]


def run(part: Part, name: str) -> None:
    sizes, turns = (TOY, 1) if part.smoke else (FULL, 5)
    for body in bodies_for(part, name):
        labels: dict[str, Any] = {"model": name, "body": body}
        with part.row(what="compile", **labels) as row:
            start = time.perf_counter()
            model = Model(name, body, sizes, part.smoke)
            row["weights_s"] = round(time.perf_counter() - start, 1)
            model.program(sizes.row_tokens)
            row["compile_s"] = round(time.perf_counter() - start - row["weights_s"], 1)
        if "error" in part.rows[-1]:
            continue
        few = 2 if name == "qwen3-reranker-8b" else None
        every = loads(model.causal, part.smoke, rows=few)
        measure_loads(part, model, every, labels, turns)
        with part.row(what="kernels", **labels, lengths=[*every][-1]) as row:
            packed = model.packed_rows(model.pairs([[*every.values()][-1][0]]))[0]
            row.update(inside="one row", kernels=kernels(lambda: model.program(sizes.row_tokens)(packed)))  # noqa: B023
        if name != "qwen3-reranker-8b":
            measure_latency(part, model, sizes, labels, turns)
        del model
        gc.collect()
