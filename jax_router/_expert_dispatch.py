"""Sorting tokens by expert."""

from __future__ import annotations

from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from . import _check, reference
from ._ids import as_int32_ids
from ._native import native_module, unsupported_selection
from ._primitive import Op, Operand, Result
from ._sharding import align
from ._types import Dispatch, Implementation


def expert_dispatch(expert_ids: Array, num_experts: int, *, implementation: Implementation = "auto") -> Dispatch:
    """Sorts all choices by expert, stably.

    The slots of one expert lie together, in token order, so that `x[token_index]` with `group_sizes` feeds
    `jax.lax.ragged_dot`. Choices whose id is outside `[0, num_experts)` come last, belong to no group, and have slot
    -1. To combine: `y[slot]` are a token's results, where `slot >= 0`.

    Args:
        expert_ids: integers `[..., k]`, of N tokens in one or more leading axes; any values. At most 2^31 - 1 in all.
        num_experts: the number of experts.
        implementation: `"auto"`, `"native"` or `"reference"`.

    Returns:
        `Dispatch(token_index, slot, group_sizes)`: int32 `[N * k]`, `[..., k]` and `[num_experts]`.

    Raises:
        TypeError: a wrong dtype, or num_experts is no int.
        ValueError: a wrong shape or number.
        NotImplementedError: `implementation="native"` where no kernel can run.
    """
    expert_ids = _check.int_array("expert_ids", expert_ids)
    num_experts = _check.static_int("num_experts", num_experts, 1, None)
    if expert_ids.ndim < 2:
        raise ValueError(
            f"expert_ids must have shape [..., k], with an axis of tokens before that of their choices, got "
            f"{expert_ids.shape}: give [N, 1] for N tokens of one choice, and [1, k] for one token"
        )
    if expert_ids.shape[-1] < 1:
        raise ValueError(f"expert_ids must have at least one choice a token, got shape {expert_ids.shape}")
    choices = prod(expert_ids.shape)
    if isinstance(choices, int) and choices > _check.MAX_SIZE:
        raise ValueError(
            f"expert_ids must have at most 2^31 - 1 = {_check.MAX_SIZE} choices in all, which int32 numbers; got shape "
            f"{expert_ids.shape}"
        )
    expert_ids = as_int32_ids(expert_ids, num_experts)
    (whole,) = align([expert_ids], [expert_ids.ndim])
    tokens = whole.reshape(prod(whole.shape[:-1]), whole.shape[-1])
    token_index, slot, group_sizes = _EXPERT_DISPATCH(
        {"expert_ids": tokens}, num_experts=num_experts, implementation=_check.implementation(implementation)
    )
    return Dispatch(token_index, slot.reshape(expert_ids.shape), group_sizes)


def _reference(expert_ids: Array, *, num_experts: int) -> Dispatch:
    """Batch axes are independent sorts here, where the public function takes all leading axes for tokens."""
    sort = partial(reference.expert_dispatch, num_experts=num_experts)
    for _ in range(expert_ids.ndim - 2):
        sort = jax.vmap(sort)
    return sort(expert_ids)


def _result_types(avals: dict[str, Any], *, num_experts: int) -> list[Result]:
    tokens, k = avals["expert_ids"].shape[-2:]
    return [
        Result((tokens * k,), jnp.int32),
        Result((tokens, k), jnp.int32),
        Result((num_experts,), jnp.int32),
    ]


def _unsupported(platform: str, avals: dict[str, Any], *, num_experts: int) -> str | None:
    return unsupported_selection(platform, num_experts, 1)


def _workspace(platform: str, avals: dict[str, Any], *, num_experts: int) -> int | None:
    """Counts of one sort, where one kernel counts for another. A sort whose size is open may be the longest."""
    if platform != "cuda":
        return None
    *batch, tokens, k = avals["expert_ids"].shape
    sorts = prod(batch) if all(isinstance(size, int) for size in batch) else 1
    tokens = tokens if isinstance(tokens, int) else (2**31 - 1) // k
    sizes = {"batch": sorts, "tokens": tokens, "k": k, "experts": num_experts}
    return -(-native_module(platform).workspace_bytes("expert_dispatch", **sizes) // max(sorts, 1))


_EXPERT_DISPATCH = Op(
    name="expert_dispatch",
    operands={"expert_ids": Operand(2)},
    results=("token_index", "slot", "group_sizes", "workspace?"),
    workspace=_workspace,
    result_types=_result_types,
    reference=_reference,
    attributes={"num_experts": int},
    unsupported=_unsupported,
)
