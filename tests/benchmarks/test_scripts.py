"""The benchmarks for TPU and GPU, as far as they go without one: as scripts, as their users run them."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxrank.runtime.packing import plan, row_size
from jaxrank.types import Encoded

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


def test_the_device_is_busy_while_the_next_batch_is_packed() -> None:
    """Rows of 80 ms, so that a machine with much else to do packs in time too."""
    rows = run("overlap.py", "--loads", "paragraphs", "--row-ms", "80", "--seconds", "4")["rows"]
    found = {row["way"]: row for row in rows}
    assert found["across batches"]["busy"] >= 0.9
    assert found["across batches"]["dry"] <= 0.2
    assert found["within batches"]["dry"] >= 0.3, "before each batch, of two or three rows"
    assert found["one at a time"]["dry"] == 1


def gpu_module(name: str) -> Any:
    """A module of benchmarks, which stand beside the package and not in it."""
    root = str(BENCHMARKS.parent)
    if root not in sys.path:
        sys.path.insert(0, root)
    return importlib.import_module(name)


PARTS = ("facts", "correctness", "attention", "v2-m3", "0.6b", "8b", "torch", "torch-compile")


class TestGpu:
    def test_all_parts(self, tmp_path: Path) -> None:
        done = subprocess.run(
            [sys.executable, BENCHMARKS / "gpu.py", "--smoke", "--output", tmp_path],
            capture_output=True, text=True, timeout=500, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        parts = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in PARTS}
        assert {name: (part["outcome"], part["state"]) for name, part in parts.items()} == dict.fromkeys(
            PARTS, ("done", "done")
        )
        summary = json.loads((tmp_path / "summary.json").read_text())
        assert {name: part["rows"] for name, part in summary["parts"].items()} == {
            name: part["rows"] for name, part in parts.items()
        }
        rows = {name: part["rows"] for name, part in parts.items()}
        failed = [row for name in PARTS for row in rows[name] if "error" in row]
        # this PyTorch has no such attention on CPU
        assert {row["way"] for row in failed} <= {"varlen", "nested"}

        checked = [row for row in rows["correctness"] if row["what"] == "attention"]
        assert {row["body"] for row in checked} == {"dense", "tiled"}
        assert {row["case"] for row in checked} == {"bidirectional", "causal", "star", "long", "score rows"}
        assert all(1e-5 < row["relative_norm"] < 4e-3 for row in checked), "bfloat16, and not compared with itself"
        assert all(row["filler_is_zero"] and row["twice_the_same"] for row in checked)
        models = [row for row in rows["correctness"] if row["what"] == "model" and row["body"] == "tiled"]
        assert len(models) == 2
        assert all(row["range"] > 1 and 0 < row["difference_over_range"] < 1e-4 for row in models)

        scored = [row for name in PARTS[3:6] for row in rows[name] if "pairs_per_s" in row]
        assert len(scored) == 2 * (2 + 3 + 3), "v2-m3 has no stars"
        theirs = {(row["model"], row["lengths"]): row for row in rows["torch"] if "pairs_per_s" in row}
        for row in scored:
            other = theirs.get((row["model"], row["lengths"]), row)
            assert (row["pairs"], row["tokens"]) == (other["pairs"], other["tokens"]), "the same work on both sides"
        stars = next(row for row in scored if row["lengths"] == "stars")
        assert stars["computed_tokens"] < stars["tokens"], "a prefix is computed once"
        tables = [row["kernels"] for name in PARTS[3:6] for row in rows[name] if row["what"] == "kernels"]
        assert len(tables) == 3
        assert all(one["count"] > 10 and one["table"][0][2] > 0 for one in tables)
        assert summary["default"]["bge-reranker-v2-m3"]["body"] == "tiled"
        assert all(
            mark["value"] > 0 for mark in summary["marks"] if mark["mark"].startswith("bge-reranker-v2-m3, mixed")
        )

    def test_parts_that_fail_or_hang_do_not_stop_the_others(self, tmp_path: Path) -> None:
        gpu = gpu_module("benchmarks.gpu")
        saves = "import json, pathlib; pathlib.Path({!r}).write_text(json.dumps({{'rows': [{{'what': 'kept'}}]}}));"
        hangs = saves.format(str(tmp_path / "hangs.json")) + (
            "import subprocess, sys, time; print('waits', file=sys.stderr, flush=True);"
            "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
            f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(child.pid)); time.sleep(600)"
        )
        commands = {"fails": "raise SystemExit('this is why')", "hangs": hangs, "fine": "print('fine')"}
        limits = {"fails": 2.0, "hangs": 2.0, "fine": 20.0, "late": 1e6}
        processes = [
            gpu.Process(name, [sys.executable, "-c", commands.get(name, "")], seconds)
            for name, seconds in limits.items()
        ]
        processes[0] = processes[0]._replace(seconds=20.0)
        parts = gpu.run_all(processes, tmp_path, minutes=0.75)
        outcomes = {name: part["outcome"] for name, part in parts.items()}
        assert outcomes == {"fails": "failed", "hangs": "timed out", "fine": "done", "late": "skipped"}
        assert parts["fails"]["exit_status"] == 1
        assert parts["fails"]["stderr"] == ["this is why"]
        assert parts["hangs"]["stderr"] == ["waits"]
        assert parts["hangs"]["rows"] == [{"what": "kept"}]
        grandchild = Path("/proc") / (tmp_path / "pid").read_text()
        assert not grandchild.exists() or "Z" in (grandchild / "stat").read_text().split()[2]
        assert json.loads((tmp_path / "summary.json").read_text())["parts"] == parts
        for name, part in parts.items():
            assert json.loads((tmp_path / f"{name}.json").read_text()) == part

    def test_a_row_that_raises_or_hangs_leaves_the_others(self, tmp_path: Path) -> None:
        code = """
