"""Files of rows to rerank, cut into parts: each part's rows, and its output, which is complete or not there.

JSON lines (.jsonl, .ndjson) are cut by bytes: a part has the lines that begin in its range. So no file is read through
to be cut. A Parquet file's row groups are its parts. Files are given by local paths or addresses of pyarrow.fs (gs://,
s3://).
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import pyarrow as pa  # pyright: ignore[reportMissingImports]
from pyarrow import fs  # pyright: ignore[reportMissingImports]
from pyarrow import parquet as pq  # pyright: ignore[reportMissingImports]

from jaxrank.errors import RequestError
from jaxrank.offline.rows import json_object

LINES, COLUMNS = (".jsonl", ".ndjson"), (".parquet",)
UNFINISHED = "_unfinished"
"""The folder of outputs that are not complete yet. Readers of data sets skip names that begin with an underscore."""


@dataclass(frozen=True)
class Part:
    """Some rows of a file: lines that begin in bytes [start, stop), or row groups [start, stop)."""

    file: str
    start: int
    stop: int

    @property
    def name(self) -> str:
        """The name of its output. It is the same in every run over the same file."""
        path = PurePosixPath(self.file)
        suffix = ".parquet" if path.suffix in COLUMNS else ".jsonl"
        return f"{path.stem}-{hashlib.sha256(self.file.encode()).hexdigest()[:8]}-{self.start:015}{suffix}"


@dataclass(frozen=True)
class Source:
    """An input file, as it was when the job began. `changed` is its time of change, in nanoseconds."""

    file: str
    size: int
    changed: int


def opened(place: str) -> tuple[Any, str]:
    """Return the file system of a path or address, and the path in it.

    Raises:
        RequestError: the place is not valid.
    """
    try:
        return fs.FileSystem.from_uri(place if "://" in place else str(Path(place).absolute()))
    except (pa.ArrowException, ValueError) as error:
        raise RequestError(f"{place} is no place of files: {error}; give a path, or an address like gs://") from None


def find(places: Sequence[str]) -> list[Source]:
    """Return the input files, in order. A folder gives all files under it.

    Raises:
        RequestError: a place does not exist, or a file has another format.
    """
    found: list[Source] = []
    for place in places:
        system, path = opened(place)
        (one,) = system.get_file_info([path])
        if one.type == fs.FileType.NotFound:
            raise RequestError(f"{place}: there is no such file or folder")
        if one.type == fs.FileType.Directory:
            infos = system.get_file_info(fs.FileSelector(path, recursive=True))
            infos = [info for info in infos if info.is_file and PurePosixPath(info.path).suffix in LINES + COLUMNS]
        else:
            infos = [one]
        scheme = place.partition("://")[0] + "://" if "://" in place else ""
        found += [Source(scheme + info.path, info.size, info.mtime_ns or 0) for info in infos]
    found = sorted(set(found), key=lambda source: source.file)
    if not found:
        raise RequestError(f"no files {', '.join(LINES + COLUMNS)} in {', '.join(places)}")
    for source in found:
        if PurePosixPath(source.file).suffix not in LINES + COLUMNS:
            raise RequestError(f"{source.file} is none of {', '.join(LINES + COLUMNS)}; unpack or convert it first")
    return found


def cut(source: Source, part_bytes: int) -> list[Part]:
    """Return the parts of a file. `part_bytes` is the size of a part of lines."""
    if PurePosixPath(source.file).suffix in LINES:
        ends = range(0, source.size, part_bytes)
        return [Part(source.file, start, min(start + part_bytes, source.size)) for start in ends]
    with _open(source.file) as stream:
        groups = _parquet(source.file, stream).metadata.num_row_groups
    return [Part(source.file, group, group + 1) for group in range(groups)]


class Lines:
    """The rows of a part of JSON lines."""

    def __init__(self, part: Part) -> None:
        self._part = part
        with _open(part.file) as stream:
            at = part.start
            if at:  # skip the end of a line that began before; it is empty if a line ends here
                stream.seek(at - 1)
                at += len(stream.readline()) - 1
            self._begin = at
            self._lines: list[bytes] = []
            while at < part.stop and (line := stream.readline()):
                self._lines.append(line)
                at += len(line)

    def rows(self) -> Iterator[tuple[int, Any]]:
        """Yield (number of the line in the part, from 0; its content, or the RequestError that says why it holds no
        row)."""
        for number, line in enumerate(self._lines):
            if line.strip():
                row = json_object(line)
                yield number, RequestError(row) if isinstance(row, str) else row

    def where(self, number: int) -> str:
        return f"{self._part.file}, line {self._lines_before + number + 1}"

    @cached_property
    def _lines_before(self) -> int:
        """Return the number of lines before the part. It is read only for messages."""
        count, left = 0, self._begin
        with _open(self._part.file) as stream:
            while left:
                piece = stream.read(min(left, 1 << 20))
                count += piece.count(b"\n")
                left -= len(piece)
        return count

    def output(self, scores: dict[int, list[float]], rows: dict[int, Any], without: str) -> bytes:
        """Return a line for each row that has scores: the row without its documents, with the scores."""
        made = []
        for number, of_row in scores.items():
            kept = {name: value for name, value in rows[number].items() if name != without}
            made.append(json.dumps({**kept, "scores": of_row}, ensure_ascii=False) + "\n")
        return "".join(made).encode("utf-8", "surrogatepass")


class Columns:
    """The rows of a row group of a Parquet file."""

    def __init__(self, part: Part, names: Sequence[str]) -> None:
        self._part = part
        with _open(part.file) as stream:
            file = _parquet(part.file, stream)
            before = (file.metadata.row_group(group).num_rows for group in range(part.start))
            self._rows_before = sum(before)
            self._table = file.read_row_group(part.start)
        self._names = [name for name in names if name in self._table.column_names]

    def rows(self) -> Iterator[tuple[int, Any]]:
        yield from enumerate(self._table.select(self._names).to_pylist())

    def where(self, number: int) -> str:
        return f"{self._part.file}, row {self._rows_before + number}"

    def output(self, scores: dict[int, list[float]], rows: dict[int, Any], without: str) -> bytes:
        """Return the columns without the documents, and `scores`."""
        table = self._table.take(list(scores))
        table = table.drop_columns([name for name in (without, "scores") if name in table.column_names])
        table = table.append_column("scores", pa.array(list(scores.values()), pa.list_(pa.float32())))
        made = io.BytesIO()
        pq.write_table(table, made, compression="zstd")
        return made.getvalue()


def read(part: Part, names: Sequence[str]) -> Lines | Columns:
    """Return the rows of a part. `names` are the names of the columns that are needed.

    Raises:
        RequestError: the file cannot be read.
    """
    return Lines(part) if PurePosixPath(part.file).suffix in LINES else Columns(part, names)


def write(folder: str, name: str, content: bytes) -> None:
    """Write the file `name` in a folder, or below it. An existing file is replaced.

    The file is complete or not there, whenever the process ends.
    """
    system, path = opened(folder)
    unfinished, final = f"{path}/{UNFINISHED}/{uuid.uuid4().hex}", f"{path}/{name}"
    for place in (unfinished, final):
        system.create_dir(str(PurePosixPath(place).parent), recursive=True)
    with system.open_output_stream(unfinished) as out:
        out.write(content)
    if isinstance(system, fs.LocalFileSystem):  # after a power cut the name must not exist without the content
        with open(unfinished, "rb") as file:
            os.fsync(file.fileno())
    system.move(unfinished, final)


def names_in(folder: str) -> set[str]:
    """Return the files in a folder, or none if there is no folder."""
    system, path = opened(folder)
    infos = system.get_file_info(fs.FileSelector(path, allow_not_found=True))
    return {info.base_name for info in infos if info.is_file}


def content_of(folder: str, name: str) -> bytes:
    """Return the content of a file in a folder."""
    with _open(f"{folder}/{name}") as stream:
        return stream.read()


def clear_unfinished(folder: str) -> None:
    """Remove what was never finished. Call it only when nothing writes any more."""
    system, path = opened(folder)
    if system.get_file_info(f"{path}/{UNFINISHED}").type == fs.FileType.Directory:
        system.delete_dir(f"{path}/{UNFINISHED}")


def _open(file: str) -> BinaryIO:
    system, path = opened(file)
    return io.BufferedReader(system.open_input_file(path), 1 << 16)


def _parquet(file: str, stream: BinaryIO) -> Any:
    try:
        return pq.ParquetFile(stream)
    except pa.ArrowException as error:
        raise RequestError(f"{file} is no whole Parquet file: {error}") from None
