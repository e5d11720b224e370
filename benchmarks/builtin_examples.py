"""What the built-in model is trained on: texts, the tokenizer, and examples in lessons of rising difficulty.

An example is a query with CANDIDATES documents, the right one first, and for every document its coverage: the share of
the query's information that stands in it, each token weighed by how rare it is (the sum of the inverse document
frequencies of BM25, Robertson and Zaragoza 2009, of the tokens found over that of all). Coverage is what a model of
this size can learn to compute, and says something about every pair where the one right document says little.
"""

from __future__ import annotations

import ast
import gzip
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

LANGUAGES = ("ar", "de", "el", "es", "hi", "ro", "ru", "th", "tr", "vi", "zh")
VOCABULARY = 16000
BOS, PAD, EOS, UNK = 0, 1, 2, 3
CANDIDATES = 5

OPENINGS = re.split(
    r"\|",
    "what is|what are|what was|what did|what does|what kind of|what type of|what|who|who was|who did|who is|where is|"
    "where did|where was|when did|when was|when is|why did|why does|why is|how|how does|how did|how do|how many|"
    "how much|how long|how often|which|which of|in what|in which|on what|at what|to whom|whose|what can|what year|name",
)


@dataclass
class Corpus:
    """Passages as lists of sentences, and queries with the number of their passage and the place of the answer in it
    (a fraction of the passage's length). The first `translated` passages are XQuAD's."""

    passages: list[list[str]] = field(default_factory=list)
    queries: list[tuple[str, int, float]] = field(default_factory=list)
    translated: int = 0


def sentences(text: str) -> list[str]:
    return [s for s in re.split(r"(?<=[.!?।。！？;])\s+|(?<=[。！？])", text) if s.strip()]


def read_xquad(path: Path) -> list[dict[str, Any]]:
    return [p for article in json.loads(path.read_text("utf-8"))["data"] for p in article["paragraphs"]]


def docstrings(roots: Sequence[Path]) -> Iterator[str]:
    """Every docstring below `roots`, then the documentation strings of botocore's service descriptions."""
    for root in roots:
        for path in sorted(root.rglob("*.py")):
            try:
                source = path.read_text("utf-8")
                tree = ast.parse(source) if '"""' in source else ast.Module([], [])
            except (OSError, ValueError, SyntaxError, RecursionError):
                continue
            for node in ast.walk(tree):
                if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                    yield ast.get_docstring(node) or ""
        for path in sorted(root.rglob("botocore/data/*/*/service-2.json.gz")):
            todo: list[Any] = [json.loads(gzip.decompress(path.read_bytes()))]
            while todo:
                node = todo.pop()
                if isinstance(node, dict):
                    if isinstance(node.get("documentation"), str):
                        text = re.sub(r"</?(p|li|ul|dl|dd|dt|note|important)>", "\n", node["documentation"])
                        text = re.sub(r"<[^>]+>", "", text)
                        yield "\n\n".join(x for x in sentences(text) if x.strip())
                    todo.extend(node.values())


def prose(text: str) -> str:
    """The paragraphs of a docstring that read like prose: no code, tables, parameter lists or markup."""
    kept = []
    for block in re.split(r"\n\s*\n", text):
        if re.search(r">>>|^\s*\.\. |::\s*$|[-=~^]{4,}|[{}\\|<>]|^\s*@|^\s*:\w", block, re.MULTILINE):
            continue
        block = " ".join(re.sub(r":\w+:|[`*]", "", block).split())
        words = block.split()
        plain = sum(bool(re.fullmatch(r"[(\"']?[A-Za-z][a-z'-]*[.,;:?!)\"']*", w)) for w in words)
        if len(words) >= 4 and plain > 0.8 * len(words):
            kept.append(block)
    return "\n".join(kept)


def collect(xquad: Path, roots: Sequence[Path]) -> Corpus:
    corpus = Corpus()
    for language in LANGUAGES:
        for paragraph in read_xquad(xquad / f"{language}.json"):
            text = paragraph["context"]
            for qa in paragraph["qas"]:
                at = qa["answers"][0]["answer_start"] / len(text)
                corpus.queries.append((qa["question"], len(corpus.passages), at))
            corpus.passages.append(sentences(text))
    corpus.translated = len(corpus.passages)
    seen: set[str] = set()
    for text in docstrings(roots):
        clean = prose(text)
        head, _, body = clean.partition("\n")
        parts = sentences(" ".join(body.split())) or sentences(head)
        key = " ".join(parts)[:80]
        if key in seen or len(" ".join(parts).split()) < 15:
            continue
        seen.add(key)
        if body and len(head.split()) <= 40:
            corpus.queries.append((head, len(corpus.passages), 0.0))
        corpus.passages.append(parts)
    return corpus


