"""`python -m jaxrank.ray_data`: every row once, whoever was killed; scores of the library; bad rows named by line."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest
from conftest import until
from pyarrow import parquet as pq

from jaxrank import RequestError, Reranker, parts, ray_data

TEXT = "the giant panda is a bear species endemic to china paris france tea green red what how ü 熊猫"
WORDS = TEXT.split()
MODEL = ("--dtype", "float32", "--compile-cache", "none")


def rows(count: int, seed: int, mark: str) -> list[dict[str, Any]]:
    dice = random.Random(seed)

    def text(longest: int) -> str:
        return " ".join(dice.choices(WORDS, k=dice.randint(1, longest)))

    return [
        {"id": f"{mark}{i}", "query": text(8), "documents": [text(40) for _ in range(dice.randint(0, 6))], "n": i}
        for i in range(count)
    ]


def write_lines(file: Path, lines: list[Any], end: str = "\n") -> None:
    file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + end)


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


class TestParts:
    @pytest.mark.parametrize("part_bytes", [1, 7, 100, 1000, 10**6])
    @pytest.mark.parametrize("end", ["\n", ""])
    def test_every_line_is_in_one_part(self, tmp_path: Path, part_bytes: int, end: str) -> None:
        given = rows(20, 5, "a")
        write_lines(tmp_path / "x.jsonl", given, end)
        (source,) = parts.find([str(tmp_path)])
        found, places = [], []
        for part in parts.cut(source, part_bytes):
            lines = parts.Lines(part)
            for number, row in lines.rows():
                found.append(row)
                places.append(lines.where(number))
        assert found == given
        assert places == [f"{tmp_path}/x.jsonl, line {n}" for n in range(1, 21)]

    def test_names_differ_by_file_and_place(self) -> None:
        made = [parts.Part(file, start, 9) for file in ("/a/x.jsonl", "/b/x.jsonl", "/b/x.parquet") for start in (0, 5)]
        assert len({part.name for part in made}) == 6

    def test_a_file_is_there_whole_or_not_at_all(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object) -> None:
            raise OSError("no space left")

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="no space"):
            parts.write(str(tmp_path), "a", b"content")
        assert parts.names_in(str(tmp_path)) == set()
        monkeypatch.undo()
        parts.write(str(tmp_path), "a", b"content")
        assert parts.names_in(str(tmp_path)) == {"a"}
        parts.clear_unfinished(str(tmp_path))
        assert [file.name for file in tmp_path.iterdir()] == ["a"]

    @pytest.mark.parametrize(
        "name, content, said",
        [
            ("x.jsonl.gz", b"", "is none of .jsonl"),
            ("x.parquet", b"no parquet", "is no whole Parquet file"),
            (None, b"", "there is no such file or folder"),
        ],
    )
    def test_files_that_cannot_be_read(self, tmp_path: Path, name: str | None, content: bytes, said: str) -> None:
        file = tmp_path / (name or "gone.jsonl")
        if name:
            file.write_bytes(content)
        with pytest.raises(RequestError, match=said):
            [parts.cut(source, 100) for source in parts.find([str(file)])]


@pytest.fixture(scope="module")
def worker() -> ray_data.Worker:
    return ray_data.Worker(ray_data.parser().parse_args(["in", "--output", "x", *MODEL]))


class TestWorker:
    """Without Ray: what one process does with one part."""

    def outcome(self, worker: ray_data.Worker, file: Path, **changed: object) -> str:
        worker.arguments = Namespace(**{**vars(worker.arguments), "output": str(file.parent / "out"), **changed})
        part = {"file": np.array([str(file)]), "start": np.array([0]), "stop": np.array([1])}
        if file.suffix == ".jsonl":
            part["stop"] = np.array([file.stat().st_size])
        return worker(part)["error"][0]

    @pytest.mark.parametrize(
        "line, said",
        [
            ("[1]", "no JSON object"),
            ("{", "no JSON: "),
            ('{"documents": ["a"]}', "no 'query'"),
            ('{"query": "q", "documents": "a"}', "'documents' is str; it must be a list"),
            ('{"query": "q", "documents": [3]}', "documents[0]"),
            ('{"query": "q", "documents": ["a"], "instruct": "judge"}', "without an instruct"),
        ],
    )
    def test_bad_lines(self, worker: ray_data.Worker, tmp_path: Path, line: str, said: str) -> None:
        write_lines(tmp_path / "in.jsonl", [{"query": "q", "documents": []}, line])
        error = self.outcome(worker, tmp_path / "in.jsonl")
        assert error.startswith(f"{tmp_path}/in.jsonl, line 2: ")
        assert said in error
        assert "--skip-bad-rows" in error

    def test_bad_rows_of_parquet(self, worker: ray_data.Worker, tmp_path: Path) -> None:
        table = pa.table({"q": ["a", None], "d": [["x", "y"], ["z"]], "when": pa.array([1, 2], pa.timestamp("us"))})
        pq.write_table(table, tmp_path / "in.parquet")
        fields = {"query_field": "q", "documents_field": "d"}
        error = self.outcome(worker, tmp_path / "in.parquet", **fields)
        assert error.startswith(f"{tmp_path}/in.parquet, row 1: no 'q'")
        assert self.outcome(worker, tmp_path / "in.parquet", **fields, skip_bad_rows=True) == ""
        (file,) = (tmp_path / "out").glob("*.parquet")
        made = pq.read_table(file)
        assert made.column_names == ["q", "when", "scores"]
        assert made.schema.field("when").type == pa.timestamp("us")
        assert len(made) == 1

    def test_models_that_cannot_be_had(self, tmp_path: Path) -> None:
        lost = ray_data.Worker(ray_data.parser().parse_args(["in", "--output", "x", "--model", str(tmp_path), *MODEL]))
        write_lines(tmp_path / "in.jsonl", rows(1, 1, "a"))
        assert "config.json" in self.outcome(lost, tmp_path / "in.jsonl")
