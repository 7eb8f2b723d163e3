"""Runs cases: compiles them all at once, then times one after the other."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from jax_router._timing import Pool, Spec, Timing, kernel_timing, measured_peaks, wall_timings

from . import draws
from .cases import CPU_SPEEDUPS, NATIVE, TARGETS, TORCH, XLA, Case
from .in_jit import InJit, timeline_us, wall_us
from .results import Record
from .timing import compiled

_Item = TypeVar("_Item")
GPU_POOL, _CPU_POOL = 2**27, 2**24
_DRAWS = "draws"  # among a case's programs, what makes them
_IN_JIT = "in jit"  # and the programs that are timed there


def select(items: Sequence[_Item], globs: Sequence[str] | None, id_of: Callable[[_Item], str]) -> list[_Item]:
    """The items whose id matches one of the patterns; all without patterns."""
    selected = [item for item in items if globs is None or any(fnmatchcase(id_of(item), glob) for glob in globs)]
    if not selected:
        raise SystemExit(f"nothing matches {' '.join(globs or ())}; --list shows the ids")
    return selected


class Benchmark:
    """Times cases on the default device.

    Attributes:
        failures: what went wrong, by case.
    """

    def __init__(
        self,
        console: Console,
        *,
        on_gpu: bool,
        quick: bool = False,
        with_rivals: bool = True,
        is_sweep: bool = False,
    ):
        self._console, self._on_gpu = console, on_gpu
        self._quick, self._with_rivals, self._is_sweep = quick, with_rivals, is_sweep
        self._pool = Pool(GPU_POOL if on_gpu else _CPU_POOL)
        self._xla: dict[str, Timing] = {}
        self._makers: dict[Spec, Future[Any]] = {}  # of draws
        self.failures: dict[str, str] = {}
        self._peaks = measured_peaks(self._pool) if on_gpu else None

    def records(self, cases: Sequence[Case], device: str, commit: str) -> Iterator[Record]:
        """The record of each case that could be timed, as soon as it is: op by op, those with a target first."""
        batches: dict[tuple[bool, str], list[Case]] = {}
        for case in cases:
            batches.setdefault((case.id not in TARGETS, case.op), []).append(case)
        with ThreadPoolExecutor(max(2, (os.cpu_count() or 2) // 2)) as threads, self._progress() as progress:
            task = progress.add_task("", total=len(cases))
            for _, batch in sorted(batches.items(), key=lambda item: item[0][0]):
                progress.update(task, description=f"compiling {batch[0].op}")
                programs = [self._compile(threads, case) for case in batch]
                wait(future for futures in programs for future in futures.values())
                for case, futures in zip(batch, programs):
                    progress.update(task, description=case.id)
                    record = Record(case.id, device=device, commit=commit)
                    with self._noting_failure(case.id):
                        self._time(case, futures, record)
                    if record.us is not None:
                        yield record
                    progress.advance(task)

    def _progress(self) -> Progress:
        columns = (TextColumn("{task.description:45}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        return Progress(*columns, console=self._console, disable=not self._console.is_terminal)

    def _compile(self, threads: ThreadPoolExecutor, case: Case) -> dict[str, Future[Any]]:
        """The case's programs. What costs time and has no target is left out, unless it is to be drawn."""
        futures: dict[str, Future[Any]] = {}
        is_thorough = self._on_gpu and not self._quick
        has_others = self._with_rivals and is_thorough and (self._is_sweep or case.id in TARGETS)
        is_in_jit = is_thorough and not self._is_sweep and case.id in TARGETS
        for name, contender in case.contenders.items():
            if name == NATIVE:
                wanted = True
            elif name == XLA:
                wanted = self._with_rivals and (case.xla_id or case.id) not in self._xla
            else:
                wanted = has_others and (name != TORCH or bool(importlib.util.find_spec("torch")))
            if wanted and name == TORCH:
                futures[name] = threads.submit(lambda run=contender.run: run)
            elif wanted:
                futures[name] = threads.submit(compiled, contender, case.inputs)
        if self._on_gpu and case.depends_on_data:
            (spec,) = case.inputs
            futures[_DRAWS] = self._makers.get(spec) or threads.submit(draws.compiled, spec)
            self._makers[spec] = futures[_DRAWS]
        if is_in_jit:
            names = (NATIVE, XLA) if self._with_rivals and case.is_decode else (NATIVE,)
            futures[_IN_JIT] = threads.submit(InJit, case, names)
        return futures

    @contextmanager
    def _noting_failure(self, what: str) -> Iterator[None]:
        """What fails must not cost other figures."""
        try:
            yield
        except Exception as error:
            self.failures[what] = f"{type(error).__name__}: {error}"

    def _time(self, case: Case, programs: Mapping[str, Future[Any]], record: Record) -> None:
        inputs_of_calls = self._pool.copies(case.inputs)
        copies: dict[str, Any] = {}
        prepared: dict[Any, Any] = {}
        for name, contender in case.contenders.items():
            if contender.prepare not in prepared:
                prepare = jax.jit(contender.prepare)
                prepared[contender.prepare] = [prepare(*inputs) for inputs in inputs_of_calls]
            copies[name] = prepared[contender.prepare]
        del inputs_of_calls
        timings = self._timings(case, programs, copies)
        drawn = self._draw_timings(case, programs)
        xla_key = case.xla_id or case.id
        if XLA in timings:
            self._xla[xla_key] = timings[XLA]
        if self._peaks:
            record.floor_us = _rounded(self._peaks.floor_us(case.nbytes, case.flops))
        native, xla = drawn.worst if drawn else timings.pop(NATIVE), self._xla.get(xla_key)
        record.us, record.us_range = _figure(native)
        record.kernels = native.kernels or None
        if drawn:
            record.median_us, record.worst_draw = _rounded(drawn.median), drawn.worst_draw
            record.draws = len(drawn.us)
        if xla:
            record.xla_us, record.xla_us_range = _figure(xla)
        record.others_us = {name: _rounded(us) for name, (us, *_) in timings.items() if name != XLA}
        record.target_us = self._target_us(case, xla) if not self._is_sweep else None
        if _IN_JIT in programs:
            with self._noting_failure(f"{case.id} in jit"):
                self._time_in_jit(programs[_IN_JIT].result(), copies, record)

    def _time_in_jit(self, in_jit: InJit, copies: Mapping[str, Any], record: Record) -> None:
        wall = in_jit.timings(self._pool, copies, wall_us)
        record.in_jit_wall_us = _rounded(wall[NATIVE].us)
        record.xla_in_jit_wall_us = _rounded(wall[XLA].us) if XLA in wall else None
        timeline = in_jit.timings(self._pool, copies, timeline_us)
        record.in_jit_us, record.in_jit_us_range = _figure(timeline[NATIVE])
        if XLA in timeline:
            record.xla_in_jit_us, record.xla_in_jit_us_range = _figure(timeline[XLA])

    def _timings(self, case: Case, programs: Mapping[str, Future[Any]], copies: Mapping[str, Any]) -> dict[str, Timing]:
        runs = {name: programs[name].result() for name in case.contenders if name in programs}
        if _DRAWS in programs:
            del runs[NATIVE]
        if not self._on_gpu:
            return wall_timings(runs, copies)
        timings = {}
        for name, run in runs.items():
            if name == TORCH:
                timings[name] = _torch_timing(run, copies[name])
            else:
                timings[name] = kernel_timing(run, copies[name])
        return timings

    def _draw_timings(self, case: Case, programs: Mapping[str, Future[Any]]) -> draws.DrawTimings | None:
        """This project's, of a case whose time depends on the data; rivals have the inputs of the other cases."""
        if _DRAWS not in programs:
            return None
        return draws.kernel_timings(programs[NATIVE].result(), programs[_DRAWS].result(), case.inputs[0].nbytes)

    def _target_us(self, case: Case, xla: Timing | None) -> float | None:
        if self._on_gpu:
            is_its_device = "H100" in jax.devices()[0].device_kind  # the targets are for one
            return TARGETS[case.id]["target_us"] if is_its_device and case.id in TARGETS else None
        speedup = CPU_SPEEDUPS.get(case.op)
        return _rounded(xla.us / speedup) if xla and speedup else None


def _torch_timing(run: Callable[..., Any], copies: Sequence[tuple[Any, ...]]) -> Timing:
    import torch

    tensors = [tuple(map(torch.from_dlpack, inputs)) for inputs in copies]
    return kernel_timing(run, tensors, torch.cuda.synchronize)


def _figure(timing: Timing) -> tuple[float, tuple[float, float]]:
    return _rounded(timing.us), (_rounded(timing.least), _rounded(timing.most))


def _rounded(us: float) -> float:
    return round(us, 2)
