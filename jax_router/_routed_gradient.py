"""The gradients of hidden states and gate together, from the cotangent of the weights that a selection returns.

Each token has k logits with a gradient. Where that is faster, kernels find both products from these alone. Elsewhere a
kernel writes them twice: dense, in the parts that a matrix product in bf16 takes, for the gradient of the gate; and the
k numbers alone, of which that of the hidden states is a sum of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.export import is_symbolic_dim
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir, xla

from . import _native
from ._derivative import chosen_cotangent, dense_cotangent, weights_tangent
from ._logits import router_logits
from ._native import native_module, unsupported_selection
from ._primitive import Op, Operand, Result, jvp_in_parts, may_be_partitioned, vary_over_the_same_axes
from ._product import Axes, bf16_halves, few_of_parts, product_of_parts
from ._routed_product import routed_rows
from ._types import Implementation, Scoring


def routed_weights_tangent(
    tangents: dict[str, Array],
    operands: dict[str, Array | None],
    expert_ids: Array,
    chosen: Array,
    scoring: Scoring,
    implementation: str,
) -> Array:
    """The tangent of the weights at fixed ids from those of x and of the gate's weight, both in bf16.

    Its transpose is both their gradients. Not for a softmax over all experts.
    """
    moving = {f"{name}_tangent": tangent for name, tangent in tangents.items()}
    at = {"expert_ids": expert_ids, "residual": chosen}
    (tangent,) = _TANGENT({**operands, **moving, **at}, scoring=scoring, implementation=implementation)
    return tangent


def _in_parts(
    x_tangent: Array,
    x: Array,
    expert_ids: Array,
    residual: Array,
    weight_tangent: Array,
    weight: Array,
    token_mask: Array | None = None,
    *,
    scoring: Scoring,
    implementation: Implementation,
) -> list[Array]:
    """By way of the tangent of all logits."""
    logits_of = partial(router_logits, token_mask=token_mask, expert_ids=expert_ids, implementation=implementation)
    logits_dot = jax.jvp(logits_of, (x, weight), (x_tangent, weight_tangent))[1]
    return [weights_tangent(logits_dot, residual, expert_ids, scoring, implementation)]


_TANGENT = Op(
    name="routed_tangent",
    operands={
        "x_tangent": Operand(1),
        "x": Operand(1),
        "expert_ids": Operand(1),
        "residual": Operand(1),
        "weight_tangent": Operand(2, batched="never"),
        "weight": Operand(2, batched="never"),
        "token_mask": Operand(0, optional=True),
    },
    results=("weights_tangent",),
    result_types=lambda avals, **_: [Result(avals["expert_ids"].shape[-1:], jnp.float32)],
    reference=_in_parts,
    platforms=(),
    composed=True,
)

_TANGENT.def_jvp(partial(jvp_in_parts, _TANGENT, _in_parts))

_MOVING = ("x_tangent", "weight_tangent")


@_TANGENT.def_transpose
def _transpose(cotangents: Sequence[Array], operands: dict[str, Any], **params: Any) -> dict[str, Array]:
    known = {name: value for name, value in operands.items() if name not in _MOVING}
    return dict(zip(_MOVING, _gradients(tuple(params.items()), cotangents[0], known)))


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _gradients(params: tuple[tuple[str, Any], ...], grad_weights: Array, known: dict[str, Array]) -> list[Array]:
    by_platform = {}
    symbolic = any(is_symbolic_dim(size) for value in known.values() for size in value.shape)
    if not symbolic and not isinstance(_native.load("cuda"), ImportError):
        by_platform["cuda"] = partial(_gradients_from_kernel, **dict(params))
    return lax.platform_dependent(grad_weights, known, **by_platform, default=partial(_gradients_apart, params))


@_gradients.defjvp
def _gradients_jvp(params: Any, primals: Any, tangents: Any):
    return _gradients(params, *primals), jax.jvp(partial(_gradients_apart, params), primals, tangents)[1]


def _gradients_apart(params: Any, grad_weights: Array, known: dict[str, Array]) -> list[Array]:
    """As JAX finds them for each operand by itself."""
    rest: dict[str, Any] = {**known, **dict(params)}

    def tangent(x: Array, weight: Array) -> Array:
        return _in_parts(x_tangent=x, weight_tangent=weight, **rest)[0]

    return list(jax.linear_transpose(tangent, known["x"], known["weight"])(grad_weights))


def _gradients_from_kernel(
    grad_weights: Array, known: dict[str, Array], *, scoring: Scoring, implementation: str
) -> list[Array]:
    num_experts = known["weight"].shape[0]
    params: dict[str, Any] = {"scoring": scoring, "num_experts": num_experts, "implementation": implementation}
    operands: dict[str, Any] = {"grad_weights": grad_weights, **known}
    if (mask := operands.pop("token_mask", None)) is not None:
        # The sum is over tokens, and 0 * NaN is NaN.
        operands["x"] = jnp.where(mask[..., None], known["x"], jnp.zeros((), known["x"].dtype))
    values = vary_over_the_same_axes([operands[name] for name in _PRODUCTS.operands])
    return PRODUCTS_OF_TOKENS.bind(*values, **params)


def products_apart(
    grad_weights: Array,
    expert_ids: Array,
    residual: Array,
    x: Array,
    weight: Array,
    *,
    scoring: Scoring,
    num_experts: int,
    implementation: str,
    problem_ndim: int = 0,
) -> list[Array]:
    """Both gradients, that of the weight summed over all axes of tokens behind the first `problem_ndim`."""
    at = {"grad_weights": grad_weights, "expert_ids": expert_ids, "residual": residual}
    parts, chosen = _COTANGENT(at, scoring=scoring, num_experts=num_experts, implementation=implementation)
    grad_x = routed_rows(parts, chosen, weight, expert_ids, implementation)
    problems, tokens = tuple(range(problem_ndim)), tuple(range(problem_ndim, x.ndim - 1))
    product = few_of_parts if prod(x.shape[problem_ndim:-1]) <= _FEW_TOKENS else product_of_parts
    return [grad_x, product(parts, x, Axes((tokens, tokens), (problems, problems)), dtype=weight.dtype)]


# Up to so many, XLA's product in three parts is faster than one of parts: measured on an H200 with 16, 64 and 256.
_FEW_TOKENS = 64


def _products_reference(grad_weights: Array, **rest: Any) -> list[Array]:
    return products_apart(grad_weights, problem_ndim=grad_weights.ndim - 2, **rest)


def plan_sizes(avals: dict[str, Any]) -> dict[str, int]:
    """The case as the native module wants to know it."""
    tokens, k = avals["expert_ids"].shape[-2:]
    num_experts, hidden = avals["weight"].shape
    return {"rows": tokens, "k": k, "experts": num_experts, "hidden": hidden}


def _products_pay(platform: str, avals: dict[str, Any], **_: Any) -> bool:
    is_one_problem = avals["x"].ndim == 2
    return is_one_problem and native_module(platform).pays_everywhere("routed_gradients", **plan_sizes(avals))


def _products_workspace(platform: str, avals: dict[str, Any], **_: Any) -> int:
    return native_module(platform).workspace_bytes("routed_gradients", **plan_sizes(avals))


_PRODUCTS = Op(
    name="routed_gradients",
    operands={
        "grad_weights": Operand(2),
        "expert_ids": Operand(2),
        "residual": Operand(2),
        "x": Operand(2),
        "weight": Operand(2, batched="never"),
    },
    results=("grad_x", "grad_weight", "workspace"),
    result_types=lambda avals, **_: [
        Result(avals["x"].shape[-2:], avals["x"].dtype),
        Result(avals["weight"].shape, avals["weight"].dtype),
    ],
    reference=_products_reference,
    attributes={"scoring": Scoring, "num_experts": int},
    platforms=("cuda",),
    composed=True,
    pays=_products_pay,
    workspace=_products_workspace,
)


def products_in_one(*values: Array, **params: Any) -> list[Array]:
    """The operands of PRODUCTS_OF_TOKENS with all tokens on one axis, as the kernels take them."""
    *of_tokens, weight = values
    flat = [value.reshape(prod(value.shape[:-1]), value.shape[-1]) for value in of_tokens]
    grad_x, grad_weight = _PRODUCTS(dict(zip(_PRODUCTS.operands, (*flat, weight))), **params)
    return [grad_x.reshape(of_tokens[-1].shape), grad_weight]


def _lower_products(ctx: Any, *values: Any, **params: Any) -> Any:
    """Tokens get one axis only where XLA may not split several over devices."""
    products = products_apart if may_be_partitioned(ctx) else products_in_one
    return mlir.lower_fun(partial(products, **params), multiple_results=True)(ctx, *values)


def _batch_products(values: Sequence[Any], dims: Sequence[int | None], **params: Any) -> Any:
    return jax.vmap(partial(products_apart, **params), in_axes=tuple(dims))(*values), [0, 0]


# Both gradients of any number of axes of tokens, the operands in the order of _PRODUCTS.
PRODUCTS_OF_TOKENS = Primitive("jax_router.routed_gradients_of_tokens")
PRODUCTS_OF_TOKENS.multiple_results = True
PRODUCTS_OF_TOKENS.def_impl(partial(xla.apply_primitive, PRODUCTS_OF_TOKENS))
PRODUCTS_OF_TOKENS.def_abstract_eval(lambda *avals, **_: list(avals[-2:]))
batching.primitive_batchers[PRODUCTS_OF_TOKENS] = _batch_products
mlir.register_lowering(PRODUCTS_OF_TOKENS, _lower_products)


def _cotangent_reference(
    grad_weights: Array, expert_ids: Array, residual: Array, *, scoring: Scoring, num_experts: int
) -> list[Array]:
    chosen = chosen_cotangent(grad_weights, expert_ids, residual, scoring)
    return [bf16_halves(dense_cotangent(chosen, expert_ids, num_experts)), chosen]


def _cotangent_unsupported(platform: str, avals: dict[str, Any], *, num_experts: int, **_: Any) -> str | None:
    return unsupported_selection(platform, num_experts, avals["expert_ids"].shape[-1])


_COTANGENT = Op(
    name="routed_cotangent",
    operands={"grad_weights": Operand(1), "expert_ids": Operand(1), "residual": Operand(1)},
    results=("grad_logits", "grad_chosen"),
    result_types=lambda avals, num_experts, **_: [
        Result((num_experts, 2), jnp.bfloat16),
        Result(avals["expert_ids"].shape[-1:], jnp.float32),
    ],
    reference=_cotangent_reference,
    attributes={"scoring": Scoring, "num_experts": int},
    platforms=("cuda",),
    unsupported=_cotangent_unsupported,
)
