"""A straight reading of Qwen3-Reranker's published script (transformers), to compare ids and scores with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, Qwen3ForCausalLM

PREFIX = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
INSTRUCT = "Given a web search query, retrieve relevant passages that answer the query"


class Script:
    """What the script keeps: tokenizer, the frame's ids, and the ids of the answers."""

    def __init__(self, folder: Path, max_length: int = 8192) -> None:
        self.folder = folder
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.prefix = self.tokenizer.encode(PREFIX, add_special_tokens=False)
        self.suffix = self.tokenizer.encode(SUFFIX, add_special_tokens=False)
        self.yes, self.no = (self.tokenizer.convert_tokens_to_ids(answer) for answer in ("yes", "no"))
        self.room = max_length - len(self.prefix) - len(self.suffix)

    def ids(self, query: str, document: str, instruct: str | None = None) -> list[int]:
        text = f"<Instruct>: {INSTRUCT if instruct is None else instruct}\n<Query>: {query}\n<Document>: {document}"
        body = self.tokenizer(text, truncation="longest_first", max_length=self.room)["input_ids"]
        return [*self.prefix, *body, *self.suffix]

    def model(self, dtype: torch.dtype = torch.float32) -> Any:
        return Qwen3ForCausalLM.from_pretrained(self.folder, dtype=dtype).eval()

    @torch.no_grad()
    def logits(self, prompts: list[list[int]], dtype: torch.dtype = torch.float32) -> np.ndarray:
        """logit(yes) - logit(no) of each prompt, one at a time: no padding, no batch."""
        model = self.model(dtype)
        return np.array([self._difference(model(torch.tensor([ids])).logits).item() for ids in prompts])

    @torch.no_grad()
    def in_batches(self, model: Any, pairs: list[tuple[str, str]], *, last: bool, size: int = 16) -> np.ndarray:
        """The same of (query, document) pairs, as the script does it: in batches that are padded on the left, with the
        logits of the whole vocabulary at every token; with `last`, at the last one alone, which it could do."""
        differences = []
        for start in range(0, len(pairs), size):
            ids = [self.ids(*pair) for pair in pairs[start : start + size]]
            inputs = self.tokenizer.pad({"input_ids": ids}, padding=True, return_tensors="pt")
            differences.append(self._difference(model(**inputs, logits_to_keep=1 if last else 0).logits))
        return torch.cat(differences).numpy()

    def _difference(self, logits: torch.Tensor) -> torch.Tensor:
        scored = logits[:, -1].float()
        return scored[:, self.yes] - scored[:, self.no]
