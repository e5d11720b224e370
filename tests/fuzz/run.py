"""schemathesis against the server's own OpenAPI documents: each dialect's, and that of all of them.

    python tests/fuzz/run.py [--requests 4000] [--servers builtin seeing] [--seed 1] [--output FILE]

`make test-fuzz` runs it in an environment that has what it takes; `make test-fuzz REQUESTS=20000`. No answer may be a
5xx, have a status, type, header or body that its document does not name, refuse what is good or take what is not; see
schemathesis.toml and hooks.py. Servers run on this machine: the built-in model behind a key, and with --servers seeing
a random Qwen3-VL-Reranker without one. --requests: of each server, at least; the first go through every document. Ends
in one JSON line, and with status 1 if any check fails, or a server is not as it was before.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from machine import finish
from serve import serving, state

HERE = Path(__file__).parent
KEY = "a-key-for-tests"
DIALECTS = ("sglang", "vllm", "cohere", "jina", "voyage", "tei", "infinity", "llamacpp")
LIMITS = ("--max-documents", "30")


def stints() -> Iterator[tuple[str, list[str]]]:
    """A document, "" for that of all dialects, and the operations to try of it; what differs most comes first."""
    for dialect in (*DIALECTS, ""):
        yield dialect, ["--include-name", "POST /v1/rerank"]
    for dialect in ("", *DIALECTS):
        yield dialect, ["--exclude-name", "POST /v1/rerank"]


def attack(url: str, key: str | None, dialect: str, options: list[str], folder: Path) -> tuple[bool, Counter[Any]]:
    """One run of schemathesis. Whether all was well, and answers by operation and status."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    base = f"{url}/{dialect}".rstrip("/")
    with urllib.request.urlopen(urllib.request.Request(f"{base}/openapi.json", headers=headers)) as answer:
        (folder / "openapi.json").write_bytes(answer.read())
    config = (HERE / "schemathesis.toml").read_text()
    if key:
        config += f'\n[auth.openapi.key]\nbearer = "{key}"\n'
    (folder / "schemathesis.toml").write_text(config)
    if not dialect:
        # which of the dialects' models reads a body is told by the body: what is good for one may be refused by another
        options = [*options, "--exclude-checks", "positive_data_acceptance"]
    command = [Path(sys.executable).with_name("schemathesis"), "--config-file", folder / "schemathesis.toml", "run"]
    told = {
        **os.environ,
        "FUZZ_COUNTS": str(folder / "counts.json"),
        "PYTHONPATH": f"{HERE}:{os.environ['PYTHONPATH']}",
    }
    done = subprocess.run(
        [*command, folder / "openapi.json", "--url", base, "--no-color", *options],
        capture_output=True, text=True, env=told, cwd=folder,
    )  # fmt: skip
    if done.returncode:
        said = re.sub(r"[A-Za-z0-9+/]{100,}", "...", done.stdout + done.stderr)  # images
        print(said[-20_000:], file=sys.stderr)
    counts = Counter(
        {(name, status): count for name, status, count in json.loads((folder / "counts.json").read_text())}
    )
    return done.returncode == 0, counts


@contextmanager
def server(name: str, folder: Path) -> Iterator[tuple[int, int, str | None]]:
    """Port, process and key of a server."""
    log = folder / "server.log"
    if name == "builtin":
        with serving([*LIMITS, "--api-key", KEY], log) as (port, process):
            yield port, process, KEY
        return
    from tests.checkpoints import make_qwen3_vl

    model = make_qwen3_vl(folder / "model")
    with serving([str(model), *LIMITS, "--no-remote-media", "--context-length", "8192"], log) as (port, process):
        yield port, process, None


def memory(process: int) -> int:
    """Resident bytes."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))


def try_server(name: str, requests: int, seed: int) -> dict[str, Any]:
    """What came of all stints against one server, until so many requests have been answered."""
    answers: Counter[Any] = Counter()
    failed: list[str] = []
    with tempfile.TemporaryDirectory() as folder, server(name, Path(folder)) as (port, process, key):
        began, before = time.perf_counter(), memory(process)
        for number, (dialect, options) in enumerate(stints()):
            if number >= len(DIALECTS) + 1 and answers.total() >= requests:
                break
            options = [*options, "--seed", str(seed + number), "--max-examples", "30"]
            well, counts = attack(f"http://127.0.0.1:{port}", key, dialect, options, Path(folder))
            answers += counts
            failed += [] if well else [f"{dialect or 'all'} {' '.join(options)}"]
            print(
                f"{name} {dialect or 'all'}: {counts.total()} requests, {'well' if well else 'FAILED'}", file=sys.stderr
            )
        seconds, after = time.perf_counter() - began, state(port)
        result = {
            "server": name,
            "requests": answers.total(),
            "seconds": round(seconds, 1),
            "by_status": {str(status): sum(c for (_, s), c in answers.items() if s == status)
                          for status in sorted({status for _, status in answers})},
            "by_operation": {label: {str(s): c for (n, s), c in sorted(answers.items()) if n == label}
                             for label in sorted({label for label, _ in answers})},
            "ready_after": after,
            "memory_mb": {"before": before // 10**6, "after": memory(process) // 10**6},
            "failed": failed,
        }  # fmt: skip
    as_before = after["ready"] and not after["compilations_after_ready"] and not after["queued_requests"]
    return result | {"well": bool(as_before and not failed)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=4000)
    parser.add_argument("--servers", nargs="+", choices=["builtin", "seeing"], default=["builtin"])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    runs = [try_server(name, args.requests, args.seed) for name in args.servers]
    finish({"benchmark": "fuzz", "requests": sum(run["requests"] for run in runs), "runs": runs}, args.output)
    return 0 if all(run["well"] for run in runs) else 1


if __name__ == "__main__":
    raise SystemExit(main())
