"""A layer of experts in two ways: of the ops of this package, and as JAX users write it without them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from . import reference
from ._dense_router import dense_router
from ._expert_dispatch import expert_dispatch
from ._permute import combine, permute
from ._shapes import with_rank
from ._types import Routing


class Weights(NamedTuple):
    """Of E experts from D to F and back, with SwiGLU between: the first half of `w_in`'s columns are the gates."""

    w_in: Array  # [E, D, 2 F]
    w_out: Array  # [E, F, D]


@dataclasses.dataclass(frozen=True)
class Way:
    """How a layer is written.

    Attributes:
        route: from hidden states, gate and biases to a Routing.
        sort: from expert ids `[N, k]` and E to the place of every choice, with `group_sizes`.
        permute: hidden states and places to rows.
        combine: rows, places and weights to hidden states.
        product: rows, weights of experts and group sizes to rows.
    """

    route: Callable[..., Routing]
    sort: Callable[[Array, int], Any]
    permute: Callable[[Array, Any], Array]
    combine: Callable[[Array, Any, Array], Array]
    product: Callable[..., Array]

    def layer(self, x: Array, gate: Array, experts: Weights, **biases: Array) -> Array:
        with jax.named_scope("route"):
            weights, expert_ids = self.route(x, gate, **biases)
        with jax.named_scope("dispatch"):
            places = self.sort(expert_ids, len(gate))
        with jax.named_scope("permute"):
            rows = self.permute(x, places)
        results = swiglu(self.product, experts, rows, places.group_sizes)
        with jax.named_scope("combine"):
            return self.combine(results, places, weights)


def swiglu(product: Callable[..., Array], experts: Weights, rows: Array, group_sizes: Array) -> Array:
    """The experts alone, from rows to rows."""
    with jax.named_scope("experts"):
        inner = product(rows, experts.w_in, group_sizes)
    with jax.named_scope("swiglu"):
        gates, values = jnp.split(inner, 2, axis=-1)
        inner = jax.nn.silu(gates) * values
    with jax.named_scope("experts"):
        return product(inner, experts.w_out, group_sizes)


def ours(product: Callable[..., Array], **selection: Any) -> Way:
    """By the ops of this package."""
    return Way(partial(dense_router, **selection), expert_dispatch, permute, combine, product)


class Places(NamedTuple):
    """Where choices go, as plain JAX has it."""

    token: Array  # [N k] of each row
    slot: Array  # [N, k]
    order: Array  # [N k] the choice of each row
    group_sizes: Array


def plain(product: Callable[..., Array], **selection: Any) -> Way:
    """By `lax.top_k`, `argsort` and indexing."""

    def route(x: Array, gate: Array, bias: Array | None = None, logit_bias: Array | None = None) -> Routing:
        logits = plain_logits(x, gate)
        if logit_bias is not None:
            logits += with_rank(logit_bias, logits.ndim)
        return reference.activation_topk(logits, bias, **selection)

    return Way(route, _argsort, _take, _index, product)


def plain_logits(x: Array, weight: Array) -> Array:
    """As a JAX user writes them, to f32 accuracy where the weight is f32. XLA multiplies their cotangent in f32."""
    precision = lax.Precision.HIGHEST if weight.dtype == jnp.float32 else None
    return jnp.einsum(
        "...d,ed->...e", x.astype(weight.dtype), weight, precision=precision, preferred_element_type=jnp.float32
    )


def _argsort(expert_ids: Array, num_experts: int) -> Places:
    order = jnp.argsort(expert_ids.ravel())
    slot = jnp.argsort(order).reshape(expert_ids.shape)
    return Places(order // expert_ids.shape[1], slot, order, jnp.bincount(expert_ids.ravel(), length=num_experts))


def _take(x: Array, places: Places) -> Array:
    return x[places.token]


def _index(results: Array, places: Places, weights: Array) -> Array:
    chosen = results[places.slot].astype(jnp.float32)
    return (chosen * weights[..., None]).sum(axis=1).astype(results.dtype)
