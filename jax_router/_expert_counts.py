"""Counting how often each expert was chosen."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import gcd, prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from . import _check, _sharding, reference
from ._ids import as_int32_ids
from ._native import unsupported_selection, workspace_of_choices
from ._primitive import Op, Operand, Result
from ._types import Implementation


def expert_counts(
    expert_ids: Array,
    num_experts: int,
    *,
    token_mask: Array | None = None,
    axis_name: str | Sequence[str] | None = None,
    implementation: Implementation = "auto",
) -> Array:
    """How often each expert was chosen: the load that balance losses and rules start from.

    `counts[e]` is the number of choices with id e. Choices with an id outside `[0, num_experts)`, -1 among them, and
    those of tokens that the mask excludes count nowhere. Sums of integers are exact: the counts do not depend on how
    the tokens lie on devices.

    Inside `shard_map` a device counts its own tokens; `axis_name` names the mesh axes that split tokens, over which
    the counts are then summed (never averaged). Under `jit` over sharded arrays nothing needs to be named: the counts
    are those of all tokens, and what moves is one all-reduce of `4 num_experts` bytes.

    Args:
        expert_ids: integers `[..., k]`, of N tokens in one or more leading axes; any values. At most 2^31 - 1 in all.
        num_experts: the number of experts.
        token_mask: bool `[...]`; False: the token does not count.
        axis_name: an axis or axes of the surrounding `shard_map`, or of `vmap` with that name, to sum over.
        implementation: `"auto"`, `"native"` or `"reference"`.

    Returns:
        int32 `[num_experts]`.

    Raises:
        TypeError: a wrong dtype, num_experts is no int, or axis_name no string.
        ValueError: a wrong shape or number.
        NameError: there is no such axis here.
        NotImplementedError: `implementation="native"` where no kernel can run.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax_router import expert_counts
        >>> expert_counts(jnp.array([[0, 2], [2, -1], [1, 2]]), 4, token_mask=jnp.array([True, True, False]))
        Array([1, 0, 2, 0], dtype=int32)
    """
    expert_ids = _check.int_array("expert_ids", expert_ids)
    num_experts = _check.static_int("num_experts", num_experts, 1, None)
    _check.choices("expert_ids", expert_ids)
    operands = {"expert_ids": as_int32_ids(expert_ids, num_experts)}
    if token_mask is not None:
        operands["token_mask"] = _check.mask_array("token_mask", token_mask, expert_ids.shape[:-1])
    if axis_name is not None:
        axis_name = _check.axis_names("axis_name", axis_name)
    may_split = _sharding.may_split(expert_ids) and all(isinstance(size, int) for size in expert_ids.shape)
    as_problems = _as_parts if may_split else _as_one_problem
    operands = {name: as_problems(value, expert_ids.ndim - 1) for name, value in operands.items()}
    (counts,) = _EXPERT_COUNTS(operands, num_experts=num_experts, implementation=_check.implementation(implementation))
    if counts.ndim > 1:
        counts = counts.sum(axis=tuple(range(counts.ndim - 1)), dtype=jnp.int32)
    return counts if axis_name is None else lax.psum(counts, axis_name)


def _as_one_problem(value: Array, token_axes: int) -> Array:
    return value.reshape(prod(value.shape[:token_axes]), *value.shape[token_axes:])


def _as_parts(value: Array, token_axes: int) -> Array:
    """Where XLA may split the tokens over devices: as problems that it can split, and whose counts it then sums.

    That is over the leading axes and over parts of the last axis of tokens, as many as there are devices, or as divide
    both: so each device counts the tokens that it has.
    """
    last = value.shape[token_axes - 1]
    return _sharding.split_axis(value, token_axes - 1, max(gcd(last, jax.device_count()), 1))


def _reference(expert_ids: Array, token_mask: Array | None = None, *, num_experts: int) -> list[Array]:
    """Batch axes are independent problems here, where the public function takes all leading axes for tokens."""
    count = partial(reference.expert_counts, num_experts=num_experts)
    for _ in range(expert_ids.ndim - 2):
        count = jax.vmap(count)
    return [count(expert_ids) if token_mask is None else count(expert_ids, token_mask=token_mask)]


def _result_types(avals: dict[str, Any], *, num_experts: int) -> list[Result]:
    return [Result((num_experts,), jnp.int32)]


def _unsupported(platform: str, avals: dict[str, Any], *, num_experts: int) -> str | None:
    return unsupported_selection(platform, num_experts, 1)


def _workspace(platform: str, avals: dict[str, Any], *, exported: bool, num_experts: int) -> int | None:
    return workspace_of_choices("expert_counts", platform, avals["expert_ids"], num_experts, exported=exported)


_EXPERT_COUNTS = Op(
    name="expert_counts",
    operands={"expert_ids": Operand(2), "token_mask": Operand(1, optional=True)},
    results=("counts", "workspace?"),
    workspace=_workspace,
    result_types=_result_types,
    reference=_reference,
    attributes={"num_experts": int},
    unsupported=_unsupported,
)
