"""Sorting tokens by expert."""

from __future__ import annotations

from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from . import _check, _sharding, reference
from ._ids import as_int32_ids
from ._native import unsupported_selection, workspace_of_choices
from ._primitive import Op, Operand, Result
from ._shapes import dispatch_slots, numbers
from ._types import Dispatch, Implementation

# For `jax.checkpoint_policies.save_only_these_names`.
_DISPATCH = "jax_router.dispatch"


def expert_dispatch(
    expert_ids: Array,
    num_experts: int,
    *,
    align: int = 1,
    capacity: int | None = None,
    implementation: Implementation = "auto",
) -> Dispatch:
    """Sorts all choices by expert, stably, into slots.

    The slots of one expert lie together, in token order, so that `x[token_index]` with `group_sizes` feeds
    `jax.lax.ragged_dot`. With `align` every group begins at a multiple of it and has a multiple of it of slots, as
    grouped matrix products in tiles want them; `block_experts` says whose each tile is. To combine: `y[slot]` are a
    token's results, where `slot >= 0`.

    Slots without a choice, behind the choices of a group and behind the last group, hold token -1. (JAX takes an index
    of -1 for the last row: what such a slot's row holds is no token's, and nobody's slot.) A choice has slot -1 where
    its id is outside `[0, num_experts)` (masked tokens, null experts, experts of other devices), or its expert has
    `capacity` choices before it in token order.

    There are S slots, the smallest multiple of `align` that suffices whatever the ids are: with `M = N k` choices and
    `G = min(num_experts, M)`, `S = align * (G + min((M - G) // align, G * ((capacity - 1) // align)))`, which is M with
    the defaults, and at most `M + num_experts * (align - 1)`; 0 where `capacity` is.

    Under `jax.checkpoint` the results have the name `"jax_router.dispatch"`. With the policy
    `jax.checkpoint_policies.save_only_these_names("jax_router.dispatch")` they are kept for the backward pass, which
    then neither sorts again nor can sort in another way, should the recomputed logits round differently.

    Args:
        expert_ids: integers `[..., k]`, of N tokens in one or more leading axes; any values. At most 2^31 - 1 in all.
        num_experts: the number of experts.
        align: what every group's begin and size are a multiple of.
        capacity: how many choices an expert takes at most. None is no limit, 0 drops all.
        implementation: `"auto"`, `"native"` or `"reference"`.

    Returns:
        `Dispatch(token_index, slot, group_sizes)`: int32 `[S]`, `[..., k]` and `[num_experts]`.

    Raises:
        TypeError: a wrong dtype, or num_experts, align or capacity is no int.
        ValueError: a wrong shape or number, or more than 2^31 - 1 slots.
        NotImplementedError: `implementation="native"` where no kernel can run.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax_router import expert_dispatch
        >>> expert_ids = jnp.array([[1, 0], [0, 2], [1, -1]])  # two choices for each of three tokens
        >>> token_index, slot, group_sizes = expert_dispatch(expert_ids, 3)
        >>> token_index
        Array([ 0,  1,  0,  2,  1, -1], dtype=int32)
        >>> slot
        Array([[ 2,  0],
               [ 1,  4],
               [ 3, -1]], dtype=int32)
        >>> group_sizes
        Array([2, 2, 1], dtype=int32)
        >>> expert_dispatch(expert_ids, 3, align=2).token_index
        Array([ 0,  1,  0,  2,  1, -1, -1, -1], dtype=int32)
    """
    expert_ids = _check.int_array("expert_ids", expert_ids)
    num_experts = _check.static_int("num_experts", num_experts, 1, None)
    align = _check.concrete_int("align", align, 1)
    if capacity is not None:
        capacity = _check.concrete_int("capacity", capacity, 0)
    choices = _check.choices("expert_ids", expert_ids)
    slots = dispatch_slots(choices, num_experts, align, capacity)
    if isinstance(slots, int) and slots > _check.MAX_SIZE:
        raise ValueError(
            f"align = {align} with num_experts = {num_experts} and expert_ids of shape {expert_ids.shape} needs "
            f"{slots} slots; there must be at most 2^31 - 1 = {_check.MAX_SIZE}, which int32 numbers"
        )
    expert_ids = as_int32_ids(expert_ids, num_experts)
    (whole,) = _sharding.align([expert_ids], [expert_ids.ndim])
    tokens = whole.reshape(prod(whole.shape[:-1]), whole.shape[-1])
    results = _EXPERT_DISPATCH(
        {"expert_ids": tokens},
        num_experts=num_experts,
        align=align,
        capacity=_check.MAX_SIZE if capacity is None else capacity,
        implementation=_check.implementation(implementation),
    )
    token_index, slot, group_sizes = checkpoint_name(results, _DISPATCH)
    return Dispatch(token_index, slot.reshape(expert_ids.shape), group_sizes)


