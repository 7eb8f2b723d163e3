"""The sizes that broke other kernels, rows for topk_select, GPUs, and the operands of the ops by name."""

import numpy as np

from jax_router._native import GPUS

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

# The bounds of integer operands, ids outside of [0, 16) or of a table of 12 rows among them.
INTEGERS = {"token_ids": (-1, 13), "lut": (-1, 16), "ids": (-1, 17), "lengths": (-1, 18)}


def draw(rng: np.random.Generator, name: str, *shape: int) -> np.ndarray:
    """A random operand of an op on 16 experts, by its name."""
    if name == "mask":
        return rng.random(shape) < 0.7
    if name in INTEGERS:
        return rng.integers(*INTEGERS[name], shape).astype(np.int32)
    return rng.normal(0, 1, shape).astype(np.float32)
