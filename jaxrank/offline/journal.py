"""Output that survives kill -9: it records what is written so far, and where to continue."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxrank.errors import RequestError


class Journal:
    """An output file that is written piece by piece, beside its state: OUTPUT.part and OUTPUT.journal.

    The journal names a piece after the piece has reached the disk, and only then it counts. What lies behind it is cut
    off at the next start. `done` and `notes` are the caller's.

    Raises:
        RequestError: the journal is of other work.
    """

    def __init__(self, output: Path, work: Mapping[str, Any]) -> None:
        self.output = output
        self.part = output.with_name(output.name + ".part")
        self.path = output.with_name(output.name + ".journal")
        self.work = dict(work)
        self.done = 0
        self.bytes = 0
        self.notes: dict[str, Any] = {}
        self.resumed = self.path.exists()
        if self.resumed:
            self._read()
        output.parent.mkdir(parents=True, exist_ok=True)
        self.file = self.part.open("r+b" if self.part.exists() and self.resumed else "wb")
        if os.fstat(self.file.fileno()).st_size < self.bytes:
            self.file.close()
            raise RequestError(f"{self.part} is shorter than {self.path} says; start anew with --restart")
        self.file.truncate(self.bytes)
        self.file.seek(self.bytes)

    def _read(self) -> None:
        try:
            state = json.loads(self.path.read_text("utf-8"))
            work, self.done, self.bytes, self.notes = (state[name] for name in ("work", "done", "bytes", "notes"))
        except (ValueError, LookupError, TypeError):
            raise RequestError(f"{self.path} is no journal of a rerank; start anew with --restart") from None
        if changed := [name for name in {**work, **self.work} if work.get(name) != self.work.get(name)]:
            raise RequestError(
                f"{self.path} was begun with other settings ({', '.join(changed)}); continue with the same, or start "
                "anew with --restart"
            )

    def add(self, piece: bytes, done: int, **notes: Any) -> None:
        """Write a piece, and record that the work is done up to `done`."""
        self.file.write(piece)
        self.file.flush()
        os.fsync(self.file.fileno())
        self.bytes += len(piece)
        self.done = done
        self.notes |= notes
        self.save()

    def save(self) -> None:
        """Write the state. It is written completely or not at all."""
        state = {"work": self.work, "done": self.done, "bytes": self.bytes, "notes": self.notes}
        new = self.path.with_name(self.path.name + ".new")
        with new.open("w", encoding="utf-8") as file:
            json.dump(state, file)
            file.flush()
            os.fsync(file.fileno())
        new.replace(self.path)

    def finish(self) -> None:
        """End the work: the output gets its name, and the journal is removed."""
        self.file.close()
        self.part.replace(self.output)
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Leave the files as they are, to continue another time."""
        self.file.close()


def forget(output: Path) -> None:
    """Remove what an interrupted run has left."""
    for suffix in (".part", ".journal", ".journal.new", ".index"):
        output.with_name(output.name + suffix).unlink(missing_ok=True)
