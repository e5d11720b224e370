"""The `jaxrank` command itself: version, usage, output that nobody takes."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from jaxrank import __version__
from tests.cli.commands import BUFFERED, NO_CACHE, PANDA, Run


def test_version_without_loading_jax() -> None:
    check = "import sys; from jaxrank.cli import main\ntry: main(['--version'])\nfinally: print('jax' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=60)
    assert (result.stdout, result.stderr, result.returncode) == (f"jaxrank {__version__}\nFalse\n", "", 0)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "fly",
        "convert a",
        "serve --port x",
        "serve --dtype int8",
        "serve --x",
        "serve --max-connections 0",
        "serve --max-queue-tokens 1e6",
        "serve --request-timeout 0",
        "serve --shutdown-grace nan",
        "serve --body-timeout inf",
    ],
)
def test_usage(run: Run, line: str) -> None:
    status, out, err = run(*line.split())
    assert (status, out) == (2, "")
    assert err.startswith("usage: jaxrank")
    assert "error: " in err.splitlines()[-1]


ECHO = """
import resource, sys
from dataclasses import make_dataclass
from jaxrank import cli
Item = make_dataclass("Item", ["index", "score", "document"])
class Echo:
    def rank(self, query, documents, **_):
        return [Item(i, 0.5, document) for i, document in enumerate(documents)]
cli.model.load = lambda *_, **__: Echo()
if sys.argv[1] == "disk":
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
sys.exit(cli.main(["rerank", "q"]))
"""


@pytest.mark.parametrize("count", [1, 3000], ids=["within the buffer", "beyond it"])
@pytest.mark.parametrize(
    "full, status, err", [("pipe", 0, b""), ("disk", 1, b"jaxrank: error: [Errno 27] File too large\n")]
)
def test_output_that_nobody_takes(tmp_path: Path, full: str, status: int, err: bytes, count: int) -> None:
    """In a process of its own: the interpreter, too, writes when it ends."""
    reader, writer = os.pipe()
    os.close(reader)
    with (tmp_path / "out").open("wb") as file, os.fdopen(writer, "wb") as pipe:
        result = subprocess.run(
            [sys.executable, "-c", ECHO, full], input=b"a document\n" * count, stdout=pipe if full == "pipe" else file,
            stderr=subprocess.PIPE, env=BUFFERED, timeout=60,
        )  # fmt: skip
    assert (result.returncode, result.stderr) == (status, err)


def test_head(tmp_path: Path) -> None:
    """The whole command in a pipe, with more to say than a pipe holds."""
    (tmp_path / "documents.txt").write_text(f"{PANDA * 15}\n" * 100)
    program = (
        f"{shlex.quote(sys.executable)} -m jaxrank rerank 'what is panda?' --max-model-len 16 {' '.join(NO_CACHE)}"
    )
    line = f"set -o pipefail; {program} {shlex.quote(str(tmp_path))}/documents.txt | head -n 1"
    result = subprocess.run(["bash", "-c", line], env=BUFFERED, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads(result.stdout)["document"] == PANDA * 15
