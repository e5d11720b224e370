"""Train, export and evaluate the built-in cross-encoder (jaxrank/builtin), from scratch on a CPU.

    python benchmarks/train_builtin.py --xquad DIR --minutes 30       # train, write the folder, evaluate it
    python benchmarks/train_builtin.py --xquad DIR --evaluate-only    # the shipped folder beside BM25

Training text: the eleven non-English files of XQuAD (https://github.com/google-deepmind/xquad; Artetxe, Ruder and
Yogatama 2019, CC BY-SA 4.0), and the docstrings of the open-source Python packages that are installed where the script
runs (or in the folders of --docstrings), with the service descriptions of botocore where that is among them.
English XQuAD is the test set: neither the weights nor the tokenizer see it. Needs the `bench` extra.

A cross-encoder from scratch ranks by chance until a circuit forms that finds a query's tokens in the document. What
gets it there in a minute instead of hours: identity added to the query and key projections of the first two layers,
and a curriculum from short documents with a few of their own tokens as query to real questions and long documents.
"""

from __future__ import annotations

import argparse
import ast
import gzip
import json
import re
import sysconfig
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from jaxrank.models.xlm_roberta import XLMRoberta, XLMRobertaConfig
from jaxrank.types import Layout, Packed

LANGUAGES = ("ar", "de", "el", "es", "hi", "ro", "ru", "th", "tr", "vi", "zh")
BOS, PAD, EOS, UNK = 0, 1, 2, 3
CONFIG = XLMRobertaConfig(
    vocab_size=16000, width=192, layers=3, heads=3, ffn=768, position_rows=514, pad_id=PAD, eps=1e-5
)
CANDIDATES = 5
"""Documents a query is trained on: the right one first, then the wrong ones."""

OPENINGS = re.split(
    r"\|",
    "what is|what are|what was|what did|what does|what kind of|what type of|what|who|who was|who did|who is|where is|"
    "where did|where was|when did|when was|when is|why did|why does|why is|how|how does|how did|how do|how many|"
    "how much|how long|how often|which|which of|in what|in which|on what|at what|to whom|whose|what can|what year|name",
)

