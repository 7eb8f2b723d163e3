"""The cases: what is computed on which inputs, against which rivals. `targets.json` holds the ids with a target."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
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
from jax_router._shapes import dispatch_slots
from jax_router._timing import Spec
from jax_router._ways import plain_logits
from support.models import MODELS, Model
from support.programs import load_example

sparse_attention = load_example("sparse_attention")

NATIVE, XLA, TORCH = "jax_router", "xla", "torch.topk"
TARGETS: dict[str, dict[str, Any]] = {
    target["id"]: target for target in json.loads((Path(__file__).parent / "targets.json").read_text())
}
# What the CPU kernels owe the reference in the same run.
CPU_SPEEDUPS = {
    "activation_topk": 5.0,
    "expert_dispatch": 5.0,
    "topk_select": 1.0,
    "permute_grad": 2.0,
    "combine_grad": 2.0,
}


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way to compute a case.

    Attributes:
        run: the computation.
        prepare: from the random inputs to those of `run`; not timed.
    """

    run: Callable[..., Any]
    prepare: Callable[..., tuple[Any, ...]] = lambda *inputs: inputs


@dataclasses.dataclass(frozen=True)
class Case:
    """A computation to time.

    Attributes:
        id: as in targets.json, or that with the name of a variant behind it.
        inputs: of one call.
        contenders: by name; `NATIVE` is the one that the case is about.
        nbytes: the bytes that any implementation must move.
        flops: the arithmetic of its matrix product.
        xla_id: of the case whose figure for XLA is this one's too.
    """

    id: str
    inputs: tuple[Spec, ...]
    contenders: Mapping[str, Contender]
    nbytes: int
    flops: int = 0
    xla_id: str = ""

    @property
    def is_decode(self) -> bool:
        """Whether it is small enough to be a part of a decode step, whose layers it is then timed in."""
        return self.inputs[0].shape[0] <= 64 and self.inputs[0].nbytes <= 2**21

    @property
    def depends_on_data(self) -> bool:
        """Whether its time does, so that on a GPU it is that of the worst of many draws (`draws.py`)."""
        return self.op == "topk_select"

    @property
    def op(self) -> str:
        return self.id.split("/")[0]


def _both(run: Callable[..., Any]) -> dict[str, Contender]:
    return {
        NATIVE: Contender(partial(run, implementation="native")),
        XLA: Contender(partial(run, implementation="reference")),
    }


def model_with(num_experts: int, top_k: int) -> Model:
    """DeepSeek-V4's router (Flash or Pro, as the number of experts says), with other sizes where they are others."""
    model = MODELS["deepseek-v4-pro" if num_experts == 384 else "deepseek-v4-flash"]
    return dataclasses.replace(model, num_experts=num_experts, top_k=top_k)


def activation_topk_case(model: Model, tokens: int, *, dtype: Any = jnp.float32, with_bias: bool = False) -> Case:
    """The id names a score function that is not sqrtsoftplus, and groups; a router with groups has a bias."""
    grouped = model.num_groups > 1
    scored = f"{model.score_fn}/" if model.score_fn != "sqrtsoftplus" else ""
    groups = f"groups{model.num_groups}-{model.top_groups}/" if grouped else ""
    variant = ("/bf16" if dtype == jnp.bfloat16 else "") + ("/bias" if with_bias else "")
    logits = Spec((tokens, model.num_experts), dtype)

    def run(logits, bias=None, *, implementation):
        return activation_topk(logits, bias, implementation=implementation, **model.selection)

    return Case(
        f"activation_topk/{scored}E{model.num_experts}/k{model.top_k}/{groups}N{tokens}{variant}",
        (logits, *([Spec((model.num_experts,), scale=0.1)] if with_bias or grouped else [])),
        _both(run),
        logits.nbytes + tokens * model.top_k * 8,
    )


def backward(function: Callable[..., jax.Array], *primals: Spec) -> Contender:
    """The backward pass alone, on the residuals of the forward pass. The inputs are the primals and a cotangent."""

    def pullback(*primals):
        return jax.vjp(function, *primals)[1]

    structure = jax.tree.structure(jax.eval_shape(pullback, *(spec.struct for spec in primals)))
    return Contender(
        lambda cotangent, *residuals: jax.tree.unflatten(structure, residuals)(cotangent),
        prepare=lambda *inputs: (inputs[-1], *jax.tree.leaves(pullback(*inputs[:-1]))),
    )


