"""`jaxrank rerank`: what it prints, its exit status, and one clear line for whatever goes wrong."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from jaxrank import cli
from jaxrank.types import Ranked
from tests.cli.commands import NO_CACHE, PANDA, Run, complaint, standard_input


class Longest:
    """Instead of a model: the longer the better."""

    def rank(
        self, query: str, documents: list[str], *, top_n: int | None, long_document: str, progress: bool
    ) -> list[Ranked]:
        if query == "wait":
            raise KeyboardInterrupt
        ranked = [Ranked(i, len(text) / 1000, text) for i, text in enumerate(documents)]
        return sorted(ranked, key=lambda item: -item.score)[:top_n]


@pytest.fixture
def longest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxrank.cli.model.load", lambda *_, **__: Longest())


class TestRerank:
    @pytest.mark.parametrize("stdin, top_n", [(False, 3), (True, 2)], ids=["file", "standard input"])
    def test_builtin_model(
        self, run: Run, documents: Path, monkeypatch: pytest.MonkeyPatch, stdin: bool, top_n: int
    ) -> None:
        standard_input(monkeypatch, documents.read_bytes() if stdin else b"")
        place = "-" if stdin else documents
        status, out, err = run("rerank", "what is panda?", place, "--top-n", top_n, *NO_CACHE)
        assert (status, err) == (0, "")
        lines = [json.loads(line) for line in out.splitlines()]
        assert [list(line) for line in lines] == [["index", "score", "document"]] * top_n
        assert lines[0]["index"] == 1, "blank lines are not counted"
        assert lines[0]["document"] == PANDA
        scores = [line["score"] for line in lines]
        assert scores == sorted(scores, reverse=True)
        assert 1 > scores[0] > 2 * scores[1] > 0

    def test_windows_of_long_documents(
        self, run: Run, documents: Path, monkeypatch: pytest.MonkeyPatch, longest: None
    ) -> None:
        def rank(self: Longest, query: str, documents: list[str], **asked: Any) -> list[Ranked]:
            return [Ranked(0, 0.5, "a passage", (2, 9) if asked["long_document"] == "window" else None)]

        monkeypatch.setattr(Longest, "rank", rank)
        status, out, _ = run("rerank", "q", documents, "--format", "jsonl", "--long-document", "window")
        assert (status, json.loads(out)) == (0, {"index": 0, "score": 0.5, "document": "a passage", "window": [2, 9]})
        assert "window" not in json.loads(run("rerank", "q", documents, "--format", "jsonl").out)

    @pytest.mark.parametrize("terminal", [True, False])
    @pytest.mark.parametrize("form", ["auto", "table", "jsonl"])
    @pytest.mark.usefixtures("longest")
    def test_table_on_a_terminal_and_json_in_a_pipe(
        self, run: Run, documents: Path, monkeypatch: pytest.MonkeyPatch, terminal: bool, form: str
    ) -> None:
        monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
        monkeypatch.setenv("COLUMNS", "60")
        status, out, _ = run("rerank", "q", documents, "--top-n", 1, "--format", form)
        assert status == 0
        if form == "table" or (form == "auto" and terminal):
            text = "The giant panda (Ailuropoda melanol…"
            assert out == f"rank    score   index  document\n   1   0.1240       1  {text}\n"
        else:
            assert json.loads(out) == {"index": 1, "score": 0.124, "document": PANDA}

    @pytest.mark.parametrize(
        "text, shown",
        [
            ("x" * 37, "x" * 35 + "…"),
            ("北京" * 30, "北京" * 8 + "北…"),  # two columns each
            ("北" * 18, "北" * 18),
            ("a\tb\x1b[31mred\x07   c", "a b [31mred c"),
            ("word " * 7, "word word word word word word word"),
        ],
    )
    def test_table_fits_the_terminal(self, text: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("COLUMNS", "60")
        out = io.StringIO()
        cli.rerank.write_table([Ranked(12, 0.5, text)], out)
        assert out.getvalue().splitlines()[1] == f"   1   0.5000      12  {shown}"

    @pytest.mark.usefixtures("longest")
    def test_a_line_is_a_document(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        """Form feeds and Unicode's separators stay within one, as they do for every other tool that reads lines."""
        standard_input(monkeypatch, "a\r\n\r\nb\u2028bb\n c\x0cccc\x85c \r北京北京北京北京".encode())
        status, out, _ = run("rerank", "q", "--format", "jsonl")
        got = {line["index"]: line["document"] for line in map(json.loads, out.split("\n")[:-1])}
        assert (status, got) == (0, {0: "a", 1: "b\u2028bb", 2: " c\x0cccc\x85c ", 3: "北京北京北京北京"})

    @pytest.mark.usefixtures("longest")
    def test_interrupted(self, run: Run, documents: Path) -> None:
        assert run("rerank", "wait", documents) == (130, "", "")

    @pytest.mark.parametrize(
        "content, message",
        [
            (b"good\nbad \xff\n", "not UTF-8 text at byte 9"),
            (b"", "no documents; one a line is read, blank lines are skipped"),
            (b"\n  \n\t\n", "no documents"),
        ],
    )
    def test_bad_documents(
        self, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, message: str
    ) -> None:
        path = tmp_path / "documents.txt"
        path.write_bytes(content)
        assert f"error: {path}: {message}" in complaint(run("rerank", "q", path))
        standard_input(monkeypatch, content)
        assert f"error: standard input: {message}" in complaint(run("rerank", "q"))

    def test_no_file(self, run: Run, tmp_path: Path) -> None:
        assert f"{tmp_path}/x: No such file or directory; give a" in complaint(run("rerank", "q", tmp_path / "x"))
        assert f"{tmp_path}: Is a directory; give a text file" in complaint(run("rerank", "q", tmp_path))

    @pytest.mark.parametrize(
        "query, flags, message",
        [
            ("q", "--top-n 0", "top_n is 0; it must be at least 1"),
            ("q", "--max-model-len 7", "max_length is 7; this model takes 8 to 128 tokens"),
            ("q", "--context-length 129", "max_length is 129; this model takes 8 to 128 tokens"),
            ("q", "--row-tokens 1000000", "row_tokens is 1000000; a row takes 1 to 49152 tokens"),
            # bytes of the command line that are not UTF-8 arrive as lone surrogates
            (os.fsdecode(b"caf\xe9"), "", "query contains a lone surrogate at character 3"),
        ],
    )
    def test_bad_arguments(self, run: Run, source: Path, documents: Path, query: str, flags: str, message: str) -> None:
        assert message in complaint(run("rerank", query, documents, "--model", source, *flags.split(), *NO_CACHE))
