"""CrossEncoder: a Reranker with the interface of the class of that name in sentence-transformers (version 6).

from jaxrank import CrossEncoder  # in place of: from sentence_transformers import CrossEncoder

It is for programs that score with a cross-encoder and evaluate it. It does not train or save. PyTorch is imported only
if tensors are asked for, or an activation is one of PyTorch's.
"""

from __future__ import annotations

import functools
import importlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jaxtyping import Float32

from jaxrank import convert
from jaxrank.errors import CheckpointError, RequestError
from jaxrank.models import settings_of
from jaxrank.reranker import BUILTIN, Content, Reranker, sigmoid
from jaxrank.text.tokenizer import PairTokenizer, token_ids
from jaxrank.types import Encoded

Activation = Callable[[Any], Any]
"""A function from logits of the shape [n, 1] to scores, each by itself. It takes a float32 NumPy array or a PyTorch
tensor."""

Method = TypeVar("Method", bound=Callable[..., Any])

DEVICES = {"cpu": ("cpu",), "gpu": ("gpu", "cuda", "rocm"), "tpu": ("tpu", "xla")}
"""The names of devices in PyTorch's programs, by JAX's name of the platform."""

WITHOUT_EFFECT = {
    "model_kwargs": ("attn_implementation", "device_map", "low_cpu_mem_usage", "use_safetensors"),
    "processor_kwargs": ("use_fast",),
    "config_kwargs": ("classifier_dropout",),
}
"""Values of these arguments that are accepted because they change no score."""


def renamed(**names: str | None) -> Callable[[Method], Method]:
    """Let a method also take earlier names of its arguments. Names that have no successor (None) have no effect."""

    def decorate(method: Method) -> Method:
        @functools.wraps(method)
        def with_names(*args: Any, **given: Any) -> Any:
            for old, new in names.items():
                if old in given:
                    value = given.pop(old)
                    if new is not None:
                        given.setdefault(new, value)
            return method(*args, **given)

        return cast(Method, with_names)

    return decorate


def identity(logits: Float32[np.ndarray, " n"]) -> Float32[np.ndarray, " n"]:
    """Return the logits themselves."""
    return logits


class Evaluations:
    """What sentence-transformers' evaluators write into a model's card. It is kept here in the order in which it came.

    Attributes:
        results: a list of (evaluator, measures by name, epoch, step).
    """

    def __init__(self) -> None:
        self.results: list[tuple[Any, dict[str, Any], int, int]] = []

    def set_evaluation_metrics(self, evaluator: Any, metrics: Mapping[str, Any], epoch: int = 0, step: int = 0) -> None:
        self.results.append((evaluator, dict(metrics), epoch, step))