def activation_topk_grad_case(model: Model, tokens: int) -> Case:
    inputs = (Spec((tokens, model.num_experts)), Spec((tokens, model.top_k)))

    def contender(implementation):
        def weights(logits):
            return activation_topk(logits, implementation=implementation, **model.selection).weights

        return backward(weights, inputs[0])

    return Case(
        f"activation_topk_grad/E{model.num_experts}/k{model.top_k}/N{tokens}",
        inputs,
        {NATIVE: contender("native"), XLA: contender("reference")},
        tokens * (model.num_experts * 4 + model.top_k * 12),
    )


def route_at_case(model: Model, tokens: int) -> Case:
    def run(logits, expert_ids, *, implementation):
        return route_at(logits, expert_ids, implementation=implementation, **model.scoring)

    return Case(
        f"route_at/E{model.num_experts}/k{model.top_k}/N{tokens}",
        (
            Spec((tokens, model.num_experts)),
            Spec((tokens, model.top_k), jnp.int32, bound=model.num_experts),
        ),
        _both(run),
        tokens * model.top_k * (32 + 4 + 8),  # a chosen logit costs a 32-byte sector
    )


def scored_hash_router_case(model: Model, tokens: int) -> Case:
    assert model.vocab_size is not None
    lut = Spec((model.vocab_size, model.top_k), jnp.int32, bound=model.num_experts)

    def run(logits, token_ids, hash_lut, *, implementation):
        return scored_hash_router(logits, token_ids, hash_lut, implementation=implementation, **model.scoring)

    return Case(
        f"scored_hash_router/V{model.vocab_size}/E{model.num_experts}/k{model.top_k}/N{tokens}",
        (Spec((tokens, model.num_experts)), Spec((tokens,), jnp.int32, bound=model.vocab_size), lut),
        _both(run),
        tokens * (4 + model.top_k * (32 + 8)) + min(lut.nbytes, tokens * 32),
    )


def hash_router_case(vocab_size: int, top_k: int, tokens: int) -> Case:
    lut = Spec((vocab_size, top_k), jnp.int32, bound=256)

    def run(token_ids, hash_lut, *, implementation):
        return hash_router(token_ids, hash_lut, scale=1.5, implementation=implementation)

    return Case(
        f"hash_router/V{vocab_size}/k{top_k}/N{tokens}",
        (Spec((tokens,), jnp.int32, bound=vocab_size), lut),
        _both(run),
        tokens * (4 + top_k * 8) + min(lut.nbytes, tokens * 32),
    )


def topk_select_case(rows: int, length: int, k: int, *, dtype: Any = jnp.float32, is_sorted: bool = False) -> Case:
    """Without the order of the results, as an indexer or a sampler needs them; `/sorted` with it."""
    scores = Spec((rows, length), dtype)
    plain_id = f"topk_select/B{rows}/L{length}/k{k}" + ("/bf16" if dtype == jnp.bfloat16 else "")
    contenders = {
        NATIVE: Contender(partial(topk_select, k=k, sorted=is_sorted, implementation="native")),
        XLA: Contender(partial(jax.lax.top_k, k=k)),
    }
    if not is_sorted:
        if "is_stable" in inspect.signature(jax.lax.top_k).parameters:
            contenders["lax.top_k(is_stable=False)"] = Contender(partial(jax.lax.top_k, k=k, is_stable=False))
        contenders[TORCH] = Contender(lambda scores: scores.topk(k, sorted=False))
    return Case(
        plain_id + ("/sorted" if is_sorted else ""),
        (scores,),
        contenders,
        scores.nbytes + rows * k * (4 + jnp.dtype(dtype).itemsize),
        xla_id=plain_id,
    )


def sparse_attention_case(length: int, k: int) -> Case:
    """A step of decoding with sparse attention over a full cache, and the same with `jax.lax.top_k`."""
    size, heads, index_size = 128, 4, 64
    index_keys, keys = Spec((length, index_size)), Spec((length, size))

    def contender(select):
        def run(x, index_queries, head_weights, index_keys, keys, values):
            weights = sparse_attention.Weights(index_queries, head_weights, index_key=None)
            cache = sparse_attention.Cache(index_keys, keys, values, jnp.int32(length))
            return sparse_attention.attend(select, k, weights, cache, x)

        return Contender(run)

    return Case(
        f"sparse_attention_step/L{length}/k{k}",
        (
            Spec((size,)),
            Spec((heads, size, index_size), scale=size**-0.5),
            Spec((size, heads)),
            index_keys,
            keys,
            keys,
        ),
        {NATIVE: contender(sparse_attention.select_native), XLA: contender(sparse_attention.select_by_sort)},
        index_keys.nbytes + 2 * k * size * 4,
        flops=2 * heads * index_keys.size,
    )


