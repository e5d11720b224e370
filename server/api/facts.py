"""What the server reports of itself, in the forms that clients ask for: /v1/models, /models, /info, /version."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, Field

from jaxrank.version import __version__

if TYPE_CHECKING:
    from jaxrank.server.served_model import ServedModel
    from jaxrank.server.settings import Settings


ScoreScale = Annotated[
    str, Field(description='"logit" or "probability": the scale of scores in SGLang\'s and llama.cpp\'s dialects.')
]


class Model(BaseModel):
    """A model, in the form of OpenAI's API."""

    id: str
    object: str
    created: int = Field(description="When the server started, in seconds since 1970.")
    owned_by: str
    max_model_len: int = Field(description="Most tokens of a query and document together.")
    max_documents: int = Field(description="Most documents in one request.")
    input_modalities: list[str] = Field(description='What queries and documents may hold: "text", "image", "video".')
    takes_instruct: bool = Field(description="Whether requests may set instruct, which says what to judge.")
    score_scale: ScoreScale


class Models(BaseModel):
    """The answer of GET /v1/models."""

    object: str
    data: list[Model]


class QueueStats(BaseModel):
    """The state of the queue."""

    queue_fraction: float = Field(description="Waiting requests, as a fraction of the most that may wait.")
    queue_absolute: int = Field(description="Requests accepted and not answered.")
    results_pending: int = Field(description="The same.")
    batch_size: int = Field(description="Most documents in one request.")


class InfinityModel(Model):
    """A model, in the form of Infinity's list."""

    stats: QueueStats
    backend: str
    capabilities: list[str]


class InfinityModels(BaseModel):
    """The answer of GET /models."""

    object: str
    data: list[InfinityModel]


class Labels(BaseModel):
    """The one label of a reranker."""

    id2label: dict[str, str]
    label2id: dict[str, int]


class ModelType(BaseModel):
    """The purpose of the model."""

    reranker: Labels


class FailedAttention(BaseModel):
    """An attention implementation that is not used."""

    implementation: str
    reason: str = Field(description="How it failed its check on this device when the server started.")


class Attention(BaseModel):
    """The attention implementation in use."""

    implementation: str
    failed: list[FailedAttention] = Field(description="Faster implementations that are not correct on this device.")


class Info(BaseModel):
    """The answer of GET /info, where null stands for a fact that this server does not have."""

    model_id: str
    model_sha: str | None
    model_dtype: str
    served_model_name: str
    model_type: ModelType
    max_concurrent_requests: int = Field(description="Requests that may wait.")
    max_input_length: int = Field(description="Most tokens of a query and document together.")
    max_batch_tokens: int = Field(description="Most tokens that are scored together.")
    max_batch_requests: int | None
    max_client_batch_size: int = Field(description="Most documents in one request.")
    auto_truncate: bool = Field(description="Whether pairs that are too long are cut, if a request does not say.")
    tokenization_workers: int
    version: str
    sha: str | None
    docker_label: str | None
    max_body_bytes: int = Field(description="Most bytes in the body of one request.")
    score_scale: ScoreScale
    attention: dict[str, Attention] = Field(
        description='The attention of the "text" model, and of the "vision" tower if the model sees.'
    )


class Version(BaseModel):
    """The answer of GET /version."""

    version: str


@dataclass(frozen=True)
class Facts:
    """The facts of one server.

    Args:
        reranker: The model.
        settings: The application's settings.
        started: When the server started, in seconds since 1970.
    """

    reranker: ServedModel
    settings: Settings
    started: int

    def model(self) -> dict[str, Any]:
        """Return the model in the form of Model."""
        return {
            "id": self.settings.model,
            "object": "model",
            "created": self.started,
            "owned_by": "jaxrank",
            "max_model_len": self.reranker.max_length,
            "max_documents": self.settings.max_documents,
            "input_modalities": ["text"] if self.reranker.preprocessing is None else ["text", "image", "video"],
            "takes_instruct": self.reranker.takes_instruct,
            "score_scale": self.score_scale,
        }

    @property
    def score_scale(self) -> str:
        """The scale of scores in SGLang's and llama.cpp's dialects: "logit" or "probability"."""
        return "logit" if self.reranker.scores_are_logits else "probability"

    def models(self) -> Mapping[str, Any]:
        """Return the answer of GET /v1/models."""
        return {"object": "list", "data": [self.model()]}

    def infinity_models(self, waiting: int) -> Mapping[str, Any]:
        """Return the answer of GET /models.

        Args:
            waiting: The number of requests that are accepted but not answered.
        """
        stats = {
            "queue_fraction": waiting / self.settings.max_queue_requests,
            "queue_absolute": waiting,
            "results_pending": waiting,
            "batch_size": self.settings.max_documents,
        }
        model = self.model() | {"stats": stats, "backend": "jax", "capabilities": ["rerank"]}
        return {"object": "list", "data": [model]}

    def info(self) -> Mapping[str, Any]:
        """Return the answer of GET /info."""
        settings = self.settings
        return {
            "model_id": self.reranker.name,
            "model_sha": None,
            "model_dtype": self.reranker.dtype,
            "served_model_name": settings.model,
            "model_type": {"reranker": {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}},
            "max_concurrent_requests": settings.max_queue_requests,
            "max_input_length": self.reranker.max_length,
            "max_batch_tokens": settings.batch_rows * self.reranker.row_tokens,
            "max_batch_requests": None,
            "max_client_batch_size": settings.max_documents,
            "auto_truncate": settings.truncate,
            "tokenization_workers": settings.encode_threads,
            "version": __version__,
            "sha": None,
            "docker_label": None,
            "max_body_bytes": settings.gate.max_body_bytes,
            "score_scale": self.score_scale,
            "attention": {
                part: {"implementation": choice.implementation, "failed": [one._asdict() for one in choice.failed]}
                for part, choice in self.reranker.attention.items()
            },
        }
