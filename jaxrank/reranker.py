"""The Reranker class: the whole path from texts to scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import platformdirs
from jax.sharding import Mesh
from jaxtyping import Float32
from tqdm import tqdm

from jaxrank import convert
from jaxrank.errors import CheckpointError, RequestError
from jaxrank.media.images import Preprocessing
from jaxrank.media.patches import read_preprocessing
from jaxrank.models import Family, settings_of
from jaxrank.models.quantized import check_quantization
from jaxrank.runtime.attention import Choice, use_implementation
from jaxrank.runtime.calls import Call
from jaxrank.runtime.compile_cache import use_compilation_cache
from jaxrank.runtime.packing import Features
from jaxrank.runtime.programs import take_tower
from jaxrank.runtime.scorer import Scorer
from jaxrank.runtime.vision_encoder import Tower
from jaxrank.sharding import DATA, MODEL, choose_mesh
from jaxrank.stages import Stages
from jaxrank.text.contents import Contents
from jaxrank.text.prompt_tokens import PromptTokenizer
from jaxrank.text.prompts import load_prompt
from jaxrank.text.tokenizer import NO_CUT, Cut, PairTokenizer, Token, check_text, tokens_of, written
from jaxrank.text.windows import Windows, best_of, documents_of, span_of, splits
from jaxrank.types import Encoded, Ranked, Work
from jaxrank.weights import converted as checkpoint

Content = Any
"""A query or document. It is a string; models that see also take the forms in `contents.FORMS`."""

BUILTIN = Path(__file__).parent / "builtin"
DTYPES = ("bfloat16", "float32")
LOAD_FORMATS = ("auto", *convert.FORMATS, "orbax")
CPU_ROWS = (256, 384, 512, 768, 1024)
DEFAULT_CACHE = platformdirs.user_cache_path("jaxrank") / "compiled"


class Reranker:
    """Score how well documents answer a query.

    Build one with `Reranker.from_pretrained`. Scores are probabilities in [0, 1]: the sigmoid of the model's logit.
    With `raw=True` you get the logit. Any number of threads may encode at the same time, but only one call may score at
    a time.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PairTokenizer | PromptTokenizer,
        *,
        name: str,
        row_tokens: int | None = None,
        instruct: str | None = None,
        preprocessing: Preprocessing | None = None,
        mesh: Mesh | None = None,
        stages: Stages | None = None,
        implementation: str | None = None,
    ):
        self.name = name
        self.model = model
        self.stages = Stages() if stages is None else stages
        self.tokenizer = tokenizer
        self.instruct = instruct
        self.preprocessing = preprocessing
        self.mesh = mesh
        self.max_length, self.min_length = tokenizer.max_length, tokenizer.min_length
        if implementation is not None:
            use_implementation(model, implementation)
        vision = take_tower(model)
        self.tower = features = None
        if vision is not None:
            self.tower = Tower(vision, mesh=mesh)
            features = Features((vision.config.features, model.config.width), model.word.dtype)
        self.scorer = Scorer(
            model,
            max_length=self.max_length,
            row_tokens=row_tokens or default_row_tokens(model.config.ffn, model.causal),
            features=features,
            mesh=mesh,
        )

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path | None = None,
        *,
        dtype: str = "bfloat16",
        quantization: str | None = None,
        max_length: int | None = None,
        row_tokens: int | None = None,
        prompt: str | None = None,
        chat_template: str | Path | None = None,
        instruct: str | None = None,
        preprocessing: Mapping[str, int | float] | None = None,
        revision: str | None = None,
        load_format: str = "auto",
        weights: bool = True,
        compile_cache: str | Path | None = DEFAULT_CACHE,
        data_parallel: int | None = None,
        tensor_parallel: int | None = None,
        implementation: str | None = None,
        progress: Callable[[int, int], None] | None = None,
        stages: Stages | None = None,
    ) -> Reranker:
        """Load a model by its Hugging Face id or from a folder (published or converted).

        Args:
            name_or_folder: the Hugging Face id or the folder. None loads the small built-in model.
            dtype: the dtype of matrices and activations, "bfloat16" or "float32".
            quantization: "int8" keeps matrices in half of bfloat16's memory. They are rounded while they are read. None
                keeps them in `dtype`, or as a converted folder has them.
            max_length: the most tokens of a pair. Longer pairs are truncated. The default is the limit that the model's
                publisher uses.
            row_tokens: the number of tokens that are scored together.
            prompt: a built-in prompt, "official", "sglang", "vllm" or "none", for models that read a prompt.
            chat_template: a Jinja file in place of `prompt`; see text.prompts.load_prompt.
            instruct: the instruction for requests that have none.
            preprocessing: image sizes and video sampling that replace the publisher's. The names are those in
                media.patches.CHANGEABLE.
            revision: the revision of the model on Hugging Face.
            load_format: which weights of the folder to load, one of LOAD_FORMATS. "auto" takes those of a converted
                folder, else safetensors.
            weights: False loads no weights. Such a model can only `warm_up`, which fills the compilation cache.
            compile_cache: the folder that keeps compiled programs for the next start. None keeps none.
            data_parallel: the number of copies of the weights. The default is one on CPU, and as many as fit on
                accelerators.
            tensor_parallel: the number of devices that share a copy. The default is the smallest number that can hold
                one.
            implementation: the attention body, one of kernels.IMPLEMENTATIONS. The default is the fastest one that is
                right on the device; see `attention`.
            progress: a function that is called with the bytes done and the bytes in all.
            stages: a clock that already runs.

        Returns:
            The model, ready to score.

        Raises:
            ModelError: the model cannot be loaded, or the named attention body is wrong on the device.
            RequestError: an argument has a value that is not allowed.
        """
        if dtype not in DTYPES:
            raise RequestError(f"dtype {dtype!r} is unknown; one of {', '.join(DTYPES)}")
        check_quantization(quantization)
        if load_format not in LOAD_FORMATS:
            raise RequestError(f"load_format {load_format!r} is unknown; one of {', '.join(LOAD_FORMATS)}")
        if compile_cache is not None:
            use_compilation_cache(Path(compile_cache))
        name = "jaxrank/builtin" if name_or_folder is None else str(name_or_folder)
        stages = Stages() if stages is None else stages
        formats = (load_format,) if load_format in convert.FORMATS else convert.FORMATS[:1]
        try:
            folder = BUILTIN if name_or_folder is None else convert.find(name_or_folder, revision, formats=formats)
            config = convert.read_config(folder)
            family, settings = settings_of(config)
            limit = settings.max_length
            if max_length is not None and not 8 <= max_length <= limit:
                raise RequestError(f"max_length is {max_length}; this model takes 8 to {limit} tokens")
            length = max_length or settings.default_length
            asking: dict[str, Any] = {"prompt": prompt, "chat_template": chat_template, "instruct": instruct}
            asking["preprocessing"] = preprocessing or None
            tokenizer, seeing = _tokenizer(folder, name, family, settings, length, **asking)
            how: dict[str, Any] = dict(dtype=dtype, quantization=quantization)
            converted = load_format == "orbax" or (load_format == "auto" and checkpoint.is_converted(folder))
            if converted:
                load = checkpoint.prepare(folder, **how) if weights else None
            else:
                load = convert.prepare(folder, **how, formats=formats) if weights else None
            mesh = None
            kept = quantization or (checkpoint.quantization_of(folder) if converted else None)
            # Every check of the folder is done at this point. The code below uses the devices.
            if jax.default_backend() != "cpu" or (data_parallel, tensor_parallel) != (None, None):
                outline = checkpoint.outline(config, dtype, kept)
                mesh = choose_mesh(outline, jax.devices(), data_parallel, tensor_parallel)
            stages.lap("checks")
            stacked = mesh is not None or jax.default_backend() != "cpu"
            if load is None:
                model = checkpoint.outline(config, dtype, kept, stacked=stacked)
            else:
                model = load(mesh, stacked=stacked, progress=progress)
        except OSError as error:
            raise CheckpointError(f"{name} cannot be read: {error}") from error
        reranker = cls(
            model, tokenizer, name=name, row_tokens=row_tokens, instruct=instruct, preprocessing=seeing, mesh=mesh,
            stages=stages, implementation=implementation,
        )  # fmt: skip
        stages.lap("weights")
        return reranker

    @property
    def devices(self) -> str:
        """Describe in words which devices hold the model."""
        if self.mesh is None:
            return f"1 device ({jax.devices()[0].device_kind})"
        copies, share = self.mesh.shape[DATA], self.mesh.shape[MODEL]
        kind = self.mesh.devices.flat[0].device_kind
        return f"{copies * share} devices ({kind}): {copies} x the weights, each on {share}"

    @property
    def attention(self) -> dict[str, Choice]:
        """The attention body in use, and the bodies that failed on this device.

        There is one entry for the "text" model, and one for the "vision" tower if there is one.
        """
        parts = {"text": self.scorer, "vision": self.tower}
        return {name: part.attention for name, part in parts.items() if part is not None}

    @property
    def row_tokens(self) -> int:
        """The number of tokens that are usually scored together in one packed row."""
        return self.scorer.row_tokens

    @property
    def scores_are_logits(self) -> bool:
        """Whether SGLang's dialect answers with the raw logit (cross-encoders) or with the probability of yes."""
        return not self.takes_instruct

    @property
    def dtype(self) -> str:
        """The dtype of matrices and activations."""
        return str(self.model.word.dtype)

    @property
    def takes_instruct(self) -> bool:
        """Whether requests can carry an instruction that says what to judge."""
        return isinstance(self.tokenizer, PromptTokenizer)

    @property
    def compilations(self) -> int:
        """The number of XLA compilations since warm-up ended. It stays 0 while serving."""
        return self.scorer.compilations

    @property
    def compiled(self) -> tuple[int, int]:
        """The number of programs compiled since the model was loaded, and the number that came from the compilation
        cache."""
        return self.scorer.compiled

    @property
    def work(self) -> Work:
        """What scoring has computed since the model was loaded: rows, filler, shared tokens."""
        return self.scorer.work

    def warm_up(self, progress: Callable[[str], None] | None = None) -> None:
        """Compile all programs now instead of at first use.

        Args:
            progress: a function that is called with one line of text for each program.
        """
        self.stages.lap(None)
        if self.tower is not None:
            self.tower.warm_up(progress)
        self.scorer.warm_up(progress)
        self.stages.lap("programs")

    def encode(
        self,
        query: Content,
        documents: Sequence[Content],
        *,
        truncate: bool = True,
        cut: Cut = NO_CUT,
        instruct: str | None = None,
        long_document: str = "truncate",
        max_windows: int | None = None,
    ) -> list[Encoded]:
        """Tokenise one query with its documents.

        For models that read a prompt, the tokens at the start that all documents share become one prefix. Texts that
        already have the publisher's frame around them are taken out of it.

        Args:
            query: the query.
            documents: the documents. Models that see take images and videos too, in the forms of contents.FORMS.
            truncate: whether pairs that are too long are cut. False refuses them.
            cut: what to leave out in addition.
            instruct: what to judge, for models that read a prompt. None is the model's default.
            long_document: "truncate" cuts documents that do not fit max_length and `cut`. "window" splits each of them
                into windows that overlap by at least a quarter.
            max_windows: the most windows that all documents that do not fit may have together. None allows any number.

        Returns:
            The pairs, in the order of the documents. With "window" there is one pair for each window, and the windows
            of a document stand together. `Encoded.window` says which part of its document each pair has, and
            jaxrank.text.windows.best_of finds the best one.

        Raises:
            RequestError: the model cannot read the input, or there are more windows than `max_windows`.
            TooLongError: a pair is too long and `truncate` is False, or the input does not fit even after a cut.
        """
        if isinstance(documents, str):
            raise RequestError("documents must be a list of strings, got one string; wrap it in a list")
        if not hasattr(documents, "__getitem__"):
            raise RequestError(f"documents must be a list of strings, got {type(documents).__name__}")
        how: dict[str, Any] = {"truncate": truncate, "cut": cut}
        if splits(long_document):
            how["windows"] = Windows(max_windows)
        if isinstance(self.tokenizer, PairTokenizer):
            if instruct is not None:
                raise RequestError(f"{self.name} reads query and document without an instruct; leave it out")
            return self.tokenizer.encode(query, documents, **how)
        if instruct is not None:
            check_instruct(self.tokenizer, instruct)
        instruct = self.instruct if instruct is None else instruct
        if self.preprocessing is not None:
            contents = Contents(self.preprocessing)
            query = contents.parts(query, "query")
            documents = [contents.parts(document, f"documents[{i}]") for i, document in enumerate(documents)]
        return self.tokenizer.encode(query, documents, instruct=instruct, **how)

    def render(self, pair: Encoded) -> str:
        """Return a tokenised pair as text, with its whole frame, as the model sees it."""
        return written(self.tokenizer.tokenizer, self.tokenizer.special, [*pair.prefix.tolist(), *pair.tokens.tolist()])

    def tokens_of(self, text: str) -> list[Token]:
        """Return the tokens of a text by itself.

        Raises:
            RequestError: the text is not a string of valid Unicode.
        """
        return tokens_of(self.tokenizer.tokenizer, text)

    def score_encoded(self, encoded: Sequence[Encoded], *, progress: bool = False) -> Float32[np.ndarray, " n"]:
        """Score encoded pairs.

        Args:
            encoded: the pairs.
            progress: whether a progress bar is shown for long jobs.

        Returns:
            The logits of the pairs, in their order.
        """
        features = self._features(encoded)
        if not progress or sum(map(len, encoded)) < 8 * self.row_tokens:
            return self.scorer(encoded, features)
        logits = np.empty(len(encoded), np.float32)
        with tqdm(total=len(encoded), unit="pair", desc="scoring", disable=None) as bar:
            for indices, values in self.scorer.rows(encoded, features):
                logits[indices] = values
                bar.update(len(indices))
        return logits

    @property
    def ahead(self) -> int:
        """The number of tokens that may wait on the device behind the row that runs.

        With 0 there is one row at a time.
        """
        return self.scorer.ahead

    def calls(self, encoded: Sequence[Encoded]) -> Iterator[Call]:
        """Yield the device calls that score encoded pairs. Run them in this order.

        Use this if the caller has other work to do while the calls run. The features of images and videos are
        different: this method waits for the vision tower at once.
        """
        return self.scorer.calls(encoded, self._features(encoded))

    def _features(self, encoded: Sequence[Encoded]) -> Features | None:
        """Return the features of the pairs' images and videos, each computed once. A text model gives None."""
        if self.tower is None or self.scorer.features is None:
            return None
        runs = (run for pair in encoded for run in (pair.prefix_media, pair.media) if run is not None)
        return replace(self.scorer.features, of=self.tower.of(one for run in runs for one in run.patches))

    def _scores(self, encoded: Sequence[Encoded], raw: bool, progress: bool) -> Float32[np.ndarray, " n"]:
        """Return the score of each document's best window: probabilities, or logits if `raw`."""
        logits = self.score_encoded(encoded, progress=progress)
        logits = logits[best_of(encoded, logits)]
        return logits if raw else sigmoid(logits)

    def score(
        self,
        query: Content,
        documents: Sequence[Content],
        *,
        instruct: str | None = None,
        long_document: str = "truncate",
        raw: bool = False,
        progress: bool = True,
    ) -> Float32[np.ndarray, " n"]:
        """Score each document against the query.

        Args:
            query: the query.
            documents: the documents.
            instruct: what to judge, for models that read a prompt. None is the model's default.
            long_document: "truncate" leaves out the end of documents that do not fit. "window" splits them, and the
                score of a document is that of its best window.
            raw: whether scores are logits instead of probabilities.
            progress: whether a progress bar is shown for long jobs.

        Returns:
            The scores, in the order of the documents.

        Raises:
            RequestError: the model cannot read the input; see `encode`.
        """
        encoded = self.encode(query, documents, instruct=instruct, long_document=long_document)
        return self._scores(encoded, raw, progress)

    def rank(
        self,
        query: Content,
        documents: Sequence[Content],
        *,
        instruct: str | None = None,
        top_n: int | None = None,
        long_document: str = "truncate",
        progress: bool = True,
    ) -> list[Ranked]:
        """Sort the documents by falling score. Equal scores keep the order of the input.

        Args:
            query: the query.
            documents: the documents.
            instruct: as in `score`.
            top_n: the most documents to return. None returns all.
            long_document: as in `score`.
            progress: whether a progress bar is shown for long jobs.

        Returns:
            At most `top_n` documents. With "window" each has the window that its score comes from, as start and stop in
            characters: document[slice(*window)] is that passage. For a document that is a list of texts, the characters
            are counted in the joined texts.

        Raises:
            RequestError: `top_n` is less than 1, or the model cannot read the input; see `encode`.
        """
        if top_n is not None and top_n < 1:
            raise RequestError(f"top_n is {top_n}; it must be at least 1")
        encoded = self.encode(query, documents, instruct=instruct, long_document=long_document)
        logits = self.score_encoded(encoded, progress=progress)
        best = best_of(encoded, logits)
        logits = logits[best]
        order = np.argsort(-logits, kind="stable")[:top_n].tolist()
        scores = sigmoid(logits)
        return [Ranked(i, float(scores[i]), documents[i], span_of(encoded[best[i]])) for i in order]

    def predict(
        self,
        pairs: Sequence[tuple[str, str]],
        *,
        instruct: str | None = None,
        long_document: str = "truncate",
        raw: bool = False,
        progress: bool = True,
    ) -> Float32[np.ndarray, " n"]:
        """Score (query, document) pairs, as CrossEncoder.predict of sentence-transformers does.

        Args:
            pairs: the pairs.
            instruct: as in `score`.
            long_document: as in `score`.
            raw: whether scores are logits instead of probabilities.
            progress: whether a progress bar is shown for long jobs.

        Returns:
            The scores, in the order of the pairs.

        Raises:
            RequestError: an item is not a pair, or the model cannot read it; see `encode`.
        """
        encoded = self.encode_pairs(pairs, instruct=instruct, long_document=long_document)
        return self._scores(encoded, raw, progress)

    def encode_pairs(
        self, pairs: Sequence[tuple[str, str]], *, instruct: str | None = None, long_document: str = "truncate"
    ) -> list[Encoded]:
        """Tokenise (query, document) pairs. Pairs with the same query are encoded as one request.

        Args:
            pairs: the pairs.
            instruct: as in `encode`.
            long_document: as in `encode`.

        Returns:
            The tokenised pairs, in order. The windows of a document stand together.

        Raises:
            RequestError: an item is not a pair, or the model cannot read it; see `encode`.
        """
        documents: dict[str, list[int]] = {}
        for i, pair in enumerate(pairs):
            if isinstance(pair, str) or not hasattr(pair, "__len__") or len(pair) != 2:
                raise RequestError(
                    f"pairs[{i}] must be a (query, document) pair, got {pair!r:.80}; give a list of pairs, "
                    "also for a single one"
                )
            check_text(pair[1], f"pairs[{i}][1]")
            documents.setdefault(check_text(pair[0], f"pairs[{i}][0]"), []).append(i)
        how: dict[str, Any] = {"instruct": instruct, "long_document": long_document}
        encoded: dict[int, list[Encoded]] = {}
        for query, places in documents.items():
            of_query = self.encode(query, [pairs[i][1] for i in places], **how)
            for i, group in zip(places, documents_of(of_query), strict=True):
                encoded[i] = [of_query[one] for one in group]
        return [one for i in range(len(pairs)) for one in encoded[i]]


