"""Routing from hidden states: the gate product and the selection, in one kernel where that is faster."""

from __future__ import annotations

from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from . import _check
from ._activation_topk import select, selection_operands
from ._derivative import selecting_jvp
from ._logits import router_logits
from ._native import NATIVE_DTYPES, native_module
from ._primitive import Op, Operand, Result
from ._route_at import routing_result_types
from ._routed_gradient import routed_weights_tangent
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
    eps: float = 1e-20,
    num_groups: int = 1,
    top_groups: int | None = None,
    group_score: GroupScore = "top2_sum",
    token_mask: Array | None = None,
    implementation: Implementation = "auto",
) -> Routing:
    """The experts of each token from its hidden state: `activation_topk(x @ weight.T + logit_bias, bias, ...)`.

    The product is accumulated in f32. On a GPU one kernel does it all, and the logits never reach device memory, where
    that is faster than a product of XLA's and the kernel of `activation_topk`. Elsewhere these two do it; so they do
    where XLA partitions the program, because it can then split the product itself, and in exported programs.

    Args:
        x: f32, bf16 or f16 `[..., D]`.
        weight: `[E, D]`, as checkpoints have it, in the dtype of `x` or in f32. With `x` in half precision and a weight
            in f32, as training has them, neither is rounded before they are multiplied.
        bias: f32 `[E]` or `[..., E]`; it steers the selection only, and gets no gradient.
        top_k: the number of experts a token.
        logit_bias: f32 `[E]`, part of the logits (gpt-oss has one).
        precision: of the product, as in `jax.lax.dot_general`. None multiplies to f32 accuracy where an operand is f32;
            with another one, a half-precision x is cast to the f32 of its weight, and they are multiplied at that.
        score_fn: see `activation_topk`, as for all options down to `token_mask`.
        renormalize: whether the weights of a token are divided by their sum.
        scale: a Python number that all weights are multiplied by.
        eps: what `renormalize` adds to the sum.
        num_groups: the number of groups of experts.
        top_groups: how many groups stay eligible; needed where `num_groups > 1`.
        group_score: `"top2_sum"` or `"max"`.
        token_mask: bool `[...]`; where False the ids are -1 and the weights 0, and nothing that x holds there reaches a
            gradient.
        implementation: `"auto"`, `"native"` or `"reference"`. "native" means kernels throughout: the fused one, or
            XLA's product and the kernel of `activation_topk`, or an error that says what is missing.

    Returns:
        `Routing(weights, expert_ids)`: f32 `[..., top_k]` and int32 `[..., top_k]`.

    Differentiable in `x`, `weight` and `logit_bias`, through the weights.

    Raises:
        TypeError: an operand has a wrong dtype, or an option a wrong type.
        ValueError: a wrong shape or option.
        NotImplementedError: `implementation="native"` where no kernel can run.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax_router import dense_router
        >>> x = jnp.array([[1.0, 0.0], [0.0, 1.0]])  # two tokens
        >>> weight = jnp.array([[2.0, 0.0], [0.0, 2.0], [1.0, 1.0]])  # three experts
        >>> weights, expert_ids = dense_router(x, weight, top_k=2, score_fn="softmax")
        >>> expert_ids
        Array([[0, 2],
               [1, 2]], dtype=int32)
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
        eps=eps,
        num_groups=num_groups,
        top_groups=top_groups,
        group_score=group_score,
    )
    operands.update(selection_inputs)
    return Routing(
        *_DENSE_ROUTER(
            operands,
            selection=selection,
            precision=_check.precision(precision),
            return_chosen=False,
            implementation=_check.implementation(implementation),
        )
    )


def product_operands(x: Any, weight: Any, logit_bias: Any) -> dict[str, Any]:
    """The checked operands of the product."""
    x = _check.float_array("x", x)
    weight = _check.float_array("weight", weight)
    if weight.ndim != 2 or weight.shape[0] < 1 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"weight must have shape (num_experts, {x.shape[-1]}), as x has {x.shape}; got {weight.shape}")
    if weight.dtype not in (x.dtype, np.float32):
        raise TypeError(f"weight must have the dtype of x, {x.dtype}, or float32, got {weight.dtype}: cast one of them")
    if logit_bias is not None:
        logit_bias = _check.float32_array("logit_bias", logit_bias)
        _check.same_shape("logit_bias", logit_bias, weight.shape[:1])
    return {"x": x, "weight": weight, "logit_bias": logit_bias}


def _product_and_selection(
    x: Array,
    weight: Array,
    logit_bias: Array | None = None,
    bias: Array | None = None,
    token_mask: Array | None = None,
    *,
    selection: Selection,
    precision: Any,
    return_chosen: bool,
    implementation: str,
) -> list[Array]:
    if x.dtype != weight.dtype and precision is None and implementation != "reference" and _are_few(x):
        x = x.astype(jnp.float32)  # exactly, and what is left to do has kernels
        operands = {"x": x, "weight": weight, "logit_bias": logit_bias, "bias": bias, "token_mask": token_mask}
        return _DENSE_ROUTER(
            operands,
            selection=selection,
            precision=precision,
            return_chosen=return_chosen,
            implementation=implementation,
        )
    logits = router_logits(x, weight, logit_bias, precision=precision, token_mask=token_mask)
    operands = {"logits": logits, "bias": bias, "token_mask": token_mask}
    return select(operands, selection, implementation, return_chosen=return_chosen)


def _are_few(x: Array) -> bool:
    """Whether a product reads more of the weight than of x, so that an x in f32 costs nothing."""
    tokens = prod(x.shape[:-1])
    return isinstance(tokens, int) and tokens <= 64


def _result_types(avals: dict[str, Any], *, selection: Selection, return_chosen: bool, **_: Any) -> list[Result]:
    return routing_result_types(selection.top_k, return_chosen)


def plan_sizes(avals: dict[str, Any], selection: Selection) -> dict[str, Any]:
    """The case as the native module wants to know it."""
    x, (num_experts, hidden) = avals["x"], avals["weight"].shape
    return {
        "rows": prod(x.shape[:-1]),
        "hidden": hidden,
        "experts": num_experts,
        "k": selection.top_k,
        "num_groups": selection.num_groups,
        "bias": "bias" in avals,
        "dtype": NATIVE_DTYPES[x.dtype.name],
        "weight_dtype": NATIVE_DTYPES[avals["weight"].dtype.name],
    }


def _unsupported(platform: str, avals: dict[str, Any], *, selection: Selection, precision: Any, **_: Any) -> str | None:
    if precision is not None and avals["weight"].dtype == np.float32:
        return "the fused kernels multiply f32 operands to f32 accuracy"
    return native_module(platform).dense_router_unsupported(**plan_sizes(avals, selection)) or None


def _pays(platform: str, avals: dict[str, Any], *, selection: Selection, **_: Any) -> bool:
    """Whether a fused kernel is faster than XLA's product and the kernel of activation_topk."""
    return native_module(platform).pays_everywhere("dense_router", **plan_sizes(avals, selection))


