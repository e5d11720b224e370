"""What one process of a job does with one part, without Ray."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from conftest import MODEL, rows, write_lines
from pyarrow import parquet as pq

from jaxrank import ray_data


@pytest.fixture(scope="module")
def worker() -> ray_data.Worker:
    return ray_data.Worker(ray_data.parser().parse_args(["in", "--output", "x", *MODEL]))


class TestWorker:
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