def block_experts(dispatch: Dispatch, align: int) -> Array:
    """The expert of every block of `align` slots, as the tiles of a grouped matrix product want to know it.

    Args:
        dispatch: of `expert_dispatch` with this `align`, or with a multiple of it.
        align: the slots of a block; divides their number.

    Returns:
        int32 `[S // align]`: `[0, num_experts)`, -1 behind the last group.

    Raises:
        TypeError: dispatch is none, or align is no int.
        ValueError: align is below 1, or does not divide the number of slots.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax_router import block_experts, expert_dispatch
        >>> dispatch = expert_dispatch(jnp.array([[2], [0], [2], [2]]), 3, align=2)
        >>> dispatch.token_index, dispatch.group_sizes
        (Array([ 1, -1,  0,  2,  3, -1], dtype=int32), Array([2, 0, 4], dtype=int32))
        >>> block_experts(dispatch, 2)
        Array([0, 2, 2], dtype=int32)
    """
    _check.instance("dispatch", dispatch, Dispatch, "expert_dispatch(expert_ids, num_experts)")
    align = _check.concrete_int("align", align, 1)
    token_index = _check.int_array("dispatch.token_index", dispatch.token_index, min_rank=1)
    group_sizes = _check.int_array("dispatch.group_sizes", dispatch.group_sizes, min_rank=1)
    group_sizes = group_sizes.astype(jnp.int32)  # a narrow dtype does not hold their sums
    slots, num_experts = token_index.shape[-1], group_sizes.shape[-1]
    if isinstance(slots, int) and slots % align:
        raise ValueError(f"align must divide the {slots} slots of the dispatch, got {align}")
    ends = jnp.cumsum(group_sizes, axis=-1)
    first = numbers(slots // align, ends.ndim + 1) * align
    # As many groups as end before a block are before it; one comparison of each with each is one fusion.
    expert = (ends[..., :, None] <= first).sum(axis=-2, dtype=jnp.int32)
    return jnp.where(expert == num_experts, -1, expert)


def _reference(expert_ids: Array, *, num_experts: int, align: int, capacity: int) -> Dispatch:
    """Batch axes are independent sorts here, where the public function takes all leading axes for tokens."""
    sort = partial(
        reference.expert_dispatch, num_experts=num_experts, align=align, capacity=_capacity_or_none(capacity)
    )
    for _ in range(expert_ids.ndim - 2):
        sort = jax.vmap(sort)
    return sort(expert_ids)


def _capacity_or_none(capacity: int) -> int | None:
    """The primitive's capacity, which is always a number, as the public function takes it."""
    return None if capacity == _check.MAX_SIZE else capacity


def _result_types(avals: dict[str, Any], *, num_experts: int, align: int, capacity: int) -> list[Result]:
    tokens, k = avals["expert_ids"].shape[-2:]
    return [
        Result((dispatch_slots(tokens * k, num_experts, align, _capacity_or_none(capacity)),), jnp.int32),
        Result((tokens, k), jnp.int32),
        Result((num_experts,), jnp.int32),
    ]


def _unsupported(platform: str, avals: dict[str, Any], *, num_experts: int, **layout: int) -> str | None:
    return unsupported_selection(platform, num_experts, 1)


def _workspace(platform: str, avals: dict[str, Any], *, exported: bool, num_experts: int, **layout: int) -> int | None:
    return workspace_of_choices("expert_dispatch", platform, avals["expert_ids"], num_experts, exported=exported)


_EXPERT_DISPATCH = Op(
    name="expert_dispatch",
    operands={"expert_ids": Operand(2)},
    results=("token_index", "slot", "group_sizes", "workspace?"),
    workspace=_workspace,
    result_types=_result_types,
    reference=_reference,
    attributes={"num_experts": int, "align": int, "capacity": int},
    unsupported=_unsupported,
)
