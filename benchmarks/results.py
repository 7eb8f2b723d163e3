"""Records of figures: what is in one, their file, and their table."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.table import Table

from support.figures import MOST_OVER_MEDIAN, spread_in_words

RESULTS = Path(__file__).parent / "results"


@dataclasses.dataclass
class Record:
    """One case's figures, in microseconds. A figure that was not taken is None.

    Attributes:
        id: of the case.
        us: this project's, the median; of `topk_select` on a GPU that of the worst draw (`draws.py`).
        us_range: least and most.
        median_us, worst_draw, draws: the median over the draws, the kind and the number of the worst, and how many
            there were.
        xla_us, xla_us_range: XLA's, of the same run.
        in_jit_us, in_jit_us_range: what a call costs inside a jitted program (`in_jit.py`), by the timeline of a GPU.
            Older records, without the range, have wall-clock time there.
        in_jit_wall_us: the same by wall-clock time.
        xla_in_jit_us, xla_in_jit_us_range, xla_in_jit_wall_us: the same for XLA, of decode sizes.
        floor_us: the time of its bytes at the speed of a copy, or of its arithmetic at the speed of a large matrix
            product, whichever is longer, both taken in the same run on a GPU.
        target_us: what was to be reached; on a CPU a part of XLA's time.
        kernels: of one call of this project's, on a GPU.
        others_us: what else a user could call.
        device, jax, commit: where, with what, and of which state of this project.
    """

    id: str
    us: float | None = None
    us_range: tuple[float, float] | None = None
    median_us: float | None = None
    worst_draw: str | None = None
    draws: int | None = None
    xla_us: float | None = None
    xla_us_range: tuple[float, float] | None = None
    in_jit_us: float | None = None
    in_jit_us_range: tuple[float, float] | None = None
    in_jit_wall_us: float | None = None
    xla_in_jit_us: float | None = None
    xla_in_jit_us_range: tuple[float, float] | None = None
    xla_in_jit_wall_us: float | None = None
    floor_us: float | None = None
    target_us: float | None = None
    kernels: int | None = None
    others_us: dict[str, float] = dataclasses.field(default_factory=dict)
    device: str = ""
    jax: str = jax.__version__
    commit: str = ""

    @property
    def worst_over_median(self) -> float | None:
        """How much the data matter."""
        return self.us / self.median_us if self.us and self.median_us else None


def save(records: Iterable[Any], path: Path) -> None:
    """Writes dataclasses with an id to a file, one a line, sorted by it. What the file has under other ids stays."""
    merged: dict[str, Mapping[str, Any]] = {}
    if path.exists():
        merged = {record["id"]: record for record in json.loads(path.read_text())}
    merged |= {record.id: dataclasses.asdict(record) for record in records}
    rows = ",\n".join(json.dumps(merged[key], ensure_ascii=False) for key in sorted(merged, key=natural_order))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"[\n{rows}\n]\n")


def natural_order(case_id: str) -> list[Any]:
    """Numbers in an id count as numbers."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", case_id)]


def slug(name: str) -> str:
    """The name of a device as a file's."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def current_commit() -> str:
    """This checkout's commit, with a mark if it has changes; or what JAX_ROUTER_COMMIT says."""
    if commit := os.environ.get("JAX_ROUTER_COMMIT"):
        return commit
    command = ["git", "-C", str(RESULTS.parent), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def table(records: Sequence[Record], device: str) -> Table:
    """The figures as a person reads them, without columns that say nothing."""
    result = Table(title=f"microseconds a call on {device}", title_justify="left", caption_justify="left")
    columns: dict[str, Callable[[Record], str]] = {
        "us": lambda record: _number(record.us),
        "/ median": _over_median,
        "worst draw": lambda record: record.worst_draw or "",
        "target": lambda record: _number(record.target_us),
        "XLA": lambda record: _number(record.xla_us),
        "XLA / us": lambda record: f"{record.xla_us / record.us:.1f}" if record.us and record.xla_us else "",
        "others": lambda record: ", ".join(f"{name} {_number(us)}" for name, us in record.others_us.items()),
        "floor": lambda record: _number(record.floor_us),
        "in jit": lambda record: _number(record.in_jit_us),
        "by wall clock": lambda record: _number(record.in_jit_wall_us),
        "XLA in jit": lambda record: _number(record.xla_in_jit_us),
        "verdict": _verdict,
    }
    cells = {heading: list(map(cell, records)) for heading, cell in columns.items()}
    cells = {heading: column for heading, column in cells.items() if any(column)}
    result.add_column("case", no_wrap=True)
    for heading in cells:
        result.add_column(heading, justify="left" if heading == "verdict" else "right", no_wrap=True)
    for index, record in enumerate(records):
        result.add_row(record.id, *(column[index] for column in cells.values()))
    return result


def _number(us: float | None) -> str:
    if us is None:
        return ""
    return f"{us:.2f}" if us < 10 else f"{us:.1f}" if us < 100 else f"{us:.0f}"


def _over_median(record: Record) -> str:
    ratio = record.worst_over_median
    if ratio is None:
        return ""
    return f"[red]{ratio:.2f}" if ratio > MOST_OVER_MEDIAN else f"{ratio:.2f}"


def data_matter(records: Sequence[Record]) -> str:
    """Whether the worst draw of every case is near the median over its draws; nothing if none was drawn so."""
    return spread_in_words({record.id: record.worst_over_median for record in records if record.worst_over_median})


def _verdict(record: Record) -> str:
    if record.us is None or record.target_us is None:
        return ""
    if record.us <= record.target_us:
        return "[green]reached"
    return f"[red]{record.us / record.target_us:.2f} x target"
