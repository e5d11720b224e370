"""Reranker with a model that sees: what Python programs give, against transformers on the same prompts and pixels."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.publisher_vl import Prompt, PublishedVL
from jaxrank import Reranker
from jaxrank.errors import MediaError, RequestError
from jaxrank.types import Encoded
from tests.checkpoints import make_qwen3_vl
from tests.media import photo


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen3_vl(tmp_path_factory.mktemp("vl"))


@pytest.fixture(scope="module")
def reranker(folder: Path) -> Reranker:
    return Reranker.from_pretrained(folder, dtype="float32", row_tokens=512, max_length=1024, compile_cache=None)


def published(folder: Path, pairs: list[Encoded]) -> np.ndarray:
    theirs = PublishedVL(folder)
    prompts = []
    for pair in pairs:
        runs = [run for run in (pair.prefix_media, pair.media) if run is not None]
        prompts.append(
            Prompt(np.concatenate([pair.prefix, pair.tokens]), tuple(p for run in runs for p in run.patches))
        )
    return np.array([theirs.logit(prompt) for prompt in prompts])


DOCUMENTS: list[Any] = [
    "The giant panda is a bear.",
    photo(90, 64, 1),
    {"image": photo(200, 40, 2)},
    [{"type": "text", "text": "before "}, {"type": "image", "image": photo(64, 130, 3)}, " after"],
    {"content": [photo(33, 65, 4), {"text": "Where do pandas live?"}, photo(100, 100, 5)]},
    {"video": [photo(96, 64, seed) for seed in range(6, 9)]},
]


class TestScores:
    @pytest.mark.parametrize(
        "query", ["Where do pandas live?", ["like this: ", photo(128, 96, 0)]], ids=["text", "image"]
    )
    def test_equal_transformers(self, folder: Path, reranker: Reranker, query: Any) -> None:
        pairs = reranker.encode(query, DOCUMENTS)
        want = published(folder, pairs)
        assert want.std() > 0.1
        got = reranker.score(query, DOCUMENTS, raw=True)
        assert np.abs(got - want).max() <= 2e-4
        alone = np.concatenate([reranker.score(query, [document], raw=True) for document in DOCUMENTS])
        assert np.abs(got - alone).max() <= 1e-5

    def test_a_querys_image_is_looked_at_once(self, reranker: Reranker) -> None:
        """Eight documents, more than one row of them."""
        assert reranker.tower is not None
        query, documents = photo(160, 160, 20), [photo(160, 128, 30 + i) for i in range(8)]
        pairs = reranker.encode(query, documents)
        assert sum(len(pair.tokens) for pair in pairs) + len(pairs[0].prefix) > 0
        before = reranker.tower.encoded
        reranker.score_encoded(pairs[:3])
        reranker.score_encoded(pairs)
        assert reranker.tower.encoded - before == 9
        again = [documents[0], documents[0], {"image": documents[0]}]
        before = reranker.tower.encoded
        reranker.score(query, again)
        assert reranker.tower.encoded - before == 2

    def test_text_alone_runs_the_programs_of_text(self, reranker: Reranker) -> None:
        reranker.score("query", ["text", "other"])
        assert any(not media for _, media in reranker.scorer.programs)

    def test_ranking_carries_what_was_given(self, reranker: Reranker) -> None:
        ranked = reranker.rank("panda", DOCUMENTS[:3])
        assert all(one.document is DOCUMENTS[one.index] for one in ranked)


class TestFiles:
    def test_paths_and_bytes(self, reranker: Reranker, tmp_path: Path) -> None:
        image = photo(120, 60, 40)
        image.save(tmp_path / "photo.png")
        encoded = io.BytesIO()
        image.save(encoded, "PNG")
        forms: list[Any] = [tmp_path / "photo.png", str(tmp_path / "photo.png"), encoded.getvalue()]
        want = reranker.score("q", [image], raw=True)
        got = reranker.score("q", [{"image": form} for form in forms], raw=True)
        np.testing.assert_allclose(got, np.repeat(want, 3), atol=1e-5)

    def test_refused(self, reranker: Reranker, tmp_path: Path) -> None:
        (tmp_path / "page.png").write_text("<html>")
        for content, message in [
            ({"image": tmp_path / "missing.png"}, r"documents\[0\] cannot be read: No such file"),
            ({"image": tmp_path / "page.png"}, r"documents\[0\] is not an image of a kind that is taken"),
            ({"image": "https://example.com/a.png"}, r"documents\[0\] is an address; the library reads files"),
            ({"image": 7}, r"documents\[0\] holds int as its image; it must be a string, a Pillow image"),
            (["text", 7], r"documents\[0\]\[1\] is int; it must be a string, a Pillow image"),
            ({"sound": "x"}, r"documents\[0\] is dict; it must be"),
            (photo(1000, 2, 0), r"documents\[0\] is more than 200 times as long as it is wide"),
        ]:
            with pytest.raises(RequestError, match=message):
                reranker.encode("q", [content])
        with pytest.raises(MediaError):
            reranker.encode("q", [{"image": b"GIF89a"}])


def test_a_model_of_text_takes_no_images() -> None:
    with pytest.raises(RequestError, match=r"documents\[0\] must be a string, got Image"):
        Reranker.from_pretrained(compile_cache=None).encode("q", [photo(64, 64, 0)])
