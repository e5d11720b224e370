"""The benchmarks for TPU and GPU, as far as they go without one: as scripts, as their users run them."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"
LIBTPU = Path(sys.prefix) / "tpu"
"""Where `make test` puts TPU's compiler: beside the other packages, since JAX would look for a TPU if it were one."""


def run(script: str, *arguments: str, **environment: str) -> dict[str, Any]:
    """The JSON of the last line; what the script said if it failed."""
    result = subprocess.run(
        [sys.executable, BENCHMARKS / script, *arguments],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
        env={**os.environ, **environment},
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return json.loads(result.stdout.splitlines()[-1])


def test_whole_scoring_function_compiles_for_two_tpus() -> None:
    assert LIBTPU.is_dir() or importlib.util.find_spec("libtpu"), (
        f"no libtpu in {LIBTPU}: `make test` puts it there; without make: pip install --no-deps --target"
    )
    path = os.pathsep.join([str(LIBTPU), *filter(None, [os.environ.get("PYTHONPATH")])])
    line = "--models bge-reranker-v2-m3 --chips v5e v6e --buckets 1024"
    rows = run("compile_tpu.py", *line.split(), PYTHONPATH=path)["rows"]
    assert [(row["chip"], row["chips_each"], row["tokens"]) for row in rows] == [("v5e", 1, 1024), ("v6e", 1, 1024)]
    for row in rows:
        assert row["pallas_calls"] == 2, "one in the scan over layers, one in the last layer"
        assert row["fits"]
        assert 1.0 < row["arguments_gb"] < 1.3, "568 million parameters in bfloat16"
        assert row["temporaries_gb"] < 0.2
        assert 0 < row["layer_products_ms"] < row["layer_ms"], "no layer takes less than its products at the peak"


def test_layer_time_of_a_compiled_text() -> None:
    """A loop of one product, a copy, an attention call and another Pallas call, by hand."""
    cycles = 'backend_config={"window_config":{"estimated_cycles":"3000"}}'
    pallas = 'custom_call_target="tpu_custom_call"'
    text = f"""
%inner (a: bf16[64,32], b: bf16[32,8]) -> f32[64,8] {{
  %a = bf16[64,32]{{1,0:T(8,128)(2,1)}} parameter(0)
  %b = bf16[32,8]{{1,0}} parameter(1)
  ROOT %convolution.1 = f32[64,8]{{1,0}} convolution(%a, %b), dim_labels=bf_io->bf
}}

%body (arg: (f32[64,8], bf16[64,32])) -> (f32[64,8], bf16[64,32]) {{
  %arg = (f32[64,8]{{1,0}}, bf16[64,32]{{1,0}}) parameter(0)
  %x = bf16[64,32]{{1,0}} get-tuple-element(%arg), index=1
  %packed_attention.1 = bf16[64,32]{{1,0}} custom-call(%x), {pallas}
  %norm_rotary.1 = bf16[64,32]{{1,0:T(8,128)(2,1)S(1)}} custom-call(%x), {pallas}
  %fusion.1 = f32[64,8]{{1,0}} fusion(%norm_rotary.1, %x), kind=kOutput, calls=%inner, {cycles}
  ROOT %tuple = (f32[64,8]{{1,0}}, bf16[64,32]{{1,0}}) tuple(%fusion.1, %x)
}}

ENTRY %main (x: f32[64,8]) -> f32[64,8] {{
  %copy.1 = f32[64,8]{{1,0}} copy(%x), {cycles}
  %while = (f32[64,8]{{1,0}}, bf16[64,32]{{1,0}}) while(%copy.1), condition=%cond, body=%body
}}
"""
    code = (
        "import sys, json; from layer_time import layer; "
        "print(json.dumps([(i.name, i.seconds, i.by_bytes, i.flops) for i in layer(sys.stdin.read(), 1e9, 8e9)]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], input=text, capture_output=True, text=True, check=True, cwd=BENCHMARKS
    )
    assert json.loads(result.stdout) == [
        ["fusion.1", pytest.approx(3e-6), False, 2 * 64 * 32 * 8],
        ["norm_rotary.1", pytest.approx(2 * 64 * 32 * 2 / 8e9), True, 0],
    ]


def test_attention() -> None:
    rows = run("attention.py", "--smoke")["rows"]
    lists = [row for row in rows if row["part"] == "list"]
    assert len(lists) == 2
    assert all(1.0 <= row["tiles_over_least"] <= 1.35 for row in lists)
    beside = [row for row in rows if row["part"] == "beside dense"]
    assert len(beside) == 2
    assert all(row["largest_difference"] < 1e-5 for row in beside)


def test_whole_models_as_on_a_gpu() -> None:
    rows = run("gpu.py", "--smoke", "--models", "qwen3-reranker-0.6b")["rows"]
    parts = [row["part"] for row in rows]
    assert parts[:3] == ["matmul", "check attention", "check model"]
    scored = [row for row in rows if row["part"] == "scoring"]
    assert len(scored) == 2
    assert all(set(row["seconds"]) >= {"jaxrank", "pytorch"} for row in scored)
