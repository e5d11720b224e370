"""Host memory and seconds of loading a large checkpoint over several devices, simulated on the CPU, in bfloat16.

    python benchmarks/load.py [--shape qwen3-4b] [--layers 36] [--devices 8] [--output benchmarks/results/load-cpu.json]

A random checkpoint of the shape is written as bfloat16 safetensors, a file a layer, and converted. Each is loaded by a
process of its own, in one copy over all devices, with its files dropped from the page cache and then with what the
cache keeps of them; before each the same files are read plainly, in pieces of 8 MB. The devices' parts lie in host
memory here, so the peak of resident memory (VmHWM, Linux), beyond what it was after imports, is at least one copy of
the weights. Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from checkpoints import QWEN3_SHAPES, make_qwen_tokenizer, qwen3_config
from machine import finish, peak
from safetensors.torch import save_file
from transformers import Qwen3ForCausalLM

AIM = 1.1


def write_checkpoint(folder: Path, shape: str, layers: int | None) -> None:
    """Tensor by tensor, so that no more than a layer is in memory."""
    config = qwen3_config(shape, **({} if layers is None else {"num_hidden_layers": layers}))
    config.architectures = ["Qwen3ForCausalLM"]
    config.save_pretrained(folder)
    make_qwen_tokenizer(folder, 2000, ["The giant panda is a bear endemic to China."])
    with torch.device("meta"):
        model = Qwen3ForCausalLM(config)
    files: dict[str, dict[str, torch.Size]] = {}
    for name, parameter in model.named_parameters():
        layer = name.split(".")[2] if name.startswith("model.layers.") else "ends"
        files.setdefault(f"model-{layer}.safetensors", {})[name] = parameter.shape
    torch.manual_seed(0)
    for file, shapes in files.items():
        tensors = {name: torch.empty(size, dtype=torch.bfloat16).normal_(0, 0.02) for name, size in shapes.items()}
        save_file(tensors, folder / file)
    places = {name: file for file, shapes in files.items() for name in shapes}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def weights_of(folder: Path) -> list[Path]:
    """The files that hold numbers."""
    return [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size > 1 << 16]


def drop_from_page_cache(folder: Path) -> None:
    for path in weights_of(folder):
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def read_plainly(folder: Path) -> dict[str, Any]:
    buffer, size, start = bytearray(8 << 20), 0, time.perf_counter()
    began = time.process_time()
    for path in weights_of(folder):
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                size += count
    seconds, used = time.perf_counter() - start, time.process_time() - began
    rounded = {"seconds": round(seconds, 2), "processor_seconds": round(used, 2)}
    return {"bytes": size, **rounded, "bytes_per_second": round(size / seconds)}


def load(folder: Path, devices: int) -> dict[str, Any]:
    """In this process, which must not have used JAX yet."""
    import jax

    jax.config.update("jax_num_cpu_devices", devices)
    import tensorstore  # noqa: F401

    from jaxrank.reranker import Reranker
    from jaxrank.weights import converted as checkpoint

    jax.block_until_ready(jax.device_put(0.0))
    before, began = peak(os.getpid()), time.process_time()
    reranker = Reranker.from_pretrained(folder, tensor_parallel=devices, compile_cache=None)
    most, used = peak(os.getpid()) - before, time.process_time() - began
    copy = sum(value.nbytes for value in checkpoint.parameters(reranker.model).values())
    seconds = {name: round(value, 2) for name, value in reranker.stages.items()}
    return {
        "devices": reranker.devices,
        "copy_bytes": copy,
        "peak_beyond_baseline_bytes": most,
        "peak_to_copy": round(most / copy, 3),
        "seconds": seconds,
        "processor_seconds": round(used, 2),
        "bytes_per_second": round(copy / seconds["weights"]),
    }


def measure(folder: Path, devices: int) -> dict[str, Any]:
    """From the disk, then from what the page cache keeps."""
    result: dict[str, Any] = {}
    for state in ("dropped from the page cache", "as the page cache has it"):
        found = {}
        for what in ("plain", "load"):
            if state.startswith("dropped"):
                drop_from_page_cache(folder)
            if what == "plain":
                found[what] = read_plainly(folder)
                continue
            line = [sys.executable, __file__, "--load", str(folder), "--devices", str(devices)]
            found[what] = json.loads(subprocess.run(line, check=True, capture_output=True, text=True).stdout)
        found["load_to_plain_seconds"] = round(
            found["load"]["seconds"]["weights"] / max(found["plain"]["seconds"], 0.01), 2
        )
        result[state] = found
        print(
            f"{folder.name}, {state}: peak {found['load']['peak_to_copy']} of a copy (aim {AIM}), "
            f"{found['load']['seconds']['weights']} s; read plainly {found['plain']['seconds']} s"
        )
    return result


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", choices=list(QWEN3_SHAPES), default="qwen3-4b", help="of a random checkpoint")
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--devices", type=int, default=8, help="simulated, all for one copy")
    parser.add_argument("--scratch", type=Path, help="where to write; default: the system's place for temporary files")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.load:
        print(json.dumps(load(arguments.load, arguments.devices)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        published, converted = Path(scratch) / "published", Path(scratch) / "converted"
        published.mkdir()
        write_checkpoint(published, arguments.shape, arguments.layers)
        line = ["convert", str(published), str(converted), "--dtype", "bfloat16", "--no-progress"]
        subprocess.run([sys.executable, "-m", "jaxrank", *line], check=True, stdout=sys.stderr)
        sources = {folder.name: measure(folder, arguments.devices) for folder in (published, converted)}
    layers = qwen3_config(arguments.shape).num_hidden_layers
    finish(
        {
            "benchmark": "load",
            "shape": arguments.shape,
            "layers": arguments.layers or layers,
            "load_average": os.getloadavg(),
            **sources,
        },
        arguments.output,
    )


if __name__ == "__main__":
    main()
