"""docs/examples/search.py over its command line, on a small file of XQuAD's format, with retrieval and reranking done
once more by bm25s, NumPy and Reranker.rank."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import bm25s
import numpy as np
import pytest

from jaxrank import Reranker

SCRIPT = Path(__file__).parent.parent.parent / "docs" / "examples" / "search.py"
DEPTH = 4
ARTICLES = {
    "Animals": {
        "The giant panda is a bear that lives in the mountains of central China. It eats bamboo.": [
            "Where do giant pandas live?",
            "What does the panda eat?",
        ],
        "Polar bears hunt seals on the ice of the Arctic. They are the largest bears.": ["What do polar bears hunt?"],
        "Penguins are birds of the southern half of the world, and cannot fly.": ["Which birds cannot fly?"],
        "Red foxes live in forests, fields and cities. A fox eats mice, birds and fruit.": ["What does a fox eat?"],
    },
    "Places": {
        "Paris is the capital of France. The Eiffel Tower was built there in 1889.": [
            "What is the capital of France?",
            "When was the Eiffel Tower built?",
        ],
        "Bern is the capital of Switzerland, on the river Aare.": [
            "Which river flows through the capital of Switzerland?"
        ],
        "China has more than a billion inhabitants; its capital is Beijing.": ["How many inhabitants has China?"],
        "The river Nile flows north through eleven countries into the Mediterranean.": ["Where does the Nile flow?"],
    },
    "Physics": {
        "Gravity attracts two bodies towards each other, as their masses tell.": ["What attracts two bodies?"],
        "Light moves at 299,792 kilometres a second in empty space.": ["How fast does light move?"],
        "Ice is frozen water; it swims, for it is lighter than water.": ["Why does ice swim on water?"],
        "A magnet has two poles, north and south, and attracts iron.": ["What does a magnet attract?"],
    },
}


@pytest.fixture(scope="module")
def xquad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("xquad")
    data = [
        {
            "title": title,
            "paragraphs": [
                {
                    "context": context,
                    "qas": [
                        {"id": f"{title}-{i}-{j}", "question": question, "answers": [{"text": "", "answer_start": 0}]}
                        for j, question in enumerate(questions)
                    ],
                }
                for i, (context, questions) in enumerate(article.items())
            ],
        }
        for title, article in ARTICLES.items()
    ]
    (folder / "en.json").write_text(json.dumps({"version": "1.1", "data": data}), encoding="utf-8")
    return folder


PARAGRAPHS = [context for article in ARTICLES.values() for context in article]
QUESTIONS = [(q, context) for article in ARTICLES.values() for context, questions in article.items() for q in questions]


def words(text: str) -> list[str]:
    return re.sub(r"[^a-z0-9]+", " ", text.lower()).split()


def by_bm25() -> list[list[str]]:
    """A list for each question: the best paragraphs that share a word with it."""
    index = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
    index.index([words(text) for text in PARAGRAPHS], show_progress=False)
    lists = []
    for question, _ in QUESTIONS:
        scores = index.get_scores([word for word in words(question) if word in index.vocab_dict])
        order = np.argsort(-scores, kind="stable")[:DEPTH]
        lists.append([PARAGRAPHS[i] for i in order if scores[i] > 0])
    return lists


def by_embeddings(reranker: Reranker) -> list[list[str]]:
    table = np.asarray(reranker.model.word[...]).astype(np.float64)
    tokenizer = reranker.tokenizer.tokenizer

    def vector(text: str) -> np.ndarray:
        mean = table[tokenizer.encode(text, add_special_tokens=False).ids].mean(0)
        return mean / np.linalg.norm(mean)

    all_of_them = np.stack([vector(text) for text in PARAGRAPHS])
    return [[PARAGRAPHS[i] for i in np.argsort(-all_of_them @ vector(q), kind="stable")[:DEPTH]] for q, _ in QUESTIONS]


def measures(lists: list[list[str]]) -> list[float]:
    """MRR@10, recall@1, recall@10, recall@DEPTH."""
    found = [one.index(right) + 1 if right in one else 10**6 for one, (_, right) in zip(lists, QUESTIONS, strict=True)]
    at = [sum(place <= k for place in found) / len(found) for k in (1, 10, DEPTH)]
    return [sum(1 / place for place in found if place <= 10) / len(found), *at]


def test_table(xquad: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--xquad", str(xquad), "--depth", str(DEPTH)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    table = {
        line[:24].strip(): [float(x) for x in line[24:].split()]
        for line in done.stdout.partition("\n\n")[2].splitlines()[1:]
    }
    assert f"{len(PARAGRAPHS)} paragraphs stored, {len(QUESTIONS)} questions asked in 3 ways" in done.stdout
    assert float(re.findall(r"(\d+) pairs/s", done.stdout)[0]) > 0
    assert list(table) == [kind + also for kind in ("bm25", "embeddings", "both, fused") for also in ("", ", reranked")]

    reranker = Reranker.from_pretrained()
    for kind, lists in (("bm25", by_bm25()), ("embeddings", by_embeddings(reranker))):
        again = [
            [item.document for item in reranker.rank(question, one)]
            for (question, _), one in zip(QUESTIONS, lists, strict=True)
        ]
        assert table[kind] == pytest.approx(measures(lists), abs=6e-4)
        assert table[f"{kind}, reranked"] == pytest.approx(measures(again), abs=6e-4)
    assert table["bm25"] != table["embeddings"]
    assert table["embeddings"] != table["embeddings, reranked"]
    assert table["both, fused"][3] >= min(table["bm25"][3], table["embeddings"][3])
    assert table["both, fused"][3] == table["both, fused, reranked"][3], "reranking finds nothing that was not found"


def test_no_data(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2
    assert "--xquad" in done.stderr
