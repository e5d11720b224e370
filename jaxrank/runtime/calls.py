"""Calls of the device: handed over without waiting and fetched in the same order, so that it always has work."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np

Scored = tuple[list[int], np.ndarray]
"""Indices of pairs, and their logits: float32 [n]."""

Fetch = Callable[[], Iterable[Scored]]
"""Waits until a call is over; what it scored, by row. Raises what the device had to complain of."""


class Call(NamedTuple):
    """One call of the device, packed. tokens: the length of its rows, which its time grows with. run: hands it over;
    where the device works by itself, as accelerators do, it does not wait."""

    tokens: int
    run: Callable[[], Fetch]


def has_room(under_way: Sequence[int], ahead: int) -> bool:
    """Whether the device should be handed another call: it has none, or less than `ahead` tokens wait behind the first.

    under_way: tokens of the calls that are handed over and not fetched, oldest first. With ahead = 0 the device has one
    call at a time; with a usual row's tokens another row waits when one ends, and what follows a short row as well.
    """
    return not under_way or sum(islice(under_way, 1, None)) < ahead
