"""Weights at given experts: router replay, and the scored hash layers."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array

from . import _check, reference
from ._derivative import selecting_jvp
from ._hash_router import hash_router, share_table_again, table_operands
from ._ids import as_int32_ids
from ._native import unsupported_selection
from ._primitive import Op, Operand, Result
from ._types import Implementation, Routing, ScoreFn, Scoring


def route_at(
    logits: Array,
    expert_ids: Array,
    *,
    score_fn: ScoreFn = "sqrtsoftplus",
    renormalize: bool = True,
    scale: float = 1.0,
    eps: float = 1e-20,
    implementation: Implementation = "auto",
) -> Routing:
    """The weights of given experts.

    With `s = score_fn(logits)` (see `activation_topk`), `weights = s[expert_ids]`, divided by `sum + eps` over the
    row if `renormalize`, times `scale`. An id outside `[0, E)` gets weight 0, does not enter the sum and is returned as
    -1.

    This is how routing is replayed; for experts by token id, as the hash layers of DeepSeek-V4 have them, there is
    `scored_hash_router`. Only the chosen logits are read, unless softmax without renormalisation asks for the whole
    row.

    Args:
        logits: f32, bf16 or f16 `[..., E]`.
        expert_ids: integers `[..., k]`, with the leading axes of `logits`; any values.
        score_fn: `"sqrtsoftplus"`, `"sigmoid"` or `"softmax"`.
        renormalize: whether the weights of a token are divided by their sum.
        scale: a Python number that all weights are multiplied by.
        eps: what `renormalize` adds to the sum, see `activation_topk`.
        implementation: `"auto"`, `"native"` or `"reference"`.

    Returns:
        `Routing(weights, expert_ids)`: f32 `[..., k]` and int32 `[..., k]`.

    Differentiable in `logits`.

    Raises:
        TypeError: an operand has a wrong dtype, or an option a wrong type.
        ValueError: a wrong shape or option.
        NotImplementedError: `implementation="native"` where no kernel can run.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax_router import route_at
        >>> logits = jnp.array([[1.0, 3.0, 2.0, 3.0]])
        >>> route_at(logits, jnp.array([[3, 1, -1]]), score_fn="softmax")
        Routing(weights=Array([[0.5, 0.5, 0. ]], dtype=float32), expert_ids=Array([[ 3,  1, -1]], dtype=int32))
    """
    logits = _check.float_array("logits", logits)
    expert_ids = _check.int_array("expert_ids", expert_ids, min_rank=1)
    _check.same_shape("expert_ids", expert_ids, (*logits.shape[:-1], expert_ids.shape[-1]))
    scoring = _check.scoring(score_fn, renormalize, scale, eps)
    expert_ids = as_int32_ids(expert_ids, logits.shape[-1])
    operands = {"logits": logits, "expert_ids": expert_ids}
    return Routing(
        *_ROUTE_AT(operands, scoring=scoring, return_chosen=False, implementation=_check.implementation(implementation))
    )


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
    implementation: Implementation = "auto",
) -> Routing:
    """The experts of each token by its id, from a table, and their weights by its logits, in one kernel.

    `route_at(logits, hash_lut[token_ids], ...)`, but for token ids outside `[0, V)` (padding, say): they get ids -1 and
    weights 0, where plain indexing would wrap or clamp them to the experts of other tokens. The hash layers of
    DeepSeek-V4 are `scored_hash_router(logits, token_ids, hash_lut, scale=...)`.

    Args:
        logits: f32, bf16 or f16 `[..., E]`.
        token_ids: integers `[...]`.
        hash_lut: integers `[V, k]`. An entry outside `[0, E)` is no expert: its id is -1 and its weight 0.
        score_fn: `"sqrtsoftplus"`, `"sigmoid"` or `"softmax"`, see `activation_topk`.
        renormalize: whether the weights of a token are divided by their sum.
        scale: a Python number that all weights are multiplied by.
        eps: what `renormalize` adds to the sum, see `activation_topk`.
        token_mask: bool `[...]`. Where False the ids are -1 and the weights 0, whatever the row holds.
        implementation: `"auto"`, `"native"` or `"reference"`.

    Returns:
        `Routing(weights, expert_ids)`: f32 `[..., k]` and int32 `[..., k]`, in the order of the table.

    Differentiable in `logits`.

    Raises:
        TypeError: an operand has a wrong dtype, or an option a wrong type.
        ValueError: a wrong shape or option.
        NotImplementedError: `implementation="native"` where no kernel can run.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax_router import scored_hash_router
        >>> hash_lut = jnp.array([[0, 3], [1, 2]])  # two experts for each of two token ids
        >>> logits = jnp.zeros((2, 4))
        >>> routing = scored_hash_router(logits, jnp.array([1, 5]), hash_lut, scale=1.5)
        >>> routing.expert_ids
        Array([[ 1,  2],
               [-1, -1]], dtype=int32)
        >>> routing.weights
        Array([[0.75, 0.75],
               [0.  , 0.  ]], dtype=float32)
    """
    logits = _check.float_array("logits", logits)
    table = table_operands(token_ids, hash_lut, token_mask)
    _check.same_shape("token_ids", table["token_ids"], logits.shape[:-1])
    return Routing(
        *_SCORED_HASH_ROUTER(
            {"logits": logits, **table},
            scoring=_check.scoring(score_fn, renormalize, scale, eps),
            return_chosen=False,
            implementation=_check.implementation(implementation),
        )
    )


def _reference(logits: Array, expert_ids: Array, *, scoring: Scoring, return_chosen: bool) -> list[Array]:
    weights, expert_ids = reference.route_at(logits, expert_ids, **scoring.options)
    return [weights, expert_ids, *([chosen_logits(logits, expert_ids)] if return_chosen else [])]


def _scored_hash_reference(logits: Array, token_ids: Array, hash_lut: Array, **params: Any) -> list[Array]:
    expert_ids = hash_router(token_ids, hash_lut, implementation="reference").expert_ids
    return _reference(logits, expert_ids, **params)


def chosen_logits(logits: Array, expert_ids: Array) -> Array:
    """f32 `[..., k]`, 0 where the id is -1."""
    chosen = jnp.take_along_axis(logits, jnp.maximum(expert_ids, 0), axis=-1).astype(jnp.float32)
    return jnp.where(expert_ids >= 0, chosen, 0.0)


def _result_types(avals: dict[str, Any], *, return_chosen: bool, **_: Any) -> list[Result]:
    return routing_result_types(_ids_aval(avals).shape[-1], return_chosen)


# What every op that routes returns.
ROUTING_RESULTS = ("weights", "expert_ids", "chosen_logits?")


def routing_result_types(k: int, return_chosen: bool) -> list[Result]:
    """Of weights, ids and, if `return_chosen`, the chosen logits."""
    weights, expert_ids = Result((k,), jnp.float32), Result((k,), jnp.int32)
    return [weights, expert_ids, *([Result((k,), jnp.float32)] if return_chosen else [])]


def _unsupported(platform: str, avals: dict[str, Any], **_: Any) -> str | None:
    return unsupported_selection(platform, avals["logits"].shape[-1], _ids_aval(avals).shape[-1])


def _ids_aval(avals: dict[str, Any]) -> Any:
    return avals["expert_ids"] if "expert_ids" in avals else avals["hash_lut"]


_ROUTE_AT = Op(
    name="route_at",
    operands={"logits": Operand(1), "expert_ids": Operand(1)},
    results=ROUTING_RESULTS,
    result_types=_result_types,
    reference=_reference,
    attributes={"scoring": Scoring},
    unsupported=_unsupported,
    gathers=True,
)


_SCORED_HASH_ROUTER = Op(
    name="scored_hash_router",
    operands={"logits": Operand(1), "token_ids": Operand(0), "hash_lut": Operand(2, batched="never")},
    results=ROUTING_RESULTS,
    result_types=_result_types,
    reference=_scored_hash_reference,
    attributes={"scoring": Scoring},
    unsupported=_unsupported,
    gathers=True,
    share_again=share_table_again,
)


def _jvp(op: Op, primals: dict[str, Any], tangents: dict[str, Any], **params: Any):
    return selecting_jvp(op, primals, tangents, params["scoring"], **params)


_ROUTE_AT.def_jvp(partial(_jvp, _ROUTE_AT))
_SCORED_HASH_ROUTER.def_jvp(partial(_jvp, _SCORED_HASH_ROUTER))