class CrossEncoder:
    """Score pairs of texts, with the arguments and results of sentence-transformers' class.

    The scores are those of that class, with one exception: a part of a text that looks like a special token stays text
    here. JAX chooses the devices.

    Attributes:
        reranker: the Reranker.
        activation_fn: the function that turns logits into scores.
        model_card_data: what evaluators found.
    """

    @renamed(
        model_name="model_name_or_path", automodel_args="model_kwargs", tokenizer_args="processor_kwargs",
        tokenizer_kwargs="processor_kwargs", config_args="config_kwargs", cache_dir="cache_folder",
        default_activation_function="activation_fn",
    )  # fmt: skip
    def __init__(
        self,
        model_name_or_path: str | Path | None = None,
        *,
        modules: Any = None,
        device: Any = None,
        prompts: Mapping[str, str | None] | None = None,
        default_prompt_name: str | None = None,
        cache_folder: str | Path | None = None,
        trust_remote_code: bool = False,
        revision: str | None = None,
        local_files_only: bool = False,
        token: bool | str | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        processor_kwargs: Mapping[str, Any] | None = None,
        config_kwargs: Mapping[str, Any] | None = None,
        model_card_data: Any = None,
        backend: str = "torch",
        num_labels: int | None = None,
        max_length: int | None = None,
        activation_fn: Activation | None = None,
        keep_in_fp32_modules: Sequence[str] | None = None,
        **settings: Any,
    ) -> None:
        """Load a model by its Hugging Face id or from a folder.

        Some arguments have no effect. These are `device` (with a warning if it is not JAX's), `trust_remote_code` (no
        code of a model is run), and those that WITHOUT_EFFECT lists.

        Args:
            model_name_or_path: the Hugging Face id or the folder. None loads the small built-in model.
            prompts: texts by name, in addition to those that the folder has. A text is the instruct of models that read
                one. For others it is put before the query.
            default_prompt_name: the name of the text that is used if `predict` names none.
            cache_folder: the cache folder of the download.
            revision: the revision of the download.
            local_files_only: whether nothing is downloaded.
            token: the token of the download.
            model_kwargs: "dtype". The default follows config.json: bfloat16 if it says bfloat16, and float32 for all
                others.
            processor_kwargs: "model_max_length", the same as max_length.
            num_labels: 1.
            max_length: the most tokens of a pair. The default is the tokenizer's model_max_length if the model takes
                it, else Reranker's default.
            activation_fn: the activation. The default is the one of torch.nn that the folder's configuration names,
                else the sigmoid.
            **settings: arguments of Reranker.from_pretrained, such as dtype, quantization, row_tokens, chat_template.

        Raises:
            RequestError: an argument is refused. These are modules, keep_in_fp32_modules, backends other than "torch",
                other numbers of labels, and other entries of the three dictionaries.
            ModelError: the model cannot be loaded.
        """
        of_model, of_tokenizer, of_config = (dict(one or {}) for one in (model_kwargs, processor_kwargs, config_kwargs))
        dtype = of_model.pop("dtype", of_model.pop("torch_dtype", None))
        limit = of_tokenizer.pop("model_max_length", None)
        labels = of_config.pop("num_labels", num_labels)
        check_left_out("model_kwargs", of_model)
        check_left_out("processor_kwargs", of_tokenizer)
        check_left_out("config_kwargs", of_config)
        if not {labels, num_labels} <= {None, 1}:
            raise RequestError(f"num_labels is {num_labels or labels}; models of one label are scored: leave it out")
        for argument, value in (("modules", modules), ("keep_in_fp32_modules", keep_in_fp32_modules or None)):
            if value is not None:
                raise RequestError(f"{argument} is given, which is not done here; leave it out")
        if backend != "torch":
            raise RequestError(f"backend is {backend!r}; JAX computes here: leave it out")
        check_device(device)

        hub = {"cache_dir": cache_folder, "local_files_only": local_files_only, "token": token}
        folder = BUILTIN
        if model_name_or_path is not None:
            load_format = settings.get("load_format")
            formats = (load_format,) if load_format in convert.FORMATS else convert.FORMATS[:1]
            hub = {name: value for name, value in hub.items() if value}
            folder = convert.find(model_name_or_path, revision, formats=formats, **hub)
        config = convert.read_config(folder)
        saved = read_object(folder / convert.SETTINGS)
        limit = limit if max_length is None else max_length
        settings["max_length"] = saved_length(folder, config) if limit is None else limit
        if dtype in (None, "auto"):
            dtype = saved_dtype(config)
        settings.setdefault("dtype", str(dtype).removeprefix("torch."))
        self.reranker = Reranker.from_pretrained(folder, **settings)
        self.reranker.name = "jaxrank/builtin" if model_name_or_path is None else str(model_name_or_path)
        prompts = {**(saved.get("prompts") or {}), **(prompts or {})}
        self.prompts = {name: text or "" for name, text in prompts.items()}
        self.default_prompt_name = default_prompt_name or saved.get("default_prompt_name")
        self._prompt(None, None)  # this checks that the default one is there
        self.activation_fn: Activation = activation_fn or saved_activation(saved, config)
        self.model_card_data = Evaluations() if model_card_data is None else model_card_data

    num_labels = 1

    @property
    def max_seq_length(self) -> int:
        """The most tokens of a pair, with its special tokens."""
        return self.reranker.max_length

    max_length = max_seq_length

    @renamed(sentences="inputs", activation_fct="activation_fn", num_workers=None)
    def predict(
        self,
        inputs: Sequence[Any] | np.ndarray,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        activation_fn: Activation | None = None,
        apply_softmax: bool | None = False,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: Any = None,
        pool: Any = None,
        chunk_size: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Score (query, document) pairs of texts, in their order, or a single pair.

        These arguments have no effect: batch_size (rows are packed by tokens; it must be positive), apply_softmax
        (there is one label), device, pool, chunk_size, num_workers.

        Args:
            prompt: the prompt itself; see __init__. It has priority over `prompt_name`.
            prompt_name: the name of a prompt; see __init__.
            activation_fn: an activation instead of the model's. It is called with a NumPy array [n, 1]. If it takes
                none (TypeError, AttributeError), it is called with a tensor.
            convert_to_tensor: whether the result is a tensor.
            convert_to_numpy: whether the result is a NumPy array.
            show_progress_bar: whether a bar is shown for long jobs on a terminal. None shows none.

        Returns:
            A float32 array [n], or a float32 scalar for a single pair. With convert_to_tensor it is a tensor [n] on
            CPU, or []. With neither that nor convert_to_numpy it is a list of tensors [], or one tensor.

        Raises:
            RequestError: the input is no pair of texts, or an argument is unknown.
        """
        if kwargs:
            raise RequestError(f"predict takes no {next(iter(kwargs))}; leave it out")
        check_device(device)
        single = is_single(inputs)
        pairs: list[Any] = [inputs] if single else list(inputs)
        asked = self._prompt(prompt, prompt_name)
        instruct = asked if self.reranker.takes_instruct else None
        if asked and instruct is None:
            pairs = [(asked + pair[0], pair[1]) if is_pair(pair) else pair for pair in pairs]
        check_batch_size(batch_size)
        encoded = self.reranker.encode_pairs(pairs, instruct=instruct)
        logits = self._logits(pairs, encoded, show_progress_bar)
        scores = activated(activation_fn or self.activation_fn, logits)
        if convert_to_tensor or not convert_to_numpy:
            import torch

            tensor = torch.from_numpy(scores)
            made: Any = tensor if convert_to_tensor else list(tensor)
        else:
            made = scores
        return made[0] if single else made

    @renamed(
        activation_fct="activation_fn", num_workers=None, apply_softmax=None, convert_to_numpy=None,
        convert_to_tensor=None,
    )  # fmt: skip
    def rank(
        self,
        query: Content,
        documents: Sequence[Content],
        top_k: int | None = None,
        return_documents: bool = False,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        activation_fn: Activation | None = None,
        device: Any = None,
        pool: Any = None,
        chunk_size: int | None = None,
    ) -> list[dict[str, Any]]:
        """Sort the documents by falling score, at most top_k of them. Equal scores keep their order.

        Models that see take images and videos, as Reranker.rank does. The other arguments are those of `predict`.

        Returns:
            One dictionary for each document: {"corpus_id": its place, "score": a float}. With return_documents it has
            the document itself as "text".

        Raises:
            RequestError: as in `predict`.
        """
        check_device(device)
        check_batch_size(batch_size)
        asked = self._prompt(prompt, prompt_name)
        instruct = asked if self.reranker.takes_instruct else None
        if asked and instruct is None and isinstance(query, str):
            query = asked + query
        encoded = self.reranker.encode(query, documents, instruct=instruct)
        logits = self._logits([(query, document) for document in documents], encoded, show_progress_bar)
        scores = activated(activation_fn or self.activation_fn, logits).tolist()
        ranked = sorted(range(len(scores)), key=lambda i: scores[i], reverse=True)[:top_k]
        return [
            {"corpus_id": i, "score": scores[i], **({"text": documents[i]} if return_documents else {})} for i in ranked
        ]

    def evaluate(self, evaluator: Callable[..., Any], output_path: str | None = None) -> Any:
        """Return what one of sentence-transformers' evaluators says of this model.

        It writes its table to `output_path`.
        """
        if output_path is not None:
            Path(output_path).mkdir(parents=True, exist_ok=True)
        return evaluator(self, output_path)

    def _logits(self, pairs: Sequence[Any], encoded: list[Encoded], show_progress_bar: bool | None) -> np.ndarray:
        """Return the float32 logits [n] of pairs."""
        if isinstance(self.reranker.tokenizer, PairTokenizer):
            encoded = cut_longest_first(self.reranker.tokenizer, pairs, encoded)
        return self.reranker.score_encoded(encoded, progress=bool(show_progress_bar))

    def _prompt(self, prompt: str | None, name: str | None) -> str | None:
        """Return the text that is put before the queries or instructs the model, or None for nothing."""
        if prompt is not None:
            return prompt or None
        name = self.default_prompt_name if name is None else name
        if name is None:
            return None
        if name not in self.prompts:
            known = ", ".join(map(repr, self.prompts)) or "none"
            raise RequestError(f"prompt_name is {name!r}; prompts of this model: {known}")
        return self.prompts[name] or None


def is_single(inputs: Any) -> bool:
    """Return whether the input is one pair and not several, by the rules of sentence-transformers.

    One pair is a sequence whose first element is not a sequence, or an array of one dimension.

    Raises:
        RequestError: the input is neither.
    """
    if isinstance(inputs, np.ndarray):
        return inputs.ndim == 1 and inputs.size > 0
    if not isinstance(inputs, Sequence) or isinstance(inputs, str | bytes):
        raise RequestError(f"inputs must be a pair of texts or a list of pairs, got {type(inputs).__name__}")
    return len(inputs) > 0 and not (isinstance(inputs[0], Sequence | np.ndarray) and not isinstance(inputs[0], str))


def is_pair(pair: Any) -> bool:
    return not isinstance(pair, str) and hasattr(pair, "__len__") and len(pair) == 2 and isinstance(pair[0], str)


def cut_longest_first(
    tokenizer: PairTokenizer, pairs: Sequence[tuple[str, str]], encoded: list[Encoded]
) -> list[Encoded]:
    """Cut pairs that are too long, as "longest_first" of transformers does.

    The longer text is cut to the length of the other, then both are cut equally. The tokenizer's own way differs if the
    query has more than half of the room.
    """
    room = tokenizer.max_length - 4
    whole = {pairs[i][0]: np.zeros(0, np.int32) for i, pair in enumerate(encoded) if pair.dropped}
    for query, ids in zip(whole, token_ids(tokenizer.tokenizer, list(whole)), strict=True):
        whole[query] = np.array(ids, np.int32)
    places = [i for i, pair in enumerate(encoded) if pair.dropped and 2 * len(whole[pairs[i][0]]) > room]
    cut = list(encoded)
    for i, ids in zip(places, token_ids(tokenizer.tokenizer, [pairs[i][1] for i in places]), strict=True):
        query = whole[pairs[i][0]]
        shorter = min(len(query), len(ids), room // 2)
        most = [shorter, room - shorter] if len(query) <= len(ids) else [room - shorter, shorter]
        kept, own = query[: most[0]], ids[: most[1]]
        tokens = [tokenizer.cls_id, *kept, tokenizer.sep_id, tokenizer.sep_id, *own, tokenizer.sep_id]
        cut[i] = Encoded(np.array(tokens, np.int32), 0, len(query) + len(ids) - len(kept) - len(own))
    return cut


def check_left_out(argument: str, entries: Mapping[str, Any]) -> None:
    """Check that a dictionary has only entries that have no effect.

    Raises:
        RequestError: it has others.
    """
    if odd := [name for name in entries if name not in WITHOUT_EFFECT[argument]]:
        raise RequestError(f"{argument} has {odd[0]!r}, which is not done here; leave it out")


def check_batch_size(size: int) -> None:
    """Check that the batch size is positive.

    Raises:
        RequestError: it is not.
    """
    if size <= 0:
        raise RequestError(f"batch_size is {size}; it must be at least 1")


def check_device(device: Any) -> None:
    """Warn if PyTorch's programs would mean other devices than those that JAX computes on."""
    platform = jax.default_backend()
    names = DEVICES.get(platform, (platform,))
    for one in device if isinstance(device, list | tuple) else [device]:
        if one is not None and str(one).partition(":")[0] not in names:
            warnings.warn(f"device {one} is left aside: JAX computes on {platform} here", stacklevel=4)


def activated(function: Activation, logits: Float32[np.ndarray, " n"]) -> Float32[np.ndarray, " n"]:
    """Return the scores that a function makes of the logits.

    Raises:
        RequestError: there is not one score for each logit.
    """
    try:
        scores = function(logits[:, None])
    except (TypeError, AttributeError):
        import torch

        with torch.no_grad():
            scores = function(torch.from_numpy(logits[:, None])).float().numpy()
    scores = np.asarray(scores, np.float32)
    if scores.size != len(logits):
        raise RequestError(
            f"activation_fn made scores of the shape {scores.shape} of {len(logits)} logits; one for each is needed"
        )
    return scores.reshape(len(logits))


def saved_length(folder: Path, config: Mapping[str, Any]) -> int | None:
    """Return the tokenizer's limit, if the model takes it. Models that read a prompt give None."""
    family, model = settings_of(dict(config))
    limit = read_object(folder / "tokenizer_config.json").get("model_max_length")
    return limit if family.prompts is None and isinstance(limit, int) and limit <= model.max_length else None


def saved_dtype(config: Mapping[str, Any]) -> str:
    """Return "bfloat16" for a model that is published so, else "float32"."""
    both = {**(config.get("text_config") or {}), **config}
    return "bfloat16" if both.get("dtype", both.get("torch_dtype")) == "bfloat16" else "float32"


def saved_activation(saved: Mapping[str, Any], config: Mapping[str, Any]) -> Activation:
    """Return the activation that a folder names.

    config_sentence_transformers.json comes first, then config.json, then the sigmoid. Only classes of torch.nn are
    used. Others are ignored with a warning. sentence-transformers does so too, if it does not trust them.

    Raises:
        CheckpointError: the activation cannot be loaded.
    """
    name = (
        saved.get("activation_fn")
        or (config.get("sentence_transformers") or {}).get("activation_fn")
        or config.get("sbert_ce_default_activation_function")
    )
    module, _, last = str(name or "torch.nn.Sigmoid").rpartition(".")
    if f"{module}.".startswith("torch.nn."):
        if last in ("Sigmoid", "Identity"):
            return sigmoid if last == "Sigmoid" else identity
        try:
            return getattr(importlib.import_module(module), last)()
        except (ImportError, AttributeError, TypeError) as error:
            raise CheckpointError(f"activation {name} of the model cannot be had ({error}); give another") from error
    warnings.warn(f"the model's activation {name} is not of torch.nn; the sigmoid is taken", stacklevel=4)
    return sigmoid


def read_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, or {} if there is no such file.

    Raises:
        CheckpointError: the file cannot be read, or holds no object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); fetch it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is {type(value).__name__}, not an object; fetch it again")
    return value
