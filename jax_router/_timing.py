"""How a figure is taken, by `python -m jax_router bench` and by the benchmarks.

On a GPU it is kernel time by CUPTI, as JAX's profiler records it: of a call, the time in which any of its kernels
runs, so that gaps between kernels do not count and kernels that overlap count once. It is taken over 24 calls after
warm-up. On a CPU it is the wall-clock time of a call, the contenders taking turns. Inputs are random, and where those
of one call are larger than 1 MB the calls go through copies that together exceed every cache, so that each finds its
inputs in memory.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import platform
import random
import re
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

MIN_CALLS = 24
HOT_BYTES = 2**20  # inputs of a call up to here stay in the cache
COPIES_BYTES = 128 * 2**20  # twice the largest L2 cache


def device_name() -> str:
    """What is timed: JAX's first device."""
    kind = jax.devices()[0].device_kind
    if kind != "cpu":
        return kind
    try:
        models = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        models = []
    return f"{models[0] if models else platform.machine()} ({len(os.sched_getaffinity(0))} cores)"


# Inputs


@dataclass(frozen=True)
class Spec:
    """A random input: normal numbers times `scale`, or integers in `[0, bound)`."""

    shape: tuple[int, ...]
    dtype: Any = jnp.float32
    scale: float = 1.0
    bound: int = 0

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * jnp.dtype(self.dtype).itemsize

    @property
    def struct(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(self.shape, self.dtype)


def copies_of(nbytes: int) -> int:
    """How many inputs of so many bytes the calls go through."""
    return 1 if nbytes <= HOT_BYTES else max(2, -(-COPIES_BYTES // nbytes))


class Pool:
    """Random numbers on the device, from which the inputs of all cases are cut."""

    def __init__(self, size: int):
        self.numbers = jax.jit(lambda: jax.random.normal(jax.random.key(0), (size,)))()
        self._offsets = random.Random(0)

    def draw(self, spec: Spec) -> jax.Array:
        return _cut(self.numbers, self._offsets.randrange(self.numbers.size - spec.size + 1), spec)

    def copies(self, inputs: Sequence[Spec]) -> list[tuple[jax.Array, ...]]:
        """The inputs of successive calls."""
        return [tuple(map(self.draw, inputs)) for _ in range(copies_of(sum(spec.nbytes for spec in inputs)))]


@functools.partial(jax.jit, static_argnames="spec")
def _cut(numbers: jax.Array, offset: int, spec: Spec) -> jax.Array:
    flat = jax.lax.dynamic_slice(numbers, (offset,), (spec.size,))
    if spec.bound:
        bits = jax.lax.bitcast_convert_type(flat, jnp.uint32) * jnp.uint32(2654435761)
        return (bits >> 8).astype(jnp.int32).reshape(spec.shape) % spec.bound
    return (flat * spec.scale).reshape(spec.shape).astype(spec.dtype)


def random_rows(seed: int, spec: Spec) -> jax.Array:
    """Normal numbers, made row by row: the experts of a large model fill half a GPU, and leave no room for a copy."""

    def row(key: jax.Array) -> jax.Array:
        return jax.random.normal(key, spec.shape[1:], spec.dtype) * jnp.asarray(spec.scale, spec.dtype)

    return jax.jit(lambda: jax.lax.map(row, jax.random.split(jax.random.key(seed), spec.shape[0])))()


# Times


class Timing(NamedTuple):
    """Microseconds a call: median, least and most; and the number of kernels of a call, if they were counted."""

    us: float
    least: float
    most: float
    kernels: int = 0

    @classmethod
    def of(cls, times_us: Sequence[float], kernels: int = 0) -> Timing:
        return cls(statistics.median(times_us), min(times_us), max(times_us), kernels)


class Kernel(NamedTuple):
    """A kernel's run, in nanoseconds, and the HLO instruction that launched it (none is known inside a CUDA graph)."""

    start: float
    end: float
    name: str
    instruction: str = ""


def kernel_timing(
    run: Callable[..., Any], copies: Sequence[tuple[Any, ...]], synchronize: Callable[[], None] = lambda: None
) -> Timing:
    """The kernel time of a call."""
    calls = kernels_of_calls(run, copies, synchronize)
    return Timing.of([busy_us(kernels) for kernels in calls], len(calls[0]))


def kernels_of_calls(
    run: Callable[..., Any],
    copies: Sequence[tuple[Any, ...]],
    synchronize: Callable[[], None] = lambda: None,
    calls: int = MIN_CALLS,
) -> list[list[Kernel]]:
    """The kernels of each call, in the order of their starts.

    The warm-up goes through all copies too, so that no input stays cached.
    """

    def make_calls() -> None:
        for inputs in itertools.islice(itertools.cycle(copies), calls):
            jax.block_until_ready(run(*inputs))
        synchronize()

    for inputs in copies:
        jax.block_until_ready(run(*inputs))
    kernels = traced_kernels(make_calls)
    if not kernels or len(kernels) % calls:
        raise RuntimeError(f"{calls} calls left {len(kernels)} kernels in the trace: no figure")
    each = len(kernels) // calls
    return [kernels[first : first + each] for first in range(0, len(kernels), each)]


def traced_kernels(work: Callable[[], None]) -> list[Kernel]:
    """The kernels that ran until `work` returned, in the order of their starts."""
    with tempfile.TemporaryDirectory() as folder:
        options = jax.profiler.ProfileOptions()
        options.host_tracer_level = options.python_tracer_level = 0
        with jax.profiler.trace(folder, profiler_options=options):
            work()
        return sorted(_kernels(Path(folder)))


def _kernels(folder: Path) -> list[Kernel]:
    """Every kernel in a trace."""
    (trace,) = folder.rglob("*.xplane.pb")
    profile = jax.profiler.ProfileData.from_file(str(trace))  # which must outlive its planes
    found = []
    # Its types have no module, of which Python warns when they are made: as an error, that would end the process.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        for plane in profile.planes:
            for line in plane.lines if plane.name.startswith("/device:GPU") else ():
                for event in line.events if line.name.startswith("Stream") else ():
                    if not event.name.startswith(("Memcpy", "Memset")):
                        instruction = next((str(value) for name, value in event.stats if name == "hlo_op"), "")
                        end = event.start_ns + event.duration_ns
                        found.append(Kernel(event.start_ns, end, event.name, instruction))
    return found


def busy_us(kernels: Sequence[Kernel]) -> float:
    """The time in which any of the kernels ran; they come in the order of their starts."""
    busy, end = 0.0, 0.0
    for kernel in kernels:
        busy += max(0.0, kernel.end - max(kernel.start, end))
        end = max(end, kernel.end)
    return busy / 1e3


def wall_timings(
    runs: Mapping[str, Callable[..., Any]],
    copies: Mapping[str, Sequence[tuple[Any, ...]]],
    *,
    seconds: float = 3.0,
    turns: int = 6,
) -> dict[str, Timing]:
    """The wall-clock time of a call for each of several computations, which take turns.

    About `seconds` in all, but at least so many turns, of which the first two do not count.
    """
    times_us: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + seconds
    for turn in range(MIN_CALLS + 1):
        if turn >= turns and time.perf_counter() > end:
            break
        for place, (name, run) in enumerate(runs.items()):
            # Always far from the others' copies: who comes second to one would find it in the cache.
            first = place * len(copies[name]) // len(runs)
            inputs = copies[name][(first + turn) % len(copies[name])]
            start = time.perf_counter()
            jax.block_until_ready(run(*inputs))
            times_us[name].append(1e6 * (time.perf_counter() - start))
    return {name: Timing.of(times[2:]) for name, times in times_us.items()}


def timings(
    runs: Mapping[str, Callable[..., Any]], copies: Mapping[str, Sequence[tuple[Any, ...]]], *, turns: int = 6
) -> dict[str, Timing]:
    """The time of a call for each of several computations of JAX, as the default device is timed."""
    if jax.default_backend() == "gpu":
        return {name: kernel_timing(run, copies[name]) for name, run in runs.items()}
    return wall_timings(runs, copies, turns=turns)


# Floors


class Peaks(NamedTuple):
    """What a device can do: bytes and floating-point operations a microsecond."""

    bytes_us: float
    flops_us: float

    def floor_us(self, nbytes: float, flops: float = 0.0) -> float:
        """The time of so many bytes at the speed of a copy or of the arithmetic, whichever is longer."""
        return max(nbytes / self.bytes_us, flops / self.flops_us)


def measured_peaks(pool: Pool) -> Peaks:
    """By a copy of the whole pool and, on a GPU, a large product. Of a CPU's arithmetic nothing is assumed."""
    if jax.default_backend() != "gpu":
        return Peaks(2 * pool.numbers.nbytes / _copy_us(pool.numbers), math.inf)
    size = 8192
    matrix = Spec((size, size), jnp.bfloat16)
    copy = kernel_timing(jax.jit(lambda x: x * 2.0), [(pool.numbers,)])
    product = kernel_timing(jax.jit(jnp.matmul), [(pool.draw(matrix), pool.draw(matrix))])
    return Peaks(2 * pool.numbers.nbytes / copy.us, 2 * size**3 / product.us)


def _copy_us(numbers: jax.Array) -> float:
    """The wall-clock time of a copy to memory that is there: new pages take a CPU longer than the copy."""
    double = jax.jit(lambda x: x * 2.0, donate_argnums=0)
    times_us, numbers = [], double(numbers + 0.0)
    for _ in range(7):
        start = time.perf_counter()
        numbers = jax.block_until_ready(double(numbers))
        times_us.append(1e6 * (time.perf_counter() - start))
    return statistics.median(times_us[1:])
