"""The experts of real models: sizes, weights, and what `grouped` and `layer` have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from support.models import MODELS, Model

TOKENS = (8192, 64)


class Weights(NamedTuple):
    """Of E experts from D to F and back, with SwiGLU between: the first half of `w_in`'s columns are the gates."""

    w_in: Array  # [E, D, 2 F]
    w_out: Array  # [E, F, D]


@dataclasses.dataclass(frozen=True)
class Experts:
    """The experts of a model.

    Attributes:
        name: of the model.
        inner: F.
    """

    name: str
    inner: int

    @property
    def model(self) -> Model:
        return MODELS[self.name]

    def weights(self) -> Weights:
        model = self.model
        return Weights(
            random_bf16(1, (model.num_experts, model.hidden_size, 2 * self.inner), model.hidden_size**-0.5),
            random_bf16(2, (model.num_experts, self.inner, model.hidden_size), self.inner**-0.5),
        )


EXPERTS = (Experts("qwen3-30b-a3b", 768), Experts("deepseek-v4-flash", 2048), Experts("deepseek-v3", 2048))


def random_bf16(seed: int, shape: Sequence[int], scale: float = 1.0) -> Array:
    """Normal numbers, made row by row: the experts of a large model fill half a GPU, and leave no room for a copy."""

    def row(key):
        return jax.random.normal(key, shape[1:], jnp.bfloat16) * jnp.bfloat16(scale)

    return jax.jit(lambda: jax.lax.map(row, jax.random.split(jax.random.key(seed), shape[0])))()
