"""--quantization: the same scores by flag and by folder, and clear errors."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import make_bge
from tests.cli.commands import NO_CACHE, Run, complaint


class TestCommand:
    def scores(self, run: Run, *line: object) -> list[float]:
        status, out, err = run("rerank", "q", *line, "--dtype", "float32", *NO_CACHE)
        assert (status, err) == (0, "")
        return [json.loads(one)["score"] for one in out.splitlines()]

    def test_flag_and_folder(self, run: Run, documents: Path, tmp_path: Path) -> None:
        # wide, since a converted folder has some 150 KB more than its weights, now more, now less
        source = make_bge(tmp_path / "published", hidden_size=256, intermediate_size=1024)
        line = ["convert", source, tmp_path / "int8", "-q", "int8", "--no-progress"]
        assert run(*line) == (0, f"wrote {tmp_path}/int8\n", "")
        small, large = (
            sum(path.stat().st_size for path in (where).rglob("*") if path.is_file() and path.name != "tokenizer.json")
            for where in (tmp_path / "int8", source)
        )
        assert small < 0.4 * large, "of float32; in bfloat16 it would be half"
        want = self.scores(run, documents, "--model", source, "--quantization", "int8")
        assert want == self.scores(run, documents, "--model", tmp_path / "int8")
        assert want == self.scores(run, documents, "--model", tmp_path / "int8", "-q", "int8")
        plain = self.scores(run, documents, "--model", source)
        assert 1e-6 < np.abs(np.subtract(want, plain)).max() < 0.02

    @pytest.mark.parametrize("command", ["serve", "rerank q", "convert a b"])
    @pytest.mark.parametrize("name", ["awq", "fp8", "INT8", ""])
    def test_unknown_names(self, run: Run, command: str, name: str) -> None:
        status, out, err = run(*command.split(), "--quantization", name)
        assert (status, out) == (2, "")
        assert re.search(f"argument --quantization/-q: invalid choice: '{name}' [(]choose from '?int8'?[)]", err)

    def test_damaged_weights(self, run: Run, folder: Path, documents: Path) -> None:
        state = load_file(folder / "model.safetensors")
        state["roberta.embeddings.word_embeddings.weight"][9, 1] = torch.inf
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        line = complaint(run("rerank", "q", documents, "--model", folder, "-q", "int8", *NO_CACHE))
        assert "word_embeddings.weight has values that are not finite" in line
