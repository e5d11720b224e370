"""`jaxrank compile`: fills the compilation cache, so that a server with the same flags starts without compiling."""

from __future__ import annotations

import argparse
import sys

from jaxrank.cli import model
from jaxrank.cli.model import model_arguments


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the command's flags to a parser."""
    command.add_argument("model", nargs="?", help="Hugging Face id or folder; default: the built-in model")
    model_arguments(command)


def run(arguments: argparse.Namespace) -> int:
    """Run the command and return its exit status.

    Raises:
        RequestError: The flags leave nothing to do, or the model cannot be loaded with them.
    """
    from jaxrank.errors import RequestError

    if arguments.compile_cache == "none":
        raise RequestError("--compile-cache none leaves nothing to do; name a folder, or leave the flag out")
    outline = model.load(arguments, arguments.model, weights=False)
    attention = ", ".join(f"{choice} for {part}" for part, choice in outline.attention.items())
    print(f"attention: {attention}", file=sys.stderr)
    outline.warm_up(lambda line: print(line, file=sys.stderr))
    compiled, found = outline.compiled
    print(f"{compiled} programs compiled for {outline.devices}, {found} were there, after {outline.stages}")
    return 0
