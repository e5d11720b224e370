"""A checkpoint, documents, and the command in this process."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from jaxrank import cli
from tests.checkpoints import make_bge
from tests.cli.commands import PANDA, Outcome, Run


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """The command in this process, as the interpreter would end it."""

    def call(*argv: object) -> Outcome:
        capsys.readouterr()
        try:
            status: Any = cli.main([str(argument) for argument in argv])
        except SystemExit as end:
            status = end.code
        out, err = capsys.readouterr()
        if isinstance(status, str):  # the interpreter prints it
            return Outcome(1, out, f"{err}{status}\n")
        return Outcome(status or 0, out, err)

    return call


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bge(tmp_path_factory.mktemp("bge"), max_position_embeddings=130)


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    return shutil.copytree(source, tmp_path / "model")


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    path = tmp_path / "documents.txt"
    path.write_text(f"hi\n\n{PANDA}\n  \nParis is the capital of France.\n", encoding="utf-8")
    return path
