"""Ahead-of-time compilation for NVIDIA GPUs, with no GPU: the attention kernels alone, and whole scoring functions.

    python benchmarks/compile_gpu.py --models bge-reranker-v2-m3 qwen3-reranker-8b --buckets 2048 16384
        [--implementations tiled triton] [--no-kernels] [--breakdown] [--cuda FOLDER]
        [--output benchmarks/results/compile-gpu.json]

`--models` without names: the kernels alone. Needs `pip install jax[cuda12]` or `jax[cuda13]`, of which the plugin and
PJRT are used, ptxas, and no driver. XLA compiles for the hardware described in --target (by default an H100 80GB,
beside this file) and leaves its PTX, which ptxas assembles once more. The kernel through Triton is compiled for the
other targets too. With --output, rows of other code, of another JAX or of another program stay in the file.

Of each attention kernel (a model has two, the second for its last layer): registers of a thread, spills (bytes), tensor
core instructions, whether wgmma had to stand one after another, shared memory, and with nvdisasm
`instructions_per_tile`: those of the loop over keys, which each of its warps issues, brought to 128 x 128 scores. A
branch that the assembler puts elsewhere (Mosaic's, for tiles that need a mask) does not count.

Of a whole model, for a layer in the middle (the compiled loop's body; the whole program over its layers where they are
unrolled):
kernels        launches; inner loops once
copies         memory copies, of weights out of the stack above all
gb             operands + results of all that runs, copies too (hlo.py says how they are counted); of these:
product_gb, attention_gb, elementwise_gb (all else, norms too), copy_gb
traced_loops   inner loops whose trip count is data
host_checks    those, and conditionals: the host waits for a predicate, at each trip
graph          share of the kernels that a command buffer (CUDA graph) holds
And of the program: temporaries, code size, spills of all kernels, wgmma instructions. What inner loops hold is called
attention and counted for one trip.

Without a GPU XLA tunes no product: Triton's default tiles stand where a GPU would choose the best of Triton's and
cuBLAS's. --cublas shows the forms of the latter. Of a whole model this shows what runs, not how fast its products are.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

# before JAX is loaded: this process compiles for a GPU and must not look for one
os.environ |= {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2"}

import jax
import numpy as np
from aot_gpu import load_plugin, place_on
from flax import nnx
from hlo import COPIES, Program, Step, thunks
from jax.sharding import NamedSharding
from machine import finish, save
from sass import Tools, assemble, find_tools
from shapes import MODELS, VL_MODELS

from jaxrank.kernels import IMPLEMENTATIONS, attention, make_layout
from jaxrank.runtime.packing import pack
from jaxrank.runtime.programs import take_tower, whole

GB = 1e9
HERE = Path(__file__).parent
KERNEL = "packed_attention"
BODIES = ("tiled", "triton", "mosaic")


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


class Machine(NamedTuple):
    """What is compiled for, and with what; dump: the folder in which XLA leaves its texts."""

    place: NamedSharding
    arch: str
    tools: Tools
    dump: Path

    @property
    def name(self) -> str:
        return next(iter(self.place.device_set)).device_kind


def dumped(dump: Path, ending: str) -> str:
    """The text of the largest module's file of that ending."""
    paths = sorted(dump.glob(f"*{ending}"), key=lambda path: path.stat().st_size)
    return paths[-1].read_text() if paths else ""


def compile_one(row: dict[str, Any], machine: Machine, lower: Callable[[NamedSharding], Any]) -> dict[str, Any]:
    """The row with what came of it, or with `error` where it does not compile."""
    for path in machine.dump.iterdir():
        path.unlink()
    start = time.perf_counter()
    try:
        with jax.sharding.use_abstract_mesh(machine.place.mesh.abstract_mesh):
            compiled = lower(machine.place).compile()
    except Exception as error:  # the compiler's own, whatever they are: the table tells them
        return row | {"error": (str(error).strip().splitlines() or [repr(error)])[0][:300]}
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    files = [path for path in sorted(machine.dump.glob("*.ptx")) if ".entry" in path.read_text()]
    assembled = [assemble(path, machine.arch, machine.tools) for path in files]
    kernels = [kernel for some, _ in assembled for kernel in some]
    mine = [kernel for kernel in kernels if kernel["name"].startswith(KERNEL)]
    sequence = dumped(machine.dump, "thunk_sequence.txt")
    shared = dict(re.findall(rf"({KERNEL}\w*)\s.*shared_memory: (\d+)", sequence))
    told = ("registers", "spill_stores", "spill_loads", "wgmma", "mma", "tcgen05", "async_copies", "serialized", "loop")
    return (
        row
        | {"compile_s": round(seconds, 1)}
        | {key: [kernel[key] for kernel in mine] for key in told}
        | {
            "shared_bytes": [int(size) for size in shared.values()],
            "other_kernels": len(kernels) - len(mine),
            "their_spills": sum(kernel["spill_stores"] for kernel in kernels if kernel not in mine),
            "all_wgmma": sum(kernel["wgmma"] for kernel in kernels),
            "arguments_gb": round(memory.argument_size_in_bytes / GB, 3),
            "temporaries_gb": round(memory.temp_size_in_bytes / GB, 3),
            "code_mb": round(sum(size for _, size in assembled) / 1e6, 2),
        }
    )


