"""`jaxrank rerank` on files: its speed beside scoring in memory, interruptions, memory with a corpus of gigabytes.

    python benchmarks/rerank_files.py --xquad DIR [--pairs 20000] [--corpus-gb 2]
                                      [--output benchmarks/results/rerank-files-cpu.json]

The corpus is XQuAD's paragraphs in all languages, the run English questions with 100 random paragraphs each, the model
the built-in one.

1. Speed: the library's rerank() of the whole run beside Reranker.predict() of the same pairs in pieces of 2,000, both
   with tokenising and taking turns.
2. Interruptions: the command is killed (SIGKILL) five times at random, each time begun again, and must end with the
   bytes that it writes when nobody disturbs it.
3. Memory: the same command over a corpus of many copies of the paragraphs under other ids, of which the run takes its
   candidates; the peak of resident memory (VmHWM, Linux) beside that with the small corpus.
4. Measures: English XQuAD as a BEIR folder, BM25's best 100 of its 240 paragraphs, as they are and ranked anew.

Ends in one JSON line, and with status 1 if something does not hold.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from builtin_examples import read_xquad
from machine import finish, peak
from prompted import all_paragraphs

from jaxrank import Reranker
from jaxrank.offline.rerank import as_trec, rerank
from jaxrank.offline.rows import BadRows
from jaxrank.offline.sources import RunSource

PARTS = ("measures", "speed", "interruptions", "memory")
DEPTH, PIECE, KILLS = 100, 2000, 5
AIM_SPEED, AIM_MEMORY = 0.95, 1.1

COMMAND = [sys.executable, "-m", "jaxrank", "rerank", "--no-progress"]


def documents(texts: Sequence[str], most_bytes: float) -> Iterator[tuple[str, str]]:
    """(id, text) of every text once, then of copies until they come to that many bytes as JSON."""
    size, number = 0, 0
    while number < len(texts) or size < most_bytes:
        text = texts[number % len(texts)]
        size += len(text.encode()) + 30
        yield f"d{number}", text
        number += 1


def write_collection(folder: Path, xquad: Path, pairs: int, most_bytes: float = 0.0) -> list[str]:
    """corpus.jsonl, queries.jsonl and a run; returns the flags that name them."""
    texts = all_paragraphs(xquad)
    count = 0
    with (folder / "corpus.jsonl").open("w") as file:
        for identity, text in documents(texts, most_bytes):
            file.write(json.dumps({"_id": identity, "text": text}, ensure_ascii=False) + "\n")
            count += 1
    questions = [q["question"] for paragraph in read_xquad(xquad / "en.json") for q in paragraph["qas"]]
    draw = random.Random(0)
    with (folder / "queries.jsonl").open("w") as queries, (folder / "first.run").open("w") as run:
        for number, question in enumerate(questions[: pairs // DEPTH]):
            queries.write(json.dumps({"_id": f"q{number}", "text": question}) + "\n")
            for rank, document in enumerate(draw.sample(range(count), DEPTH), 1):
                run.write(f"q{number} Q0 d{document} {rank} {1 / rank:.6f} random\n")
    return [f"--{name}={folder / file}" for name, file in
            (("corpus", "corpus.jsonl"), ("queries", "queries.jsonl"), ("run", "first.run"))]  # fmt: skip


def speed(folder: Path, turns: int) -> dict[str, Any]:
    """Part 1."""
    reranker = Reranker.from_pretrained()
    reranker.warm_up()
    files = [folder / name for name in ("first.run", "corpus.jsonl", "queries.jsonl")]
    taken: dict[str, list[float]] = {"files": [], "memory": []}
    count = 0
    for turn in range(turns):
        source = RunSource(*files, depth=DEPTH, index=folder / f"{turn}.index", bad=BadRows(False), progress=False)
        pairs = [(job.query, document) for job in source.jobs() for document in job.documents]
        began = time.perf_counter()
        count = rerank(reranker, source, folder / f"{turn}.run", as_trec("x"), work={}, progress=False)
        taken["files"].append(time.perf_counter() - began)
        source.close()
        began = time.perf_counter()
        for first in range(0, len(pairs), PIECE):
            reranker.predict(pairs[first : first + PIECE], progress=False)
        taken["memory"].append(time.perf_counter() - began)
    medians = {side: statistics.median(seconds) for side, seconds in taken.items()}
    return {
        "pairs": count,
        "pairs_per_s": {side: round(count / median, 1) for side, median in medians.items()},
        "ratio": round(medians["memory"] / medians["files"], 3),
        "seconds": {side: [round(value, 1) for value in seconds] for side, seconds in taken.items()},
    }


def run(flags: Sequence[str], output: Path, kill_after_s: float | None = None) -> tuple[float, int, int]:
    """Seconds, peak of memory in bytes and status of the command, which may be killed."""
    began = time.perf_counter()
    process = subprocess.Popen([*COMMAND, *flags, f"--output={output}"], stdout=subprocess.DEVNULL)
    most = 0
    while process.poll() is None:
        try:
            most = max(most, peak(process.pid))
        except (OSError, StopIteration):  # it has just ended
            break
        if kill_after_s is not None and time.perf_counter() - began > kill_after_s:
            process.kill()
        time.sleep(0.05)
    return time.perf_counter() - began, most, process.wait()


def interruptions(folder: Path, flags: Sequence[str]) -> dict[str, Any]:
    """Part 2."""
    seconds, _, status = run(flags, folder / "whole.run")
    assert status == 0
    draw = random.Random(1)
    kills = []
    while len(kills) < KILLS:
        lived, _, status = run(flags, folder / "killed.run", draw.uniform(0.3, 0.9) * seconds / KILLS * 1.5)
        if status != -signal.SIGKILL:
            raise SystemExit(f"it ended with status {status} before it could be killed {KILLS} times")
        kills.append(round(lived, 1))
    rest, _, status = run(flags, folder / "killed.run")
    same = (folder / "killed.run").read_bytes() == (folder / "whole.run").read_bytes()
    return {
        "undisturbed_s": round(seconds, 1),
        "killed_after_s": kills,
        "last_start_s": round(rest, 1),
        "status": status,
        "same_bytes": same,
    }


def memory(folder: Path, flags: Sequence[str], small: int) -> dict[str, Any]:
    """Part 3."""
    seconds, large, status = run(flags, folder / "large.run")
    assert status == 0
    index = (folder / "corpus.jsonl").stat().st_size
    return {
        "corpus_gb": round(index / 1e9, 2),
        "seconds": round(seconds, 1),
        "peak_mb": {"small corpus": round(small / 1e6), "large corpus": round(large / 1e6)},
        "ratio": round(large / small, 3),
    }


def measures(folder: Path, xquad: Path) -> dict[str, Any]:
    """Part 4."""
    paragraphs = read_xquad(xquad / "en.json")
    (folder / "qrels").mkdir()
    with (
        (folder / "corpus.jsonl").open("w") as corpus,
        (folder / "queries.jsonl").open("w") as queries,
        (folder / "qrels" / "test.tsv").open("w") as qrels,
    ):
        qrels.write("query-id\tcorpus-id\tscore\n")
        for place, paragraph in enumerate(paragraphs):
            corpus.write(json.dumps({"_id": f"p{place}", "text": paragraph["context"]}) + "\n")
            for question in paragraph["qas"]:
                queries.write(json.dumps({"_id": question["id"], "text": question["question"]}) + "\n")
                qrels.write(f"{question['id']}\tp{place}\t1\n")
    output = folder / "anew.run"
    assert run([f"--beir={folder}", f"--depth={DEPTH}"], output)[2] == 0
    bm25 = output.with_name(output.name + ".bm25")
    said = folder / "measures.json"
    command = [sys.executable, "-m", "jaxrank", "evaluate", str(bm25), str(output), "--output", str(said)]
    subprocess.run([*command, "--qrels", str(folder / "qrels" / "test.tsv")], check=True, stdout=subprocess.DEVNULL)
    found = json.loads(said.read_text())
    names = ["BM25", "BM25, best 100 ranked anew"]
    return {name: one["mean"] for name, one in zip(names, found["runs"], strict=True)}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--xquad", type=Path, required=True, help="folder with XQuAD's JSON files")
    parser.add_argument("--pairs", type=int, default=20_000)
    parser.add_argument("--corpus-gb", type=float, default=2.0)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args(argv)
    result: dict[str, Any] = {"benchmark": "rerank_files", "model": "builtin", "depth": DEPTH}
    with tempfile.TemporaryDirectory() as scratch:
        folders = {name: Path(scratch) / name for name in ("small", "large", "beir")}
        for folder in folders.values():
            folder.mkdir()
        flags = write_collection(folders["small"], arguments.xquad, arguments.pairs)

        def large() -> dict[str, Any]:
            over = write_collection(folders["large"], arguments.xquad, arguments.pairs, arguments.corpus_gb * 1e9)
            return memory(folders["large"], over, run(flags, folders["small"] / "again.run")[1])

        work = {
            "measures": lambda: measures(folders["beir"], arguments.xquad),
            "speed": lambda: speed(folders["small"], arguments.turns),
            "interruptions": lambda: interruptions(folders["small"], flags),
            "memory": large,
        }
        for part in arguments.parts:
            result[part] = work[part]()
            print(result[part], flush=True)
    holds = {
        "speed": "speed" not in result or result["speed"]["ratio"] >= AIM_SPEED,
        "same bytes": "interruptions" not in result or result["interruptions"]["same_bytes"],
        "memory": "memory" not in result or result["memory"]["ratio"] <= AIM_MEMORY,
    }
    finish({**result, "holds": holds}, arguments.output)
    if not all(holds.values()):
        raise SystemExit("does not hold: " + ", ".join(name for name, good in holds.items() if not good))


if __name__ == "__main__":
    main()
