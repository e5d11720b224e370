"""docs/examples: every script over its command line, and its result against transformers on the same weights."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, Qwen3ForCausalLM, XLMRobertaForSequenceClassification

from jaxrank import Reranker
from jaxrank.reranker import BUILTIN
from jaxrank.runtime.packing import pack
from tests.checkpoints import make_qwen3

EXAMPLES = Path(__file__).parent.parent.parent / "docs" / "examples"
QUERY = "Where do giant pandas live?"
DOCUMENT = "The giant panda is endemic to China. Paris ist die Hauptstadt von Frankreich."


@cache
def example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Family:
    """A checkpoint in jaxrank, and in transformers in float64. encoder: the part of it that has hidden states."""

    folder: Path
    reranker: Reranker
    model: Any
    encoder: Any
    answers: tuple[int, int] | None

    def logits(self, embeddings: list[torch.Tensor]) -> np.ndarray:
        """Of pairs of one length, from their words' embeddings, each [T, D]."""
        with torch.no_grad():
            return self.classify(self.encoder(inputs_embeds=torch.stack(embeddings)).last_hidden_state)

    def classify(self, states: torch.Tensor) -> np.ndarray:
        """The logits that the model's head makes of pairs' last states [n, T, D], decoders' normalised."""
        with torch.no_grad():
            if self.answers is None:
                return self.model.classifier(states)[:, 0].numpy()
            yes, no = self.answers
            answers = self.model.lm_head(states[:, -1])
            return (answers[:, yes] - answers[:, no]).numpy()

    def embeddings(self, ids: Any) -> torch.Tensor:
        with torch.no_grad():
            return self.encoder.get_input_embeddings()(torch.tensor(np.asarray(ids), dtype=torch.int64))


