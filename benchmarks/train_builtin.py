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
import json
import sysconfig
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from builtin_examples import (
    BOS,
    CANDIDATES,
    EOS,
    PAD,
    VOCABULARY,
    Examples,
    collect,
    make_tokenizer,
    read_xquad,
    thin,
)
from flax import nnx
from tokenizers import Tokenizer

from jaxrank import Reranker, convert
from jaxrank.models.xlm_roberta import XLMRoberta, XLMRobertaConfig
from jaxrank.types import Layout, Packed

CONFIG = XLMRobertaConfig(
    vocab_size=VOCABULARY, width=192, layers=3, heads=3, ffn=768, position_rows=514, pad_id=PAD, eps=1e-5
)


def new_model(seed: int = 0) -> XLMRoberta:
    """Identity in the first two layers' query and key projections, so that equal tokens attend to each other."""
    model = XLMRoberta(CONFIG, dtype=jnp.float32, rngs=nnx.Rngs(seed), implementation="dense")
    model.word[...] = model.word[...] * 5.0
    at = np.arange(CONFIG.position_rows)[:, None] / 1e4 ** (np.arange(CONFIG.width // 2)[None] / (CONFIG.width // 2))
    model.position[...] = jnp.asarray(0.04 * np.concatenate([np.sin(at), np.cos(at)], 1), jnp.float32)
    for layer in (*model.layers, model.last):
        qkv = layer.attention.qkv
        for part in (qkv, layer.attention.out, layer.up, layer.down):
            part.kernel[...] = part.kernel[...] * 3.0  # to about 1 / sqrt(width): what a layer adds must be seen
        if layer is not model.last:
            identity = jnp.eye(CONFIG.width)
            qkv.kernel[...] = qkv.kernel[...] + jnp.concatenate([identity, identity, 0 * identity], 1)
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
def train_step(
    graph: Any, state: Any, ema: Any, memory: Any, rate: Any, decay: Any, tokens: Any, lengths: Any, coverage: Any
) -> Any:
    def loss(state: Any) -> tuple[jax.Array, jax.Array]:
        shape = lengths.shape
        logits = score_rows(graph, state, tokens.reshape(-1, tokens.shape[-1]), lengths.reshape(-1)).reshape(shape)
        right = jnp.zeros(shape).at[:, 0].set(1.0)
        ranking = optax.softmax_cross_entropy(logits, right).mean()
        absolute = optax.sigmoid_binary_cross_entropy(logits, coverage).mean()
        return 0.5 * ranking + absolute, (logits.argmax(-1) == 0).mean()

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

    paragraphs = read_xquad(xquad / "en.json")
    asked = [(qa["question"], i) for i, p in enumerate(paragraphs) for qa in p["qas"]][::every]
    right = np.asarray([i for _, i in asked])
    index = bm25s.BM25()
    index.index(bm25s.tokenize([p["context"] for p in paragraphs], show_progress=False), show_progress=False)
    queries = bm25s.tokenize([q for q, _ in asked], return_ids=False, show_progress=False)
    lexical = mrr(np.stack([index.get_scores([str(word) for word in q]) for q in queries]), right)

    reranker = Reranker.from_pretrained(folder)
    documents = [p["context"] for p in paragraphs]
    scores = np.zeros((len(asked), len(documents)), np.float32)
    began = time.monotonic()
    for number, (question, _) in enumerate(asked):
        scores[number] = reranker.score(question, documents, raw=True, progress=False)
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
