"""A straight reading of Qwen3-VL-Reranker with transformers' own class, to compare features and scores with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration

from jaxrank.types import Patches


@dataclass(frozen=True)
class Prompt:
    """Token ids in which every media token stands for itself, and the media in their order."""

    ids: np.ndarray
    media: tuple[Patches, ...]


class PublishedVL:
    """The published model's own class with a folder's weights."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        self.yes, self.no = (tokenizer.convert_tokens_to_ids(answer) for answer in ("yes", "no"))
        self.model: Any = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()
        self.image_id: int = self.model.config.image_token_id
        self.video_id: int = self.model.config.video_token_id

    def inputs(self, prompt: Prompt) -> dict[str, torch.Tensor]:
        """What the class's forward takes for one prompt: images and videos apart, and which token is which."""
        ids = torch.tensor(prompt.ids[None].astype(np.int64))
        kinds = (ids == self.image_id).int() + 2 * (ids == self.video_id).int()
        inputs = {"input_ids": ids, "mm_token_type_ids": kinds}
        images = [one for one in prompt.media if not one.seconds]
        videos = [one for one in prompt.media if one.seconds]
        for media, pixels, grid in (
            (images, "pixel_values", "image_grid_thw"),
            (videos, "pixel_values_videos", "video_grid_thw"),
        ):
            if media:
                inputs[pixels] = torch.tensor(np.concatenate([one.pixels for one in media]))
                inputs[grid] = torch.tensor([one.grid for one in media])
        return inputs

    @torch.no_grad()
    def logit(self, prompt: Prompt) -> float:
        """logit(yes) - logit(no) at the last token."""
        scored = self.model(**self.inputs(prompt), logits_to_keep=1).logits[0, -1].float()
        return (scored[self.yes] - scored[self.no]).item()

    def positions(self, prompt: Prompt) -> np.ndarray:
        """By time, height and width, [3, length]."""
        inputs = self.inputs(prompt)
        positions, _ = self.model.model.get_rope_index(
            inputs["input_ids"],
            inputs["mm_token_type_ids"],
            image_grid_thw=inputs.get("image_grid_thw"),
            video_grid_thw=inputs.get("video_grid_thw"),
        )
        return positions[:, 0].numpy()

    @torch.no_grad()
    def features(self, media: Sequence[Patches]) -> np.ndarray:
        """What the tower makes of media side by side, [tokens, U, D]: the main features, then deepstack's."""
        pixels = torch.tensor(np.concatenate([one.pixels for one in media]))
        made = self.model.model.visual(
            pixels.to(self.model.dtype), grid_thw=torch.tensor([one.grid for one in media]), return_dict=True
        )
        return torch.stack([made.pooler_output, *made.deepstack_features], 1).float().numpy()
