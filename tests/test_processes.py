"""One model over two processes, which ask it the same: each has the scores of one device alone (jax.distributed)."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxrank import Reranker, UnsupportedError, convert
from tests.checkpoints import make_bge
from tests.media import photo
from tests.test_sharding import DOCUMENTS, SIZES, make_vl

HOW: dict[str, Any] = dict(dtype="float32", row_tokens=256, max_length=400, compile_cache=None)
SHARES = {"seeing": 2, "converted": 4}
"""Devices that share a copy, of four: those of a process, and of both."""


def documents(kind: str) -> list[Any]:
    media = [photo(64 + 32 * i, 96, i) for i in range(5)] if kind == "seeing" else []
    return [*DOCUMENTS[:9], *media, *DOCUMENTS[9:]]


def score(reranker: Reranker, kind: str) -> np.ndarray:
    return reranker.score("Where do pandas live?", documents(kind), raw=True, progress=False)


def one_of_two(address: str, process: int, folder: Path) -> None:
    """What each process runs. Writes its scores down."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(address, num_processes=2, process_id=process)
    for kind, share in SHARES.items():
        reranker = Reranker.from_pretrained(folder / kind, tensor_parallel=share, **HOW)
        assert reranker.devices == f"4 devices (cpu): {4 // share} x the weights, each on {share}"
        np.save(folder / f"{kind}-{process}.npy", score(reranker, kind))
    with pytest.raises(UnsupportedError, match=r"^2 copies .* leave process 1 without one; use all 4 devices"):
        Reranker.from_pretrained(folder / "seeing", data_parallel=2, tensor_parallel=1, **HOW)


def test_each_process_has_all_scores(tmp_path: Path) -> None:
    make_vl(tmp_path / "seeing")
    make_bge(tmp_path / "published", **SIZES)
    convert.convert(tmp_path / "published", tmp_path / "converted", progress=False)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [sys.executable, "-m", "tests.test_processes", address]
    processes = [
        subprocess.Popen(
            [*command, str(i), str(tmp_path)], stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent
        )
        for i in range(2)
    ]
    try:
        said = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], said[0][-3000:] + said[1][-3000:]
    for kind in SHARES:
        want = score(Reranker.from_pretrained(tmp_path / kind, **HOW), kind)
        assert want.std() > 0.03, "scores that hardly differ would prove nothing: 3,000 times the tolerance"
        for process in range(2):
            assert np.abs(np.load(tmp_path / f"{kind}-{process}.npy") - want).max() <= 1e-5, (kind, process)


if __name__ == "__main__":
    one_of_two(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
