"""Long documents in windows: ids, spans and scores by hand, from the raw tokenizers and transformers' own models."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import XLMRobertaForSequenceClassification

from benchmarks.publisher import PREFIX, SUFFIX, Script
from jaxrank import RequestError, Reranker, TooLongError
from jaxrank.text.tokenizer import Cut
from jaxrank.text.windows import LEAST_TOKENS, MOST_CHARACTERS, Windows
from jaxrank.types import Encoded
from tests.checkpoints import TEXT, make_bge, make_qwen3, make_qwen3_vl
from tests.media import photo

LIMIT = 64
QWEN_LIMIT = 300
QUERY = "Where do pandas live?"
LONG = " ".join(TEXT[:3]) * 3  # without the markup of the fourth, which raw tokenizers take for special tokens
ODD = {
    "emoji": "I saw 👩‍👩‍👧 and 🏳️‍🌈 there. " * 20,
    "thai": "กรุงเทพมหานคร เป็นเมืองหลวงของประเทศไทย " * 12,
    "combining marks": "cafe\u0301 q\u0323\u0307x e\u0301\u0323a " * 30,
    "bom": "\ufeff" + "The giant panda is endemic to China. " * 20,
    "ligatures and wide letters": "ﬁnd Ａ Å ㎏ " * 40,
    "spaces": "  two   spaces\n\n\tand more  " * 30 + "    ",
}


def by_hand(length: int, size: int) -> list[tuple[int, int]]:
    """The fewest windows of `size` tokens, spread evenly, of which each shares a quarter with the one before."""
    for count in range(2, length):
        starts = [i * (length - size) // (count - 1) for i in range(count)]
        if all(4 * (left + size - right) >= size for left, right in pairwise(starts)):
            return [(start, start + size) for start in starts]
    raise AssertionError


def ids_of(pair: Encoded) -> list[int]:
    return [*pair.prefix.tolist(), *pair.tokens.tolist()]


def span(pair: Encoded) -> tuple[int, int]:
    assert pair.window is not None
    return pair.window.start, pair.window.stop


@pytest.fixture(scope="module")
def bge_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bge(tmp_path_factory.mktemp("bge"), max_position_embeddings=LIMIT + 2)


@pytest.fixture(scope="module")
def bge(bge_folder: Path) -> Reranker:
    return Reranker.from_pretrained(bge_folder, dtype="float32", compile_cache=None, row_tokens=128)


@pytest.fixture(scope="module")
def qwen_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen3(tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module")
def qwen(qwen_folder: Path) -> Reranker:
    return Reranker.from_pretrained(
        qwen_folder, dtype="float32", compile_cache=None, row_tokens=384, max_length=QWEN_LIMIT
    )


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Reranker:
    folder = make_qwen3_vl(tmp_path_factory.mktemp("vl"))
    return Reranker.from_pretrained(folder, dtype="float32", row_tokens=512, max_length=QWEN_LIMIT, compile_cache=None)


class TestRuns:
    def test_few_even_and_overlapping(self) -> None:
        for size in (8, 9, 10, 11, 100, 381):
            for length in (*range(size + 1, size + 60), 1000, 12_345):
                runs = Windows().runs(length, size, "it")
                assert (runs[0][0], runs[-1][1]) == (0, length)
                assert {last - first for first, last in runs} == {size}
                assert runs == by_hand(length, size), (length, size)

    @pytest.mark.parametrize("length", [0, 1, 8])
    def test_what_fits_is_left_alone(self, length: int) -> None:
        assert Windows(most=0).runs(length, 8, "it") == [(0, length)]


class TestCrossEncoder:
    def pairs(self, folder: Path, query: str, document: str) -> list[tuple[list[int], int, int]]:
        """Ids of each window's pair, and the document's characters between the ends of its tokens."""
        raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
        head = [0, *raw.encode(query, add_special_tokens=False).ids, 2, 2]
        whole = raw.encode(document, add_special_tokens=False)
        runs = by_hand(len(whole.ids), LIMIT - len(head) - 1)
        places = whole.offsets
        return [([*head, *whole.ids[a:b], 2], places[a][0], places[b - 1][1]) for a, b in runs]

    @torch.no_grad()
    def logits(self, folder: Path, rows: list[list[int]]) -> np.ndarray:
        model = XLMRobertaForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
        return np.array([model(torch.tensor([row])).logits.item() for row in rows])

    def test_the_best_window_wins(self, bge: Reranker, bge_folder: Path) -> None:
        documents = [LONG, "short", TEXT[1] * 2, "", LONG[::-1]]
        want: list[float] = []
        spans: list[tuple[int, int]] = []
        for document in documents:
            if document in ("short", ""):
                pairs = [(ids_of(bge.encode(QUERY, [document])[0]), 0, len(document))]
            else:
                pairs = self.pairs(bge_folder, QUERY, document)
            logits = self.logits(bge_folder, [ids for ids, _, _ in pairs])
            assert len(pairs) == 1 or np.ptp(logits) > 0.02, "windows that score alike would prove nothing"
            best = int(np.argmax(logits))
            want.append(logits[best])
            spans.append(pairs[best][1:])
        got = bge.score(QUERY, documents, long_document="window", raw=True)
        np.testing.assert_allclose(got, want, atol=1e-4)
        assert np.abs(bge.score(QUERY, documents, raw=True) - want).max() > 0.01
        ranked = bge.rank(QUERY, documents, long_document="window")
        assert [item.index for item in ranked] == np.argsort(-got, kind="stable").tolist()
        for item in ranked:
            start, stop = spans[item.index]
            assert item.window is not None
            assert documents[item.index][slice(*item.window)].strip() == documents[item.index][start:stop].strip()
        pairs_ = [(query, document) for document in documents for query in (QUERY, "another")]
        predicted = bge.predict(pairs_, long_document="window", raw=True, progress=False)
        np.testing.assert_allclose(predicted[::2], got, atol=1e-5)

    @pytest.mark.parametrize("name", ODD)
    def test_ids_and_spans_of_odd_texts(self, bge: Reranker, bge_folder: Path, name: str) -> None:
        document = ODD[name]
        pairs = bge.encode(QUERY, [document], long_document="window")
        want = self.pairs(bge_folder, QUERY, document)
        assert [ids_of(pair) for pair in pairs] == [ids for ids, _, _ in want]
        spans = [span(pair) for pair in pairs]
        for (start, stop), (_, first, last) in zip(spans[1:-1], want[1:-1], strict=True):
            assert start == first
            assert document[start:stop].startswith(document[first:last]), "whole, and what no token stands for besides"
        covered(document, spans)

    def test_at_the_limit_nothing_changes(self, bge: Reranker) -> None:
        room = LIMIT - len(bge.encode(QUERY, [""])[0])
        words = [document for n in range(200) if len(bge.tokens_of(document := "x" + " x" * n)) == room]
        (exact,) = words
        documents = ["hi", exact, "Paris"]
        today, windows = (bge.encode(QUERY, documents, long_document=how) for how in ("truncate", "window"))
        assert len(today[1]) == LIMIT
        assert [ids_of(pair) for pair in windows] == [ids_of(pair) for pair in today]
        assert [pair.window for pair in today] == [None] * 3
        assert [span(pair) for pair in windows] == [(0, len(document)) for document in documents]
        same = bge.score(QUERY, documents, raw=True), bge.score(QUERY, documents, raw=True, long_document="window")
        assert same[0].tobytes() == same[1].tobytes()
        longer = bge.encode(QUERY, [exact + " x"], long_document="window")
        assert len(longer) == 2

    def test_a_requests_own_limits(self, bge: Reranker, bge_folder: Path) -> None:
        raw = Tokenizer.from_file(str(bge_folder / "tokenizer.json"))
        ids = raw.encode(LONG, add_special_tokens=False).ids
        for cut, size in ((Cut(document=20), 20), (Cut(pair=40, query=3), 40 - 4 - 3), (Cut(document=999), None)):
            pairs = bge.encode(QUERY, [LONG, "hi"], long_document="window", cut=cut)
            query = raw.encode(QUERY, add_special_tokens=False).ids[: cut.query]
            runs = by_hand(len(ids), size or LIMIT - 4 - len(query))
            assert [ids_of(pair)[len(query) + 3 : -1] for pair in pairs[:-1]] == [ids[a:b] for a, b in runs]
            dropped = len(raw.encode(QUERY, add_special_tokens=False).ids) - len(query)
            assert {pair.dropped for pair in pairs} == {dropped}

    def test_a_query_that_is_too_long_is_cut_or_refused_as_ever(self, bge: Reranker) -> None:
        query = QUERY * 20
        pairs = bge.encode(query, [LONG], long_document="window")
        today = bge.encode(query, [LONG])[0]
        assert ids_of(pairs[0]) == ids_of(today)
        assert 0 < pairs[0].dropped < today.dropped
        with pytest.raises(TooLongError, match=r"documents\[0\] with its query has at least"):
            bge.encode(query, [LONG], long_document="window", truncate=False)
        assert len(bge.encode(QUERY, [LONG], long_document="window", truncate=False)) > 1, "windows are no truncation"


def covered(document: str, spans: list[tuple[int, int]]) -> None:
    """All of the document is in some window, in order."""
    assert (spans[0][0], spans[-1][1]) == (0, len(document))
    assert all(left[0] < right[0] < left[1] for left, right in pairwise(spans)), "each begins within the one before"


class TestPrompts:
    def prompts(self, folder: Path, query: str, document: str, limit: int) -> list[tuple[list[int], str]]:
        """Ids of each window's prompt, and the text of the document that its tokens touch."""
        script = Script(folder, 10**6)
        before = f"<Instruct>: i\n<Query>: {query}\n<Document>: "
        body = script.tokenizer(before + document, add_special_tokens=False, return_offsets_mapping=True)
        ids, places = body["input_ids"], body["offset_mapping"]
        first = next(i for i, (_, stop) in enumerate(places) if stop > len(before))
        frame = len(script.prefix) + first + len(script.suffix)
        windows = []
        for a, b in by_hand(len(ids) - first, limit - frame):
            start, stop = places[first + a][0], places[first + b - 1][1]
            text = (before + document)[max(start, len(before)) : stop]
            windows.append(([*script.prefix, *ids[:first], *ids[first + a : first + b], *script.suffix], text))
        return windows

    def test_the_best_window_wins(self, qwen: Reranker, qwen_folder: Path) -> None:
        documents = ["short", LONG, LONG[::-1]]
        script = Script(qwen_folder)
        want: list[float] = [script.logits([script.ids(QUERY, "short", "i")])[0]]
        texts = ["short"]
        for document in documents[1:]:
            windows = self.prompts(qwen_folder, QUERY, document, QWEN_LIMIT)
            logits = script.logits([ids for ids, _ in windows])
            assert np.ptp(logits) > 0.02
            want.append(logits.max())
            texts.append(windows[int(np.argmax(logits))][1])
        how: dict[str, Any] = {"long_document": "window", "instruct": "i"}
        got = qwen.score(QUERY, documents, raw=True, **how)
        np.testing.assert_allclose(got, want, atol=1e-4)
        assert np.abs(qwen.score(QUERY, documents, raw=True, instruct="i") - want).max() > 0.01
        for item in qwen.rank(QUERY, documents, **how):
            assert item.window is not None
            assert documents[item.index][slice(*item.window)].startswith(texts[item.index])

    @pytest.mark.parametrize("name", ODD)
    def test_ids_and_spans_of_odd_texts(self, qwen: Reranker, qwen_folder: Path, name: str) -> None:
        document = ODD[name]
        pairs = qwen.encode(QUERY, [document, "short"], long_document="window", instruct="i")
        want = self.prompts(qwen_folder, QUERY, document, QWEN_LIMIT)
        assert len(want) > 1
        assert [ids_of(pair) for pair in pairs[:-1]] == [ids for ids, _ in want]
        spans = [span(pair) for pair in pairs[:-1]]
        assert all(document[slice(*where)].startswith(text) for where, (_, text) in zip(spans, want, strict=True))
        covered(document, spans)
        assert len({pair.prefix_key for pair in pairs}) == 1, "one prefix for all windows of all documents"
        assert len(pairs[0].prefix) > len(PREFIX.split())

    def test_the_first_window_is_what_truncation_leaves(self, qwen: Reranker) -> None:
        documents = ["short", LONG, LONG]
        today = qwen.encode(QUERY, documents)
        pairs = qwen.encode(QUERY, documents, long_document="window")
        starts = [i for i, pair in enumerate(pairs) if pair.window is not None and pair.window.number == 0]
        assert [ids_of(pairs[i]) for i in starts] == [ids_of(pair) for pair in today]
        assert [pair.window for pair in pairs[starts[1] : starts[2]]] == [pair.window for pair in pairs[starts[2] :]]

    def test_at_the_limit_nothing_changes(self, qwen: Reranker) -> None:
        frame = len(qwen.encode(QUERY, [""])[0])
        exact = next(d for n in range(400) if len(qwen.encode(QUERY, [d := "x" + " x" * n])[0]) == QWEN_LIMIT)
        documents = ["hi", exact, "Paris"]
        today = qwen.score(QUERY, documents, raw=True)
        assert today.tobytes() == qwen.score(QUERY, documents, raw=True, long_document="window").tobytes()
        assert len(qwen.encode(QUERY, [exact + " x"], long_document="window")) == 2
        own = len(qwen.tokens_of(exact))
        for most, count in ((own, 1), (own - 1, 2)):
            cut = Cut(document=most)
            assert len(qwen.encode(QUERY, [exact], long_document="window", cut=cut)) == count
        pairs = qwen.encode(QUERY, [exact], long_document="window", cut=Cut(document=20))
        assert max(map(len, pairs)) <= frame + 21

    def test_framed_documents(self, qwen: Reranker) -> None:
        """Spans are of the documents as they came, frame included."""
        query = f"{PREFIX}<Instruct>: i\n<Query>: {QUERY}\n"
        framed = f"<Document>: {LONG}{SUFFIX}"
        bare = qwen.rank(QUERY, [LONG, "x"], instruct="i", long_document="window")
        short = f"<Document>: x{SUFFIX}"
        for item in qwen.rank(query, [framed, short], long_document="window"):
            other = next(one for one in bare if one.index == item.index)
            assert item.score == other.score
            assert item.window is not None
            assert other.window is not None
            assert (framed, short)[item.index][slice(*item.window)] == (LONG, "x")[item.index][slice(*other.window)]

    def test_a_query_that_leaves_no_room(self, qwen: Reranker) -> None:
        for documents in ([LONG], [""]):
            with pytest.raises(
                TooLongError, match=r"documents\[0\] does not fit, and could only be split into windows"
            ):
                qwen.encode(QUERY * 200, documents, long_document="window")


