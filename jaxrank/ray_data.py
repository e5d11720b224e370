"""Rerank files larger than memory, with Ray Data: `python -m jaxrank.ray_data INPUT... --output FOLDER`.

Rows have a query and a list of documents. The output has `scores` in place of the documents, in their order. Each part
of the input (see parts) becomes one file of the output, which is either complete or not there. If a job ended, for any
reason, the same command continues it. Finished parts are not done again, and all others are done as a whole.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import ray  # pyright: ignore[reportMissingImports]
import ray.data  # pyright: ignore[reportMissingImports]
from tqdm import tqdm

from jaxrank.cli import model
from jaxrank.cli.numbers import count, seconds
from jaxrank.errors import JaxrankError, RequestError
from jaxrank.offline import parts
from jaxrank.offline.parts import Part
from jaxrank.offline.rerank import BATCH_ROWS, batches, score
from jaxrank.reranker import sigmoid

JOB, SKIPPED = "_job.json", "_skipped"
"""The file that describes the folder's job, and the folder of skipped rows.

The latter has a file for each part that skipped some.
"""

BLOCKS = 10_000
"""The most tasks that Ray Data is given."""


def parser() -> argparse.ArgumentParser:
    command = argparse.ArgumentParser(prog="python -m jaxrank.ray_data", description="Rerank files with Ray Data.")
    command.add_argument("inputs", nargs="+", help=".jsonl, .ndjson or .parquet files, or folders of them")
    command.add_argument(
        "--output", required=True, metavar="FOLDER", help="a folder that every node of the cluster sees"
    )
    command.add_argument("--model", help="Hugging Face id or folder; default: the built-in model")
    command.add_argument("--query-field", default="query", metavar="NAME")
    command.add_argument("--documents-field", default="documents", metavar="NAME")
    command.add_argument("--raw", action="store_true", help="write logits instead of probabilities")
    command.add_argument("--skip-bad-rows", action="store_true",
                         help=f"write them to FOLDER/{SKIPPED} and continue; else the first ends the job")  # fmt: skip
    command.add_argument("--part-bytes", type=count, default=4_000_000, metavar="N",
                         help="bytes of JSON lines in a part; at most so much is done again after an end")  # fmt: skip
    command.add_argument(
        "--concurrency", type=count, default=1, metavar="N", help="number of processes, each with a model"
    )
    command.add_argument(
        "--cpus", type=seconds, default=1.0, metavar="N", help="CPUs of each process, as Ray counts them"
    )
    command.add_argument("--gpus", type=seconds, default=0.0, metavar="N")
    command.add_argument("--tpus", type=seconds, default=0.0, metavar="N")
    command.add_argument("--address", help="address of the Ray cluster; default: RAY_ADDRESS, or only this machine")
    command.add_argument("--no-progress", action="store_true", help="show no progress bar")
    model.model_arguments(command)
    return command


PLACEMENT = ("concurrency", "cpus", "gpus", "tpus", "address", "no_progress", "inputs", "output", "compile_cache",
             "data_parallel", "tensor_parallel", "skip_bad_rows")  # fmt: skip
"""Arguments that may change from one run of a job to the next. The rows of a finished part do not depend on them."""


def run(arguments: argparse.Namespace) -> int:
    """Do the rest of the job and return the exit status.

    Raises:
        JaxrankError: the job cannot be done.
    """
    sources = parts.find(arguments.inputs)
    _begin(arguments, sources)
    every = [part for source in sources for part in parts.cut(source, arguments.part_bytes)]
    done = parts.names_in(arguments.output)
    left = [part for part in every if part.name not in done]
    print(f"{len(every)} parts, {len(every) - len(left)} of them there already", file=sys.stderr)
    if left:
        _rerank(arguments, left)
    parts.clear_unfinished(arguments.output)
    skips = f"{arguments.output}/{SKIPPED}"
    skipped = sum(parts.content_of(skips, name).count(b"\n") for name in parts.names_in(skips))
    print(f"{arguments.output}: all of {len(every)} parts; {skipped} rows skipped", file=sys.stderr)
    return 0


def _begin(arguments: argparse.Namespace, sources: Sequence[parts.Source]) -> None:
    """Write down what the job is, or check that the folder's job is the same.

    Raises:
        RequestError: it is another job.
    """
    settings = {name: value for name, value in vars(arguments).items() if name not in PLACEMENT}
    job = {"settings": settings, "inputs": [asdict(source) for source in sources]}
    there = parts.names_in(arguments.output)
    if JOB not in there:
        if there:
            raise RequestError(
                f"{arguments.output} holds other files; name a new folder, or that of a job to go on with"
            )
        parts.write(arguments.output, JOB, json.dumps(job, indent=1).encode())
        return
    before = json.loads(parts.content_of(arguments.output, JOB))
    if before != job:
        off = [name for name in settings if before["settings"].get(name) != settings[name]]
        what = ", ".join(f"--{name.replace('_', '-')}" for name in off) or "the input files"
        raise RequestError(
            f"{arguments.output} holds a job that differs in {what}; go on with the same ones, or name a new folder"
        )


def _rerank(arguments: argparse.Namespace, left: Sequence[Part]) -> None:
    """Let processes with a model each do the parts."""
    if not ray.is_initialized():
        ray.init(address=arguments.address, log_to_driver=False)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    outcomes = ray.data.from_items(
        [asdict(part) for part in left], override_num_blocks=min(len(left), BLOCKS)
    ).map_batches(
        Worker,
        fn_constructor_args=(arguments,),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=arguments.concurrency),
        num_cpus=arguments.cpus,
        num_gpus=arguments.gpus,
        resources={"TPU": arguments.tpus} if arguments.tpus else None,
    )
    hidden = True if arguments.no_progress else None
    with tqdm(total=len(left), unit="part", desc="reranking", disable=hidden) as bar:
        for outcome in outcomes.iter_rows():
            if outcome["error"]:
                raise RequestError(outcome["error"])
            bar.update()


class Worker:
    """A process with a model. It takes parts and writes one file of the output for each."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.error = ""
        try:
            self.reranker = model.load(arguments, arguments.model)
        except JaxrankError as error:
            self.error = str(error)  # raised here, it would make Ray start the process again and again

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        """Rerank one part.

        Args:
            batch: the part's fields.

        Returns:
            What went wrong, as text. "" means that nothing did.
        """
        part = Part(str(batch["file"][0]), int(batch["start"][0]), int(batch["stop"][0]))
        try:
            if not self.error:
                self.rerank(part)
        except (JaxrankError, OSError) as error:
            return {"part": [part.name], "error": [str(error)]}
        return {"part": [part.name], "error": [self.error]}

    def rerank(self, part: Part) -> None:
        """Score a part and write its file.

        Raises:
            RequestError: a row is bad, and bad rows are not skipped.
        """
        asked = self.arguments
        whole = parts.read(part, (asked.query_field, asked.documents_field, "instruct"))
        scores: dict[int, list[float]] = {}
        rows: dict[int, Any] = {}
        skipped: list[str] = []

        def encoded() -> Iterator[tuple[int, list[Any]]]:
            for number, row in whole.rows():
                try:
                    pairs = self._encode(row)
                except RequestError as error:
                    where = whole.where(number)
                    if not asked.skip_bad_rows:
                        raise RequestError(
                            f"{where}: {error}. Go on with --skip-bad-rows, or mend the row and name a new --output"
                        ) from None
                    skipped.append(json.dumps({"where": where, "error": str(error)}) + "\n")
                    continue
                rows[number] = row
                yield number, pairs

        for batch in batches(encoded(), BATCH_ROWS * self.reranker.row_tokens):
            for number, logits in score(self.reranker, batch):
                scores[number] = (logits if asked.raw else sigmoid(logits)).tolist()
        if skipped:  # written before the part itself, whose file marks the part as done
            parts.write(asked.output, f"{SKIPPED}/{part.name}.jsonl", "".join(skipped).encode())
        parts.write(asked.output, part.name, whole.output(scores, rows, asked.documents_field))

    def _encode(self, row: Any) -> list[Any]:
        """Return the tokenised pairs of a row.

        Raises:
            RequestError: the row is bad.
        """
        if isinstance(row, RequestError):
            raise row
        for name in (self.arguments.query_field, self.arguments.documents_field):
            if row.get(name) is None:
                raise RequestError(f"no {name!r}; a row has a query and a list of documents")
        documents = row[self.arguments.documents_field]
        if not isinstance(documents, list):
            raise RequestError(f"{self.arguments.documents_field!r} is {type(documents).__name__}; it must be a list")
        return self.reranker.encode(row[self.arguments.query_field], documents, instruct=row.get("instruct"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit status. It is 1 if the work failed, and 2 if the command line is wrong."""
    arguments = parser().parse_args(argv)
    try:
        return run(arguments)
    except KeyboardInterrupt:
        return 130
    except (JaxrankError, OSError) as error:
        print(f"jaxrank.ray_data: error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    # The class is imported by its module's name, not as __main__. So the processes of a cluster find it.
    from jaxrank import ray_data

    sys.exit(ray_data.main())
