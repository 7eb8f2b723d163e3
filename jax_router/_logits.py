"""The logits of a router: the product of hidden states and the weight of its gate."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from ._sharding import product_sharding, shard_last_axis_as


def router_logits(
    x: Array, weight: Array, logit_bias: Array | None = None, *, precision: lax.PrecisionLike = None
) -> Array:
    """`x @ weight.T + logit_bias` in f32; of f32 operands to f32 accuracy unless `precision` asks for less."""
    if precision is None and x.dtype == jnp.float32:
        precision = lax.Precision.HIGHEST
    logits = lax.dot_general(
        x,
        weight,
        (((x.ndim - 1,), (1,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
        out_sharding=product_sharding(x, weight),
    )
    return logits if logit_bias is None else logits + shard_last_axis_as(logits, logit_bias)
