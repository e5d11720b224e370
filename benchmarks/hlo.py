"""What a compiled program does, read from the texts that XLA leaves: its optimised HLO and its sequence of thunks.

A thunk is what the host does to run an instruction: a launch, a copy, a loop. The texts are those of the XLA of jax
0.10.2 and 0.11.2.

Bytes are operands plus results of the instructions that run, caches not thought of:
- an operand that a kernel reads only through slices or gathers counts as what they give;
- a result that is written into an operand (dynamic-update-slice) counts as the update, and that operand not at all;
- a library's workspace (s8) does not count, nor do tuples, bitcasts and constants.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

BITS = {"pred": 8, "token": 0, "bf16": 16, "c64": 64, "c128": 128}
WORKSPACE = r"\bs8\[\d+\]"
"""Of a library's call. int8 weights have two axes at least."""
FREE = frozenset(("parameter", "get-tuple-element", "tuple", "bitcast", "constant", "after-all", "partition-id",
                  "replica-id", "opt-barrier", "async-done", "async-update", "copy-done"))  # fmt: skip
"""Instructions that no thunk of work stands for."""
PARTS = frozenset(("dynamic-slice", "slice", "gather"))
HOLDERS = frozenset(("kAsyncStart", "kAsyncDone", "kDynamicSliceFusion", "kCommandBuffer", "kSequential", "kWhile",
                     "kConditional"))  # fmt: skip
COPIES = frozenset(("kCopy", "kMemzero", "kMemset32BitValue", "kDeviceToDeviceCopy"))


class Instruction(NamedTuple):
    """One line of HLO. shape: of the result, as written. operands: names, with #i for a tuple's element."""

    name: str
    opcode: str
    shape: str
    operands: tuple[str, ...]
    rest: str
    is_root: bool

    @property
    def calls(self) -> str | None:
        """The computation that a fusion, call or async-start runs."""
        found = re.search(r"(?:calls|to_apply)=%?([\w.\-]+)", self.rest)
        return found[1] if found else None

    @property
    def op_name(self) -> str:
        """The path of JAX's operation."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""

    @property
    def trips(self) -> int | None:
        """A while's trip count; None where it is not known before the program runs."""
        found = re.search(r'"known_trip_count":\{"n":"(\d+)"', self.rest)
        return int(found[1]) if found else None


class Step(NamedTuple):
    """Work of a layer. kind: product, attention, copy or elementwise (all else, norms included); bytes read and
    written; what it computes."""

    name: str
    kind: str
    read: int
    written: int
    shapes: str
    what: str

    @property
    def bytes(self) -> int:
        return self.read + self.written


def split_top(text: str) -> list[str]:
    """At commas outside all brackets."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "([{") - (c in ")]}")
        if c == "," and not depth:
            parts.append(text[start:i].strip())
            start = i + 1
    return [*parts, text[start:].strip()]


def closing(text: str, start: int) -> int:
    """Where the parenthesis at `start` ends."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if not depth:
            return i
    raise ValueError(f"a parenthesis is not closed: {text[start : start + 80]}")


def size_of(shape: str) -> int:
    """Bytes of an array or, summed, of a tuple, without workspaces."""
    total = 0
    for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", re.sub(WORKSPACE, "", shape)):
        bits = BITS.get(dtype) or int(re.sub(r"\D.*", "", dtype[1:]) or 0)
        total += math.prod(map(int, filter(None, dims.split(",")))) * bits // 8
    return total


def parse_line(line: str) -> Instruction | None:
    found = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if not found:
        return None
    text = re.sub(r"/\*index=\d+\*/", "", line[found.end() :])
    shape = text[: closing(text, 0) + 1] if text[0] == "(" else text.split(" ", 1)[0]
    text = text[len(shape) :].lstrip()
    opcode = text[: text.index("(")]
    end = closing(text, len(opcode))
    inside = text[len(opcode) + 1 : end]
    # a parameter's or constant's parentheses hold a number
    operands = () if opcode in ("parameter", "constant") else tuple(re.findall(r"%([\w.\-]+(?:#\d+)?)", inside))
    rest = text[end + 1 :] if opcode != "parameter" else f"index={inside}"
    return Instruction(found[2], opcode, shape, operands, rest, bool(found[1]))