class TestMedia:
    def test_texts_are_split_and_images_scored_whole(self, seeing: Reranker) -> None:
        documents: list[Any] = [LONG, photo(64, 64, 0), {"text": "short"}, [LONG[:300], {"text": LONG[300:]}]]
        for query in (QUERY, ["like ", photo(64, 64, 1), " this"]):
            pairs = seeing.encode(query, documents, long_document="window")
            numbers = [None if pair.window is None else pair.window.number for pair in pairs]
            count = numbers.index(None)
            assert numbers == [*range(count), None, 0, *range(count)], "joined texts are split as one"
            assert count > 1
            assert [ids_of(pair) for pair in pairs[:count]] == [ids_of(pair) for pair in pairs[-count:]]
            assert (span(pairs[count + 1]), span(pairs[count - 1])[1]) == ((0, 5), len(LONG))
            today = seeing.encode(query, documents)
            assert ids_of(pairs[0]) == ids_of(today[0])
            assert ids_of(pairs[count]) == ids_of(today[1])
        ranked = seeing.rank(QUERY, [LONG, {"text": "x"}], long_document="window", progress=False)
        pairs = seeing.encode(QUERY, [LONG], long_document="window")
        best = pairs[int(seeing.score_encoded(pairs).argmax())]
        assert {item.index: item.window for item in ranked} == {0: span(best), 1: (0, 1)}

    def test_images_in_what_does_not_fit(self, seeing: Reranker) -> None:
        with pytest.raises(
            RequestError, match=r"documents\[1\] does not fit and holds an image or video, and only texts"
        ):
            seeing.score(QUERY, ["x", [photo(64, 64, 0), LONG]], long_document="window")


