"""Rows of tokens to the slots of their experts, and back."""

from __future__ import annotations

from collections.abc import Callable

from jax import Array

from . import _check, _slots
from ._types import Dispatch, Implementation, Weigh


def permute(
    x: Array, dispatch: Dispatch, weights: Array | None = None, *, implementation: Implementation = "auto"
) -> Array:
    """The row of its token for each slot.

    `out[s] = x[token_index[s]]`, and zeros in a slot without a choice. With `weights`, the row of slot
    `s = slot[n, j]` is `weights[n, j] * x[n]`, multiplied in f32 and rounded once, as models do that weigh what goes
    into their experts (Llama 4). x is read once, however many slots a token has.

    The gradient in x sums the rows of a token's slots, in f32 in the order of its choices: a gather, where that of
    `x[token_index]` is a scatter-add. It has the same bits every time. That in `weights` is
    `<x[n], g[slot[n, j]]>`, 0 for a choice without a slot.

    A slot is a choice's where `token_index` and `slot` say the same; any other slot has no choice. Where several
    choices of a token are in one slot, as a dispatch made by hand may have it, the weight of the last one counts.

    Args:
        x: f32, bf16 or f16 `[..., D]`, a row a token; without `weights` also a float dtype of 8 bits, whose bits are
            copied.
        dispatch: of the same tokens, as `expert_dispatch` returns it. `group_sizes` is not used.
        weights: f32 `[..., k]`, a number a choice.
        implementation: `"auto"`, `"native"` or `"reference"`.

    Returns:
        `[S, D]` with the dtype of x, S being the number of slots.

    Differentiable in `x` and `weights`.

    Raises:
        TypeError: an operand has a wrong dtype, or dispatch is none.
        ValueError: a wrong shape.
        NotImplementedError: `implementation="native"` where no kernel can run.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax_router import expert_dispatch, permute
        >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
        >>> permute(x, expert_dispatch(jnp.array([[1, 0], [0, 2]]), 3))
        Array([[1., 2.],
               [3., 4.],
               [1., 2.],
               [3., 4.]], dtype=float32)
    """
    x = _check.rows_to_copy("x", x) if weights is None else _check.float_array("x", x)
    dispatch = _check.dispatch_arrays("dispatch", dispatch)
    tokens = dispatch.slot.shape[:-1]
    if x.shape[:-1] != tokens:
        raise ValueError(f"x must have shape {(*tokens, 'D')}, with the tokens of dispatch.slot; got {x.shape}")
    return _slots.permute(x, dispatch, _weights(dispatch, weights), _check.implementation(implementation))


def combine(
    y: Array, dispatch: Dispatch, weights: Array | None = None, *, implementation: Implementation = "auto"
) -> Array:
    """The weighted sum of the rows of its slots for each token.

    `out[n] = sum over j of weights[n, j] * y[slot[n, j]]`, in f32 in the order of the choices, rounded once; without
    `weights` a plain sum. A choice without a slot adds nothing, and what y holds in a slot without a choice is read
    into no result: it may be NaN. Which rows these are, `slot` says alone: to drop a choice by hand, set its `slot` to
    -1.

    The gradient in y is `weights[n, j] * g[n]` in slot `slot[n, j]`, and zeros in slots without a choice; that in
    `weights` is `<y[slot[n, j]], g[n]>`, 0 for a choice without a slot. One kernel computes the two, without atomics:
    they have the same bits every time, whatever else is in the batch.

    Args:
        y: f32, bf16 or f16 `[S, D]`, a row a slot.
        dispatch: as `expert_dispatch` returns it. `group_sizes` is not used.
        weights: f32 `[..., k]`, a number a choice.
        implementation: `"auto"`, `"native"` or `"reference"`.

    Returns:
        `[..., D]` with the dtype of y and the leading axes of `dispatch.slot`.

    Differentiable in `y` and `weights`.

    Raises:
        TypeError: an operand has a wrong dtype, or dispatch is none.
        ValueError: a wrong shape.
        NotImplementedError: `implementation="native"` where no kernel can run.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax_router import combine, expert_dispatch
        >>> dispatch = expert_dispatch(jnp.array([[1, 0], [0, 2]]), 3)
        >>> y = jnp.array([[1.0], [2.0], [3.0], [4.0]])
        >>> combine(y, dispatch, weights=jnp.array([[0.5, 0.5], [1.0, 0.25]]))
        Array([[2.],
               [3.]], dtype=float32)
    """
    y = _check.float_array("y", y)
    dispatch = _check.dispatch_arrays("dispatch", dispatch)
    slots = dispatch.token_index.shape
    if y.ndim != 2 or y.shape[:1] != slots:
        raise ValueError(f"y must have shape {(*slots, 'D')}, with the slots of dispatch.token_index; got {y.shape}")
    return _slots.combine(y, dispatch, _weights(dispatch, weights), _check.implementation(implementation))


def _weights(dispatch: Dispatch, weights: Array | None) -> Array | None:
    if weights is not None:
        weights = _check.float32_array("weights", weights)
        _check.same_shape("weights", weights, dispatch.slot.shape)
    return weights


def through_experts(
    x: Array,
    dispatch: Dispatch,
    weights: Array,
    experts: Callable[[Array, Array], Array],
    *,
    weigh: Weigh,
    implementation: Implementation,
) -> Array:
    """The weighted sum of what the experts give for each token, from rows `[S, D]` and `group_sizes` to rows alike."""
    before, after = (weights, None) if weigh == "input" else (None, weights)
    rows = permute(x, dispatch, before, implementation=implementation)
    y = experts(rows, dispatch.group_sizes)
    if y.shape != rows.shape:
        raise ValueError(f"experts must return rows of shape {rows.shape}, as it got them; got {y.shape}")
    return combine(y, dispatch, after, implementation=implementation)
