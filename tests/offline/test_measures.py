"""`jaxrank evaluate`: pytrec_eval's figures, and errors."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from jaxrank import cli


@pytest.fixture
def collection(tmp_path: Path) -> Path:
    """Judgements of 30 queries and two runs with many ties; the second lacks queries, and has others."""
    draw = random.Random(3)
    documents = [f"d{i}" for i in range(60)]
    lines = []
    for query in range(30):
        lines += [f"q{query} 0 {d} {draw.choice([0, 1, 1, 2])}\n" for d in draw.sample(documents, 12)]
    (tmp_path / "qrels").write_text("".join(lines))
    for name, queries in (("a.run", range(30)), ("b.run", range(5, 35))):
        rows = [
            f"q{query} Q0 {document} 0 {draw.randint(0, 6) / 2} x\n"
            for query in queries
            for document in draw.sample(documents, 40)
        ]
        (tmp_path / name).write_text("".join(rows))
    return tmp_path


def test_pytrec_evals_figures(collection: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By trec_eval's own code, missing queries as zeros."""
    import pytrec_eval
    from scipy.stats import ttest_rel

    argv = [str(collection / "a.run"), str(collection / "b.run"), "--qrels", str(collection / "qrels")]
    out = collection / "out.json"
    assert cli.main(["evaluate", *argv, "--measures", "nDCG@10,AP,RR,R@20", "--output", str(out)]) == 0
    said = json.loads(out.read_text())
    qrels: dict[str, dict[str, int]] = {}
    for line in (collection / "qrels").read_text().splitlines():
        query, _, document, relevance = line.split()
        qrels.setdefault(query, {})[document] = int(relevance)
    names = {"nDCG@10": "ndcg_cut_10", "AP": "map", "RR": "recip_rank", "R@20": "recall_20"}
    theirs = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10", "map", "recip_rank", "recall.20"})
    wanted: list[dict[str, list[float]]] = []
    for one in said["runs"]:
        run: dict[str, dict[str, float]] = {}
        for line in Path(one["run"]).read_text().splitlines():
            query, _, document, _, score, _ = line.split()
            run.setdefault(query, {})[document] = float(score)
        found = theirs.evaluate(run)
        want = {ours: [found.get(q, {}).get(name, 0.0) for q in said["queries"]] for ours, name in names.items()}
        wanted.append(want)
        for measure, values in want.items():
            np.testing.assert_allclose(one["values"][measure], values, rtol=0, atol=1e-12)
            assert one["mean"][measure] == pytest.approx(np.mean(values), abs=1e-12)
    assert len(said["queries"]) == 30
    assert said["runs"][0]["p"] == dict.fromkeys(names)
    for measure in names:
        p = ttest_rel(wanted[1][measure], wanted[0][measure]).pvalue
        assert said["runs"][1]["p"][measure] == pytest.approx(p, rel=1e-9)
    table = capsys.readouterr().out
    assert f"{said['runs'][1]['mean']['nDCG@10']:.4f}" in table
    assert "means over 30 judged queries" in table


def test_a_plot(collection: Path) -> None:
    from PIL import Image

    argv = [str(collection / "a.run"), "--qrels", str(collection / "qrels"), "--plot", str(collection / "plot.png")]
    assert cli.main(["evaluate", *argv]) == 0
    with Image.open(collection / "plot.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    assert min(pixels.shape[:2]) > 200
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 10


@pytest.mark.parametrize(
    "name, content, more, what",
    [
        ("a.run", "q0 Q0 d1 1\n", [], "a.run line 1: no line of a TREC run"),
        ("a.run", "q0 Q0 d1 1 2 x\nq0 Q0 d1 2 1 x\n", [], "a.run line 2: document d1 is there twice for query q0"),
        ("a.run", "", [], "no candidates"),
        ("a.run", "other Q0 d1 1 2 x\n", [], "has none of the queries"),
        ("qrels", "q0 0 d1 yes\n", [], "qrels line 1: no judgement"),
        ("qrels", "", [], "no judgements"),
        ("b.run", "q0 Q0 d1 1 2 x\n", ["--measures", "nDCG@ten"], "'nDCG@ten' is no measure"),
        ("b.run", "q0 Q0 d1 1 2 x\n", ["--qrels", "nowhere"], "nowhere: No such file"),
    ],
)
def test_refused(
    collection: Path, capsys: pytest.CaptureFixture[str], name: str, content: str, more: list[str], what: str
) -> None:
    (collection / name).write_text(content)
    assert cli.main(["evaluate", str(collection / "a.run"), "--qrels", str(collection / "qrels"), *more]) == 1
    assert what in capsys.readouterr().err
