"""Which model a command loads, and how: flags that several commands share."""

from __future__ import annotations

import argparse
import gc
import sys
from pathlib import Path
from typing import Any

DTYPES = {"auto": "bfloat16", "bfloat16": "bfloat16", "half": "bfloat16", "float16": "bfloat16", "float": "float32",
          "float32": "float32"}  # fmt: skip
"""What of matrices and activations is meant by --dtype; float16, which other servers know, is not among them."""

QUANTIZATIONS = ("int8",)
"""Those of jaxrank.models.quantized, which is too heavy to import here."""


def model_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--dtype", choices=list(DTYPES), default="auto",
                         help="of matrices and activations; auto is bfloat16, and so is float16")  # fmt: skip
    command.add_argument("--quantization", "-q", choices=list(QUANTIZATIONS),
                         help="keep matrices in int8, half of bfloat16's memory; see also jaxrank convert")  # fmt: skip
    command.add_argument("--max-model-len", "--context-length", type=int, metavar="TOKENS", dest="max_length",
                         help="longest pair of query and document; default: what the model can")  # fmt: skip
    command.add_argument("--row-tokens", type=int, metavar="TOKENS", help="tokens scored together in one packed row")
    command.add_argument("--prompt", choices=["official", "sglang", "vllm", "none"],
                         help="how models that read a prompt are asked; default: the publisher's way")  # fmt: skip
    command.add_argument("--chat-template", metavar="FILE", help="a Jinja file of one's own instead of --prompt")
    command.add_argument("--instruct", metavar="TEXT", help="what is to be judged, where a request does not say it")
    command.add_argument("--load-format", choices=["auto", "safetensors", "torch", "pt", "orbax"], default="auto",
                         help="which weights of the folder: auto takes a converted folder's (orbax), else safetensors; "
                         "torch, or pt, reads PyTorch's .bin files, which can hide code")  # fmt: skip
    command.add_argument("--revision", help="branch, tag or commit of a Hugging Face id")
    command.add_argument("--data-parallel", "--data-parallel-size", "--dp", "--dp-size", type=int, metavar="N",
                         help="copies of the weights; default: what the devices allow")  # fmt: skip
    command.add_argument("--tensor-parallel", "--tensor-parallel-size", "--tp", "--tp-size", type=int, metavar="N",
                         help="devices that share a copy; default: the fewest that hold it")  # fmt: skip
    command.add_argument("--compile-cache", metavar="FOLDER",
                         help='where compiled programs are kept for the next start; "none" for nowhere')  # fmt: skip
    command.set_defaults(begin=None)  # when the command started, where it says so


LONG_DOCUMENT = ("truncate", "window")
"""Those of jaxrank.text.windows, which imports too much for here."""


def long_document_argument(command: argparse.ArgumentParser, also: str = "") -> None:
    command.add_argument("--long-document", choices=LONG_DOCUMENT, default="truncate",
                         help=f"what is done with documents that do not fit{also}: their end is left out, or they are "
                         "split into overlapping windows, the best of which counts; default: truncate")  # fmt: skip


SIZE_FLAGS = {
    "--image-min-pixels": ("min_pixels", "smaller images are enlarged to so many pixels; default: 4096"),
    "--image-max-pixels": ("max_pixels", "larger images are shrunk to so many pixels; default: 1843200"),
    "--video-fps": ("fps", "frames taken of a second of video; default: 1"),
    "--video-max-frames": ("max_frames", "frames taken of a whole video; default: 64"),
    "--video-max-pixels": ("video_pixels", "pixels of them all, two frames counting as one; default: 7864320"),
}
"""Flags for the sizes in which media are looked at, by names of jaxrank.media.patches.CHANGEABLE."""


def load(
    arguments: argparse.Namespace, model: str | None, *, weights: bool = True, progress: bool | None = None
) -> Any:
    """The Reranker that the arguments ask for. progress: a bar for the weights; None shows it on a terminal alone.

    Its `stages` begin with the imports, counted from the command's start. Python's garbage collector waits meanwhile,
    and keeps away from what is there then: it would look at all of JAX and of the tokenizer's file again and again.
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

    # set before JAX first computes: on CPU, worker threads would keep what the last call on them took, 100 MB and more
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    # where in the source each operation stands takes a tenth of the time to look programs up in the cache
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
"""Files of SGLang's and vLLM's examples whose prompt is built in."""


def chat_template(arguments: argparse.Namespace) -> str | None:
    """The file of --chat-template; None for one of PUBLISHED_TEMPLATES that is not there, since it is not needed."""
    file = arguments.chat_template
    if file is None or Path(file).exists() or Path(file).name not in PUBLISHED_TEMPLATES:
        return file
    print(
        f"jaxrank: there is no {file}; it is not needed, since the publisher's own prompt is built in and used",
        file=sys.stderr,
    )
    return None
