"""A case's contenders as programs; `jax_router/_timing.py` says how a figure is taken of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from jax_router._timing import (
    Kernel,
    Peaks,
    Pool,
    Timing,
    busy_us,
    kernel_timing,
    kernels_of_calls,
    measured_peaks,
    wall_timings,
)

from .cases import Contender, Spec

__all__ = [
    "Kernel",
    "Peaks",
    "Pool",
    "Timing",
    "busy_us",
    "compiled",
    "contender_inputs",
    "kernel_timing",
    "kernels_of_calls",
    "lowered",
    "measured_peaks",
    "wall_timings",
]


def compiled(contender: Contender, inputs: Sequence[Spec]) -> Callable[..., Any]:
    """The contender's computation, compiled for such inputs."""
    return lowered(contender, inputs).compile()


def lowered(contender: Contender, inputs: Sequence[Spec]) -> jax.stages.Lowered:
    """The contender's computation as it goes to the compiler."""
    return jax.jit(contender.run).lower(*contender_inputs(contender, inputs))


def contender_inputs(contender: Contender, inputs: Sequence[Spec]) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The shapes of what the contender computes on."""
    return jax.eval_shape(contender.prepare, *(spec.struct for spec in inputs))
