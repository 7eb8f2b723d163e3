"""Ids and lengths of any integer dtype, as the int32 that the ops compute with."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array

from ._check import as_array


def as_int32_ids(ids: Any, bound: Any) -> Array:
    """ids as int32. One outside `[0, bound)` may become -1, and does where int32 cannot hold it.

    Narrow ids are cast first: int8 has no bound of 256 to compare with, and uint8 no -1.
    """
    ids = as_array(ids)
    if _fits_int32(ids):
        return ids.astype(jnp.int32)
    # A 64-bit dtype, or uint32, which can hold every bound.
    return jnp.where((ids >= 0) & (ids < jnp.asarray(bound, ids.dtype)), ids.astype(jnp.int32), -1)


def as_int32_lengths(lengths: Any, limit: int) -> Array:
    """Lengths as int32, clamped to `[0, limit]`."""
    lengths = as_array(lengths)
    if _fits_int32(lengths):
        return jnp.clip(lengths.astype(jnp.int32), 0, jnp.asarray(limit, jnp.int32))
    return jnp.clip(lengths, 0, jnp.asarray(limit, lengths.dtype)).astype(jnp.int32)


def _fits_int32(values: Array) -> bool:
    return bool(jnp.iinfo(values.dtype).max <= jnp.iinfo(jnp.int32).max)
