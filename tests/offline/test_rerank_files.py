"""`jaxrank rerank` on files: what is read and written, what is refused, and going on after an interruption."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxrank import cli
from jaxrank.offline.journal import Journal
from tests.server.fakes import FakeReranker


class Fake(FakeReranker):
    """Dies in batch number `dies_at`, counted over its life."""

    dies_at: int | None = None

    def score_encoded(self, encoded: Any) -> np.ndarray:
        if len(self.batches) == self.dies_at:
            raise KeyboardInterrupt
        return super().score_encoded(encoded)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    fake = Fake()
    monkeypatch.setattr("jaxrank.cli.model.load", lambda *_, **__: fake)
    return fake


class Files:
    """A corpus of d0 to d99, whose texts begin with their scores, queries q0 to q9, a run of ten candidates each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        draw = random.Random(0)
        self.scores = {f"d{i}": round(draw.uniform(-5, 5), 3) for i in range(100)}
        self.queries = {f"q{i}": f"query {i}" for i in range(10)}
        self.candidates = {query: draw.sample(list(self.scores), 10) for query in self.queries}
        self.corpus = [json.dumps({"_id": d, "title": "", "text": f"{s} {'x' * 7}"}) for d, s in self.scores.items()]
        self.run = [
            f"{query} Q0 {document} {rank} {100 - rank} first"
            for query, documents in self.candidates.items()
            for rank, document in enumerate(documents, 1)
        ]
        self.said = [json.dumps({"_id": q, "text": text}) for q, text in self.queries.items()]

    def write(self) -> list[str]:
        """The files, as flags."""
        flags: list[str] = []
        for name, rows in (("corpus", self.corpus), ("run", self.run), ("queries", self.said)):
            (self.folder / name).write_text("\n".join(rows) + "\n", encoding="utf-8")
            flags += [f"--{name}", str(self.folder / name)]
        return flags


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def rerank(flags: list[str], output: Path, *more: str) -> int:
    return cli.main(["rerank", *flags, "--output", str(output), "--no-progress", *more])


def ranking(output: Path) -> dict[str, list[tuple[str, int, float]]]:
    found: dict[str, list[tuple[str, int, float]]] = {}
    for line in output.read_text().splitlines():
        query, q0, document, rank, score, tag = line.split(" ")
        assert (q0, tag) == ("Q0", "jaxrank")
        found.setdefault(query, []).append((document, int(rank), float(score)))
    return found


