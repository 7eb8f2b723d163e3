"""Rows to permute and to combine."""

import numpy as np

import jax_router
import oracle

# Rows that are moved: tokens, k, D, experts, and the tiles of slots.
MOVES = {
    "one token": (1, 8, 2048, 16, 1),
    "an odd row": (17, 3, 257, 5, 1),
    "one number": (33, 2, 1, 4, 8),
    "half a piece": (9, 2, 12, 4, 1),
    "several pieces a lane": (5, 4, 7168, 8, 1),
    "a row longer than a block": (3, 2, 16392, 4, 4),
    "more choices than lanes": (12, 40, 64, 64, 1),
    "as many choices as a kernel takes": (3, 64, 72, 64, 16),
    "tiles": (100, 6, 128, 32, 16),
    "many tokens": (2100, 2, 48, 9, 1),
    "three segments": (40, 8, 3000, 16, 8),
    "more than caches hold": (2100, 2, 2048, 9, 1),
}  # fmt: skip


def lay_out(ids: np.ndarray, num_experts: int, align: int = 1, capacity: int | None = None) -> jax_router.Dispatch:
    """A dispatch of numpy arrays, by the oracle."""
    return jax_router.Dispatch(*oracle.dispatch(ids, num_experts, align, capacity))


def draw_move(rng: np.random.Generator, name: str, dtype: object):
    """A dispatch of MOVES, some of its choices without slots; x, y and weights. What is in no slot is NaN in y."""
    tokens, k, hidden, num_experts, align = MOVES[name]
    ids = rng.integers(-1, num_experts + 1, (tokens, k))
    dispatch = lay_out(ids, num_experts, align, capacity=max(tokens // 2, 2))
    x, y = (rng.normal(0, 1, (rows, hidden)).astype(dtype) for rows in (tokens, len(dispatch.token_index)))
    y[dispatch.token_index < 0] = np.nan
    return dispatch, x, y, rng.normal(0, 1, (tokens, k)).astype(np.float32)
