"""Time over sizes: the cases in between those of targets.json, where no cliff may be, and their pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp

from support.models import MODELS

from .cases import NATIVE, XLA, Case, activation_topk_case, dense_router_case, model_with, topk_select_case
from .results import Record

IMAGES = Path(__file__).parent.parent / "docs" / "images"


@dataclasses.dataclass(frozen=True)
class Line:
    """A line in a picture: a case for every x, with XLA's figure or those of all rivals beside it, or of none."""

    label: str
    case_at: Callable[[int], Case]
    rivals: Literal["XLA", "all", "none"] = "XLA"

    def case(self, x: int) -> Case:
        case = self.case_at(x)
        if self.rivals == "all":
            return case
        names = (NATIVE, XLA) if self.rivals == "XLA" else (NATIVE,)
        return dataclasses.replace(case, contenders={name: case.contenders[name] for name in names})


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A panel of a picture.

    Attributes:
        name: `<picture>/<what is varied>`.
        title: what is constant.
        x_label, xs: what is varied, and its values.
        lines: one or several.
    """

    name: str
    title: str
    x_label: str
    xs: tuple[int, ...]
    lines: tuple[Line, ...]


def sweeps(on_gpu: bool) -> list[Sweep]:
    """A CPU gets an eighth of the largest sizes."""
    bf16: dict[str, Any] = {"dtype": jnp.bfloat16}
    most = 2**18 if on_gpu else 2**14
    tokens = 2**14 if on_gpu else 2**11
    rows = 64 if on_gpu else 8
    length = 2**16 if on_gpu else 2**14
    most_scores = 2**26  # of one case
    row_counts = (1, 16, 256) if on_gpu else (1, 16)
    return [
        Sweep(
            "activation_topk/tokens",
            "256 experts, k = 6",
            "tokens",
            _powers(1, most, 4),
            (
                Line("f32", lambda n: activation_topk_case(model_with(256, 6), n)),
                Line("bf16", lambda n: activation_topk_case(model_with(256, 6), n, **bf16), rivals="none"),
            ),
        ),
        Sweep(
            "activation_topk/experts",
            f"{tokens} tokens, k = 6",
            "experts",
            (16, 32, 64, 72, 96, 128, 160, 192, 256, 257, 320, 384, 512, 768, 1024, 1536, 2048),
            (
                Line("f32", lambda e: activation_topk_case(model_with(e, 6), tokens)),
                Line("bf16", lambda e: activation_topk_case(model_with(e, 6), tokens, **bf16), rivals="none"),
            ),
        ),
        Sweep(
            "activation_topk/k",
            f"{tokens} tokens, 256 experts",
            "k",
            (1, 2, 3, 4, 6, 8, 10, 12, 16),
            (
                Line("no bias", lambda k: activation_topk_case(model_with(256, k), tokens)),
                Line("bias", lambda k: activation_topk_case(model_with(256, k), tokens, with_bias=True), rivals="none"),
            ),
        ),
        *(
            Sweep(
                f"topk_select_lengths/B{count}/k{k}",
                f"{count} {'row' if count == 1 else 'rows'}, k = {k}",
                "length of a row",
                _powers(2**8, min(most_scores // count, 2**20) if on_gpu else 2**16, 4),
                (Line(NATIVE, lambda n, count=count, k=k: topk_select_case(count, n, min(k, n)), rivals="all"),),
            )
            for count in row_counts
            for k in (8, 64, 512, 2048)
        ),
        Sweep(
            "topk_select/k",
            f"{rows} rows of {length}",
            "k",
            (1, 6, 16, 64, 256, 512, 1000, 1024, 2048, 4096),
            (
                Line("f32", lambda k: topk_select_case(rows, length, k)),
                Line("bf16", lambda k: topk_select_case(rows, length, k, **bf16), rivals="none"),
            ),
        ),
        Sweep(
            "topk_select/rows",
            "rows of 8192, k = 512",
            "rows",
            _powers(1, 2**12 if on_gpu else 2**8, 4),
            (
                Line("ascending indices", lambda n: topk_select_case(n, 8192, 512)),
                Line("best first", lambda n: topk_select_case(n, 8192, 512, is_sorted=True), rivals="none"),
            ),
        ),
        Sweep(
            "dense_router/tokens",
            "bf16, k = 6",
            "tokens",
            (1, 2, 4, 8, 16, 32, 48, 64, 65, 96, 128, 256, 512, 1024, 4096, 16384) if on_gpu else (1, 8, 64, 512),
            (
                Line("D = 4096, 256 experts", lambda n: dense_router_case(MODELS["deepseek-v4-flash"], n)),
                Line("D = 7168, 384 experts", lambda n: dense_router_case(MODELS["deepseek-v4-pro"], n)),
            ),
        ),
    ]


def cases(selected: Iterable[Sweep]) -> list[Case]:
    """Every case of the sweeps, once."""
    found: dict[str, Case] = {}
    for sweep in selected:
        for line in sweep.lines:
            for x in sweep.xs:
                case = line.case(x)
                if case.id not in found or len(case.contenders) > len(found[case.id].contenders):
                    found[case.id] = case
    return list(found.values())


def draw(selected: Sequence[Sweep], records: Sequence[Record], prefix: str, device: str) -> list[Path]:
    """A picture an op, a panel a sweep. Returns the files."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    by_id = {record.id: record for record in records}
    paths = []
    for op in dict.fromkeys(sweep.name.split("/")[0] for sweep in selected):
        panels = [sweep for sweep in selected if sweep.name.startswith(f"{op}/")]
        columns = min(4 if len(panels) > 6 else 3, len(panels))
        rows = -(-len(panels) // columns)
        size = (5.2 * columns, 4.2 * rows + 0.4)
        figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, sharey=True, layout="constrained")
        for axis, sweep in zip(axes.flat, panels):
            _draw_panel(axis, sweep, by_id)
        for axis in axes.flat[len(panels) :]:
            axis.set_visible(False)
        for axis in axes[:, 0]:
            axis.set_ylabel("time of a call [µs]")
        drawn = any(record.median_us for record in records if record.id.startswith(op.removesuffix("_lengths")))
        solid = "solid: jax_router" + (", the worst draw (thin: the median over the draws)" if drawn else "")
        figure.suptitle(f"{op.removesuffix('_lengths')} on {device}\n{solid}, dashed: XLA, dotted: the floor")
        path = IMAGES / f"{prefix}-{op}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
        pyplot.close(figure)
        paths.append(path)
    return paths


