"""The figures of `python -m jax_router bench` as a picture."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from ._bench import OURS, PLAIN, TOP_K, Figures, shown

_COLORS = {OURS: "#2b6cb0", PLAIN: "#b8c4d2", TOP_K: "#d9a441"}


def draw(found: Sequence[Figures], title: str, path: Path) -> None:
    """Bars of the contenders for each part, on a logarithmic axis, and a line where the floor is."""
    figure = Figure(figsize=(8, 0.9 * len(found) + 1.4), layout="constrained")
    axes = figure.subplots()
    for part, figures in enumerate(found):
        names = list(figures.timings)
        places = part + np.linspace(-0.27, 0.27, len(names)) if len(names) > 1 else [float(part)]
        for name, place in zip(names, places):
            us = figures.timings[name].us
            axes.barh(place, us, height=0.8 / len(names), color=_COLORS[name], label=name)
            axes.annotate(f" {shown(us)}", (us, place), va="center", fontsize=8)
        axes.plot([figures.floor_us] * 2, [part - 0.42, part + 0.42], color="black", lw=1.5, ls=":", label="floor")
    axes.set_yticks(range(len(found)), [figures.name for figures in found])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.margins(x=0.15)
    axes.set_xlabel("microseconds a call")
    axes.set_title("\n".join(textwrap.fill(line, 90) for line in title.splitlines()), fontsize=9, loc="left", x=-0.15)
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles))
    axes.legend(unique.values(), unique.keys(), fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
