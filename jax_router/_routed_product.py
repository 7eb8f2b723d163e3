"""The gate product where only k of a token's logits matter: as a tangent, and the other way as a cotangent.

A selection gives all other logits no gradient, so that of the hidden states is a sum of k rows of the weight for each
token: a `combine` of its experts' rows, and no product with all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.export import is_symbolic_dim
from jax.interpreters import ad, mlir

from . import _native
from ._primitive import Op, Operand, Result, may_be_partitioned, multilinear_jvp
from ._product import Axes, product, product_of_parts
from ._slots import COMBINE


def routed_product(x: Array, weight: Array, expert_ids: Array, precision: Any, implementation: str) -> Array:
    """`x @ weight.T` in f32, of which only the logits at `expert_ids` `[..., k]` are read: distinct ids, or -1."""
    operands = {"x": x, "weight": weight, "expert_ids": expert_ids}
    return _LOGITS(operands, precision=precision, implementation=implementation)[0]


def routed_rows(parts: Array, chosen: Array, weight: Array, expert_ids: Array, implementation: str) -> Array:
    """`g @ weight` of a g `[..., E]` that is `chosen` `[..., k]` at the ids, and zero elsewhere.

    It comes as `chosen`, and as a whole in `bf16_halves`. Not to be differentiated.
    """
    operands = {"parts": parts, "chosen": chosen, "weight": weight, "expert_ids": expert_ids}
    return _ROWS_OF_PARTS(operands, implementation=implementation)[0]


def _logits(x: Array, weight: Array, expert_ids: Array, *, precision: Any, implementation: str) -> list[Array]:
    return [_dot(x, weight, Axes(((x.ndim - 1,), (1,))), precision, jnp.float32)]


def _rows(logits: Array, weight: Array, expert_ids: Array, *, precision: Any, implementation: str) -> list[Array]:
    """`logits @ weight`, of logits that are zero but at the ids."""

    def sums(logits: Array, weight: Array, expert_ids: Array) -> list[Array]:
        chosen = jnp.take_along_axis(logits, jnp.maximum(expert_ids, 0), axis=-1)
        return _sums_of_rows(chosen, weight, expert_ids, implementation)

    def product_of_all(logits: Array, weight: Array, expert_ids: Array) -> list[Array]:
        return [_dot(logits, weight, Axes(((logits.ndim - 1,), (0,))), precision, weight.dtype)]

    return _faster_of(sums, product_of_all, logits, weight, expert_ids, implementation)


def _rows_of_parts(
    parts: Array, chosen: Array, weight: Array, expert_ids: Array, *, implementation: str
) -> list[Array]:
    def sums(parts: Array, weight: Array, expert_ids: Array) -> list[Array]:
        return _sums_of_rows(chosen, weight, expert_ids, implementation)

    def product_of_all(parts: Array, weight: Array, expert_ids: Array) -> list[Array]:
        return [product_of_parts(parts, weight, Axes(((parts.ndim - 2,), (0,))), dtype=weight.dtype)]

    return _faster_of(sums, product_of_all, parts, weight, expert_ids, implementation)


def _faster_of(
    sums: Callable[..., list[Array]],
    product_of_all: Callable[..., list[Array]],
    logits: Array,
    weight: Array,
    expert_ids: Array,
    implementation: str,
) -> list[Array]:
    by_platform = {}
    if implementation != "reference" and _are_few(logits, weight, expert_ids):
        with_kernels = [name for name in _native.PLATFORMS if not isinstance(_native.load(name), ImportError)]
        by_platform = dict.fromkeys(with_kernels, sums)
    return lax.platform_dependent(logits, weight, expert_ids, **by_platform, default=product_of_all)


# Of how many experts each choice must be one, for a sum of rows to be faster than a product.
_EXPERTS_A_CHOICE = 16


def _are_few(logits: Array, weight: Array, expert_ids: Array) -> bool:
    """Whether a token's experts are few enough for a sum of rows; not where sizes are unknown, or an axis is sharded.

    A mapped axis may be sharded, which does not show where the derivative is taken.
    """
    num_experts, k = weight.shape[0], expert_ids.shape[-1]
    if any(any(jax.typeof(value).sharding.spec) for value in (logits, weight, expert_ids)):
        return False
    return not is_symbolic_dim(num_experts) and not is_symbolic_dim(k) and num_experts >= _EXPERTS_A_CHOICE * k


def _sums_of_rows(chosen: Array, weight: Array, expert_ids: Array, implementation: str) -> list[Array]:
    """From the chosen logits alone, to f32 accuracy."""
    k, (num_experts, hidden) = expert_ids.shape[-1], weight.shape
    operands = {
        "y": weight,
        # Which combine does not read: none is a token, and no two are equal, or XLA would write them in every call.
        "token_index": jnp.asarray(np.arange(-num_experts, 0, dtype=np.int32)),
        "slot": expert_ids.reshape(-1, k),
        "weights": chosen.reshape(-1, k),
    }
    (rows,) = COMBINE(operands, implementation=implementation)
    return [rows.reshape(*expert_ids.shape[:-1], hidden)]


def _dot(lhs: Array, rhs: Array, axes: Axes, precision: Any, dtype: Any) -> Array:
    if precision is None and jnp.bfloat16 in (lhs.dtype, rhs.dtype):
        return product(lhs, rhs, axes, dtype=dtype)
    lhs, rhs = lhs.astype(jnp.float32), rhs.astype(jnp.float32)
    precision = precision or lax.Precision.HIGHEST
    return lax.dot_general(lhs, rhs, axes, precision=precision, preferred_element_type=jnp.float32).astype(dtype)


_LOGITS = Op(
    name="routed_logits",
    operands={"x": Operand(1), "weight": Operand(2, batched="never"), "expert_ids": Operand(1)},
    results=("logits",),
    result_types=lambda avals, **_: [Result(avals["weight"].shape[:1], jnp.float32)],
    reference=_logits,
    platforms=(),
    composed=True,
)

_ROWS = Op(
    name="routed_rows",
    operands={"logits": Operand(1), "weight": Operand(2, batched="never"), "expert_ids": Operand(1)},
    results=("rows",),
    result_types=lambda avals, **_: [Result(avals["weight"].shape[1:], avals["weight"].dtype)],
    reference=_rows,
    platforms=(),
    composed=True,
)


_ROWS_OF_PARTS = Op(
    name="routed_rows_of_parts",
    operands={
        "parts": Operand(2),
        "chosen": Operand(1),
        "weight": Operand(2, batched="never"),
        "expert_ids": Operand(1),
    },
    results=("rows",),
    result_types=lambda avals, **_: [Result(avals["weight"].shape[1:], avals["weight"].dtype)],
    reference=_rows_of_parts,
    platforms=(),
    composed=True,
)


def _lower_rows(op: Op, ctx: Any, *values: Any, names: Any, implementation: str, **params: Any) -> Any:
    """XLA gets the product where it may split that over devices."""
    way = "reference" if may_be_partitioned(ctx) else implementation
    return mlir.lower_fun(partial(op.reference, implementation=way, **params), multiple_results=True)(ctx, *values)


for _op in (_ROWS, _ROWS_OF_PARTS):
    mlir.register_lowering(_op.primitive, partial(_lower_rows, _op))


def _define_derivatives(op: Op, name: str, transposed: Op, transposed_name: str) -> None:
    """Of an op that is linear in the operand `name` and in the weight."""
    op.def_jvp(partial(multilinear_jvp, op))

    @op.def_transpose
    def transpose(cotangents: Sequence[Array], operands: dict[str, Any], *, precision: Any, implementation: str):
        params = {"precision": precision, "implementation": implementation}
        (cotangent,) = cotangents
        if ad.is_undefined_primal(operands[name]):
            rest = {key: value for key, value in operands.items() if key != name}
            return {name: transposed({**rest, transposed_name: cotangent}, **params)[0]}
        found = {name: operands[name], transposed_name: cotangent}
        # A token without a choice may hold anything, and 0 * NaN is NaN.
        has_choice = (operands["expert_ids"] >= 0).any(-1, keepdims=True)
        x = jnp.where(has_choice, found["x"], jnp.zeros((), found["x"].dtype))
        tokens = tuple(range(cotangent.ndim - 1))
        return {"weight": _dot(found["logits"], x, Axes((tokens, tokens)), precision, operands["weight"].aval.dtype)}


_define_derivatives(_LOGITS, "x", _ROWS, "logits")
_define_derivatives(_ROWS, "logits", _LOGITS, "x")
