"""`python -m jaxrank.ray_data`: every row once, whoever was killed; scores of the library; bad rows named by line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest
from conftest import MODEL, rows, until, write_lines
from pyarrow import parquet as pq

from jaxrank import Reranker


def job(*arguments: object, folder: Path) -> list[str]:
    return [sys.executable, "-m", "jaxrank.ray_data", *map(str, arguments), "--output", str(folder), *MODEL]


@pytest.fixture
def environment() -> Iterator[dict[str, str]]:
    # short: names of sockets hold at most 107 bytes
    with tempfile.TemporaryDirectory(prefix="r", ignore_cleanup_errors=True) as scratch:
        yield {**os.environ, "RAY_ADDRESS": "local", "RAY_TMPDIR": scratch, "RAY_USAGE_STATS_ENABLED": "0"}


def outputs(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for file in sorted(folder.glob("*.jsonl")) for line in file.read_text().splitlines()]
    return found + [row for file in sorted(folder.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


def test_a_killed_job_goes_on_and_has_every_row_once(tmp_path: Path, environment: dict[str, str]) -> None:
    source, folder = tmp_path / "in", tmp_path / "out"
    (source / "deep").mkdir(parents=True)
    one, two, three = rows(300, 1, "a"), rows(80, 2, "b"), rows(120, 3, "p")
    bad = [
        "{broken",
        '{"query": "no documents"}',
        '{"query": "q", "documents": "no list"}',
        '{"query": 3, "documents": []}',
    ]
    write_lines(source / "one.jsonl", [*one[:150], *bad, "", *one[150:]])
    write_lines(source / "deep" / "two.ndjson", two, end="")
    pq.write_table(pa.Table.from_pylist(three), source / "three.parquet", row_group_size=20)
    command = job(source, "--part-bytes", 5000, "--skip-bad-rows", "--concurrency", 2, "--cpus", 0.5, folder=folder)

    log = tmp_path / "log"
    with log.open("wb") as out:
        first = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
        until(lambda: first.poll() is not None or len(list(folder.glob("[!_]*"))) >= 10, 180, "ten parts")
        assert first.poll() is None, log.read_text()[-3000:]
        children = psutil.Process(first.pid).children(recursive=True)
        first.send_signal(signal.SIGKILL)
        first.wait()
        _, alive = psutil.wait_procs(children, 10)
        for child in alive:  # Ray's own agents take a minute to see that they are alone
            assert "Worker" not in child.name(), "processes with a model outlive the driver"
            child.kill()
    finished = {file.name: file.stat().st_mtime_ns for file in folder.glob("[!_]*")}
    before = len(outputs(folder))
    assert len(finished) >= 10, "the job was killed too early"
    assert before < 400, "the job was killed too late to show anything"

    second = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert second.returncode == 0, second.stderr[-3000:]
    assert f"{len(finished)} of them there already" in second.stderr
    assert "4 rows skipped" in second.stderr
    for name, changed in finished.items():
        assert (folder / name).stat().st_mtime_ns == changed, f"{name} was done again"
    assert not (folder / "_unfinished").exists()

    found = outputs(folder)
    every = {row["id"]: row for row in one + two + three}
    assert Counter(row["id"] for row in found) == Counter(every.keys())
    reranker = Reranker.from_pretrained(dtype="float32", compile_cache=None)
    pairs = [(row["query"], document) for row in found for document in every[row["id"]]["documents"]]
    got = [score for row in found for score in row["scores"]]
    np.testing.assert_allclose(got, reranker.predict(pairs, progress=False), atol=1e-5)
    for row in found[:5] + found[-5:]:
        alone = reranker.score(row["query"], every[row["id"]]["documents"], progress=False)
        np.testing.assert_allclose(row["scores"], alone, atol=1e-5)
    assert all(row["n"] == every[row["id"]]["n"] and "documents" not in row for row in found)
    skipped = [json.loads(line) for file in (folder / "_skipped").iterdir() for line in file.read_text().splitlines()]
    assert sorted(one["where"] for one in skipped) == [f"{source}/one.jsonl, line {n}" for n in (151, 152, 153, 154)]

    third = subprocess.run([*command, "--raw"], env=environment, capture_output=True, text=True, timeout=60)
    assert third.returncode == 1
    assert "holds a job that differs in --raw" in third.stderr


def test_a_bad_row_ends_the_job_with_its_place(tmp_path: Path, environment: dict[str, str]) -> None:
    write_lines(tmp_path / "in.jsonl", [*rows(3, 1, "a"), {"query": "q"}])
    command = job(tmp_path / "in.jsonl", folder=tmp_path / "out")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 1
    said = f"{tmp_path}/in.jsonl, line 4: no 'documents'; a row has a query and a list of documents. Go on with"
    assert said in done.stderr.splitlines()[-1]
    assert outputs(tmp_path / "out") == []
    command += ["--skip-bad-rows"]
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "1 rows skipped" in again.stderr
    assert [row["id"] for row in outputs(tmp_path / "out")] == ["a0", "a1", "a2"]