def check_instruct(tokenizer: PromptTokenizer, instruct: str) -> None:
    """Check that the instruction is text, and that the prompt has a place for it.

    Raises:
        RequestError: one of the two is not so.
    """
    check_text(instruct, "instruct")
    if not tokenizer.prompt.takes_instruct:
        raise RequestError("instruct is given, and the prompt has no place for it; leave it out, or use another prompt")


def default_row_tokens(ffn: int, causal: bool) -> int:
    """Return the usual number of tokens of a row.

    On accelerators it is 16,384, because large products are efficient there. On CPU it is 1,024, or less for models
    with feed-forward layers wider than 3,072. Longer rows are hardly faster on CPU.

    The scratch memory of a layer must also stay under 32 MB there. At its peak it takes 8 bytes for each token and
    feed-forward unit. For larger pieces glibc maps new pages at every call, which costs 5 to 20 % of the time.

    Causal models take 2,048 on CPU, because every row of a request repeats the prefix.
    """
    if jax.default_backend() != "cpu":
        return 16384
    if causal:
        return 2048
    return max(t for t in CPU_ROWS if t == CPU_ROWS[0] or t * ffn * 8 < 28 << 20)


def sigmoid(logits: Float32[np.ndarray, " n"]) -> Float32[np.ndarray, " n"]:
    """Return 1 / (1 + exp(-x)). It is computed in float64, in a form that no float32 input overflows."""
    return np.exp(-np.logaddexp(0.0, -logits.astype(np.float64))).astype(np.float32)


