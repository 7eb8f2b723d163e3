"""The experts of real models: sizes, weights, and what `grouped` and `layer` have in common."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import jax.numpy as jnp
from jax import Array

from jax_router._timing import Spec, random_rows
from jax_router._ways import Weights
from support.models import MODELS, Model

TOKENS = (8192, 64)
_Key = TypeVar("_Key")


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


def random_bf16(seed: int, shape: tuple[int, ...], scale: float = 1.0) -> Array:
    return random_rows(seed, Spec(shape, jnp.bfloat16, scale))


def compiled_at_once(compilations: Mapping[_Key, Callable[[], Any]]) -> dict[_Key, Future[Any]]:
    """What they return, or their errors, when all are done: the compiler of grouped products takes its time."""
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return {key: threads.submit(compile_one) for key, compile_one in compilations.items()}
