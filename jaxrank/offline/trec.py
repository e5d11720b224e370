"""Files of TREC: runs (`query Q0 document rank score tag`) and relevance judgements, also in the form of BEIR."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from jaxrank.errors import RequestError
from jaxrank.offline.rows import BadRows, lines


def read_run(path: Path, bad: BadRows) -> Iterator[tuple[int, str, str, float]]:
    """Yield the line number, query, document and score of every line. Ranks are not read, as in trec_eval.

    Raises:
        RequestError: the file cannot be read.
        BadRow: a line is bad, and `bad` does not skip it.
    """
    for number, _, line in lines(path):
        fields = line.decode("utf-8", "replace").split()
        try:
            if len(fields) != 6:
                raise ValueError
            score = float(fields[4])
            if math.isnan(score):
                raise ValueError
        except ValueError:
            bad.add(path, number, "no line of a TREC run, which looks like `query Q0 document rank score tag`")
            continue
        yield number, fields[0], fields[2], score


def write_run_line(query: str, document: str, rank: int, score: float, tag: str) -> str:
    """Return one line. Nine digits are enough to tell every float32 from its neighbours."""
    return f"{query} Q0 {document} {rank} {score:.9g} {tag}\n"


def read_qrels(path: Path) -> dict[str, dict[str, int]]:
    """Return relevance by query and document.

    Lines are `query 0 document relevance`, or BEIR's three columns with a header.

    Raises:
        RequestError: a line is neither, or there are none.
    """
    judged: dict[str, dict[str, int]] = {}
    for number, _, line in lines(path):
        fields = line.decode("utf-8", "replace").split()
        if number == 1 and fields[-1].lower() in ("score", "relevance"):
            continue
        try:
            if len(fields) not in (3, 4):
                raise ValueError
            judged.setdefault(fields[0], {})[fields[-2]] = int(fields[-1])
        except ValueError:
            raise RequestError(
                f"{path} line {number}: no judgement; one looks like `query 0 document 1`, or as BEIR's "
                "`query document 1` in tabs"
            ) from None
    if not judged:
        raise RequestError(f"{path}: no judgements")
    return judged
