"""`jaxrank evaluate`: computes measures of runs, and tests whether they differ from the first run."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from jaxrank.offline.measures import Evaluation


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the command's flags to a parser."""
    command.add_argument("runs", nargs="+", metavar="RUN", help="TREC runs; each is compared with the first one")
    command.add_argument("--qrels", required=True, metavar="FILE", help="judgements, in the form of TREC or BEIR")
    command.add_argument("--measures", default="nDCG@10,RR@10,AP,R@100", metavar="A,B",
                         help="measures, by the names of ir-measures; default: %(default)s")  # fmt: skip
    command.add_argument(
        "--output", metavar="FILE", help="also write all results as JSON, including the values of every query"
    )
    command.add_argument(
        "--plot", metavar="FILE", help="write an image of the measures and the distributions of scores"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the command and return its exit status.

    Raises:
        RequestError: A run is named twice, or an input is not valid.
    """
    from jaxrank.errors import RequestError
    from jaxrank.offline import measures

    names = [name.strip() for name in arguments.measures.split(",") if name.strip()]
    measures.parse_measures(names)
    if len(set(arguments.runs)) < len(arguments.runs):
        raise RequestError("a run is named twice")
    runs = {name: measures.load_run(Path(name)) for name in arguments.runs}
    queries, evaluations = measures.evaluate(runs, Path(arguments.qrels), names)
    write_table(evaluations, len(queries), sys.stdout)
    if arguments.output:
        said = {
            "qrels": arguments.qrels,
            "queries": queries,
            "runs": [
                {"run": one.name, "mean": one.mean, "p": one.p,
                 "values": {name: values.tolist() for name, values in one.values.items()}}
                for one in evaluations
            ],
        }  # fmt: skip
        Path(arguments.output).write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
    if arguments.plot:
        measures.plot(evaluations, runs, Path(arguments.qrels), Path(arguments.plot))
    return 0


def write_table(evaluations: Sequence[Evaluation], queries: int, out: TextIO) -> None:
    """Write one row for each run. * and ** mark means that differ from the first run's, p < 0.05 and p < 0.01."""
    names = list(evaluations[0].mean)
    width = max(len(one.name) for one in evaluations)
    print(f"{'run':<{width}}", *(f"{name:>10}" for name in names), file=out)
    for one in evaluations:
        cells = [f"{one.mean[name]:.4f}{stars(one.p[name]):<2}" for name in names]
        print(f"{one.name:<{width}}", *(f"{cell:>10}" for cell in cells), file=out)
    several = "; * p < 0.05, ** p < 0.01 against the first run (paired t-test)" if len(evaluations) > 1 else ""
    print(f"means over {queries} judged queries{several}", file=out)


def stars(p: float | None) -> str:
    """Return the mark for the significance of a difference."""
    return "" if p is None or p >= 0.05 else "*" if p >= 0.01 else "**"