def _workspace(platform: str, avals: dict[str, Any], *, selection: Selection, **_: Any) -> int:
    """Partial logits of a token, that the blocks of the kernel for few tokens hand to each other."""
    sizes = plan_sizes(avals, selection)
    return -(-native_module(platform).workspace_bytes("dense_router", **sizes) // max(sizes["rows"], 1))


_DENSE_ROUTER = Op(
    name="dense_router",
    operands={
        "x": Operand(1),
        "weight": Operand(2, batched="never"),
        "logit_bias": Operand(1, batched="never", optional=True),
        "bias": Operand(1, batched="either", optional=True),
        "token_mask": Operand(0, optional=True),
    },
    results=("weights", "expert_ids", "workspace", "chosen_logits?"),
    result_types=_result_types,
    reference=_product_and_selection,
    composed=True,
    workspace=_workspace,
    attributes={"selection": Selection},
    platforms=("cuda",),
    unsupported=_unsupported,
    pays=_pays,
)


@_DENSE_ROUTER.def_jvp
def _jvp(primals: dict[str, Any], tangents: dict[str, Any], **params: Any):
    scoring = params["selection"].scoring
    logits_of = partial(
        router_logits,
        precision=params["precision"],
        token_mask=primals.get("token_mask"),
        implementation=params["implementation"],
    )
    factors = ("x", "weight", "logit_bias")

    def together(moving: dict[str, Array], given: dict[str, Array], expert_ids: Array, chosen: Array) -> Array | None:
        x, weight = given["x"], given["weight"]
        is_sharded = any(any(jax.typeof(factor).sharding.spec) for factor in (x, weight))
        in_bf16 = x.dtype == weight.dtype == jnp.bfloat16 and params["precision"] is None
        if set(moving) != {"x", "weight"} or not in_bf16 or is_sharded or params["implementation"] == "reference":
            return None
        operands = {"x": x, "weight": weight, "token_mask": primals.get("token_mask")}
        return routed_weights_tangent(moving, operands, expert_ids, chosen, scoring, params["implementation"])

    return selecting_jvp(_DENSE_ROUTER, primals, tangents, scoring, logits_of, factors, together, **params)
