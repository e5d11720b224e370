"""Files in, a ranking of each query out, in pieces that depend only on the input.

So an interrupted run continues and ends with the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from jaxrank.offline.journal import Journal
from jaxrank.offline.sources import Job, Source, stamp
from jaxrank.offline.trec import write_run_line
from jaxrank.reranker import Reranker, sigmoid
from jaxrank.text.windows import best_of, span_of
from jaxrank.types import Encoded

T = TypeVar("T")

BATCH_ROWS = 16
"""The usual number of rows in a batch, if its tokens are not given. The last row of each batch is not full."""

Spans = Sequence[tuple[int, int] | None]
"""The characters of each document that its score is of. None means all, if documents are not split."""

Write = Callable[[Job, np.ndarray, Spans], str]
"""A function that writes a job's ranking, from its documents' logits."""


def rerank(
    reranker: Reranker,
    source: Source,
    output: Path,
    write: Write,
    *,
    batch_tokens: int | None = None,
    long_document: str = "truncate",
    work: dict[str, Any],
    progress: bool = True,
) -> int:
    """Rank all jobs of `source` into `output`.

    Args:
        reranker: the model.
        source: the jobs.
        output: the output file.
        write: the form of the output.
        batch_tokens: the tokens that are packed together. The default fills BATCH_ROWS rows. More tokens are packed
            with less filler.
        long_document: as in Reranker.score.
        work: what the result depends on in addition to the files. A run with anything else is refused.
        progress: whether a progress bar is shown.

    Returns:
        The number of pairs that were scored now.

    Raises:
        RequestError: the journal is of other work, or a file cannot be read.
    """
    batch_tokens = batch_tokens or BATCH_ROWS * reranker.row_tokens
    files = {str(path): stamp(path) for path in source.files}
    journal = Journal(output, {**work, "batch_tokens": batch_tokens, "files": files})
    scored = journal.notes.get("pairs", 0)
    before = scored
    try:
        with tqdm(
            total=source.pairs, initial=scored, unit="pair", desc=output.name, disable=None if progress else True,
            smoothing=0.05,
        ) as bar:  # fmt: skip
            tokens = 0
            encoded = (
                (job, reranker.encode(job.query, job.documents, long_document=long_document))
                for job in source.jobs(journal.done)
            )
            for batch in _ahead(batches(encoded, batch_tokens)):
                said = "".join(
                    write(job, logits[best], [span_of(pairs[i]) for i in best])
                    for (job, pairs), (_, logits) in zip(batch, score(reranker, batch), strict=True)
                    for best in [best_of(pairs, logits)]
                )
                count = sum(len(job.documents) for job, _ in batch)
                scored += count
                journal.add(said.encode(), batch[-1][0].after, pairs=scored)
                tokens += sum(len(pair) for _, pairs in batch for pair in pairs)
                bar.update(count)
                bar.set_postfix_str(f"{tokens / max(bar.format_dict['elapsed'], 1e-9):,.0f} tokens/s", refresh=False)
    except BaseException:
        journal.close()
        raise
    journal.finish()
    return scored - before


def batches(encoded: Iterable[tuple[T, list[Encoded]]], batch_tokens: int) -> Iterator[list[tuple[T, list[Encoded]]]]:
    """Yield whole jobs with their tokenised pairs, as many as reach batch_tokens."""
    taken: list[tuple[T, list[Encoded]]] = []
    tokens = 0
    for job, pairs in encoded:
        taken.append((job, pairs))
        tokens += sum(map(len, pairs))
        if tokens >= batch_tokens:
            yield taken
            taken, tokens = [], 0
    if taken:
        yield taken


def score(reranker: Reranker, batch: Sequence[tuple[T, list[Encoded]]]) -> Iterator[tuple[T, np.ndarray]]:
    """Yield the jobs of a batch with the logits of their pairs. All pairs are scored together."""
    logits = reranker.score_encoded([pair for _, pairs in batch for pair in pairs])
    ends = np.cumsum([len(pairs) for _, pairs in batch])
    for (job, _), own in zip(batch, np.split(logits, ends[:-1]), strict=True):
        yield job, own


def _ahead(items: Iterator[T]) -> Iterator[T]:
    """Yield the same items. The next one is made on a thread while the last is used."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(lambda: list(islice(items, 1)))
        while one := coming.result():
            coming = thread.submit(lambda: list(islice(items, 1)))
            yield one[0]


def as_trec(tag: str) -> Write:
    """Return a function that writes lines of a TREC run.

    Their scores are logits, because probabilities near 1 would be ties.
    """

    def write(job: Job, logits: np.ndarray, spans: Spans) -> str:
        order = np.argsort(-logits, kind="stable").tolist()
        return "".join(
            write_run_line(job.id, job.ids[i], rank, float(logits[i]), tag) for rank, i in enumerate(order, 1)
        )

    return write


def as_jsonl(job: Job, logits: np.ndarray, spans: Spans) -> str:
    """Return one JSON object: id, query, and results by falling score.

    The scores are probabilities. If documents were split, each result has its window.
    """
    scores = sigmoid(logits).tolist()
    results: list[dict[str, Any]] = []
    for i in np.argsort(-logits, kind="stable").tolist():
        window = {} if spans[i] is None else {"window": spans[i]}
        results.append({"id": job.ids[i], "index": i, "score": scores[i], **window})
    return json.dumps({"_id": job.id, "query": job.query, "results": results}, ensure_ascii=False) + "\n"
