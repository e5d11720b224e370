"""What TPU's compiler expects a layer to take, by instruction, read from a compiled program's text.

The layer is the loop body with an attention call in it, the longest if there are several. Counted are, one after
another: an instruction's estimated cycles over the chip's clock (fusions and copies have them), and the bytes of a
Pallas call's result and operands over the chip's bandwidth, wherever they lie, of an operand as many elements as the
result has at most. Not counted: attention, whose work depends on the
documents; copies that run beside other work (copy-start); what chips tell each other. The cycles are a model's, not
the schedule's: for copies within on-chip memory they are too few, and v6e's instruction for erf is unknown to them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

ATTENTION = "packed_attention"
PALLAS = 'custom_call_target="tpu_custom_call"'
NAMED = {"convolution", "erf", "exponential", "logistic", "tanh", "reduce", "transpose", "dynamic-slice"}
"""Operations inside a fusion that the breakdown names."""

_HEAD = re.compile(r"(?:ENTRY )?%(\S+) \(.*\{$")
_LINE = re.compile(r"\s+(?:ROOT )?%(\S+) = (\(.*?\)|\S+) ([\w-]+)\((.*)")
_SHAPE = re.compile(r"(pred|bf16|[fsu]\d+)\[([\d,]*)\]")
_TILING = re.compile(r"T\([\d,]*\)(?:\(\d,1\))?")


class Line(NamedTuple):
    """A line of a computation in the text: what it makes, by what operation, and the rest of the line."""

    name: str
    shape: str
    operation: str
    rest: str

    def operands(self) -> list[str]:
        return re.findall(r"%([\w.-]+)", self.rest.partition(")")[0])

    def told(self, pattern: str) -> str:
        """What the pattern's group matches in the rest of the line; empty if nothing."""
        found = re.search(pattern, self.rest)
        return found[1] if found else ""


class Instruction(NamedTuple):
    """One instruction of a layer. seconds: by the compiler's cycles, or by `bytes` where it is a Pallas call."""

    name: str
    seconds: float
    by_bytes: bool
    flops: float
    result: str
    operands: tuple[str, ...]
    made_of: str

    def report(self, peak: float) -> str:
        """A line: microseconds, those of its products at the peak, and what it makes of what; V: in on-chip memory."""
        shapes = f"{_short(self.result)} <- {'; '.join(map(_short, self.operands))}"
        times = f"{self.seconds * 1e6:8.1f}{'b' if self.by_bytes else ' '} {self.flops / peak * 1e6:8.1f}"
        return f"{times} {self.name:36} {shapes[:200]} | {self.made_of}"


def layer(text: str, clock: float, bandwidth: float) -> list[Instruction]:
    """The layer's instructions that take time, the longest first; none where the program has no loop with attention.

    clock in Hz, bandwidth in bytes a second.
    """
    computations = _computations(text)
    bodies = [computations[name] for name in re.findall(r" while\(.*?body=%([\w.-]+)", text)]
    layers = [
        _instructions(body, computations, clock, bandwidth)
        for body in bodies
        if any(line.name.startswith(ATTENTION) for line in body)
    ]
    longest = max(layers, key=lambda each: sum(instruction.seconds for instruction in each), default=[])
    return sorted(longest, key=lambda instruction: -instruction.seconds)


def _computations(text: str) -> dict[str, list[Line]]:
    """Every computation's lines by its name."""
    found: dict[str, list[Line]] = {}
    lines: list[Line] = []
    for each in text.splitlines():
        if head := _HEAD.match(each):
            lines = found[head[1]] = []
        elif line := _LINE.match(each):
            lines.append(Line(*line.groups()))
    return found


def _instructions(
    body: list[Line], computations: dict[str, list[Line]], clock: float, bandwidth: float
) -> list[Instruction]:
    shapes = {line.name: line.shape for line in body}
    instructions = []
    for line in body:
        operands = tuple(shapes.get(name, "") for name in line.operands())
        by_bytes = PALLAS in line.rest
        if by_bytes:
            most = _elements(line.shape)  # it may read some columns of an array
            counted = sum(min(_elements(shape), most) * _width(shape) for shape in (line.shape, *operands))
            counted = 0 if line.name.startswith(ATTENTION) else counted
            seconds = counted / bandwidth
        else:
            seconds = int(line.told(r'"estimated_cycles":"(\d+)"') or 0) / clock
        if not seconds:
            continue
        inside = list(_inside(line, computations))
        operations = sorted({operation for operation, _ in inside} & NAMED)
        made_of = " ".join([*operations, line.told(r'op_name="([^"]*)"')[-60:]])
        flops = sum(flops for _, flops in inside)
        instructions.append(Instruction(line.name, seconds, by_bytes, flops, line.shape, operands, made_of))
    return instructions


def _inside(line: Line, computations: dict[str, list[Line]]) -> Iterator[tuple[str, float]]:
    """(operation, FLOPs of its product) for each line of the computations that a fusion calls, however deep."""
    lines = computations.get(line.told(r"calls=%([\w.-]+)"), [])
    shapes = {each.name: each.shape for each in lines}
    for each in lines:
        flops = 0.0
        if each.operation == "convolution":  # [M, K] by [K, N] to [M, N], however the axes are written: 2 M K N
            sizes = math.prod(_elements(shape) for shape in (each.shape, *(shapes[name] for name in each.operands())))
            flops = 2.0 * math.sqrt(sizes)
        yield each.operation, flops
        yield from _inside(each, computations)


def _elements(shape: str) -> int:
    found = _SHAPE.search(shape)
    return math.prod(int(n) for n in found[2].split(",") if n) if found else 0


def _width(shape: str) -> int:
    """Bytes of an element."""
    found = _SHAPE.search(shape)
    return 0 if not found else 1 if found[1] == "pred" else int(found[1].lstrip("bfsu")) // 8


def _short(shape: str) -> str:
    """A shape without its tiling."""
    return _TILING.sub("", shape).replace("S(1)", "V").replace(":}", "}").replace(":V", " V")
