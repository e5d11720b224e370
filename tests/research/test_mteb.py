"""MTEBReranker in MTEB's own evaluation, on a small task made here, beside sentence-transformers through MTEB."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ir_measures
import mteb
import numpy as np
import pytest
import sentence_transformers
from datasets import Dataset
from ir_measures import AP, RR, R, nDCG
from mteb._create_dataloaders import create_dataloader
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models.models_protocols import CrossEncoderProtocol
from mteb.types import PromptType

from jaxrank import CrossEncoder, Reranker
from jaxrank.errors import RequestError
from jaxrank.mteb import MTEBReranker
from tests.checkpoints import make_bge, make_qwen3

PARAGRAPHS = {
    "panda": "The giant panda is a bear species endemic to China. It eats bamboo almost alone, and lives in mountain "
    "forests of Sichuan, Shaanxi and Gansu.",
    "polar bear": "The polar bear lives around the Arctic Ocean. It hunts seals from the ice, and its skin is black "
    "beneath a coat that looks white.",
    "Paris": "Paris is the capital of France. It lies on the Seine, and about two million people live there.",
    "Seine": "The Seine rises near Dijon and flows through Paris to the English Channel at Le Havre.",
    "gravity": "Gravity is the attraction between bodies that have mass. On Earth it gives things their weight.",
    "tides": "Tides are the rise and fall of sea levels, which the pull of the moon and of the sun brings about.",
    "Beijing": "Beijing is the capital of China. More than twenty million people live in its area.",
    "bamboo": "Bamboos are grasses, and some of them grow almost a metre in a day. Their stems are hollow.",
}
QUESTIONS = {
    "Where do giant pandas live?": {"panda": 2, "bamboo": 1},
    "What do pandas eat?": {"panda": 1, "bamboo": 1},
    "Which river flows through the capital of France?": {"Seine": 2, "Paris": 1},
    "What is the capital of China?": {"Beijing": 1},
    "Why is there high water and low water?": {"tides": 1, "gravity": 1},
    "Which bear hunts on ice?": {"polar bear": 1},
}


class Paragraphs(AbsTaskRetrieval):
    """Rank all paragraphs but one for each question; nothing is downloaded."""

    metadata = TaskMetadata(
        name="Paragraphs",
        description="Questions about paragraphs of general knowledge.",
        reference="https://example.org",
        dataset={"path": "none", "revision": "1"},
        type="Reranking",
        category="t2t",
        modalities=["text"],
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score="ndcg_at_10",
        date=("2024-01-01", "2024-01-01"),
        domains=["Encyclopaedic"],
        task_subtypes=[],
        license="cc0-1.0",
        annotations_creators="human-annotated",
        dialect=[],
        sample_creation="created",
        bibtex_citation="",
    )

    def load_data(self, num_proc: int | None = None, **_: Any) -> None:
        self.dataset = {
            "default": {
                "test": {
                    "queries": Dataset.from_list([{"id": f"q{i}", "text": text} for i, text in enumerate(QUESTIONS)]),
                    "corpus": Dataset.from_list(
                        [{"id": name, "title": name, "text": text} for name, text in PARAGRAPHS.items()]
                    ),
                    "relevant_docs": QRELS,
                    "top_ranked": CANDIDATES,
                }
            }
        }
        self.data_loaded = True


QRELS = {f"q{i}": dict(judged) for i, judged in enumerate(QUESTIONS.values())}
CANDIDATES = {
    query: [name for i, name in enumerate(PARAGRAPHS) if i != number or name in QRELS[query]]
    for number, query in enumerate(QRELS)
}


def figures(model: Any) -> dict[str, Any]:
    """All that MTEB says of a model on the task."""
    result = mteb.evaluate(model, Paragraphs(), cache=None, show_progress_bar=False, co2_tracker=False)
    (task,) = result.task_results
    (scores,) = task.scores["test"]
    return scores


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bge(tmp_path_factory.mktemp("bge"), seed=1, max_position_embeddings=258)


@pytest.fixture(scope="module")
def model(folder: Path, own: dict[str, Any]) -> MTEBReranker:
    return MTEBReranker(str(folder), **own)


class TestEvaluate:
    def test_as_sentence_transformers(self, model: MTEBReranker, folder: Path) -> None:
        assert isinstance(model, CrossEncoderProtocol)
        ours = figures(model)
        theirs = figures(sentence_transformers.CrossEncoder(str(folder), device="cpu"))
        assert ours.keys() == theirs.keys()
        numbers = [name for name, value in theirs.items() if isinstance(value, int | float)]
        assert len(numbers) > 30
        assert {name: ours[name] for name in numbers} == pytest.approx(
            {name: theirs[name] for name in numbers}, abs=1e-9, nan_ok=True
        )
        assert 0.1 < ours["main_score"] < 0.99

    def test_as_measured_apart(self, model: MTEBReranker, folder: Path, own: dict[str, Any]) -> None:
        """The order of Reranker's scores, judged by ir-measures."""
        reranker = Reranker.from_pretrained(folder, dtype="float32", **own)
        run = {
            query: dict(zip(names, reranker.score(text, [f"{n} {PARAGRAPHS[n]}" for n in names]).tolist(), strict=True))
            for (query, names), text in zip(CANDIDATES.items(), QUESTIONS, strict=True)
        }
        ours = figures(model)
        for measure, name in [
            (nDCG @ 10, "ndcg_at_10"),
            (AP @ 100, "map_at_100"),
            (R @ 3, "recall_at_3"),
            (RR, "mrr_at_10"),
        ]:
            want = ir_measures.calc_aggregate([measure], QRELS, run)[measure]
            assert ours[name] == pytest.approx(want, abs=1e-5), name

    def test_built_in(self, model: MTEBReranker, own: dict[str, Any]) -> None:
        """A model that was trained ranks better than one that was not."""
        builtin = MTEBReranker(**own)
        assert builtin.mteb_model_meta.name == "jaxrank/builtin"
        assert figures(builtin)["ndcg_at_10"] > figures(model)["ndcg_at_10"] + 0.1

    def test_loaded_by_mteb(self, folder: Path, model: MTEBReranker, own: dict[str, Any]) -> None:
        meta = model.mteb_model_meta
        assert (meta.is_cross_encoder, meta.framework, meta.max_tokens) == (True, ["JAX"], 256)
        assert meta.name == str(folder)
        again = meta.load_model()
        assert isinstance(again, MTEBReranker)
        assert figures(again)["main_score"] == figures(meta)["main_score"] == figures(model)["main_score"]
        assert again.mteb_model_meta.experiment_kwargs == meta.experiment_kwargs

    def test_results_that_mteb_keeps(self, folder: Path, own: dict[str, Any], tmp_path: Path) -> None:
        """Those of another length are not taken for these, and no token is written down."""
        kept = mteb.ResultCache(tmp_path)
        scored: list[Any] = []
        for length in (256, 128, 128):
            model = MTEBReranker(folder, processor_kwargs={"model_max_length": length}, token="secret", **own)
            model.predict = lambda *loaders, of=model, **given: (
                scored.append(of) or type(of).predict(of, *loaders, **given)
            )
            mteb.evaluate(model, Paragraphs(), cache=kept, show_progress_bar=False, co2_tracker=False)
        assert [model.model.max_length for model in scored] == [256, 128]
        written = "".join(file.read_text() for file in tmp_path.rglob("*.json"))
        assert "max_length" in written
        assert "secret" not in written