def _tokenizer(
    folder: Path,
    name: str,
    family: Family,
    settings: Any,
    length: int,
    *,
    prompt: str | None,
    chat_template: str | Path | None,
    instruct: str | None,
    preprocessing: Mapping[str, int | float] | None,
) -> tuple[PairTokenizer | PromptTokenizer, Preprocessing | None]:
    """Return what makes token ids of texts, and how a model that sees prepares images; see Reranker.from_pretrained.

    Raises:
        CheckpointError: the tokenizer does not belong to the weights.
        RequestError: an argument is not for this model.
    """
    seeing = None
    if family.prompts is None:
        given = {
            "prompt": prompt, "chat_template": chat_template, "instruct": instruct, "preprocessing": preprocessing
        }  # fmt: skip
        if names := [argument for argument, value in given.items() if value is not None]:
            raise RequestError(f"{name} reads query and document without a prompt; leave out {names[0]}")
        tokenizer: PairTokenizer | PromptTokenizer = PairTokenizer(folder, length)
    else:
        if prompt is not None and chat_template is not None:
            raise RequestError("prompt and chat_template both say how to write the prompt; give one of them")
        frame = load_prompt(prompt or "official", chat_template, family.prompts)
        merge = settings.vision.merge if hasattr(settings, "vision") else None
        tokenizer = PromptTokenizer(folder, length, frame, merge)
        seeing = None if merge is None else read_preprocessing(folder, preprocessing)
        if preprocessing and seeing is None:
            raise RequestError(f"{name} reads text alone; leave out preprocessing, the sizes of images")
        if instruct is not None:
            check_instruct(tokenizer, instruct)
    if (size := tokenizer.tokenizer.get_vocab_size()) > settings.vocab_size:
        raise CheckpointError(
            f"{folder}: the tokenizer has {size} tokens, config.json says vocab_size {settings.vocab_size}; "
            "use the tokenizer and the weights of one model"
        )
    return tokenizer, seeing