class Program:
    """An optimised HLO module."""

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        current: list[Instruction] = []
        for line in text.splitlines():
            head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
            if head:
                current = self.computations.setdefault(head[2], [])
                self.entry = head[2] if head[1] else self.entry
            elif made := parse_line(line):
                current.append(made)
        self._named = {name: {one.name: one for one in some} for name, some in self.computations.items()}

    def shape(self, computation: str, operand: str) -> str:
        name, _, element = operand.partition("#")
        shape = self._named[computation][name].shape
        return split_top(shape[1:-1])[int(element)] if element else shape

    def root(self, computation: str) -> Instruction:
        return next(one for one in self.computations[computation] if one.is_root)

    @cached_property
    def loop(self) -> Instruction | None:
        """The loop over the layers: the longest of known length in the entry; None where layers are unrolled."""
        loops = [one for one in self.computations[self.entry] if one.opcode == "while" and (one.trips or 0) > 1]
        return max(loops, key=lambda one: one.trips or 0, default=None)

    @property
    def body(self) -> str:
        """The computation of one layer, or of all."""
        return attribute(self.loop, "body") if self.loop else self.entry

    def whiles(self, computation: str) -> Iterator[Instruction]:
        """Loops that the computation runs, inner ones too."""
        for one in self.computations[computation]:
            if one.opcode == "while":
                yield one
            for name in inner(one):
                yield from self.whiles(name)

    def count(self, computation: str, opcode: str) -> int:
        """How often a computation, with those that it runs, holds such an instruction."""
        return sum(
            (one.opcode == opcode) + sum(self.count(name, opcode) for name in inner(one))
            for one in self.computations[computation]
        )

    def read(self, computation: str, parameter: str) -> int:
        """Bytes that a fused computation reads of one of its parameters."""
        whole, total = size_of(self.shape(computation, parameter)), 0
        for one in self.computations[computation]:
            if parameter not in one.operands:
                continue
            if one.opcode == "bitcast":
                total += self.read(computation, one.name)
            elif one.opcode in PARTS and one.operands[0] == parameter:
                total += size_of(one.shape)
            elif one.opcode == "dynamic-update-slice" and one.operands[0] == parameter:
                continue
            elif one.opcode == "fusion" and one.calls:
                total += sum(self.read(one.calls, p.name) for p in self._parameters(one.calls, one, parameter))
            else:
                return whole
        return min(total, whole)

    def _parameters(self, called: str, by: Instruction, operand: str) -> list[Instruction]:
        """Those of the called computation that take this operand."""
        places = {i for i, name in enumerate(by.operands) if name == operand}
        return [
            one
            for one in self.computations[called]
            if one.opcode == "parameter" and int(one.rest.removeprefix("index=")) in places
        ]

    def written(self, computation: str, result: str) -> int:
        """Bytes that a fused computation writes as this result of its."""
        one = self._named[computation][result.partition("#")[0]]
        if one.opcode == "tuple":
            return sum(self.written(computation, operand) for operand in one.operands)
        if one.opcode == "bitcast" and one.operands:
            return self.written(computation, one.operands[0])
        if one.opcode == "dynamic-update-slice":
            return size_of(self.shape(computation, one.operands[1]))
        return size_of(self.shape(computation, result))

    def steps(self, computation: str, *, nested: bool = False) -> Iterator[Step]:
        """What runs in a computation, in order; what a loop inside it runs, once, as attention (no other loops are)."""
        for one in self.computations[computation]:
            if one.opcode in FREE:
                continue
            if one.opcode in ("while", "conditional", "call"):
                for name in inner(one, bodies_alone=True):
                    yield from self.steps(name, nested=nested or one.opcode != "call")
            else:
                yield self._step(computation, one, nested)

    def _step(self, computation: str, one: Instruction, nested: bool) -> Step:
        if one.opcode == "async-start" and one.calls:
            inside = self.root(one.calls)
            # an async computation passes its parameters on as they are
            return self._step(one.calls, inside, nested)._replace(name=one.name)
        names = list(dict.fromkeys(one.operands))
        if one.opcode == "fusion" and one.calls:
            called = one.calls
            read = sum(sum(self.read(called, p.name) for p in self._parameters(called, one, name)) for name in names)
            written = self.written(called, self.root(called).name)
            codes = [some.opcode for some in self.computations[called]]
            labels = {some.op_name for some in self.computations[called]} | {one.op_name}
        else:
            shapes = [self.shape(computation, name) for name in names]
            read, written = sum(map(size_of, shapes)), size_of(one.shape)
            if one.opcode in PARTS:
                read = written
            elif one.opcode == "dynamic-update-slice":
                read = written = size_of(shapes[1])
            codes, labels = [one.opcode], {one.op_name}
        kind = "attention" if nested else self._kind(one, codes, labels)
        operands = " ".join(compact(self.shape(computation, name)) for name in names)
        return Step(one.name, kind, read, written, f"{operands} -> {compact(one.shape)}", describe(codes, labels))

    def _kind(self, one: Instruction, codes: Sequence[str], labels: set[str]) -> str:
        if one.opcode == "custom-call" and any("attention" in label for label in labels):
            return "attention"
        if "dot" in codes or 'custom_call_target="__cublas' in one.rest or any("custom-call" in c for c in codes):
            return "product"
        if one.opcode in ("copy", "copy-start") or set(codes) <= FREE | PARTS | {"dynamic-update-slice", "copy"}:
            return "copy"
        return "elementwise"


