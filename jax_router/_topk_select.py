"""Exact, deterministic top-k over the last axis."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.export import is_symbolic_dim
from jax.interpreters import ad

from . import _check, reference
from ._derivative import IDENTITY, ROUTING, weights_tangent
from ._ids import as_int32_lengths
from ._native import native_module
from ._primitive import Op, Operand, Result, zero_tangent
from ._types import Implementation


def topk_select(
    scores: Array,
    k: int,
    *,
    lengths: Array | None = None,
    sorted: bool = True,
    implementation: Implementation = "auto",
) -> tuple[Array, Array]:
    """The `k` largest entries of each row, best first, and their indices.

    Equal entries go to the lower index, +0 is above -0, and every NaN is above +inf. The same input gives the same
    output, bit for bit.

    It may stand where `jax.lax.top_k(scores, k)` stands, but that puts a NaN with the sign bit below -inf (0/0 gives
    one on x86), takes integers and bool too, and has an `axis`, where this selects along the last one.

    Args:
        scores: f32, bf16 or f16 `[..., L]`.
        k: how many, from 0 to L.
        lengths: integers `[...]`. Only the first `lengths` entries of a row count (clamped to `[0, L]`). Results past
            them hold index -1 and value -inf.
        sorted: best first; or else the same set in ascending order of the index.
        implementation: `"auto"`, `"native"` or `"reference"`.

    Returns:
        `(values, indices)`: `[..., k]` in the dtype of `scores`, and int32 `[..., k]`.

    Differentiable in `scores`, through the values.

    Raises:
        TypeError: an operand has a wrong dtype, or an option a wrong type.
        ValueError: a wrong shape or option.
        NotImplementedError: `implementation="native"` where no kernel can run.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax_router import topk_select
        >>> scores = jnp.array([[0.0, 2.0, 1.0, 2.0]])
        >>> values, indices = topk_select(scores, 3)
        >>> values, indices
        (Array([[2., 2., 1.]], dtype=float32), Array([[1, 3, 2]], dtype=int32))
        >>> topk_select(scores, 3, lengths=jnp.array([2]))[1]
        Array([[ 1,  0, -1]], dtype=int32)
        >>> topk_select(scores, 3, sorted=False)[1]
        Array([[1, 2, 3]], dtype=int32)
    """
    scores = _check.float_array("scores", scores)
    length = scores.shape[-1]
    k = _check.static_int("k", k, 0, length, " (the last axis of scores)")
    sorted = _check.static_bool("sorted", sorted)
    if lengths is not None:
        lengths = _check.int_array("lengths", lengths)
        _check.same_shape("lengths", lengths, scores.shape[:-1])
        if lengths.dtype != jnp.int32:
            lengths = as_int32_lengths(lengths, length)
    how = _check.implementation(implementation)
    if not is_symbolic_dim(k) and k == 0:
        none = scores[..., :0].astype(scores.dtype)  # its own dtype, where scores has none: see the reference
        return none, jnp.zeros_like(none, jnp.int32)
    operands = {"scores": scores, "lengths": lengths}
    values, indices = _TOPK_SELECT(operands, k=k, sorted=sorted, implementation=how)
    return values, indices


def _result_types(avals: dict[str, Any], *, k: int, **_: Any) -> list[Result]:
    return [Result((k,), avals["scores"].dtype), Result((k,), jnp.int32)]


def _unsupported(platform: str, avals: dict[str, Any], *, k: int, **_: Any) -> str | None:
    limit = native_module(platform).max_select_k()
    return f"at most k = {limit}, got {k}" if k > limit else None


_TOPK_SELECT = Op(
    name="topk_select",
    operands={"scores": Operand(1), "lengths": Operand(0, optional=True)},
    results=("values", "indices"),
    result_types=_result_types,
    reference=reference.topk_select,
    attributes={"k": int, "sorted": bool},
    unsupported=_unsupported,
)


@_TOPK_SELECT.def_jvp
def _jvp(primals: dict[str, Any], tangents: dict[str, Any], **params: Any):
    values, indices = checkpoint_name(_TOPK_SELECT(primals, **params), ROUTING)
    scores_dot = tangents["scores"]
    if isinstance(scores_dot, ad.Zero):
        values_dot: Any = zero_tangent(values)
    else:
        tangent = weights_tangent(scores_dot, None, indices, IDENTITY, params["implementation"])
        values_dot = tangent.astype(values.dtype)
    return [values, indices], [values_dot, zero_tangent(indices)]
