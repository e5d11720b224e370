"""Token ids against transformers' own tokenizer, used as the publisher's script uses it."""

import json
import shutil

import numpy as np
import pytest
from transformers import AutoTokenizer

from jaxrank.errors import CheckpointError, RequestError, TooLongError
from jaxrank.text.tokenizer import Cut, PairTokenizer, tokens_of, written
from tests.checkpoints import TEXT, make_tokenizer

LIMIT = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return PairTokenizer(folder, LIMIT)


@pytest.fixture(scope="module")
def published(folder):
    return AutoTokenizer.from_pretrained(folder)


def as_published(tokenizer, query, document, limit):
    """FlagEmbedding's FlagReranker: the query cut to 3/4 of the limit, then the pair cut in the document only.

    Query and document are given without special tokens, as prepare_for_model joins them.
    """
    query_ids = tokenizer(query, add_special_tokens=False, max_length=limit * 3 // 4, truncation=True)["input_ids"]
    document_ids = tokenizer(document, add_special_tokens=False, max_length=limit, truncation=True)["input_ids"]
    room = limit - len(query_ids) - tokenizer.num_special_tokens_to_add(pair=True)
    return [0, *query_ids, 2, 2, *document_ids[:room], 2]


TEXTS = [
    *TEXT[:3],  # the fourth holds markup, which transformers would take for special tokens
    "",
    " ",
    "  two  spaces,\ttab\nand newline  ",
    "🐼🐼 emoji 👩‍👩‍👧 and ﬁ ligature Å Ａ",
    "nul \x00 byte",
    "word " * 500,
    "字" * 3000,
    "x" * 20_000,
    " " * 5000 + "after many spaces",
]


class TestPairs:
    @pytest.mark.parametrize("query", ["what is panda?", "", "q " * 300, "北京"])
    def test_ids_are_the_publishers(self, tokenizer, published, query):
        for text, pair in zip(TEXTS, tokenizer.encode(query, TEXTS), strict=True):
            assert pair.tokens.tolist() == as_published(published, query, text, LIMIT), text[:40]
            assert len(pair) <= LIMIT
            assert pair.score_at == 0

    def test_a_pair_that_fits_is_the_tokenizers_own_pair(self, tokenizer, published):
        (pair,) = tokenizer.encode("Where do pandas live?", ["In China."])
        assert pair.tokens.tolist() == published("Where do pandas live?", "In China.")["input_ids"]
        assert pair.tokens.dtype == np.int32
        assert pair.dropped == 0

    def test_dropped_tokens_are_counted(self, tokenizer, published):
        document = "The giant panda is endemic to China. " * 20
        whole = len(published("what is panda?", document)["input_ids"])
        (pair,) = tokenizer.encode("what is panda?", [document])
        assert whole > LIMIT
        assert pair.dropped == whole - LIMIT

    @pytest.mark.parametrize("length", [2_000, 10_000, 200_000])
    def test_far_too_long_texts_are_cut_before_tokenising_without_a_trace(self, tokenizer, length):
        for text in ("panda " * (length // 6), "熊" * length, "a" * length, " " * length + "panda " * 100):
            whole = tokenizer.tokenizer.encode(text, add_special_tokens=False).ids
            (pair,) = tokenizer.encode("q", [text])
            head = len(pair) - 1 - min(len(whole), LIMIT - 4 - (len(tokenizer.encode("q", [""])[0]) - 4))
            assert pair.tokens[head:-1].tolist() == whole[: len(pair) - 1 - head]

    def test_markup_in_texts_stays_text(self, tokenizer):
        (pair,) = tokenizer.encode("<s></s>", ["</s></s> <s> <pad> <mask> <unk>"])
        assert pair.tokens.tolist().count(2) == 3, "only the three separators of the frame"
        assert pair.tokens.tolist().count(0) == 1
        assert 1 not in pair.tokens

    def test_refusing_to_truncate(self, tokenizer):
        short, long = "China", "panda " * 100
        with pytest.raises(TooLongError, match=r"maximum context length is 64 tokens, but documents\[1\]"):
            tokenizer.encode("q", [short, long], truncate=False)
        assert len(tokenizer.encode("q", [short], truncate=False)) == 1


class TestCut:
    """What a request asks to be left out, by hand from the ids of the whole texts."""

    QUERY = "Where do giant pandas live in the wild today?"

    @pytest.mark.parametrize(
        "cut",
        [
            Cut(),
            Cut(keep_end=True),
            Cut(query=3),
            Cut(query=3, keep_end=True),
            Cut(document=5),
            Cut(document=5, keep_end=True),
            Cut(query=2, document=0),
            Cut(query=10**6, document=10**6),
            Cut(pair=20),
            Cut(pair=20, query=4, document=7, keep_end=True),
            Cut(pair=10**6),
        ],
        ids=str,
    )
    def test_by_hand(self, tokenizer, cut):
        def kept(ids, most):
            return (
                ids if most is None or len(ids) <= most else (ids[-most:] if cut.keep_end else ids[:most]) * bool(most)
            )

        limit = min(cut.pair or LIMIT, LIMIT)
        query = self.ids(tokenizer, self.QUERY)
        documents = ["short", " ".join(TEXT[:3]), "panda " * 30_000, "x" * 200_000 + " the end of it all"]
        for text, pair in zip(documents, tokenizer.encode(self.QUERY, documents, cut=cut), strict=True):
            whole = self.ids(tokenizer, text)
            head = kept(kept(query, cut.query), limit * 3 // 4)
            tail = kept(kept(whole, cut.document), limit - 4 - len(head))
            assert pair.tokens.tolist() == [0, *head, 2, 2, *tail, 2]
            if len(whole) < 500:
                assert pair.dropped == len(query) - len(head) + len(whole) - len(tail)
            else:
                assert pair.dropped > 0

    @staticmethod
    def ids(tokenizer, text):
        return tokenizer.tokenizer.encode(text, add_special_tokens=False).ids

    def test_what_was_asked_for_is_not_too_long(self, tokenizer):
        long = "panda " * 100
        assert tokenizer.encode("q", [long], truncate=False, cut=Cut(document=5))[0].dropped
        with pytest.raises(TooLongError, match="maximum context length is 20 tokens") as refused:
            tokenizer.encode("q", [long], truncate=False, cut=Cut(pair=20))
        assert (refused.value.limit, refused.value.tokens or 0) > (20, 100)
        with pytest.raises(RequestError, match="a pair is to have 7 tokens at most; this model needs at least 8"):
            tokenizer.encode("q", ["d"], cut=Cut(pair=7))


class TestShown:
    def test_a_pair_as_text(self, tokenizer):
        (pair,) = tokenizer.encode("where? <s>", ["pandas in China"])
        shown = written(tokenizer.tokenizer, tokenizer.special, pair.tokens.tolist())
        assert shown == "<s>where? <s></s></s>pandas in China</s>"

    def test_tokens_of_a_text(self, tokenizer):
        text = "Pandas live in China. "
        tokens = tokens_of(tokenizer.tokenizer, text)
        assert [token.id for token in tokens] == TestCut.ids(tokenizer, text)
        words = [(t.text.lstrip("▁"), text[t.start : t.stop].strip()) for t in tokens if t.text != "▁"]
        assert len(words) > 4
        assert all(shown == stands_for for shown, stands_for in words)
        with pytest.raises(RequestError, match="lone surrogate"):
            tokens_of(tokenizer.tokenizer, "\ud800")


class TestBadTexts:
    @pytest.mark.parametrize(
        "query, documents, message",
        [
            (3, ["a"], "query must be a string, got int"),
            (None, ["a"], "query must be a string, got NoneType"),
            ("q", ["a", b"b"], r"documents\[1\] must be a string, got bytes"),
            ("q", ["a", "x\ud800"], r"documents\[1\] contains a lone surrogate at character 1"),
            ("\udfff", ["a"], "query contains a lone surrogate at character 0"),
        ],
    )
    def test_refused_by_name(self, tokenizer, query, documents, message):
        with pytest.raises(RequestError, match=message):
            tokenizer.encode(query, documents)


class TestBadFolders:
    def test_no_tokenizer(self, tmp_path):
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(CheckpointError, match=r"no tokenizer.json \(found: config.json\)"):
            PairTokenizer(tmp_path, LIMIT)

    def test_damaged_tokenizer(self, tmp_path):
        (tmp_path / "tokenizer.json").write_text('{"version": ')
        with pytest.raises(CheckpointError, match="not a tokenizer that the tokenizers library can read"):
            PairTokenizer(tmp_path, LIMIT)

    def test_special_token_outside_the_vocabulary(self, folder, tmp_path):
        shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
        settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "sep_token": "[SEP]"}))
        with pytest.raises(CheckpointError, match=r"'\[SEP\]' is not among the tokenizer's special tokens \(<s>"):
            PairTokenizer(tmp_path, LIMIT)
