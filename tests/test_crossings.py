"""`python -m benchmarks crossings` but for its clock: where a line's thresholds lie, and what is made of the times."""

import sys
from pathlib import Path

import jax
import pytest

from cases import DEVICES
from jax_router import _native

if isinstance(_native.load("cuda"), ImportError):
    pytest.skip("there is no CUDA module here", allow_module_level=True)
pytest.importorskip("rich", reason="the benchmarks need the extra `bench`")

# Behind everything else: jax_router is the installed one.
sys.path.append(str(Path(__file__).parents[1]))

from benchmarks import crossings
from benchmarks.crossing_lines import UNFUSED, Line, lines, program
from benchmarks.timing import Pool, Timing

H100 = DEVICES["H100"]
CUDA = _native.native_module("cuda")
LINES = {line.id: line for line in lines()}
ROWS = LINES["activation_topk/rows/f32/E256/k6"]
FEW, MORE, MANY = (
    "f32 logits tile 32x2, 32 threads",
    "f32 logits tile 32x2, 128 threads",
    "f32 logits tile 16x4, 128 threads",
)

# On a timed line, the thresholds of each number of the tables in csrc/cuda/plan. Not here is what no choice depends on:
# TopkSelectNumbers' candidates and lone_candidates, which are room that a kernel has, and the first of
# DenseRouterNumbers' clusters, of a kernel that pays nowhere.
NUMBERS = {
    "ActivationTopkNumbers.many_rows": ("activation_topk/rows/f32/E256/k6", [4096]),
    "ActivationTopkNumbers.few_rows": ("activation_topk/rows/f32/E256/k6", [1025]),
    "TopkSelectNumbers.many_tile_rows": ("topk_select/rows/f32/L256/k6/sorted", [4096]),
    "TopkSelectNumbers.few_tile_rows": ("topk_select/rows/f32/L256/k6/sorted", [1025]),
    "TopkSelectNumbers.many_warp_rows": ("topk_select/rows/f32/L512/k64", [1024]),
    "TopkSelectNumbers.warp_length": ("topk_select/length/f32/N256/k64", [257]),
    "TopkSelectNumbers.ordered_k": ("topk_select/k/bf16/N1024/L4096/sorted", [512]),
    "TopkSelectNumbers.long_block_k": ("topk_select/k/f32/N1024/L8192", [1365]),
    "TopkSelectNumbers.narrow_length": ("topk_select/length/f32/N256/k64", [32769]),
    "TopkSelectNumbers.part_length": ("topk_select/length/f32/N1/k512", [16385, 32769, 65537]),
    "TopkSelectNumbers.parts_of_k": ("topk_select/k/f32/N1/L65536", [2731]),
    "DenseRouterNumbers.lone_token_experts": ("dense_router/experts/bf16/D4096/N1/k8", [257]),
    "DenseRouterNumbers.few_tokens": ("dense_router/rows/bf16/D4096/E1024/k8", [17]),
    "DenseRouterNumbers.few_experts": ("dense_router/experts/bf16/D4096/N32/k8", [513]),
    "DenseRouterNumbers.tile_tokens": ("dense_router/rows/f32/D4096/E256/k8", [65]),
    "DenseRouterNumbers.least_experts": ("dense_router/experts/bf16/D4096/N100/k8", [129]),
    "DenseRouterNumbers.most_experts": ("dense_router/experts/bf16/D4096/N100/k8", [385]),
    "DenseRouterNumbers.clusters": (
        "dense_router/rows/bf16/D4096/E256/k8",
        [361, 601, 841, 1081, 1681, 2161, 3361, 4321, 7393, 8449],
    ),
    "DenseRouterNumbers.filled_eighths": ("dense_router/experts/bf16/D4096/N1024/k8", [113, 225]),
    "DenseRouterNumbers.filled_tenths": ("dense_router/rows/bf16/D4096/E256/k8", [6653, 7604]),
    "kClusterRounds": ("expert_dispatch/tokens/E256/k8", [4097]),
    "kOneWaveCut": ("expert_dispatch/tokens/E256/k8", [49153]),
    "kExpertsForMostThreads": ("expert_dispatch/experts/N256/k8", [1025]),
}


@pytest.mark.parametrize("number", NUMBERS)
def test_every_number_is_a_threshold_of_a_timed_line(number):
    line_id, expected = NUMBERS[number]
    assert LINES[line_id].is_timed
    found = [crossing.threshold for crossing in crossings.thresholds(LINES[line_id], H100)]
    assert set(expected) <= set(found)


def test_line_ids_are_unique():
    assert len(LINES) == len(lines())


