"""Rows of many kinds: what depends on the data is timed at the worst of 64 draws, and not at one.

How long a selection takes depends on the values, because it guesses a bound and starts again where the guess fails. So
its figure is that of the slowest draw, and the median over the draws says how much the data matter.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_router._timing import HOT_BYTES, Spec, Timing, busy_us, copies_of, kernels_of_calls

DRAWS, CALLS = 64, 5  # calls of each draw, of which the median counts
_MOST_BYTES = 2**33  # of all draws of a case
_OUTLIERS = 8  # of a row

Shape = tuple[int, ...]


def _rounded(key: jax.Array, shape: Shape) -> jax.Array:
    """Not by two conversions, which XLA leaves out on a GPU."""
    return jax.lax.reduce_precision(jax.random.normal(key, shape), exponent_bits=8, mantissa_bits=7)


def _ascending(key: jax.Array, shape: Shape) -> jax.Array:
    return jnp.sort(jax.random.normal(key, shape), axis=-1)


def _with_outliers(key: jax.Array, shape: Shape) -> jax.Array:
    is_outlier = jax.random.bernoulli(jax.random.fold_in(key, 1), _OUTLIERS / shape[-1], shape)
    return jax.random.normal(key, shape) * jnp.where(is_outlier, jnp.float32(1e4), jnp.float32(1))


KINDS: dict[str, Callable[[jax.Array, Shape], jax.Array]] = {
    "normal": lambda key, shape: jax.random.normal(key, shape),
    "uniform": lambda key, shape: jax.random.uniform(key, shape),
    "exponential": lambda key, shape: jax.random.exponential(key, shape),
    "rounded to bf16": _rounded,
    "ascending": _ascending,
    "descending": lambda key, shape: -_ascending(key, shape),
    "with outliers": _with_outliers,
}


def count(nbytes: int) -> int:
    """How many draws of so many bytes: fewer of large ones, but each kind twice; more if all would stay in a cache."""
    return min(max(DRAWS, copies_of(nbytes)), max(2 * len(KINDS), _MOST_BYTES // nbytes))


def name(number: int) -> str:
    """The kinds take turns."""
    turn, kind = divmod(number, len(KINDS))
    return f"{list(KINDS)[kind]} {turn}"


def compiled(spec: Spec) -> Callable[[int], jax.Array]:
    """The program that makes one draw on the device, by its number."""

    def make(number: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(0), number)
        kinds = [lambda key, kind=kind: kind(key, spec.shape).astype(spec.dtype) for kind in KINDS.values()]
        return jax.lax.switch(number % len(kinds), kinds, key)

    program = jax.jit(make).lower(jax.ShapeDtypeStruct((), jnp.int32)).compile()
    return lambda number: program(jnp.int32(number))


class DrawTimings(NamedTuple):
    """Microseconds a call: of each draw the median, and of all calls the least and the most."""

    us: tuple[float, ...]
    least: float
    most: float
    kernels: int

    @property
    def median(self) -> float:
        return statistics.median(self.us)

    @property
    def worst(self) -> Timing:
        return Timing(max(self.us), self.least, self.most, self.kernels)

    @property
    def worst_draw(self) -> str:
        return name(self.us.index(max(self.us)))


def kernel_timings(run: Callable[..., Any], make: Callable[[int], jax.Array], nbytes: int) -> DrawTimings:
    """The kernel time of each draw, all in one trace.

    Small inputs are timed where the call before left them, in the cache: the calls of a draw follow each other. Large
    ones must come from memory: the draws take turns.
    """
    draws = [(make(number),) for number in range(count(nbytes))]
    order = list(call_order(len(draws), nbytes))
    calls = kernels_of_calls(run, [draws[number] for number in order], calls=len(order))
    return of_calls(order, [busy_us(kernels) for kernels in calls], len(calls[0]))


def call_order(draws: int, nbytes: int) -> Iterator[int]:
    """The draw of each call."""
    for call in range(draws * CALLS):
        yield call // CALLS if nbytes <= HOT_BYTES else call % draws


def of_calls(order: Sequence[int], times_us: Sequence[float], kernels: int) -> DrawTimings:
    """From the time of each call, and the draw that it was given."""
    of_draws: dict[int, list[float]] = {number: [] for number in sorted(set(order))}
    for number, us in zip(order, times_us):
        of_draws[number].append(us)
    medians = tuple(map(statistics.median, of_draws.values()))
    return DrawTimings(medians, min(times_us), max(times_us), kernels)
