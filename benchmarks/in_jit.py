"""What a call costs inside a jitted program, where XLA launches it.

Small cases are timed as a part of a decode step: 32 layers, unrolled in one jit, under XLA's default flags; a layer is
a bf16 product 1024 x 1024 for 8 rows, with its weight from memory, and fusions. The figure is the difference between a
layer with the call and one without. Larger cases are timed as a chain of calls in one jit: the figure is what one more
call adds. Either contains the kernel.

The programs with and without take turns, under one of two clocks. By the GPU's own timeline, which CUPTI records, a run
counts from the start of its first kernel to the end of its last one: gaps between kernels are in it, but not what the
host does before and after, which wanders. Wall-clock time has that too, and no profiler that could slow a run down.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from jax_router._timing import Kernel, Pool, Timing, traced_kernels

from .cases import Case, Spec
from .timing import contender_inputs

LAYERS = 32
_CHAIN = 17
_WIDTH = 1024
_HIDDEN = Spec((8, _WIDTH), jnp.bfloat16)
_WEIGHT = Spec((_WIDTH, _WIDTH), jnp.bfloat16, scale=_WIDTH**-0.5)
TURNS = 16
_QUEUED = 4  # runs of a program that follow each other in a turn, under wall-clock time
_PAUSE_S = 2e-3  # between runs, under the GPU's; much more than between the kernels of one

# A profiler makes XLA launch kernels one by one, unless it is told to keep CUDA graphs.
_WITH_GRAPHS = {"xla_enable_command_buffers_during_profiling": True}

Run: TypeAlias = Callable[[], Any]
Clock: TypeAlias = Callable[[Sequence[Run]], list[list[float]]]  # microseconds of each run, turn by turn


class InJit:
    """The programs of a case, compiled when made: without calls, and with those of each of some contenders.

    The chain without is one of a single call, and only one contender is timed so.
    """

    def __init__(self, case: Case, names: Sequence[str]):
        self._is_decode, self._names = case.is_decode, names
        self._calls = LAYERS if case.is_decode else _CHAIN - 1
        call, *_ = calls = [case.contenders[name].run for name in names]
        programs = [_model(None), *map(_model, calls)] if case.is_decode else [_chain(call, 1), _chain(call, _CHAIN)]
        self._programs = []
        for program, name in zip(programs, (names[0], *names)):
            inputs = contender_inputs(case.contenders[name], case.inputs)
            many = [inputs] * self._calls
            arguments = (_HIDDEN.struct, [_WEIGHT.struct] * LAYERS, many) if case.is_decode else (inputs, many)
            self._programs.append(jax.jit(program).lower(*arguments).compile(_WITH_GRAPHS))

    def timings(self, pool: Pool, copies: Mapping[str, Sequence[tuple[Any, ...]]], clock: Clock) -> dict[str, Timing]:
        """What a call adds, by contender."""
        model = (pool.draw(_HIDDEN), [pool.draw(_WEIGHT) for _ in range(LAYERS)])
        runs: list[Run] = []
        for program, name in zip(self._programs, (self._names[0], *self._names)):
            many = [*itertools.islice(itertools.cycle(copies[name]), self._calls)]
            arguments = (*model, many) if self._is_decode else (copies[name][0], many)
            runs.append(functools.partial(program, *arguments))
        for run in runs * 3:
            jax.block_until_ready(run())
        without, *others = clock(runs)
        return {
            name: Timing.of([(more - fewer) / self._calls for fewer, more in zip(without, us)])
            for name, us in zip(self._names, others)
        }


def wall_us(runs: Sequence[Run]) -> list[list[float]]:
    """By the host's clock: the runs of a program in a turn are queued one after another."""
    us: list[list[float]] = [[] for _ in runs]
    for _ in range(TURNS):
        for run, times in zip(runs, us):
            start = time.perf_counter()
            for _ in range(_QUEUED):
                result = run()
            jax.block_until_ready(result)
            times.append(1e6 * (time.perf_counter() - start) / _QUEUED)
    return us


def timeline_us(runs: Sequence[Run]) -> list[list[float]]:
    """By the GPU's clock. The host pauses between runs, so that they are told apart."""

    def take_turns() -> None:
        for run in [*runs] * TURNS:
            time.sleep(_PAUSE_S)
            jax.block_until_ready(run())

    return spans_us(traced_kernels(take_turns), len(runs))


def spans_us(kernels: Sequence[Kernel], programs: int) -> list[list[float]]:
    """The runs of each program, from first start to last end, in a timeline where they took turns."""
    bursts = [*_bursts(kernels)]
    sizes = [{len(burst) for burst in bursts[program::programs]} for program in range(programs)]
    if len(bursts) != TURNS * programs or any(len(of_program) != 1 for of_program in sizes):
        raise RuntimeError(
            f"{TURNS} turns of {programs} programs left {len(bursts)} bursts of kernels in the trace, for each program "
            f"of these sizes: {sizes}: no figure in jit"
        )
    spans = [(max(kernel.end for kernel in burst) - burst[0].start) / 1e3 for burst in bursts]
    return [spans[program::programs] for program in range(programs)]


def _bursts(kernels: Sequence[Kernel]) -> Iterator[list[Kernel]]:
    """The kernels between pauses; they come in the order of their starts."""
    burst: list[Kernel] = []
    end = 0.0
    for kernel in kernels:
        if burst and kernel.start - end > 1e9 * _PAUSE_S / 2:
            yield burst
            burst = []
        burst.append(kernel)
        end = max(end, kernel.end)
    if burst:
        yield burst


def _model(call: Callable[..., Any] | None) -> Callable[..., Any]:
    """Both kinds of layer make the call's first input and use a number of its result, or one in the place of that."""

    @jax.jit
    def layer(hidden, weight, inputs):
        product = hidden @ weight
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(product.astype(jnp.float32)), axis=-1, keepdims=True))
        active = jax.nn.silu(product * scale.astype(product.dtype))
        nudge = active[0, 0] > 1e30  # never, but XLA does not know
        first = jax.lax.optimization_barrier(inputs[0] + nudge.astype(inputs[0].dtype))
        used = first if call is None else jax.tree.leaves(call(first, *inputs[1:]))[0]
        return hidden + active + used.ravel()[0].astype(hidden.dtype)

    def model(hidden, weights, inputs_of_layers):
        for weight, inputs in zip(weights, inputs_of_layers):
            hidden = layer(hidden, weight, inputs)
        return hidden

    return model


def _chain(call: Callable[..., Any], length: int) -> Callable[..., Any]:
    """Each call waits for the one before; one number of all results is the chain's, so that none may be left out."""

    def chain(first, others):
        total = jax.tree.leaves(call(*first))[0].ravel()[0]
        for inputs in others[: length - 1]:
            inputs, total = jax.lax.optimization_barrier((inputs, total))
            total += jax.tree.leaves(call(*inputs))[0].ravel()[0]
        return total

    return chain
