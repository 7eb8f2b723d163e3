"""The logits of a router: the product of hidden states and the weight of its gate."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

from ._product import Axes, bf16_parts, product
from ._routed_product import routed_product
from ._shapes import with_rank
from ._sharding import product_sharding, shard_as, shard_last_axis_as
from ._types import Implementation


def router_logits(
    x: Array,
    weight: Array,
    logit_bias: Array | None = None,
    *,
    precision: lax.PrecisionLike = None,
    token_mask: Array | None = None,
    expert_ids: Array | None = None,
    implementation: Implementation = "reference",
) -> Array:
    """`x @ weight.T + logit_bias` in f32.

    Without a `precision`, f32 operands are multiplied to f32 accuracy, and so are an x in half precision and a weight
    in f32, but for an infinite x, which may give NaN where it should give infinity. With one, x is cast to f32 there.
    So are their derivatives, but for 2^-16 of each product where an operand is bf16.

    What x holds where `token_mask` is False reaches no gradient. The logits there are what they are without the mask.

    With `expert_ids`, the gradient of x is that for a cotangent which is zero but at these ids of each token.
    """
    is_mixed = x.dtype != weight.dtype
    if precision is None and not is_mixed and x.dtype == jnp.float32:
        precision = lax.Precision.HIGHEST
    if token_mask is not None:
        token_mask = shard_as(x, token_mask)
    is_sharded = any(any(jax.typeof(factor).sharding.spec) for factor in (x, weight))
    if is_mixed or is_sharded:
        expert_ids = None  # the gradient is that for any cotangent
    in_parts = is_mixed and precision is None
    logits = _product(x, weight, token_mask, expert_ids, precision, in_parts, implementation)
    return logits if logit_bias is None else logits + with_rank(shard_last_axis_as(logits, logit_bias), logits.ndim)


def _product(x: Array, weight: Array, token_mask: Array | None, expert_ids: Array | None, *options: Any) -> Array:
    precision, in_parts, _ = options
    if token_mask is None and expert_ids is None and not in_parts:
        return _dot(x, weight, precision)
    return _product_with_rule(x, weight, token_mask, expert_ids, *options)


@partial(jax.custom_jvp, nondiff_argnums=(4, 5, 6))
def _product_with_rule(
    x: Array,
    weight: Array,
    token_mask: Array | None,
    expert_ids: Array | None,
    precision: Any,
    in_parts: bool,
    implementation: Implementation,
) -> Array:
    if in_parts:
        # On a CPU one product in f32 is faster than three in bf16.
        return lax.platform_dependent(
            x, weight, cpu=partial(_dot, precision=lax.Precision.HIGHEST), default=_dot_in_parts
        )
    return _dot(x, weight, precision)


@partial(_product_with_rule.defjvp, symbolic_zeros=True)
def _product_jvp(precision, in_parts, implementation, primals, tangents):
    (x, weight, token_mask, expert_ids), (x_dot, weight_dot, *_) = primals, tangents
    logits = _product_with_rule(x, weight, token_mask, expert_ids, precision, in_parts, implementation)
    terms = []
    if not isinstance(x_dot, SymbolicZero):
        if expert_ids is None:
            terms.append(_product(x_dot, weight, token_mask, None, precision, False, implementation))
        else:
            terms.append(routed_product(x_dot, weight, expert_ids, precision, implementation))
    if not isinstance(weight_dot, SymbolicZero):
        # The gradient of the weight sums over tokens, and 0 * NaN is NaN. x is masked when that is computed, not
        # before: else a masked copy of it would wait for the backward pass.
        dot = jax.checkpoint(partial(_dot_of_routed, precision=precision), prevent_cse=False)
        terms.append(dot(x, weight_dot, token_mask))
    return logits, sum(terms[1:], terms[0])


def _dot_of_routed(x: Array, weight: Array, token_mask: Array | None, *, precision: Any) -> Array:
    if token_mask is not None:
        x = jnp.where(token_mask[..., None], x, jnp.zeros((), x.dtype))
    return _dot(x, weight, precision)


def _dot(x: Array, weight: Array, precision: Any) -> Array:
    """`x @ weight.T` in f32; the weight may have axes before that of its experts."""
    axes, out_sharding = Axes(((x.ndim - 1,), (weight.ndim - 1,))), product_sharding(x, weight)
    if precision is None and x.dtype == jnp.bfloat16:
        return product(x, weight, axes, dtype=jnp.float32, out_sharding=out_sharding)
    if x.dtype != weight.dtype:
        x, weight, precision = x.astype(jnp.float32), weight.astype(jnp.float32), precision or lax.Precision.HIGHEST
    return lax.dot_general(
        x, weight, axes, precision=precision, preferred_element_type=jnp.float32, out_sharding=out_sharding
    )


def _dot_in_parts(x: Array, weight: Array) -> Array:
    """The product of x in half precision and a weight in f32, to f32 accuracy, from bf16 products alone.

    bf16 has the exponents of f32 and 8 of its 24 bits: f32 is the sum of three such parts, f16 of two, and their
    products are exact in f32. All of them are one matrix product, with as many times the tokens and experts.
    """
    x_parts = x[None] if x.dtype == jnp.bfloat16 else bf16_parts(x, 2)
    return _dot(x_parts, bf16_parts(weight, 3), None).sum(axis=(0, -2))
