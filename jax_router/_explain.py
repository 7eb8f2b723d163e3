"""Which kernel computes a call, and why not: asked of the ops and of the plans of the kernels themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from math import prod
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

from . import _dense_router, _native, _routed_gradient
from ._primitive import OPS, Op


def devices() -> tuple[list[jax.Device], str]:
    """JAX's devices, or none and why there are none."""
    try:
        return jax.devices(), ""
    except (RuntimeError, AssertionError) as error:
        platforms = jax.config.jax_platforms  # type: ignore[attr-defined]
        return [], next(iter(str(error).splitlines()), f"JAX finds no device of jax_platforms {platforms!r}")


def kernel_platform() -> str:
    """What the default device is called where kernels are looked for."""
    return {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())


_OPS = {op.primitive: op for op in OPS}


class Answer(NamedTuple):
    """How an op of a call is computed.

    Attributes:
        op: its name.
        native: whether a kernel does it.
        how: the name of the plan, or why there is no kernel.
        parts: of an op that is made of others, and has no kernel of its own here: how they are computed.
    """

    op: str
    native: bool
    how: str
    parts: tuple[Answer, ...] = ()

    @property
    def is_native_throughout(self) -> bool:
        """Whether kernels do it all, but for XLA's product."""
        return self.native or (bool(self.parts) and all(part.is_native_throughout for part in self.parts))


def explain(
    call: Callable[..., Any], *operands: Any, platform: str, device: Mapping[str, int] | None = None
) -> list[Answer]:
    """How the ops of a call would be computed in a program that XLA may not partition.

    Args:
        call: a function of the operands.
        operands: arrays, or their shapes and dtypes.
        platform: `"cpu"`, `"cuda"`, or another one that JAX has.
        device: a GPU that is described, as in `_native.GPUS`; default the one of this process.
    """
    answers = (
        _answer(op, avals, platform, device, **params)
        for op, avals, params in _calls(jax.make_jaxpr(call)(*operands).jaxpr, platform)
    )
    return list(dict.fromkeys(answers))


def _calls(jaxpr: Jaxpr, platform: str) -> Iterator[tuple[Op, dict[str, Any], dict[str, Any]]]:
    """The ops that a program has on a platform, each with the avals of its operands and its parameters.

    One that has kernels nowhere, because it is made of others, is these.
    """
    for equation in jaxpr.eqns:
        if op := _OPS.get(equation.primitive):
            params = dict(equation.params)
            avals = dict(zip(params.pop("names"), (var.aval for var in equation.invars)))
            if op.composed and not op.platforms:
                yield from _calls(_made_of(op, avals, **params), platform)
            else:
                yield op, avals, params
            continue
        if equation.primitive is _routed_gradient.PRODUCTS_OF_TOKENS:
            avals_in: list[Any] = [var.aval for var in equation.invars]
            structs = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals_in]
            made_of = jax.make_jaxpr(partial(_routed_gradient.products_in_one, **equation.params))(*structs)
            yield from _calls(made_of.jaxpr, platform)
            continue
        for inner in _programs_in(equation.params, platform):
            yield from _calls(inner, platform)


def _programs_in(params: Mapping[str, Any], platform: str) -> Iterator[Jaxpr]:
    """Those among an equation's parameters, but for the branches of other platforms."""
    if platforms_of_branches := params.get("branches_platforms"):
        branches = zip(params["branches"], platforms_of_branches)
        params = {"taken": [branch for branch, names in branches if names is None or platform in names][:1]}
    for value in params.values():
        for inner in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(inner, (Jaxpr, ClosedJaxpr)):
                yield inner if isinstance(inner, Jaxpr) else inner.jaxpr


def _made_of(op: Op, avals: dict[str, Any], **params: Any) -> Jaxpr:
    structs = {name: jax.ShapeDtypeStruct(aval.shape, aval.dtype) for name, aval in avals.items()}
    return jax.make_jaxpr(lambda of: op.reference(**of, **params))(structs).jaxpr


