"""Ranks that are spelled out, for `jax_numpy_rank_promotion="raise"`, and the number of slots of a dispatch."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


def with_rank(values: Array, ndim: int) -> Array:
    """The array with leading axes of size 1."""
    return jnp.expand_dims(values, tuple(range(ndim - values.ndim)))


def numbers(size: Any, ndim: int) -> Array:
    """int32 0, 1, ... in the last of `ndim` axes, the others of size 1."""
    return with_rank(jnp.arange(size, dtype=jnp.int32), ndim)


def dispatch_slots(choices: Any, num_experts: Any, align: int, capacity: int | None) -> Any:
    """The slots of a dispatch, of symbolic sizes too: the smallest multiple of `align` that suffices for any ids.

    Most are needed where every group has a choice, which opens the first `align` slots of it, and the other choices
    open as many more as they can, while there is room for one in a group.
    """
    if align == 1 and capacity is None:
        return choices
    if capacity == 0:
        return 0
    groups = jax.core.min_dim(num_experts, choices)
    more = (choices - groups) // align
    if capacity is not None:
        more = jax.core.min_dim(more, groups * ((capacity - 1) // align))
    return align * (groups + more)