def attribute(one: Instruction, name: str) -> str:
    found = re.search(rf"{name}=%?([\w.\-]+)", one.rest)
    assert found, f"{one.name} has no {name}"
    return found[1]


def inner(one: Instruction, *, bodies_alone: bool = False) -> list[str]:
    """Computations that an instruction runs as sequences of their own: of loops, branches and calls."""
    if one.opcode == "while":
        return [attribute(one, "body"), *([] if bodies_alone else [attribute(one, "condition")])]
    if one.opcode == "call":
        return [attribute(one, "to_apply")]
    if one.opcode == "conditional":
        branches = re.search(r"branch_computations=\{([^}]*)\}", one.rest)
        names = branches[1] if branches else " ".join(re.findall(r"(?:true|false)_computation=(%[\w.\-]+)", one.rest))
        return re.findall(r"%([\w.\-]+)", names)
    return []


def compact(shape: str) -> str:
    return re.sub(r"\{[^}]*\}", "", shape)


def describe(codes: Sequence[str], labels: set[str]) -> str:
    """A fused kernel in a few words: its operations that are no mere moves, and JAX's names for them."""
    plain = FREE | {"broadcast", "parameter", "fusion", "copy", "reshape", "transpose"}
    ops = [code for code in dict.fromkeys(codes) if code not in plain]
    last = [label.rpartition("/")[2] for label in sorted(labels) if label]
    specs = [label.split("/")[-2] for label in sorted(labels) if label.endswith("dot_general") and "->" in label]
    return " ".join([*dict.fromkeys(specs), *(ops or dict.fromkeys(last))])


class Thunk(NamedTuple):
    """A line of the sequence of thunks. in_graph: whether a command buffer holds it, a CUDA graph."""

    indent: int
    number: int
    kind: str
    in_graph: bool


def thunks(sequence: str, loop: int | None) -> list[Thunk]:
    """Those in the body of the loop of that number, or all: kernels and copies, of inner loops once."""
    found: list[Thunk] = []
    graph: int | None = None
    start, body, in_body = -1, -1, loop is None
    for line in sequence.splitlines():
        indent = len(line) - len(line.lstrip())
        if line.strip() == "body:" and body == indent:
            in_body = True
        matched = re.match(r"\s*(\d+): (k\w+)", line)
        if not matched:
            continue
        number, kind = int(matched[1]), matched[2]
        graph = None if graph is not None and indent <= graph else graph
        if loop is not None and in_body and indent <= start:
            break
        if in_body and kind not in HOLDERS:
            found.append(Thunk(indent, number, kind, graph is not None))
        if kind == "kCommandBuffer":
            graph = indent
        if kind == "kWhile" and number == loop:
            start, body = indent, indent + 2
    return found
