"""Flags that several commands share: which model a command loads, and how."""

from __future__ import annotations

import argparse
import gc
import sys
from pathlib import Path
from typing import Any

DTYPES = {"auto": "bfloat16", "bfloat16": "bfloat16", "half": "bfloat16", "float16": "bfloat16", "float": "float32",
          "float32": "float32"}  # fmt: skip
"""The dtype of matrices and activations for each value of --dtype. float16, which other servers use, means bfloat16."""

QUANTIZATIONS = ("int8",)
"""The quantizations of jaxrank.models.quantized, which is too heavy to import here."""


def model_arguments(command: argparse.ArgumentParser) -> None:
    """Add the flags that choose and load a model."""
    command.add_argument("--dtype", choices=list(DTYPES), default="auto",
                         help="dtype of matrices and activations; auto and float16 mean bfloat16")  # fmt: skip
    command.add_argument("--quantization", "-q", choices=list(QUANTIZATIONS),
                         help="keep matrices in int8, half of bfloat16's memory; see jaxrank convert")  # fmt: skip
    command.add_argument("--max-model-len", "--context-length", type=int, metavar="TOKENS", dest="max_length",
                         help="most tokens of a query and document together; default: the model's limit")  # fmt: skip
    command.add_argument("--row-tokens", type=int, metavar="TOKENS", help="tokens scored together in one packed row")
    command.add_argument("--prompt", choices=["official", "sglang", "vllm", "none"],
                         help="prompt of models that read one; default: the publisher's prompt")  # fmt: skip
    command.add_argument("--chat-template", metavar="FILE", help="your own Jinja file instead of --prompt")
    command.add_argument("--instruct", metavar="TEXT", help="what to judge, if a request does not say")
    command.add_argument("--load-format", choices=["auto", "safetensors", "torch", "pt", "orbax"], default="auto",
                         help="which weights to read: auto takes those of a converted folder (orbax), else "
                         "safetensors; torch or pt reads PyTorch's .bin files, which can hide code")  # fmt: skip
    command.add_argument("--revision", help="branch, tag or commit of a Hugging Face id")
    command.add_argument("--data-parallel", "--data-parallel-size", "--dp", "--dp-size", type=int, metavar="N",
                         help="copies of the weights; default: as many as the devices allow")  # fmt: skip
    command.add_argument("--tensor-parallel", "--tensor-parallel-size", "--tp", "--tp-size", type=int, metavar="N",
                         help="devices that share a copy; default: the smallest number that can hold it")  # fmt: skip
    command.add_argument("--compile-cache", metavar="FOLDER",
                         help='folder to keep compiled programs for the next start; or "none"')  # fmt: skip
    command.set_defaults(begin=None)  # when the command started, if it is known


LONG_DOCUMENT = ("truncate", "window")
"""The values of jaxrank.text.windows, which imports too much for this module."""


def long_document_argument(command: argparse.ArgumentParser, also: str = "") -> None:
    """Add the flag --long-document.

    Args:
        command: The parser.
        also: More words for its help.
    """
    command.add_argument("--long-document", choices=LONG_DOCUMENT, default="truncate",
                         help=f"how to handle documents that do not fit{also}: cut off their end, or split them into "
                         "overlapping windows, of which the best one counts; default: truncate")  # fmt: skip


SIZE_FLAGS = {
    "--image-min-pixels": ("min_pixels", "smaller images are enlarged to so many pixels; default: 4096"),
    "--image-max-pixels": ("max_pixels", "larger images are shrunk to so many pixels; default: 1843200"),
    "--video-fps": ("fps", "frames taken of a second of video; default: 1"),
    "--video-max-frames": ("max_frames", "frames taken of a whole video; default: 64"),
    "--video-max-pixels": ("video_pixels", "pixels of them all, two frames counting as one; default: 7864320"),
}
"""Flags for the size at which media are processed, with names of jaxrank.media.patches.CHANGEABLE."""


def load(
    arguments: argparse.Namespace, model: str | None, *, weights: bool = True, progress: bool | None = None
) -> Any:
    """Return the Reranker that the arguments describe.

    Its `stages` begin with the imports, counted from the command's start. Python's garbage collector is off meanwhile,
    and then ignores all objects that exist. Otherwise it would look at all of JAX and of the tokenizer's file again and
    again.

    Args:
        arguments: The parsed flags.
        model: A Hugging Face id or a folder. None for the built-in model.
        weights: Whether to load the weights.
        progress: Whether to show a bar for the weights. None shows it only on a terminal.

    Raises:
        RequestError: The model cannot be loaded with these arguments.
    """
    gc.disable()
    try:
        reranker = _load(arguments, model, weights, progress)
        gc.freeze()
        return reranker
    finally:
        gc.enable()


def _load(arguments: argparse.Namespace, model: str | None, weights: bool, progress: bool | None) -> Any:
    sizes = {name: getattr(arguments, flag[2:].replace("-", "_"), None) for flag, (name, _) in SIZE_FLAGS.items()}
    import jax

    from jaxrank.reranker import DEFAULT_CACHE, Reranker
    from jaxrank.stages import Stages
    from jaxrank.weights.shards import byte_bar

    # before JAX first computes: on CPU, worker threads would keep the memory of their last call, 100 MB and more
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    # source locations of operations would take a tenth of the time of a look-up in the cache
    jax.config.update("jax_traceback_in_locations_limit", 0)
    if arguments.dtype in ("half", "float16"):
        print(f"jaxrank: --dtype {arguments.dtype} is taken for bfloat16", file=sys.stderr)
    cache = {None: DEFAULT_CACHE, "none": None}.get(arguments.compile_cache, arguments.compile_cache)
    stages = Stages(arguments.begin)
    stages.lap("imports")
    with byte_bar("loading", disable=None if progress is None else not progress) as advance:
        return Reranker.from_pretrained(
            model,
            dtype=DTYPES[arguments.dtype],
            quantization=arguments.quantization,
            max_length=arguments.max_length,
            row_tokens=arguments.row_tokens,
            prompt=arguments.prompt,
            chat_template=chat_template(arguments),
            instruct=arguments.instruct,
            preprocessing={name: value for name, value in sizes.items() if value is not None} or None,
            revision=arguments.revision,
            load_format="torch" if arguments.load_format == "pt" else arguments.load_format,
            weights=weights,
            compile_cache=cache,
            data_parallel=arguments.data_parallel,
            tensor_parallel=arguments.tensor_parallel,
            progress=advance if weights else None,
            stages=stages,
        )


PUBLISHED_TEMPLATES = ("qwen3_reranker.jinja", "qwen3_vl_reranker.jinja")
"""Files of SGLang's and vLLM's examples. Their prompts are built in."""


def chat_template(arguments: argparse.Namespace) -> str | None:
    """Return the file of --chat-template.

    Returns:
        The file. None if it is one of PUBLISHED_TEMPLATES and does not exist, since it is not needed.
    """
    file = arguments.chat_template
    if file is None or Path(file).exists() or Path(file).name not in PUBLISHED_TEMPLATES:
        return file
    print(
        f"jaxrank: there is no {file}; it is not needed, since the publisher's own prompt is built in and used",
        file=sys.stderr,
    )
    return None
