"""Routing from hidden states: the gate product, and the selection from its logits."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from . import _check, reference
from ._activation_topk import select, selection_operands
from ._types import GroupScore, Implementation, Routing, ScoreFn


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
    num_groups: int = 1,
    top_groups: int = 1,
    group_score: GroupScore = "top2_sum",
    token_mask: Array | None = None,
    implementation: Implementation = "auto",
) -> Routing:
    """The experts of each token from its hidden state: `activation_topk(x @ weight.T + logit_bias, bias, ...)`.

    The product is XLA's, accumulated in f32; the selection is the kernel of `activation_topk`.

    Args:
        x: f32, bf16 or f16 `[..., D]`.
        weight: `[E, D]`, as checkpoints have it, in the dtype of `x`.
        bias: f32 `[E]` or `[..., E]`; it steers the selection only, and gets no gradient.
        top_k: the number of experts a token.
        logit_bias: f32 `[E]`, part of the logits (gpt-oss has one).
        precision: of the product, as in `jax.lax.dot_general`. None multiplies f32 operands to f32 accuracy.
        score_fn: see `activation_topk`, as for all options down to `token_mask`.
        renormalize: whether the weights of a token are divided by their sum.
        scale: a Python number that all weights are multiplied by.
        num_groups: the number of groups of experts.
        top_groups: how many groups stay eligible.
        group_score: `"top2_sum"` or `"max"`.
        token_mask: bool `[...]`; where False the ids are -1 and the weights 0.
        implementation: of the selection: `"auto"`, `"native"` or `"reference"`.

    Returns:
        `Routing(weights, expert_ids)`: f32 `[..., top_k]` and int32 `[..., top_k]`.

    Differentiable in `x`, `weight` and `logit_bias`, through the weights.

    Raises:
        TypeError: an operand has a wrong dtype, or an option a wrong type.
        ValueError: a wrong shape or option.
        NotImplementedError: `implementation="native"` where no kernel can run.
    """
    operands = product_operands(x, weight, logit_bias)
    num_experts = operands["weight"].shape[0]
    selection_inputs, selection = selection_operands(
        (*operands["x"].shape[:-1], num_experts),
        bias,
        token_mask,
        top_k=top_k,
        score_fn=score_fn,
        renormalize=renormalize,
        scale=scale,
        num_groups=num_groups,
        top_groups=top_groups,
        group_score=group_score,
    )
    if _check.implementation(implementation) == "reference":
        return reference.dense_router(
            **operands, **selection_inputs, precision=precision, **dataclasses.asdict(selection)
        )
    logits = reference.router_logits(**operands, precision=precision)
    return select({"logits": logits, **selection_inputs}, selection, implementation)


def product_operands(x: Any, weight: Any, logit_bias: Any) -> dict[str, Any]:
    """The checked operands of the product."""
    x = _check.float_array("x", x)
    weight = _check.float_array("weight", weight)
    if weight.ndim != 2 or weight.shape[0] < 1 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"weight must have shape (num_experts, {x.shape[-1]}), as x has {x.shape}; got {weight.shape}")
    if weight.dtype != x.dtype:
        raise TypeError(f"weight must have the dtype of x, {x.dtype}, got {weight.dtype}: cast one of them")
    if logit_bias is not None:
        logit_bias = jnp.asarray(logit_bias)
        if logit_bias.dtype != np.float32:
            raise TypeError(f"logit_bias must have dtype float32, got {logit_bias.dtype}")
        _check.same_shape("logit_bias", logit_bias, weight.shape[:1])
    return {"x": x, "weight": weight, "logit_bias": logit_bias}
