"""Routing from hidden states: the gate product and the selection, in one kernel where that is faster."""

from __future__ import annotations

from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jax.interpreters import ad

from . import _check, reference
from ._activation_topk import select, selection_operands
from ._derivative import ROUTING, routing_tangents, zero_tangent
from ._limits import native_limits
from ._primitive import Op, Operand, Result
from ._route_at import routing_results
from ._sharding import is_split
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

    The product is accumulated in f32. On a GPU one kernel does it all, and the logits never reach device memory, where
    that is faster: the sizes are in `csrc/cuda/dense_router.cu` and `dense_prefill.cu`. Elsewhere the product is
    XLA's, and the selection the kernel of `activation_topk`; so it is where XLA partitions the program, because it can
    then split the product itself, and in exported programs.

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
        implementation: `"auto"`, `"native"` or `"reference"`.

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
        return reference.dense_router(**operands, precision=precision, **selection.options)
    params = {"selection": selection, "precision": _hashable(precision), "selection_implementation": implementation}
    if is_split(operands["x"], 1) or is_split(operands["weight"], 2):
        # A kernel needs these axes whole; XLA multiplies where the parts are, and adds up or gathers the logits.
        return Routing(*_unfused(**operands, return_chosen=False, **params))
    return Routing(*_DENSE_ROUTER(operands, return_chosen=False, **params))


def _hashable(precision: Any) -> Any:
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
    operands = {"logits": logits, "bias": bias, "token_mask": token_mask}
    return select(operands, selection, selection_implementation, return_chosen=return_chosen)


def _results(avals: dict[str, Any], *, selection: Selection, return_chosen: bool, **_: Any) -> list[Result]:
    return routing_results(selection.top_k, return_chosen)


def _unsupported(platform: str, avals: dict[str, Any], *, selection: Selection, precision: Any, **_: Any) -> str | None:
    """Why the fused kernels do not take a case: they cannot, or XLA's product and the selection kernel are faster."""
    x, weight = avals["x"], avals["weight"]
    if precision is not None and x.dtype == np.float32:
        return "the fused kernels multiply f32 operands to f32 accuracy"
    fuses = native_limits(platform).fuses_dense_router(
        tokens=prod(x.shape[:-1]),
        num_experts=weight.shape[0],
        hidden=weight.shape[1],
        top_k=selection.top_k,
        num_groups=selection.num_groups,
        dtype=x.dtype.name,
    )
    return None if fuses else "no fused kernel is faster"


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
    prefers_partitioning=True,
)


@_DENSE_ROUTER.def_jvp
def _jvp(primals: dict[str, Any], tangents: dict[str, Any], *, return_chosen: bool, **params: Any):
    """The weights depend on the logits, those on x, weight and logit_bias; nothing flows through the selection.

    What the backward pass needs are the ids and the chosen logits; for softmax without renormalisation it multiplies
    once more.
    """
    scoring = params["selection"].scoring
    weights, expert_ids, chosen = checkpoint_name(_DENSE_ROUTER(primals, return_chosen=True, **params), ROUTING)
    results = [weights, expert_ids, *([chosen] if return_chosen else [])]
    factors = {name: primals[name] for name in ("x", "weight", "logit_bias") if name in primals}
    moving = {name: tangents[name] for name in factors if not isinstance(tangents[name], ad.Zero)}
    if not moving:
        return results, [zero_tangent(result) for result in results]

    def logits_of(moved):
        return reference.router_logits(**{**factors, **moved}, precision=params["precision"])

    logits, logits_dot = jax.jvp(logits_of, ({name: factors[name] for name in moving},), (moving,))
    residual = logits if scoring.needs_whole_row else chosen
    return results, routing_tangents(logits_dot, residual, expert_ids, scoring, return_chosen)
