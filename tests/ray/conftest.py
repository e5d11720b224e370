"""The server on Ray, two replicas of it, the plain one beside it with the same flags; rows of files."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

KEY = "a-key-for-tests"
REPLICA = "ray::ServeReplica"


@dataclass(frozen=True)
class Cluster:
    """A `serve run` of our own. driver: its process. folder: where Ray writes. config, environment: what it is told."""

    url: str
    driver: psutil.Process
    folder: Path
    config: dict[str, Any]
    log: Path
    environment: dict[str, str]

    def replicas(self) -> set[int]:
        """Process ids of the replicas that live."""
        found = set()
        for child in self.driver.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if child.status() != psutil.STATUS_ZOMBIE and REPLICA in "".join(child.cmdline()):
                    found.add(child.pid)
        return found

    def deploy(self, **arguments: object) -> None:
        """Have the application replaced by one with other arguments; returns at once."""
        app = self.config["applications"][0]
        changed = {**self.config, "applications": [{**app, "args": {**app["args"], **arguments}}]}
        file = self.folder.parent / "changed.yaml"
        file.write_text(yaml.safe_dump(changed))
        (dashboard,) = re.findall(r"dashboard at \S*?(http://[0-9.:]+)", self.log.read_text())
        command = [sys.executable, "-m", "ray.serve.scripts", "deploy", str(file), "--address", dashboard]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=60, env={**os.environ, **self.environment}
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def proxy_log(self) -> str:
        """What Ray's HTTP proxy has logged, ray_retry's lines among it."""
        return "".join(file.read_text() for file in self.folder.glob("session_2*/logs/serve/proxy_*.log"))


def free_port() -> int:
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as probe:
        return probe.getsockname()[1]


def until(condition: Callable[[], object], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.1)


def ready(url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(url + "/ready").status_code == 200
    return False


@contextlib.contextmanager
def running(command: list[str], log: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process with its own group, interrupted at the end."""
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, env={**os.environ, **environment}, start_new_session=True
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(40)
        except subprocess.TimeoutExpired:
            process.kill()


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.touch(0o600)
    file.write_text(f"{KEY}\n")
    return file


@pytest.fixture(scope="session")
def cluster(keys: Path) -> Iterator[Cluster]:
    port = free_port()
    limits = {"max_documents": 30, "max_queue_requests": 16}
    arguments = {"replicas": 2, "cpus": 0.5, "api_key_file": str(keys), "open_metrics": True, **limits}
    app = {"name": "jaxrank", "import_path": "jaxrank.server.on_ray.app:build", "route_prefix": "/", "args": arguments}
    config = {"http_options": {"host": "127.0.0.1", "port": port}, "applications": [app]}
    # short: names of sockets hold at most 107 bytes
    with tempfile.TemporaryDirectory(prefix="r", ignore_cleanup_errors=True) as scratch:
        file, log, token = (Path(scratch, name) for name in ("app.yaml", "log", "token"))
        token.write_text(secrets.token_hex(32))  # of this cluster alone
        file.write_text(yaml.safe_dump(config))
        command = [sys.executable, "-m", "ray.serve.scripts", "run", str(file)]
        environment = {
            "RAY_ADDRESS": "local",
            "RAY_TMPDIR": scratch,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "jaxrank.server.on_ray.retry:middleware",
        }
        with running(command, log, **environment) as process:
            url, folder = f"http://127.0.0.1:{port}", Path(scratch, "ray")
            cluster = Cluster(url, psutil.Process(process.pid), folder, config, log, environment)

            def up() -> bool:
                assert process.poll() is None, log.read_text()[-3000:]
                return ready(cluster.url) and len(cluster.replicas()) == 2

            until(up, 180, "two replicas")
            yield cluster


@pytest.fixture(scope="session")
def plain(keys: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port = free_port()
    flags = ["--api-key-file", str(keys), "--open-metrics", "--max-documents", "30", "--max-queue-requests", "16"]
    command = [sys.executable, "-m", "jaxrank", "serve", "--port", str(port), *flags]
    with running(command, tmp_path_factory.mktemp("plain") / "log"):
        url = f"http://127.0.0.1:{port}"
        until(lambda: ready(url), 120, "the plain server")
        yield url


TEXT = "the giant panda is a bear species endemic to china paris france tea green red what how ü 熊猫"
WORDS = TEXT.split()
MODEL = ("--dtype", "float32", "--compile-cache", "none")


def rows(count: int, seed: int, mark: str) -> list[dict[str, Any]]:
    dice = random.Random(seed)

    def text(longest: int) -> str:
        return " ".join(dice.choices(WORDS, k=dice.randint(1, longest)))

    return [
        {"id": f"{mark}{i}", "query": text(8), "documents": [text(40) for _ in range(dice.randint(0, 6))], "n": i}
        for i in range(count)
    ]


def write_lines(file: Path, lines: list[Any], end: str = "\n") -> None:
    file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + end)
