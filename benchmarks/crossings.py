"""Where kernels are chosen by size: whether the tables in csrc/cuda/plan are right for the device at hand.

A line (`crossing_lines.py`) is walked on the host, where a plan costs microseconds. Where another plan is taken than at
the size before, bisection finds the threshold: the first size that takes the new one. Then both plans are forced and
timed at a handful of sizes around it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
from rich.table import Table

from jax_router._native import forced_plan, native_module
from jax_router._timing import Pool, Timing, kernel_timing

from .crossing_lines import COMPOSED, UNFUSED, Line, program
from .timing import lowered

# What a device is, for the native module: None is the one at hand.
Device = Mapping[str, int] | None
# Of a line, sizes and plans, to microseconds.
Point = tuple[int, str]
Clock = Callable[[Line, Sequence[Point]], Mapping[Point, float]]

WORTH_A_MARK = 0.05  # of the better plan's time, that the table costs


@dataclasses.dataclass
class Crossing:
    """A threshold, and what was measured around it.

    Attributes:
        threshold: the first size that takes the plan above.
        below, above: the plans.
        times: of sizes, the microseconds of the plan below and of that above; none where a kernel's limit is the
            threshold, so that no size has both.
        ratio: of the times above and below, at the size nearest to the threshold.
        crossing: the size from which the plan above is the faster, interpolated between two of these sizes. None where
            it becomes so between no two of them: it is slower at all sizes, or faster at all, or faster at small ones.
        cost: what the table costs at worst: the time of the plan that is taken, over that of the better, less 1.
        cost_at: the size where.
    """

    threshold: int
    below: str
    above: str
    times: list[tuple[int, float, float]] = dataclasses.field(default_factory=list)
    ratio: float | None = None
    crossing: float | None = None
    cost: float | None = None
    cost_at: int | None = None


@dataclasses.dataclass
class Record:
    """A line's crossings."""

    id: str
    varied: str
    crossings: list[Crossing]
    device: str = ""
    jax: str = jax.__version__
    commit: str = ""


def taken(line: Line, value: int, device: Device) -> str:
    """The plan that is taken at a size of a line."""
    module, sizes = native_module("cuda"), line.sizes(value)
    if line.op in COMPOSED and not module.pays(line.op, device, **sizes):
        return UNFUSED
    plan, _ = module.plans(line.op, device, **sizes)
    assert plan is not None, (line, value)
    return plan


def possible(line: Line, value: int, device: Device) -> set[str]:
    """All that could be taken there."""
    _, plans = native_module("cuda").plans(line.op, device, **line.sizes(value))
    return {*plans, UNFUSED} if line.op in COMPOSED else set(plans)


def thresholds(line: Line, device: Device) -> list[Crossing]:
    """Where the plan that is taken changes."""
    found = []
    last_value = line.first
    last = taken(line, last_value, device)
    for value in _spaced(line):
        while taken(line, value, device) != last:
            low, high = last_value, value
            while high - low > line.step:
                middle = line.rounded((low + high) / 2)
                low, high = (middle, high) if taken(line, middle, device) == last else (low, middle)
            above = taken(line, high, device)
            found.append(Crossing(high, last, above))
            last_value, last = high, above
        last_value = value
    return found


def _spaced(line: Line) -> list[int]:
    """The line's sizes from the first to the last, about 16 from one to its double.

    What is taken between two of them alone, with the same plan on both sides, goes unseen.
    """
    whole = line.last / line.first
    parts = math.ceil(16 * math.log2(whole))
    return sorted({line.rounded(line.first * whole ** (part / parts)) for part in range(parts + 1)})


def values_around(line: Line, found: Sequence[Crossing], index: int, device: Device, *, quick: bool) -> list[int]:
    """The sizes at which the plans of a threshold are timed: those that both can do.

    Half and twice the threshold are left out where yet another plan is taken.
    """
    at = found[index]
    nearest = [0.75 * at.threshold, at.threshold, 1.25 * at.threshold]
    begin = found[index - 1].threshold if index > 0 else line.first
    end = found[index + 1].threshold - 1 if index + 1 < len(found) else line.last
    further = [value for value in (at.threshold / 2, 2 * at.threshold) if begin <= value <= end and not quick]

    def usable(values: Iterable[float]) -> set[int]:
        inside = {line.rounded(value) for value in values if line.first <= line.rounded(value) <= line.last}
        return {value for value in inside if {at.below, at.above} <= possible(line, value, device)}

    values = usable([*nearest, *further])
    return sorted(values if at.threshold in values else values | usable([at.threshold - line.step]))


class Work(NamedTuple):
    """What is to be timed of a line: its thresholds, and the sizes around each."""

    found: list[Crossing]
    values: list[list[int]]

    @property
    def points(self) -> list[Point]:
        points = set()
        for crossing, values in zip(self.found, self.values):
            points.update(itertools.product(values, (crossing.below, crossing.above)))
        return sorted(points)


