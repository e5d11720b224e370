"""Reranker: the whole path from texts to scores on one screen."""

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
from jaxrank.models import settings_of
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
"""A query or document: a string, or for models that see, what contents.FORMS says."""

BUILTIN = Path(__file__).parent / "builtin"
DTYPES = ("bfloat16", "float32")
LOAD_FORMATS = ("auto", *convert.FORMATS, "orbax")
CPU_ROWS = (256, 384, 512, 768, 1024)
DEFAULT_CACHE = platformdirs.user_cache_path("jaxrank") / "compiled"


class Reranker:
    """Scores how well documents answer a query.

    Build one with `Reranker.from_pretrained`. Scores are probabilities in [0, 1], the sigmoid of the model's logit;
    `raw=True` gives the logit. Any number of threads may encode; scoring is one call at a time.
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
        """Load a model by Hugging Face id or folder (published or converted); None is the small built-in model.

        Args:
            quantization: "int8" keeps matrices in half of bfloat16's memory. They are rounded while they are read. None
                keeps them in dtype, or as a converted folder has them.
            dtype: of matrices and activations, "bfloat16" or "float32".
            max_length: tokens of a pair; longer ones are truncated. By default what the model's publisher uses.
            row_tokens: tokens that are scored together.
            prompt: a built-in prompt, "official", "sglang", "vllm" or "none", for models that read one.
            chat_template: a Jinja file in place of `prompt`; see text.prompts.load_prompt.
            instruct: the instruction of requests that have none.
            preprocessing: sizes of images and sampling of video other than the publisher's, by the names in
                media.patches.CHANGEABLE.
            load_format: which weights of the folder, one of LOAD_FORMATS. "auto" takes those of a converted folder,
                else safetensors.
            weights: False loads none. Such a model can only `warm_up`, which fills the compilation cache.
            compile_cache: the folder of compiled programs for the next start; None for no such folder.
            data_parallel: copies of the weights. By default one on CPU, and as many as accelerators hold.
            tensor_parallel: devices that share a copy. By default the fewest that hold one.
            implementation: the attention body, one of kernels.IMPLEMENTATIONS. By default the fastest that is right on
                the device; see `attention`.
            progress: called with bytes done and bytes in all.
            stages: a clock that already runs.

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
            if family.prompts is not None:
                if prompt is not None and chat_template is not None:
                    raise RequestError("prompt and chat_template both say how to write the prompt; give one of them")
                written = load_prompt(prompt or "official", chat_template, family.prompts)
                merge = settings.vision.merge if hasattr(settings, "vision") else None
                tokenizer = PromptTokenizer(folder, length, written, merge)
                seeing = None if merge is None else read_preprocessing(folder, preprocessing)
                if preprocessing and seeing is None:
                    raise RequestError(f"{name} reads text alone; leave out preprocessing, the sizes of images")
                if instruct is not None:
                    check_instruct(tokenizer, instruct)
            else:
                given: dict[str, Any] = {"prompt": prompt, "chat_template": chat_template, "instruct": instruct}
                given["preprocessing"] = preprocessing or None
                if names := [argument for argument, value in given.items() if value is not None]:
                    raise RequestError(f"{name} reads query and document without a prompt; leave out {names[0]}")
                tokenizer, seeing = PairTokenizer(folder, length), None
            if (size := tokenizer.tokenizer.get_vocab_size()) > settings.vocab_size:
                raise CheckpointError(
                    f"{folder}: the tokenizer has {size} tokens, config.json says vocab_size {settings.vocab_size}; "
                    "use the tokenizer and the weights of one model"
                )
            how: dict[str, Any] = dict(dtype=dtype, quantization=quantization)
            converted = load_format == "orbax" or (load_format == "auto" and checkpoint.is_converted(folder))
            if converted:
                load = checkpoint.prepare(folder, **how) if weights else None
            else:
                load = convert.prepare(folder, **how, formats=formats) if weights else None
            mesh = None
            kept = quantization or (checkpoint.quantization_of(folder) if converted else None)
            # All that can be wrong with the folder is known by now; from here on the devices are touched.
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
        """Where the model lies, in words."""
        if self.mesh is None:
            return f"1 device ({jax.devices()[0].device_kind})"
        copies, share = self.mesh.shape[DATA], self.mesh.shape[MODEL]
        kind = self.mesh.devices.flat[0].device_kind
        return f"{copies * share} devices ({kind}): {copies} x the weights, each on {share}"

    @property
    def attention(self) -> dict[str, Choice]:
        """The attention body in use, and those that failed on this device: of the "text" model, and of the "vision"
        tower where there is one."""
        parts = {"text": self.scorer, "vision": self.tower}
        return {name: part.attention for name, part in parts.items() if part is not None}

    @property
    def row_tokens(self) -> int:
        """Tokens that are usually scored together in one packed row."""
        return self.scorer.row_tokens

    @property
    def scores_are_logits(self) -> bool:
        """Whether SGLang's dialect answers this model's raw logit (cross-encoders) or its probability of yes."""
        return not self.takes_instruct

    @property
    def dtype(self) -> str:
        """Of matrices and activations."""
        return str(self.model.word.dtype)

    @property
    def takes_instruct(self) -> bool:
        """Whether requests can say what is to be judged."""
        return isinstance(self.tokenizer, PromptTokenizer)

    @property
    def compilations(self) -> int:
        """XLA compilations since warm-up ended; stays 0 while serving."""
        return self.scorer.compilations

    @property
    def compiled(self) -> tuple[int, int]:
        """Programs compiled so far since the model was loaded, and how many more came from the compilation cache."""
        return self.scorer.compiled

    @property
    def work(self) -> Work:
        """What scoring has computed since the model was loaded: rows, filler, shared tokens."""
        return self.scorer.work

    def warm_up(self, progress: Callable[[str], None] | None = None) -> None:
        """Compile all programs now, one line each to `progress`, instead of at first use."""
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
        """Tokenised pairs, in the documents' order. RequestError on what the model cannot read, TooLongError as asked.

        truncate: whether pairs that are too long are cut rather than refused. cut: what is left out besides.
        long_document: "truncate", or "window" to split documents that do not fit max_length and `cut`: one pair for
        each window of their tokens, those of one document together (jaxrank.text.windows.best_of finds the best),
        and `window` says what of the document each has. They overlap by a quarter at least. max_windows: how many all
        documents that do not fit may come to, None for any number; more raise RequestError.
        For models that read a prompt, documents share the tokens that they begin with, and texts that stand in the
        publisher's frame already are taken out of it. Models that see take images and videos, as contents.FORMS says.
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
        """A tokenised pair as text, with all that frames it, as the model sees it."""
        return written(self.tokenizer.tokenizer, self.tokenizer.special, [*pair.prefix.tolist(), *pair.tokens.tolist()])

    def tokens_of(self, text: str) -> list[Token]:
        """The tokens of a text by itself. RequestError if it is no Unicode text."""
        return tokens_of(self.tokenizer.tokenizer, text)

    def score_encoded(self, encoded: Sequence[Encoded], *, progress: bool = False) -> Float32[np.ndarray, " n"]:
        """The float32 logits of encoded pairs, in their order. A bar is shown for long jobs if asked for."""
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
        """Tokens that may wait on the device behind the row that runs; 0 is one row at a time."""
        return self.scorer.ahead

    def calls(self, encoded: Sequence[Encoded]) -> Iterator[Call]:
        """The calls of the device that score encoded pairs, to be run in this order, for who has something to do while
        they run. What the vision tower makes of images and videos is waited for at once."""
        return self.scorer.calls(encoded, self._features(encoded))

    def _features(self, encoded: Sequence[Encoded]) -> Features | None:
        """What the tower makes of the pairs' images and videos, each looked at once; None for a model of text."""
        if self.tower is None or self.scorer.features is None:
            return None
        runs = (run for pair in encoded for run in (pair.prefix_media, pair.media) if run is not None)
        return replace(self.scorer.features, of=self.tower.of(one for run in runs for one in run.patches))

    def _scores(self, encoded: Sequence[Encoded], raw: bool, progress: bool) -> Float32[np.ndarray, " n"]:
        """Of each document, that of its best window: probabilities, or logits if `raw`."""
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
        """A score for each document, in their order: probabilities, or logits if `raw`.

        instruct: what is to be judged, for models that read a prompt; None is the model's default. long_document:
        "truncate" leaves out the end of documents that do not fit; "window" splits them, and the score is that of the
        best window.
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
        """The documents by falling score (ties by index), at most `top_n` of them.

        long_document: as in `score`. With "window" each line has the window that the score is of, start and stop in
        characters: document[slice(*window)] is that passage. Of a list of texts it counts in them joined.
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
        """A score for each (query, document) pair, in their order, as sentence-transformers' CrossEncoder.predict."""
        encoded = self.encode_pairs(pairs, instruct=instruct, long_document=long_document)
        return self._scores(encoded, raw, progress)

    def encode_pairs(
        self, pairs: Sequence[tuple[str, str]], *, instruct: str | None = None, long_document: str = "truncate"
    ) -> list[Encoded]:
        """Tokenised (query, document) pairs, in order; those with the same query are encoded as one request.

        long_document: as in `encode`; the windows of a document stand together.
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
    """RequestError unless it is text, and the prompt has a place for it."""
    check_text(instruct, "instruct")
    if not tokenizer.prompt.takes_instruct:
        raise RequestError("instruct is given, and the prompt has no place for it; leave it out, or use another prompt")


def default_row_tokens(ffn: int, causal: bool) -> int:
    """16,384 on accelerators, where large products pay; on CPU 1,024, or less with feed-forward layers of over 3,072.

    On CPU longer rows are hardly faster, and a layer's scratch memory, 8 bytes a token and feed-forward unit at its
    peak, must stay under 32 MB: larger pieces come from glibc as new pages at every call, at 5 to 20 % of the time.
    Causal models take 2,048 all the same, since every row of a request repeats the prefix.
    """
    if jax.default_backend() != "cpu":
        return 16384
    if causal:
        return 2048
    return max(t for t in CPU_ROWS if t == CPU_ROWS[0] or t * ffn * 8 < 28 << 20)


def sigmoid(logits: Float32[np.ndarray, " n"]) -> Float32[np.ndarray, " n"]:
    """1 / (1 + exp(-x)), computed in float64 and in a form that no float32 input overflows."""
    return np.exp(-np.logaddexp(0.0, -logits.astype(np.float64))).astype(np.float32)
