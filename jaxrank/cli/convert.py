"""`jaxrank convert`: writes a folder that loads fast."""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from jaxrank.cli.model import QUANTIZATIONS


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the command's flags to a parser."""
    command.add_argument("source", help="Hugging Face id or folder of a published checkpoint")
    command.add_argument("folder", help="folder to write")
    command.add_argument("--dtype", choices=["auto", "bfloat16", "float32"], default="auto",
                         help="dtype of the written matrices; auto keeps the dtype of the source")  # fmt: skip
    command.add_argument("--quantization", "-q", choices=list(QUANTIZATIONS),
                         help="write matrices in int8, which takes half the size of bfloat16")  # fmt: skip
    command.add_argument("--revision", help="branch, tag or commit of a Hugging Face id")
    command.add_argument("--overwrite", action="store_true", help="replace the folder if it exists")
    command.add_argument("--no-progress", action="store_true", help="show no progress bar")


def run(arguments: argparse.Namespace) -> int:
    """Run the command and return its exit status."""
    from jaxrank import convert as converter

    dtype = None if arguments.dtype == "auto" else arguments.dtype
    source = converter.find(arguments.source, arguments.revision, formats=converter.FORMATS)
    with quiet_threads():
        converter.convert(
            source, Path(arguments.folder), dtype=dtype, quantization=arguments.quantization,
            progress=not arguments.no_progress, overwrite=arguments.overwrite,
        )  # fmt: skip
    print(f"wrote {arguments.folder}")
    return 0


@contextlib.contextmanager
def quiet_threads() -> Iterator[None]:
    """Keep the threads of Orbax and TensorStore quiet.

    If writing fails, they print pages of text beside our one line. After a failure they stay quiet, because some of
    them print late.
    """
    hooks = sys.unraisablehook, threading.excepthook
    loggers = [(logger, logger.level) for logger in map(logging.getLogger, ("absl", "asyncio"))]
    sys.unraisablehook = threading.excepthook = lambda *_: None
    for logger, _ in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    yield
    sys.unraisablehook, threading.excepthook = hooks
    for logger, level in loggers:
        logger.setLevel(level)
