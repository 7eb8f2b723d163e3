"""Ranks that are spelled out: the ops run under `jax_numpy_rank_promotion="raise"`."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array


def with_rank(values: Array, ndim: int) -> Array:
    """The array with leading axes of size 1."""
    return jnp.expand_dims(values, tuple(range(ndim - values.ndim)))


def numbers(size: Any, ndim: int) -> Array:
    """int32 0, 1, ... in the last of `ndim` axes, the others of size 1."""
    return with_rank(jnp.arange(size, dtype=jnp.int32), ndim)
