"""What models have in one parameter, made of a checkpoint's tensors head by head; shares no code with jaxrank."""

from __future__ import annotations

import numpy as np


def q_k_v(q: np.ndarray, k: np.ndarray, v: np.ndarray, kv_heads: int) -> np.ndarray:
    """[N*H, D], [K*H, D] and [K*H, D] as [D, (N + 2K) * H]: the first query head of every key head, the second ones and
    so on, then the keys, then the values."""
    size = len(k) // kv_heads
    grouped = len(q) // len(k)
    columns = [q[(head * grouped + i) * size :][:size] for i in range(grouped) for head in range(kv_heads)]
    return np.concatenate([*columns, k, v]).T


def output(out: np.ndarray, kv_heads: int, size: int) -> np.ndarray:
    """[D, N*H] as [N*H, D], heads in the order of q_k_v."""
    grouped = out.shape[1] // (kv_heads * size)
    rows = [out[:, (head * grouped + i) * size :][:, :size].T for i in range(grouped) for head in range(kv_heads)]
    return np.concatenate(rows)
