"""Ahead-of-time compilation of the whole scoring function for TPUs, with no TPU: does it compile, and does it fit?

    python benchmarks/compile_tpu.py --models bge-reranker-v2-m3 --chips v5e v6e --buckets 2048
        [--patches 8192] [--quantization int8] [--output benchmarks/results/compile-tpu.json]

This is the compiler that runs on TPU machines (libtpu, in the extra `tpu`), Pallas kernels included; weights are shapes
alone. A model that does not fit one chip is cut over 2, then 4 (see jaxrank.sharding); --chips-each asks for a number,
--copies for several copies side by side, each with a row of its own. v5e-16 and v5p-16 are chips of several hosts, with
a process each that is to have all logits. Memory is what the compiled program says of itself, a chip. The time is a
roofline, not a measurement: the larger of FLOPs (of matrices and needed scores; the compiler counts a loop's body once)
over the chip's published bfloat16 peak, and weights over its memory bandwidth, for a row full of documents of 190
tokens; what chips tell each other is not in it, though the all-reduces in the program's text are counted, two to a
layer's body. A layer's estimate is the compiler's own, beside its products at the peak: layer_time.py says what is
counted, and --breakdown prints it by instruction. With --patches, the vision towers of models that have one are
compiled, for rows of so many patches full of images of 1,024; their models of text are compiled with rows of text
alone. Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

# before JAX is loaded: this process compiles for a TPU and must not look for one
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

import jax
import numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec
from layer_time import Instruction, layer
from machine import finish, save
from shapes import MODELS, VL_MODELS, layer_flops, model_flops, tower_flops

from jaxrank.models.quantized import QUANTIZATIONS, quantized_outline
from jaxrank.runtime.packing import LADDER, pack
from jaxrank.runtime.patch_packing import pack_patches
from jaxrank.runtime.programs import take_tower, whole, whole_tower
from jaxrank.sharding import DATA, make_mesh, specs
from jaxrank.types import Encoded, Patches

GB = 1e9


class Chip(NamedTuple):
    """A topology of libtpu, one device's memory, bfloat16 peak and bandwidth as Google publishes them, its clock in Hz,
    and the chips of a host along each axis."""

    topology: str
    memory: float
    flops: float
    bandwidth: float
    clock: float
    host: tuple[int, int, int] = (2, 2, 1)


CHIPS = {
    "v5e": Chip("v5e:2x2", 16 * GB, 197e12, 819e9, 1.5e9),
    "v6e": Chip("v6e:2x2", 32 * GB, 918e12, 1640e9, 1.75e9),
    "v6e-8": Chip("v6e:2x4", 32 * GB, 918e12, 1640e9, 1.75e9, host=(2, 4, 1)),
    "v5p": Chip("v5p:2x2x1", 95 * GB, 459e12, 2765e9, 1.75e9),
    # a device is one of a chip's two cores; the clock is the one at which two units of 256 x 256 reach the peak
    "tpu7x": Chip("tpu7x:2x2x1", 96 * GB, 1153.5e12, 3690e9, 2.2e9),
    "v5e-16": Chip("v5e:4x4", 16 * GB, 197e12, 819e9, 1.5e9),
    "v5p-16": Chip("v5p:2x2x2", 95 * GB, 459e12, 2765e9, 1.75e9),  # eight chips, of two cores each
}


def batch(tokens: int, causal: bool) -> Any:
    """A row full of documents of 190 tokens, with a shared prefix of 90 where the model allows one."""
    prefix = np.zeros(90 if causal else 0, np.int32)
    count = max(1, (tokens - len(prefix)) // 190)
    length = min(190, tokens - len(prefix))
    pairs = [Encoded(np.zeros(length, np.int32), length - 1, prefix=prefix) for _ in range(count)]
    return pack(pairs, tokens, causal=causal, implementation="tpu")


def patch_batch(patches: int, config: Any) -> Any:
    """A row full of images of 32 x 32 patches."""
    image = Patches(np.zeros((1024, config.values), np.float32), (1, 32, 32))
    return pack_patches(
        [image] * (patches // 1024), patches, values=config.values, merge=config.merge, side=config.side,
        implementation="tpu",
    )  # fmt: skip


def compile_one(
    name: str,
    chip_name: str,
    size: int,
    chips_each: int,
    *,
    copies: int = 1,
    tower: bool = False,
    quantization: str | None = None,
    breakdown: bool = False,
) -> dict[str, Any]:
    """One row of the table; `error` instead of figures where it does not compile, which may be for lack of memory.

    size: tokens, or with `tower` patches. breakdown: print the layer's instructions.
    """
    module: Any
    module, config = (MODELS | VL_MODELS)[name]
    chip = CHIPS[chip_name]
    devices = topologies.get_topology_desc(
        platform="tpu", topology_name=chip.topology, chips_per_host_bounds=chip.host
    ).devices
    mesh = make_mesh(devices[: copies * chips_each], chips_each)
    model = nnx.eval_shape(lambda: module(config, dtype="bfloat16", rngs=None, implementation="tpu"))
    if quantization:
        model = quantized_outline(model)
    vision = take_tower(model)
    score, state = whole_tower(vision, mesh) if tower else whole(model, mesh)
    one = patch_batch(size, config.vision) if tower else batch(size, module.causal)

    def outlined(tree: Any, places: Any) -> Any:
        """Shapes on the mesh; places has one PartitionSpec for each parameter, or one for all."""

        def lie(place: PartitionSpec, part: Any) -> Any:
            sharding = NamedSharding(mesh, place)
            return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), part)

        return jax.tree.map(lie, places, tree)

    rows = jax.tree.map(lambda leaf: np.stack([np.asarray(leaf)] * copies), one)
    unit = "patches" if tower else "tokens"
    row: dict[str, Any] = {"model": name, "chip": chip_name, "chips_each": chips_each, unit: size}
    if copies > 1:
        row["copies"] = copies
    if (hosts := len({device.process_index for device in mesh.devices.flat})) > 1:
        row["hosts"] = hosts
    if quantization:
        row["quantization"] = quantization
    start = time.perf_counter()
    try:
        arguments = outlined(state, specs(state, mesh)), outlined(rows, PartitionSpec(DATA))
        compiled = score.lower(*arguments).compile()
    except Exception as error:  # the compiler's own, whatever they are: the table tells them
        said = str(error).strip()
        return row | {"fits": False, "out_of_memory": "RESOURCE_EXHAUSTED" in said, "error": said.splitlines()[0][:300]}
    seconds = time.perf_counter() - start
    memory, text = compiled.memory_analysis(), compiled.as_text()
    if tower:
        flops = tower_flops(config.vision, [1024] * (size // 1024)) / chips_each
    else:
        flops = model_flops(config, [190] * (size // 190), module.causal) / chips_each
    instructions = layer(text, chip.clock, chip.bandwidth)
    if breakdown:
        print("us, of them products at the peak (b: by bytes), instruction")
        print("\n".join(instruction.report(chip.flops) for instruction in instructions), flush=True)
    need = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    roofline = max(flops / chip.flops, memory.argument_size_in_bytes / chip.bandwidth)
    row |= {
        "fits": need < chip.memory * 0.95,
        "compile_s": round(seconds, 1),
        "all_reduces": len(re.findall(r" all-reduce(?:-start)?\(", text)),
        "pallas_calls": text.count('custom_call_target="tpu_custom_call"'),
        "arguments_gb": round(memory.argument_size_in_bytes / GB, 3),
        "temporaries_gb": round(memory.temp_size_in_bytes / GB, 3),
        "code_mb": round(memory.generated_code_size_in_bytes / 1e6, 1),
        "tflops": round(flops / 1e12, 2),
        "roofline_ms": round(roofline * 1e3, 2),
        f"roofline_{unit}_per_s": round(size / roofline),
    }
    if instructions and not tower:
        row |= layer_columns(instructions, layer_flops(config, module.causal) * size / chips_each / chip.flops)
    return row


def layer_columns(instructions: Sequence[Instruction], products: float) -> dict[str, float]:
    """Milliseconds of a layer, all counted and Pallas calls alone, and those of its products at the peak."""
    estimate = sum(each.seconds for each in instructions)
    return {
        "layer_ms": round(estimate * 1e3, 3),
        "layer_pallas_ms": round(sum(each.seconds for each in instructions if each.by_bytes) * 1e3, 3),
        "layer_products_ms": round(products * 1e3, 3),
        "layer_over_its_roofline": round(products / estimate, 3),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=[*MODELS, *VL_MODELS], default=[*MODELS, *VL_MODELS])
    parser.add_argument("--chips", nargs="+", choices=list(CHIPS), default=["v5e", "v6e", "v6e-8", "v5p"])
    parser.add_argument("--buckets", nargs="+", type=int, default=[int(t) for t in LADDER if t <= 16384])
    parser.add_argument("--patches", nargs="*", type=int, default=[], help="rows of the vision towers")
    parser.add_argument("--quantization", choices=QUANTIZATIONS, help="of the weights")
    parser.add_argument("--chips-each", type=int, help="chips that share a copy of the weights; by default the fewest")
    parser.add_argument("--copies", type=int, default=1, help="of the weights")
    parser.add_argument("--breakdown", action="store_true", help="print each layer's instructions, the longest first")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args(argv)
    rows = []
    for model in arguments.models:
        for chip in arguments.chips:
            programs = [(tokens, False) for tokens in sorted(arguments.buckets, reverse=True)]
            if model in VL_MODELS:
                programs += [(patches, True) for patches in sorted(arguments.patches, reverse=True)]
            chips_each = arguments.chips_each or 1
            for size, tower in programs:
                while True:
                    how: Any = dict(
                        copies=arguments.copies, quantization=arguments.quantization, breakdown=arguments.breakdown
                    )
                    row = compile_one(model, chip, size, chips_each, tower=tower, **how)
                    rows.append(row)
                    print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
                    save({"benchmark": "compile_tpu", "rows": rows}, arguments.output)
                    if row["fits"] or arguments.chips_each or not row.get("out_of_memory", True) or chips_each == 4:
                        break
                    chips_each *= 2  # the longest bucket comes first and decides for the others
    finish({"benchmark": "compile_tpu", "rows": rows}, arguments.output)
    if errors := sum(not row.get("out_of_memory", True) for row in rows):
        raise SystemExit(f"{errors} of {len(rows)} programs did not compile: see the line above")


if __name__ == "__main__":
    main()