import pathlib, sys, time
from benchmarks.gpu_parts.part import Part
part = Part("some", pathlib.Path(sys.argv[1]), False, 60.0)
with part.row(body="right", ok=False) as row:
    row["ok"] = True
with part.row(body="raises", ok=False) as row:
    raise ValueError("not for this head")
with part.row(body="hangs", hangs_after=0.5) as row:
    time.sleep(60)
"""
        done = subprocess.run(
            [sys.executable, "-c", code, tmp_path],
            capture_output=True, text=True, timeout=30, check=False, cwd=BENCHMARKS.parent,
        )  # fmt: skip
        assert done.returncode == 1
        assert "Timeout" in done.stderr
        saved = json.loads((tmp_path / "some.json").read_text())
        assert saved["rows"] == [
            {"body": "right", "ok": True},
            {"body": "raises", "ok": False, "error": "ValueError: not for this head"},
        ]
        assert saved["doing"] == {"body": "hangs"}

    def test_exit_status_is_that_of_correctness(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        gpu = gpu_module("benchmarks.gpu")
        for name, outcome, expected in (("correctness", "timed out", True), ("attention", "failed", False)):
            parts = {name: {"outcome": outcome, "seconds": 1.0, "rows": []}}
            gpu.write(tmp_path / "summary.json", gpu.summarise(parts, gpu.GEMMS))
            monkeypatch.setattr(gpu, "run_all", lambda *_, parts=parts: parts)
            with pytest.raises(SystemExit, match="timed out") if expected else nullcontext():
                gpu.main(["--output", str(tmp_path)])


class TestGpuSummary:
    def parts(self) -> dict[str, Any]:
        def checked(body: str, ok: bool = True) -> list[dict[str, Any]]:
            return [{"what": "attention", "body": body, "dtype": "bfloat16", "relative_norm": 0.002, "ok": ok}] * 2

        def timed(model: str, body: str, seconds: float) -> list[dict[str, Any]]:
            labels = {"model": model, "body": body, "seconds": seconds, "flops": 60e12 * 0.5}
            return [
                {"what": what, "lengths": lengths, **labels}
                for what in ("device only", "end to end")
                for lengths in ("uniform", "mixed")
            ]

        model = "bge-reranker-v2-m3"
        speeds = {"tiled": 0.3, "triton": 0.1, "mosaic": 0.05}
        return {
            "facts": {
                "rows": [
                    {"what": "gemm", "kind": "bf16->bf16", "k": k, "n": n, "tflops_per_s": 600.0}
                    for k, n in ((1024, 3072), (1024, 4096), (4096, 1024))
                ]
            },
            "correctness": {
                "rows": [*checked("dense"), *checked("tiled"), *checked("triton"), *checked("mosaic", ok=False)]
            },
            "v2-m3": {"rows": [row for body, seconds in speeds.items() for row in timed(model, body, seconds)]},
            "torch": {
                "rows": [
                    {"what": "end to end", "model": model, "way": "padded", "lengths": "mixed", "seconds": 0.25},
                    {"what": "end to end", "model": model, "way": "varlen", "lengths": "mixed", "seconds": 0.15},
                ]
            },
        }

    def test_chooses_the_fastest_body_that_is_right(self) -> None:
        found = gpu_module("benchmarks.gpu_parts.summary").summarise(
            self.parts(), gpu_module("benchmarks.gpu_parts.workloads").GEMMS
        )
        assert found["default"]["bge-reranker-v2-m3"] == {
            "body": "triton", "seconds": 0.2, "next": "tiled", "next_takes": 3.0,
        }  # fmt: skip
        assert found["default"]["qwen3-reranker-0.6b"]["body"] is None
        marks = {mark["mark"]: (mark["value"], mark["reached"]) for mark in found["marks"]}
        assert marks["bge-reranker-v2-m3, 512 tokens: share of the GEMM rate"] == (0.5, False)
        assert marks["bge-reranker-v2-m3, mixed lengths: times as fast as SDPA, padded"] == (2.5, True)
        assert marks["bge-reranker-v2-m3, mixed lengths: times as fast as torch.compile"] == (None, None)

    def test_a_body_that_stopped_half_way_does_not_run(self) -> None:
        parts = self.parts()
        rows = parts["correctness"]["rows"]
        rows.remove(next(row for row in rows if row["body"] == "triton"))
        found = gpu_module("benchmarks.gpu_parts.summary").bodies(parts)
        assert {body for body, one in found.items() if one["runs"]} == {"dense", "tiled", "mosaic"}
        assert {body for body, one in found.items() if one["right"]} == {"dense", "tiled"}


def test_loads_fill_their_rows() -> None:
    workloads = gpu_module("benchmarks.gpu_parts.workloads")
    for name, load in workloads.loads(causal=True, smoke=False).items():
        tokens = workloads.tokens_of(load, 1000)
        pairs = [Encoded(own, 0, prefix=prefix) for prefix, own in tokens]
        rows = plan(pairs, 16384)
        assert len(rows) == 4, name
        assert sum(map(len, pairs)) == sum(sum(request.prompts) for request in load)
        assert sum(row_size([pairs[i] for i in row]) for row in rows) >= 0.97 * 4 * 16384


def test_flops_of_scoring_count_the_last_layer_at_scored_rows_alone() -> None:
    shapes = gpu_module("benchmarks.shapes")
    _, config = shapes.MODELS["bge-reranker-v2-m3"]
    load = [(0, [512] * 32)]
    ratio = shapes.scoring_flops(config, load, False) / shapes.model_flops(config, [512] * 32, False)
    # of 24 layers one computes keys and values alone: 2 of 12 parts of its matrices
    assert abs(ratio - (1 - (10 / 12) / 24)) < 0.003
    _, small = shapes.MODELS["qwen3-reranker-0.6b"]
    star, apart = (shapes.scoring_flops(small, load, True) for load in ([(90, [250] * 60)], [(0, [340])] * 60))
    assert 250 / 340 < star / apart < 0.76


def test_reference_of_attention_is_softmax() -> None:
    """Against a loop over rows, on a few keys."""
    reference = gpu_module("benchmarks.gpu_parts.reference")
    rng = np.random.default_rng(0)
    spans = reference.cases(128, 128, 16)["star"]
    q, k, v = rng.normal(size=(128, 4, 8)), rng.normal(size=(128, 2, 8)), rng.normal(size=(128, 2, 8))
    rows = np.flatnonzero(reference.filled(spans))
    got = reference.reference(q, k, v, spans, 0.3, rows)
    for row, out in zip(rows, got, strict=True):
        a0, a1, b0, b1 = spans[row]
        keys = [*range(a0, a1), *range(b0, b1)]
        for head in range(4):
            weights = np.exp(0.3 * k[keys, head % 2] @ q[row, head])
            np.testing.assert_allclose(out[head], weights @ v[keys, head % 2] / weights.sum(), rtol=1e-9, atol=1e-12)


def test_trace_is_reduced_to_kernels_of_streams() -> None:
    def named(kind: str, pid: int, name: str, tid: int = 0) -> dict[str, Any]:
        return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": name}}

    def ran(pid: int, tid: int, name: str, ts: float, dur: float) -> dict[str, Any]:
        return {"ph": "X", "pid": pid, "tid": tid, "name": name, "ts": ts, "dur": dur}

    events = [
        named("process_name", 1, "/device:GPU:0"),
        named("process_name", 2, "/host:CPU"),
        named("thread_name", 1, "Stream #13(Compute)", 5),
        named("thread_name", 1, "XLA Ops", 6),
        named("thread_name", 2, "tf_XLA", 7),
        ran(1, 5, "gemm", 0.0, 10.0),
        ran(1, 5, "gemm", 12.0, 8.0),
        ran(1, 5, "norm", 20.0, 3.0),
        ran(1, 6, "gemm", 0.0, 10.0),
        ran(2, 7, "host", 0.0, 99.0),
    ]
    found = gpu_module("benchmarks.gpu_parts.trace").reduced(events, 5)
    assert found == {"count": 3, "microseconds": 21.0, "span": 23.0, "table": [("gemm", 2, 18.0), ("norm", 1, 3.0)]}
