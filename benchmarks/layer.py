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

from jax_router import grouped_matmul
from jax_router._timing import Kernel, Timing, busy_us, kernels_of_calls
from jax_router._ways import Places, Way, Weights, ours, plain

from .cases import NATIVE
from .experts import EXPERTS, TOKENS, Experts, compiled_at_once, random_bf16

STAGES = ("route", "dispatch", "permute", "experts", "swiglu", "combine")
# Kernels in a CUDA graph do not say which instruction they are of, and gaps between kernels do not count here anyway.
_WITHOUT_GRAPHS = {"xla_gpu_graph_min_graph_size": 1_000_000}


class Parameters(NamedTuple):
    gate: Array  # [E, D]
    experts: Weights


def _forward(way: Way, x: Array, parameters: Parameters, cotangent: Array) -> list[Array]:
    return [way.layer(x, *parameters)]


def _forward_and_backward(way: Way, x: Array, parameters: Parameters, cotangent: Array) -> list[Array]:
    result, pullback = jax.vjp(lambda x, parameters: way.layer(x, *parameters), x, parameters)
    of_x, of_parameters = pullback(cotangent)
    return [result, of_x, *jax.tree.leaves(of_parameters)]


DIRECTIONS = {"forward": _forward, "forward_and_backward": _forward_and_backward}


def _scatter_add(results: Array, places: Places, weights: Array) -> Array:
    weighted = results.astype(jnp.float32) * weights.ravel()[places.order, None]
    sums = jnp.zeros((len(weights), results.shape[1]), jnp.float32).at[places.token].add(weighted)
    return sums.astype(results.dtype)


def ways(experts: Experts) -> dict[str, Way]:
    """This project's first; the same grouped products in all, but for that of tokamax."""
    options = experts.model.selection
    product = partial(grouped_matmul, unused_rows="undefined", implementation="native")
    first, indexing = ours(product, **options), plain(product, **options)
    found = {NATIVE: first, "indexing": indexing, "scatter-add": dataclasses.replace(indexing, combine=_scatter_add)}
    if importlib.util.find_spec("tokamax"):
        import tokamax

        def ragged_dot(lhs, rhs, group_sizes):
            return tokamax.ragged_dot(lhs, rhs, group_sizes=group_sizes)

        found[f"{NATIVE} with tokamax"] = dataclasses.replace(first, product=ragged_dot)
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
    direction: str  # of DIRECTIONS

    @property
    def id(self) -> str:
        return f"layer/{self.experts.name}/N{self.tokens}/{self.direction}"


def cases() -> list[Case]:
    return [Case(experts, tokens, direction) for experts in EXPERTS for tokens in TOKENS for direction in DIRECTIONS]


def records(selected: Sequence[Case], failures: dict[str, str]) -> Iterator[Record]:
    """The experts of the largest model and their gradients fill more than half of an H100: one model at a time."""
    for experts in dict.fromkeys(case.experts for case in selected):
        of_model = [case for case in selected if case.experts == experts]
        programs = compiled_at_once(
            {
                (case, name): partial(_compiled, partial(DIRECTIONS[case.direction], way), case)
                for case in of_model
                for name, way in ways(experts).items()
            }
        )
        parameters = _parameters(experts)
        for case in of_model:
            arguments = _arguments(case, parameters)
            found: dict[str, tuple[Timing, dict[str, float], list[Array]]] = {}
            for name in ways(experts):
                try:
                    found[name] = _timed(programs[case, name].result(), arguments)
                except Exception as error:  # one that fails must not cost the figures of the others
                    failures[f"{case.id} of {name}"] = f"{type(error).__name__}: {error}"
            if NATIVE in found:
                yield _record(case, found)
        del parameters, arguments, found, programs
        gc.collect()


def _parameters(experts: Experts) -> Parameters:
    model = experts.model
    gate = random_bf16(3, (model.num_experts, model.hidden_size), model.hidden_size**-0.5)
    return Parameters(gate, experts.weights())


def _arguments(case: Case, parameters: Parameters) -> tuple[Array, Parameters, Array]:
    shape = (case.tokens, case.experts.model.hidden_size)
    return random_bf16(4, shape), parameters, random_bf16(5, shape)


def _compiled(run: Callable[..., list[Array]], case: Case) -> jax.stages.Compiled:
    arguments = jax.eval_shape(lambda: _arguments(case, _parameters(case.experts)))
    return jax.jit(run).lower(*arguments).compile(_WITHOUT_GRAPHS)


def _record(case: Case, found: dict[str, tuple[Timing, dict[str, float], list[Array]]]) -> Record:
    timing, stages, results = found.pop(NATIVE)
    return Record(
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


def _timed(compiled: jax.stages.Compiled, arguments: tuple[Any, ...]) -> tuple[Timing, dict[str, float], list[Array]]:
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