# ---------------------------------------------------------------------------------------------------------- text


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

    def matching(self, length: int, shuffled: bool) -> tuple[np.ndarray, list[np.ndarray]]:
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
            names = rng.permutation(np.arange(5, CONFIG.vocab_size, dtype=np.int32))
            return names[query - 5], [names[d - 5] for d in documents]
        return query, documents

    def real(self, length: int) -> tuple[np.ndarray, list[np.ndarray]]:
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
        return query, documents

    def batch(self, stage: int, lessons: float, length: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [count, CANDIDATES, length] and their lengths [count, CANDIDATES]."""
        tokens = np.full((count, CANDIDATES, length), PAD, np.int32)
        lengths = np.zeros((count, CANDIDATES), np.int32)
        for i in range(count):
            early = stage < 2 or self.rng.random() < lessons
            query, documents = self.matching(length, stage > 0) if early else self.real(length)
            for j, document in enumerate(documents):
                pair = np.concatenate([[BOS], query, [EOS, EOS], document, [EOS]])[:length]
                tokens[i, j, : len(pair)] = pair
                lengths[i, j] = len(pair)
        return tokens, lengths


# ------------------------------------------------------------------------------------------------------- training


def new_model(seed: int = 0) -> XLMRoberta:
    """Identity in the first two layers' query and key projections, so that equal tokens attend to each other."""
    model = XLMRoberta(CONFIG, dtype=jnp.float32, rngs=nnx.Rngs(seed), implementation="dense")
    model.word[...] = model.word[...] * 5.0
    at = np.arange(CONFIG.position_rows)[:, None] / 1e4 ** (np.arange(CONFIG.width // 2)[None] / (CONFIG.width // 2))
    model.position[...] = jnp.asarray(0.04 * np.concatenate([np.sin(at), np.cos(at)], 1), jnp.float32)
    for layer in (*model.layers, model.last):
        parts = (layer.attention.query, layer.attention.key, layer.attention.value, layer.attention.out)
        for part in (*parts, layer.up, layer.down):
            part.kernel[...] = part.kernel[...] * 3.0  # to about 1 / sqrt(width): what a layer adds must be seen
        for part in parts[:2] if layer is not model.last else ():
            part.kernel[...] = part.kernel[...] + jnp.eye(CONFIG.width).reshape(part.kernel[...].shape)
    return model


def score_rows(graph: Any, state: Any, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
    """Logits of pairs [P, L] with `lengths` [P]: every pair in a row of its own, matrices in bfloat16."""
    state = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.ndim > 1 else x, state)
    state["dense"]["kernel"][...] = state["dense"]["kernel"][...].astype(jnp.float32)
    model = nnx.merge(graph, state)
    none = jnp.zeros((1, 7), jnp.int32)

    def row(tokens: jax.Array, length: jax.Array) -> jax.Array:
        spans = jnp.tile(jnp.zeros(4, jnp.int32).at[3].set(length), (tokens.size, 1))
        layout = Layout(spans, none, none[0])
        scored = Layout(spans[:1], none, none[0])
        return model(Packed(tokens, jnp.arange(tokens.size), jnp.zeros(1, jnp.int32), layout, scored))[0]

    return jax.vmap(row)(tokens, lengths)


OPTIMIZER = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.scale_by_adam(b1=0.9, b2=0.98),
    optax.add_decayed_weights(0.01, mask=lambda state: jax.tree.map(lambda x: x.ndim > 1, state)),
)


@partial(jax.jit, static_argnums=0, donate_argnums=(1, 2, 3))
def train_step(graph: Any, state: Any, ema: Any, memory: Any, rate: Any, decay: Any, tokens: Any, lengths: Any) -> Any:
    def loss(state: Any) -> tuple[jax.Array, jax.Array]:
        shape = lengths.shape
        logits = score_rows(graph, state, tokens.reshape(-1, tokens.shape[-1]), lengths.reshape(-1)).reshape(shape)
        right = jnp.zeros(shape).at[:, 0].set(1.0)
        ranking = optax.softmax_cross_entropy(logits, right).mean()
        absolute = optax.sigmoid_binary_cross_entropy(logits, right).mean()
        return ranking + 0.1 * absolute, (logits.argmax(-1) == 0).mean()

    (value, accuracy), grads = jax.value_and_grad(loss, has_aux=True)(state)
    updates, memory = OPTIMIZER.update(grads, memory, state)
    state = jax.tree.map(lambda x, u: x - rate * u, state, updates)
    ema = jax.tree.map(lambda e, x: decay * e + (1 - decay) * x, ema, state)
    return state, ema, memory, value, accuracy


def train(examples: Examples, minutes: float, output: Path, seed: int = 0, start: Path | None = None) -> Any:
    """Returns the averaged parameters after `minutes`.

    A stage ends when its lesson is learnt, or when a share of the time is gone. With the weights in `start`, only the
    second half of the last stage is left.
    """
    from jaxrank import convert

    graph, state = nnx.split(new_model(seed))
    if start is not None:
        state = nnx.state(convert.load(start, dtype=jnp.float32))
    ema, memory = jax.tree.map(jnp.copy, state), OPTIMIZER.init(state)
    began, step, marks, shown, stage, recent = time.monotonic(), 0, [], 0.0, 0 if start is None else 2, 0.0
    already = 0.0 if start is None else 0.5
    while (gone := already + (1 - already) * (time.monotonic() - began) / (60 * minutes)) < 1:
        if recent > (0.9, 0.85, 2)[stage] or gone > (0.25, 0.35, 2)[stage]:
            stage, recent = stage + 1, 0.0
        lessons = max(0.1, 0.8 - 2 * gone)  # the share of early lessons in the last stage
        length = (40, 64)[stage] if stage < 2 else int(examples.rng.choice([64, 96, 128]))
        if stage == 2 and gone > 0.3:
            length = int(examples.rng.choice([96, 192, 288, 448], p=[0.4, 0.3, 0.2, 0.1]))
        count = max(2, (2560, 5120, 5120)[stage] // (length * CANDIDATES))
        rate = 5e-4 * min(1, (step + 1) / 50) * (0.5 * (1 + np.cos(np.pi * gone)) + 0.01)
        batch = examples.batch(stage, lessons, length, count)
        decay = min(0.995, step / (step + 10))
        state, ema, memory, value, accuracy = train_step(graph, state, ema, memory, rate, decay, *batch)
        marks.append((float(value), float(accuracy)))
        recent += 0.05 * (marks[-1][1] - recent)
        step += 1
        if time.monotonic() - shown > 15:
            shown = time.monotonic()
            mean = np.mean(marks, axis=0)
            print(f"{gone:5.1%} step {step} stage {stage} loss {mean[0]:.3f} right {mean[1]:.3f}", flush=True)
            marks = []
            export(ema, output)
    return ema


# --------------------------------------------------------------------------------------------- export, evaluation


def export(state: Any, folder: Path) -> None:
    """config.json and model.safetensors under transformers' names: Linear weights are [out, in]; bfloat16 matrices."""
    import ml_dtypes
    from safetensors.numpy import save_file

    model = nnx.merge(nnx.graphdef(new_model()), state)
    wide = CONFIG.width
    tensors: dict[str, Any] = {}

    def linear(name: str, part: Any, kernel: Any) -> None:
        tensors[f"{name}.weight"] = np.asarray(kernel).T
        tensors[f"{name}.bias"] = np.asarray(part.bias[...]).reshape(-1)

    def norm(name: str, part: Any) -> None:
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = np.asarray(part.scale[...]), np.asarray(part.bias[...])

    root = "roberta.embeddings"
    tensors[f"{root}.word_embeddings.weight"] = np.asarray(model.word[...])
    tensors[f"{root}.position_embeddings.weight"] = np.asarray(model.position[...])
    tensors[f"{root}.token_type_embeddings.weight"] = np.asarray(model.token_type[...])[None]
    norm(f"{root}.LayerNorm", model.embedding_norm)
    for i, layer in enumerate([*model.layers, model.last]):
        root = f"roberta.encoder.layer.{i}"
        for name in ("query", "key", "value"):
            part = getattr(layer.attention, name)
            linear(f"{root}.attention.self.{name}", part, part.kernel[...].reshape(wide, wide))
        part = layer.attention.out
        linear(f"{root}.attention.output.dense", part, part.kernel[...].reshape(wide, wide))
        norm(f"{root}.attention.output.LayerNorm", layer.attention_norm)
        linear(f"{root}.intermediate.dense", layer.up, layer.up.kernel[...])
        linear(f"{root}.output.dense", layer.down, layer.down.kernel[...])
        norm(f"{root}.output.LayerNorm", layer.norm)
    linear("classifier.dense", model.dense, model.dense.kernel[...])
    linear("classifier.out_proj", model.head, model.head.kernel[...][:, None])
    for name, value in tensors.items():
        dtype = ml_dtypes.bfloat16 if value.ndim == 2 and len(value) > 1 else np.float32
        tensors[name] = np.ascontiguousarray(value.astype(dtype))
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def export_settings(tokenizer: Tokenizer, folder: Path) -> None:
    """config.json and the tokenizer's files, as transformers writes them."""
    from transformers import PreTrainedTokenizerFast
    from transformers import XLMRobertaConfig as PublishedConfig

    folder.mkdir(parents=True, exist_ok=True)
    config = PublishedConfig(
        architectures=["XLMRobertaForSequenceClassification"],
        vocab_size=CONFIG.vocab_size,
        hidden_size=CONFIG.width,
        num_hidden_layers=CONFIG.layers,
        num_attention_heads=CONFIG.heads,
        intermediate_size=CONFIG.ffn,
        max_position_embeddings=CONFIG.position_rows,
        type_vocab_size=1,
        layer_norm_eps=CONFIG.eps,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        id2label={0: "LABEL_0"},
        label2id={"LABEL_0": 0},
        dtype="bfloat16",
    )
    (folder / "config.json").write_text(config.to_json_string(use_diff=False), "utf-8")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        cls_token="<s>",
        eos_token="</s>",
        sep_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
        model_max_length=CONFIG.max_length,
    ).save_pretrained(folder)


def mrr(scores: np.ndarray, right: np.ndarray) -> float:
    """Mean reciprocal rank of the right column, 0 beyond rank 10; ties count against it."""
    own = scores[np.arange(len(right)), right]
    ranks = (scores >= own[:, None]).sum(1)
    return float(np.where(ranks <= 10, 1 / ranks, 0).mean())


def evaluate(folder: Path, xquad: Path, every: int = 1) -> dict[str, Any]:
    """MRR@10 of the folder's model and of BM25, all English XQuAD paragraphs ranked for every n-th question."""
    import bm25s

    from jaxrank import convert

    paragraphs = read_xquad(xquad / "en.json")
    asked = [(qa["question"], i) for i, p in enumerate(paragraphs) for qa in p["qas"]][::every]
    right = np.asarray([i for _, i in asked])
    index = bm25s.BM25()
    index.index(bm25s.tokenize([p["context"] for p in paragraphs], show_progress=False), show_progress=False)
    queries = bm25s.tokenize([q for q, _ in asked], return_ids=False, show_progress=False)
    lexical = mrr(np.stack([index.get_scores([str(word) for word in q]) for q in queries]), right)

    graph, state = nnx.graphdef(new_model()), nnx.state(convert.load(folder, dtype=jnp.bfloat16))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    documents = [tokenizer.encode(p["context"], add_special_tokens=False).ids for p in paragraphs]
    scores = np.zeros((len(asked), len(documents)), np.float32)
    score = jax.jit(partial(score_rows, graph))
    order = np.argsort([len(d) for d in documents])
    began, room = time.monotonic(), CONFIG.max_length - 4
    for number, (question, _) in enumerate(asked):
        query = tokenizer.encode(question, add_special_tokens=False).ids
        for some in np.split(order, range(16, len(order), 16)):
            pairs = [[BOS, *query, EOS, EOS, *documents[i][: room - len(query)], EOS] for i in some]
            width = min(-(-max(map(len, pairs)) // 32) * 32, CONFIG.max_length)
            tokens = np.full((len(some), width), PAD, np.int32)
            for row, pair in zip(tokens, pairs, strict=True):
                row[: len(pair)] = pair
            scores[number, some] = np.asarray(score(state, tokens, np.asarray([len(p) for p in pairs], np.int32)))
        if number % 20 == 19:
            done, so_far = number + 1, mrr(scores[: number + 1], right[: number + 1])
            print(f"{done}/{len(asked)} MRR@10 {so_far:.3f}, {time.monotonic() - began:.0f} s", flush=True)
    ours = mrr(scores, right)
    return {
        "mrr": round(ours, 4),
        "bm25_mrr": round(lexical, 4),
        "ratio": round(ours / lexical, 4),
        "questions": len(asked),
        "paragraphs": len(documents),
    }


def thin(corpus: Corpus, most: int, shortest: int = 30, seed: int = 0) -> Corpus:
    """All of XQuAD, and `most` of the docstrings that have `shortest` words or more."""
    first = corpus.translated
    words = np.asarray([sum(len(s.split()) for s in p) for p in corpus.passages])
    long = np.flatnonzero(words[first:] >= shortest) + first
    kept = [*range(first), *sorted(np.random.default_rng(seed).permutation(long)[:most].tolist())]
    number = {old: new for new, old in enumerate(kept)}
    queries = [(q, number[p], at) for q, p, at in corpus.queries if p in number]
    return Corpus([corpus.passages[i] for i in kept], queries, first)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    builtin = Path(__file__).resolve().parents[1] / "jaxrank" / "builtin"
    parser.add_argument("--xquad", type=Path, required=True, help="folder with XQuAD's xquad.XX.json as XX.json")
    parser.add_argument("--output", type=Path, default=builtin, help="the model's folder (default: jaxrank/builtin)")
    parser.add_argument("--minutes", type=float, default=30, help="training time on the machine at hand")
    parser.add_argument("--docstrings", type=Path, nargs="*", help="folders of Python files (default: this Python's)")
    parser.add_argument("--start", type=Path, help="continue from this folder's weights and tokenizer")
    parser.add_argument("--passages", type=int, default=24000, help="docstrings to train on, at most")
    parser.add_argument("--evaluate-only", action="store_true", help="evaluate the folder as it is")
    parser.add_argument("--every", type=int, default=1, help="evaluate every n-th question only")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not args.evaluate_only:
        paths = sysconfig.get_paths()
        corpus = collect(args.xquad, args.docstrings or sorted({Path(paths["stdlib"]), Path(paths["purelib"])}))
        corpus = thin(corpus, args.passages)
        texts = [s for p in corpus.passages for s in p] + [q for q, _, _ in corpus.queries]
        if args.start is None:
            tokenizer = make_tokenizer(texts, CONFIG.vocab_size)
        else:
            tokenizer = Tokenizer.from_file(str(args.start / "tokenizer.json"))
        export_settings(tokenizer, args.output)
        print(f"{len(corpus.passages)} passages, {len(corpus.queries)} queries", flush=True)
        examples = Examples(corpus, tokenizer, args.seed)
        export(train(examples, args.minutes, args.output, args.seed, args.start), args.output)
    print(json.dumps(evaluate(args.output, args.xquad, args.every)))


if __name__ == "__main__":
    main()
