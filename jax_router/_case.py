"""The case that a command is about: a router's sizes, options and dtypes, and how many tokens it gets."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, get_args

import jax
import jax.numpy as jnp

from . import _check, models
from ._native import NATIVE_DTYPES
from ._types import ScoreFn
from .config import RouterConfig

_DTYPES = {short: jnp.dtype(name) for name, short in NATIVE_DTYPES.items()}
_SIZES = {"hidden_size": 7168, "num_experts": 256, "top_k": 8}


@dataclass(frozen=True)
class Case:
    """A dense router, what it gets, and the experts behind it.

    Attributes:
        config: the router.
        tokens: N.
        dtype: of the hidden states.
        weight_dtype: of the gate.
        inner: F, the inner size of the experts, or None without them.
        preset: whose router it is, or "".
    """

    config: RouterConfig
    tokens: int
    dtype: Any
    weight_dtype: Any
    inner: int | None = None
    preset: str = ""

    def describe(self) -> str:
        """In a line."""
        config = self.config
        words = [
            f"{self.tokens} tokens",
            f"{config.num_experts} experts, top {config.top_k}",
            f"{config.top_groups} of {config.num_groups} groups" if config.num_groups > 1 else "",
            f"hidden size {config.hidden_size}",
            config.score_fn,
            "selection bias" if config.has_selection_bias else "no selection bias",
            _short(self.dtype) + (f" x {_short(self.weight_dtype)}" if self.weight_dtype != self.dtype else ""),
            f"experts of {self.inner}" if self.inner else "",
        ]
        return f"{self.preset}: " * bool(self.preset) + ", ".join(filter(None, words))

    @property
    def left_out(self) -> str:
        """What the preset's router does besides, which no op of this case does."""
        config = self.config
        extras = {
            "logits_dtype": config.logits_dtype is not None,
            "logit_scale": config.logit_scale != 1,
            "softcap": config.softcap is not None,
            "selection_key": config.selection_key != "scores",
            "per_expert_scale": config.per_expert_scale,
        }
        return ", ".join(name for name, is_there in extras.items() if is_there)

    @property
    def x(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.tokens, self.config.hidden_size), self.dtype)

    @property
    def weight(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.config.num_experts, self.config.hidden_size), self.weight_dtype)

    @property
    def biases(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The biases that the router has, by the names of `dense_router`."""
        one_an_expert = jax.ShapeDtypeStruct((self.config.num_experts,), jnp.float32)
        has = {"bias": self.config.has_selection_bias, "logit_bias": self.config.logit_bias}
        return {name: one_an_expert for name, is_there in has.items() if is_there}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that say a case."""
    group = parser.add_argument_group("the case")
    group.add_argument("--preset", metavar="NAME", help="the router of a model, as `jax-router presets` lists them")
    for flag, meaning in _NUMBERS.items():
        group.add_argument(flag, type=number_from(1), metavar="N", help=meaning)
    group.add_argument("--score-fn", choices=get_args(ScoreFn), help="default: the preset's, or sqrtsoftplus")
    group.add_argument(
        "--bias", action=argparse.BooleanOptionalAction, help="a selection bias (default: as the preset)"
    )
    group.add_argument("--dtype", choices=tuple(_DTYPES), default="bf16", help="of the hidden states (default: bf16)")
    group.add_argument("--weight-dtype", choices=("same", "f32"), default="same", help="of the gate (default: same)")


_NUMBERS = {
    "--tokens": "default: 4096",
    "--experts": f"default: the preset's, or {_SIZES['num_experts']}",
    "--top-k": f"experts a token; default: the preset's, or {_SIZES['top_k']}",
    "--hidden": f"size of the hidden states; default: the preset's, or {_SIZES['hidden_size']}",
    "--groups": "of experts; default: the preset's, or 1",
    "--top-groups": "that stay eligible",
    "--inner": "inner size of the experts, to see the products of the whole layer too",
}


def number_from(least: int) -> Callable[[str], int]:
    """What reads an option that is a number, `least` or more and one that int32 holds."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be a number, {least} or more, got {text!r}")
        if int(text) > _check.MAX_SIZE:
            raise argparse.ArgumentTypeError(f"must be below 2^31, got {text!r}")
        return int(text)

    return number


def case_of(arguments: argparse.Namespace) -> Case:
    """The case that the options say.

    Raises:
        ValueError: there is no such preset, or no such router.
    """
    options = models.preset(arguments.preset).options() if arguments.preset else dict(_SIZES)
    options |= dict(_given(arguments))
    dtype = _DTYPES[arguments.dtype]
    weight_dtype = dtype if arguments.weight_dtype == "same" else _DTYPES[arguments.weight_dtype]
    config, tokens = RouterConfig(**options), arguments.tokens or 4096
    if tokens * config.top_k > _check.MAX_SIZE:
        raise ValueError(f"--tokens must be below 2^31 / {config.top_k}, the experts a token, got {tokens}")
    return Case(config, tokens, dtype, weight_dtype, arguments.inner, arguments.preset or "")


def _given(arguments: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """The options of RouterConfig that were given."""
    for option, name in (
        ("num_experts", "experts"),
        ("top_k", "top_k"),
        ("hidden_size", "hidden"),
        ("num_groups", "groups"),
        ("top_groups", "top_groups"),
        ("score_fn", "score_fn"),
        ("selection_bias", "bias"),
    ):
        if (value := getattr(arguments, name)) is not None:
            yield option, value


def _short(dtype: Any) -> str:
    return NATIVE_DTYPES[jnp.dtype(dtype).name]
