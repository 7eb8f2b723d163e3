"""The lines that `python -m benchmarks crossings` walks: an op at sizes of which one varies.

Together they come through every kernel that an H100 takes, and past every number that a choice between two depends on.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jax_router import (
    Dispatch,
    activation_topk,
    combine,
    dense_router,
    expert_counts,
    expert_dispatch,
    hash_router,
    permute,
    route_at,
    scored_hash_router,
    topk_select,
)
from jax_router._logits import router_logits
from jax_router._primitive import OPS
from jax_router._routed_gradient import products_apart, products_in_one
from jax_router._types import Scoring
from support.models import DTYPES

from .cases import Contender, Spec, backward

# Ops whose kernels take the place of products of XLA's and other kernels. These are a plan of theirs: UNFUSED.
COMPOSED = tuple(op.name for op in OPS if op.composed and "cuda" in op.platforms)
UNFUSED = "unfused"

Sizes = Mapping[str, Any]  # as `plans` of the native module takes them
Program = tuple[Contender, tuple[Spec, ...]]  # and its inputs

_LETTERS = {"rows": "N", "tokens": "N", "length": "L", "experts": "E", "hidden": "D", "num_groups": "groups"}


@dataclasses.dataclass(frozen=True)
class Line:
    """An op at sizes of which one varies.

    Attributes:
        op: as the native module calls it.
        varied: the size that varies, from `first` to `last`.
        fixed: all others.
        is_timed: unless only lines of certain names are asked for. The other lines are like a timed one in another
            dtype or with other keys.
        step: of which all sizes of the line are multiples.
    """

    op: str
    varied: str
    first: int
    last: int
    fixed: Sizes
    is_timed: bool = True
    step: int = 1

    @property
    def id(self) -> str:
        return "/".join([self.op, self.varied, *filter(None, itertools.starmap(_described, self.fixed.items()))])

    def sizes(self, value: int) -> dict[str, Any]:
        return {**self.fixed, self.varied: value}

    def rounded(self, value: float) -> int:
        return round(value / self.step) * self.step


def _described(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return name if value else ""
    return value if isinstance(value, str) else f"{_LETTERS.get(name, name)}{value}"


def lines() -> list[Line]:
    makers = (_activation_topk, _topk_select, _dense_router, _routed_gradients, _expert_dispatch, _moved, _others)
    return [line for maker in makers for line in maker()]


def _activation_topk() -> Iterator[Line]:
    def line(varied: str, first: int, last: int, is_timed: bool, **fixed: Any) -> Line:
        return Line("activation_topk", varied, first, last, fixed, is_timed)

    for dtype, bias in itertools.product(DTYPES, (False, True)):
        is_plain = dtype == "f32" and not bias
        is_scored = dtype == "f32" and bias
        # Up to 256 experts without a bias have halves of warps however few the rows.
        for experts in (64, 256, 384, 512):
            of_f32 = dtype == "f32" and experts >= (256 if bias else 384)
            is_timed = of_f32 or (dtype == "bf16" and (experts == 256 or (bias and experts > 256)))
            yield line("rows", 1, 70000, is_timed, dtype=dtype, bias=bias, experts=experts, k=6)
        for rows, is_timed in ((64, is_scored), (256, False), (16384, is_plain)):
            yield line("experts", 8, 4096, is_timed, dtype=dtype, bias=bias, rows=rows, k=6)
        yield line("k", 1, 64, is_plain, dtype=dtype, bias=bias, rows=16384, experts=256)
    # Models with groups have a bias. Without one, bf16 logits give ties between groups, which take longer.
    for dtype, experts in itertools.product(DTYPES, (64, 256, 512, 1024, 2048)):
        is_timed = dtype != "f16" and experts == 256
        yield line("rows", 1, 70000, is_timed, dtype=dtype, bias=True, num_groups=8, experts=experts, k=8)


def _topk_select() -> Iterator[Line]:
    def line(varied: str, first: int, last: int, *timed: str, **fixed: Any) -> Iterator[Line]:
        for dtype in DTYPES:
            yield Line("topk_select", varied, first, last, {"dtype": dtype, **fixed}, dtype in timed)

    # Short rows: halves of warps, warps, and blocks.
    yield from line("rows", 1, 70000, "f32", length=512, k=6, sorted=True)
    yield from line("rows", 1, 70000, "f32", length=512, k=64, sorted=False)
    yield from line("rows", 1, 70000, "f32", length=1024, k=24, sorted=False)
    yield from line("rows", 1, 70000, "f32", length=1024, k=24, sorted=True)
    yield from line("rows", 1, 70000, "f32", length=512, k=100, sorted=False)
    yield from line("rows", 1, 70000, "f32", length=512, k=100, sorted=True)
    yield from line("rows", 1, 70000, "f32", length=1024, k=100, sorted=False)
    yield from line("rows", 1, 16384, "f32", "bf16", length=4096, k=64, sorted=False)
    yield from line("rows", 1, 16384, "bf16", length=8192, k=64, sorted=False)
    yield from line("length", 8, 1024, rows=256, k=6, sorted=False)
    yield from line("length", 8, 1024, rows=16384, k=6, sorted=False)
    yield from line("length", 64, 65536, "f32", rows=256, k=64, sorted=False)
    yield from line("length", 64, 16384, "f32", rows=4096, k=64, sorted=False)
    yield from line("k", 1, 256, "f32", rows=4096, length=256, sorted=False)
    yield from line("k", 1, 256, "f32", rows=500, length=1024, sorted=True)
    # In the registers of a block.
    yield from line("rows", 1, 8192, "f32", length=4096, k=512, sorted=False)
    yield from line("rows", 1, 8192, "bf16", length=8192, k=1024, sorted=True)
    yield from line("k", 1, 4096, "f32", rows=100, length=8192, sorted=True)
    yield from line("k", 1, 4096, rows=100, length=4096, sorted=True)
    yield from line("k", 1, 4096, "bf16", rows=1024, length=4096, sorted=True)
    yield from line("k", 1, 4096, "f32", rows=1024, length=8192, sorted=False)
    yield from line("k", 1, 4096, "bf16", rows=1024, length=8192, sorted=True)
    yield from line("k", 1, 4096, "bf16", rows=400, length=8192, sorted=True)
    # Streamed, by one block or by several.
    yield from line("length", 512, 400000, "f32", rows=1, k=512, sorted=False)
    yield from line("length", 512, 100000, "f32", rows=1024, k=512, sorted=True)
    yield from line("length", 2048, 400000, "bf16", rows=200, k=2048, sorted=False)
    yield from line("length", 4096, 65536, "f32", rows=64, k=64, sorted=False)
    yield from line("rows", 1, 512, "f32", length=65536, k=512, sorted=False)
    yield from line("rows", 1, 2048, "f32", "bf16", length=16384, k=64, sorted=False)
    yield from line("rows", 1, 2048, "f32", length=16384, k=2400, sorted=False)
    yield from line("k", 1, 4096, "f32", "bf16", rows=1024, length=16384, sorted=False)
    yield from line("k", 1, 4096, "f32", rows=1, length=65536, sorted=False)
    yield from line("k", 1, 4096, "f32", rows=1, length=16384, sorted=False)


def _dense_router() -> Iterator[Line]:
    def line(varied: str, first: int, last: int, is_timed: bool, **fixed: Any) -> Line:
        return Line("dense_router", varied, first, last, fixed, is_timed)

    timed = (("bf16", "logits", 256), ("bf16", "logits", 384), ("bf16", "logits", 1024), ("f32", "logits", 256))
    for case in itertools.product(DTYPES, ("logits", "scores", "groups"), (128, 256, 384, 512, 1024)):
        dtype, keys, experts = case
        grouped = {"num_groups": 12 if experts == 384 else 8}  # of powers of two, or no kernel takes them
        key: dict[str, Any] = {"logits": {}, "scores": {"bias": True}, "groups": grouped}[keys]
        yield line("rows", 1, 16384, case in timed, dtype=dtype, **key, hidden=4096, experts=experts, k=8)
        if dtype == "bf16":
            mixed = {"dtype": dtype, "weight_dtype": "f32"}
            yield line("rows", 1, 16384, False, **mixed, **key, hidden=4096, experts=experts, k=8)
    for rows in (1, 32, 100, 1024):
        yield line("experts", 16, 1024, True, dtype="bf16", hidden=4096, rows=rows, k=8)
    # Wide blocks.
    yield line("rows", 10000, 18000, True, dtype="bf16", hidden=7168, experts=256, k=8)
    fixed = {"dtype": "bf16", "rows": 16384, "experts": 256, "k": 8}
    yield Line("dense_router", "hidden", 1024, 7168, fixed, step=8)


def _routed_gradients() -> Iterator[Line]:
    for hidden in (1024, 4096, 7168):
        fixed = {"hidden": hidden, "experts": 128, "k": 8}
        yield Line("routed_gradients", "rows", 64, 16384, fixed, is_timed=hidden == 4096)
    yield Line("routed_gradients", "experts", 2, 160, {"rows": 8192, "hidden": 4096, "k": 2})


def _expert_dispatch() -> Iterator[Line]:
    for experts in (64, 256, 384):
        yield Line("expert_dispatch", "tokens", 1, 200000, {"experts": experts, "k": 8})
    for tokens in (512, 2048, 16384):
        yield Line("expert_dispatch", "experts", 8, 4096, {"tokens": tokens, "k": 8})
    for experts in (256, 1024):
        yield Line("expert_dispatch", "tokens", 1, 4096, {"experts": experts, "k": 8, "align": 128})
    yield Line("expert_counts", "tokens", 1, 200000, {"experts": 256, "k": 8})


def _moved() -> Iterator[Line]:
    """Rows of an odd length have no accesses of 16 bytes."""

    def line(op: str, hidden: int, is_timed: bool, **fixed: Any) -> Line:
        return Line(op, "tokens", 1, 16384, {**fixed, "hidden": hidden, "k": 8}, is_timed)

    for dtype, hidden in itertools.product(DTYPES, (2048, 2047)):
        is_timed = dtype == "bf16" and hidden == 2048
        yield line("permute", hidden, is_timed, dtype=dtype)
        yield line("permute", hidden, False, dtype=dtype, weights=True)
        yield line("combine", hidden, False, dtype=dtype)
        yield line("permute_cotangent", hidden, False, dtype=dtype)
        yield line("combine_cotangent", hidden, is_timed, dtype=dtype)
    for dtype in DTYPES:
        yield line("combine", 2048, dtype == "bf16", dtype=dtype, slots=256)
    yield line("combine", 16384, True, dtype="bf16", slots=256)
    yield line("permute", 2047, False, dtype="f16", element_bytes=1)


def _others() -> Iterator[Line]:
    """Little is chosen here: most follows from options and alignment."""
    for k in (1, 2, 4):
        yield Line("hash_router", "rows", 1, 1000000, {"k": k}, is_timed=k == 2)
    for dtype, whole_row in itertools.product(DTYPES, (False, True)):
        fixed = {"dtype": dtype, "whole_row": whole_row, "experts": 256, "k": 8}
        for op in ("route_at", "scored_hash_router"):
            yield Line(op, "rows", 1, 70000, fixed, is_timed=dtype == "f32" and not whole_row)
        fixed = {"dtype": dtype, "whole_row": whole_row, "rows": 16384, "experts": 256}
        yield Line("route_cotangent", "k", 1, 64, fixed, is_timed=dtype == "f32")
    for dtype in DTYPES:
        fixed = {"dtype": dtype, "rows": 4096, "k": 8}
        yield Line("route_cotangent", "experts", 8, 4096, fixed, is_timed=dtype == "f32")
    for dtype in DTYPES:
        fixed = {"dtype": dtype, "identity": True, "rows": 1024, "experts": 4096}
        yield Line("route_cotangent", "k", 1, 1024, fixed, is_timed=dtype == "f32")


def program(op: str, sizes: Sizes, plan: str) -> Program:
    """What computes an op of such sizes by a plan, which is to be forced where it is one."""
    return _PROGRAMS[op](plan, **sizes)


def _selection(
    plan: str, rows: int, experts: int, k: int, dtype: str, bias: bool = False, num_groups: int = 1
) -> Program:
    select = partial(activation_topk, **_options(k, num_groups))
    return Contender(select), (Spec((rows, experts), DTYPES[dtype]), *_bias(experts, bias))


def _options(k: int, num_groups: int) -> dict[str, Any]:
    return {
        "top_k": k,
        "num_groups": num_groups,
        "top_groups": (num_groups + 1) // 2,
        "implementation": "native",
    }


def _bias(experts: int, has_bias: bool) -> tuple[Spec, ...]:
    return (Spec((experts,), scale=0.1),) if has_bias else ()


def _product_and_selection(
    plan: str,
    rows: int,
    hidden: int,
    experts: int,
    k: int,
    dtype: str,
    weight_dtype: str | None = None,
    bias: bool = False,
    num_groups: int = 1,
) -> Program:
    options = _options(k, num_groups)

    def unfused(x, weight, bias=None):
        return activation_topk(router_logits(x, weight), bias, **options)

    inputs = (
        Spec((rows, hidden), DTYPES[dtype]),
        Spec((experts, hidden), DTYPES[weight_dtype or dtype], scale=hidden**-0.5),
        *_bias(experts, bias),
    )
    return Contender(unfused if plan == UNFUSED else partial(dense_router, **options)), inputs


def _both_gradients(plan: str, rows: int, hidden: int, experts: int, k: int) -> Program:
    scoring = Scoring("sqrtsoftplus", renormalize=True, scale=1.0)

    def prepare(grad_weights, x, weight):
        chosen, expert_ids = jax.lax.top_k(router_logits(x, weight), k)
        return grad_weights, expert_ids, chosen, x, weight

    run = partial(
        products_apart if plan == UNFUSED else products_in_one,
        scoring=scoring,
        num_experts=experts,
        implementation="auto",
    )
    x = Spec((rows, hidden), jnp.bfloat16)
    return Contender(run, prepare), (Spec((rows, k)), x, Spec((experts, hidden), x.dtype, scale=hidden**-0.5))


def _top_k(plan: str, rows: int, length: int, k: int, sorted: bool, dtype: str) -> Program:
    select = partial(topk_select, k=k, sorted=sorted, implementation="native")
    return Contender(select), (Spec((rows, length), DTYPES[dtype]),)


def _dispatch(plan: str, tokens: int, experts: int, k: int, align: int = 1) -> Program:
    sort = partial(expert_dispatch, num_experts=experts, align=align, implementation="native")
    return Contender(sort), (Spec((tokens, k), jnp.int32, bound=experts),)


def _moved_inputs(tokens: int, hidden: int, k: int, dtype: Any) -> tuple[Spec, ...]:
    return Spec((tokens, hidden), dtype), Spec((tokens, k), jnp.int32, bound=256), Spec((tokens, k))


def _permuted(
    plan: str, tokens: int, hidden: int, k: int, dtype: str, weights: bool = False, element_bytes: int = 0
) -> Program:
    def prepare(x, expert_ids, its_weights):
        return x, expert_dispatch(expert_ids, 256), its_weights if weights else None

    of_bytes = jnp.float8_e4m3fn if element_bytes == 1 else DTYPES[dtype]
    run = partial(permute, implementation="native")
    return Contender(run, prepare), _moved_inputs(tokens, hidden, k, of_bytes)


def _moved_program(plan: str, tokens: int, hidden: int, k: int, dtype: str, op: str, slots: int = 0) -> Program:
    """A combine, of slots that tokens share if their number is given, or the cotangents of a permute or combine."""

    def prepare(x, expert_ids, weights):
        if slots:
            shared = Dispatch(jnp.full(slots, -1), expert_ids % slots, jnp.zeros(slots, jnp.int32))
            return x, jnp.resize(x, (slots, hidden)), weights, shared
        dispatch = expert_dispatch(expert_ids, 256)
        return x, x[dispatch.token_index], weights, dispatch

    def run(x, y, weights, dispatch):
        if op == "combine":
            return combine(y, dispatch, weights, implementation="native")
        move, of, grad = (permute, x, y) if op == "permute_cotangent" else (combine, y, x)
        return jax.vjp(lambda *floats: move(floats[0], dispatch, floats[1], implementation="native"), of, weights)[1](
            grad
        )

    return Contender(run, prepare), _moved_inputs(tokens, hidden, k, DTYPES[dtype])


def _counts(plan: str, tokens: int, experts: int, k: int) -> Program:
    count = partial(expert_counts, num_experts=experts, implementation="native")
    return Contender(count), (Spec((tokens, k), jnp.int32, bound=experts),)


def _hash(plan: str, rows: int, k: int) -> Program:
    return Contender(partial(hash_router, implementation="native")), _hash_inputs(rows, k, 256)


def _hash_inputs(rows: int, k: int, experts: int) -> tuple[Spec, Spec]:
    vocab_size = 129280
    return Spec((rows,), jnp.int32, bound=vocab_size), Spec((vocab_size, k), jnp.int32, bound=experts)


def _scoring(whole_row: bool) -> dict[str, Any]:
    return {"score_fn": "softmax" if whole_row else "sigmoid", "renormalize": not whole_row}


def _weights_at(plan: str, rows: int, experts: int, k: int, dtype: str, whole_row: bool) -> Program:
    run = partial(route_at, implementation="native", **_scoring(whole_row))
    return Contender(run), (Spec((rows, experts), DTYPES[dtype]), Spec((rows, k), jnp.int32, bound=experts))


def _scored_hash(plan: str, rows: int, experts: int, k: int, dtype: str, whole_row: bool) -> Program:
    run = partial(scored_hash_router, implementation="native", **_scoring(whole_row))
    return Contender(run), (Spec((rows, experts), DTYPES[dtype]), *_hash_inputs(rows, k, experts))


def _cotangent(
    plan: str, rows: int, experts: int, k: int, dtype: str, whole_row: bool = False, identity: bool = False
) -> Program:
    def values(x: jax.Array) -> jax.Array:
        if identity:
            return topk_select(x, k, implementation="native")[0]
        return activation_topk(x, top_k=k, implementation="native", **_scoring(whole_row)).weights

    x = Spec((rows, experts), DTYPES[dtype])
    return backward(values, x), (x, Spec((rows, k), x.dtype if identity else jnp.float32))


_PROGRAMS: dict[str, Callable[..., Program]] = {
    "activation_topk": _selection,
    "dense_router": _product_and_selection,
    "topk_select": _top_k,
    "expert_dispatch": _dispatch,
    "permute": _permuted,
    "combine": partial(_moved_program, op="combine"),
    "permute_cotangent": partial(_moved_program, op="permute_cotangent"),
    "combine_cotangent": partial(_moved_program, op="combine_cotangent"),
    "expert_counts": _counts,
    "hash_router": _hash,
    "route_at": _weights_at,
    "routed_gradients": _both_gradients,
    "scored_hash_router": _scored_hash,
    "route_cotangent": _cotangent,
}