def dense_router_case(model: Model, tokens: int, *, with_bias: bool = False, weight_dtype: Any = jnp.bfloat16) -> Case:
    hidden, num_experts = model.hidden_size, model.num_experts
    x = Spec((tokens, hidden), jnp.bfloat16)
    weight = Spec((num_experts, hidden), weight_dtype, scale=hidden**-0.5)
    dtypes, products = ("bf16xf32", 3) if weight_dtype == jnp.float32 else ("bf16", 1)  # of the parts of the weight

    def run(x, weight, bias=None, *, implementation):
        return dense_router(x, weight, bias, implementation=implementation, **model.selection)

    return Case(
        f"dense_router/{dtypes}/D{hidden}/E{num_experts}/k{model.top_k}/N{tokens}" + ("/bias" if with_bias else ""),
        (x, weight, *([Spec((num_experts,), scale=0.1)] if with_bias else [])),
        _both(run),
        x.nbytes + weight.nbytes + tokens * model.top_k * 8,
        flops=2 * products * tokens * hidden * num_experts,
    )


def dense_router_grad_case(model: Model, tokens: int) -> Case:
    """From the cotangent of the weights to those of hidden states and gate."""
    x = Spec((tokens, model.hidden_size), jnp.bfloat16)
    weight = Spec((model.num_experts, model.hidden_size), jnp.bfloat16, scale=model.hidden_size**-0.5)

    def native(x, weight):
        return dense_router(x, weight, implementation="native", **model.selection).weights

    def plain(x, weight):
        logits = plain_logits(x, weight)
        return activation_topk(logits, implementation="reference", **model.selection).weights

    return Case(
        f"dense_router_grad/bf16/D{model.hidden_size}/E{model.num_experts}/k{model.top_k}/N{tokens}",
        (x, weight, Spec((tokens, model.top_k))),
        {NATIVE: backward(native, x, weight), XLA: backward(plain, x, weight)},
        2 * (x.nbytes + weight.nbytes) + tokens * model.top_k * 12,
        flops=2 * 2 * tokens * weight.size,
    )


def expert_dispatch_case(num_experts: int, top_k: int, tokens: int, align: int = 1) -> Case:
    def run(expert_ids, *, implementation):
        return expert_dispatch(expert_ids, num_experts, align=align, implementation=implementation)

    slots = dispatch_slots(tokens * top_k, num_experts, align, None)
    return Case(
        f"expert_dispatch/E{num_experts}/k{top_k}/N{tokens}" + (f"/align{align}" if align > 1 else ""),
        (Spec((tokens, top_k), jnp.int32, bound=num_experts),),
        _both(run),
        tokens * top_k * 8 + slots * 4 + num_experts * 4,
    )


def expert_counts_case(num_experts: int, top_k: int, tokens: int) -> Case:
    def run(expert_ids, *, implementation):
        return expert_counts(expert_ids, num_experts, implementation=implementation)

    return Case(
        f"expert_counts/E{num_experts}/k{top_k}/N{tokens}",
        (Spec((tokens, top_k), jnp.int32, bound=num_experts),),
        _both(run),
        tokens * top_k * 4 + num_experts * 4,
    )


def _sort(expert_ids: jax.Array) -> Dispatch:
    return expert_dispatch(expert_ids, 256)


def _moved_case(
    op: str,
    hidden: int,
    top_k: int,
    tokens: int,
    dtype: Any,
    runs: Mapping[str, Callable[..., Any]],
    prepare: Callable[..., tuple[Any, ...]],
    rows: tuple[int, int],
) -> Case:
    """Rows that are moved between tokens and slots, of which so many a token and a choice cross the memory's pins.

    The dispatch is made of 256 experts, and not timed; nor are rows of slots, which are too many to be drawn.
    """
    x = Spec((tokens, hidden), dtype)
    ids, weights = Spec((tokens, top_k), jnp.int32, bound=256), Spec((tokens, top_k))
    of_token, of_choice = rows
    return Case(
        f"{op}/{'bf16' if dtype == jnp.bfloat16 else 'f32'}/D{hidden}/k{top_k}/N{tokens}",
        (x, ids, weights),
        {name: Contender(run, prepare) for name, run in runs.items()},
        (of_token + of_choice * top_k) * x.nbytes + 12 * ids.size,
    )


def _indexed(x: jax.Array, dispatch: Dispatch) -> jax.Array:
    return x[dispatch.token_index]


def _weighted_sum(y: jax.Array, weights: jax.Array, dispatch: Dispatch) -> jax.Array:
    return (weights[..., None] * y[dispatch.slot].astype(jnp.float32)).sum(axis=-2).astype(y.dtype)