def work_of(line: Line, device: Device, *, quick: bool = False) -> Work:
    found = thresholds(line, device)
    return Work(found, [values_around(line, found, index, device, quick=quick) for index in range(len(found))])


def measure(line: Line, work: Work, device: Device, clock: Clock) -> list[Crossing]:
    """The line's thresholds with what the clock says of them."""
    us = clock(line, work.points)
    for crossing, values in zip(work.found, work.values):
        crossing.times = [(value, us[value, crossing.below], us[value, crossing.above]) for value in values]
        if not values:
            continue
        _, below_us, above_us = min(crossing.times, key=lambda time: abs(time[0] - crossing.threshold))
        crossing.ratio = round(above_us / below_us, 4)
        crossing.crossing = crossing_of(crossing.times)
        costs = []
        for value, *both_us in crossing.times:
            plan = taken(line, value, device)
            if plan in (crossing.below, crossing.above):
                costs.append((round(both_us[plan == crossing.above] / min(both_us) - 1, 4), value))
        crossing.cost, crossing.cost_at = max(costs, default=(None, None))
    return work.found


def crossing_of(times: Sequence[tuple[int, float, float]]) -> float | None:
    """Where the ratio of the times above and below falls to 1; the last such place."""
    found = None
    logs = [(math.log(value), math.log(above_us / below_us)) for value, below_us, above_us in times]
    for (value, ratio), (next_value, next_ratio) in itertools.pairwise(logs):
        if ratio > 0 >= next_ratio:
            found = round(math.exp(value + (next_value - value) * ratio / (ratio - next_ratio)), 1)
    return found


class KernelClock:
    """Times kernels on this process's GPU, each plan forced."""

    def __init__(self, pool: Pool, timing: Callable[..., Timing] = kernel_timing):
        self._pool, self._timing = pool, timing

    def __call__(self, line: Line, points: Sequence[Point]) -> dict[Point, float]:
        compiled, inputs_of = {}, {}
        with ThreadPoolExecutor(max(2, (os.cpu_count() or 2) // 2)) as threads:
            for value, plan in points:
                contender, inputs = inputs_of[value] = program(line.op, line.sizes(value), plan)
                # What a program is lowered to depends on the plan: whether dense_router is one kernel, for one.
                with _forced(line.op, plan):
                    compiled[value, plan] = threads.submit(lowered(contender, inputs).compile)
        us = {}
        for value, (contender, inputs) in inputs_of.items():
            prepare = jax.jit(contender.prepare)
            copies = [prepare(*drawn) for drawn in self._pool.copies(inputs)]
            for plan in (plan for at, plan in points if at == value):
                with _forced(line.op, plan):
                    us[value, plan] = round(self._timing(compiled[value, plan].result(), copies).us, 3)
        return us


def _forced(op: str, plan: str) -> contextlib.AbstractContextManager[None]:
    return forced_plan(op, "" if plan == UNFUSED else plan)


def records(
    work: Iterable[tuple[Line, Work]], device: Device, clock: Clock, failures: dict[str, str]
) -> Iterator[Record]:
    """The record of each line that could be timed, as soon as it is. What went wrong goes to `failures`, by line."""
    for line, to_do in work:
        try:
            yield Record(line.id, line.varied, measure(line, to_do, device, clock))
        except Exception as error:  # a line that fails must not cost the figures of the others
            failures[line.id] = f"{type(error).__name__}: {error}"


def table(found: Sequence[Record], device: str) -> Table:
    result = Table(title=f"thresholds on {device}", title_justify="left", caption_justify="left")
    for heading in ("line", "below", "above"):
        result.add_column(heading, overflow="fold")
    for heading in ("threshold", "above / below", "crossing", "cost", "at"):
        result.add_column(heading, justify="right", no_wrap=True)
    result.caption = (
        "above / below: their times at the threshold; crossing: from where above is faster; "
        "cost: of the plan that is taken, over the better one, at worst"
    )
    for record in found:
        for crossing in record.crossings:
            result.add_row(record.id, crossing.below, crossing.above, *_figures(crossing))
    return result


def _figures(crossing: Crossing) -> tuple[str, ...]:
    if crossing.ratio is None:
        return f"{crossing.threshold}", "no size has both", "", "", ""
    if crossing.cost is None:
        cost = ""
    else:
        mark = "red" if crossing.cost > WORTH_A_MARK else "default"
        cost = f"[{mark}]{100 * crossing.cost:.1f} %[/]"
    return (
        f"{crossing.threshold}",
        f"{crossing.ratio:.3f}",
        "" if crossing.crossing is None else f"{crossing.crossing:.0f}",
        cost,
        "" if crossing.cost_at is None else f"{crossing.cost_at}",
    )
