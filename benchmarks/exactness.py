"""Selection against an oracle, over many rows: how many ids differ, and whether rounding explains them.

The router's oracle computes scores and keys in float64 and sorts them. A kernel computes them in f32, so that two keys
which are closer than f32 can tell may trade places; any other difference is a wrong choice. Nothing is rounded in
topk_select: there, any difference is one (`hard_rows.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from rich.progress import track
from rich.table import Table

from jax_router import activation_topk

from . import hard_rows

_BATCH = 2**18
# Keys that differ by less count as equal, in units of 2^-24 times what was added up: the score is within 4 units in the
# last place, and the sum is rounded once.
_SLACK_ULPS = 10.0


@dataclasses.dataclass(frozen=True)
class Scenario:
    """Random rows of logits, and how they are routed."""

    name: str
    num_experts: int = 256
    top_k: int = 6
    score_fn: str = "sqrtsoftplus"
    dtype: Any = jnp.float32
    bias_mean: float | None = None  # None: no bias

    def inputs(self, key: jax.Array, rows: int) -> tuple[jax.Array, jax.Array | None]:
        logits_key, bias_key = jax.random.split(key)
        logits = (2 * jax.random.normal(logits_key, (rows, self.num_experts), jnp.float32)).astype(self.dtype)
        logits = jax.lax.optimization_barrier(logits)  # XLA would spare the oracle the rounding to bf16
        if self.bias_mean is None:
            return logits, None
        return logits, self.bias_mean + 0.1 * jax.random.normal(bias_key, (self.num_experts,), jnp.float32)


SCENARIOS = (
    Scenario("f32 logits"),
    Scenario("f32 logits, bias", bias_mean=0.0),
    Scenario("f32 logits, bias, sigmoid", score_fn="sigmoid", top_k=8, bias_mean=0.0),
    Scenario("f32 logits, bias, 384 experts", num_experts=384, bias_mean=0.0),
    Scenario("bf16 logits, bias", dtype=jnp.bfloat16, bias_mean=0.0),
    Scenario("bf16 logits, bias near 8.08", dtype=jnp.bfloat16, bias_mean=8.08),
)


@dataclasses.dataclass
class Count:
    """What a scenario found.

    Attributes:
        scenario: its name.
        rows: how many were routed.
        by_rounding: rows whose ids differ from the oracle's, all between keys that f32 cannot tell apart.
        wrong: rows with any other difference.
        device, jax, commit: where, with what, and of which state of this project.
    """

    scenario: str
    rows: int
    by_rounding: int
    wrong: int
    device: str
    jax: str = jax.__version__
    commit: str = ""


def _differences(scenario: Scenario, logits: jax.Array, bias: jax.Array | None, expert_ids: jax.Array) -> jax.Array:
    """The number of rows that differ by rounding alone, and of those that differ otherwise."""
    x = logits.astype(jnp.float64)
    scores = jax.nn.sigmoid(x) if scenario.score_fn == "sigmoid" else jnp.sqrt(jnp.logaddexp(x, 0.0))
    keys, size = (x, jnp.zeros_like(x)) if bias is None else (scores + bias, scores + jnp.abs(bias.astype(x.dtype)))
    _, wanted = jax.lax.top_k(keys, scenario.top_k)
    differ = expert_ids != wanted
    distance = jnp.abs(jnp.take_along_axis(keys, expert_ids, -1) - jnp.take_along_axis(keys, wanted, -1))
    slack = _SLACK_ULPS * 2.0**-24 * jnp.take_along_axis(size, wanted, -1)
    ordered = jnp.sort(expert_ids, axis=-1)
    repeated = (ordered[:, 1:] == ordered[:, :-1]).any(axis=-1)
    wrong = (differ & (distance > slack)).any(axis=-1) | repeated
    return jnp.stack([(differ.any(axis=-1) & ~wrong).sum(), wrong.sum()])


def counts(rows: int, device: str, commit: str) -> Iterator[Count]:
    """Counts every scenario over `rows` rows, in batches, and topk_select over its hard rows."""
    for scenario in SCENARIOS:

        @jax.jit
        def count(key: jax.Array, scenario: Scenario = scenario) -> jax.Array:
            logits, bias = scenario.inputs(key, min(rows, _BATCH))
            routing = activation_topk(
                logits, bias, top_k=scenario.top_k, score_fn=scenario.score_fn, implementation="native"
            )
            return _differences(scenario, logits, bias, routing.expert_ids)

        batches = -(-rows // min(rows, _BATCH))
        total = [0, 0]
        with jax.enable_x64(True):
            for batch in track(range(batches), description=f"{scenario.name:32}"):
                total = [a + int(b) for a, b in zip(total, count(jax.random.key(batch)))]
        yield Count(scenario.name, batches * min(rows, _BATCH), *total, device=device, commit=commit)
    for dtype, checked, wrong in hard_rows.counts():
        yield Count(f"topk_select, hard rows, {dtype}", checked, 0, wrong, device=device, commit=commit)


def table(found: list[Count], device: str) -> Table:
    result = Table(title=f"rows whose ids differ from an oracle's, on {device}", title_justify="left")
    result.add_column("rows of", no_wrap=True)
    for heading in ("rows", "closer than f32 rounding", "wrong"):
        result.add_column(heading, justify="right")
    for count in found:
        result.add_row(count.scenario, f"{count.rows:,}", f"{count.by_rounding:,}", f"{count.wrong:,}")
    return result
