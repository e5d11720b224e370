"""What the parts' rows say together: the body to choose, the marks, and a table. Needs nothing but Python."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

Row = dict[str, Any]
V2_M3, SMALL, LARGE = "bge-reranker-v2-m3", "qwen3-reranker-0.6b", "qwen3-reranker-8b"
PARTS_OF = {V2_M3: "v2-m3", SMALL: "0.6b", LARGE: "8b"}


def rows_of(parts: dict[str, Any], name: str) -> list[Row]:
    return parts.get(name, {}).get("rows", [])


def by_speed(rows: Iterable[Row]) -> dict[str, float]:
    """Seconds of a model's bodies, device only, all lengths together; the fastest first. A body of which any length is
    missing is left out."""
    seconds: dict[str, list[float]] = {}
    for row in rows:
        if row["what"] == "device only":
            seconds.setdefault(row["body"], []).append(row.get("seconds", math.inf))
    full = max(map(len, seconds.values()), default=0)
    sums = {body: sum(ones) for body, ones in seconds.items() if len(ones) == full and sum(ones) < math.inf}
    return dict(sorted(sums.items(), key=lambda item: item[1]))


def bodies(parts: dict[str, Any]) -> dict[str, Row]:
    """By body: whether it is right (all its rows are ok, and as many as the dense body's), and its worst errors."""
    rows: dict[str, list[Row]] = {}
    for row in rows_of(parts, "correctness"):
        rows.setdefault(row["body"], []).append(row)
    expected = len(rows.get("dense", []))
    found = {}
    for body, ones in rows.items():
        found[body] = {
            "right": bool(expected) and len(ones) == expected and all(row["ok"] for row in ones),
            "runs": len(ones) == expected and any("error" not in row for row in ones),
            "checks": len(ones),
            "not_ok": [
                {key: row[key] for key in ("dtype", "heads", "case", "model", "error") if key in row}
                for row in ones
                if not row["ok"]
            ],
        }
        for dtype in ("bfloat16", "float32"):
            worst = [row["relative_norm"] for row in ones if row["dtype"] == dtype and "relative_norm" in row]
            found[body][f"relative_norm_{dtype}"] = max(worst, default=None)
    return found


def gemm_rate(parts: dict[str, Any], shapes: dict[tuple[int, int], str], model: str) -> float | None:
    """FLOP/s of bfloat16 products at a model's shapes, as if it had as many FLOPs of each: the harmonic mean."""
    rates = {
        (row["k"], row["n"]): row["tflops_per_s"] * 1e12
        for row in rows_of(parts, "facts")
        if row["what"] == "gemm" and row["kind"] == "bf16->bf16" and row.get("tflops_per_s")
    }
    mine = [shape for shape, models in shapes.items() if model in models]
    if not all(shape in rates for shape in mine):
        return None
    return len(mine) / sum(1 / rates[shape] for shape in mine)


def use_of_rate(parts: dict[str, Any], shapes: dict[tuple[int, int], str]) -> None:
    """Adds to every row of whole models its FLOP/s over the card's rate at the model's shapes."""
    for model, part in PARTS_OF.items():
        rate = gemm_rate(parts, shapes, model)
        for row in rows_of(parts, part):
            if rate and "flops" in row and "seconds" in row:
                row["use_of_gemm_rate"] = round(row["flops"] / row["seconds"] / rate, 3)


def choose(parts: dict[str, Any], model: str) -> Row:
    """The fastest of the right bodies, and how many times as long the next takes."""
    right = {body for body, found in bodies(parts).items() if found["right"]}
    speeds = [(body, seconds) for body, seconds in by_speed(rows_of(parts, PARTS_OF[model])).items() if body in right]
    if not speeds:
        return {"body": None, "why": "no body was both found right and timed"}
    chosen: Row = {"body": speeds[0][0], "seconds": round(speeds[0][1], 4)}
    if len(speeds) > 1:
        chosen |= {"next": speeds[1][0], "next_takes": round(speeds[1][1] / speeds[0][1], 3)}
    return chosen


def best(rows: Iterable[Row], **labels: Any) -> Row | None:
    """The fastest of the rows with these labels."""
    fitting = [row for row in rows if "seconds" in row and all(row.get(key) == value for key, value in labels.items())]
    return min(fitting, key=lambda row: row["seconds"], default=None)


def marks(parts: dict[str, Any]) -> list[Row]:
    """What the project asks of an NVIDIA card; reached is None where a figure is missing."""
    found: list[Row] = []

    def mark(what: str, least: float, value: float | None) -> None:
        found.append(
            {"mark": what, "least": least, "value": value, "reached": None if value is None else value >= least}
        )

    right = {body for body, one in bodies(parts).items() if one["right"]}

    def ours(model: str, what: str, lengths: str) -> Row | None:
        rows = [row for row in rows_of(parts, PARTS_OF[model]) if row.get("body") in right]
        return best(rows, what=what, lengths=lengths)

    for model, least in ((V2_M3, 0.55), (LARGE, 0.6)):
        row = ours(model, "device only", "uniform")
        mark(f"{model}, 512 tokens: share of the GEMM rate", least, (row or {}).get("use_of_gemm_rate"))
    for model in (V2_M3, SMALL):
        for what, least, part, way in (
            ("SDPA, padded", 2.0, "torch", "padded"),
            ("torch.compile", 1.2, "torch-compile", "padded"),
        ):
            row = ours(model, "end to end", "mixed")
            other = best(rows_of(parts, part), what="end to end", lengths="mixed", model=model, way=way)
            ratio = round(other["seconds"] / row["seconds"], 2) if row and other else None
            mark(f"{model}, mixed lengths: times as fast as {what}", least, ratio)
    return found


def summarise(parts: dict[str, Any], shapes: dict[tuple[int, int], str]) -> Row:
    use_of_rate(parts, shapes)
    return {
        "benchmark": "gpu",
        "default": {model: choose(parts, model) for model in (V2_M3, SMALL)},
        "marks": marks(parts),
        "bodies": bodies(parts),
        "parts": parts,
    }


def table(summary: Row) -> str:
    """Some lines for a terminal."""
    parts = summary["parts"]
    lines = ["", "part            outcome     seconds"]
    lines += [f"{name:15} {part['outcome']:11} {part['seconds']:7.1f}" for name, part in parts.items()]
    lines += ["", f"{'body':18} right  bf16 error  float32 error"]
    for body, found in summary["bodies"].items():
        errors = [found[f"relative_norm_{dtype}"] for dtype in ("bfloat16", "float32")]
        lines.append(f"{body:18} {found['right']!s:6} " + "  ".join("-" if e is None else f"{e:.2e}" for e in errors))
    lines += ["", f"{'model':20} {'lengths':8} {'by':22} {'what':12} {'pairs/s':>10} {'tokens/s':>11} {'of GEMM':>8}"]
    for name in ("v2-m3", "0.6b", "8b", "torch", "torch-compile"):
        for row in rows_of(parts, name):
            if "pairs_per_s" in row:
                by = row.get("body") or f"{name} {row['way']}"
                lines.append(
                    f"{row['model']:20} {row['lengths']:8} {by:22} {row['what']:12} {row['pairs_per_s']:10} "
                    f"{row['tokens_per_s']:11} {row.get('use_of_gemm_rate', '-'):>8}"
                )
    lines += ["", *(f"{one['mark']}: {one['value']} (at least {one['least']})" for one in summary["marks"])]
    lines += [f"default for {model}: {chosen}" for model, chosen in summary["default"].items()]
    return "\n".join(lines)
