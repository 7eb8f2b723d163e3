"""Experts that have several replicas: which replica computes a choice."""

from __future__ import annotations

from math import prod

import jax.numpy as jnp
from jax import Array

from . import _check
from ._ids import as_int32_ids
from ._sharding import shard_as, whole, with_rows_as


def physical_expert_ids(expert_ids: Array, replicas: Array, *, token_index: Array | None = None) -> Array:
    """Logical experts to physical ones, where experts with much load have several replicas (DeepSeek's EPLB).

    `out[n, j] = replicas[e, n mod r_e]` with `e = expert_ids[n, j]`, and `r_e` the number of replicas of e: its tokens
    take turns. Dispatch by the result, `expert_dispatch(out, num_physical_experts)`, to weights that lie as the
    physical experts do, `gate_proj[physical_to_logical]`. What is counted and recorded for replay stays logical.

    Args:
        expert_ids: integers `[..., k]`, logical.
        replicas: integers `[E, R]`, the physical experts of each logical one; the first r_e of a row, then -1. This is
            `logical_to_physical_map` of vLLM and `log2phy` of EPLB, for one layer.
        token_index: integers `[...]`, not negative, in whose order the tokens take turns; default their number among
            all that are given. Where a device has few tokens, as in decoding under `shard_map`, number them over all
            devices, lest every device begin with the first replica.

    Returns:
        int32 `[..., k]`; -1 for an id outside `[0, E)`, -1 itself among them, and for an expert without a replica.

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape.

    Source: https://github.com/deepseek-ai/EPLB for the tables. vLLM's `eplb_map_to_physical` takes turns by the
    number of the choice, `n k + j`, in place of that of the token.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax_router import physical_expert_ids
        >>> replicas = jnp.array([[0, 3], [1, -1], [2, -1]])  # expert 0 has two
        >>> physical_expert_ids(jnp.array([[0, 1], [2, 0], [0, -1]]), replicas)
        Array([[ 0,  1],
               [ 2,  3],
               [ 0, -1]], dtype=int32)
    """
    expert_ids = _check.int_array("expert_ids", expert_ids, min_rank=1)
    replicas = whole(_check.int_array("replicas", replicas))
    if replicas.ndim != 2 or 0 in replicas.shape:
        raise ValueError(f"replicas must have shape [num_experts, at least 1], got {replicas.shape}")
    num_experts, most = replicas.shape
    tokens = expert_ids.shape[:-1]
    if token_index is None:
        token_index = jnp.arange(prod(tokens), dtype=jnp.int32).reshape(tokens)
    token_index = _check.int_array("token_index", token_index)
    _check.same_shape("token_index", token_index, tokens)

    ids = as_int32_ids(expert_ids, num_experts)
    table = as_int32_ids(replicas, _check.MAX_SIZE)
    numbers = (table >= 0).sum(axis=-1, dtype=jnp.int32)
    is_expert = (ids >= 0) & (ids < num_experts)
    e = jnp.where(is_expert, ids, 0)
    turn = shard_as(ids, as_int32_ids(token_index, _check.MAX_SIZE))[..., None] % _rows(e, jnp.maximum(numbers, 1))
    return jnp.where(is_expert, _rows(e * most + turn, table.reshape(-1)), -1)


def _rows(index: Array, values: Array) -> Array:
    """`values[index]`, sharded as the index is."""
    return with_rows_as(index, lambda index, column: column[index])(index, values[:, None])[..., 0]
