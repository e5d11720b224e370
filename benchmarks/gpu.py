"""All that a run on one NVIDIA GPU has to tell, in under nine minutes: what is right, how fast, and beside PyTorch.

    python3 benchmarks/gpu.py --output FOLDER [--parts facts correctness ...] [--minutes 9] [--smoke]

Runs from a bare checkout with jax, flax, jaxtyping, torch and transformers, without network: weights and token ids are
random. Every part is a process of its own with a time limit (benchmarks/gpu_parts/__init__.py lists them) that writes
FOLDER/PART.json after every row. A part that fails or hangs is recorded and the next one begins; bodies that do not run
in the part "correctness" are left out of those after it. FOLDER/summary.json holds the rows of all parts, the default
that they choose and the marks; it is written after every part. Exit status 1 if the part "correctness" failed.
--smoke: toy sizes, on any device.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a bare checkout: jaxrank is not installed

from benchmarks.gpu_parts.part import read, write  # noqa: E402
from benchmarks.gpu_parts.summary import bodies, summarise, table  # noqa: E402
from benchmarks.gpu_parts.workloads import GEMMS  # noqa: E402

LAST_LINES = 30
"""Of stderr, that are kept of a part that failed."""


class Process(NamedTuple):
    """A part as a command. seconds: what it is given of nine minutes; it may take what parts before it have left."""

    name: str
    command: list[str]
    seconds: float


SECONDS = {
    "facts": 50, "correctness": 90, "attention": 60, "v2-m3": 90, "0.6b": 70, "8b": 60, "torch": 70,
    "torch-compile": 50,
}  # fmt: skip
"""What each part is given of 9 minutes, in the order in which they run."""
NEED_JAX = {"facts", "correctness", "attention", "v2-m3", "0.6b", "8b"}
DECIDES = "correctness"
LEAST = 0.25
"""Of its time, that must be left for a part to begin."""


def environment(name: str, cache: Path) -> dict[str, str]:
    """Of a part: one compilation cache for all, output at once, and the GPU to whom it belongs."""
    given = {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONUNBUFFERED": "1",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "HF_HUB_OFFLINE": "1",
        "OPENBLAS_NUM_THREADS": "1",  # the float64 references run side by side
    }
    return os.environ | given | ({} if name in NEED_JAX else {"JAX_PLATFORMS": "cpu"})


def run_process(process: Process, limit: float, cache: Path) -> dict[str, Any]:
    """How it ended. At its limit the process goes, and all that it has started."""
    start = time.perf_counter()
    with tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(
            process.command, cwd=ROOT, env=environment(process.name, cache), stderr=errors, start_new_session=True
        )
        try:
            status: int | None = child.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:  # also where this process is told to end
            _end_group(child)
        outcome: dict[str, Any] = {
            "outcome": {None: "timed out", 0: "done"}.get(status, "failed"),
            "exit_status": status,
            "seconds": round(time.perf_counter() - start, 1),
            "limit": round(limit, 1),
        }
        return outcome | ({} if status == 0 else {"stderr": _last_lines(errors)})


def _end_group(child: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _last_lines(errors: IO[bytes]) -> list[str]:
    errors.seek(0)
    return errors.read().decode(errors="replace").splitlines()[-LAST_LINES:]


def run_all(processes: Sequence[Process], folder: Path, minutes: float) -> dict[str, Any]:
    """Outcome and rows of every part, by name; FOLDER/summary.json after each."""
    end = time.perf_counter() + 60 * minutes
    parts: dict[str, Any] = {}
    extra: list[str] = []
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as cache:
        for i, process in enumerate(processes):
            left = end - time.perf_counter()
            path = folder / f"{process.name}.json"
            path.unlink(missing_ok=True)
            if left < LEAST * process.seconds:
                parts[process.name] = {"outcome": "skipped", "seconds": 0.0, "why": "the time is over", "rows": []}
            else:
                share = left * process.seconds / sum(one.seconds for one in processes[i:])
                limit = min(left, max(process.seconds, share))
                print(f"== {process.name}: at most {limit:.0f} s", flush=True)
                options = ["--seconds", f"{limit - 3:.0f}", *extra] if process.name in SECONDS else []
                outcome = run_process(process._replace(command=process.command + options), limit, Path(cache))
                parts[process.name] = read(path) | outcome
                parts[process.name].setdefault("rows", [])
                print(*outcome.get("stderr", []), f"== {process.name}: {outcome['outcome']}", sep="\n", flush=True)
            write(path, parts[process.name])
            if process.name == DECIDES:
                running = [body for body, found in bodies(parts).items() if found["runs"]]
                extra = ["--bodies", *running] if running else []
            write(folder / "summary.json", summarise(parts, GEMMS))
    return parts


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="a folder")
    parser.add_argument("--parts", nargs="+", choices=list(SECONDS), default=list(SECONDS))
    parser.add_argument("--minutes", type=float, default=9.0, help="for all parts together")
    parser.add_argument("--smoke", action="store_true", help="toy sizes, on any device")
    arguments = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("told to end"))
    folder = arguments.output.resolve()
    command = [sys.executable, "-m", "benchmarks.gpu_parts"]
    rest = ["--output", str(folder), *(["--smoke"] if arguments.smoke else [])]
    processes = [
        Process(name, [*command, name, *rest], seconds) for name, seconds in SECONDS.items() if name in arguments.parts
    ]
    parts = run_all(processes, folder, arguments.minutes)
    print(table(read(folder / "summary.json")))
    if DECIDES in parts and parts[DECIDES]["outcome"] != "done":
        raise SystemExit(f"the part {DECIDES!r} {parts[DECIDES]['outcome']}: see {folder / 'summary.json'}")


if __name__ == "__main__":
    main()
