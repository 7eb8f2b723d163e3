"""topk_select over rows that are hard to select from, against the total order in numpy: how many rows are wrong.

Every kind of row comes in every size and dtype, half of the time cut to lengths around 0 and k, best first and by
index. A row is wrong if any index, or any bit of a value, is.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

from jax_router import topk_select
from support.models import DTYPES
from support.oracle import select

SIZES = ((256, 6), (1000, 100), (4096, 64), (8191, 2048), (16384, 512), (40001, 600), (131072, 2048), (262209, 2048))
_MOST_ROWS, _MOST_SCORES = 300, 2**21  # of a batch

_Make = Callable[[np.random.Generator, tuple[int, int], int], np.ndarray]
_SPECIAL = np.float32([0.0, -0.0, np.inf, -np.inf, np.nan, -np.nan, 1e-45, -1e-45, 1e-40, 3e38, -3e38, 65504, 6e-8, 1])


def _normal(rng: np.random.Generator, shape: tuple[int, int], k: int) -> np.ndarray:
    return rng.standard_normal(shape, np.float32)


def _with_bits(bits: np.ndarray) -> np.ndarray:
    return bits.astype(np.uint32).view(np.float32)


def _plateau(rng: np.random.Generator, shape: tuple[int, int], k: int) -> np.ndarray:
    """All from place k / 2 to place 3 k / 2 are equal."""
    x = _normal(rng, shape, k)
    low, high = max(shape[1] - k - k // 2, 0), shape[1] - 1 - k // 2
    bounds = np.partition(x, (low, high), axis=-1)
    return np.clip(x, None, np.where(x <= bounds[:, high, None], bounds[:, low, None], np.inf)) if low else x


KINDS: dict[str, _Make] = {
    "normal": _normal,
    "low bits alone": lambda rng, shape, k: _with_bits(0x3F800000 + rng.integers(0, 1024, shape)),
    "consecutive bits": lambda rng, shape, k: _with_bits(0x3F800000 + rng.permuted(np.indices(shape)[1], axis=1)),
    "all equal": lambda rng, shape, k: np.full(shape, -2.5, np.float32),
    "few values": lambda rng, shape, k: rng.integers(-3, 4, shape).astype(np.float32),
    "one bucket": lambda rng, shape, k: np.where(rng.random(shape) < 0.3, np.float32(1.078125), _normal(rng, shape, k)),
    "special values": lambda rng, shape, k: rng.choice(_SPECIAL, shape),
    "some special values": lambda rng, shape, k: np.where(
        rng.random(shape) < 0.01, rng.choice(_SPECIAL, shape), _normal(rng, shape, k)
    ),
    "ascending": lambda rng, shape, k: np.sort(_normal(rng, shape, k), axis=-1),
    "descending": lambda rng, shape, k: -np.sort(_normal(rng, shape, k), axis=-1),
    "a plateau at the k-th": _plateau,
    "far apart": lambda rng, shape, k: _with_bits(rng.integers(0, 2**32, shape)),
}


@functools.partial(jax.jit, static_argnames=("k", "sorted"))
def _topk_select(x: jax.Array, lengths: jax.Array | None, k: int, sorted: bool) -> tuple[jax.Array, jax.Array]:
    return topk_select(x, k, lengths=lengths, sorted=sorted, implementation="native")


def _bits(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).view(np.dtype(f"u{x.dtype.itemsize}"))


def _count(dtype: str, seed: int, batch: tuple[tuple[int, int], str]) -> tuple[int, int]:
    """The rows of a batch, and how many of them are wrong."""
    (length, k), kind = batch
    rng = np.random.default_rng(seed)
    rows = min(_MOST_ROWS, _MOST_SCORES // length)
    with np.errstate(over="ignore", invalid="ignore"):
        x = KINDS[kind](rng, (rows, length), k).astype(DTYPES[dtype])
    wrong = np.zeros(rows, bool)
    for is_sorted in (True, False):
        lengths = None
        if seed % 2 == is_sorted:
            lengths = rng.choice(np.int32([0, 1, k - 1, k, k + 1, length // 2, length, length + 1]), rows)
        got_values, got = map(np.asarray, _topk_select(x, lengths, k, is_sorted))
        want_values, want = select(x, k, lengths)
        if not is_sorted:
            order = np.argsort(want.view(np.uint32), axis=-1)  # -1 comes last
            want_values, want = (np.take_along_axis(array, order, -1) for array in (want_values, want))
        wrong |= (got != want).any(axis=-1) | (_bits(got_values) != _bits(want_values)).any(axis=-1)
    return rows, int(wrong.sum())


def count(dtype: str) -> tuple[int, int]:
    """The rows of this dtype, and how many of them are wrong."""
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        batches = itertools.product(SIZES, KINDS)
        found = list(threads.map(functools.partial(_count, dtype), itertools.count(), batches))
    return sum(rows for rows, _ in found), sum(wrong for _, wrong in found)
