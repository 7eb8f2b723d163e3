"""Ids against an oracle, over many rows: how many differ, and whether rounding explains them.

The oracle computes products, scores and keys in float64 and sorts them. A kernel computes them in f32, so that two keys
which are closer than f32 can tell may trade places; any other difference is a wrong choice. Nothing is rounded in
topk_select: there, any difference is one (`hard_rows.py`).
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from rich.progress import track
from rich.table import Table

from jax_router import activation_topk, dense_router
from support.models import DTYPES

from . import hard_rows


@dataclasses.dataclass
class Count:
    """What a scenario found.

    Attributes:
        id: the scenario's name.
        rows: how many were computed.
        by_rounding: rows whose ids differ from the oracle's, all between keys that f32 cannot tell apart.
        wrong: rows with any other difference.
        device, jax, commit: where, with what, and of which state of this project.
    """

    id: str
    rows: int
    by_rounding: int
    wrong: int
    device: str
    jax: str = jax.__version__
    commit: str = ""


class RandomRows:
    """Rows that are drawn, computed and counted on the device, in batches."""

    name: str
    part: ClassVar[int]  # of the rows that are asked for, one in so many is counted
    batch: ClassVar[int]

    def differences(self, key: jax.Array, rows: int) -> jax.Array:
        """The number of rows that differ by rounding alone, and of those that differ otherwise."""
        raise NotImplementedError

    def count(self, rows: int) -> tuple[int, int, int]:
        """Rows, those that differ by rounding alone, and those that differ otherwise."""
        batch = min(-(-rows // self.part), self.batch)
        batches = -(-rows // (self.part * batch))
        differences = jax.jit(partial(self.differences, rows=batch))
        by_rounding = wrong = 0
        with jax.enable_x64(True):
            for seed in track(range(batches), description=f"{self.name:32}"):
                found = differences(jax.random.key(seed))
                by_rounding, wrong = by_rounding + int(found[0]), wrong + int(found[1])
        return batches * batch, by_rounding, wrong


@dataclasses.dataclass(frozen=True)
class Selection(RandomRows):
    """Random rows of logits, and how `activation_topk` routes them."""

    name: str
    num_experts: int = 256
    top_k: int = 6
    score_fn: str = "sqrtsoftplus"
    dtype: Any = jnp.float32
    bias_mean: float | None = None  # None: no bias

    part = 1
    batch = 2**18
    # Keys that differ by less count as equal, in units of 2^-24 times what was added up: the score is within 4 units in
    # the last place, and the sum is rounded once.
    slack_ulps = 10.0

    def differences(self, key: jax.Array, rows: int) -> jax.Array:
        logits_key, bias_key = jax.random.split(key)
        logits = _rounded(2 * jax.random.normal(logits_key, (rows, self.num_experts), jnp.float32), self.dtype)
        bias = None
        if self.bias_mean is not None:
            bias = self.bias_mean + 0.1 * jax.random.normal(bias_key, (self.num_experts,), jnp.float32)
        expert_ids = activation_topk(
            logits, bias, top_k=self.top_k, score_fn=self.score_fn, implementation="native"
        ).expert_ids
        x = logits.astype(jnp.float64)
        scores = jax.nn.sigmoid(x) if self.score_fn == "sigmoid" else jnp.sqrt(jnp.logaddexp(x, 0.0))
        keys, size = (x, jnp.zeros_like(x)) if bias is None else (scores + bias, scores + jnp.abs(bias.astype(x.dtype)))
        return _differences(keys, self.slack_ulps * 2.0**-24 * size, expert_ids)


@dataclasses.dataclass(frozen=True)
class Product(RandomRows):
    """Random tokens, and how `dense_router` routes them, so many a call."""

    name: str
    tokens: int
    dtype: Any = jnp.bfloat16
    hidden: int = 4096
    num_experts: int = 256
    top_k: int = 6
    slack: float = 1e-6  # two logits that differ by less, relative to the larger, count as equal

    part = 10  # the oracle multiplies in float64
    batch = 2**14

    def differences(self, key: jax.Array, rows: int) -> jax.Array:
        x_key, weight_key = jax.random.split(key)
        x = _rounded(jax.random.normal(x_key, (rows, self.hidden), jnp.float32), self.dtype)
        weight = jax.random.normal(weight_key, (self.num_experts, self.hidden), jnp.float32)
        weight = _rounded(weight * self.hidden**-0.5, self.dtype)

        def route(token: jax.Array) -> jax.Array:
            return dense_router(token, weight, top_k=self.top_k, implementation="native").expert_ids

        expert_ids = jax.lax.map(route, x, batch_size=self.tokens)
        keys = x.astype(jnp.float64) @ weight.astype(jnp.float64).T
        return _differences(keys, self.slack * jnp.abs(keys), expert_ids)


@dataclasses.dataclass(frozen=True)
class HardRows:
    """Rows that are hard to select from, and what `topk_select` makes of them."""

    dtype: str

    @property
    def name(self) -> str:
        return f"topk_select, hard rows, {self.dtype}"

    def count(self, rows: int) -> tuple[int, int, int]:
        """As for `RandomRows`, but always the same rows."""
        checked, wrong = hard_rows.count(self.dtype)
        return checked, 0, wrong


# Each addition of a long f32 sum rounds by up to 2^-24, and their errors add up as a random walk does: four standard
# deviations of one with steps of that size.
_SUM_OF_4096 = 4 * 4096**0.5 * 2.0**-24

SCENARIOS = (
    Selection("f32 logits"),
    Selection("f32 logits, bias", bias_mean=0.0),
    Selection("f32 logits, bias, sigmoid", score_fn="sigmoid", top_k=8, bias_mean=0.0),
    Selection("f32 logits, bias, 384 experts", num_experts=384, bias_mean=0.0),
    Selection("bf16 logits, bias", dtype=jnp.bfloat16, bias_mean=0.0),
    Selection("bf16 logits, bias near 8.08", dtype=jnp.bfloat16, bias_mean=8.08),
    # These are one kernel each on an H100.
    Product("bf16 tokens, 64 a call", 64),
    Product("bf16 tokens, 4096 a call", 4096),
    Product("f32 tokens, 64 a call", 64, jnp.float32),
    # XLA's product, which adds up 4096 terms in one f32 sum.
    Product("bf16 tokens, 16384 a call", 16384, slack=_SUM_OF_4096),
    Product("f32 tokens, 16384 a call", 16384, jnp.float32, slack=_SUM_OF_4096),
    *map(HardRows, DTYPES),
)


def _rounded(x: jax.Array, dtype: Any) -> jax.Array:
    """In this dtype; XLA would spare an oracle that casts it to float64 the rounding."""
    return jax.lax.optimization_barrier(x.astype(dtype))


def _differences(keys: jax.Array, slack: jax.Array, expert_ids: jax.Array) -> jax.Array:
    """The number of rows whose ids differ from those of the largest keys: by no more than `slack`, and otherwise."""
    _, wanted = jax.lax.top_k(keys, expert_ids.shape[-1])
    differ = expert_ids != wanted
    distance = jnp.abs(jnp.take_along_axis(keys, expert_ids, -1) - jnp.take_along_axis(keys, wanted, -1))
    ordered = jnp.sort(expert_ids, axis=-1)
    repeated = (ordered[:, 1:] == ordered[:, :-1]).any(axis=-1)
    wrong = (differ & (distance > jnp.take_along_axis(slack, wanted, -1))).any(axis=-1) | repeated
    return jnp.stack([(differ.any(axis=-1) & ~wrong).sum(), wrong.sum()])


def table(found: list[Count], device: str) -> Table:
    result = Table(title=f"rows whose ids differ from an oracle's, on {device}", title_justify="left")
    result.add_column("rows of", no_wrap=True)
    for heading in ("rows", "closer than f32 rounding", "wrong"):
        result.add_column(heading, justify="right")
    for count in found:
        result.add_row(count.id, f"{count.rows:,}", f"{count.by_rounding:,}", f"{count.wrong:,}")
    return result
