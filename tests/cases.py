"""The sizes that broke other kernels, rows for topk_select, GPUs, and the operands of the ops by name."""

import numpy as np

import jax_router
from jax_router._explain import GPUS

EXPERT_COUNTS = (36, 72, 108, 132, 144, 160, 192, 288, 320, 384, 448, 512, 576, 896, 1024)
ODD_EXPERT_COUNTS = (1, 3, 7, 17, 33, 65, 129, 255, 257, 1023)
TOKEN_COUNTS = (1, 17, 33, 63, 64, 65)

# (rows, length, k) of topk_select.
ROWS = {
    "one short row": (1, 100, 7),
    "all of a row": (3, 65, 65),
    "k is one": (5, 1000, 1),
    "router rows": (64, 256, 6),
    "many short rows": (4100, 64, 3),
    "more of a short row": (6, 500, 40),
    "few of a medium row": (3, 4096, 64),
    "more of a medium row": (3, 3001, 100),
    "medium rows": (4, 4096, 512),
    "a quarter of a row": (2, 8191, 2048),
    "no tile multiple": (2, 5003, 77),
    "all of a medium row": (2, 8192, 8192),
    "as many as a kernel takes": (2, 20000, 8192),
    "few long rows": (2, 65536, 1024),
    "one long row": (1, 262209, 2048),
}

# GPUs, as the CUDA module wants them described.
DEVICES = {
    **{name: GPUS[name] for name in ("H100", "A100", "B200")},
    "small": {"compute_capability": 86, "multiprocessors": 28, "shared_bytes": 99 * 1024},
}

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
}  # fmt: skip

# The bounds of integer operands, ids outside of [0, 16) or of a table of 12 rows among them.
INTEGERS = {"token_ids": (-1, 13), "lut": (-1, 16), "ids": (-1, 17), "lengths": (-1, 18)}


def draw(rng: np.random.Generator, name: str, *shape: int) -> np.ndarray:
    """A random operand of an op on 16 experts, by its name."""
    if name == "mask":
        return rng.random(shape) < 0.7
    if name in INTEGERS:
        return rng.integers(*INTEGERS[name], shape).astype(np.int32)
    return rng.normal(0, 1, shape).astype(np.float32)


def lay_out(ids: np.ndarray, num_experts: int, align: int = 1, capacity: int | None = None) -> jax_router.Dispatch:
    """A dispatch in numpy: groups at multiples of `align`, with at most `capacity` choices of an expert."""
    flat = ids.reshape(-1)
    slot, token_index, sizes = np.full(flat.size, -1, np.int32), [], np.zeros(num_experts, np.int32)
    for expert in range(num_experts):
        choices = np.flatnonzero(flat == expert)[:capacity]
        slot[choices] = len(token_index) + np.arange(len(choices))
        sizes[expert] = -(-len(choices) // align) * align
        token_index += [*(choices // ids.shape[-1]), *[-1] * (sizes[expert] - len(choices))]
    most = flat.size + num_experts * (align - 1)
    token_index += [-1] * (-(-most // align) * align - len(token_index))
    return jax_router.Dispatch(np.array(token_index, np.int32), slot.reshape(ids.shape), sizes)


def draw_move(rng: np.random.Generator, name: str, dtype: object):
    """A dispatch of MOVES, some of its choices without slots; x, y and weights. What is in no slot is NaN in y."""
    tokens, k, hidden, num_experts, align = MOVES[name]
    dispatch = lay_out(rng.integers(-1, num_experts + 1, (tokens, k)), num_experts, align, capacity=max(tokens // 2, 2))
    x, y = (rng.normal(0, 1, (rows, hidden)).astype(dtype) for rows in (tokens, len(dispatch.token_index)))
    y[dispatch.token_index < 0] = np.nan
    return dispatch, x, y, rng.normal(0, 1, (tokens, k)).astype(np.float32)
