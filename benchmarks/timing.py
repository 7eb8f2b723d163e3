"""A case's contenders as programs; `jax_router/_timing.py` says how a figure is taken of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from .cases import Contender, Spec


def compiled(contender: Contender, inputs: Sequence[Spec]) -> Callable[..., Any]:
    """The contender's computation, compiled for such inputs."""
    return lowered(contender, inputs).compile()


def lowered(contender: Contender, inputs: Sequence[Spec]) -> jax.stages.Lowered:
    """The contender's computation as it goes to the compiler."""
    return jax.jit(contender.run).lower(*contender_inputs(contender, inputs))


def contender_inputs(contender: Contender, inputs: Sequence[Spec]) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The shapes of what the contender computes on."""
    return jax.eval_shape(contender.prepare, *(spec.struct for spec in inputs))
