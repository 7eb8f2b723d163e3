"""Routers that are a few lines around the ops: what some models do, and no option of RouterConfig is.

Every function is compared with its formula in the tests. All of them differentiate and run under jit.
"""

import jax
import jax.numpy as jnp
from jax import Array

from jax_router import Router, Routing, activation_topk, dense_router, route_at, topk_select


def route_by_modality(text: Router, vision: Router, x: Array, is_vision: Array) -> Routing:
    """A router for each kind of token (ERNIE-4.5-VL): two calls, and what belongs to each token.

    The experts of vision come after those of text: their ids begin at the number of experts of `text`.
    """
    for_text = text(x, token_mask=~is_vision)
    for_vision = vision(x, token_mask=is_vision)
    of_vision = is_vision[..., None]
    return Routing(
        jnp.where(of_vision, for_vision.weights, for_text.weights),
        jnp.where(of_vision, for_vision.expert_ids + text.config.num_experts, for_text.expert_ids),
    )


def route_with_bias_by_kind(router: Router, image_bias: Array, x: Array, is_image: Array) -> Routing:
    """A selection bias for each kind of token (DeepSeek-V4-Flash-Vision): a bias a token, `[..., E]`."""
    bias = jnp.where(is_image[..., None], image_bias, router.bias[...])
    return dense_router(x, router.weight[...], bias, **router.config.selection)


def document_pools(scores: Array, documents: Array, num_documents: int, pool_size: int) -> Array:
    """Which experts each token may use, bool `[N, E]`: the best of its document by the sum of scores (OLMoE3)."""
    sums = jax.ops.segment_sum(scores, documents, num_documents)
    _, pools = topk_select(sums, pool_size)
    in_pool = jax.nn.one_hot(pools, scores.shape[-1], dtype=jnp.bool_).any(axis=-2)
    return in_pool[documents]


def route_in_pool(logits: Array, in_pool: Array, *, top_k: int, **options) -> Routing:
    """The best experts of a pool, which has at least `top_k`: a bias a token of 0, or of -inf outside."""
    return activation_topk(logits, jnp.where(in_pool, 0.0, -jnp.inf), top_k=top_k, **options)


def choose_in_groups(
    keys: Array, *, num_groups: int, top_groups: int, top_k: int, best_of: int = 2, outside: float = -jnp.inf
) -> Array:
    """Experts `[..., k]` from groups that are scored by the sum of their `best_of` best keys; then `route_at`.

    Keys are scores with a bias, or logits (Megatron-LM, softmax after the selection). Where losing groups are masked
    with 0 (the code of DeepSeek-V2, A.X-K2 and Mistral-4), `outside=0.0`: their experts then come before those of
    winning groups whose keys are negative.
    """
    grouped = keys.reshape(*keys.shape[:-1], num_groups, -1)
    best, _ = topk_select(grouped, best_of)
    _, groups = topk_select(best.sum(axis=-1), top_groups)
    eligible = jax.nn.one_hot(groups, num_groups, dtype=jnp.bool_).any(axis=-2)
    _, expert_ids = topk_select(jnp.where(eligible[..., None], grouped, outside).reshape(keys.shape), top_k)
    return expert_ids


def route_with_shared_experts(
    logits: Array, bias: Array, num_shared: int, *, top_k: int, scale: Array | float
) -> tuple[Routing, Array]:
    """Weights that sum to the scale over chosen and shared experts (Inkling): the routing, and the shared weights.

    The last `num_shared` logits are those of the shared experts, which all tokens have; `scale` may be trained.
    """
    experts = logits.shape[-1] - num_shared
    chosen = activation_topk(logits[..., :experts], bias, top_k=top_k, score_fn="sigmoid").expert_ids
    shared = jnp.broadcast_to(jnp.arange(experts, experts + num_shared), (*chosen.shape[:-1], num_shared))
    weights, _ = route_at(logits, jnp.concatenate([chosen, shared], axis=-1), score_fn="sigmoid", eps=0.0)
    weights = weights * scale
    return Routing(weights[..., :top_k], chosen), weights[..., top_k:]


def with_clamped_sum(routing: Routing, least: float = 1e-12) -> Routing:
    """Weights over the larger one of their sum and a least sum (ERNIE-4.5), from a router with `renormalize=False`."""
    total = routing.weights.sum(axis=-1, keepdims=True)
    return routing._replace(weights=routing.weights / jnp.maximum(total, least))


def route_among_many(logits: Array, top_k: int) -> Routing:
    """Softmax over the chosen, natively for any number of experts (Doge has 16384; `activation_topk` takes 4096)."""
    chosen, expert_ids = topk_select(logits, top_k)
    return Routing(jax.nn.softmax(chosen.astype(jnp.float32), axis=-1), expert_ids)


def keep_plausible(router: Router, x: Array, recorded: Array, least: float) -> Array:
    """Recorded experts `[..., k]` for a replay; -1 for each whose score is below `least` times the weakest own choice.

    Those are experts that this router would hardly choose: the router has moved since they were recorded.
    """
    own, logits = router(x, return_logits=True)
    score_fn = router.config.score_fn
    of_own = route_at(logits, own.expert_ids, score_fn=score_fn, renormalize=False).weights
    of_recorded = route_at(logits, recorded, score_fn=score_fn, renormalize=False).weights
    weakest = of_own.min(axis=-1, keepdims=True)
    return jnp.where(of_recorded >= least * weakest, recorded, -1)