# What is timed, what a JAX user writes, and that without the scatter-add of its derivative.
_MOVES: dict[str, dict[str, Callable[..., jax.Array]]] = {
    "permute": {
        NATIVE: partial(permute, implementation="native"),
        XLA: _indexed,
        "reference": partial(permute, implementation="reference"),
    },
    "combine": {
        NATIVE: lambda y, weights, dispatch: combine(y, dispatch, weights, implementation="native"),
        XLA: _weighted_sum,
        "reference": lambda y, weights, dispatch: combine(y, dispatch, weights, implementation="reference"),
    },
}


def _pulled_back(move: Callable[..., jax.Array], grad: jax.Array, *operands: Any) -> tuple[jax.Array, ...]:
    """The cotangents of all operands but the dispatch, which is the last one. XLA drops the forward pass."""
    *floats, dispatch = operands
    return jax.vjp(lambda *floats: move(*floats, dispatch), *floats)[1](grad)


def permute_case(hidden: int, top_k: int, tokens: int, dtype: Any = jnp.bfloat16) -> Case:
    def prepare(x, expert_ids, weights):
        return x, _sort(expert_ids)

    return _moved_case("permute", hidden, top_k, tokens, dtype, _MOVES["permute"], prepare, (1, 1))


def permute_grad_case(hidden: int, top_k: int, tokens: int, dtype: Any = jnp.bfloat16) -> Case:
    def prepare(x, expert_ids, weights):
        dispatch = _sort(expert_ids)
        return _indexed(x, dispatch), x, dispatch

    runs = {name: partial(_pulled_back, move) for name, move in _MOVES["permute"].items()}
    return _moved_case("permute_grad", hidden, top_k, tokens, dtype, runs, prepare, (1, 1))


def combine_case(hidden: int, top_k: int, tokens: int, dtype: Any = jnp.bfloat16) -> Case:
    def prepare(x, expert_ids, weights):
        dispatch = _sort(expert_ids)
        return _indexed(x, dispatch), weights, dispatch

    return _moved_case("combine", hidden, top_k, tokens, dtype, _MOVES["combine"], prepare, (1, 1))


def combine_grad_case(hidden: int, top_k: int, tokens: int, dtype: Any = jnp.bfloat16) -> Case:
    def prepare(x, expert_ids, weights):
        dispatch = _sort(expert_ids)
        return x, _indexed(x, dispatch), weights, dispatch

    runs = {name: partial(_pulled_back, move) for name, move in _MOVES["combine"].items()}
    return _moved_case("combine_grad", hidden, top_k, tokens, dtype, runs, prepare, (1, 2))


def _grouped_case(num_experts: int, top_k: int, num_groups: int, top_groups: int, tokens: int) -> Case:
    sizes = {"num_experts": num_experts, "top_k": top_k, "num_groups": num_groups, "top_groups": top_groups}
    return activation_topk_case(dataclasses.replace(MODELS["deepseek-v3"], **sizes), tokens)


def _dense_case(hidden: int, num_experts: int, top_k: int, tokens: int, **options: Any) -> Case:
    model = dataclasses.replace(model_with(num_experts, top_k), hidden_size=hidden)
    return dense_router_case(model, tokens, **options)


def _scored_hash_case(vocab_size: int, num_experts: int, top_k: int, tokens: int) -> Case:
    return scored_hash_router_case(dataclasses.replace(model_with(num_experts, top_k), vocab_size=vocab_size), tokens)


def _dense_grad_case(hidden: int, num_experts: int, top_k: int, tokens: int) -> Case:
    """With the scores of a model of these sizes."""
    sizes = (hidden, num_experts, top_k)
    models = (model for model in MODELS.values() if (model.hidden_size, model.num_experts, model.top_k) == sizes)
    return dense_router_grad_case(next(models), tokens)


_TOPK_SELECT_ID = r"topk_select/B(\d+)/L(\d+)/k(\d+)"

