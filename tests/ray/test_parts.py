"""Parts of a job's input and output, without Ray."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from conftest import rows, write_lines

from jaxrank import RequestError
from jaxrank.offline import parts


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
