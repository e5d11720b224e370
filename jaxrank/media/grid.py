"""The grids of images and videos: their number of tokens, and the positions of those."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int32

PATCH_LADDER = (1024, 4096, 8192, 16384, 30720)
"""The static sizes P of a row of patches. With patches of 16 x 16 pixels they are for:

- thumbnails,
- an image of a megapixel,
- the largest image that is not shrunk (1800 * 4 patches),
- videos,
- the largest video (7,680 * 4).

The steps are coarse, because each size is a program to compile and filler costs little. Attention skips filler. On CPU
the rest of a long row's computation skips it too. On accelerators the text model that reads the tokens takes several
times as long. All sizes are whole tiles of 256 for the attention kernels.
"""

Grid = tuple[int, int, int]
"""The number of patches in time, height and width."""


def tokens_of(grid: Grid, merge: int) -> int:
    """Return the number of tokens of an image or video."""
    return grid[0] * grid[1] * grid[2] // merge**2


def mrope_positions(
    here: Bool[np.ndarray, " length"], grids: Sequence[Grid], *, merge: int, start: int = 0
) -> tuple[Int32[np.ndarray, "3 length"], int]:
    """Return the positions of a run of tokens by time, height and width, and the next position after it.

    A text token is one position further in all three. A step of h x w tokens has one time, and covers h and w
    positions. The text after it continues behind the larger of the two (Qwen Team 2025, "Qwen3-VL Technical Report").

    Args:
        here: which tokens stand for media.
        grids: the grids of these images and videos, in their order. The steps of a video are separate, with or without
            text between them.
        merge: the number of patches in each direction that become one token.
        start: the first position, for tokens behind a prefix.

    Raises:
        ValueError: the tokens that stand for media do not match the grids.
    """
    sizes = [(height // merge, width // merge) for steps, height, width in grids for _ in range(steps)]
    if here.sum() != (needed := sum(height * width for height, width in sizes)):
        raise ValueError(f"{here.sum()} tokens stand for media, their grids {list(grids)} need {needed}")
    positions = np.zeros((3, len(here)), np.int32)
    at, next_position = 0, start

    def text(end: int) -> None:
        nonlocal at, next_position
        positions[:, at:end] = np.arange(end - at) + next_position
        at, next_position = end, next_position + end - at

    for height, width in sizes:
        text(at + int(here[at:].argmax()))
        end = at + height * width
        if not here[at:end].all():
            raise ValueError(f"the {height} x {width} media tokens from token {at} on are interrupted by text")
        positions[0, at:end] = next_position
        positions[1:, at:end] = np.indices((height, width)).reshape(2, -1) + next_position
        at, next_position = end, next_position + max(height, width)
    text(len(here))
    return positions, next_position