def layer_columns(dump: Path, layers: int) -> tuple[dict[str, Any], list[Step]]:
    """The columns of a layer, from the texts of the program compiled last, and its steps."""
    program = Program(dumped(dump, "gpu_after_optimizations.txt"))
    steps = list(program.steps(program.body))
    loop, number = program.loop, None
    if loop is not None:
        name = re.escape(loop.name)
        found = re.search(rf'"{name}"\s+thunk_id: (\d+)', dumped(dump, "thunk_metadata.txt"))
        assert found, f"no thunk of {loop.name}"
        number = int(found[1])
    sequence = dumped(dump, "thunk_sequence_after_thunk_passes.txt") or dumped(dump, "thunk_sequence.txt")
    run = thunks(sequence, number)
    kernels = [one for one in run if one.kind not in COPIES]
    share = 1 if loop is not None else layers
    size = Counter[str]()
    for step in steps:
        size[step.kind] += step.bytes
    traced = sum(one.trips is None for one in program.whiles(program.body))
    branches = program.count(program.body, "conditional")
    return {
        "layers": "scan" if loop is not None else "unrolled",
        "kernels": round(len(kernels) / share, 1),
        "copies": round((len(run) - len(kernels)) / share, 1),
        "gb": round(size.total() / share / GB, 3),
        **{f"{kind}_gb": round(size[kind] / share / GB, 3) for kind in ("product", "attention", "elementwise", "copy")},
        "traced_loops": round(traced / share, 1),
        "host_checks": round((traced + branches) / share, 1),
        "graph": round(sum(one.in_graph for one in kernels) / max(1, len(kernels)), 2),
    }, steps


def lower_kernel(case: Case, implementation: str, place: NamedSharding) -> Any:
    def shaped(shape: Sequence[int], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    layout = make_layout(np.zeros((case.rows, 4), np.int32), case.keys, implementation)
    q = shaped((case.rows, case.heads, case.size), case.dtype)
    k = shaped((case.keys, case.kv_heads, case.size), case.dtype)
    call = jax.jit(partial(attention, scale=case.size**-0.5, implementation=implementation))
    return call.lower(q, k, k, jax.tree.map(lambda x: shaped(x.shape, x.dtype), layout))


def lower_model(name: str, tokens: int, implementation: str, place: NamedSharding) -> Any:
    module: Any
    module, config = (MODELS | VL_MODELS)[name]
    # by its backend "tiled" tells whether it is to save a CPU's memory: it must see a GPU
    with mock.patch("jax.default_backend", return_value="gpu"):
        model = nnx.eval_shape(lambda: module(config, dtype="bfloat16", rngs=None, implementation=implementation))
        take_tower(model)
        score, state = whole(model)
        packed = pack([], tokens, causal=module.causal, implementation=implementation)
        arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), (state, packed))
        return score.lower(*arguments)


def kernel_row(case: Case, implementation: str, machine: Machine) -> dict[str, Any]:
    row = {"implementation": implementation, **case._asdict()}
    row = compile_one(row, machine, partial(lower_kernel, case, implementation))
    if "error" not in row and all(row["loop"]):
        kernel: Any = importlib.import_module(f"jaxrank.kernels.{implementation}")
        scores = kernel.tile_size(case.rows) * kernel.key_tile_size(case.keys)
        row["instructions_per_tile"] = [round(loop * 128 * 128 / scores) for loop in row["loop"]]
    return row


