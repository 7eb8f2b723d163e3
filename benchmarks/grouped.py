"""Products of groups of rows at the shapes of real models: speed, and error against f32, forward and both gradients."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from rich.table import Table

from jax_router import grouped_matmul
from jax_router._timing import kernel_timing

from .experts import EXPERTS, TOKENS, Experts, compiled_at_once, random_bf16

Product = Callable[..., Array]
DIRECTIONS = ("forward", "gradient of lhs", "gradient of rhs")
_CHECKED = 4  # groups whose error is taken


@dataclasses.dataclass
class Record:
    """One product, in one direction.

    Attributes:
        id: model, tokens, which of the experts' weights, and the direction.
        us, us_range: kernel time of a call, the median, the least and the most.
        tflops: a second.
        error: the largest, relative to the largest value, over some groups, against the product in f32.
        others_us, others_error: the same of what else a user could call.
        device, jax, commit: where, with what, and of which state of this project.
    """

    id: str
    us: float
    us_range: tuple[float, float]
    tflops: float
    error: float
    others_us: dict[str, float] = dataclasses.field(default_factory=dict)
    others_error: dict[str, float] = dataclasses.field(default_factory=dict)
    device: str = ""
    jax: str = jax.__version__
    commit: str = ""


@dataclasses.dataclass(frozen=True)
class Case:
    """The product with `w_in` or `w_out` for so many tokens, whose experts are drawn at random."""

    experts: Experts
    tokens: int
    weight: str

    @property
    def id(self) -> str:
        return f"grouped_matmul/{self.experts.name}/N{self.tokens}/{self.weight}"

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """S, D, F and G."""
        model, inner = self.experts.model, self.experts.inner
        widths = (model.hidden_size, 2 * inner) if self.weight == "w_in" else (inner, model.hidden_size)
        return self.tokens * model.top_k, *widths, model.num_experts

    def group_sizes(self) -> np.ndarray:
        model = self.experts.model
        scores = np.random.default_rng(0).random((self.tokens, model.num_experts))
        chosen = np.argpartition(scores, model.top_k, axis=1)[:, : model.top_k]
        return np.bincount(chosen.ravel(), minlength=model.num_experts).astype(np.int32)


def cases() -> list[Case]:
    return [Case(experts, tokens, weight) for experts in EXPERTS for tokens in TOKENS for weight in ("w_in", "w_out")]


def products() -> dict[str, Product]:
    """This project's first."""
    found: dict[str, Product] = {"jax_router": partial(grouped_matmul, implementation="native")}
    if importlib.util.find_spec("tokamax"):
        import tokamax

        found["tokamax"] = lambda lhs, rhs, group_sizes: tokamax.ragged_dot(lhs, rhs, group_sizes=group_sizes)
    return found


def directions(product: Product) -> dict[str, Callable[..., Array]]:
    """The product and its gradients, each a function of all three arrays and the group sizes."""

    def forward(lhs, rhs, cotangent, group_sizes):
        return product(lhs, rhs, group_sizes)

    def of_lhs(lhs, rhs, cotangent, group_sizes):
        return jax.vjp(lambda lhs: product(lhs, rhs, group_sizes), lhs)[1](cotangent)[0]

    def of_rhs(lhs, rhs, cotangent, group_sizes):
        return jax.vjp(lambda rhs: product(lhs, rhs, group_sizes), rhs)[1](cotangent)[0]

    return dict(zip(DIRECTIONS, (forward, of_lhs, of_rhs)))


def records(selected: Sequence[Case], failures: dict[str, str]) -> Iterator[Record]:
    programs = compiled_at_once(
        {
            (case, direction, name): partial(_compiled, directions(product)[direction], case)
            for case in selected
            for direction in DIRECTIONS
            for name, product in products().items()
        }
    )
    for case in selected:
        operands, group_sizes = _operands(case), case.group_sizes()
        arguments = (*operands, jnp.asarray(group_sizes))
        for direction in DIRECTIONS:
            figures = {}
            for name in products():
                try:
                    compiled = programs[case, direction, name].result()
                    timing = kernel_timing(compiled, [arguments])
                    figures[name] = timing, _error(direction, compiled(*arguments), operands, group_sizes)
                except Exception as error:  # one that fails must not cost the figures of the others
                    failures[f"{case.id}/{direction} of {name}"] = f"{type(error).__name__}: {error}"
            if "jax_router" not in figures:
                continue
            timing, error = figures.pop("jax_router")
            rows, hidden, inner, _ = case.sizes
            yield Record(
                f"{case.id}/{direction.replace(' ', '_')}",
                round(timing.us, 1),
                (round(timing.least, 1), round(timing.most, 1)),
                round(2 * rows * hidden * inner / timing.us / 1e6, 1),
                error,
                {name: round(other.us, 1) for name, (other, _) in figures.items()},
                {name: other for name, (_, other) in figures.items()},
            )


def _operands(case: Case) -> tuple[Array, Array, Array]:
    rows, hidden, inner, groups = case.sizes
    return (
        random_bf16(1, (rows, hidden)),
        random_bf16(2, (groups, hidden, inner), hidden**-0.5),
        random_bf16(3, (rows, inner)),
    )


def _compiled(run: Callable[..., Array], case: Case) -> jax.stages.Compiled:
    return jax.jit(run).lower(*jax.eval_shape(lambda: _operands(case)), case.group_sizes()).compile()


def _error(direction: str, result: Array, operands: tuple[Array, Array, Array], group_sizes: np.ndarray) -> float:
    """On the host: XLA would compile, and tune, a product for every size of a group."""
    lhs, rhs, cotangent = operands
    ends, worst = np.cumsum(group_sizes), 0.0
    for group in np.linspace(0, len(ends) - 1, _CHECKED).astype(int):
        if not group_sizes[group]:
            continue
        rows = slice(int(ends[group] - group_sizes[group]), int(ends[group]))
        if direction == "forward":
            got, want = result[rows], _in_f32(lhs[rows]) @ _in_f32(rhs[group])
        elif direction == "gradient of lhs":
            got, want = result[rows], _in_f32(cotangent[rows]) @ _in_f32(rhs[group]).T
        else:
            got, want = result[group], _in_f32(lhs[rows]).T @ _in_f32(cotangent[rows])
        worst = max(worst, float(np.abs(_in_f32(got) - want).max() / np.abs(want).max()))
    return float(f"{worst:.2g}")


def _in_f32(values: Array) -> np.ndarray:
    return np.asarray(values).astype(np.float32)


def table(found: Sequence[Record], device: str) -> Table:
    result = Table(title=f"products of groups of rows on {device}", title_justify="left")
    result.add_column("product", no_wrap=True)
    for heading in ("us", "TFLOP/s", "error", "others: us (error)"):
        result.add_column(heading, justify="right", no_wrap=True)
    for record in found:
        others = ", ".join(
            f"{name} {us:.0f} ({record.others_error[name]:.1e})" for name, us in record.others_us.items()
        )
        result.add_row(record.id, f"{record.us:.0f}", f"{record.tflops:.0f}", f"{record.error:.1e}", others)
    return result