class TestBuiltin:
    def test_an_answer_at_the_end_is_found(self) -> None:
        """The licence's last page says how to apply it, and the two before do not."""
        licence = (Path(__file__).parent.parent / "LICENSE").read_text(encoding="utf-8")
        licence = licence[licence.index("6. Trademarks.") :]
        other = licence[: licence.index("END OF TERMS AND CONDITIONS")]
        reranker = Reranker.from_pretrained(dtype="float32", compile_cache=None, row_tokens=512)
        query = "How do I apply the Apache License to my work?"
        cut = reranker.score(query, [licence, other], progress=False)
        assert abs(cut[0] - cut[1]) < 1e-5, "cut, both begin alike"
        best, second = reranker.rank(query, [other, licence], long_document="window", progress=False)
        assert best.index == 1
        assert best.window is not None
        assert "APPENDIX: How to apply the Apache License to your work." in licence[slice(*best.window)]
        assert best.score > 0.5 > second.score
        assert best.score > 3 * cut[0]


class TestRefusals:
    def test_unknown_ways(self, bge: Reranker) -> None:
        for call in (bge.encode, bge.score, bge.rank):
            with pytest.raises(RequestError, match="long_document 'windows' is unknown; one of truncate, window"):
                call(QUERY, ["d"], long_document="windows")
        with pytest.raises(RequestError, match="long_document 3 is unknown"):
            bge.predict([(QUERY, "d")], long_document=3)  # pyright: ignore[reportArgumentType]

    @pytest.mark.parametrize("family", ["bge", "qwen"])
    def test_bounds(self, family: str, request: pytest.FixtureRequest) -> None:
        reranker: Reranker = request.getfixturevalue(family)
        count = len(reranker.encode(QUERY, [LONG], long_document="window"))
        short = ["x"] * 50
        pairs = reranker.encode(QUERY, [*short, LONG, LONG], long_document="window", max_windows=2 * count)
        assert len(pairs) == 50 + 2 * count, "documents that fit do not count"
        message = (
            rf"documents\[51\] come to {2 * count} windows of \d+ tokens, and one request may have {2 * count - 1}"
        )
        with pytest.raises(RequestError, match=message):
            reranker.encode(QUERY, [*short, LONG, LONG], long_document="window", max_windows=2 * count - 1)
        with pytest.raises(RequestError, match=rf"documents\[1\] has {MOST_CHARACTERS + 1} characters"):
            reranker.encode(QUERY, ["x", "x" * (MOST_CHARACTERS + 1)], long_document="window", max_windows=9)
        most = LEAST_TOKENS - 1
        with pytest.raises(
            TooLongError, match=rf"documents\[0\] does not fit, .* windows of {most} tokens; a window must"
        ):
            reranker.encode(QUERY, [LONG], long_document="window", cut=Cut(document=most))
