"""Derivatives of the ops: all of them select entries of a row, and apply a score function to what they selected.

At fixed ids the weights are `w = f(z)`, where z are the chosen logits `[..., k]` (all logits for softmax without
renormalisation). Two primitives are all it takes, linear and each the other's transpose:

    route_tangent:    t [..., E], z, ids -> J(z) t[ids]              [..., k]
    route_cotangent:  g [..., k], z, ids -> J(z)^T g at the ids      [..., E], zero elsewhere

`score_fn="identity"`, which needs no z, makes them the derivative of plain top-k.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.interpreters import ad

from . import reference
from ._primitive import Op, Operand, Result
from ._types import Scoring

# The name by which the policies of jax.checkpoint know what an op selected: where a policy saves it, the backward pass
# neither selects again nor can select otherwise.
ROUTING = "jax_router.routing"

IDENTITY = Scoring("identity", renormalize=False, scale=1.0)


def weights_tangent(tangent: Array, residual: Array | None, expert_ids: Array, scoring: Scoring) -> Array:
    """The tangent of the weights at fixed ids, f32, from the tangent of the logits."""
    operands = {"tangent": tangent, "residual": residual, "expert_ids": expert_ids}
    return _TANGENT(operands, scoring=scoring)[0]


def selecting_jvp(op: Op, primals: dict[str, Any], tangents: dict[str, Any], how: Scoring, /, **params: Any):
    """The derivative rule of an op that routes by its operand `logits`.

    Its results are weights, ids and, with `return_chosen`, the chosen logits. Nothing flows through the selection or to
    any other operand.
    """
    whole_row = how.needs_whole_row
    wanted = params.pop("return_chosen")
    weights, expert_ids, *chosen = checkpoint_name(
        op(primals, return_chosen=wanted or not whole_row, **params), ROUTING
    )
    logits_dot = tangents["logits"]
    results = [weights, expert_ids, *(chosen if wanted else [])]
    if isinstance(logits_dot, ad.Zero):
        return results, [zero_tangent(result) for result in results]
    residual = primals["logits"] if whole_row else chosen[0]
    return results, routing_tangents(logits_dot, residual, expert_ids, how, wanted)


def routing_tangents(
    logits_dot: Array, residual: Array, expert_ids: Array, how: Scoring, return_chosen: bool
) -> list[Any]:
    """The tangents of what an op that routes returns: weights, ids and, if `return_chosen`, the chosen logits."""
    weights_dot, ids_dot = weights_tangent(logits_dot, residual, expert_ids, how), zero_tangent(expert_ids)
    return [weights_dot, ids_dot, *([weights_tangent(logits_dot, None, expert_ids, IDENTITY)] if return_chosen else [])]


def zero_tangent(primal: Array) -> ad.Zero:
    """The tangent of a result that does not move."""
    return ad.Zero(jax.typeof(primal).to_tangent_aval())


def _weights(residual: Array, expert_ids: Array, scoring: Scoring) -> Array:
    if scoring.needs_whole_row:
        return reference.route_at(residual, expert_ids, **scoring.options).weights
    return reference.weights_of_chosen(residual, expert_ids >= 0, **scoring.options)


def _tangent_reference(tangent: Array, expert_ids: Array, residual: Array | None = None, *, scoring: Scoring):
    tangent = tangent.astype(jnp.float32)
    if scoring.needs_whole_row:
        return [jax.jvp(partial(_weights, expert_ids=expert_ids, scoring=scoring), (residual,), (tangent,))[1]]
    valid = (expert_ids >= 0) & (expert_ids < tangent.shape[-1])
    chosen_dot = jnp.take_along_axis(tangent, jnp.where(valid, expert_ids, 0), axis=-1)
    if scoring.score_fn == "identity":
        return [jnp.where(valid, chosen_dot, 0.0) * jnp.float32(scoring.scale)]
    return [jax.jvp(partial(_weights, expert_ids=expert_ids, scoring=scoring), (residual,), (chosen_dot,))[1]]


def _cotangent_reference(
    grad_weights: Array,
    expert_ids: Array,
    residual: Array | None = None,
    *,
    scoring: Scoring,
    num_experts: int,
    dtype: Any,
):
    if scoring.score_fn == "identity":
        chosen_bar = grad_weights * jnp.float32(scoring.scale)
    else:
        _, pullback = jax.vjp(partial(_weights, expert_ids=expert_ids, scoring=scoring), residual)
        (chosen_bar,) = pullback(grad_weights)
    if scoring.needs_whole_row:
        return [chosen_bar.astype(dtype)]
    here = expert_ids[..., None] == jnp.arange(num_experts, dtype=jnp.int32)
    return [jnp.where(here, chosen_bar[..., None], 0.0).sum(axis=-2).astype(dtype)]


def _jvp(op: Op, linear: str, primals: dict[str, Any], tangents: dict[str, Any], **params: Any):
    """Linear in one operand; the dependence on the residual goes through the reference."""
    (result,) = op(primals, **params)
    terms = []
    if not isinstance(tangents[linear], ad.Zero):
        terms += op({**primals, linear: tangents[linear]}, **params)
    if "residual" in primals and not isinstance(tangents["residual"], ad.Zero):
        options = {name: value for name, value in params.items() if name != "implementation"}

        def of_residual(residual):
            return op.reference(**{**primals, "residual": residual}, **options)[0]

        terms.append(jax.jvp(of_residual, (primals["residual"],), (tangents["residual"],))[1])
    return [result], [sum(terms[1:], terms[0]) if terms else zero_tangent(result)]


_TANGENT = Op(
    name="route_tangent",
    operands={"tangent": Operand(1), "expert_ids": Operand(1), "residual": Operand(1, optional=True)},
    results=lambda avals, **_: [Result(avals["expert_ids"].shape[-1:], jnp.float32)],
    reference=_tangent_reference,
)

_COTANGENT = Op(
    name="route_cotangent",
    operands={"grad_weights": Operand(1), "expert_ids": Operand(1), "residual": Operand(1, optional=True)},
    results=lambda avals, num_experts, dtype, **_: [Result((num_experts,), dtype)],
    reference=_cotangent_reference,
)

_TANGENT.def_jvp(partial(_jvp, _TANGENT, "tangent"))
_COTANGENT.def_jvp(partial(_jvp, _COTANGENT, "grad_weights"))


@partial(_TANGENT.def_transpose, "tangent")
def _tangent_transpose(cotangent: Array, operands: dict[str, Any], *, scoring: Scoring, implementation: str) -> Array:
    aval = operands["tangent"].aval
    return _COTANGENT(
        {**operands, "grad_weights": cotangent}, scoring=scoring, num_experts=aval.shape[-1], dtype=aval.dtype
    )[0]


@partial(_COTANGENT.def_transpose, "grad_weights")
def _cotangent_transpose(
    cotangent: Array, operands: dict[str, Any], *, scoring: Scoring, num_experts: int, dtype: Any, implementation: str
) -> Array:
    return _TANGENT({**operands, "tangent": cotangent}, scoring=scoring)[0]
