"""The presets as a person reads them: `python -m jax_router presets`, and the table of docs/models.md."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

from . import models
from .config import RouterConfig
from .models import Preset

_WIDTH = 80


def show_all() -> str:
    """All presets, a line each."""
    head = ("preset", "D", "E", "k", "scores", "groups", "scale", "bias", "hash")
    rows = [_cells(models.preset(name)) for name in models.presets()]
    columns = list(zip(head, *rows))
    widths = [max(map(len, column)) for column in columns]
    numbers = {"D", "E", "k", "scale"}

    def line(cells: Iterable[str]) -> str:
        aligned = (f"{cell:>{w}}" if name in numbers else f"{cell:<{w}}" for name, cell, w in zip(head, cells, widths))
        return "  ".join(aligned).rstrip()

    about = (
        "* read its `unverified` first. groups: how many of how many stay eligible. bias: what steers the selection "
        "(s), or is part of the logits (l). hash: layers whose experts are looked up by token id. "
        "`jax-router presets NAME` says more."
    )
    return "\n".join([line(head), *map(line, rows), "", textwrap.fill(about, _WIDTH)])


def _cells(preset: Preset) -> tuple[str, ...]:
    config = RouterConfig(**preset.options())
    groups = f"{config.top_groups}/{config.num_groups}" if config.num_groups > 1 else ""
    bias = "s" * config.selection_bias + "l" * config.logit_bias
    hashed = preset.layers.hashed
    return (
        preset.name + "*" * bool(preset.unverified),
        str(config.hidden_size),
        str(config.num_experts),
        str(config.top_k),
        config.score_fn,
        groups,
        f"{config.scale:g}",
        bias,
        f"{hashed[0]}-{hashed[-1]}" if hashed else "",
    )


def show(name: str) -> str:
    """One of them, with all that is known of it."""
    preset = models.preset(name)
    options = ", ".join(f"{option}={value!r}" for option, value in (preset.router or {}).items())
    fits = not preset.missing
    parts = [
        ("models", ", ".join(preset.models)),
        ("model_type", ", ".join(preset.model_types) or "not known"),
        ("routes by", models.programs()[preset.program]),
        ("missing", "; ".join(preset.missing)),
        ("in code", f'RouterConfig.from_preset("{name}"), which is' if fits else ""),
        ("", f"RouterConfig({options})" if fits else ""),
        ("hash layer", f'RouterConfig.from_preset("{name}", layer=0)' if preset.layers.hashed else ""),
        ("layers", preset.layers.describe()),
        *((f"{role}", tensor) for role, tensor in preset.tensors.items()),
        ("arithmetic", preset.arithmetic),
        ("left to you", " ".join(preset.caller)),
        ("note", preset.note),
        ("sources", "; ".join(preset.sources)),
        ("unverified", "; ".join(preset.unverified)),
    ]
    return "\n".join([preset.name, *(_paragraph(title, text) for title, text in parts if text)])


def _paragraph(title: str, text: str) -> str:
    indent = 18
    return textwrap.fill(
        text,
        _WIDTH,
        initial_indent=f"  {title:<{indent - 2}}",
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def markdown() -> str:
    """The table of docs/models.md."""
    head = ("preset", "models", "D", "E", "k", "scores", "groups", "scale", "bias", "routers in", "not verified")
    lines = [head, ("---",) * len(head)]
    for name in models.presets():
        preset = models.preset(name)
        cells = _cells(preset)
        layers = preset.layers.describe().partition(", ")[2]
        lines.append((f"`{name}`", ", ".join(preset.models), *cells[1:8], layers, "; ".join(preset.unverified)))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
