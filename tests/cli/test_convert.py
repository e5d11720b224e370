"""`jaxrank convert`: the same scores, folders that exist, a full disk."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.checkpoints import TEXT
from tests.cli.commands import NO_CACHE, Outcome, Run, complaint, to_bin


class TestConvert:
    @pytest.mark.parametrize("weights", ["safetensors", "bin"])
    def test_converted_models_score_the_same(
        self, run: Run, source: Path, folder: Path, documents: Path, tmp_path: Path, weights: str
    ) -> None:
        def scores(model: Path) -> list[tuple[int, float]]:
            status, out, err = run("rerank", "q", documents, "--model", model, "--dtype", "float32", *NO_CACHE)
            assert (status, err) == (0, "")
            return [(line["index"], line["score"]) for line in map(json.loads, out.splitlines())]

        documents.write_text("\n".join(TEXT))
        if weights == "bin":
            to_bin(folder)
        assert run("convert", folder, tmp_path / "new", "--no-progress") == (0, f"wrote {tmp_path}/new\n", "")
        want = scores(source)
        assert np.ptp([score for _, score in want]) > 0.01
        assert scores(tmp_path / "new") == want

    def test_existing_folders(self, run: Run, source: Path, tmp_path: Path) -> None:
        line = ["convert", source, tmp_path / "out", "--no-progress"]
        assert run(*line, "--dtype", "bfloat16").status == 0
        assert "out exists; choose another folder, or allow overwriting (--overwrite)" in complaint(run(*line))
        assert '"bfloat16"' in (tmp_path / "out/jaxrank.json").read_text()
        assert run(*line, "--overwrite").status == 0
        assert '"float32"' in (tmp_path / "out/jaxrank.json").read_text()

    def test_full_disk(self, source: Path, tmp_path: Path) -> None:
        """A limit on the size of files stands for the disk. In a process of its own, where threads may complain too."""
        program = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); "
        program += "from jaxrank.cli import main; sys.exit(main(sys.argv[1:]))"
        command = [sys.executable, "-c", program, "convert", source, tmp_path / "out", "--no-progress"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120)
        line = complaint(Outcome(result.returncode, result.stdout, result.stderr))
        assert re.search(f"{tmp_path}/out could not be written: .*; nothing was left there", line)
        assert os.listdir(tmp_path) == []