@pytest.fixture(scope="module", params=["xlm-roberta", "qwen3"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Family]:
    if request.param == "qwen3":
        folder = make_qwen3(tmp_path_factory.mktemp("qwen3"), num_hidden_layers=2, hidden_size=64)
        model: Any = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
        yes, no = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(["yes", "no"])
        encoder, answers = model.model, (yes, no)
    else:
        folder = BUILTIN
        model = XLMRobertaForSequenceClassification.from_pretrained(folder, dtype=torch.float64).eval()
        encoder, answers = model.roberta, None
    with torch.no_grad():
        yield Family(folder, Reranker.from_pretrained(folder, dtype="float32"), model, encoder, answers)


def document_tokens(family: Family, query: str, document: str) -> slice:
    """Where a document's tokens lie in its pair: the fewest that are its text."""
    (pair,) = family.reranker.encode(query, [document])
    decode, count = family.reranker.tokenizer.tokenizer.decode, len(family.reranker.tokens_of(document))
    for length in range(count - 3, count + 4):
        for start in range(len(pair) - length):
            if decode(pair.tokens[start : start + length].tolist()).strip().lower() == document.lower():
                return slice(start, start + length)
    raise AssertionError("the document is not in the pair")


class TestHiddenStates:
    def test_as_transformers_has_them(self, family: Family) -> None:
        (pair,) = family.reranker.encode(QUERY, [DOCUMENT])
        ids = torch.tensor(pair.tokens[None], dtype=torch.int64)
        want = [x[0].numpy() for x in family.encoder(input_ids=ids, output_hidden_states=True).hidden_states]
        assert len(want) == family.model.config.num_hidden_layers + 1
        model = family.reranker.model
        batch = pack([pair], len(pair), causal=model.causal)
        states = [np.asarray(x) for x in example("hidden_states").all_states(model, batch)]
        one = example("hidden_states").token_states(family.reranker, QUERY, DOCUMENT, 1)
        assert np.abs(one - states[1]).max() < 1e-5
        if family.answers is not None:
            states[-1] = np.asarray(model.norm(jnp.asarray(states[-1])))
        for got, expected in zip(states, want, strict=True):
            assert got.shape == expected.shape
            assert expected.std() > 0.1
            assert np.abs(got - expected).max() < 1e-4

    def test_lens(self, family: Family) -> None:
        documents = [DOCUMENT, "Gravity attracts two bodies.", ""]
        got = example("hidden_states").lens(family.reranker, QUERY, documents)
        assert got.shape == (family.model.config.num_hidden_layers + 1, 3)
        for i, document in enumerate(documents):
            (pair,) = family.reranker.encode(QUERY, [document])
            ids = torch.tensor(pair.tokens[None], dtype=torch.int64)
            states = family.encoder(input_ids=ids, output_hidden_states=True).hidden_states
            for layer, one in enumerate(states):
                last = one if layer == len(states) - 1 or family.answers is None else family.encoder.norm(one)
                assert got[layer, i] == pytest.approx(family.classify(last)[0], abs=2e-4)


class TestSaliency:
    def test_gradient_against_finite_differences(self, family: Family) -> None:
        """Of transformers' model in float64, token by token in a random direction."""
        found = example("saliency").saliency(family.reranker, QUERY, DOCUMENT)
        (pair,) = family.reranker.encode(QUERY, [DOCUMENT])
        at = document_tokens(family, QUERY, DOCUMENT)
        assert found.ids == pair.tokens[at].tolist()
        whole = family.embeddings(pair.tokens)
        assert np.array_equal(found.embeddings, whole[at].numpy().astype(np.float32))
        rng, step, moved = np.random.default_rng(0), 1e-4, []
        directions = rng.normal(size=found.gradient.shape)
        for place, direction in zip(range(*at.indices(len(pair))), directions, strict=True):
            for sign in (1, -1):
                moved.append(whole.clone())
                moved[-1][place] += sign * step * torch.tensor(direction)
        ends = family.logits(moved)
        slopes = (ends[::2] - ends[1::2]) / (2 * step)
        got = (found.gradient * directions).sum(-1)
        assert np.std(slopes) > 1e-3
        assert np.abs(got - slopes).max() < 1e-3 * np.abs(slopes).max()

    def test_weights(self, family: Family) -> None:
        found = example("saliency").saliency(family.reranker, QUERY, DOCUMENT)
        for row, values, weight, signed in zip(
            found.gradient, found.embeddings, found.weights, found.signed, strict=True
        ):
            assert weight == pytest.approx(sum(float(x) ** 2 for x in row) ** 0.5, rel=1e-5)
            assert signed == pytest.approx(sum(float(a) * float(b) for a, b in zip(row, values, strict=True)), abs=1e-5)

    def test_words_of_the_query(self, family: Family) -> None:
        tokenizer = family.reranker.tokenizer.tokenizer
        ids = [tokenizer.encode(word, add_special_tokens=False).ids[-1] for word in ("live", "where", "?", "bank")]
        common = example("saliency").shared(family.reranker, "where pandas live ?", ids)
        assert common.tolist()[:3] == [True, True, False]
        assert not common[3] or ids[3] in ids[:2]


class TestPerturb:
    def test_noise_against_a_plain_loop(self, family: Family) -> None:
        noise = np.random.default_rng(1).normal(0, 0.5, (3, family.reranker.model.word.shape[1])).astype(np.float32)
        ids, got = example("perturb").perturbed(family.reranker, QUERY, DOCUMENT, noise)
        (pair,) = family.reranker.encode(QUERY, [DOCUMENT])
        text = family.reranker.tokenizer.tokenizer.decode(ids)
        assert text.strip().lower() == QUERY.lower()
        first = next(i for i in range(len(pair)) if pair.tokens[i : i + len(ids)].tolist() == ids)
        whole = family.embeddings(pair.tokens)
        moved = []
        for i in range(first, first + len(ids)):
            for one in noise:
                moved.append(whole.clone())
                moved[-1][i] += whole[i].square().mean().sqrt() * torch.tensor(one, dtype=torch.float64)
        assert np.abs(got.ravel() - family.logits(moved)).max() < 2e-4
        assert got.std() > 1e-2

    @pytest.mark.parametrize("family", ["qwen3"], indirect=True)  # whose scored token moves when one before it goes
    def test_without_each_token(self, family: Family) -> None:
        got = example("perturb").without_each(family.reranker, QUERY, DOCUMENT)
        pair, at = example("perturb").query_tokens(family.reranker, QUERY, DOCUMENT)
        kept = [[*pair.tokens[:i].tolist(), *pair.tokens[i + 1 :].tolist()] for i in at]
        assert np.abs(got - family.logits([family.embeddings(ids) for ids in kept])).max() < 2e-4
        assert got.std() > 1e-2


class TestPrecision:
    @pytest.mark.parametrize("family", ["xlm-roberta"], indirect=True)
    def test_logits(self, family: Family) -> None:
        documents = [
            DOCUMENT,
            "Gravity attracts two bodies.",
            "",
            "Pandas live in China.",
            "Giant pandas live in Paris.",
        ]
        got = example("precision").logits(str(family.folder), QUERY, documents)
        want = []
        for document in documents:
            (pair,) = family.reranker.encode(QUERY, [document])
            want.append(family.logits([family.embeddings(pair.tokens)])[0])
        assert np.abs(got["float32"] - want).max() < 2e-4
        assert np.array_equal(got["float32"], family.reranker.score(QUERY, documents, raw=True))
        half = Reranker.from_pretrained(family.folder, dtype="bfloat16").score(QUERY, documents, raw=True)
        assert np.array_equal(got["bfloat16"], half)
        assert 0 < np.abs(half - want).max() < 0.2 * np.std(want)
        assert np.array_equal(got["bfloat16, rounded"], torch.tensor(half).bfloat16().float().numpy())

    def test_ties_and_swaps(self) -> None:
        rng = np.random.default_rng(2)
        a, b = rng.integers(0, 6, (2, 40)).astype(np.float32)
        both = [(i, j) for i in range(40) for j in range(i)]
        assert example("precision").ties(a) == sum(a[i] == a[j] for i, j in both)
        assert example("precision").swaps(a, b) == sum((a[i] - a[j]) * (b[i] - b[j]) < 0 for i, j in both)


def check_hidden_states(out: str, reranker: Reranker) -> None:
    rows = [[float(x) for x in line.split()] for line in out.partition("\n\n")[0].splitlines()[1:]]
    assert [row[0] for row in rows] == [0, 1, 2]
    score = reranker.score(QUERY, example("hidden_states").DOCUMENTS, raw=True)
    assert np.abs(np.array(rows[-1][1:]) - score).max() < 1e-3
    assert len(re.findall(r" \d\.\d{3}$", out.partition("\n\n")[2], re.M)) >= 6, "a line for each token of the query"


def check_saliency(out: str, reranker: Reranker) -> None:
    query, document = example("saliency").QUERY, example("saliency").DOCUMENT
    weights = [float(line.split()[0]) for line in out.partition("\n\n")[0].splitlines()[1:]]
    (pair,), (blank,) = reranker.encode(query, [document]), reranker.encode(query, [""])
    assert len(weights) == len(pair) - len(blank)
    assert min(weights) > 0
    assert "mean weight of tokens that are in the query too" in out


def check_perturb(out: str, reranker: Reranker) -> None:
    (logit,) = reranker.score(example("perturb").QUERY, [example("perturb").DOCUMENT], raw=True)
    lines = out.splitlines()
    assert float(lines[0].split()[1]) == pytest.approx(logit, abs=1e-3)
    assert len(lines) - 2 >= 5, "a line for each token of the query"
    assert all(float(line.split()[0]) > 0 for line in lines[2:])


def check_precision(out: str, reranker: Reranker) -> None:
    top = [float(line.split()[0]) for line in out.partition("\n\n")[0].splitlines()[1:]]
    score = reranker.score(QUERY, example("precision").DOCUMENTS, raw=True)
    assert np.abs(np.array(top) - np.sort(score)[::-1][:10]).max() < 1e-4
    exact, half, rounded = re.findall(
        r": difference (\S+) on average, (\S+) at most; (\d+) pairs swapped, (\d+) tied", out
    )
    assert exact[:3] == ("0.00000", "0.00000", "0")
    assert 0 < float(half[0]) <= float(half[1]) < 0.2 * score.std()
    assert int(rounded[3]) > int(half[3]), "bfloat16 has too few steps for so many documents"


CHECKS: dict[str, Callable[[str, Reranker], None]] = {
    "hidden_states": check_hidden_states,
    "saliency": check_saliency,
    "perturb": check_perturb,
    "precision": check_precision,
}


BUILTIN_SCRIPTS = ("saliency", "precision")
QWEN3_SCRIPTS = ("hidden_states", "perturb")


@dataclass(frozen=True)
class Commands:
    """The scripts under way, by name, and the folder of those that are given a model."""

    folder: Path
    started: dict[str, subprocess.Popen[str]]


@pytest.fixture(scope="module", autouse=True)
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    """All at once, while other tests go on: each spends most of its time on importing and compiling."""
    folder = make_qwen3(tmp_path_factory.mktemp("commands"), num_hidden_layers=2, hidden_size=64)
    lines = {name: [sys.executable, str(EXAMPLES / f"{name}.py")] for name in BUILTIN_SCRIPTS}
    lines |= {name: [sys.executable, str(EXAMPLES / f"{name}.py"), str(folder)] for name in QWEN3_SCRIPTS}
    started = {
        name: subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for name, line in lines.items()
    }
    yield Commands(folder, started)
    for process in started.values():
        if process.poll() is None:
            process.kill()
            process.communicate()


def test_command_lines(commands: Commands) -> None:
    folder, started = commands.folder, commands.started
    assert set(started) == set(CHECKS)
    said = {name: process.communicate(timeout=300) for name, process in started.items()}
    rerankers = {
        True: Reranker.from_pretrained(dtype="float32"),
        False: Reranker.from_pretrained(folder, dtype="float32"),
    }
    for name, (out, error) in said.items():
        assert started[name].returncode == 0, error[-2000:]
        CHECKS[name](out, rerankers[name in BUILTIN_SCRIPTS])
    inside, others = re.findall(r"(?:too|others): (\S+?)(?:;|\n)", said["saliency"][0])
    assert float(inside) > float(others), "the built-in model matches words"


def test_layer_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        example("hidden_states").main(["--layer", "4"])
    assert "--layer is 4; this model has 3 layers, and 0 stands for their input" in capsys.readouterr().err


def test_all_examples_are_tested() -> None:
    """search.py is in tests/research, with qdrant."""
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*CHECKS, "search"}
