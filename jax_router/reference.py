"""Every op in plain jax.numpy: the specification, the oracle of the tests, and what runs where there is no kernel.

The functions take what the public ones take (without `implementation`) and return the same; arguments are validated
by the public functions alone, which also reshard those of meshes with Explicit axes. All arithmetic is f32 after the
load.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

from . import _slots
from ._ids import as_int32_ids, as_int32_lengths
from ._logits import router_logits
from ._shapes import dispatch_slots, numbers, with_rank
from ._types import Dispatch, GroupScore, Routing, ScoreFn


def sqrtsoftplus(x: Array) -> Array:
    """`sqrt(max(x, 0) + log1p(exp(-|x|)))`, accurate for every x, and so is its derivative.

    With `h = exp(-|x| / 2)` and `u = h**2`, the score of a negative x is `h * sqrt(log1p(u) / u)`: it does not vanish
    before `exp(x / 2)` itself underflows. `log1p(u) / u` is `1 - u / 2` to f32 where u is small.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax_router.reference import sqrtsoftplus
        >>> sqrtsoftplus(jnp.float32(-100)) > 0
        Array(True, dtype=bool)
    """
    return _sqrtsoftplus(x)


@jax.custom_jvp
def _sqrtsoftplus(x: Array) -> Array:
    h, _, radicand = _sqrtsoftplus_parts(x)
    return jnp.where(x < 0, h * jnp.sqrt(radicand), jnp.sqrt(radicand))


@_sqrtsoftplus.defjvp
def _sqrtsoftplus_jvp(primals, tangents):
    (x,), (x_dot,) = primals, tangents
    return _sqrtsoftplus(x), _sqrtsoftplus_derivative(x) * x_dot


@jax.custom_jvp
def _sqrtsoftplus_derivative(x: Array) -> Array:
    # sigmoid(x) / (2 * score), with the factor h that both have for a negative x cancelled.
    h, u, radicand = _sqrtsoftplus_parts(x)
    return jnp.where(x < 0, h, 1.0) / (2 * (1 + u) * jnp.sqrt(radicand))


@_sqrtsoftplus_derivative.defjvp
def _sqrtsoftplus_derivative_jvp(primals, tangents):
    # The derivative of its logarithm, which is 1 - sigmoid(x) - sigmoid(x) / (2 * score**2).
    (x,), (x_dot,) = primals, tangents
    derivative = _sqrtsoftplus_derivative(x)
    _, u, radicand = _sqrtsoftplus_parts(x)
    return derivative, derivative * ((jnp.where(x < 0, 1.0, u) - 0.5 / radicand) / (1 + u)) * x_dot


def _sqrtsoftplus_parts(x: Array) -> tuple[Array, Array, Array]:
    # Each side of 0 by its own smooth formula, and 0 by that of x > 0: so derivatives of every order are right there,
    # where those of abs and maximum are not.
    h = jnp.exp(-0.5 * _absolute(x))
    u = h * h
    log1p_over_u = jnp.where(u < 1e-4, 1 - 0.5 * u, jnp.log1p(u) / jnp.where(u < 1e-4, 1.0, u))
    return h, u, jnp.where(x < 0, log1p_over_u, jnp.where(x < 0, 0.0, x) + u * log1p_over_u)


def _absolute(x: Array) -> Array:
    return jnp.where(x < 0, -x, x)


def sigmoid(x: Array) -> Array:
    """`1 / (1 + exp(-x))`, accurate for every x, and so is its derivative.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jax_router.reference import sigmoid
        >>> jax.grad(sigmoid)(jnp.float32(30)) > 0
        Array(True, dtype=bool)
    """
    return _sigmoid(x)


@jax.custom_jvp
def _sigmoid(x: Array) -> Array:
    return jax.nn.sigmoid(x)


@_sigmoid.defjvp
def _sigmoid_jvp(primals, tangents):
    # Not s (1 - s): above logits of 17, s is 1.
    (x,), (x_dot,) = primals, tangents
    e = jnp.exp(-_absolute(x))
    return _sigmoid(x), e / ((1 + e) * (1 + e)) * x_dot


def softmax(x: Array) -> Array:
    """`exp(x) / sum(exp(x))` over the last axis; 0 for a row of -inf alone, NaN for a row with +inf.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax_router.reference import softmax
        >>> softmax(jnp.array([[0.0, 0.0], [-jnp.inf, -jnp.inf]]))
        Array([[0.5, 0.5],
               [0. , 0. ]], dtype=float32)
    """
    lowest = jnp.finfo(jnp.float32).min
    numerator = jnp.exp(x - lax.stop_gradient(jnp.max(x, axis=-1, keepdims=True, initial=lowest)))
    total = jnp.sum(numerator, axis=-1, keepdims=True)
    return numerator / jnp.where(total == 0, 1.0, total)


_SCORE_FNS = {"sqrtsoftplus": sqrtsoftplus, "sigmoid": sigmoid, "softmax": softmax, "identity": lambda x: x}


def hash_router(token_ids: Array, hash_lut: Array, *, scale: float = 1.0) -> Routing:
    """See `jax_router.hash_router`."""
    vocab_size, k = hash_lut.shape
    token_ids = as_int32_ids(token_ids, vocab_size)
    valid = (token_ids >= 0) & (token_ids < vocab_size)
    rows = as_int32_ids(jnp.asarray(hash_lut)[jnp.where(valid, token_ids, 0)], 2**31)
    expert_ids = jnp.where(valid[..., None], rows, -1)
    weights = jnp.where(valid[..., None], jnp.float32(scale) / jnp.float32(k), jnp.float32(0))
    return Routing(jnp.broadcast_to(weights, expert_ids.shape), expert_ids)


def activation_topk(
    logits: Array,
    bias: Array | None = None,
    *,
    top_k: int,
    score_fn: ScoreFn = "sqrtsoftplus",
    renormalize: bool = True,
    scale: float = 1.0,
    eps: float = 1e-20,
    num_groups: int = 1,
    top_groups: int | None = None,
    group_score: GroupScore = "top2_sum",
    token_mask: Array | None = None,
) -> Routing:
    """See `jax_router.activation_topk`."""
    keys = logits = logits.astype(jnp.float32)
    if bias is not None or num_groups > 1:
        keys = _SCORE_FNS[score_fn](logits)
    if bias is not None:
        keys = keys + with_rank(bias, keys.ndim)
    keys = lax.stop_gradient(keys)
    if num_groups > 1:
        assert top_groups is not None, "top_groups must be given with num_groups"
        _, expert_ids = lax.top_k(_eligible_order_keys(keys, num_groups, top_groups, group_score), top_k)
    else:
        _, expert_ids = topk_select(keys, top_k)
    if token_mask is not None:
        expert_ids = jnp.where(token_mask[..., None], expert_ids, -1)
    return route_at(logits, expert_ids, score_fn=score_fn, renormalize=renormalize, scale=scale, eps=eps)


def _eligible_order_keys(keys: Array, num_groups: int, top_groups: int, group_score: str) -> Array:
    """int32 keys in the order of `keys`, and below all of those for an expert outside the `top_groups` best groups."""
    grouped = keys.reshape(*keys.shape[:-1], num_groups, keys.shape[-1] // num_groups)
    best, _ = topk_select(grouped, 2 if group_score == "top2_sum" else 1)
    _, groups = topk_select(best.sum(axis=-1), top_groups)
    eligible = (groups[..., None, :] == numbers(num_groups, groups.ndim)[..., None]).any(axis=-1)
    bits = lax.bitcast_convert_type(jnp.where(jnp.isnan(grouped), jnp.nan, grouped), jnp.int32)
    order = jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return jnp.where(eligible[..., None], order, jnp.iinfo(jnp.int32).min).reshape(keys.shape)


def route_at(
    logits: Array,
    expert_ids: Array,
    *,
    score_fn: ScoreFn = "sqrtsoftplus",
    renormalize: bool = True,
    scale: float = 1.0,
    eps: float = 1e-20,
) -> Routing:
    """See `jax_router.route_at`."""
    num_experts = logits.shape[-1]
    expert_ids = as_int32_ids(expert_ids, num_experts)
    valid = (expert_ids >= 0) & (expert_ids < num_experts)
    expert_ids = jnp.where(valid, expert_ids, -1)
    logits = logits.astype(jnp.float32)
    if score_fn == "softmax" and not renormalize:
        # A row without a valid id (masked, or padding) may hold anything, also for the gradient.
        logits = softmax(jnp.where(valid.any(axis=-1, keepdims=True), logits, 0.0))
    chosen = jnp.take_along_axis(logits, jnp.where(valid, expert_ids, 0), axis=-1)
    weights = weights_of_chosen(chosen, valid, score_fn=score_fn, renormalize=renormalize, scale=scale, eps=eps)
    return Routing(weights, expert_ids)


def scored_hash_router(
    logits: Array,
    token_ids: Array,
    hash_lut: Array,
    *,
    score_fn: ScoreFn = "sqrtsoftplus",
    renormalize: bool = True,
    scale: float = 1.0,
    eps: float = 1e-20,
    token_mask: Array | None = None,
) -> Routing:
    """See `jax_router.scored_hash_router`."""
    expert_ids = hash_router(token_ids, hash_lut).expert_ids
    if token_mask is not None:
        expert_ids = jnp.where(token_mask[..., None], expert_ids, -1)
    return route_at(logits, expert_ids, score_fn=score_fn, renormalize=renormalize, scale=scale, eps=eps)


def weights_of_chosen(
    chosen: Array, valid: Array, *, score_fn: str, renormalize: bool, scale: float, eps: float
) -> Array:
    """The weights from the chosen logits `[..., k]` alone (for softmax without renormalize: from their scores).

    An entry that is not valid has weight 0 and does not enter the sum.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax_router.reference import weights_of_chosen
        >>> chosen, valid = jnp.array([2.0, 2.0, 9.0]), jnp.array([True, True, False])
        >>> weights_of_chosen(chosen, valid, score_fn="softmax", renormalize=True, scale=1.0, eps=0.0)
        Array([0.5, 0.5, 0. ], dtype=float32)
    """
    if score_fn == "softmax":
        scores = softmax(jnp.where(valid, chosen, -jnp.inf)) if renormalize else chosen
    else:
        scores = jnp.where(valid, _SCORE_FNS[score_fn](jnp.where(valid, chosen, 0.0)), 0.0)
        if renormalize:
            total = jnp.sum(scores, axis=-1, keepdims=True)
            # Zeros stay zeros; divided by epsilon, their derivatives of second order would overflow.
            scores = _divide(scores, jnp.where(total == 0, 1.0, total + jnp.float32(eps)))
    return jnp.where(valid, scores * jnp.float32(scale), 0.0)


@jax.custom_jvp
def _divide(x: Array, total: Array) -> Array:
    return x / total


@_divide.defjvp
def _divide_jvp(primals, tangents):
    # Without the square of the total, which underflows where all scores of a row do. Exactly 0 where x is the total.
    (x, total), (x_dot, total_dot) = primals, tangents
    quotient = _divide(x, total)
    return quotient, _divide(x_dot - quotient * total_dot, total)


def topk_select(scores: Array, k: int, *, lengths: Array | None = None, sorted: bool = True) -> tuple[Array, Array]:
    """See `jax_router.topk_select`."""
    length = scores.shape[-1]
    # A NaN with the sign bit would sort below -inf. It has a dtype, lest scores without one of their own, as jnp.full
    # makes them, give indices without one.
    scores = jnp.where(jnp.isnan(scores), jnp.asarray(jnp.nan, scores.dtype), scores)
    ordered = lax.stop_gradient(scores)
    if lengths is not None:
        lengths = as_int32_lengths(lengths, length)[..., None]
        ordered = jnp.where(numbers(length, scores.ndim) < lengths, ordered, -jnp.inf)
    _, indices = lax.top_k(ordered, k)
    if lengths is not None:
        # What lies past the end ties with -inf inside the row and comes after it, having the higher indices.
        indices = jnp.where(numbers(k, scores.ndim) < lengths, indices, length)
    if not sorted:
        indices = jnp.sort(indices, axis=-1)
    past_end = indices == length
    values = jnp.take_along_axis(scores, jnp.where(past_end, 0, indices), axis=-1)
    return jnp.where(past_end, -jnp.inf, values), jnp.where(past_end, -1, indices)


def dense_router(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    top_k: int,
    logit_bias: Array | None = None,
    precision: lax.PrecisionLike = None,
    score_fn: ScoreFn = "sqrtsoftplus",
    renormalize: bool = True,
    scale: float = 1.0,
    eps: float = 1e-20,
    num_groups: int = 1,
    top_groups: int | None = None,
    group_score: GroupScore = "top2_sum",
    token_mask: Array | None = None,
) -> Routing:
    """See `jax_router.dense_router`."""
    return activation_topk(
        router_logits(x, weight, logit_bias, precision=precision, token_mask=token_mask),
        bias,
        top_k=top_k,
        score_fn=score_fn,
        renormalize=renormalize,
        scale=scale,
        eps=eps,
        num_groups=num_groups,
        top_groups=top_groups,
        group_score=group_score,
        token_mask=token_mask,
    )


def expert_counts(expert_ids: Array, num_experts: int, *, token_mask: Array | None = None) -> Array:
    """See `jax_router.expert_counts`; the counts of the tokens that are given here, without a sum over named axes."""
    expert_ids = as_int32_ids(expert_ids, num_experts)
    # Not bincount: it would count an id of -1 for expert 0.
    valid = (expert_ids >= 0) & (expert_ids < num_experts)
    if token_mask is not None:
        valid &= token_mask[..., None]
    group = jnp.where(valid, expert_ids, num_experts).reshape(-1)
    return jnp.zeros(num_experts, jnp.int32).at[group].add(1, mode="drop")


def expert_dispatch(expert_ids: Array, num_experts: int, *, align: int = 1, capacity: int | None = None) -> Dispatch:
    """See `jax_router.expert_dispatch`."""
    flat = as_int32_ids(expert_ids, num_experts).reshape(-1)
    group = jnp.where((flat >= 0) & (flat < num_experts), flat, num_experts)
    counts = jnp.zeros(num_experts, jnp.int32).at[group].add(1, mode="drop")
    kept = counts if capacity is None else jnp.minimum(counts, capacity)
    group_sizes = (kept + (align - 1)) // align * align
    # A choice's rank in its group is its place among the sorted choices less that of the group's first one.
    order = jnp.argsort(group, stable=True).astype(jnp.int32)
    choices = jnp.arange(flat.size, dtype=jnp.int32)
    place = jnp.zeros_like(choices).at[order].set(choices, unique_indices=True)
    expert = jnp.minimum(group, num_experts - 1)
    rank = place - (jnp.cumsum(counts) - counts)[expert]
    slot = jnp.where(
        (group < num_experts) & (rank < kept[expert]), (jnp.cumsum(group_sizes) - group_sizes)[expert] + rank, -1
    )
    slots = dispatch_slots(flat.size, num_experts, align, capacity)
    token_index = jnp.full(slots, -1, jnp.int32)
    token_index = token_index.at[jnp.where(slot < 0, slots, slot)].set(choices // expert_ids.shape[-1], mode="drop")
    return Dispatch(token_index, slot.reshape(expert_ids.shape), group_sizes)


def permute(x: Array, dispatch: Dispatch, weights: Array | None = None) -> Array:
    """See `jax_router.permute`."""
    return _slots.permute(x, dispatch, weights, "reference")


def combine(y: Array, dispatch: Dispatch, weights: Array | None = None) -> Array:
    """See `jax_router.combine`."""
    return _slots.combine(y, dispatch, weights, "reference")