def loader(rows: list[dict[str, str]], kind: PromptType) -> Any:
    dataset = Dataset.from_list([{"id": str(i), **row} for i, row in enumerate(rows)])
    return create_dataloader(dataset, task_metadata=Paragraphs.metadata, prompt_type=kind, batch_size=2)


PAIRS = [(text, name) for text in QUESTIONS for name in list(PARAGRAPHS)[:3]]


class TestPredict:
    def predict(self, model: MTEBReranker, instructions: list[str] | None = None, **kwargs: Any) -> np.ndarray:
        queries = [{"text": query} for query, _ in PAIRS]
        if instructions is not None:
            queries = [{**q, "instruction": i} for q, i in zip(queries, instructions, strict=True)]
        documents = [{"text": document} for _, document in PAIRS]
        task = dict(task_metadata=Paragraphs.metadata, hf_split="test", hf_subset="default")
        loaders = loader(queries, PromptType.query), loader(documents, PromptType.document)
        return model.predict(*loaders, **task, show_progress_bar=False, **kwargs)

    def test_in_parts(self, model: MTEBReranker, monkeypatch: pytest.MonkeyPatch) -> None:
        want = self.predict(model)
        assert (want.shape, want.dtype) == ((len(PAIRS),), np.float32)
        np.testing.assert_allclose(want, model.model.predict(PAIRS), atol=1e-6)
        monkeypatch.setattr("jaxrank.mteb.PAIRS", 5)
        np.testing.assert_allclose(self.predict(model, batch_size=4), want, atol=1e-6)

    def test_instructions(self, model: MTEBReranker, own: dict[str, Any], tmp_path: Path) -> None:
        """Behind the query for models that read none, as MTEB writes it, and in their place for those that do."""
        instructions = ["Find animals.", "Find places.", "Find places."] * len(QUESTIONS)
        behind = [(f"{query} {i}", document) for (query, document), i in zip(PAIRS, instructions, strict=True)]
        np.testing.assert_allclose(self.predict(model, instructions), model.model.predict(behind), atol=1e-6)
        prompted = MTEBReranker(CrossEncoder(make_qwen3(tmp_path), max_length=256, **own))
        assert prompted.mteb_model_meta.use_instructions
        want = [
            prompted.model.reranker.score(query, [document], instruct=instruct)[0]
            for (query, document), instruct in zip(PAIRS, instructions, strict=True)
        ]
        np.testing.assert_allclose(self.predict(prompted, instructions), want, atol=1e-5)

    def test_what_is_not_done(self, model: MTEBReranker) -> None:
        with pytest.raises(RequestError, match="predict takes no precision"):
            self.predict(model, precision="int8")