_BUILDERS: dict[str, Callable[..., Case]] = {
    r"activation_topk/E(\d+)/k(\d+)/N(\d+)": lambda e, k, n: activation_topk_case(model_with(e, k), n),
    r"activation_topk/sigmoid/E(\d+)/k(\d+)/groups(\d+)-(\d+)/N(\d+)": _grouped_case,
    r"activation_topk/softmax/E128/k8/N(\d+)": lambda n: activation_topk_case(MODELS["qwen3-30b-a3b"], n),
    r"activation_topk_grad/E(\d+)/k(\d+)/N(\d+)": lambda e, k, n: activation_topk_grad_case(model_with(e, k), n),
    r"route_at/E(\d+)/k(\d+)/N(\d+)": lambda e, k, n: route_at_case(model_with(e, k), n),
    r"hash_router/V(\d+)/k(\d+)/N(\d+)": hash_router_case,
    r"scored_hash_router/V(\d+)/E(\d+)/k(\d+)/N(\d+)": _scored_hash_case,
    _TOPK_SELECT_ID: topk_select_case,
    r"dense_router/bf16/D(\d+)/E(\d+)/k(\d+)/N(\d+)": _dense_case,
    r"dense_router/bf16xf32/D(\d+)/E(\d+)/k(\d+)/N(\d+)": partial(_dense_case, weight_dtype=jnp.float32),
    r"dense_router_grad/bf16/D(\d+)/E(\d+)/k(\d+)/N(\d+)": _dense_grad_case,
    r"expert_dispatch/E(\d+)/k(\d+)/N(\d+)": expert_dispatch_case,
    r"permute/bf16/D(\d+)/k(\d+)/N(\d+)": permute_case,
    r"permute_grad/bf16/D(\d+)/k(\d+)/N(\d+)": permute_grad_case,
    r"combine/bf16/D(\d+)/k(\d+)/N(\d+)": combine_case,
    r"combine_grad/bf16/D(\d+)/k(\d+)/N(\d+)": combine_grad_case,
    r"expert_counts/E(\d+)/k(\d+)/N(\d+)": expert_counts_case,
}


def _with_id(case_id: str) -> Case:
    for pattern, build in _BUILDERS.items():
        if match := re.fullmatch(pattern, case_id):
            case = build(*map(int, match.groups()))
            assert case.id == case_id, (case.id, case_id)
            return case
    raise ValueError(f"no such case: {case_id}")


_FLASH, _PRO, _V3 = MODELS["deepseek-v4-flash"], MODELS["deepseek-v4-pro"], MODELS["deepseek-v3"]


def _variants() -> Iterator[Case]:
    for model in (_FLASH, _PRO):
        for tokens in (1, 64, 4096, 16384, 65536):
            yield activation_topk_case(model, tokens, with_bias=True)
    for tokens in (4096, 16384, 65536):
        yield activation_topk_case(_FLASH, tokens, dtype=jnp.bfloat16)
        yield activation_topk_case(_FLASH, tokens, dtype=jnp.bfloat16, with_bias=True)
    yield activation_topk_case(_V3, 65536)
    for match in filter(None, (re.fullmatch(_TOPK_SELECT_ID, case_id) for case_id in TARGETS)):
        rows, length, k = map(int, match.groups())
        yield topk_select_case(rows, length, k, is_sorted=True)
        yield topk_select_case(rows, length, k, dtype=jnp.bfloat16)
        yield topk_select_case(rows, length, k, dtype=jnp.bfloat16, is_sorted=True)
    for tokens in (1, 64):
        for build in (permute_case, permute_grad_case, combine_case, combine_grad_case):
            yield build(4096, 6, tokens)
    yield sparse_attention_case(65536, 512)
    for tokens in (1, 4096):
        yield dense_router_case(_FLASH, tokens, with_bias=True)
    for tokens in (64, 4096, 65536):
        for align in (16, 128):
            yield expert_dispatch_case(256, 6, tokens, align)


def gpu_cases() -> list[Case]:
    variants = {case.id: case for case in _variants()}
    return [*(variants.pop(case_id, None) or _with_id(case_id) for case_id in TARGETS), *variants.values()]


def cpu_cases() -> list[Case]:
    return [
        activation_topk_case(_FLASH, 16384),
        activation_topk_case(_FLASH, 16384, with_bias=True),
        activation_topk_case(_V3, 8192),
        activation_topk_grad_case(_FLASH, 16384),
        route_at_case(_FLASH, 16384),
        hash_router_case(129280, 6, 65536),
        scored_hash_router_case(_FLASH, 16384),
        topk_select_case(1, 65536, 512),
        topk_select_case(64, 8192, 2048),
        topk_select_case(64, 8192, 2048, is_sorted=True),
        topk_select_case(4096, 4096, 64),
        topk_select_case(16384, 256, 6, is_sorted=True),
        dense_router_case(_FLASH, 8),
        expert_dispatch_case(256, 6, 16384),
        permute_case(1024, 6, 4096),
        permute_grad_case(1024, 6, 4096),
        combine_case(1024, 6, 4096),
        combine_grad_case(1024, 6, 4096),
        expert_dispatch_case(256, 6, 16384, align=128),
        expert_counts_case(256, 6, 65536),
    ]
