"""Reranker on a Qwen3-Reranker checkpoint: scores of the publisher's script, prompts, instructs, wrong arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.publisher import PREFIX, Script
from jaxrank import RequestError, Reranker
from tests.checkpoints import TEXT, make_bge, make_qwen3

QUERY = "Where do pandas live?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen3(tmp_path_factory.mktemp("qwen3"))


def load(folder: Path, **options: Any) -> Reranker:
    return Reranker.from_pretrained(folder, dtype="float32", compile_cache=None, **options)


@pytest.fixture(scope="module")
def reranker(folder: Path) -> Reranker:
    return load(folder)


def published(folder: Path, query: str = QUERY, instruct: str | None = None) -> np.ndarray:
    """The script's probabilities of yes."""
    script = Script(folder)
    return 1 / (1 + np.exp(-script.logits([script.ids(query, text, instruct) for text in TEXT])))


class TestScores:
    def test_are_those_of_the_publishers_script(self, reranker: Reranker, folder: Path) -> None:
        want = published(folder)
        assert np.ptp(want) > 0.05
        assert np.abs(reranker.score(QUERY, TEXT, progress=False) - want).max() <= 1e-5

    def test_instruct(self, reranker: Reranker, folder: Path) -> None:
        want = published(folder, instruct="Find animals")
        assert np.abs(want - published(folder)).max() > 1e-3
        assert np.abs(reranker.score(QUERY, TEXT, instruct="Find animals", progress=False) - want).max() <= 1e-5
        assert np.abs(load(folder, instruct="Find animals").score(QUERY, TEXT, progress=False) - want).max() <= 1e-5

    def test_rank_and_predict(self, reranker: Reranker) -> None:
        scores = reranker.score(QUERY, TEXT, instruct="i", progress=False)
        ranked = reranker.rank(QUERY, TEXT, instruct="i", progress=False)
        assert [r.index for r in ranked] == np.argsort(-scores, kind="stable").tolist()
        assert np.abs(np.array([r.score for r in ranked]) - np.sort(scores)[::-1]).max() <= 1e-6
        pairs = [pair for text in TEXT for pair in ((QUERY, text), ("another query", text))]
        predicted = reranker.predict(pairs, instruct="i", progress=False)
        assert np.abs(predicted[::2] - scores).max() <= 1e-6
        assert (
            np.abs(predicted[1::2] - reranker.score("another query", TEXT, instruct="i", progress=False)).max() <= 1e-6
        )

    def test_alone_or_together(self, reranker: Reranker) -> None:
        alone = [reranker.score(QUERY, [text], raw=True, progress=False)[0] for text in TEXT]
        assert np.abs(reranker.score(QUERY, TEXT, raw=True, progress=False) - alone).max() <= 1e-5

    def test_sequence_classification(self, tmp_path: Path) -> None:
        scores = load(make_qwen3(tmp_path, classifier=True)).score(QUERY, TEXT, progress=False)
        assert np.all((scores >= 0) & (scores <= 1))


class TestPrompts:
    def test_the_template_decides(self, reranker: Reranker, folder: Path, tmp_path: Path) -> None:
        file = tmp_path / "mine.jinja"
        file.write_text((Path(__file__).parent.parent / "jaxrank/text/templates/qwen3/sglang.jinja").read_text())
        sglang = load(folder, prompt="sglang").score(QUERY, TEXT, progress=False)
        assert np.array_equal(load(folder, chat_template=file).score(QUERY, TEXT, progress=False), sglang)
        assert np.abs(reranker.score(QUERY, TEXT, progress=False) - sglang).max() > 1e-3

    def test_framed_requests_are_unwrapped(self, reranker: Reranker) -> None:
        query = f"{PREFIX}<Instruct>: Find animals\n<Query>: {QUERY}\n"
        documents = [f"<Document>: {text}<|im_end|>\n<|im_start|>assistant\n" for text in TEXT]
        want = reranker.score(QUERY, TEXT, instruct="Find animals", progress=False)
        assert np.array_equal(reranker.score(query, documents, progress=False), want)

    def test_max_length_is_the_publishers(self, reranker: Reranker, folder: Path) -> None:
        assert reranker.max_length == 8192
        assert load(folder, max_length=40960).max_length == 40960


class TestWrongArguments:
    @pytest.mark.parametrize(
        "options, message",
        [
            ({"prompt": "offical"}, "prompt 'offical' is unknown; one of official, sglang, vllm, none"),
            ({"chat_template": "nowhere.jinja"}, "chat template nowhere.jinja: cannot be read (No such file"),
            ({"chat_template": "a.jinja", "prompt": "vllm"}, "give one of them"),
            ({"prompt": "none", "instruct": "i"}, "the prompt has no place for it"),
            ({"instruct": "\ud800"}, "instruct contains a lone surrogate"),
            ({"max_length": 30}, "max_length is 30; the prompt alone takes"),
            ({"max_length": 40961}, "max_length is 40961; this model takes 8 to 40960 tokens"),
        ],
    )
    def test_of_from_pretrained(self, folder: Path, options: dict[str, Any], message: str) -> None:
        with pytest.raises(RequestError) as caught:
            load(folder, **options)
        assert message in str(caught.value)

    def test_models_without_a_prompt(self, tmp_path: Path) -> None:
        folder = make_bge(tmp_path)
        for option in ("prompt", "chat_template", "instruct"):
            with pytest.raises(RequestError, match=f"reads query and document without a prompt; leave out {option}"):
                load(folder, **{option: "official"})
        with pytest.raises(RequestError, match="without an instruct; leave it out"):
            load(folder).score(QUERY, TEXT, instruct="i")

    def test_of_score(self, reranker: Reranker, folder: Path) -> None:
        with pytest.raises(RequestError, match="instruct must be a string, got int"):
            reranker.score(QUERY, TEXT, instruct=3)  # pyright: ignore[reportArgumentType]
        with pytest.raises(RequestError, match=r"documents\[1\] must be a string, got None"):
            reranker.score(QUERY, ["a", None])  # pyright: ignore[reportArgumentType]
        with pytest.raises(RequestError, match="the prompt has no place for it"):
            load(folder, prompt="none").score(QUERY, TEXT, instruct="i")
