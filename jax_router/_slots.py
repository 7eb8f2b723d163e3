"""The data movement between tokens and slots, and its derivatives.

A dispatch says in which slot each choice of a token lies. With a row a token x `[N, D]`, a row a slot y `[S, D]` and a
number a choice w `[N, k]`, both ops and all their derivatives come from one form that is linear in each of the three:

    T(x, y, w) = sum over n and j of w[n, j] * <x[n], y[slot[n, j]]>

    permute(x, w)    = dT/dy    [S, D]
    combine(y, w)    = dT/dx    [N, D]
    products(x, y)   = dT/dw    f32 [N, k]

So the derivative of each of them in one operand is itself, and its transpose is another one: none ever scatters.
Where both operands of permute or combine move, the tangent is a sum of two, and its transpose the pair of their
cotangents, for which there is one kernel, since both read the same rows:

    permute_cotangent(g, x, w) = combine(g, w), products(x, g)
    combine_cotangent(g, y, w) = permute(g, w), products(g, y)

A slot is a choice's if `token_index` and `slot` agree on it; all other slots are empty, and their rows zeros. `combine`
and `products` go by `slot` alone. So nothing that an empty slot or a choice without a slot holds reaches a result,
unless a dispatch made by hand has a `slot` that `token_index` does not confirm. Where one has several choices of a
token in a slot, `permute` takes the weight of the last, where T would add them up: kernels would have to look for
others. For such dispatches the derivatives are these formulas still, and not exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.interpreters import ad

from ._check import FLOATS
from ._ids import as_int32_ids
from ._native import native_module
from ._primitive import Op, Operand, Result, jvp_in_parts, multilinear_jvp, those_that_move
from ._sharding import align
from ._types import Dispatch

# What the public functions and those of `reference` compute, for any number of axes of tokens.


def permute(x: Array, dispatch: Dispatch, weights: Array | None, implementation: str) -> Array:
    return PERMUTE({"x": _flat(x), **_operands(dispatch, weights)}, implementation=implementation)[0]


def combine(y: Array, dispatch: Dispatch, weights: Array | None, implementation: str) -> Array:
    (rows,) = COMBINE({"y": _whole(y), **_operands(dispatch, weights)}, implementation=implementation)
    return rows.reshape(*dispatch.slot.shape[:-1], y.shape[-1])


def _operands(dispatch: Dispatch, weights: Array | None) -> dict[str, Array | None]:
    return {
        "token_index": _whole(as_int32_ids(dispatch.token_index, prod(dispatch.slot.shape[:-1]))),
        "slot": _flat(as_int32_ids(dispatch.slot, dispatch.token_index.shape[0])),
        "weights": None if weights is None else _flat(weights),
    }


def _flat(values: Array) -> Array:
    """With one axis of tokens."""
    return _whole(values).reshape(prod(values.shape[:-1]), values.shape[-1])


def _whole(values: Array) -> Array:
    """On every device, as a dispatch of all tokens is."""
    return align([values], [values.ndim])[0]


# The mathematics, of one problem.


def _permute(x: Array, token_index: Array, slot: Array, weights: Array | None = None) -> Array:
    known = (token_index >= 0) & (token_index < x.shape[0])
    here = _rows_at(slot, token_index) == jnp.arange(token_index.shape[0], dtype=jnp.int32)[:, None]
    choice = jnp.arange(slot.shape[-1], dtype=jnp.int32)[None]
    last = jnp.where(here & known[:, None], choice, -1).max(axis=-1, keepdims=True, initial=-1)
    rows = _rows_at(x, token_index)
    if weights is not None:
        weight = jnp.where(choice == last, _rows_at(weights, token_index), 0.0).sum(axis=-1, keepdims=True)
        rows = (rows.astype(jnp.float32) * weight).astype(x.dtype)
    return jnp.where(last >= 0, rows, jnp.zeros((), x.dtype))


def _combine(y: Array, token_index: Array, slot: Array, weights: Array | None = None) -> Array:
    rows = _rows_at(y, slot).astype(jnp.float32)
    if weights is not None:
        rows = rows * weights[..., None]
    return jnp.where(_has_slot(slot, y)[..., None], rows, 0.0).sum(axis=-2).astype(y.dtype)


def _products(x: Array, y: Array, token_index: Array, slot: Array) -> Array:
    products = x[:, None].astype(jnp.float32) * _rows_at(y, slot).astype(jnp.float32)
    return jnp.where(_has_slot(slot, y), products.sum(axis=-1), 0.0)


def _has_slot(slot: Array, y: Array) -> Array:
    return (slot >= 0) & (slot < y.shape[0])


def _rows_at(rows: Array, index: Array) -> Array:
    """Any row where the index is none; zeros where there are no rows at all."""
    if rows.shape[0] == 0:
        return jnp.zeros((*index.shape, *rows.shape[1:]), rows.dtype)
    return jnp.take(rows, index, axis=0, mode="clip")


def _permute_cotangent(grad: Array, x: Array, weights: Array, **dispatch: Array) -> list[Array]:
    return [_combine(grad, weights=weights, **dispatch), _products(x, grad, **dispatch)]


def _combine_cotangent(grad: Array, y: Array, weights: Array, **dispatch: Array) -> list[Array]:
    return [_permute(grad, weights=weights, **dispatch), _products(grad, y, **dispatch)]


def _of_problems(formula: Callable[..., Any], /, *, token_index: Array, **operands: Array) -> list[Array]:
    """The formula for each problem, where there are any number of batch axes."""
    for _ in range(token_index.ndim - 1):
        formula = jax.vmap(formula)
    results = formula(token_index=token_index, **operands)
    return results if isinstance(results, list) else [results]


# The ops. Those of one result are called by it alone.


def _unsupported(platform: str, avals: dict[str, Any], **_: Any) -> str | None:
    most, k = native_module(platform).max_top_k, avals["slot"].shape[-1]
    if k > most:
        return f"at most {most} choices a token, got {k}"
    if "grad" in avals or "y" in avals or "weights" in avals:
        dtype = next(iter(avals.values())).dtype
        if dtype not in FLOATS:
            return f"no sums of {dtype}"
    return None


def _rows(avals: dict[str, Any]) -> Any:
    return next(iter(avals.values()))


def _token_rows(avals: dict[str, Any]) -> Result:
    return Result((avals["slot"].shape[-2], _rows(avals).shape[-1]), _rows(avals).dtype)


def _slot_rows(avals: dict[str, Any]) -> Result:
    return Result((avals["token_index"].shape[-1], _rows(avals).shape[-1]), _rows(avals).dtype)


def _one_a_choice(avals: dict[str, Any]) -> Result:
    return Result(avals["slot"].shape[-2:], jnp.float32)


_DISPATCH = {"token_index": Operand(1), "slot": Operand(2)}
_WEIGHTS = {"weights": Operand(2)}
_MAYBE_WEIGHTS = {"weights": Operand(2, optional=True)}

PERMUTE = Op(
    name="permute",
    operands={"x": Operand(2), **_DISPATCH, **_MAYBE_WEIGHTS},
    results=("rows",),
    result_types=lambda avals: [_slot_rows(avals)],
    reference=partial(_of_problems, _permute),
    unsupported=_unsupported,
    derives_itself=True,
)

COMBINE = Op(
    name="combine",
    operands={"y": Operand(2), **_DISPATCH, **_MAYBE_WEIGHTS},
    results=("rows",),
    result_types=lambda avals: [_token_rows(avals)],
    reference=partial(_of_problems, _combine),
    unsupported=_unsupported,
    derives_itself=True,
)

_PRODUCTS = Op(
    name="choice_products",
    operands={"x": Operand(2), "y": Operand(2), **_DISPATCH},
    results=("products",),
    result_types=lambda avals: [_one_a_choice(avals)],
    reference=partial(_of_problems, _products),
    platforms=(),
    derives_itself=True,
)

_PERMUTE_COTANGENT = Op(
    name="permute_cotangent",
    operands={"grad": Operand(2), "x": Operand(2), **_DISPATCH, **_WEIGHTS},
    results=("grad_x", "grad_weights"),
    result_types=lambda avals: [_token_rows(avals), _one_a_choice(avals)],
    reference=partial(_of_problems, _permute_cotangent),
    unsupported=_unsupported,
    derives_itself=True,
)

_COMBINE_COTANGENT = Op(
    name="combine_cotangent",
    operands={"grad": Operand(2), "y": Operand(2), **_DISPATCH, **_WEIGHTS},
    results=("grad_y", "grad_weights"),
    result_types=lambda avals: [_slot_rows(avals), _one_a_choice(avals)],
    reference=partial(_of_problems, _combine_cotangent),
    unsupported=_unsupported,
    derives_itself=True,
)


# The derivatives. How each cotangent, tangent and product is made of ops:


def _dispatch_of(operands: dict[str, Any]) -> dict[str, Any]:
    return {name: operands[name] for name in _DISPATCH}


def _parts_of_tangent(op: Op, name: str, /, *, tangent, weights_tangent, implementation, **operands) -> list[Array]:
    """The tangent of an op that is linear in the operand `name` and in its weights."""
    (of_rows,) = op({**operands, name: tangent}, implementation=implementation)
    (of_weights,) = op({**operands, "weights": weights_tangent}, implementation=implementation)
    return [of_rows + of_weights]


def _parts_of_cotangent(op: Op, name: str, /, *, grad, weights, implementation, **operands) -> list[Array]:
    """The two cotangents of such an op."""
    options = {"implementation": implementation}
    dispatch = _dispatch_of(operands)
    if op is PERMUTE:
        rows = COMBINE({"y": grad, "weights": weights, **dispatch}, **options)
        return rows + _PRODUCTS({"x": operands[name], "y": grad, **dispatch}, **options)
    rows = PERMUTE({"x": grad, "weights": weights, **dispatch}, **options)
    return rows + _PRODUCTS({"x": grad, "y": operands[name], **dispatch}, **options)


def _tangent_op(op: Op, name: str) -> Op:
    return Op(
        name=f"{op.name}_tangent",
        operands={"tangent": Operand(2), "weights_tangent": Operand(2), name: Operand(2), **_DISPATCH, **_WEIGHTS},
        results=op.results,
        result_types=op.result_types,
        reference=partial(_parts_of_tangent, op, name),
        platforms=(),
        composed=True,
    )


def _define_derivatives(op: Op, name: str, cotangent_op: Op) -> None:
    """Of permute or combine, which is linear in the operand `name` and in its weights, and of its cotangents."""
    tangent_op = _tangent_op(op, name)

    def jvp(primals, tangents, **params):
        moving = those_that_move(tangents)
        if len(moving) < 2:
            return multilinear_jvp(op, primals, tangents, **params)
        both = {"tangent": moving[name], "weights_tangent": moving["weights"]}
        return op(primals, **params), tangent_op({**primals, **both}, **params)

    def tangent_transpose(cotangents, operands, **params):
        rest = {part: value for part, value in operands.items() if part not in ("tangent", "weights_tangent")}
        grads = cotangent_op({**rest, "grad": cotangents[0]}, **params)
        return dict(zip(("tangent", "weights_tangent"), grads))

    def cotangent_transpose(cotangents, operands, **params):
        rest = {part: value for part, value in operands.items() if part != "grad"}
        of_rows, of_weights = cotangents
        if isinstance(of_weights, ad.Zero):
            (grad,) = op({**rest, name: of_rows}, **params)
        elif isinstance(of_rows, ad.Zero):
            (grad,) = op({**rest, "weights": of_weights}, **params)
        else:
            (grad,) = tangent_op({**rest, "tangent": of_rows, "weights_tangent": of_weights}, **params)
        return {"grad": grad}

    op.def_jvp(jvp)
    tangent_op.def_jvp(partial(jvp_in_parts, tangent_op, partial(_parts_of_tangent, op, name)))
    tangent_op.def_transpose(tangent_transpose)
    cotangent_op.def_jvp(partial(jvp_in_parts, cotangent_op, partial(_parts_of_cotangent, op, name)))
    cotangent_op.def_transpose(cotangent_transpose)


_define_derivatives(PERMUTE, "x", _PERMUTE_COTANGENT)
_define_derivatives(COMBINE, "y", _COMBINE_COTANGENT)
_PRODUCTS.def_jvp(partial(multilinear_jvp, _PRODUCTS))


@PERMUTE.def_transpose
def _permute_transpose(cotangents: Sequence[Array], operands: dict[str, Any], **params: Any) -> dict[str, Array]:
    (grad,) = cotangents
    dispatch = _dispatch_of(operands)
    if ad.is_undefined_primal(operands["x"]):
        return {"x": COMBINE({"y": grad, "weights": operands.get("weights"), **dispatch}, **params)[0]}
    return {"weights": _PRODUCTS({"x": operands["x"], "y": grad, **dispatch}, **params)[0]}


@COMBINE.def_transpose
def _combine_transpose(cotangents: Sequence[Array], operands: dict[str, Any], **params: Any) -> dict[str, Array]:
    (grad,) = cotangents
    dispatch = _dispatch_of(operands)
    if ad.is_undefined_primal(operands["y"]):
        return {"y": PERMUTE({"x": grad, "weights": operands.get("weights"), **dispatch}, **params)[0]}
    return {"weights": _PRODUCTS({"x": grad, "y": operands["y"], **dispatch}, **params)[0]}


@_PRODUCTS.def_transpose
def _products_transpose(cotangents: Sequence[Array], operands: dict[str, Any], **params: Any) -> dict[str, Array]:
    (weights,) = cotangents
    dispatch = _dispatch_of(operands)
    if ad.is_undefined_primal(operands["x"]):
        return {"x": COMBINE({"y": operands["y"], "weights": weights, **dispatch}, **params)[0]}
    return {"y": PERMUTE({"x": operands["x"], "weights": weights, **dispatch}, **params)[0]}
