"""The quality of runs: measures by ir-measures, and how certain their differences are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxrank.errors import RequestError
from jaxrank.offline.rows import BadRows
from jaxrank.offline.trec import read_qrels, read_run

MEASURES = ("nDCG@10", "RR@10", "AP", "R@100")

Run = dict[str, dict[str, float]]
"""Scores by query and document."""


@dataclass(frozen=True)
class Evaluation:
    """The evaluation of one run.

    Attributes:
        mean: the mean of each measure.
        values: by measure, the value of every judged query, in the order of `queries`. It is 0 for queries that the run
            does not have.
        p: the p-value of a paired two-sided t-test against the first run. It is None for the first run, and if nothing
            differs.
    """

    name: str
    mean: dict[str, float]
    values: dict[str, np.ndarray]
    p: dict[str, float | None]


def load_run(path: Path) -> Run:
    """Read a TREC run.

    Raises:
        RequestError: the file is not a run. The message has the line.
    """
    scores: Run = {}
    for line, query, document, score in read_run(path, BadRows(skip=False)):
        of_query = scores.setdefault(query, {})
        if document in of_query:
            raise RequestError(f"{path} line {line}: document {document} is there twice for query {query}")
        of_query[document] = score
    if not scores:
        raise RequestError(f"{path}: no candidates")
    return scores


def parse_measures(names: Sequence[str]) -> list[Any]:
    """Return ir-measures' objects for these names.

    Raises:
        RequestError: a name is no measure, or ir-measures is not installed.
    """
    try:
        import ir_measures
    except ImportError:
        raise RequestError("measures need ir-measures: pip install 'jaxrank[research]'") from None
    measures: list[Any] = []
    for name in names:
        try:
            measures.append(ir_measures.parse_measure(name))
        except (ValueError, NameError, SyntaxError):
            raise RequestError(f"{name!r} is no measure; such are nDCG@10, RR@10, AP, R@100, P@5") from None
    return measures


def evaluate(
    runs: Mapping[str, Run], qrels: Path, names: Sequence[str] = MEASURES
) -> tuple[list[str], list[Evaluation]]:
    """Return the judged queries, and the evaluation of each run, in order.

    Averages are over all judged queries, as in trec_eval -c.

    Raises:
        RequestError: a run has none of the judged queries.
    """
    import ir_measures
    from scipy.stats import ttest_rel

    measures = parse_measures(names)
    judged = read_qrels(qrels)
    queries = sorted(judged)
    evaluations: list[Evaluation] = []
    for name, run in runs.items():
        if not judged.keys() & run.keys():
            raise RequestError(f"{name} has none of the queries that {qrels} judges; are both of one collection?")
        values = {str(measure): np.zeros(len(queries)) for measure in measures}
        places = {query: place for place, query in enumerate(queries)}
        for one in ir_measures.iter_calc(measures, judged, run):
            values[str(one.measure)][places[one.query_id]] = one.value
        p: dict[str, float | None] = dict.fromkeys(values)
        if evaluations:
            for measure, own in values.items():
                first = evaluations[0].values[measure]
                if len(queries) > 1 and np.any(own != first):
                    p[measure] = float(ttest_rel(own, first).pvalue)
        mean = {measure: float(own.mean()) for measure, own in values.items()}
        evaluations.append(Evaluation(name, mean, values, p))
    return queries, evaluations


def plot(evaluations: Sequence[Evaluation], runs: Mapping[str, Run], qrels: Path, output: Path) -> None:
    """Draw measures as bars, and the scores of judged documents by relevance for each run, into an image file.

    Raises:
        RequestError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise RequestError("plots need matplotlib: pip install 'jaxrank[research]'") from None
    judged = read_qrels(qrels)
    figure = Figure(figsize=(5 + 4 * len(runs), 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(1, 1 + len(runs), squeeze=False)[0]
    names = list(evaluations[0].mean)
    width = 0.8 / len(evaluations)
    for i, one in enumerate(evaluations):
        axes[0].bar(np.arange(len(names)) + i * width, [one.mean[name] for name in names], width, label=one.name)
    axes[0].set_xticks(np.arange(len(names)) + 0.4 - width / 2, names)
    axes[0].set_ylim(0, 1)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=len(evaluations))
    for ax, (name, run) in zip(axes[1:], runs.items(), strict=True):
        relevant: list[float] = []
        others: list[float] = []
        for query, documents in run.items():
            for document, score in documents.items():
                (relevant if judged.get(query, {}).get(document, 0) > 0 else others).append(score)
        bins: Any = np.histogram_bin_edges([*relevant, *others] or [0.0], 40)
        ax.hist([relevant, others], bins, label=["relevant", "others"], density=True)
        ax.set_title(name)
        ax.set_xlabel("score")
        ax.legend()
    figure.savefig(output)