def thin(corpus: Corpus, most: int, shortest: int = 30, seed: int = 0) -> Corpus:
    """All of XQuAD, and `most` of the docstrings that have `shortest` words or more."""
    first = corpus.translated
    words = np.asarray([sum(len(s.split()) for s in p) for p in corpus.passages])
    long = np.flatnonzero(words[first:] >= shortest) + first
    kept = [*range(first), *sorted(np.random.default_rng(seed).permutation(long)[:most].tolist())]
    number = {old: new for new, old in enumerate(kept)}
    queries = [(q, number[p], at) for q, p, at in corpus.queries if p in number]
    return Corpus([corpus.passages[i] for i in kept], queries, first)


def make_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """XLM-R's kind: Unigram, Metaspace, <s> query </s></s> document </s>; here lower case only."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace(" {2,}", " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
    tokenizer.decoder = decoders.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    return tokenizer


# ------------------------------------------------------------------------------------------------------ examples


class Examples:
    """Queries with their candidates, as token ids; which kind depends on how far training has got."""

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer, seed: int = 0):
        self.rng = np.random.default_rng(seed)

        def ids(texts: Sequence[str]) -> list[np.ndarray]:
            encoded = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
            return [np.asarray(e.ids, np.int32) for e in encoded]

        flat = iter(ids([s for p in corpus.passages for s in p]))
        self.passages = [[next(flat) for _ in p] for p in corpus.passages]
        self.queries = list(
            zip(ids([q for q, _, _ in corpus.queries]), *list(zip(*corpus.queries, strict=True))[1:], strict=True)
        )
        self.openings = ids(OPENINGS)
        self.question_mark = ids(["?"])[0][-1:]
        self.short = ids(["hi", "hello", "ok", "yes", "no", "thanks", "test", "nothing", "foo bar", "n/a", "a", "the"])
        self.english = {i for i, p in enumerate(corpus.passages) if all(s.isascii() for s in p)}
        self.word_start = np.asarray(
            [(tokenizer.id_to_token(i) or "").startswith("▁") for i in range(tokenizer.get_vocab_size())]
        )
        self.hard = self._hard_negatives()
        frequency = np.zeros(tokenizer.get_vocab_size())
        for passage in self.passages:
            frequency[np.unique(np.concatenate(passage))] += 1
        self.idf = np.log1p((len(self.passages) - frequency + 0.5) / (frequency + 0.5))

    def _hard_negatives(self, depth: int = 12) -> list[np.ndarray]:
        """For every passage, those others that BM25 over token ids finds for a query of its own."""
        import bm25s

        terms = [[str(t) for s in p for t in s] for p in self.passages]
        index = bm25s.BM25()
        index.index(terms, show_progress=False)
        asked = [[str(t) for t in max(p, key=len)[:16]] for p in self.passages]
        for query, passage, _ in self.queries:
            asked[passage] = [str(t) for t in query[:16]]
        found, _ = index.retrieve(asked, k=depth, show_progress=False)
        return [row[row != i] for i, row in enumerate(np.asarray(found))]

    def crop(self, tokens: np.ndarray, most: int, centre: float | None = None) -> np.ndarray:
        """At most `most` consecutive tokens; around `centre` (a fraction of the length) where one is given."""
        spare = len(tokens) - most
        if spare <= 0:
            return tokens
        if centre is None:
            start = int(self.rng.integers(spare + 1))
        else:
            start = int(np.clip(centre * len(tokens) - most * self.rng.uniform(0.1, 0.9), 0, spare))
        return tokens[start : start + most]

    def whole(self, passage: int) -> np.ndarray:
        return np.concatenate(self.passages[passage])

    def keywords(self, document: np.ndarray, english: bool) -> np.ndarray:
        """A made-up question: a few runs of the document's words, in any order, perhaps with a question's opening."""
        rng, runs = self.rng, []
        for _ in range(rng.integers(1, 4)):
            start = int(rng.integers(len(document)))
            while start and not self.word_start[document[start]]:
                start -= 1
            end = min(start + int(rng.integers(1, 7)), len(document))
            while end < len(document) and not self.word_start[document[end]] and end - start < 10:
                end += 1
            runs.append(document[start:end])
        if rng.random() < 0.5:
            opening = self.openings[rng.integers(len(self.openings))] if english else runs[0][:0]
            runs = [opening, *runs, self.question_mark]
        return np.concatenate(runs)

    def coverage(self, query: np.ndarray, documents: Sequence[np.ndarray], idf: np.ndarray) -> list[float]:
        tokens = np.unique(query)
        return [float(idf[tokens[np.isin(tokens, d)]].sum() / idf[tokens].sum()) for d in documents]

    def matching(self, length: int, shuffled: bool) -> tuple[np.ndarray, list[np.ndarray], list[float]]:
        """The first lessons: the query is some of the document's own tokens."""
        rng = self.rng
        size = length - 12
        documents = [
            self.crop(self.whole(int(rng.integers(len(self.passages)))), int(rng.integers(size // 2, size + 1)))
            for _ in range(CANDIDATES)
        ]
        query = self.crop(documents[0], int(rng.integers(4, 9)))
        if shuffled:
            query = rng.permutation(self.crop(documents[0], 24))[: rng.integers(2, 9)]
            for i in range(1, CANDIDATES):
                if rng.random() < 0.4:  # some of the query's tokens are here too
                    documents[i] = documents[i].copy()
                    some = query[rng.random(len(query)) < 0.5]
                    documents[i][rng.integers(len(documents[i]), size=len(some))] = some
        if rng.random() < 0.5:  # other names for all tokens: every embedding has to match, not the frequent ones
            names = rng.permutation(np.arange(5, VOCABULARY, dtype=np.int32))
            coverage = self.coverage(query, documents, np.ones_like(self.idf))
            return names[query - 5], [names[d - 5] for d in documents], coverage
        return query, documents, self.coverage(query, documents, self.idf)

    def real(self, length: int) -> tuple[np.ndarray, list[np.ndarray], list[float]]:
        """A question, a docstring's summary, a sentence taken out of its passage, or a made-up question."""
        rng, kind = self.rng, self.rng.random()
        item = self.queries[rng.integers(len(self.queries))]
        query, passage, at = item
        if kind < 0.5:
            positive = self.whole(passage)
        else:
            at = None
            passage = int(rng.integers(len(self.passages))) if rng.random() < 0.7 else passage
            parts = self.passages[passage]
            chosen = int(rng.integers(len(parts)))
            if kind < 0.75 and len(parts) > 1:
                query = parts[chosen]
                keep = rng.random() < 0.2
                positive = np.concatenate([s for i, s in enumerate(parts) if keep or i != chosen])
            else:
                positive = self.crop(self.whole(passage), length - 40)
                query = self.keywords(positive, passage in self.english)
        query = query[: min(40, length // 3)]
        if rng.random() < 0.15:
            query = query[rng.random(len(query)) < 0.7] if len(query) > 6 else query
        if rng.random() < 0.1 and query[-1:] == self.question_mark:
            query = query[:-1]
        others = [int(p) for p in rng.permutation(self.hard[passage])[:3]]
        others = [p for p in others if p != passage][: int(rng.integers(1, 4))]
        if kind < 0.5 and rng.random() < 0.3:
            others[:1] = [int(np.clip(passage + rng.integers(1, 4) * rng.choice([-1, 1]), 0, len(self.passages) - 1))]
        while len(others) < CANDIDATES - 1:
            others.append(int(rng.integers(len(self.passages))))
        room = length - len(query) - 4
        share = 1.0 if rng.random() < 0.6 else rng.uniform(0.15, 1.0)
        most = max(8, int(room * share))
        documents = [self.crop(positive, most, at)]
        for other in others:
            extent = most if rng.random() < 0.7 else max(8, int(room * rng.uniform(0.1, 1)))
            documents.append(self.crop(self.whole(other), extent))
        if rng.random() < 0.05:
            documents[-1] = self.short[rng.integers(len(self.short))]
        return query, documents, self.coverage(query, documents, self.idf)

    def batch(self, stage: int, lessons: float, length: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens [count, CANDIDATES, length], their lengths and coverages [count, CANDIDATES]."""
        tokens = np.full((count, CANDIDATES, length), PAD, np.int32)
        lengths = np.zeros((count, CANDIDATES), np.int32)
        coverages = np.zeros((count, CANDIDATES), np.float32)
        for i in range(count):
            early = stage < 2 or self.rng.random() < lessons
            query, documents, coverages[i] = self.matching(length, stage > 0) if early else self.real(length)
            for j, document in enumerate(documents):
                pair = np.concatenate([[BOS], query, [EOS, EOS], document, [EOS]])[:length]
                tokens[i, j, : len(pair)] = pair
                lengths[i, j] = len(pair)
        return tokens, lengths, coverages
