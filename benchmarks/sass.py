"""What ptxas and nvdisasm say of a kernel: registers, spills, tensor core instructions, the loop that holds them."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

TENSOR_CORES = ("HGMMA", "HMMA", "UTCHMMA")
"""Products of half floats: of a warpgroup (Hopper), a warp, a block (Blackwell). TF32 goes by the same names."""


class Tools(NamedTuple):
    ptxas: Path
    nvdisasm: Path | None

    @property
    def cuda(self) -> Path:
        """The folder of CUDA that XLA is to use."""
        return self.ptxas.parent.parent


def find_tools(cuda: Path | None) -> Tools:
    """In the folder given; else in NVIDIA's packages for Python, on PATH, under CUDA_HOME, or where CUDA's installer
    puts it. nvdisasm is a package of its own (nvidia-cuda-nvdisasm) and may lack."""
    folders = [cuda] if cuda else []
    nvidia = importlib.util.find_spec("nvidia")
    for place in (nvidia and nvidia.submodule_search_locations) or ():
        folders += sorted(path.parent for path in Path(place).glob("*/bin"))

    def find(tool: str) -> Path | None:
        inside = (folder / "bin" / tool for folder in folders)
        on_path = shutil.which(tool)
        homes = filter(None, (os.environ.get("CUDA_HOME"), "/usr/local/cuda"))
        home = (Path(folder) / "bin" / tool for folder in homes)
        return next((path for path in [*inside, *([Path(on_path)] if on_path else []), *home] if path.is_file()), None)

    ptxas = find("ptxas")
    if ptxas is None:
        raise SystemExit("no ptxas: install nvidia-cuda-nvcc (of CUDA 12: nvidia-cuda-nvcc-cu12) or pass --cuda FOLDER")
    return Tools(ptxas, find("nvdisasm"))


def assemble(ptx: Path, arch: str, tools: Tools) -> tuple[list[dict[str, Any]], int]:
    """What is said of each kernel in the file, and the size of their code. loop: the instructions of the loop with the
    most tensor core instructions, 0 without such a loop, None without nvdisasm."""
    cubin = ptx.with_suffix(".cubin")
    run = [tools.ptxas, "-v", f"-arch={arch}", ptx, "-o", cubin]
    said = subprocess.run(run, capture_output=True, text=True, check=True).stderr
    parts = re.split(r"\.entry (\w+)", ptx.read_text())
    bodies = dict(zip(parts[1::2], parts[2::2], strict=True))
    loops: dict[str, int] = {}
    if tools.nvdisasm:
        listing = subprocess.run([tools.nvdisasm, "-c", cubin], capture_output=True, text=True, check=True).stdout
        loops = {name: inner_loop(code) for name, code in sections(listing)}
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
                "tcgen05": bodies[name].count("tcgen05.mma"),
                "async_copies": bodies[name].count("cp.async.cg"),
                "serialized": bool(re.search(rf"wgmma.*serialized.*'{name}'", said)),
                "loop": loops.get(name),
            }
        )
    return kernels, cubin.stat().st_size


def sections(listing: str) -> Iterator[tuple[str, list[str]]]:
    """The name and the lines of each kernel's code in nvdisasm's listing."""
    parts = re.split(r"^\.text\.(\w+):$", listing, flags=re.M)
    for name, code in zip(parts[1::2], parts[2::2], strict=True):
        yield name, code.splitlines()


def inner_loop(lines: Sequence[str]) -> int:
    """Instructions of the loop with the most tensor core instructions, the shortest such. A loop is what lies between a
    label and a later branch back to it."""
    labels: dict[str, int] = {}
    code: list[str] = []
    loops: list[tuple[int, int]] = []
    for line in lines:
        if label := re.match(r"(\.L\w*):", line.strip()):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            code.append(instruction[1])
            target = re.search(r"\bBRA\b.*?`\((\.L\w*)\)", instruction[1])
            if target and target[1] in labels:
                loops.append((labels[target[1]], len(code)))

    def products(loop: tuple[int, int]) -> int:
        return sum(any(name in one.split("@")[-1] for name in TENSOR_CORES) for one in code[slice(*loop)])

    held = [loop for loop in loops if products(loop)]
    best = max(held, key=lambda loop: (products(loop), loop[0] - loop[1]), default=(0, 0))
    return best[1] - best[0]
