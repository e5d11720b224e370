"""Device calls. They are started without a wait and fetched in the same order, so that the device always has work."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np

Scored = tuple[list[int], np.ndarray]
"""The indices of pairs, and their logits: float32 [n]."""

Fetch = Callable[[], Iterable[Scored]]
"""A function that waits until a call is over, and returns what it scored, by row. It raises the device's errors."""


class Call(NamedTuple):
    """One packed device call.

    Attributes:
        tokens: the length of its rows. The time of the call grows with it.
        run: a function that starts the call. It does not wait where the device works by itself, as accelerators do.
    """

    tokens: int
    run: Callable[[], Fetch]


def has_room(under_way: Sequence[int], ahead: int) -> bool:
    """Return whether the device should get another call.

    That is so if it has none, or if less than `ahead` tokens wait behind the first call. With ahead = 0 the device has
    one call at a time. With the tokens of a usual row, another row waits when one ends, also after a short row.

    Args:
        under_way: the tokens of the calls that are started and not fetched, oldest first.
        ahead: the limit of tokens that wait.
    """
    return not under_way or sum(islice(under_way, 1, None)) < ahead