def _answer(op: Op, avals: dict[str, Any], platform: str, device: Mapping[str, int] | None, **params: Any) -> Answer:
    plan, reason = None, _missing(op, platform)
    if reason is None and platform == "cuda":
        plan, reason = _cuda_plan(op, avals, device, **params)
    elif reason is None:
        reason = op.reason_against_kernels(platform, avals, partitioned=False, **params)
    if reason is None:
        return Answer(op.name, True, plan or f"the {platform} kernel")
    if not op.composed:
        return Answer(op.name, False, reason)
    structs = {name: jax.ShapeDtypeStruct(aval.shape, aval.dtype) for name, aval in avals.items()}
    made_of = explain(lambda of: op.reference(**of, **params), structs, platform=platform, device=device)
    return Answer(op.name, False, reason, tuple(made_of))


def _missing(op: Op, platform: str) -> str | None:
    """Why there is no kernel of the op for a platform, whatever the case."""
    if platform not in op.platforms:
        return f"its kernels are for {' and '.join(op.platforms) or 'no platform'}"
    error = _native.load(platform)
    return f"the {platform} kernels are not loaded" if isinstance(error, ImportError) else None


def _cuda_plan(
    op: Op, avals: dict[str, Any], device: Mapping[str, int] | None, **params: Any
) -> tuple[str | None, str | None]:
    """The name of the plan, or why there is none."""
    module = _native.native_module("cuda")
    # Whether a composed op pays is a question of the device, and may be asked of one that is described.
    asks_device = device is not None and op.composed and params.get("precision") is None
    if not asks_device and (reason := op.reason_against_kernels("cuda", avals, partitioned=False, **params)):
        return None, reason
    if (sizes := _plan_sizes(op.name, avals, params)) is None:
        return None, None
    plan, _ = module.plans(op.name, device, **sizes)
    if plan is None:
        asks_why = asks_device and op.name == "dense_router"
        reason = module.dense_router_unsupported(**{**sizes, "rows": 1}) if asks_why else ""
        return None, reason or "no kernel for so many tokens and experts on that GPU"
    if not module.pays(op.name, device, **sizes):
        return None, "the kernels do not pay"
    return plan, None


def _plan_sizes(op: str, avals: dict[str, Any], params: dict[str, Any]) -> dict[str, Any] | None:
    """What a plan is asked by; None of an op whose plans nobody names."""
    if op == "dense_router":
        return _dense_router.plan_sizes(avals, params["selection"])
    if op == "expert_dispatch":
        return _native.choice_sizes(avals["expert_ids"], params["num_experts"])
    if op == "activation_topk":
        selection = params["selection"]
        groups = {"num_groups": selection.num_groups, "top_groups": selection.top_groups}
        sizes = {"k": selection.top_k, **groups, "bias": "bias" in avals}
        return {**_rows(avals["logits"]), "experts": avals["logits"].shape[-1], **sizes}
    if op == "route_cotangent":
        scoring = params["scoring"]
        sizes = {"rows": prod(avals["expert_ids"].shape[:-1]), "k": avals["expert_ids"].shape[-1]}
        dtype = _native.NATIVE_DTYPES[params["dtype"].name]
        return {**sizes, "experts": params["num_experts"], "whole_row": scoring.needs_whole_row, "dtype": dtype}
    if op == "routed_cotangent":
        *rows, k = avals["expert_ids"].shape
        return {"rows": prod(rows), "k": k, "experts": params["num_experts"]}
    if op == "routed_gradients":
        return _routed_gradient.plan_sizes(avals)
    if op in ("permute", "combine", "permute_cotangent", "combine_cotangent"):
        moved = next(iter(avals.values()))
        *batch, tokens, k = avals["slot"].shape
        sizes = {"batch": prod(batch), "tokens": tokens, "k": k, "slots": avals["token_index"].shape[-1]}
        sizes |= {"hidden": moved.shape[-1], "dtype": _native.NATIVE_DTYPES[moved.dtype.name]}
        return {**sizes, "weights": "weights" in avals} if op == "permute" else sizes
    return None


def _rows(aval: Any) -> dict[str, Any]:
    return {"rows": prod(aval.shape[:-1]), "dtype": _native.NATIVE_DTYPES[aval.dtype.name]}
