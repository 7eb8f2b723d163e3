"""A whole mixture-of-experts layer, forward and backward, beside the same layer as JAX users write it; by stage."""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from rich.table import Table

from jax_router import (
    Routing,
    activation_topk,
    combine,
    dense_router,
    expert_dispatch,
    grouped_matmul,
    permute,
)

from .cases import NATIVE, plain_logits
from .experts import EXPERTS, TOKENS, Experts, Weights, random_bf16
from .timing import Kernel, Timing, busy_us, kernels_of_calls

STAGES = ("route", "dispatch", "permute", "experts", "swiglu", "combine")
# Kernels in a CUDA graph do not say which instruction they are of, and gaps between kernels do not count here anyway.
_WITHOUT_GRAPHS = {"xla_gpu_graph_min_graph_size": 1_000_000}


class Parameters(NamedTuple):
    gate: Array  # [E, D]
    experts: Weights


@dataclasses.dataclass(frozen=True)
class Way:
    """How a layer is written.

    Attributes:
        route: from hidden states and gate to a Routing.
        sort: from expert ids `[N, k]` and E to the place of every choice, with `group_sizes`.
        permute: hidden states and places to rows.
        combine: rows, places and weights to hidden states.
        product: rows, weights of experts and group sizes to rows.
    """

    route: Callable[..., Routing]
    sort: Callable[[Array, int], Any]
    permute: Callable[[Array, Any], Array]
    combine: Callable[[Array, Any, Array], Array]
    product: Callable[..., Array]

    def layer(self, x: Array, parameters: Parameters) -> Array:
        with jax.named_scope("route"):
            weights, expert_ids = self.route(x, parameters.gate)
        with jax.named_scope("dispatch"):
            places = self.sort(expert_ids, len(parameters.gate))
        with jax.named_scope("permute"):
            rows = self.permute(x, places)
        with jax.named_scope("experts"):
            inner = self.product(rows, parameters.experts.w_in, places.group_sizes)
        with jax.named_scope("swiglu"):
            gates, values = jnp.split(inner, 2, axis=-1)
            inner = jax.nn.silu(gates) * values
        with jax.named_scope("experts"):
            results = self.product(inner, parameters.experts.w_out, places.group_sizes)
        with jax.named_scope("combine"):
            return self.combine(results, places, weights)

    def forward(self, x: Array, parameters: Parameters, cotangent: Array) -> list[Array]:
        return [self.layer(x, parameters)]

    def forward_and_backward(self, x: Array, parameters: Parameters, cotangent: Array) -> list[Array]:
        result, pullback = jax.vjp(self.layer, x, parameters)
        of_x, of_parameters = pullback(cotangent)
        return [result, of_x, *jax.tree.leaves(of_parameters)]


class Places(NamedTuple):
    """Where choices go, as plain JAX has it."""

    token: Array  # [N k] of each row
    slot: Array  # [N, k]
    order: Array  # [N k] the choice of each row
    group_sizes: Array


