"""Routing from logits: scores, a bias and groups that steer, the k best, their weights."""

from __future__ import annotations

from typing import Any

from jax import Array

from . import _check, reference
from ._derivative import selecting_jvp
from ._native import unsupported_selection
from ._primitive import Op, Operand, Result
from ._route_at import ROUTING_RESULTS, chosen_logits, routing_result_types
from ._types import GroupScore, Implementation, Routing, ScoreFn, Selection


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
    implementation: Implementation = "auto",
) -> Routing:
    """The `top_k` experts of each token, best first, and their weights.

    1. `s = score_fn(logits)`, in f32:
       `sqrtsoftplus(x) = sqrt(log(1 + exp(x)))` (DeepSeek-V4), `sigmoid(x) = 1 / (1 + exp(-x))` (DeepSeek-V3, Kimi-K2,
       GLM), or `softmax` over the experts (Mixtral, Qwen; with `renormalize` it is the softmax over the chosen).
    2. The selection key is `s + bias` where a bias is given; without bias and groups it is the logit itself.
    3. If `num_groups > 1`, the experts lie in `num_groups` equal runs, and only those of the `top_groups` best groups
       stay eligible. A group's score is the sum of its two best keys (`"top2_sum"`, DeepSeek-V3) or its best (`"max"`).
    4. The ids of the `top_k` best keys, best first: equal keys to the lower id, +0 above -0, NaN above everything, as
       in `jax.lax.top_k` but for a NaN with the sign bit. The ids are always distinct numbers in `[0, E)`.
    5. `weights = s[ids]`, never with the bias in it, divided by `sum + eps` if `renormalize`, times `scale`.

    Args:
        logits: f32, bf16 or f16 `[..., E]`.
        bias: f32 `[E]`, or `[..., E]` for one a token. It steers the selection and gets no gradient (arXiv:2408.15664).
        top_k: the number of experts a token, from 1 to the number of eligible experts.
        score_fn: `"sqrtsoftplus"`, `"sigmoid"` or `"softmax"`.
        renormalize: whether the weights of a token are divided by their sum.
        scale: a Python number that all weights are multiplied by (`routed_scaling_factor`).
        eps: what `renormalize` adds to the sum: 1e-20 (default; DeepSeek, GLM), 1e-6 (LFM2), 0 (MiniMax; scores of 0
            stay 0). The softmax over the chosen sums to 1 and has no use for it.
        num_groups: the number of groups; divides E.
        top_groups: how many groups stay eligible; needed where `num_groups > 1`.
        group_score: `"top2_sum"` or `"max"`.
        token_mask: bool `[...]`. Where False the ids are -1 and the weights 0, whatever the row holds.
        implementation: `"auto"`, `"native"` or `"reference"`.

    Returns:
        `Routing(weights, expert_ids)`: f32 `[..., top_k]` and int32 `[..., top_k]`. A chosen NaN logit has a NaN weight
        and, with `renormalize`, so has its whole row; other rows do not change.

    Differentiable in `logits`, through the weights.

    Raises:
        TypeError: an operand has a wrong dtype, or an option a wrong type.
        ValueError: a wrong shape or option.
        NotImplementedError: `implementation="native"` where no kernel can run.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax_router import activation_topk
        >>> logits = jnp.array([[1.0, 3.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
        >>> weights, expert_ids = activation_topk(logits, top_k=2, score_fn="softmax")
        >>> expert_ids
        Array([[1, 2],
               [0, 1]], dtype=int32)
        >>> weights[1]
        Array([0.5, 0.5], dtype=float32)
        >>> bias = jnp.array([9.0, 0.0, 0.0, 0.0])  # steers the selection, not the weights
        >>> activation_topk(logits, bias, top_k=2, score_fn="sigmoid").expert_ids
        Array([[0, 1],
               [0, 1]], dtype=int32)
    """
    logits = _check.float_array("logits", logits)
    operands, selection = selection_operands(
        logits.shape,
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
    return Routing(*select({"logits": logits, **operands}, selection, _check.implementation(implementation)))


def select(
    operands: dict[str, Any], selection: Selection, implementation: str, *, return_chosen: bool = False
) -> list[Array]:
    """activation_topk on checked operands and options: weights, ids and, if `return_chosen`, the chosen logits."""
    return _ACTIVATION_TOPK(operands, selection=selection, return_chosen=return_chosen, implementation=implementation)


def selection_operands(logits_shape: tuple[int, ...], bias: Any, token_mask: Any, **options: Any):
    """The checked operands besides the logits, and the checked options, for logits of a shape."""
    if logits_shape[-1] < 1:
        raise ValueError(f"logits must have at least one expert, got shape {logits_shape}")
    if bias is not None:
        bias = _check.selection_bias("bias", bias, logits_shape)
    if token_mask is not None:
        token_mask = _check.mask_array("token_mask", token_mask, logits_shape[:-1])
    return {"bias": bias, "token_mask": token_mask}, _check.selection(logits_shape[-1], **options)


def _reference(
    logits: Array,
    bias: Array | None = None,
    token_mask: Array | None = None,
    *,
    selection: Selection,
    return_chosen: bool,
) -> list[Array]:
    routing = reference.activation_topk(logits, bias, token_mask=token_mask, **selection.options)
    return [*routing, *([chosen_logits(logits, routing.expert_ids)] if return_chosen else [])]


def _result_types(avals: dict[str, Any], *, selection: Selection, return_chosen: bool) -> list[Result]:
    return routing_result_types(selection.top_k, return_chosen)


def _unsupported(platform: str, avals: dict[str, Any], *, selection: Selection, **_: Any) -> str | None:
    return unsupported_selection(platform, avals["logits"].shape[-1], selection.top_k)


_ACTIVATION_TOPK = Op(
    name="activation_topk",
    operands={
        "logits": Operand(1),
        "bias": Operand(1, batched="either", optional=True),
        "token_mask": Operand(0, optional=True),
    },
    results=ROUTING_RESULTS,
    result_types=_result_types,
    reference=_reference,
    attributes={"selection": Selection},
    unsupported=_unsupported,
)


@_ACTIVATION_TOPK.def_jvp
def _jvp(primals: dict[str, Any], tangents: dict[str, Any], **params: Any):
    return selecting_jvp(_ACTIVATION_TOPK, primals, tangents, params["selection"].scoring, **params)
