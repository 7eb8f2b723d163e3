"""Routing from hidden states: the gate product and the selection in one call."""

from __future__ import annotations

import dataclasses
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.interpreters import ad

from . import _check, reference
from ._activation_topk import select, selection_operands
from ._derivative import IDENTITY, weights_tangent
from ._limits import native_limits, unsupported_selection
from ._primitive import Op, Operand, Result
from ._route_at import chosen_logits
from ._types import GroupScore, Implementation, Routing, ScoreFn, Selection


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

    The product is accumulated in f32. Where a fused kernel runs, the logits never reach device memory.

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
        implementation: `"auto"`, `"native"` or `"reference"`. Natively, cases that the fused kernels do not take are a
            product by XLA and the `activation_topk` kernel.

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
    operands.update(selection_inputs)
    if _check.implementation(implementation) == "reference":
        return reference.dense_router(**operands, precision=precision, **dataclasses.asdict(selection))
    return Routing(
        *_DENSE_ROUTER(
            operands,
            selection=selection,
            precision=_hashable_precision(precision),
            selection_implementation=implementation,
            return_chosen=False,
        )
    )


def _hashable_precision(precision: Any) -> Any:
    """A pair of precisions may come as a list; the parameters of a primitive are hashable."""
    return tuple(precision) if isinstance(precision, list) else precision


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


def _unfused(
    x: Array,
    weight: Array,
    logit_bias: Array | None = None,
    bias: Array | None = None,
    token_mask: Array | None = None,
    *,
    selection: Selection,
    precision: Any,
    selection_implementation: str,
    return_chosen: bool,
) -> list[Array]:
    logits = reference.router_logits(x, weight, logit_bias, precision=precision)
    routing = select({"logits": logits, "bias": bias, "token_mask": token_mask}, selection, selection_implementation)
    return [*routing, *([chosen_logits(logits, routing.expert_ids)] if return_chosen else [])]


def _results(avals: dict[str, Any], *, selection: Selection, return_chosen: bool, **_: Any) -> list[Result]:
    k = (selection.top_k,)
    return [Result(k, jnp.float32), Result(k, jnp.int32), *([Result(k, jnp.float32)] if return_chosen else [])]


def _unsupported(platform: str, avals: dict[str, Any], *, selection: Selection, precision: Any, **_: Any) -> str | None:
    if precision is not None:
        return "the fused kernels have one precision"
    tokens = prod(avals["x"].shape[:-1])
    num_experts, hidden = avals["weight"].shape
    itemsize = avals["x"].dtype.itemsize
    if not native_limits(platform).fuses_dense_router(tokens, num_experts, hidden, selection.top_k, itemsize):
        return f"no fused kernel for {tokens} tokens, {num_experts} experts, hidden size {hidden}"
    return unsupported_selection(platform, num_experts, selection.top_k)


_DENSE_ROUTER = Op(
    name="dense_router",
    operands={
        "x": Operand(1),
        "weight": Operand(2, batched="never"),
        "logit_bias": Operand(1, batched="never", optional=True),
        "bias": Operand(1, batched="either", optional=True),
        "token_mask": Operand(0, optional=True),
    },
    results=_results,
    reference=_unfused,
    unsupported=_unsupported,
)


@_DENSE_ROUTER.def_jvp
def _jvp(primals: dict[str, Any], tangents: dict[str, Any], *, return_chosen: bool, **params: Any):
    """The weights depend on the logits, those on x, weight and logit_bias; nothing flows through the selection."""
    selection: Selection = params["selection"]
    scoring = selection.scoring
    weights, expert_ids, *chosen = _DENSE_ROUTER(primals, return_chosen=True, **params)
    names = [name for name in ("x", "weight", "logit_bias") if name in primals]
    moving = [name for name in names if not isinstance(tangents[name], ad.Zero)]
    results = [weights, expert_ids, *(chosen if return_chosen else [])]
    if not moving:
        return results, [ad.Zero(jax.typeof(result).to_tangent_aval()) for result in results]

    def logits_of(*values):
        operands = {**{name: primals[name] for name in names}, **dict(zip(moving, values))}
        return reference.router_logits(**operands, precision=params["precision"])

    logits, logits_dot = jax.jvp(
        logits_of, tuple(primals[name] for name in moving), tuple(tangents[name] for name in moving)
    )
    residual = logits if scoring.needs_whole_row else chosen[0]
    result_tangents: list[Any] = [
        weights_tangent(logits_dot, residual, expert_ids, scoring),
        ad.Zero(jax.typeof(expert_ids).to_tangent_aval()),
    ]
    if return_chosen:
        result_tangents.append(weights_tangent(logits_dot, None, expert_ids, IDENTITY))
    return results, result_tangents
