"""Argument checks at trace time. Every message names the argument, what it got and what it takes."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, get_args

import jax.numpy as jnp
import numpy as np
from jax import Array

from ._types import GroupScore, Implementation, ScoreFn, Scoring, Selection

_FLOATS = (jnp.float32, jnp.bfloat16, jnp.float16)


def float_array(name: str, value: Any, *, min_rank: int = 1) -> Array:
    """An f32, bf16 or f16 array of at least `min_rank` axes."""
    array = jnp.asarray(value)
    if array.dtype not in _FLOATS:
        hint = " (cast it, for example with .astype(jnp.float32))" if array.dtype == np.float64 else ""
        raise TypeError(f"{name} must have dtype float32, bfloat16 or float16{hint}, got {array.dtype}")
    _rank(name, array, min_rank)
    return array


def int_array(name: str, value: Any, *, min_rank: int = 0) -> Array:
    """An array of any integer dtype; bool does not count as one."""
    array = jnp.asarray(value)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"{name} must have an integer dtype, got {array.dtype}")
    _rank(name, array, min_rank)
    return array


def mask_array(name: str, value: Any, shape: Sequence[int]) -> Array:
    array = jnp.asarray(value)
    if array.dtype != jnp.bool_:
        raise TypeError(f"{name} must have dtype bool, got {array.dtype}")
    same_shape(name, array, shape)
    return array


def _rank(name: str, array: Array, min_rank: int) -> None:
    if array.ndim < min_rank:
        raise ValueError(f"{name} must have at least {min_rank} axes, got shape {array.shape}")


def same_shape(name: str, array: Array, shape: Sequence[int]) -> None:
    if array.shape != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {array.shape}")


def selection_bias(name: str, value: Any, logits_shape: Sequence[int]) -> Array:
    """An f32 bias, one for all tokens `[E]` or one a token."""
    array = jnp.asarray(value)
    if array.dtype != jnp.float32:
        raise TypeError(f"{name} must have dtype float32, got {array.dtype}")
    if array.shape not in (tuple(logits_shape[-1:]), tuple(logits_shape)):
        raise ValueError(
            f"{name} must have shape {tuple(logits_shape[-1:])} (num_experts) or, one bias a token, "
            f"{tuple(logits_shape)}; got {array.shape}"
        )
    return array


def static_int(name: str, value: Any, low: int, high: int | None, meaning: str = "") -> int:
    """A Python integer in `[low, high]`."""
    try:
        number = operator.index(value)
    except Exception as error:
        raise TypeError(f"{name} must be a Python int (it decides shapes), got {value!r}") from error
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if number < low or (high is not None and number > high):
        limits = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ValueError(f"{name} must be {limits}{meaning}, got {number}")
    return number


def static_float(name: str, value: Any) -> float:
    try:
        number = float(value)
    except Exception as error:
        raise TypeError(f"{name} must be a Python number, got {value!r}") from error
    if not np.isfinite(number):
        raise ValueError(f"{name} must be finite, got {number}")
    return number


def static_bool(name: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def choice(name: str, value: Any, choices: Sequence[str]) -> str:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")
    return value


def implementation(value: Any) -> str:
    return choice("implementation", value, get_args(Implementation))


def scoring(score_fn: Any, renormalize: Any, scale: Any) -> Scoring:
    """A Scoring of checked options."""
    return Scoring(
        score_fn=choice("score_fn", score_fn, get_args(ScoreFn)),
        renormalize=static_bool("renormalize", renormalize),
        scale=static_float("scale", scale),
    )


def selection(
    num_experts: int, *, top_k: Any, num_groups: Any, top_groups: Any, group_score: Any, **scoring_options: Any
) -> Selection:
    """A Selection among `num_experts`, of checked options."""
    num_groups = static_int("num_groups", num_groups, 1, num_experts, " (num_experts)")
    top_groups = static_int("top_groups", top_groups, 1, num_groups, " (num_groups)")
    group_score = choice("group_score", group_score, get_args(GroupScore))
    if num_experts % num_groups:
        raise ValueError(f"num_groups must divide num_experts = {num_experts}, got {num_groups}")
    experts_a_group = num_experts // num_groups
    if num_groups > 1 and group_score == "top2_sum" and experts_a_group < 2:
        raise ValueError(
            f"group_score='top2_sum' needs at least 2 experts a group, got num_experts = {num_experts} in num_groups = "
            f"{num_groups}; use group_score='max'"
        )
    eligible = top_groups * experts_a_group
    where = f" (the experts of {top_groups} of {num_groups} groups)" if num_groups > 1 else " (num_experts)"
    return Selection(
        scoring=scoring(**scoring_options),
        top_k=static_int("top_k", top_k, 1, eligible, where),
        num_groups=num_groups,
        top_groups=top_groups,
        group_score=group_score,
    )


def as_int32_ids(ids: Array, bound: int) -> Array:
    """ids as int32. One that int32 cannot hold becomes -1, which is as invalid for every op as it was."""
    if ids.dtype == jnp.int32:
        return ids
    if jnp.iinfo(ids.dtype).max <= jnp.iinfo(jnp.int32).max:
        return ids.astype(jnp.int32)
    return jnp.where((ids >= 0) & (ids < bound), ids.astype(jnp.int32), -1)
