"""What NVIDIA GPUs would run, lowered without one: no loop of a scoring program may wait for the host.

A `while` whose trip count is data costs a predicate that the host fetches, at each trip. A scan's count is in the
program; loops inside a Pallas kernel run on the GPU. Nothing is compiled.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params
from jax.sharding import AbstractDevice, AbstractMesh

from benchmarks.shapes import TOY, qwen3_vl
from jaxrank.kernels import IMPLEMENTATIONS
from jaxrank.models.layers import UNROLLED
from jaxrank.runtime.packing import Features, pack
from jaxrank.runtime.patch_packing import pack_patches
from jaxrank.runtime.programs import take_tower, whole, whole_tower

TOKENS, PATCHES = 1536, 256
GPU = AbstractMesh((1,), ("x",), abstract_device=AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu"))
SEEING = qwen3_vl(64, 5, 8, 128, tied=True, vision=(64, 3, 128, (0, 1)))
PROGRAMS = {
    name: (model[0], replace(model[1], layers=6), "tokens")
    for name, model in TOY.items()
    if name in ("bge-reranker-v2-m3", "qwen3-reranker-0.6b")
}
PROGRAMS |= {f"qwen3-vl: {part}": (*SEEING, part) for part in ("tokens", "tokens with media", "patches")}
KERNELS = {"triton": "__gpu$xla.gpu.triton", "mosaic": "mosaic_gpu_v2"}
"""Attention's bodies for NVIDIA GPUs, and what calls them in the program."""


@pytest.fixture(autouse=True)
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The models must not take this machine's processor for their device, and save its memory."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


def trace(program: str, implementation: str, tokens: int = TOKENS) -> Any:
    """The scoring program of a toy model in bfloat16, for one packed row."""
    module, config, part = PROGRAMS[program]
    model: Any = nnx.eval_shape(lambda: module(config, dtype="bfloat16", rngs=None, implementation=implementation))
    vision = take_tower(model)
    if part == "patches":
        sizes = {"values": config.vision.values, "merge": config.vision.merge, "side": config.vision.side}
        run, state = whole_tower(vision)
        row: Any = pack_patches([], PATCHES, **sizes, implementation=implementation)
    else:
        features = Features((config.vision.features, config.vision.out_width), "bfloat16") if "media" in part else None
        run, state = whole(model)
        row = pack([], tokens, causal=module.causal, implementation=implementation, features=features)
    outlines = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), (state, row))
    with jax.sharding.use_abstract_mesh(GPU):
        return run.trace(*outlines)


def equations(jaxpr: Any) -> Iterator[Any]:
    """Of a jaxpr, however deep, without those inside Pallas kernels."""
    for equation in jaxpr.eqns:
        yield equation
        if equation.primitive.name not in ("pallas_call", "mpmd_map"):
            for inner in jaxprs_in_params(equation.params):
                yield from equations(inner)


def host_checks(jaxpr: Any) -> list[str]:
    """The loops and branches that depend on data."""
    names = [equation.primitive.name for equation in equations(jaxpr)]
    return [name for name in names if name in ("while", "cond")]


@pytest.mark.parametrize("implementation", [name for name in KERNELS if name in IMPLEMENTATIONS])
@pytest.mark.parametrize("program", PROGRAMS)
def test_no_loop_waits_for_the_host(program: str, implementation: str) -> None:
    traced = trace(program, implementation)
    assert host_checks(traced.jaxpr.jaxpr) == []
    with jax.sharding.use_abstract_mesh(GPU):
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert KERNELS[implementation] in text


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_tiled_body_would_fail(program: str) -> None:
    """So what is looked for is found where it is: in the loops over tiles."""
    assert "while" in host_checks(trace(program, "tiled").jaxpr.jaxpr)


@pytest.mark.parametrize("program", [name for name in PROGRAMS if name != "qwen3-vl: patches"])
def test_layers_are_unrolled_in_short_rows_alone(program: str) -> None:
    """In long ones a layer's vectors are one copy out of the stack."""
    for tokens, unrolled in ((UNROLLED, True), (2 * UNROLLED, False)):
        found = equations(trace(program, "triton", tokens).jaxpr.jaxpr)
        scans = [equation for equation in found if equation.primitive.name == "scan"]
        assert scans
        for scan in scans:
            length = scan.params["length"]
            assert (scan.params["unroll"] == length > 1) == unrolled
            vectors = [x for x in scan.invars if x.aval.ndim == 2 and x.aval.shape[0] == length]
            assert unrolled or len(vectors) == 1