class TestRuns:
    def test_a_run(self, fake: Fake, files: Files) -> None:
        output = files.folder / "sub" / "out.trec"
        assert rerank(files.write(), output) == 0
        got = ranking(output)
        assert list(got) == list(files.queries)
        for query, rows in got.items():
            want = sorted(files.candidates[query], key=lambda document: -files.scores[document])
            assert [document for document, _, _ in rows] == want
            assert [rank for _, rank, _ in rows] == list(range(1, 11))
            assert [score for _, _, score in rows] == pytest.approx([files.scores[d] for d in want], rel=1e-6)
        assert sorted(path.name for path in output.parent.iterdir()) == ["out.trec"]

    def test_depth_takes_the_best(self, fake: Fake, files: Files) -> None:
        """By score, not by the order of lines or by rank."""
        random.Random(1).shuffle(files.run)
        output = files.folder / "out.trec"
        assert rerank(files.write(), output, "--depth", "3") == 0
        for query, rows in ranking(output).items():
            assert {document for document, _, _ in rows} == set(files.candidates[query][:3])

    def test_beir(self, fake: Fake, files: Files) -> None:
        flags = files.write()
        (files.folder / "corpus").rename(files.folder / "corpus.jsonl")
        (files.folder / "queries").rename(files.folder / "queries.jsonl")
        (files.folder / "qrels").mkdir()
        (files.folder / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\nq3\td1\t1\nq5\td2\t1\n")
        output = files.folder / "out.trec"
        assert rerank(["--beir", str(files.folder), *flags[2:4], "--split", "dev"], output) == 0
        assert list(ranking(output)) == ["q3", "q5"]

    def test_beir_without_a_run(self, fake: Fake, files: Files) -> None:
        files.corpus = [
            json.dumps({"_id": f"d{i}", "text": f"{i} about {word}"})
            for i, word in enumerate(["pandas", "rain", "tea"] * 4)
        ]
        files.said = [json.dumps({"_id": "q0", "text": "does rain fall"}), json.dumps({"_id": "q1", "text": "tea"})]
        files.write()
        (files.folder / "corpus").rename(files.folder / "corpus.jsonl")
        (files.folder / "queries").rename(files.folder / "queries.jsonl")
        (files.folder / "qrels").mkdir()
        (files.folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq0\td1\t1\nq1\td2\t1\n")
        output = files.folder / "out.trec"
        assert rerank(["--beir", str(files.folder)], output, "--depth", "4") == 0
        assert [document for document, _, _ in ranking(output)["q0"]] == ["d10", "d7", "d4", "d1"]
        assert [document for document, _, _ in ranking(output)["q1"]] == ["d11", "d8", "d5", "d2"]
        first = (files.folder / "out.trec.bm25").read_text().splitlines()
        assert [line.split()[2] for line in first[:4]] == ["d1", "d4", "d7", "d10"]

    def test_as_jsonl(self, fake: Fake, files: Files) -> None:
        output = files.folder / "out.jsonl"
        assert rerank(files.write(), output, "--format", "jsonl") == 0
        rows = [json.loads(line) for line in output.read_text().splitlines()]
        assert [row["_id"] for row in rows] == list(files.queries)
        best = rows[0]["results"][0]
        assert best["id"] == max(files.candidates["q0"], key=lambda document: files.scores[document])
        assert best["score"] == pytest.approx(1 / (1 + np.exp(-files.scores[best["id"]])), rel=1e-6)

    def test_titles_and_other_names(self, fake: Fake, files: Files) -> None:
        files.corpus[0] = json.dumps({"docid": "d0", "title": "9.5 title", "contents": "and text"})
        files.corpus[1] = json.dumps({"id": 1, "body": "9.25 é"})
        files.run = ["q0 Q0 d0 1 2 x", "q0\tQ0\t1\t2\t1\tx"]
        files.said = ["q0\ta query in tabs"]
        output = files.folder / "out.trec"
        assert rerank(files.write(), output) == 0
        assert ranking(output) == {"q0": [("d0", 1, 9.5), ("1", 2, 9.25)]}
        assert sorted(fake.batches[0]) == [len("9.25 é"), len("9.5 title and text")]


class TestRequests:
    def test_jsonl_of_requests(self, fake: Fake, tmp_path: Path) -> None:
        source = tmp_path / "requests.jsonl"
        rows = [
            {"query": "a", "documents": ["1 é", "3 three", "2 two"]},
            {"_id": "named", "query": "b", "documents": [{"_id": "x", "text": "1"}, {"title": "2", "text": "t"}]},
        ]
        source.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
        output = tmp_path / "out.jsonl"
        assert rerank(["--requests", str(source)], output) == 0
        got = [json.loads(line) for line in output.read_text().splitlines()]
        assert [[one["index"] for one in row["results"]] for row in got] == [[1, 2, 0], [1, 0]]
        assert [row["_id"] for row in got] == ["0", "named"]
        assert [one["id"] for one in got[1]["results"]] == ["1", "x"]


class TestLongDocuments:
    def test_windows(self, fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """The fake cuts at 500 characters with the query; a piece's score is the number that it begins with."""
        source, query = tmp_path / "requests.jsonl", "q" * 490
        rows = [{"query": query, "documents": ["1 234567897 abc", "3 short", "2 234567899 234567894"]}] * 2
        source.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        output = tmp_path / "out.jsonl"
        assert rerank(["--requests", str(source)], output, "--long-document", "window") == 0
        assert "6 pairs scored" in capsys.readouterr().out
        for row in map(json.loads, output.read_text().splitlines()):
            assert [(one["index"], one["window"]) for one in row["results"]] == [
                (2, [10, 20]),
                (0, [10, 15]),
                (1, [0, 7]),
            ]
        run = tmp_path / "out.trec"
        flags = ["--requests", str(source), "--format", "trec"]
        assert rerank(flags, run, "--long-document", "window") == 0
        assert [float(line.split()[4]) for line in run.read_text().splitlines()] == [9, 7, 3] * 2
        assert rerank(flags, run, "--restart") == 0
        assert [float(line.split()[4]) for line in run.read_text().splitlines()] == [3, 2, 1] * 2

    def test_unknown_ways(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            cli.main(["rerank", "q", "--long-document", "windows"])
        assert "invalid choice: 'windows' (choose from" in capsys.readouterr().err


class TestBadRows:
    @pytest.mark.parametrize(
        "name, line, what",
        [
            ("corpus", "{", "no JSON"),
            ("corpus", '{"_id": "e"}', "no document"),
            ("corpus", '{"_id": "a b", "text": "t"}', "no document"),
            ("corpus", '{"_id": "e", "text": "\\ud800"}', "no document"),
            ("said", "[1]", "no query"),
            ("said", '{"_id": "q1", "text": "again"}', "query q1 is there twice"),
            ("run", "q0 Q0 d0 1 2", "no line of a TREC run"),
            ("run", "q0 Q0 d0 1 high x", "no line of a TREC run"),
            ("run", "q0 Q0 d0 1 nan x", "no line of a TREC run"),
            ("run", "q77 Q0 d0 1 2 x", "query q77 is not in"),
            ("run", "q0 Q0 d777 1 2 x", "document d777 is not in"),
        ],
    )
    def test_stops_or_skips(
        self, fake: Fake, files: Files, capsys: pytest.CaptureFixture[str], name: str, line: str, what: str
    ) -> None:
        rows: list[str] = getattr(files, name)
        rows.insert(7, line)
        flags, output = files.write(), files.folder / "out.trec"
        path = files.folder / ("queries" if name == "said" else name)
        assert rerank(flags, output) == 1
        assert f"jaxrank: error: {path} line 8: {what}" in (said := capsys.readouterr().err)
        assert "--skip-bad" in said
        assert not fake.batches
        assert rerank(flags, output, "--skip-bad") == 0
        told = capsys.readouterr()
        assert f"skipped {path} line 8: {what}" in told.err
        assert "100 pairs scored, 1 bad rows left out" in told.out
        assert {query: len(rows) for query, rows in ranking(output).items()} == dict.fromkeys(files.queries, 10)

    def test_twice_in_a_run(self, fake: Fake, files: Files, capsys: pytest.CaptureFixture[str]) -> None:
        files.run.append(files.run[4])
        assert rerank(files.write(), files.folder / "out.trec") == 1
        assert "line 101: document" in capsys.readouterr().err

    def test_twice_in_the_corpus(self, fake: Fake, files: Files, capsys: pytest.CaptureFixture[str]) -> None:
        files.corpus.append(files.corpus[41])
        assert rerank(files.write(), files.folder / "out.trec") == 1
        assert "corpus line 101: document d41 is there twice" in capsys.readouterr().err

    @pytest.mark.parametrize(
        "line", ['{"query": "a"}', '{"query": "a", "documents": []}', '{"query": 1, "documents": ["a"]}',
                 '{"query": "a", "documents": ["a", 1]}', '{"query": "\\udfff", "documents": ["a"]}', "nonsense"]
    )  # fmt: skip
    def test_bad_requests(self, fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str) -> None:
        source, output = tmp_path / "requests.jsonl", tmp_path / "out.jsonl"
        source.write_text('{"query": "a", "documents": ["1"]}\n' + line + "\n")
        assert rerank(["--requests", str(source)], output) == 1
        assert "requests.jsonl line 2: " in capsys.readouterr().err
        assert rerank(["--requests", str(source)], output, "--skip-bad") == 0
        assert len(output.read_text().splitlines()) == 1


class TestInterrupted:
    """At any batch, and with what a crash leaves behind the journal's last word."""

    @pytest.mark.parametrize("kind", ["run", "requests"])
    def test_goes_on_to_the_same_bytes(self, fake: Fake, files: Files, kind: str) -> None:
        flags = files.write()
        if kind == "requests":
            source = files.folder / "requests.jsonl"
            rows = [{"query": q, "documents": [f"{i} {q} {'x' * 20}" for i in range(5)]} for q in files.queries]
            source.write_text("\n".join(map(json.dumps, rows)))
            flags = ["--requests", str(source)]
        whole, output = files.folder / "whole", files.folder / "out"
        assert rerank(flags, whole, "--batch-tokens", "100") == 0
        batches = list(fake.batches)
        assert len(batches) > 4
        fake.batches.clear()
        for dies_at in range(len(batches)):
            fake.dies_at = dies_at
            assert rerank(flags, output, "--batch-tokens", "100") == 130
            with (files.folder / "out.part").open("ab") as part:
                part.write(b"q9 Q0 half a li")
        fake.dies_at = None
        assert rerank(flags, output, "--batch-tokens", "100") == 0
        assert output.read_bytes() == whole.read_bytes()
        assert fake.batches == batches  # nothing was scored twice
        assert {path.name for path in files.folder.glob("out*")} == {"out"}

    def test_other_settings_or_files(self, fake: Fake, files: Files, capsys: pytest.CaptureFixture[str]) -> None:
        flags, output = files.write(), files.folder / "out"
        fake.dies_at = 2
        more = ["--batch-tokens", "100"]
        assert rerank(flags, output, *more) == 130
        fake.dies_at = None
        assert rerank(flags, output, *more, "--depth", "5") == 1
        assert "was begun with other settings (depth)" in capsys.readouterr().err
        assert rerank(flags, output) == 1
        assert "(batch_tokens)" in capsys.readouterr().err
        files.corpus[0] = json.dumps({"_id": "d0", "text": "4.75 changed"})
        files.write()
        assert rerank(flags, output, *more) == 1
        assert "(files)" in capsys.readouterr().err
        assert rerank(flags, output, *more, "--restart") == 0
        scores = [score for rows in ranking(output).values() for document, _, score in rows if document == "d0"]
        assert set(scores) <= {4.75}

    def test_no_output_is_lost(self, fake: Fake, files: Files, capsys: pytest.CaptureFixture[str]) -> None:
        flags, output = files.write(), files.folder / "out"
        output.write_text("mine")
        assert rerank(flags, output) == 1
        assert "is there already" in capsys.readouterr().err
        assert output.read_text() == "mine"

    def test_a_damaged_journal(self, tmp_path: Path, fake: Fake, files: Files, capsys: Any) -> None:
        (tmp_path / "out.journal").write_text("{")
        assert rerank(files.write(), tmp_path / "out") == 1
        assert "start anew with --restart" in capsys.readouterr().err

    def test_a_part_that_is_too_short(self, tmp_path: Path, fake: Fake, files: Files, capsys: Any) -> None:
        journal = Journal(tmp_path / "a", {})
        journal.add(b"0123", 1)
        journal.close()
        (tmp_path / "a.part").write_bytes(b"01")
        with pytest.raises(Exception, match="shorter than"):
            Journal(tmp_path / "a", {})


class TestArguments:
    @pytest.mark.parametrize(
        "argv, what",
        [
            ([], "no query"),
            (["q", "--run", "r", "--output", "o"], "a query and --run"),
            (["--run", "r"], "no --output"),
            (["--run", "r", "--output", "o"], "no --corpus"),
            (["--requests", "r", "--corpus", "c", "--output", "o"], "leave out --run, --corpus"),
            (["--requests", "nowhere", "--output", "o"], "nowhere: No such file"),
            (["--requests", "r", "--format", "table", "--output", "o"], "are for a query on the command line"),
            (["q", "--format", "trec"], "are for files"),
        ],
    )
    def test_refused(
        self, fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
        argv: list[str], what: str,
    ) -> None:  # fmt: skip
        monkeypatch.chdir(tmp_path)
        assert cli.main(["rerank", *argv]) == 1
        assert what in capsys.readouterr().err