def model_row(name: str, tokens: int, implementation: str, machine: Machine, breakdown: bool) -> dict[str, Any]:
    row = {"implementation": implementation, "model": name, "tokens": tokens}
    row = compile_one(row, machine, partial(lower_model, name, tokens, implementation))
    if "error" in row:
        return row
    config = (MODELS | VL_MODELS)[name][1]
    columns, steps = layer_columns(machine.dump, getattr(config, "text", config).layers)
    if breakdown:
        print(f"\n| MB | {name}, {tokens} tokens: kind | HLO | operands -> result | computes |\n|---|---|---|---|---|")
        for step in sorted(steps, key=lambda step: -step.bytes):
            print(f"| {step.bytes / 1e6:.1f} | {step.kind} | {step.name} | {step.shapes} | {step.what} |")
    return row | columns


def merge(old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The new rows after those old ones that are of other programs."""
    named = ("code", "jax", "target", "products", "implementation", "model", "tokens", *Case._fields)

    def identity(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row.get(name) for name in named)

    taken = {identity(row) for row in new}
    return [*(row for row in old if identity(row) not in taken), *new]


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    known = [name for name in BODIES if name in IMPLEMENTATIONS]
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="*", choices=[*MODELS, *VL_MODELS], default=list(MODELS))
    parser.add_argument("--buckets", nargs="+", type=int, default=[512, 2048, 16384])
    parser.add_argument("--implementations", nargs="+", choices=known, default=known)
    parser.add_argument("--target", type=Path, default=HERE / "h100_target_config.txtpb")
    parser.add_argument("--no-kernels", action="store_true", help="whole models alone")
    parser.add_argument("--breakdown", action="store_true", help="print what runs in a layer, by bytes")
    parser.add_argument("--cublas", action="store_true", help="no products through Triton")
    parser.add_argument("--cuda", type=Path, help="the folder of CUDA, with bin/ptxas")
    parser.add_argument("--code", default="now", help="what the rows call the code that is compiled")
    parser.add_argument("--output", type=Path)
    return parser.parse_args(argv)


def programs(arguments: argparse.Namespace, machines: dict[Path, Machine]) -> list[tuple[Machine, Callable[[], Any]]]:
    """What is compiled, and for what."""
    main = machines[arguments.target]
    kernels = [
        (machine, partial(kernel_row, case, name, machine))
        for name in arguments.implementations
        if name != "tiled" and not arguments.no_kernels
        for machine in (machines.values() if name == "triton" else [main])
        for case in KERNELS
    ]
    models = [
        (main, partial(model_row, model, tokens, name, main, arguments.breakdown))
        for name in arguments.implementations
        for model in arguments.models
        for tokens in arguments.buckets
    ]
    return kernels + models


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    tools = find_tools(arguments.cuda)
    with tempfile.TemporaryDirectory() as folder:
        # read when the plugin is loaded; the emitter's name brings PTX, which newer ones leave on request alone
        flags = f"--xla_gpu_cuda_data_dir={tools.cuda} --xla_dump_to={folder} --xla_dump_hlo_as_text"
        flags += " --xla_dump_emitter_re=ptx" + " --xla_gpu_enable_triton_gemm=false" * arguments.cublas
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
        # Mosaic leaves its PTX where this says (and says that it lacks nvdisasm, which it does not need)
        os.environ |= {"MOSAIC_GPU_DUMP_TO": folder, "MOSAIC_GPU_DUMP_PTX": "1"}
        plugin = load_plugin()
        others = [] if arguments.no_kernels else sorted(HERE.glob("*_target_config.txtpb"))
        machines: dict[Path, Machine] = {}
        for target in [arguments.target, *others]:
            arch = "sm_" + "".join(re.findall(r'"Compute Capability (\d+)\.(\w+)"', target.read_text())[0])
            machines[target] = Machine(place_on(target), arch, tools, Path(folder))
        rows: list[dict[str, Any]] = []
        result: dict[str, Any] = {"benchmark": "compile_gpu", "plugin": plugin}
        output: Path | None = arguments.output
        before = json.loads(output.read_text())["rows"] if output and output.exists() else []
        for machine, compiled in programs(arguments, machines):
            same = {"code": arguments.code, "jax": jax.__version__, "target": machine.name, "arch": machine.arch}
            rows.append(same | {"products": "cublas" if arguments.cublas else "triton"} | compiled())
            print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
            save(result | {"rows": merge(before, rows)}, output)
    finish(result | {"rows": merge(before, rows)}, output)
    if errors := sum("error" in row for row in rows):
        raise SystemExit(f"{errors} of {len(rows)} programs did not compile: see the lines above")


if __name__ == "__main__":
    main()