def _draw_panel(axis: Any, sweep: Sweep, by_id: dict[str, Record]) -> None:
    for index, line in enumerate(sweep.lines):
        points = [(x, by_id[line.case(x).id]) for x in sweep.xs if line.case(x).id in by_id]
        figures = {
            "o-": [record.us for _, record in points],
            "-": [record.median_us for _, record in points],
            "x--": [record.xla_us for _, record in points] if line.rivals != "none" else [],
            ":": [record.floor_us for _, record in points],
        }
        for style, values in figures.items():
            known = [(x, us) for (x, _), us in zip(points, values) if us]
            if known:
                label = line.label if style == "o-" else None
                width = 0.7 if style == "-" else None
                axis.plot(*zip(*known), style, color=f"C{index}", label=label, markersize=4, linewidth=width)
        if line.rivals != "all":
            continue
        others = dict.fromkeys(name for _, record in points for name in record.others_us)
        for number, name in enumerate(others, 1):
            known = [(x, record.others_us[name]) for x, record in points if name in record.others_us]
            axis.plot(*zip(*known), ".-.", color=f"C{index + number}", label=name, markersize=4)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda x, _: f"{x:.0f}" if x < 2**10 else f"{x / 2**10:.0f}k" if x < 2**20 else "1M")
    axis.set_yscale("log")
    axis.set_xlabel(sweep.x_label)
    axis.set_title(sweep.title, fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def _powers(first: int, last: int, factor: int) -> tuple[int, ...]:
    """Powers of a factor from `first` to `last`."""
    values = [first]
    while values[-1] * factor <= last:
        values.append(values[-1] * factor)
    return tuple(values)