@pytest.mark.parametrize("op", sorted({line.op for line in lines()}))
def test_every_kernel_that_an_h100_takes_is_taken_on_a_line(op):
    taken = set()
    for line in (line for line in lines() if line.op == op):
        for crossing in crossings.thresholds(line, H100):
            taken |= {crossing.below, crossing.above}
        taken.add(crossings.taken(line, line.first, H100))
        # What pays nowhere on the line is chosen all the same.
        steps = range(line.first, line.last + 1, max(1, (line.last - line.first) // 2000))
        taken |= {CUDA.plans(op, H100, **line.sizes(value))[0] for value in steps if op == "dense_router"}
    kernels = {plan.split(",")[0] for plan in taken - {UNFUSED, None}}
    # 128 threads are for devices with less shared memory.
    never_taken = {f"{kernel} of 128 threads" for kernel in ("cluster", "one wave", "longer")}
    assert set(CUDA.instances(op, H100)) - kernels == (never_taken if op == "expert_dispatch" else set())


@pytest.mark.parametrize("device_name", DEVICES)
def test_lines_can_be_walked_on_any_device(device_name):
    device = DEVICES[device_name]
    for line in lines():
        work = crossings.work_of(line, device)
        assert [crossing.threshold for crossing in work.found] == sorted(
            {crossing.threshold for crossing in work.found}
        )
        for crossing, values in zip(work.found, work.values):
            assert crossing.below == crossings.taken(line, crossing.threshold - 1, device)
            assert crossing.above == crossings.taken(line, crossing.threshold, device)
            assert crossing.below != crossing.above
            assert values == sorted(set(values))
            for value in values:
                assert {crossing.below, crossing.above} <= crossings.possible(line, value, device)


def test_a_walk_misses_nothing():
    """Against the plan at every size: thresholds that follow each other, and many of them."""
    for line_id in ("topk_select/rows/f32/L512/k64", "dense_router/rows/bf16/D4096/E256/k8"):
        line = LINES[line_id]
        taken = [crossings.taken(line, value, H100) for value in range(line.first, line.last + 1)]
        want = [line.first + index for index in range(1, len(taken)) if taken[index] != taken[index - 1]]
        assert [crossing.threshold for crossing in crossings.thresholds(line, H100)] == want


def test_sizes_around_a_threshold():
    work = crossings.work_of(ROWS, H100)
    assert [(found.threshold, found.below, found.above) for found in work.found] == [
        (1025, FEW, MORE),
        (4096, MORE, MANY),
    ]
    assert work.values == [[512, 769, 1025, 1281, 2050], [2048, 3072, 4096, 5120, 8192]]
    assert crossings.work_of(ROWS, H100, quick=True).values == [[769, 1025, 1281], [3072, 4096, 5120]]


def test_where_the_plan_below_ends_sizes_end_too():
    """Half and twice a threshold are left out where other plans are taken, and what one of both cannot do."""
    line = LINES["topk_select/length/f32/N256/k64"]
    work = crossings.work_of(line, H100)
    values = {crossing.threshold: values for crossing, values in zip(work.found, work.values)}
    assert values[2049] == [1537, 2048]
    assert values[32769] == [16384, 24577, 32769, 40961]


def measured(line, us):
    """The line's crossings with a clock that says us(size, plan), and each of the points that it was asked for."""
    asked = []

    def clock(its_line, points):
        assert its_line == line
        asked.extend(points)
        return {(value, plan): us(value, plan) for value, plan in points}

    return crossings.measure(line, crossings.work_of(line, H100), H100, clock), asked


def test_figures():
    """Below 1025 rows a size takes as many microseconds, above 1000; few to many cross at 2500, and not at 4096."""
    slopes = {FEW: lambda rows: float(rows), MORE: lambda rows: 1000.0, MANY: lambda rows: 2500000.0 / rows}
    found, asked = measured(ROWS, lambda value, plan: slopes[plan](value))
    assert len(asked) == len(set(asked)) == 20
    first, second = found
    assert first.times == [(rows, float(rows), 1000.0) for rows in (512, 769, 1025, 1281, 2050)]
    assert first.ratio == pytest.approx(1000 / 1025, abs=1e-4)
    assert first.crossing == pytest.approx(1000, abs=0.1)
    assert (first.cost, first.cost_at) == (0.0, 2050)  # the table is right wherever it was timed
    assert second.ratio == pytest.approx(2.5e6 / 4096 / 1000, abs=1e-4)
    assert second.crossing == pytest.approx(2500, abs=0.1)
    assert (second.cost, second.cost_at) == (pytest.approx(1000 / (2.5e6 / 3072) - 1, abs=1e-4), 3072)


def test_a_plan_that_is_always_faster_crosses_nowhere():
    found, _ = measured(ROWS, lambda value, plan: 2.0 if plan == MORE else 3.0)
    assert [crossing.crossing for crossing in found] == [None, None]
    assert [(crossing.cost, crossing.cost_at) for crossing in found] == [(0.5, 769), (0.5, 8192)]


def test_a_threshold_without_choice_has_no_figures():
    """A kernel's limit: no size has both plans."""
    line = Line("expert_dispatch", "experts", 4000, 4096, {"tokens": 4096, "k": 8})
    crossing = crossings.Crossing(4050, "one", "another")
    work = crossings.Work([crossing], [crossings.values_around(line, [crossing], 0, H100, quick=False)])
    assert work.points == []
    assert crossings.measure(line, work, H100, lambda line, points: {}) == [crossings.Crossing(4050, "one", "another")]


@pytest.mark.parametrize(
    ("times", "crossing"),
    [
        ([(1, 1.0, 2.0), (4, 2.0, 1.0)], 2.0),
        ([(1, 1.0, 2.0), (4, 1.0, 1.0), (16, 2.0, 1.0)], 4.0),
        ([(1, 2.0, 1.0), (4, 1.0, 2.0)], None),  # above is the slower one of large sizes: no threshold helps
        ([(1, 1.0, 2.0), (2, 2.0, 1.0), (4, 1.0, 2.0), (16, 2.0, 1.0)], 8.0),
        ([(1, 1.0, 2.0)], None),
    ],
)
def test_crossing_of(times, crossing):
    assert crossings.crossing_of(times) == crossing


def test_a_line_that_fails_leaves_the_others():
    def clock(line, points):
        if line.op == "topk_select":
            raise RuntimeError("no figure")
        return dict.fromkeys(points, 1.0)

    some = [LINES["topk_select/rows/f32/L512/k64"], ROWS]
    failures = {}
    work = [(line, crossings.work_of(line, H100)) for line in some]
    (record,) = crossings.records(work, H100, clock, failures)
    assert record.id == ROWS.id
    assert failures == {some[0].id: "RuntimeError: no figure"}


def test_the_table_marks_what_costs_more_than_5_percent():
    found, _ = measured(ROWS, lambda value, plan: {FEW: 1.04, MORE: 1.0, MANY: 1.06}[plan])
    columns = crossings.table([crossings.Record(ROWS.id, "rows", found)], "an H100").columns
    cells = {column.header: list(column.cells) for column in columns}
    assert cells["threshold"] == ["1025", "4096"]
    assert cells["above / below"] == ["0.962", "1.060"]
    assert cells["cost"] == ["[default]4.0 %[/]", "[red]6.0 %[/]"]


@pytest.mark.parametrize("op", sorted({line.op for line in lines()}))
def test_the_clock_times_each_plan_where_it_is_forced(op):
    """Few sizes of a short line, with all that runs but the timer: what it is given can be run, on any platform."""
    line = next(line for line in lines() if line.op == op)
    largest = {"rows": 8, "tokens": 8, "experts": 64, "hidden": 64}
    fixed = {name: min(value, largest[name]) if name in largest else value for name, value in line.fixed.items()}
    line = Line(op, line.varied, 1, 8, fixed)
    points = sorted((value, plan) for value in (4, 8) for plan in crossings.possible(line, value, H100))
    timed = []

    def timing(run, copies):
        value = copies[0][0].shape[-1 if line.varied == "k" else 0]  # the first operand is [rows, k] or [rows, ...]
        timed.append((value, CUDA.plans(op, H100, **line.sizes(value))[0]))
        if jax.default_backend() == "cpu":
            jax.block_until_ready(run(*copies[0]))
        return Timing.of([1.5])

    us = crossings.KernelClock(Pool(2**21), timing)(line, points)
    assert us == dict.fromkeys(points, 1.5)
    chosen = {value: CUDA.plans(op, H100, **line.sizes(value))[0] for value in (4, 8)}
    assert timed == [(value, chosen[value] if plan == UNFUSED else plan) for value, plan in points]


@pytest.mark.parametrize("line_id", [line.id for line in lines() if line.is_timed])
def test_programs_have_the_sizes_of_their_line(line_id):
    """Traced, not run: the operands fit the op."""
    line = LINES[line_id]
    plans = {crossings.taken(line, line.first, H100)} | ({UNFUSED} if line.op == "dense_router" else set())
    for plan in plans:
        contender, inputs = program(line.op, line.sizes(line.first), plan)
        prepared = jax.eval_shape(contender.prepare, *(spec.struct for spec in inputs))
        assert jax.tree.leaves(jax.eval_shape(contender.run, *prepared))
