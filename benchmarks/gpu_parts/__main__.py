"""One part, in this process."""

from __future__ import annotations

import argparse
import importlib
from functools import partial
from pathlib import Path

from benchmarks.gpu_parts.part import Part

MODULES = {
    "facts": ("facts", {}),
    "correctness": ("correctness", {}),
    "attention": ("attention", {}),
    "v2-m3": ("models", {"name": "bge-reranker-v2-m3"}),
    "0.6b": ("models", {"name": "qwen3-reranker-0.6b"}),
    "8b": ("models", {"name": "qwen3-reranker-8b"}),
    "torch": ("pytorch", {"compiled": False}),
    "torch-compile": ("pytorch", {"compiled": True}),
}
"""By name of the part: the module whose `run` it is, and what that is given."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("part", choices=list(MODULES))
    parser.add_argument("--output", type=Path, required=True, help="the folder for PART.json")
    parser.add_argument(
        "--seconds", type=float, default=600.0, help="what the part may take; it leaves out what it can"
    )
    parser.add_argument("--bodies", nargs="*", help="the attention bodies that are measured; all that run here if none")
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    module, given = MODULES[arguments.part]
    run = partial(importlib.import_module(f"benchmarks.gpu_parts.{module}").run, **given)
    part = Part(arguments.part, arguments.output, arguments.smoke, arguments.seconds, arguments.bodies or None)
    part.save()
    run(part)
    part.save(state="done")
    if not all(row.get("ok", True) for row in part.rows):
        raise SystemExit("not all is right: see the rows that are not ok")


if __name__ == "__main__":
    main()