def _argsort(expert_ids: Array, num_experts: int) -> Places:
    order = jnp.argsort(expert_ids.ravel())
    slot = jnp.argsort(order).reshape(expert_ids.shape)
    return Places(order // expert_ids.shape[1], slot, order, jnp.bincount(expert_ids.ravel(), length=num_experts))


def _take(x: Array, places: Places) -> Array:
    return x[places.token]


def _index(results: Array, places: Places, weights: Array) -> Array:
    chosen = results[places.slot].astype(jnp.float32)
    return (chosen * weights[..., None]).sum(axis=1).astype(results.dtype)


def _scatter_add(results: Array, places: Places, weights: Array) -> Array:
    weighted = results.astype(jnp.float32) * weights.ravel()[places.order, None]
    sums = jnp.zeros((len(weights), results.shape[1]), jnp.float32).at[places.token].add(weighted)
    return sums.astype(results.dtype)


def ways(experts: Experts) -> dict[str, Way]:
    """This project's first; the same grouped products in all, but for that of tokamax."""
    options = experts.model.selection
    product = partial(grouped_matmul, unused_rows="undefined", implementation="native")

    def plain_route(x, gate):
        return activation_topk(plain_logits(x, gate), implementation="reference", **options)

    ours = Way(partial(dense_router, **options), expert_dispatch, permute, combine, product)
    indexing = Way(plain_route, _argsort, _take, _index, product)
    found = {NATIVE: ours, "indexing": indexing, "scatter-add": dataclasses.replace(indexing, combine=_scatter_add)}
    if importlib.util.find_spec("tokamax"):
        import tokamax

        def ragged_dot(lhs, rhs, group_sizes):
            return tokamax.ragged_dot(lhs, rhs, group_sizes=group_sizes)

        found[f"{NATIVE} with tokamax"] = dataclasses.replace(ours, product=ragged_dot)
    return found


@dataclasses.dataclass
class Record:
    """One layer, forward or forward and backward, in microseconds of kernel time.

    Attributes:
        id: model, tokens, and direction.
        us, us_range: this project's, the median, the least and the most.
        kernels: of one call.
        stages: the time of each stage, with that of its gradient.
        others_us, others_stages: the same of the layers that it is compared with.
        differences: of their results, and of their gradients of x, from ours; the norm, relative to that of ours. A
            token whose two best experts score alike may be routed otherwise.
        device, jax, commit: where, with what, and of which state of this project.
    """

    id: str
    us: float
    us_range: tuple[float, float]
    kernels: int
    stages: dict[str, float]
    others_us: dict[str, float] = dataclasses.field(default_factory=dict)
    others_stages: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    differences: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    device: str = ""
    jax: str = jax.__version__
    commit: str = ""


@dataclasses.dataclass(frozen=True)
class Case:
    experts: Experts
    tokens: int
    direction: str  # a method of Way

    @property
    def id(self) -> str:
        return f"layer/{self.experts.name}/N{self.tokens}/{self.direction}"


def cases() -> list[Case]:
    return [
        Case(experts, tokens, direction)
        for experts in EXPERTS
        for tokens in TOKENS
        for direction in ("forward", "forward_and_backward")
    ]


def records(selected: Sequence[Case], failures: dict[str, str]) -> Iterator[Record]:
    """The experts of the largest model and their gradients fill more than half of an H100: one model at a time."""
    parameters: tuple[Experts | None, Any] = None, None
    for case in selected:
        model = case.experts.model
        if parameters[0] != case.experts:
            parameters = None, None
            gc.collect()
            gate = random_bf16(3, (model.num_experts, model.hidden_size), model.hidden_size**-0.5)
            parameters = case.experts, Parameters(gate, case.experts.weights())
        shape = (case.tokens, model.hidden_size)
        arguments = (random_bf16(4, shape), parameters[1], random_bf16(5, shape))
        found: dict[str, tuple[Timing, dict[str, float], list[Array]]] = {}
        for name, way in ways(case.experts).items():
            try:
                found[name] = _timed(getattr(way, case.direction), arguments)
            except Exception as error:  # one that fails must not cost the figures of the others
                failures[f"{case.id} of {name}"] = f"{type(error).__name__}: {error}"
        if NATIVE not in found:
            continue
        timing, stages, results = found.pop(NATIVE)
        yield Record(
            case.id,
            round(timing.us, 1),
            (round(timing.least, 1), round(timing.most, 1)),
            timing.kernels,
            stages,
            {name: round(other.us, 1) for name, (other, _, _) in found.items()},
            {name: of_stages for name, (_, of_stages, _) in found.items()},
            {
                name: [float(f"{_difference(*pair):.2g}") for pair in zip(others, results)]
                for name, (_, _, others) in found.items()
            },
        )


def _timed(run: Callable[..., list[Array]], arguments: tuple[Any, ...]) -> tuple[Timing, dict[str, float], list[Array]]:
    compiled = jax.jit(run).lower(*arguments).compile(_WITHOUT_GRAPHS)
    calls = kernels_of_calls(compiled, [arguments])
    stage_of = stages_of_instructions(compiled.as_text())
    by_stage = [_by_stage(kernels, stage_of) for kernels in calls]
    stages = {
        stage: round(statistics.median(call.get(stage, 0.0) for call in by_stage), 1) for stage in (*STAGES, "other")
    }
    timing = Timing.of([busy_us(kernels) for kernels in calls], len(calls[0]))
    return timing, stages, compiled(*arguments)[:2]


def _difference(values: Array, expected: Array) -> float:
    values, expected = (array.astype(jnp.float32) for array in (values, expected))
    return float(jnp.linalg.norm(values - expected) / jnp.linalg.norm(expected))


def _by_stage(kernels: Sequence[Kernel], stage_of: dict[str, str]) -> dict[str, float]:
    us: dict[str, float] = {}
    for kernel in kernels:
        stage = stage_of.get(kernel.instruction) or stage_of.get(kernel.name, "other")
        us[stage] = us.get(stage, 0.0) + (kernel.end - kernel.start) / 1e3
    return us


def stages_of_instructions(hlo: str) -> dict[str, str]:
    """The stage of each instruction of a compiled program, under its name and under that of a kernel made of it.

    The scopes of the layer are in the metadata: `jit(f)/permute/...`, in gradients `transpose(jvp(permute))/...`.
    """
    stages = {}
    for name, op_name in re.findall(r"^\s*(?:ROOT )?%?([\w.-]+) = .*op_name=\"([^\"]*)\"", hlo, re.MULTILINE):
        if stage := re.search(rf"\b(?:{'|'.join(STAGES)})\b", op_name):
            stages[name] = stages[re.sub(r"[.-]", "_", name)] = stage[0]
    return stages


def table(found: Sequence[Record], device: str) -> Table:
    result = Table(title=f"a whole layer on {device}, us", title_justify="left")
    for heading in ("layer", "", "us", "slower", *STAGES, "other", "differences"):
        result.add_column(heading, justify="left" if heading in ("layer", "") else "right", no_wrap=True)
    for record in found:
        rows = {NATIVE: (record.us, record.stages)}
        rows |= {name: (us, record.others_stages[name]) for name, us in record.others_us.items()}
        for name, (us, stages) in rows.items():
            cells = [f"{stages[stage]:.0f}" for stage in (*STAGES, "other")]
            apart = " ".join(f"{value:.0e}" for value in record.differences.get(name, []))
            first = record.id.removeprefix("layer/") if name == NATIVE else ""
            result.add_row(first, name, f"{us:.0f}", f"{us / record.us:.2f}", *cells, apart)
    return result
