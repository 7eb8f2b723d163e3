"""Tables of experts by token id that give every expert the same load."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from . import _check

Progress = Callable[[int, int], None]


def make_hash_table(
    vocab_size: int,
    num_experts: int,
    top_k: int,
    *,
    key: Array,
    token_counts: Any = None,
    progress: Progress | None = None,
) -> Array:
    """A table `[V, k]` of k distinct experts a token id, which balances the load of the experts.

    Without counts every expert is in V k / E rows, give or take one. With them, what is balanced is how many tokens of
    a text each expert gets: token ids by descending count go to the k experts that have least so far (Graham's rule),
    and those that the text has not are spread evenly. A token more frequent than what an expert should get in all keeps
    its k experts busier than the mean: no table can change that.

    Args:
        vocab_size: V.
        num_experts: E.
        top_k: k, at most E.
        key: a key of `jax.random`: which of the tables that are as good. The same arguments give the same table.
        token_counts: numbers `[V]`, 0 or more: how often a text has each token id. Default none: all the same.
        progress: called with the rows that are done, and V, now and then.

    Returns:
        int32 `[V, k]`. Seconds, also for a million rows.

    Raises:
        TypeError: a size is no int, the counts are no numbers, or the key is none, or traced: the table is made on the
            host.
        ValueError: more experts a row than there are, or counts that are negative, not finite, or not V.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jax_router import make_hash_table
        >>> table = make_hash_table(6, 4, 2, key=jax.random.key(0))
        >>> jnp.bincount(table.reshape(-1), length=4)  # in how many rows each expert is
        Array([3, 3, 3, 3], dtype=int32)
    """
    vocab_size = _check.static_int("vocab_size", vocab_size, 1, None)
    num_experts = _check.static_int("num_experts", num_experts, 1, None)
    top_k = _check.static_int("top_k", top_k, 1, num_experts, " (num_experts)")
    if isinstance(key, jax.core.Tracer):
        raise TypeError(f"key must be known, since the table is made on the host: not under jax.jit; got {key}")
    rng = np.random.default_rng(np.asarray(jax.random.bits(_check.key("key", key), (4,), jnp.uint32)))
    done = (lambda rows, of: None) if progress is None else progress
    _check.function("progress", done, "print")
    table = np.empty((vocab_size, top_k), np.int32)
    if token_counts is None:
        ids = rng.permutation(vocab_size)
    else:
        counts = _counts(token_counts, vocab_size)
        # Equal counts in random order.
        order = rng.permutation(vocab_size)
        order = order[np.argsort(-counts[order], kind="stable")]
        counted = int((counts > 0).sum())
        _spread_by_count(table, order[:counted], counts, num_experts, lambda rows: done(rows, vocab_size))
        ids = order[counted:]
    table[ids] = _even_rows(len(ids), num_experts, top_k, rng)
    done(vocab_size, vocab_size)
    return jnp.asarray(table)


def _counts(token_counts: Any, vocab_size: int) -> np.ndarray:
    counts = np.asarray(token_counts)
    if counts.dtype.kind not in "iuf":
        raise TypeError(f"token_counts must be numbers, got dtype {counts.dtype}")
    if counts.shape != (vocab_size,):
        raise ValueError(f"token_counts must have shape ({vocab_size},) (vocab_size), got {counts.shape}")
    counts = counts.astype(np.float64)
    wrong = ~(np.isfinite(counts) & (counts >= 0))
    if wrong.any():
        raise ValueError(f"token_counts must be finite and 0 or more, got {counts[wrong][0]} at {wrong.argmax()}")
    return counts


def _even_rows(rows: int, num_experts: int, top_k: int, rng: np.random.Generator) -> np.ndarray:
    """Rows of distinct experts, of which each is in as many, give or take one: random permutations, cut into rows."""
    experts = np.empty(rows * top_k + num_experts, np.int32)
    permutation = np.arange(num_experts, dtype=np.int32)
    for first in range(0, rows * top_k, num_experts):
        rng.shuffle(permutation)
        begun = first % top_k  # how much of a row the permutation before this one left
        if begun:
            # The rest of that row: the first here that are not in it already.
            in_row = np.isin(permutation, experts[first - begun : first])
            rest = np.flatnonzero(~in_row)[: top_k - begun]
            others = np.delete(permutation, rest)
            permutation = np.concatenate([permutation[rest], others])
        experts[first : first + num_experts] = permutation
    return experts[: rows * top_k].reshape(rows, top_k)


def _spread_by_count(
    table: np.ndarray, ids: np.ndarray, counts: np.ndarray, num_experts: int, done: Callable[[int], None]
) -> None:
    """Fills the rows of `ids`, whose counts descend, each with the k experts of the least load.

    One expert that gets a token is next in turn after all those whose load is below what it then has. So many rows can
    be filled at once, the most frequent tokens to the experts with least.
    """
    top_k = table.shape[1]
    load = np.zeros(num_experts)
    at = chunks = 0
    while at < len(ids):
        order = np.argsort(load, kind="stable")
        in_turn = int(np.searchsorted(load[order], load[order[0]] + counts[ids[at]], side="right"))
        chunk = ids[at : at + max(in_turn // top_k, 1)]
        experts = order[: len(chunk) * top_k].reshape(-1, top_k)
        table[chunk] = experts
        load[experts] += counts[chunk][:, None]
        at += len(chunk)
        chunks += 1
        if chunks % 1024 == 0:
            done(at)
