"""Tokenising without Python's lock: the same ids as Tokenizer.encode's, which holds it, and no way that leads there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from jaxrank.reranker import BUILTIN
from jaxrank.text.prompt_tokens import PromptTokenizer
from jaxrank.text.prompts import load_prompt
from jaxrank.text.tokenizer import NO_CUT, Cut, PairTokenizer, encodings, load_tokenizer, token_ids, tokens_of
from jaxrank.text.windows import Windows
from jaxrank.types import Patches
from tests.checkpoints import TEXT, make_qwen_tokenizer, make_tokenizer

XQUAD = Path(__file__).parent.parent.parent / "shared" / "data" / "xquad"
LANGUAGES = {
    "ar": "أين تعيش الباندا؟ تعيش في غابات الخيزران في جبال وسط الصين، وتأكل ١٢ كيلوغرامًا في اليوم.",
    "de": "Wo leben Pandas? In den Bambuswäldern Mittelchinas; täglich fressen sie über 12 kg, größtenteils Blätter.",
    "el": "Πού ζουν τα πάντα; Στα δάση μπαμπού της κεντρικής Κίνας, όπου τρώνε 12 κιλά την ημέρα.",
    "en": "Where do pandas live? In the bamboo forests of central China; they don't eat less than 12 kg a day.",
    "es": "¿Dónde viven los pandas? En los bosques de bambú de China central; comen más de 12 kg al día.",
    "hi": "पांडा कहाँ रहते हैं? मध्य चीन के बाँस के जंगलों में, जहाँ वे प्रतिदिन १२ किलो खाते हैं।",
    "ro": "Unde trăiesc urșii panda? În pădurile de bambus din China centrală; mănâncă 12 kg pe zi.",
    "ru": "Где живут панды? В бамбуковых лесах центрального Китая; они съедают более 12 кг в день.",
    "th": "แพนด้าอาศัยอยู่ที่ไหน ในป่าไผ่ทางตอนกลางของประเทศจีน กินวันละ ๑๒ กิโลกรัม",
    "tr": "Pandalar nerede yaşar? Orta Çin'in bambu ormanlarında; günde 12 kg'dan fazla yerler. İğne, ışık.",
    "vi": "Gấu trúc sống ở đâu? Trong các rừng tre ở miền trung Trung Quốc; chúng ăn 12 kg mỗi ngày.",
    "zh": "熊猫住在哪里？它们住在中国中部的竹林里，每天吃十二公斤以上的竹子。",
}
ODD = [
    "",
    " ",
    "  two  spaces ",
    "a\nb\t",
    "👩‍👩‍👧 🏳️‍🌈",
    "e\u0301 \u1100\u1161 ﬁ Å Ａ",
    "\x00",
    "</s> <think> <|im_end|>",
    " " * 3000,
]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer in which every language has merges of its own."""
    folder = tmp_path_factory.mktemp("bpe")
    make_qwen_tokenizer(folder, 1500, [*TEXT, *LANGUAGES.values()])
    return folder


@pytest.fixture(params=["built-in", "byte-level BPE"])
def tokenizer(request: pytest.FixtureRequest, bpe: Path) -> Tokenizer:
    return load_tokenizer(BUILTIN if request.param == "built-in" else bpe)[0]


def check(tokenizer: Tokenizer, texts: list[str]) -> None:
    one_by_one = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    expected = [one.ids for one in one_by_one]
    assert list(token_ids(tokenizer, texts)) == expected
    assert [ids for text in texts for ids in token_ids(tokenizer, [text])] == expected
    placed = list(encodings(tokenizer, texts, places=True))
    assert [one.ids for one in placed] == expected
    assert [one.offsets for one in placed] == [one.offsets for one in one_by_one]


class TestIds:
    def test_twelve_languages(self, tokenizer: Tokenizer) -> None:
        assert len(LANGUAGES) == 12
        check(tokenizer, [*LANGUAGES.values(), " ".join(LANGUAGES.values()), *ODD])

    @pytest.mark.skipif(not XQUAD.exists(), reason="XQuAD is not beside the repository")
    @pytest.mark.parametrize("language", LANGUAGES)
    def test_xquad(self, tokenizer: Tokenizer, language: str) -> None:
        articles = json.loads((XQUAD / f"{language}.json").read_text(encoding="utf-8"))["data"]
        paragraphs = [paragraph for article in articles for paragraph in article["paragraphs"]]
        questions = [question["question"] for paragraph in paragraphs for question in paragraph["qas"][:1]]
        check(tokenizer, [*questions, *(paragraph["context"] for paragraph in paragraphs)])


class Batches:
    """A tokenizer that has everything but `encode`."""

    def __init__(self, inner: Tokenizer) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        assert name != "encode", "it holds Python's lock"
        return getattr(self._inner, name)


LONG = " ".join(LANGUAGES.values())
DOCUMENTS = ["short", LONG, " " * 30_000, LONG * 30, ""]
CUTS = [NO_CUT, Cut(query=3), Cut(document=12), Cut(document=12, keep_end=True), Cut(pair=450, query=4, document=90)]


def by_both(made: Any, query: Any, documents: list[Any], **how: Any) -> list[list[int]]:
    """The ids of pairs, as they are without `encode` and as they are with it."""
    found: list[list[list[int]]] = []
    inner = made.tokenizer
    for tokenizer in (inner, Batches(inner)):
        made.tokenizer = tokenizer
        pairs = made.encode(query, documents, **how)
        found.append([[*pair.prefix.tolist(), *pair.tokens.tolist()] for pair in pairs])
    assert found[0] == found[1]
    return found[1]


class TestNoWayToEncode:
    @pytest.mark.parametrize("cut", CUTS)
    @pytest.mark.parametrize("windows", [None, Windows()])
    def test_pairs(self, tmp_path: Path, cut: Cut, windows: Windows | None) -> None:
        make_tokenizer(tmp_path)
        for query in ("what?", LONG * 20):
            ids = by_both(PairTokenizer(tmp_path, 500), query, DOCUMENTS, cut=cut, windows=windows)
            assert len(ids) >= len(DOCUMENTS)
            assert max(map(len, ids)) <= 500

    @pytest.mark.parametrize("cut", CUTS)
    @pytest.mark.parametrize("windows", [None, Windows()])
    def test_prompts(self, bpe: Path, cut: Cut, windows: Windows | None) -> None:
        for query in ("what?", LONG[:100] if windows else LONG * 30):
            made = PromptTokenizer(bpe, 500, load_prompt())
            ids = by_both(made, query, DOCUMENTS, cut=cut, windows=windows, instruct="judge " * 20)
            assert len(ids) >= len(DOCUMENTS)
            assert max(map(len, ids)) <= 500

    def test_prompts_with_images(self, bpe: Path) -> None:
        image = Patches(np.zeros((64, 4), np.float32), (1, 8, 8))
        made = PromptTokenizer(bpe, 500, load_prompt(family="qwen3_vl"), 2)
        for cut in CUTS:
            ids = by_both(made, ["what?", image], [[image, LONG * 30], [LONG, image, LONG]], cut=cut)
            assert max(map(len, ids)) <= 500

    def test_single_texts(self, tokenizer: Tokenizer) -> None:
        for text in [*LANGUAGES.values(), *ODD]:
            expected = tokenizer.encode(text, add_special_tokens=False)
            found: list[Any] = tokens_of(Batches(tokenizer), text)  # pyright: ignore[reportArgumentType]
            assert [token.id for token in found] == expected.ids
            assert [(token.start, token.stop) for token in found] == expected.offsets
            assert [token.text for token in found] == expected.tokens
