"""A `jaxrank serve` process with the built-in model, for clients that are installed apart from it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest

KEY = "a-key-for-tests"


@contextmanager
def served(*flags: str) -> Iterator[str]:
    """The base URL of a server that is ready. The program is the first `jaxrank` on the PATH."""
    program = shutil.which("jaxrank")
    assert program, "no program jaxrank on the PATH: run `make test-clients`"
    with closing(socket.create_server(("127.0.0.1", 0))) as probe:
        port = probe.getsockname()[1]
    command = [program, "serve", "--port", str(port), "--api-key", KEY, "--max-documents", "20", *flags]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": ""})
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert process.poll() is None, "the server ended"
            try:
                with urllib.request.urlopen(url + "/ready") as answer:
                    if answer.status == 200:
                        break
            except OSError:
                time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        assert process.wait(30) == 0


@pytest.fixture(scope="session")
def url() -> Iterator[str]:
    with served() as base:
        yield base


@pytest.fixture(scope="session")
def jina_url() -> Iterator[str]:
    """LiteLLM's jina_ai/ keeps neither the path nor the headers of its base URL."""
    with served("--dialect", "jina") as base:
        yield base
