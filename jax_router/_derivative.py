"""Derivatives of the ops: all of them select entries of a row, and apply a score function to what they selected.

At fixed ids the weights are `w = f(z)`, where z are the chosen logits `[..., k]` (all logits for softmax without
renormalisation). Two primitives are all it takes, linear and each the other's transpose:

    route_tangent:    t [..., E], z, ids -> J(z) t[ids]              [..., k]
    route_cotangent:  g [..., k], z, ids -> J(z)^T g at the ids      [..., E], zero elsewhere

`score_fn="identity"`, which needs no z, makes them the derivative of plain top-k.

The second has kernels, and `implementation` goes through all rules: where an op insists on its kernel, so does its
gradient. The first has none, nor have derivatives of second order: XLA compiles their reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.interpreters import ad

from . import reference
from ._native import unsupported_selection
from ._primitive import Op, Operand, Result, those_that_move, zero_tangent
from ._shapes import numbers
from ._types import Scoring

# The name by which the policies of jax.checkpoint know what an op selected: where a policy saves it, the backward pass
# neither selects again nor can select otherwise.
ROUTING = "jax_router.routing"

IDENTITY = Scoring("identity", renormalize=False, scale=1.0)


def weights_tangent(
    tangent: Array, residual: Array | None, expert_ids: Array, scoring: Scoring, implementation: str
) -> Array:
    """The tangent of the weights at fixed ids, f32, from the tangent of the logits."""
    operands = {"tangent": tangent, "residual": residual, "expert_ids": expert_ids}
    return _TANGENT(operands, scoring=scoring, implementation=implementation)[0]


def selecting_jvp(
    op: Op,
    primals: dict[str, Any],
    tangents: dict[str, Any],
    how: Scoring,
    logits_of: Callable[..., Array] = lambda logits, **_: logits,
    factors: Sequence[str] = ("logits",),
    together: Callable[..., Array | None] | None = None,
    /,
    *,
    return_chosen: bool,
    implementation: str,
    **params: Any,
):
    """The derivative rule of an op that routes: its results are weights, ids and, if `return_chosen`, chosen logits.

    The logits are `logits_of(**operands, expert_ids=...)` of the operands that `factors` names; all logits but those at
    the ids get no gradient, where there are ids. Nothing flows through the selection, or to another operand. The
    backward pass needs the ids and the chosen logits; for softmax without renormalisation, all logits.

    `together(moving, given, expert_ids, chosen)` may know the tangent of the weights from those of all factors that
    move, in a form whose transpose is faster than that of each factor's; None where it does not.
    """
    whole_row = how.needs_whole_row
    weights, expert_ids, *chosen = checkpoint_name(
        op(primals, return_chosen=return_chosen or not whole_row, implementation=implementation, **params), ROUTING
    )
    results = [weights, expert_ids, *(chosen if return_chosen else [])]
    given = {name: primals[name] for name in factors if name in primals}
    moving = those_that_move({name: tangents[name] for name in given})
    if not moving:
        return results, [zero_tangent(result) for result in results]
    if together is not None and not whole_row and not return_chosen:
        weights_dot = together(moving, given, expert_ids, chosen[0])
        if weights_dot is not None:
            return results, [weights_dot, zero_tangent(expert_ids)]
    at = {name: given[name] for name in moving}
    of_moved = partial(logits_of, expert_ids=None if whole_row else expert_ids)
    logits, logits_dot = jax.jvp(lambda moved: of_moved(**{**given, **moved}), (at,), (moving,))

    def tangent_of(residual: Array | None, scoring: Scoring) -> Array:
        return weights_tangent(logits_dot, residual, expert_ids, scoring, implementation)

    weights_dot = tangent_of(logits if whole_row else chosen[0], how)
    chosen_dot = [tangent_of(None, IDENTITY)] if return_chosen else []
    return results, [weights_dot, zero_tangent(expert_ids), *chosen_dot]


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
        chosen_bar = chosen_cotangent(grad_weights, expert_ids, residual, scoring)
    if scoring.needs_whole_row:
        return [chosen_bar.astype(dtype)]
    return [dense_cotangent(chosen_bar, expert_ids, num_experts).astype(dtype)]


def chosen_cotangent(grad_weights: Array, expert_ids: Array, residual: Array | None, scoring: Scoring) -> Array:
    """That of what the weights are computed from: the chosen logits, or all of them."""
    return jax.vjp(partial(_weights, expert_ids=expert_ids, scoring=scoring), residual)[1](grad_weights)[0]


def dense_cotangent(chosen: Array, expert_ids: Array, num_experts: int) -> Array:
    """A row for each token, zero but at its ids."""
    here = expert_ids[..., None] == numbers(num_experts, expert_ids.ndim + 1)
    return jnp.where(here, chosen[..., None], 0.0).sum(axis=-2)


def _jvp(op: Op, linear: str, primals: dict[str, Any], tangents: dict[str, Any], *, implementation: str, **params: Any):
    """Linear in one operand; the dependence on the residual goes through the reference."""
    (result,) = op(primals, implementation=implementation, **params)
    terms = []
    if not isinstance(tangents[linear], ad.Zero):
        terms += op({**primals, linear: tangents[linear]}, implementation=implementation, **params)
    if "residual" in primals and not isinstance(tangents["residual"], ad.Zero):

        def of_residual(residual):
            return op({**primals, "residual": residual}, implementation="reference", **params)[0]

        terms.append(jax.jvp(of_residual, (primals["residual"],), (tangents["residual"],))[1])
    return [result], [sum(terms[1:], terms[0]) if terms else zero_tangent(result)]


_TANGENT = Op(
    name="route_tangent",
    operands={"tangent": Operand(1), "expert_ids": Operand(1), "residual": Operand(1, optional=True)},
    results=("weights_tangent",),
    result_types=lambda avals, **_: [Result(avals["expert_ids"].shape[-1:], jnp.float32)],
    reference=_tangent_reference,
    platforms=(),
    gathers=True,
)


def _cotangent_unsupported(
    platform: str, avals: dict[str, Any], *, scoring: Scoring, num_experts: int, **_: Any
) -> str | None:
    """Gradients of choices that depend on each other need a row's in one place, which CUDA's have for so many."""
    are_apart = not scoring.renormalize and scoring.score_fn != "softmax"
    if platform != "cuda" or are_apart:
        return None
    return unsupported_selection(platform, num_experts, avals["expert_ids"].shape[-1])


_COTANGENT = Op(
    name="route_cotangent",
    operands={"grad_weights": Operand(1), "expert_ids": Operand(1), "residual": Operand(1, optional=True)},
    results=("grad_logits",),
    result_types=lambda avals, num_experts, dtype, **_: [Result((num_experts,), dtype)],
    reference=_cotangent_reference,
    attributes={"scoring": Scoring, "num_experts": int},
    unsupported=_cotangent_unsupported,
)

_TANGENT.def_jvp(partial(_jvp, _TANGENT, "tangent"))
_COTANGENT.def_jvp(partial(_jvp, _COTANGENT, "grad_weights"))


@_TANGENT.def_transpose
def _tangent_transpose(cotangents: Sequence[Array], operands: dict[str, Any], **params: Any) -> dict[str, Array]:
    (grad_weights,) = cotangents
    aval = operands["tangent"].aval
    (tangent,) = _COTANGENT(
        {**operands, "grad_weights": grad_weights}, num_experts=aval.shape[-1], dtype=aval.dtype, **params
    )
    return {"tangent": tangent}


@_COTANGENT.def_transpose
def _cotangent_transpose(
    cotangents: Sequence[Array], operands: dict[str, Any], *, num_experts: int, dtype: Any, **params: Any
) -> dict[str, Array]:
    (tangent,) = cotangents
    return {"grad_weights": _TANGENT({**operands, "tangent": tangent}, **params)[0]}
