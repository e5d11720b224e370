"""The `jaxrank` command. Heavy imports wait until a subcommand needs them."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Sequence

from jaxrank.cli import bench, compile, convert, evaluate, rerank, serve
from jaxrank.version import __version__

COMMANDS = {
    "serve": (serve, "answer POST /v1/rerank over HTTP"),
    "compile": (compile, "fill the compilation cache for the next start"),
    "convert": (convert, "write a folder that loads fast"),
    "rerank": (rerank, "rank documents from a file or standard input"),
    "evaluate": (evaluate, "measure runs against judgements"),
    "bench": (bench, "put load on a running server and measure it"),
}
"""For each command, its module and its purpose. A module has add_arguments(parser) and run(arguments), which returns
the exit status.
"""


def parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    top = argparse.ArgumentParser(prog="jaxrank", description="Rerank documents with JAX.")
    top.add_argument("--version", action="version", version=f"jaxrank {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, said) in COMMANDS.items():
        module.add_arguments(commands.add_parser(name, help=said))
    return top


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed arguments.

    Before Python 3.13, argparse accepts an optional FILE only directly after QUERY. This function also accepts it
    later.

    Args:
        argv: The words of the command line. None for those of the process.
    """
    top = parser()
    arguments, rest = top.parse_known_args([hyphenated(word) for word in (sys.argv[1:] if argv is None else argv)])
    if rest and getattr(arguments, "file", None) == "-" and not rest[0].startswith("-"):
        arguments.file = rest.pop(0)
    if rest:
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    return arguments


def hyphenated(word: str) -> str:
    """Return a flag with hyphens for underscores, as vLLM also takes --hf_overrides. Return other words unchanged."""
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value if re.fullmatch(r"--[a-z_-]+", flag) else word


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit status.

    Args:
        argv: The words of the command line. None for those of the process.

    Returns:
        0 for success, 1 if the work failed, 2 if the command line is wrong, 130 after Ctrl-C.
    """
    begin = time.perf_counter()
    arguments = parse(argv)
    arguments.begin = begin
    from jaxrank.errors import JaxrankError

    try:
        status = COMMANDS[arguments.command][0].run(arguments)
        print(end="", flush=True)
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader has closed the pipe, as `head` does
        drop_output()
        return 0
    except (JaxrankError, OSError) as error:
        print(f"jaxrank: error: {error}", file=sys.stderr)
        drop_output()
        return 1


def drop_output() -> None:
    """If standard output is broken, discard the remaining output. Otherwise Python would complain at its end."""
    try:
        print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
