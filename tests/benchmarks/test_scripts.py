"""The benchmarks for TPU and GPU, as far as they go without one: as scripts, as their users run them."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

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


def test_the_device_is_busy_while_the_next_batch_is_packed() -> None:
    """Rows of 80 ms, so that a machine with much else to do packs in time too."""
    rows = run("overlap.py", "--loads", "paragraphs", "--row-ms", "80", "--seconds", "4")["rows"]
    found = {row["way"]: row for row in rows}
    assert found["across batches"]["busy"] >= 0.9
    assert found["across batches"]["dry"] <= 0.2
    assert found["within batches"]["dry"] >= 0.3, "before each batch, of two or three rows"
    assert found["one at a time"]["dry"] == 1
