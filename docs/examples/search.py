"""Retrieve with a vector database, rerank with jaxrank, compare: XQuAD's questions over its paragraphs.

    pip install qdrant-client
    python docs/examples/search.py --xquad FOLDER [MODEL] [--depth 20]

FOLDER has XQuAD's en.json (xquad.en.json of https://github.com/google-deepmind/xquad). qdrant runs inside this process,
in memory, and holds two vectors a paragraph: BM25's weights, sparse, and the mean of the model's own word embeddings,
dense. A question is asked with each, and with both fused by qdrant; what each finds is then reranked.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

import numpy as np
from jaxtyping import Float32
from qdrant_client import QdrantClient, models

from jaxrank import Reranker

K1, B = 1.5, 0.75
NAME = "paragraphs"


class Question(NamedTuple):
    text: str
    answer: int
    """The number of the paragraph that it was asked about."""


def read_xquad(folder: Path) -> tuple[list[str], list[Question]]:
    """The paragraphs, each once, and the questions."""
    articles = json.loads((folder / "en.json").read_text(encoding="utf-8"))["data"]
    places: dict[str, int] = {}
    questions = []
    for paragraph in (paragraph for article in articles for paragraph in article["paragraphs"]):
        place = places.setdefault(paragraph["context"], len(places))
        questions += [Question(qa["question"], place) for qa in paragraph["qas"]]
    return list(places), questions


class Vectors:
    """Texts -> vectors. BM25 (Robertson et al. 1995) is a product of sparse vectors: how often a paragraph has a word,
    saturated and by length, times the word's idf, which qdrant keeps, over the question's words."""

    def __init__(self, reranker: Reranker, paragraphs: Sequence[str]):
        self.reranker = reranker
        self.table = np.asarray(reranker.model.word[...]).astype(np.float32)
        self.mean_length = sum(len(words(text)) for text in paragraphs) / len(paragraphs)

    def of_paragraph(self, text: str) -> dict[str, models.SparseVector | list[float]]:
        counts = Counter(words(text))
        length = K1 * (1 - B + B * sum(counts.values()) / self.mean_length)
        weights = {word: count * (K1 + 1) / (count + length) for word, count in counts.items()}
        return {"bm25": sparse(weights), "embeddings": self.dense(text)}

    def of_question(self, text: str) -> dict[str, models.SparseVector | list[float]]:
        return {"bm25": sparse(Counter(words(text))), "embeddings": self.dense(text)}

    def dense(self, text: str) -> list[float]:
        return self.table[[token.id for token in self.reranker.tokens_of(text)]].mean(0).tolist()


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def sparse(weights: Mapping[str, float]) -> models.SparseVector:
    """A word's index is its hash: no list of words need be kept."""
    return models.SparseVector(indices=[crc32(word.encode()) for word in weights], values=list(weights.values()))


def fill(client: QdrantClient, vectors: Vectors, paragraphs: Sequence[str]) -> None:
    client.create_collection(
        NAME,
        vectors_config={
            "embeddings": models.VectorParams(size=vectors.table.shape[1], distance=models.Distance.COSINE)
        },
        sparse_vectors_config={"bm25": models.SparseVectorParams(modifier=models.Modifier.IDF)},
    )
    points = [models.PointStruct(id=i, vector=vectors.of_paragraph(text)) for i, text in enumerate(paragraphs)]  # pyright: ignore[reportArgumentType]
    client.upsert(NAME, points)


def retrieve(client: QdrantClient, vectors: Vectors, question: str, depth: int) -> dict[str, list[int]]:
    """By kind of search, the numbers of the best paragraphs, at most `depth`, the best first."""
    asked = vectors.of_question(question)
    halves = [models.Prefetch(query=vector, using=kind, limit=depth) for kind, vector in asked.items()]
    found = {kind: client.query_points(NAME, query=vector, using=kind, limit=depth) for kind, vector in asked.items()}
    fusion = models.FusionQuery(fusion=models.Fusion.RRF)
    found["both, fused"] = client.query_points(NAME, prefetch=halves, query=fusion, limit=depth)
    return {kind: [int(point.id) for point in answer.points] for kind, answer in found.items()}


def rerank(
    reranker: Reranker,
    paragraphs: Sequence[str],
    questions: Sequence[Question],
    found: Sequence[Mapping[str, list[int]]],
) -> tuple[list[dict[str, list[int]]], int]:
    """What was found for each question, by falling score, and how many pairs were scored: each once, all together."""
    pairs = [(q, i) for q, kinds in enumerate(found) for i in dict.fromkeys(i for kind in kinds.values() for i in kind)]
    scores = reranker.predict([(questions[q].text, paragraphs[i]) for q, i in pairs], raw=True)
    logit = dict(zip(pairs, scores.tolist(), strict=True))
    again = [
        {kind: sorted(places, key=lambda i, q=q: -logit[q, i]) for kind, places in kinds.items()}
        for q, kinds in enumerate(found)
    ]
    return again, len(pairs)


def ranks(questions: Sequence[Question], lists: Iterable[list[int]]) -> Float32[np.ndarray, " n"]:
    """Where the paragraph of each question stands, from 1; infinity if it was not found."""
    places = [
        one.index(question.answer) + 1 if question.answer in one else np.inf
        for question, one in zip(questions, lists, strict=True)
    ]
    return np.array(places, np.float32)


def mrr(ranks: Float32[np.ndarray, " n"]) -> float:
    """MRR@10. There is one right paragraph a question, so that recall@k is the share of ranks of at most k."""
    return float(np.where(ranks <= 10, 1 / ranks, 0).mean())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a Hugging Face id or folder; the built-in model if left out")
    parser.add_argument("--xquad", type=Path, required=True, help="folder with XQuAD's en.json")
    parser.add_argument("--depth", type=int, default=20, help="paragraphs that a search finds")
    given = parser.parse_args(arguments)
    paragraphs, questions = read_xquad(given.xquad)
    reranker = Reranker.from_pretrained(given.model)
    reranker.warm_up()

    client, vectors = QdrantClient(":memory:"), Vectors(reranker, paragraphs)
    start = time.perf_counter()
    fill(client, vectors, paragraphs)
    found = [retrieve(client, vectors, question.text, given.depth) for question in questions]
    print(
        f"{len(paragraphs)} paragraphs stored, {len(questions)} questions asked in {len(found[0])} ways: "
        f"{time.perf_counter() - start:.1f} s"
    )
    start = time.perf_counter()
    again, pairs = rerank(reranker, paragraphs, questions, found)
    seconds = time.perf_counter() - start
    print(f"{pairs} pairs reranked: {seconds:.1f} s, {pairs / seconds:.0f} pairs/s\n")
    print(f"{'':24}  MRR@10  recall@1  recall@10  recall@{given.depth}")
    for kind in found[0]:
        for name, lists in ((kind, found), (f"{kind}, reranked", again)):
            at = ranks(questions, (kinds[kind] for kinds in lists))
            recall = [float((at <= k).mean()) for k in (1, 10, given.depth)]
            print(f"{name:24}  {mrr(at):.3f}   {recall[0]:.3f}     {recall[1]:.3f}      {recall[2]:.3f}")


if __name__ == "__main__":
    main()
