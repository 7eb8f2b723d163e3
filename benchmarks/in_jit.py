"""What a call costs inside a jitted program, where XLA launches it.

Small cases are timed as a part of a decode step: 32 layers, unrolled in one jit, under XLA's default flags; a layer is
a bf16 product 1024 x 1024 for 8 rows, with its weight from memory, and fusions. The figure is the difference between a
layer with the call and one without. Larger cases are timed as a chain of calls in one jit: the figure is what one more
call adds. All of it is wall-clock time, and contains the kernel.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jax_router._timing import Pool

from .cases import Case, Spec
from .timing import contender_inputs

LAYERS = 32
_CHAIN = 17
_WIDTH = 1024
_HIDDEN = Spec((8, _WIDTH), jnp.bfloat16)
_WEIGHT = Spec((_WIDTH, _WIDTH), jnp.bfloat16, scale=_WIDTH**-0.5)


class InJit:
    """The programs of one of a case's contenders, compiled when made: two that differ by a number of calls."""

    def __init__(self, case: Case, name: str):
        contender = case.contenders[name]
        call = contender.run
        self.case = case
        inputs = contender_inputs(contender, case.inputs)
        if case.is_decode:
            self._calls = LAYERS
            arguments = (_HIDDEN.struct, [_WEIGHT.struct] * LAYERS, [inputs] * LAYERS)
            programs = [_model(None), _model(call)]
        else:
            self._calls = _CHAIN - 1
            arguments = (inputs, [inputs] * (_CHAIN - 1))
            programs = [_chain(call, 1), _chain(call, _CHAIN)]
        self._fewer, self._more = (jax.jit(program).lower(*arguments).compile() for program in programs)

    def us(self, pool: Pool, copies: Sequence[tuple[Any, ...]]) -> float:
        """Microseconds that a call adds."""
        many = [copies[index % len(copies)] for index in range(self._calls)]
        arguments: tuple[Any, ...]
        if self.case.is_decode:
            arguments = (pool.draw(_HIDDEN), [pool.draw(_WEIGHT) for _ in range(LAYERS)], many)
        else:
            arguments = (copies[0], many)
        for program in (self._fewer, self._more):
            for _ in range(3):
                jax.block_until_ready(program(*arguments))
        differences = [_seconds(self._more, arguments) - _seconds(self._fewer, arguments) for _ in range(11)]
        return 1e6 * statistics.median(differences) / self._calls


def _seconds(program: Callable[..., Any], arguments: tuple[Any, ...], repetitions: int = 4) -> float:
    """The time of one run of several that are queued one after another."""
    jax.block_until_ready(program(*arguments))
    start = time.perf_counter()
    for _ in range(repetitions):
        result = program(*arguments)
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / repetitions


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
