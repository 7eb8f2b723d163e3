"""`python -m jax_router bench`: whether a case is right on this device, and how long it takes beside plain JAX."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from . import _oracle
from ._activation_topk import activation_topk
from ._case import Case
from ._explain import explain, kernel_platform
from ._grouped_matmul import grouped_matmul
from ._logits import router_logits
from ._timing import (
    COPIES_BYTES,
    MIN_CALLS,
    Peaks,
    Pool,
    Spec,
    Timing,
    copies_of,
    device_name,
    measured_peaks,
    random_rows,
    timings,
)
from ._types import Routing
from ._ways import Way, Weights, ours, plain

OURS, PLAIN, TOP_K = "jax_router", "jnp under jit", "lax.top_k"
_POOL = {"gpu": 2**27, "cpu": 2**24}  # numbers: a copy of them does not fit into any cache
_ORACLE_FLOPS = 10**10


class BenchError(Exception):
    """The case cannot be timed here."""


@dataclass(frozen=True)
class Figures:
    """What was measured of one part of the layer.

    Attributes:
        name: of the part.
        timings: by contender.
        floor_us: what the bytes or the arithmetic of any implementation take here.
        is_native: whether kernels of this package compute it, but for XLA's products.
    """

    name: str
    timings: Mapping[str, Timing]
    floor_us: float
    is_native: bool


def run(case: Case) -> tuple[bool, list[Figures]]:
    """Shows what is right and what it takes. Returns whether all is right and was timed, and the figures."""
    console = Console(highlight=False)
    console.print(f"[bold]{case.describe()}[/]")
    if case.left_out:
        console.print(f"The router of {case.preset} has {case.left_out} too, which is not part of what is timed.")
    console.print(_device())
    try:
        bench = Bench(case)
        with _progress() as show:
            show("drawing weights and hidden states, measuring this device")
            pool = Pool(max(_POOL.get(jax.default_backend(), 2**24), bench.largest.size))
            peaks = measured_peaks(pool)
            show("comparing with float64")
            checks = list(bench.checks(pool))
        for check in checks:
            console.print(check.describe(), soft_wrap=True)
        if not all(check.is_right for check in checks):
            return False, []
    except jax.errors.JaxRuntimeError as error:
        raise BenchError(str(error).splitlines()[0]) from error
    found, failures = [], dict[str, str]()
    with _progress() as show:
        for stage in bench.stages():
            try:
                found.append(bench.figures(stage, pool, peaks, show))
            except Exception as error:  # a part that fails must not cost the figures of the others
                failures[stage.name] = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    console.print()
    console.print(table(found))
    for name, reason in failures.items():
        console.print(f"{name}: [bold red]not timed[/], {escape(reason)}")
    if not all(figures.is_native for figures in found):
        console.print("* by the reference, not by kernels: `jax-router doctor` with the same options says why")
    console.print(f"\n{_floors(peaks)}")
    return not failures, found


def _floors(peaks: Peaks) -> str:
    speed = f"A large copy moves {peaks.bytes_us / 1e3:,.3g} GB/s here"
    if math.isinf(peaks.flops_us):
        return f"{speed}: the floor is what the bytes of a call take at that speed. What stays in caches may be faster."
    return (
        f"{speed}, a large product of bf16 does {peaks.flops_us / 1e6:,.3g} TFLOP/s: the floor is what the bytes of a "
        "call, or its arithmetic, take at that speed."
    )


def _device() -> str:
    how = (
        f"kernel time, the median of {MIN_CALLS} calls"
        if jax.default_backend() == "gpu"
        else "wall-clock time, the median of calls that take turns"
    )
    kind = jax.devices()[0].platform
    name = f"Timed on a {kind.upper()}, {device_name()}, jax {jax.__version__}: {how}."
    return name if kind != "cpu" else f"{name}\n[yellow]These are figures of a CPU[/]; no GPU is timed."


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """What is being done, and for how long; on a terminal alone."""
    console = Console(stderr=True)
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("")
        yield lambda text: progress.reset(task, description=text)


class Check(NamedTuple):
    """How a part compares with float64.

    Attributes:
        name: of the part.
        choices: that were compared.
        by_rounding: of them those with another id, whose scores are closer than f32 rounding.
        wrong: those with another id otherwise.
        error: of the weights, the largest relative one.
        allowed: what f32 rounding explains.
    """

    name: str
    choices: int
    by_rounding: int
    wrong: int
    error: float
    allowed: float

    @property
    def is_right(self) -> bool:
        return not self.wrong and self.error <= self.allowed

    def describe(self) -> str:
        verdict = "[green]right[/]" if self.is_right else "[bold red]wrong[/]"
        ids = f"all {self.choices:,} ids are those of float64"
        if self.by_rounding:
            ids += f" but for {self.by_rounding:,}, whose scores are closer than f32 rounding"
        if self.wrong:
            ids = f"{self.wrong:,} of {self.choices:,} ids are not those of float64"
        return f"{self.name:<16} {verdict}: {ids}; weights within {self.error:.1e}"


class Movement(NamedTuple):
    """Whether parts that compute the same in jnp do so."""

    name: str
    is_right: bool

    def describe(self) -> str:
        verdict = "[green]right[/]: as in jnp" if self.is_right else "[bold red]wrong[/]: not as in jnp"
        return f"{self.name:<16} {verdict}"


@dataclass(frozen=True)
class Contender:
    """A computation, and the names of the values that it takes."""

    run: Callable[..., Any]
    inputs: tuple[str, ...]


@dataclass(frozen=True)
class Stage:
    """A part of the layer, by several contenders; with the bytes that any of them must move, and the arithmetic."""

    name: str
    contenders: Mapping[str, Contender]
    nbytes: int
    flops: int = 0


class Bench:
    """The parts of a layer of a case, and the values that they compute on.

    Raises:
        BenchError: the device has not enough memory.
    """

    def __init__(self, case: Case):
        self.case = case
        self.ours = ours(grouped_matmul, **case.config.selection)
        self.plain = plain(grouped_matmul, **case.config.selection)
        self._check_memory()

    def _check_memory(self) -> None:
        needed = sum(spec.nbytes for spec in (self._drawn["x"], self._drawn["weight"], *self._experts))
        needed += 4 * self._rows_bytes
        there = _memory()
        if needed > there:
            advice = "give a smaller --inner" if self._experts else "give fewer --tokens"
            raise BenchError(f"this needs about {needed / 1e9:.1f} GB, and there are {there / 1e9:.1f}: {advice}")

    @property
    def _drawn(self) -> dict[str, Spec]:
        case = self.case
        biases = {name: Spec(struct.shape, struct.dtype, 0.1) for name, struct in case.biases.items()}
        return {
            "x": Spec(case.x.shape, case.x.dtype),
            "weight": Spec(case.weight.shape, case.weight.dtype, case.config.hidden_size**-0.5),
            **biases,
        }

    @property
    def largest(self) -> Spec:
        return max(self._drawn.values(), key=lambda spec: spec.size)

    @property
    def _experts(self) -> tuple[Spec, ...]:
        config, inner = self.case.config, self.case.inner
        if inner is None:
            return ()
        shapes = (config.hidden_size, 2 * inner), (inner, config.hidden_size)
        return tuple(Spec((config.num_experts, *shape), self.case.dtype, shape[0] ** -0.5) for shape in shapes)

    @property
    def _rows_bytes(self) -> int:
        return self._drawn["x"].nbytes * self.case.config.top_k

    def _draw(self, pool: Pool) -> dict[str, jax.Array]:
        return {name: pool.draw(spec) for name, spec in self._drawn.items()}

    def _values(self, names: tuple[str, ...], x: jax.Array, weight: jax.Array, **biases: jax.Array) -> list[Any]:
        """What the parts take, by their names: each is what the parts before it return."""
        config = self.case.config
        logits = router_logits(x, weight, biases.get("logit_bias"))
        weights, expert_ids = activation_topk(logits, biases.get("bias"), **config.selection)
        dispatch = self.ours.sort(expert_ids, config.num_experts)
        values = {
            "x": x,
            "weight": weight,
            "biases": biases,
            "logits": logits,
            "bias": biases.get("bias"),
            "weights": weights,
            "expert_ids": expert_ids,
            "dispatch": dispatch,
            "places": self.plain.sort(expert_ids, config.num_experts),
            "rows": self.ours.permute(x, dispatch),
        }
        return [values[name] for name in names]

    # Whether it is right

    def checks(self, pool: Pool) -> Iterator[Check | Movement]:
        config, drawn = self.case.config, self._draw(pool)
        x, weight = drawn["x"], drawn["weight"]
        biases = {name: drawn[name] for name in self.case.biases}
        most = max(64, _ORACLE_FLOPS // weight.size)
        some = np.unique(np.linspace(0, self.case.tokens - 1, min(self.case.tokens, most)).astype(int))

        routing = jax.jit(self.ours.route)(x, weight, **biases)
        x64, weight64 = _oracle.f64(x[some]), _oracle.f64(weight)
        logits = x64 @ weight64.T + _oracle.f64(biases.get("logit_bias", 0.0))
        # Each addition of a long f32 sum rounds by up to 2^-24, and these errors add up as a random walk does: four
        # standard deviations of one with steps of that size.
        steps = 4 * config.hidden_size**0.5 * 2.0**-24
        slack = steps * np.sqrt((x64**2) @ (weight64**2).T)
        yield self._against_float64("dense_router", routing, some, logits, slack, biases.get("bias"))

        (logits,) = jax.jit(partial(self._values, ("logits",)))(**drawn)
        routing = jax.jit(partial(activation_topk, **config.selection))(logits, biases.get("bias"))
        logits = np.asarray(logits[some])
        yield self._against_float64("activation_topk", routing, some, logits, np.zeros(1), biases.get("bias"))

        names = "x", "weights", "dispatch", "places", "rows"
        x, weights, dispatch, places, rows = jax.jit(partial(self._values, names))(**drawn)
        same = [(dispatch.token_index, places.token), (dispatch.slot, places.slot)]
        same += [(dispatch.group_sizes, places.group_sizes)]
        yield Movement("expert_dispatch", all(bool(jnp.array_equal(*pair)) for pair in same))
        yield Movement("permute", bool(jnp.array_equal(rows, jax.jit(self.plain.permute)(x, places))))
        got = jax.jit(self.ours.combine)(rows, dispatch, weights)
        want = jax.jit(self.plain.combine)(rows, places, weights)
        yield Movement("combine", bool(_is_rounded(got, want)))

    def _against_float64(
        self, name: str, routing: Routing, rows: np.ndarray, logits: np.ndarray, slack: np.ndarray, bias: Any
    ) -> Check:
        """The routing of some rows; `slack` is what their logits may be off by."""
        config, selection = self.case.config, self.case.config.selection
        weights, got = (np.asarray(values[rows]) for values in routing)
        keys, key_slack = _oracle.selection_keys(logits, bias, config.score_fn, config.num_groups)
        key_slack = key_slack + slack  # no score function is steeper than 1
        groups = {name: selection[name] for name in ("num_groups", "top_groups", "group_score")}
        want = _oracle.expert_ids(logits, bias, config.top_k, config.score_fn, **groups)
        is_id = (got >= 0) & (got < config.num_experts)
        ids = np.where(is_id, got, 0)

        def at(values: np.ndarray, where: np.ndarray) -> np.ndarray:
            return np.take_along_axis(np.broadcast_to(values, keys.shape), where.astype(np.int64), -1)

        is_close = np.abs(at(keys, ids) - at(keys, want)) <= at(key_slack, ids) + at(key_slack, want)
        if selection["top_groups"] < config.num_groups:
            # Where two groups are as close, so are all the choices of a token in one or the other.
            scores = np.sort(_oracle.group_scores(keys, config.num_groups, config.group_score), axis=-1)
            first_out = config.num_groups - selection["top_groups"] - 1
            gap = scores[:, first_out + 1] - scores[:, first_out]
            is_close |= (gap <= 4 * key_slack.max(axis=-1))[:, None]  # of two keys in each
        ordered = np.sort(ids, axis=-1)
        repeats = np.zeros_like(is_id)
        repeats[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
        differs = got != want
        wrong = (differs & ~is_close) | ~is_id | repeats
        scoring = {key: selection[key] for key in ("score_fn", "renormalize", "scale", "eps")}
        expected = _oracle.weights_at(logits, got, **scoring)
        error = np.abs(weights - expected) / np.maximum(np.abs(expected), 1e-30)
        return Check(
            name, got.size, int((differs & ~wrong).sum()), int(wrong.sum()), float(error.max()), 3e-6 + 4 * slack.max()
        )

    # What it takes

    def stages(self) -> Iterator[Stage]:
        case, config = self.case, self.case.config
        x, weight = self._drawn["x"], self._drawn["weight"]
        choices = case.tokens * config.top_k
        parts = 1 if case.dtype == case.weight_dtype else 3  # products of bf16 that a weight in f32 takes
        flops = 2 * parts * case.tokens * weight.size

        def routing(way: Way) -> Contender:
            return Contender(lambda x, weight, biases: way.route(x, weight, **biases), ("x", "weight", "biases"))

        yield Stage(
            "dense_router",
            {OURS: routing(self.ours), PLAIN: routing(self.plain)},
            x.nbytes + weight.nbytes + 8 * choices,
            flops,
        )
        select = partial(activation_topk, **config.selection)
        yield Stage(
            "activation_topk",
            {
                OURS: Contender(select, ("logits", "bias")),
                PLAIN: Contender(partial(select, implementation="reference"), ("logits", "bias")),
                TOP_K: Contender(partial(jax.lax.top_k, k=config.top_k), ("logits",)),
            },
            4 * case.tokens * config.num_experts + 8 * choices,
        )
        yield Stage(
            "expert_dispatch",
            {
                name: Contender(partial(_sorted, way, config.num_experts), ("expert_ids",))
                for name, way in ((OURS, self.ours), (PLAIN, self.plain))
            },
            12 * choices + 4 * config.num_experts,
        )
        moved = x.nbytes + self._rows_bytes + 12 * choices
        yield Stage(
            "permute",
            {
                OURS: Contender(self.ours.permute, ("x", "dispatch")),
                PLAIN: Contender(self.plain.permute, ("x", "places")),
            },
            moved,
        )
        yield Stage(
            "combine",
            {
                OURS: Contender(self.ours.combine, ("rows", "dispatch", "weights")),
                PLAIN: Contender(self.plain.combine, ("rows", "places", "weights")),
            },
            moved,
        )
        if experts := self._experts:
            touched = min(1.0, choices / config.num_experts)
            yield Stage(
                _LAYER,
                {
                    name: Contender(partial(_whole, way), ("x", "weight", "biases"))
                    for name, way in ((OURS, self.ours), (PLAIN, self.plain))
                },
                2 * x.nbytes + weight.nbytes + int(touched * sum(spec.nbytes for spec in experts)),
                flops + 2 * choices * sum(spec.size for spec in experts) // config.num_experts,
            )

    def figures(self, stage: Stage, pool: Pool, peaks: Peaks, show: Callable[[str], None]) -> Figures:
        """Of one part."""
        values = partial(self._values, _inputs(stage))
        structs = jax.eval_shape(values, **{name: spec.struct for name, spec in self._drawn.items()})
        experts: tuple[Any, ...] = ()
        if stage.name == _LAYER:
            show("drawing the experts' weights")
            experts = (Weights(*map(random_rows, (1, 2), self._experts)),)
        wait = " (a minute or more on a GPU)" if experts else ""
        programs: dict[str, Callable[..., Any]] = {}
        for name, contender in stage.contenders.items():
            show(f"compiling {stage.name}, {name}{wait}")
            operands = [structs[_inputs(stage).index(value)] for value in contender.inputs]
            programs[name] = jax.jit(contender.run).lower(*operands, *experts).compile()
        show(f"timing {stage.name}")
        nbytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((structs, experts)))
        count = 1 if experts and nbytes > COPIES_BYTES else copies_of(nbytes)
        prepare = jax.jit(values)
        drawn = [dict(zip(_inputs(stage), prepare(**self._draw(pool)))) for _ in range(count)]
        copies = {
            name: [(*(values[value] for value in contender.inputs), *experts) for values in drawn]
            for name, contender in stage.contenders.items()
        }
        return Figures(
            stage.name,
            timings(programs, copies, turns=3 if experts else 6),
            peaks.floor_us(stage.nbytes, stage.flops),
            self._is_native(stage, [*structs, *experts]),
        )

    def _is_native(self, stage: Stage, structs: list[Any]) -> bool:
        contender = stage.contenders[OURS]
        values = dict(zip(_inputs(stage), structs))
        operands = [*(values[name] for name in contender.inputs), *structs[len(values) :]]
        answers = explain(contender.run, *operands, platform=kernel_platform())
        return all(answer.is_native_throughout for answer in answers)


_LAYER = "whole layer"


def _inputs(stage: Stage) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for contender in stage.contenders.values() for name in contender.inputs))


def _sorted(way: Way, num_experts: int, expert_ids: jax.Array) -> Any:
    return way.sort(expert_ids, num_experts)


def _whole(way: Way, x: jax.Array, weight: jax.Array, biases: dict[str, jax.Array], experts: Weights) -> jax.Array:
    return way.layer(x, weight, experts, **biases)


def _is_rounded(got: jax.Array, want: jax.Array) -> jax.Array:
    """Whether two arrays are the same sums of f32, but for their order and one rounding."""
    want = want.astype(jnp.float32)
    allowed = float(jnp.finfo(got.dtype).eps) * jnp.abs(want) + 1e-5 * jnp.abs(want).max()
    return (jnp.abs(got.astype(jnp.float32) - want) <= allowed).all()


def _memory() -> int:
    """The bytes that the device has."""
    stats = jax.devices()[0].memory_stats() if jax.default_backend() == "gpu" else None
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def table(found: list[Figures]) -> Table:
    result = Table(box=None, pad_edge=False)
    result.add_column("", no_wrap=True)
    for heading in (OURS, PLAIN, "faster", "floor", "x floor"):
        result.add_column(heading, justify="right", no_wrap=True)
    for figures in found:
        mine, its = figures.timings[OURS].us, figures.timings[PLAIN].us
        faster, over = f"{its / mine:.1f}", f"{mine / figures.floor_us:.1f}"
        cells = shown(mine), shown(its), faster, shown(figures.floor_us), over
        result.add_row(figures.name + "*" * (not figures.is_native), *cells)
        if other := figures.timings.get(TOP_K):
            result.add_row(f"  {TOP_K} alone", "", shown(other.us), f"{other.us / mine:.1f}")
    return result


def shown(us: float) -> str:
    """With a unit that suits it."""
    value, unit = (us / 1e6, "s") if us >= 1e6 else (us / 1e3, "ms") if us >= 1e3 else (us, "us")
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"
