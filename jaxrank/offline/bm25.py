"""A first run by BM25, for collections that have none. It needs bm25s, and memory for the whole corpus."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxrank.errors import RequestError
from jaxrank.offline.corpus import entry
from jaxrank.offline.rows import lines
from jaxrank.offline.trec import write_run_line


def write_bm25_run(corpus: Path, queries: Mapping[str, str], run: Path, *, depth: int, progress: bool = True) -> None:
    """Write the `depth` best documents of each query (Lucene's BM25, k1 1.5, b 0.75, without English stop words).

    Lines that are not documents are left out.

    Raises:
        RequestError: bm25s is not installed, or the corpus has no documents.
    """
    try:
        import bm25s
    except ImportError:
        raise RequestError("BM25 needs bm25s: pip install 'jaxrank[research]', or give a run with --run") from None
    ids: list[str] = []
    texts: list[str] = []
    for _, _, line in lines(corpus):
        found = entry(line)
        if not isinstance(found, str):
            ids.append(found[0])
            texts.append(found[1])
    if not ids:
        raise RequestError(f"{corpus}: no documents")
    index: Any = bm25s.BM25()
    index.index(bm25s.tokenize(texts, stopwords="en", show_progress=progress), show_progress=progress)
    depth = min(depth, len(ids))
    with run.with_name(run.name + ".new").open("w", encoding="utf-8") as out:
        for identity, query in queries.items():
            words = bm25s.tokenize([query], stopwords="en", show_progress=False, return_ids=False)[0]
            scores = np.asarray(index.get_scores(words)) if words else np.zeros(len(ids), np.float32)
            order = np.argsort(-scores, kind="stable")[:depth].tolist()
            for rank, place in enumerate(order, 1):
                out.write(write_run_line(identity, ids[place], rank, float(scores[place]), "bm25"))
    Path(out.name).replace(run)
