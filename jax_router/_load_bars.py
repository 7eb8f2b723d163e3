"""The load of experts as a row of blocks in a terminal."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

_LEVELS = " ▁▂▃▄▅▆▇█"
_ASCII_LEVELS = " .:-=+*#@"
_EXPERTS_A_ROW = 64


def rows_of_blocks(load: np.ndarray, ascii_only: bool) -> Iterator[tuple[int, str]]:
    """The first expert of each row, and the row: a block for each expert, full for the busiest of all."""
    levels = _ASCII_LEVELS if ascii_only else _LEVELS
    heights = np.ceil(load / np.maximum(load.max(), 1) * (len(levels) - 1)).astype(int)
    blocks = "".join(levels[height] for height in heights)
    for first in range(0, load.size, _EXPERTS_A_ROW):
        yield first, blocks[first : first + _EXPERTS_A_ROW]
