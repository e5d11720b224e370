"""CrossEncoder by itself: shapes, arguments, activations, refusals; in tests/research beside sentence-transformers."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoTokenizer

from jaxrank import CrossEncoder, Reranker, convert
from jaxrank.cross_encoder import cut_longest_first
from jaxrank.errors import CheckpointError, RequestError
from jaxrank.text.tokenizer import PairTokenizer
from tests.checkpoints import TEXT, edit_config, make_bge, make_qwen3

QUERY = "what is panda?"
DOCUMENTS = ["hi", *TEXT, "", "hi"]
PAIRS = [(QUERY, document) for document in DOCUMENTS]
OWN: dict[str, Any] = dict(compile_cache=None, row_tokens=128)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bge(tmp_path_factory.mktemp("bge"), max_position_embeddings=66)


@pytest.fixture(scope="module")
def model(folder: Path) -> CrossEncoder:
    return CrossEncoder(str(folder), **OWN)


@pytest.fixture(scope="module")
def logits(folder: Path) -> np.ndarray:
    """Of PAIRS."""
    reranker = Reranker.from_pretrained(folder, dtype="float32", compile_cache=None, row_tokens=128)
    return reranker.predict(PAIRS, raw=True)


@pytest.fixture
def load(model: CrossEncoder) -> Callable[..., Any]:
    """A CrossEncoder with the weights of `model` and the programs that are compiled for it."""

    def make(folder: Path, **arguments: Any) -> CrossEncoder:
        loaded = CrossEncoder(folder, **arguments, **OWN)
        assert loaded.reranker.dtype == model.reranker.dtype
        loaded.reranker = model.reranker
        return loaded

    return make


def probabilities(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits.astype(np.float64)))


@pytest.fixture
def variant(folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """The folder with other fields in config.json, and a config_sentence_transformers.json."""

    def make(saved: Any = None, **config: Any) -> Path:
        shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
        edit_config(tmp_path, **config)
        if saved is not None:
            (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(saved))
        return tmp_path

    return make


class TestPredict:
    @pytest.mark.parametrize("form", [list, tuple, np.array, lambda pairs: np.array(pairs, object)])
    def test_pairs(self, model: CrossEncoder, logits: np.ndarray, form: Callable[[Any], Any]) -> None:
        scores = model.predict(form(PAIRS))
        assert (type(scores), scores.dtype, scores.shape) == (np.ndarray, np.float32, (len(PAIRS),))
        np.testing.assert_allclose(scores, probabilities(logits), atol=1e-6)

    @pytest.mark.parametrize("pair", [PAIRS[1], list(PAIRS[1]), np.array(PAIRS[1])])
    def test_one_pair(self, model: CrossEncoder, logits: np.ndarray, pair: Any) -> None:
        score = model.predict(pair)
        assert type(score) is np.float32
        assert score == pytest.approx(probabilities(logits[1:2])[0], abs=1e-5)
        tensor = model.predict(pair, convert_to_tensor=True)
        assert (tensor.dtype, tensor.shape, tensor.item()) == (torch.float32, (), score)
        assert model.predict(pair, convert_to_numpy=False).shape == ()

    def test_tensors(self, model: CrossEncoder) -> None:
        scores = model.predict(PAIRS)
        tensor = model.predict(PAIRS, convert_to_tensor=True)
        assert (tensor.dtype, tensor.shape) == (torch.float32, (len(PAIRS),))
        np.testing.assert_array_equal(tensor.numpy(), scores)
        tensors = model.predict(PAIRS, convert_to_numpy=False)
        assert isinstance(tensors, list)
        assert [one.shape for one in tensors] == [()] * len(PAIRS)
        assert torch.equal(torch.stack(tensors), tensor)

    @pytest.mark.parametrize("none", [[], (), np.array([])])
    def test_no_pairs(self, model: CrossEncoder, none: Any) -> None:
        assert model.predict(none).shape == (0,)
        assert model.predict(none, convert_to_tensor=True).shape == (0,)
        assert model.predict(none, convert_to_numpy=False) == []

    def test_what_changes_nothing(self, model: CrossEncoder, logits: np.ndarray) -> None:
        want = model.predict(PAIRS)
        every: list[dict[str, Any]] = [
            dict(batch_size=2), dict(show_progress_bar=True), dict(apply_softmax=True), dict(chunk_size=1),
            dict(pool={}), dict(device="cpu"), dict(device=["cpu", torch.device("cpu")]), dict(num_workers=3),
            dict(prompt=""),
        ]  # fmt: skip
        for arguments in every:
            np.testing.assert_array_equal(model.predict(PAIRS, **arguments), want)
        earlier: Any = model.predict
        np.testing.assert_allclose(earlier(sentences=PAIRS, activation_fct=nn.Identity()), logits, atol=1e-5)

    @pytest.mark.parametrize(
        "call, message",
        [
            (lambda m: m.predict("ab"), "inputs must be a pair of texts or a list of pairs, got str"),
            (lambda m: m.predict(pair for pair in PAIRS), "inputs must be a pair of texts or a list of pairs, got gen"),
            (lambda m: m.predict(["a", "b", "c"]), "pairs[0] must be a (query, document) pair, got ['a', 'b', 'c']"),
            (lambda m: m.predict([("a", "b"), ("a",)]), "pairs[1] must be a (query, document) pair, got ('a',)"),
            (lambda m: m.predict([("a", "b"), "ab"]), "pairs[1] must be a (query, document) pair, got 'ab'"),
            (lambda m: m.predict([("a", None)]), "pairs[0][1] must be a string, got NoneType"),
            (lambda m: m.predict([("a", "b"), (3, "b")], prompt="p"), "pairs[1][0] must be a string, got int"),
            (lambda m: m.predict(PAIRS, batch_size=0), "batch_size is 0; it must be at least 1"),
            (lambda m: m.rank(QUERY, DOCUMENTS, batch_size=-1), "batch_size is -1; it must be at least 1"),
            (lambda m: m.predict(PAIRS, processing_kwargs={}), "predict takes no processing_kwargs; leave it out"),
            (lambda m: m.predict(PAIRS, "query"), "prompt_name is 'query'; prompts of this model: none"),
            (lambda m: m.rank(QUERY, "hi"), "documents must be a list of strings, got one string"),
            (lambda m: m.rank(["hi"], ["hi"], prompt="p"), "query must be a string, got list"),
            (lambda m: m.predict(PAIRS, activation_fn=np.sum), "activation_fn made scores of the shape () of 7 logits"),
        ],
    )
    def test_refusals(self, model: CrossEncoder, call: Callable[[CrossEncoder], Any], message: str) -> None:
        with pytest.raises(RequestError, match=re.escape(message)):
            call(model)

    def test_arguments_that_nobody_knows(self, model: CrossEncoder) -> None:
        rank: Any = model.rank
        with pytest.raises(TypeError, match="unexpected keyword argument 'topk'"):
            rank(QUERY, DOCUMENTS, topk=3)

    def test_a_bar_only_if_wanted(self, model: CrossEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
        shown: list[bool] = []
        monkeypatch.setattr(
            model.reranker, "score_encoded", lambda pairs, progress: shown.append(progress) or np.zeros(len(pairs))
        )
        for wanted in (None, False, True):
            model.predict(PAIRS, show_progress_bar=wanted)
        assert shown == [False, False, True]


@pytest.mark.parametrize("max_length", [8, 9, 10, 33, 64])
def test_long_pairs_are_cut_as_by_transformers(folder: Path, max_length: int) -> None:
    whole = AutoTokenizer.from_pretrained(folder)
    tokenizer = PairTokenizer(folder, max_length)
    texts = ["", "a", "panda", "Where do pandas live?", TEXT[0], TEXT[2], "Paris " * 60]
    pairs = [(query, document) for query in texts for document in texts]
    encoded = [pair for query in texts for pair in tokenizer.encode(query, texts)]
    cut = cut_longest_first(tokenizer, pairs, encoded)
    for (query, document), own, pair in zip(pairs, encoded, cut, strict=True):
        full = len(whole.tokenize(query)) + len(whole.tokenize(document)) + 4
        want = whole(query, document, truncation="longest_first", max_length=max_length)["input_ids"]
        if query and document:  # given one pair alone, transformers takes an empty text for none
            assert pair.tokens.tolist() == want
        assert pair.dropped == full - len(pair.tokens)
        assert pair is own or own.dropped


class TestRank:
    def test_order_and_form(self, model: CrossEncoder) -> None:
        scores = model.predict(PAIRS)
        ranked = model.rank(QUERY, DOCUMENTS)
        assert [list(item) for item in ranked] == [["corpus_id", "score"]] * len(DOCUMENTS)
        assert [item["corpus_id"] for item in ranked] == np.argsort(-scores, kind="stable").tolist()
        assert [item["score"] for item in ranked] == scores[[item["corpus_id"] for item in ranked]].tolist()
        assert {type(item["score"]) for item in ranked} == {float}
        assert {type(item["corpus_id"]) for item in ranked} == {int}
        assert model.rank(QUERY, DOCUMENTS, top_k=3) == ranked[:3]
        assert model.rank(QUERY, DOCUMENTS, 99, True) == [
            {**item, "text": DOCUMENTS[item["corpus_id"]]} for item in ranked
        ]
        assert model.rank(QUERY, []) == []

    def test_by_the_scores_and_not_the_logits(self, model: CrossEncoder) -> None:
        ranked = model.rank(QUERY, DOCUMENTS, activation_fn=lambda x: -x)
        assert [item["corpus_id"] for item in ranked] == np.argsort(model.predict(PAIRS), kind="stable").tolist()
        tied = model.rank(QUERY, DOCUMENTS, activation_fn=lambda x: 0 * x)
        assert [item["corpus_id"] for item in tied] == list(range(len(DOCUMENTS)))


class TestActivation:
    @pytest.mark.parametrize(
        "function, want",
        [
            (nn.Sigmoid(), probabilities),
            (nn.Identity(), lambda x: x),
            (nn.Softplus(), lambda x: np.log1p(np.exp(x))),
            (torch.tanh, np.tanh),
            (lambda x: x.clamp(0, 1), lambda x: x.clip(0, 1)),
            (np.tanh, np.tanh),
            (lambda x: x.astype(np.float64) * 2, lambda x: 2 * x),
            (lambda x: [2 * float(one) for one in x[:, 0]], lambda x: 2 * x),
        ],
        ids=["Sigmoid", "Identity", "Softplus", "tanh", "tensor", "ufunc", "array", "list"],
    )
    def test_given(
        self,
        folder: Path,
        load: Callable[..., Any],
        model: CrossEncoder,
        logits: np.ndarray,
        function: Any,
        want: Callable[..., Any],
    ) -> None:
        scores = model.predict(PAIRS, activation_fn=function)
        assert scores.dtype == np.float32
        np.testing.assert_allclose(scores, want(logits), atol=1e-5)
        own = load(folder, activation_fn=function)
        assert own.activation_fn is function
        np.testing.assert_allclose(own.predict(PAIRS), want(logits), atol=1e-5)
        assert own.rank(QUERY, DOCUMENTS, top_k=1)[0]["score"] == pytest.approx(want(logits).max(), abs=1e-5)

    @pytest.mark.parametrize(
        "saved, config, want",
        [
            (None, {}, probabilities),
            (None, {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}, lambda x: x),
            (None, {"sentence_transformers": {"version": "5.0.0"}}, probabilities),
            (None, {"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"}, lambda x: x),
            ({"activation_fn": "torch.nn.modules.activation.Tanh"}, {}, np.tanh),
            (
                {"activation_fn": "torch.nn.modules.activation.Sigmoid"},
                {"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"},
                probabilities,
            ),
        ],
        ids=["none", "config", "without", "older", "saved", "saved first"],
    )
    def test_of_the_folder(
        self,
        variant: Callable[..., Path],
        load: Callable[..., Any],
        logits: np.ndarray,
        saved: dict[str, Any] | None,
        config: dict[str, Any],
        want: Callable[[np.ndarray], np.ndarray],
    ) -> None:
        model = load(variant(saved, **config))
        np.testing.assert_allclose(model.predict(PAIRS), want(logits), atol=1e-5)

    def test_of_the_folder_and_not_of_torch(
        self, variant: Callable[..., Path], load: Callable[..., Any], logits: np.ndarray
    ) -> None:
        """Names in a download must not choose what is run."""
        folder = variant({"activation_fn": "os.getcwd"})
        with pytest.warns(UserWarning, match=r"activation os\.getcwd is not of torch\.nn; the sigmoid is taken"):
            model = load(folder)
        np.testing.assert_allclose(model.predict(PAIRS), probabilities(logits), atol=1e-5)

    def test_of_the_folder_and_unknown(self, variant: Callable[..., Path]) -> None:
        folder = variant({"activation_fn": "torch.nn.Sigmoidal"})
        with pytest.raises(CheckpointError, match=r"activation torch\.nn\.Sigmoidal of the model cannot be had"):
            CrossEncoder(folder, **OWN)
        CrossEncoder(folder, activation_fn=nn.Sigmoid(), **OWN)

    def test_goes_with_a_converted_folder(
        self, variant: Callable[..., Path], logits: np.ndarray, tmp_path: Path
    ) -> None:
        folder = variant({"activation_fn": "torch.nn.modules.linear.Identity"})
        convert.convert(folder, tmp_path / "converted")
        converted = CrossEncoder(tmp_path / "converted", **OWN)
        np.testing.assert_allclose(converted.predict(PAIRS), logits, atol=1e-5)


def test_the_built_in_model_without_torch() -> None:
    code = (
        "import sys; from jaxrank import CrossEncoder; model = CrossEncoder(compile_cache=None);"
        "texts = ['hi', 'The giant panda is a bear species endemic to China.'];"
        "print(model.reranker.name, model.rank('what is panda?', texts)[0]['corpus_id'], 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["jaxrank/builtin", "1", "False"]


class TestPrompts:
    def test_before_the_query(self, variant: Callable[..., Path], load: Callable[..., Any]) -> None:
        folder = variant({"prompts": {"a": "Find: ", "b": "", "c": "Look: "}, "default_prompt_name": "a"})
        model, bare = load(folder, prompts={"c": "See: "}), load(folder, default_prompt_name="b")

        def want(prompt: str) -> np.ndarray:
            return bare.predict([(prompt + q, d) for q, d in PAIRS])

        for arguments, text in [
            ({}, "Find: "), (dict(prompt_name="b"), ""), (dict(prompt_name="c"), "See: "),
            (dict(prompt="Seek: "), "Seek: "), (dict(prompt="Seek: ", prompt_name="b"), "Seek: "),
        ]:  # fmt: skip
            scores = model.predict(PAIRS, **arguments)
            np.testing.assert_allclose(scores, want(text), atol=1e-5)
            ranked = model.rank(QUERY, DOCUMENTS, **arguments)
            assert [item["corpus_id"] for item in ranked] == np.argsort(-scores, kind="stable").tolist()
        assert np.abs(want("Find: ") - want("See: ")).max() > 1e-3
        with pytest.raises(RequestError, match="prompt_name is 'd'; prompts of this model: 'a', 'b', 'c'"):
            model.predict(PAIRS, prompt_name="d")
        with pytest.raises(RequestError, match="prompt_name is 'd'; prompts of this model: 'a', 'b', 'c'"):
            CrossEncoder(folder, default_prompt_name="d", **OWN)

    def test_as_the_instruct_of_models_that_read_one(self, tmp_path: Path) -> None:
        folder = make_qwen3(tmp_path)
        model = CrossEncoder(folder, max_length=256, prompts={"judge": "Judge."}, compile_cache=None, row_tokens=256)
        for arguments, instruct in [({}, None), (dict(prompt_name="judge"), "Judge."), (dict(prompt="Find."), "Find.")]:
            want = model.reranker.score(QUERY, DOCUMENTS, instruct=instruct)
            np.testing.assert_allclose(model.predict(PAIRS, **arguments), want, atol=1e-5)
            ranked = {item["corpus_id"]: item["score"] for item in model.rank(QUERY, DOCUMENTS, **arguments)}
            np.testing.assert_allclose([ranked[i] for i in range(len(DOCUMENTS))], want, atol=1e-5)


class TestLoading:
    def test_dtype(self, folder: Path, variant: Callable[..., Path]) -> None:
        half = variant(dtype="bfloat16")
        assert CrossEncoder(folder, **OWN).reranker.dtype == "float32"
        assert CrossEncoder(half, **OWN).reranker.dtype == "bfloat16"
        assert CrossEncoder(half, model_kwargs={"dtype": "auto"}, **OWN).reranker.dtype == "bfloat16"
        assert CrossEncoder(half, model_kwargs={"dtype": torch.float32}, **OWN).reranker.dtype == "float32"
        assert CrossEncoder(folder, model_kwargs={"torch_dtype": "bfloat16"}, **OWN).reranker.dtype == "bfloat16"
        assert CrossEncoder(folder, dtype="bfloat16", **OWN).reranker.dtype == "bfloat16"

    def test_max_length(self, folder: Path, variant: Callable[..., Path]) -> None:
        assert CrossEncoder(folder, **OWN).max_length == 64
        for arguments in (dict(max_length=32), dict(processor_kwargs={"model_max_length": 32})):
            model = CrossEncoder(folder, **arguments, **OWN)
            assert model.max_length == model.max_seq_length == model.reranker.max_length == 32
        shorter = variant()
        settings = shorter / "tokenizer_config.json"
        settings.write_text(json.dumps({**json.loads(settings.read_text()), "model_max_length": 48}))
        assert CrossEncoder(shorter, **OWN).max_length == 48
        settings.write_text(json.dumps({**json.loads(settings.read_text()), "model_max_length": 10**30}))
        assert CrossEncoder(shorter, **OWN).max_length == 64

    def test_arguments_that_change_nothing(self, folder: Path, load: Callable[..., Any], model: CrossEncoder) -> None:
        again = load(
            folder, device="cpu", trust_remote_code=True, local_files_only=True, num_labels=1, backend="torch",
            model_kwargs={"attn_implementation": "eager"}, config_kwargs={"num_labels": 1, "classifier_dropout": 0.1},
            keep_in_fp32_modules=[],
        )  # fmt: skip
        assert again.num_labels == 1
        np.testing.assert_array_equal(again.predict(PAIRS), model.predict(PAIRS))

    def test_earlier_names(self, folder: Path) -> None:
        model: Any = CrossEncoder(
            model_name=str(folder), automodel_args={"torch_dtype": "bfloat16"}, tokenizer_args={"model_max_length": 32},
            config_args={}, default_activation_function=np.tanh, **OWN,
        )  # fmt: skip
        assert (model.reranker.dtype, model.max_length, model.activation_fn) == ("bfloat16", 32, np.tanh)
        assert model.reranker.name == str(folder)

    @pytest.mark.parametrize(
        "arguments, message",
        [
            (dict(modules=[nn.Identity()]), "modules is given, which is not done here"),
            (dict(keep_in_fp32_modules=["a"]), "keep_in_fp32_modules is given, which is not done here"),
            (dict(backend="onnx"), "backend is 'onnx'; JAX computes here"),
            (dict(num_labels=3), "num_labels is 3; models of one label are scored"),
            (dict(config_kwargs={"num_labels": 2}), "num_labels is 2; models of one label are scored"),
            (dict(config_kwargs={"hidden_act": "relu"}), "config_kwargs has 'hidden_act', which is not done here"),
            (dict(model_kwargs={"adapter": "a"}), "model_kwargs has 'adapter', which is not done here"),
            (dict(processor_kwargs={"padding_side": "left"}), "processor_kwargs has 'padding_side', which is not done"),
            (dict(model_kwargs={"dtype": torch.float16}), "dtype 'float16' is unknown; one of bfloat16, float32"),
            (dict(max_length=65), "max_length is 65; this model takes 8 to 64 tokens"),
        ],
    )
    def test_refusals(self, folder: Path, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(RequestError, match=re.escape(message)):
            CrossEncoder(folder, **arguments, **OWN)

    def test_damaged_settings(self, variant: Callable[..., Path]) -> None:
        folder = variant([1])
        with pytest.raises(CheckpointError, match=r"config_sentence_transformers\.json is list, not an object"):
            CrossEncoder(folder, **OWN)
        (folder / "config_sentence_transformers.json").write_text("{")
        with pytest.raises(CheckpointError, match=r"config_sentence_transformers\.json cannot be read"):
            CrossEncoder(folder, **OWN)

    def test_other_devices(self, folder: Path, model: CrossEncoder) -> None:
        with pytest.warns(UserWarning, match="device cuda:0 is left aside: JAX computes on cpu here") as caught:
            CrossEncoder(folder, device="cuda:0", **OWN)
        assert caught[0].filename == __file__
        with pytest.warns(UserWarning, match="device cuda is left aside"):
            model.predict(PAIRS, device="cuda")

    def test_downloads(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[dict[str, Any]] = []

        def snapshot_download(name: str, **options: Any) -> str:
            asked.append({"name": name, **options})
            return str(folder)

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
        model = CrossEncoder("some/model", revision="v1", cache_folder="here", token="t", local_files_only=True, **OWN)
        assert model.reranker.name == "some/model"
        (request,) = asked
        assert "config_sentence_transformers.json" in request.pop("allow_patterns")
        assert request == dict(
            name="some/model",
            revision="v1",
            cache_dir="here",
            token="t",
            local_files_only=True,
            ignore_patterns=["*/*"],
        )


def test_evaluate(model: CrossEncoder, tmp_path: Path) -> None:
    """What an evaluator of sentence-transformers does with a model, in short."""

    def evaluator(model: CrossEncoder, output_path: str | None) -> dict[str, float]:
        assert output_path is not None
        (Path(output_path) / "table").touch()
        measures = {"mean": float(model.predict(PAIRS).mean())}
        model.model_card_data.set_evaluation_metrics(evaluator, measures, 1, 2)
        return measures

    measures = model.evaluate(evaluator, str(tmp_path / "new"))
    assert model.model_card_data.results == [(evaluator, measures, 1, 2)]
