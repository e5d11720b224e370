"""Rerankers as cross-encoders of MTEB: `mteb.evaluate(MTEBReranker("BAAI/bge-reranker-v2-m3"), tasks)`.

This needs the package mteb (`jaxrank[mteb]`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32
from mteb.models import ModelMeta  # pyright: ignore[reportMissingImports]
from tqdm import tqdm

from jaxrank.cross_encoder import CrossEncoder

PAIRS = 4096
"""The number of pairs that are scored together. A task can have more than fit into memory as tokens."""

NO_REVISION = "no_revision_available"
"""MTEB's word for no revision."""

EXPERIMENT = ("quantization", "prompt", "chat_template", "default_prompt_name")
"""Settings that change scores, in addition to those that a Reranker reports. MTEB keeps results apart by them."""


class MTEBReranker:
    """A cross-encoder in the form that MTEB's tasks need.

    `model` is the CrossEncoder, and `mteb_model_meta` is its card.
    """

    def __init__(
        self,
        model: CrossEncoder | str | Path | None = None,
        revision: str | None = None,
        device: Any = None,
        **settings: Any,
    ) -> None:
        """Wrap a loaded model, or load one.

        Args:
            model: a loaded model, or what CrossEncoder loads. Scores are those of its activation.
            settings: the settings of CrossEncoder.

        Raises:
            RequestError: as in CrossEncoder.
            ModelError: as in CrossEncoder.
        """
        revision = None if revision == NO_REVISION else revision
        named = not isinstance(model, CrossEncoder)
        self.model = CrossEncoder(model, revision=revision, device=device, **settings) if named else model
        reranker = self.model.reranker
        experiment: dict[str, Any] = {name: str(settings[name]) for name in EXPERIMENT if name in settings}
        experiment |= {"dtype": reranker.dtype, "max_length": reranker.max_length}
        if reranker.instruct is not None:
            experiment["instruct"] = reranker.instruct
        self.mteb_model_meta = ModelMeta.create_empty(
            overwrites=dict(
                name=str(Path(reranker.name).resolve()) if Path(reranker.name).is_dir() else reranker.name,
                revision=revision or NO_REVISION,
                loader=MTEBReranker if named and model is not None else None,
                loader_kwargs={name: value for name, value in settings.items() if name != "token"},  # this is saved
                framework=["JAX"],
                model_type=["cross-encoder"],
                modalities=["text"],
                max_tokens=reranker.max_length,
                use_instructions=reranker.takes_instruct,
                experiment_kwargs=experiment,
            )
        )

    def predict(
        self,
        inputs1: Any,
        inputs2: Any,
        *,
        task_metadata: Any = None,
        hf_split: str = "",
        hf_subset: str = "",
        prompt_type: Any = None,
        show_progress_bar: bool = True,
        **kwargs: Any,
    ) -> Float32[np.ndarray, " n"]:
        """Score each query of `inputs1` with the document of `inputs2` at its place.

        Both are loaders of MTEB's batches.

        If a task has instructions, queries have theirs behind them, as MTEB writes them. Models that read an instruct
        get the two separately. `kwargs` are those of CrossEncoder.predict.
        """
        apart = self.model.reranker.takes_instruct
        pairs = zip(queries(inputs1, apart), (text for batch in inputs2 for text in batch["text"]), strict=True)
        scores: list[np.ndarray] = []
        with tqdm(unit="pair", desc="scoring", disable=None if show_progress_bar else True) as bar:
            while some := list(islice(pairs, PAIRS)):
                for instruct, run in groupby(some, key=lambda pair: pair[0][1]):
                    texts = [(query, document) for (query, _), document in run]
                    scores.append(self.model.predict(texts, prompt=instruct, **kwargs))
                bar.update(len(some))
        return np.concatenate(scores) if scores else np.zeros(0, np.float32)


def queries(batches: Iterable[Mapping[str, Any]], apart: bool) -> Iterator[tuple[str, str | None]]:
    """Return the queries of MTEB's batches. Each has its instruction, if it has one and the two must be separate."""
    for batch in batches:
        if apart and "instruction" in batch:
            yield from zip(batch["query"], batch["instruction"], strict=True)
        else:
            yield from ((text, None) for text in batch["text"])
