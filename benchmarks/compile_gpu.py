"""Ahead-of-time compilation for an H100, with no GPU: the attention kernel alone, and the whole scoring function.

    python benchmarks/compile_gpu.py --models bge-reranker-v2-m3 qwen3-reranker-8b --buckets 2048 8192
        [--target FILE] [--output benchmarks/results/compile-gpu.json]

`--models` without names: the kernel alone. Needs `pip install jax[cuda12]`, of which the plugin, PJRT and nvcc's ptxas
are used, and no driver. XLA compiles for the hardware described in --target (by default an H100 80GB, beside this
file), Triton included, and leaves its PTX, which ptxas assembles once more to say what registers a thread takes, what
it spills (bytes), and whether wgmma, the tensor cores' instructions, had to stand one after another. Shared memory is
what XLA asks for at launch. A model has two attention kernels, the second for its last layer. Memory is what the
compiled program says of itself, code the size of the assembled kernels. Without a GPU XLA tunes no matrix product: of
a whole model this shows that it compiles and fits, not how fast its products are. Ends in one JSON line.

The topology is made through private functions of jax and jaxlib 0.10.2, and the texts read are those of its XLA.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

# before JAX is loaded: this process compiles for a GPU and must not look for one
os.environ |= {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2"}

import jax
import jax_plugins.xla_cuda12  # pyright: ignore[reportMissingImports]
import numpy as np
import nvidia.cuda_nvcc  # pyright: ignore[reportMissingImports]
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from machine import finish, save
from shapes import MODELS, VL_MODELS

from jaxrank.kernels import attention, make_layout
from jaxrank.packing import pack
from jaxrank.scoring import take_tower, whole

GB = 1e9
PTXAS = Path(nvidia.cuda_nvcc.__path__[0]) / "bin" / "ptxas"
KERNEL = "packed_attention"


class Case(NamedTuple):
    """An attention call: heads and key/value heads, their size, query rows (few in a model's last layer) and keys."""

    kernel: str
    heads: int
    kv_heads: int
    size: int
    dtype: str = "bfloat16"
    rows: int = 2048
    keys: int = 2048


SHAPES = (("v2-m3", 16, 16, 64), ("0.6B", 16, 8, 128), ("4B, 8B", 32, 8, 128), ("head of 72", 16, 16, 72))
KERNELS = [Case(*shape, dtype) for dtype in ("bfloat16", "float32") for shape in SHAPES] + [
    Case(*shape, rows=rows) for shape in SHAPES[:2] for rows in (8, 32, 64, 128)
]


def describe(target: Path) -> NamedSharding:
    """Where arguments lie: on the one device of a topology that has the target's hardware."""
    from jax._src.lib import _jax, xla_client  # pyright: ignore[reportPrivateImportUsage]

    jaxlib: Any = _jax
    client: Any = xla_client
    jax.devices()  # finds the plugins, and loads this one
    if not client.pjrt_plugin_loaded("cuda"):
        library = Path(jax_plugins.xla_cuda12.__path__[0]) / "xla_cuda_plugin.so"
        client.load_pjrt_plugin_dynamically("cuda", str(library))
    if not client.pjrt_plugin_initialized("cuda"):
        client.initialize_pjrt_plugin("cuda")
    options = {"target_config": target.read_text(), "topology": "1x1x1"}
    topology = jaxlib.get_default_c_api_topology("cuda", "", options)
    return NamedSharding(Mesh(np.array(topology._make_compile_only_devices()[:1]), "x"), PartitionSpec())


def assemble(ptx: Path, arch: str) -> tuple[list[dict[str, Any]], int]:
    """What ptxas says of each kernel in the file, with the instructions it holds, and the size of their code."""
    cubin = ptx.with_suffix(".cubin")
    run = [PTXAS, "-v", f"-arch={arch}", ptx, "-o", cubin]
    said = subprocess.run(run, capture_output=True, text=True, check=True).stderr
    parts = re.split(r"\.entry (\w+)", ptx.read_text())
    bodies = dict(zip(parts[1::2], parts[2::2], strict=True))
    kernels = []
    for name, figures in re.findall(r"Compiling entry function '(\w+)'(.*?Used \d+ registers)", said, re.S):
        stores, loads, registers = re.findall(r"(\d+) (?:bytes spill|registers)", figures)
        kernels.append(
            {
                "name": name,
                "registers": int(registers),
                "spill_stores": int(stores),
                "spill_loads": int(loads),
                "wgmma": bodies[name].count("wgmma.mma_async"),
                "mma": bodies[name].count("mma.sync"),
                "async_copies": bodies[name].count("cp.async.cg"),
                "serialized": bool(re.search(rf"wgmma.*serialized.*'{name}'", said)),
            }
        )
    return kernels, cubin.stat().st_size


def compile_one(row: dict[str, Any], dump: Path, arch: str, lower: Callable[[], Any]) -> dict[str, Any]:
    """The row with what came of it, or with `error` where it does not compile."""
    for path in dump.iterdir():
        path.unlink()
    start = time.perf_counter()
    try:
        compiled = lower().compile()
    except Exception as error:  # the compiler's own, whatever they are: the table tells them
        return row | {"error": str(error).strip().splitlines()[0][:300]}
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    files = [assemble(path, arch) for path in sorted(dump.glob("*.ptx")) if ".entry" in path.read_text()]
    kernels = [kernel for some, _ in files for kernel in some]
    mine = [kernel for kernel in kernels if kernel["name"].startswith(KERNEL)]
    thunks = "".join(path.read_text() for path in dump.glob("*thunk_sequence.txt"))
    told = ("registers", "spill_stores", "spill_loads", "wgmma", "mma", "async_copies", "serialized")
    return (
        row
        | {"compile_s": round(seconds, 1)}
        | {key: [kernel[key] for kernel in mine] for key in told}
        | {
            "shared_bytes": [int(size) for size in re.findall(rf"{KERNEL}\w*\s.*shared_memory: (\d+)", thunks)],
            "other_kernels": len(kernels) - len(mine),
            "their_spills": sum(kernel["spill_stores"] for kernel in kernels if kernel not in mine),
            "arguments_gb": round(memory.argument_size_in_bytes / GB, 3),
            "temporaries_gb": round(memory.temp_size_in_bytes / GB, 3),
            "code_mb": round(sum(size for _, size in files) / 1e6, 2),
        }
    )


def lower_kernel(case: Case, place: NamedSharding) -> Any:
    def shaped(shape: Sequence[int], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    layout = make_layout(np.zeros((case.rows, 4), np.int32), case.keys, "triton")
    q = shaped((case.rows, case.heads, case.size), case.dtype)
    k = shaped((case.keys, case.kv_heads, case.size), case.dtype)
    call = jax.jit(partial(attention, scale=case.size**-0.5, implementation="triton"))
    return call.lower(q, k, k, jax.tree.map(lambda x: shaped(x.shape, x.dtype), layout))


def lower_model(name: str, tokens: int, place: NamedSharding) -> Any:
    module: Any
    module, config = (MODELS | VL_MODELS)[name]
    model = nnx.eval_shape(lambda: module(config, dtype="bfloat16", rngs=None, implementation="triton"))
    take_tower(model)
    score, state = whole(model)
    packed = pack([], tokens, causal=module.causal, implementation="triton")
    return score.lower(*jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), (state, packed)))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="*", choices=[*MODELS, *VL_MODELS], default=list(MODELS))
    parser.add_argument("--buckets", nargs="+", type=int, default=[2048, 8192])
    parser.add_argument("--target", type=Path, default=Path(__file__).with_name("h100_target_config.txtpb"))
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args(argv)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        # read when the plugin is loaded
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={folder} --xla_dump_hlo_as_text"
        place = describe(arguments.target)
        arch = "sm_" + "".join(re.findall(r'"Compute Capability (\d+)\.(\w+)"', arguments.target.read_text())[0])
        result = {"benchmark": "compile_gpu", "target": next(iter(place.device_set)).device_kind, "rows": rows}
        for row, lower in [(case._asdict(), partial(lower_kernel, case, place)) for case in KERNELS] + [
            ({"model": model, "tokens": tokens}, partial(lower_model, model, tokens, place))
            for model in arguments.models
            for tokens in arguments.buckets
        ]:
            rows.append(compile_one(row, Path(folder), arch, lower))
            print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
            save(result, arguments.output)
    finish(result, arguments.output)
    if errors := sum("error" in row for row in rows):
        raise SystemExit(f"{errors} of {len(rows)} programs did not compile: see the line above")


if __name__ == "__main__":
    main()
