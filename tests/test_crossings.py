"""`python -m benchmarks crossings` but for its clock: where a line's thresholds lie, and what is made of the times."""

import itertools
import sys
from pathlib import Path

import jax
import pytest

from cases import DEVICES
from jax_router import _native
from jax_router._timing import Pool, Timing

if isinstance(_native.load("cuda"), ImportError):
    pytest.skip("there is no CUDA module here", allow_module_level=True)
pytest.importorskip("rich", reason="the benchmarks need the extra `bench`")

# Behind everything else: jax_router is the installed one.
sys.path.append(str(Path(__file__).parents[1]))

from benchmarks import crossings
from benchmarks.crossing_lines import COMPOSED, UNFUSED, Line, lines, program

H100 = DEVICES["H100"]
CUDA = _native.native_module("cuda")
LINES = {line.id: line for line in lines()}

# For each number of the tables in csrc/cuda/plan, a timed line and the plans that it chooses between there: each is
# followed by the next at some threshold, wherever the number puts that. Not here is what no choice on an H100 depends
# on: of HalfWarpRows, those of 1, which are for all rows, and those for which no tile was compiled; TopkSelectNumbers'
# candidates and lone_candidates, which are room that a kernel has, and small_part, as rows so short are not streamed
# where clusters have room; and the first of DenseRouterNumbers' clusters, of a kernel that pays nowhere. Nor are
# HalfWarpRows of 16-bit logits without a bias, which are those of 32-bit ones.
NUMBERS = {
    "ActivationTopkNumbers.half_warps, logits, 6 quads": (
        "activation_topk/rows/f32/E384/k6",
        ("f32 logits tile 32x3", "f32 logits tile 16x6"),
    ),
    "ActivationTopkNumbers.half_warps, logits, 8 quads": (
        "activation_topk/rows/f32/E512/k6",
        ("f32 logits tile 32x4", "f32 logits tile 16x8"),
    ),
    "ActivationTopkNumbers.half_warps, scores, 4 quads": (
        "activation_topk/rows/f32/bias/E256/k6",
        ("f32 scores tile 32x2", "f32 scores tile 16x4"),
    ),
    "ActivationTopkNumbers.half_warps, scores, 6 quads": (
        "activation_topk/rows/f32/bias/E384/k6",
        ("f32 scores tile 32x3", "f32 scores tile 16x6"),
    ),
    "ActivationTopkNumbers.half_warps, scores, 8 quads": (
        "activation_topk/rows/f32/bias/E512/k6",
        ("f32 scores tile 32x4", "f32 scores tile 16x8"),
    ),
    "ActivationTopkNumbers.half_warps, groups": (
        "activation_topk/rows/f32/bias/groups8/E256/k8",
        ("f32 groups tile 32x2", "f32 groups tile 16x4"),
    ),
    "ActivationTopkNumbers.half_warps, 16-bit scores, 4 quads": (
        "activation_topk/rows/bf16/bias/E256/k6",
        ("bf16 scores tile 32x2", "bf16 scores tile 16x4"),
    ),
    "ActivationTopkNumbers.half_warps, 16-bit scores, 6 quads": (
        "activation_topk/rows/bf16/bias/E384/k6",
        ("bf16 scores tile 32x3", "bf16 scores tile 16x6"),
    ),
    "ActivationTopkNumbers.half_warps, 16-bit scores, 8 quads": (
        "activation_topk/rows/bf16/bias/E512/k6",
        ("bf16 scores tile 32x4", "bf16 scores tile 16x8"),
    ),
    "ActivationTopkNumbers.half_warps, 16-bit groups": (
        "activation_topk/rows/bf16/bias/groups8/E256/k8",
        ("bf16 groups tile 32x2", "bf16 groups tile 16x4"),
    ),
    "ActivationTopkNumbers.block_rows, scores": (
        "activation_topk/rows/f32/bias/E256/k6",
        ("f32 scores block of 256", "f32 scores tile 32x2"),
    ),
    "ActivationTopkNumbers.block_rows, groups": (
        "activation_topk/rows/f32/bias/groups8/E256/k8",
        ("f32 groups block of 256", "f32 groups tile 32x2"),
    ),
    "kLeastBlockExperts": (
        "activation_topk/experts/f32/bias/N64/k6",
        ("f32 scores tile 16x2", "f32 scores block of 256"),
    ),
    "ActivationTopkNumbers.quarter_warps, logits": (
        "activation_topk/rows/bf16/E256/k6",
        ("bf16 logits tile 16x4", "bf16 logits tile 8x8"),
    ),
    "ActivationTopkNumbers.quarter_warps, scores": (
        "activation_topk/rows/bf16/bias/E256/k6",
        ("bf16 scores tile 16x4", "bf16 scores tile 8x8"),
    ),
    "ActivationTopkNumbers.quarter_warps, groups": (
        "activation_topk/rows/bf16/bias/groups8/E256/k8",
        ("bf16 groups tile 16x4", "bf16 groups tile 8x8"),
    ),
    "ActivationTopkNumbers.long_quarter_warps": (
        "activation_topk/rows/f32/bias/groups8/E256/k8",
        ("f32 groups tile 16x4", "f32 groups tile 8x8"),
    ),
    "TopkSelectNumbers.half_warps": ("topk_select/rows/f32/L512/k6/sorted", ("f32 tile 32x4", "f32 tile 16x8")),
    "TopkSelectNumbers.warp_rows": ("topk_select/rows/f32/L512/k100", ("f32 many 256x1", "f32 warp 32x4")),
    "TopkSelectNumbers.many_warp_rows": ("topk_select/rows/f32/L1024/k100", ("f32 many 256x1", "f32 warp 32x8")),
    "TopkSelectNumbers.ordered_warp_rows": (
        "topk_select/rows/f32/L512/k100/sorted",
        ("f32 many 256x1", "f32 warp 32x4"),
    ),
    "TopkSelectNumbers.warp_length": ("topk_select/length/f32/N256/k64", ("f32 warp 32x2", "f32 many 256x1")),
    "TopkSelectNumbers.sorting_length": ("topk_select/length/f32/N4096/k64", ("f32 warp 32x2", "f32 sorting 32x4")),
    "TopkSelectNumbers.sorting_rows": ("topk_select/rows/f32/L1024/k24/sorted", ("f32 few 256x1", "f32 sorting 32x8")),
    "TopkSelectNumbers.sorting_longest": ("topk_select/rows/f32/L4096/k64", ("f32 few 256x4", "f32 sorting 32x32")),
    "TopkSelectNumbers.sorting_rows_of_16_bits": (
        "topk_select/rows/bf16/L4096/k64",
        ("bf16 few 256x2", "bf16 sorting 32x16"),
    ),
    "TopkSelectNumbers.sorting_longest_of_16_bits": (
        "topk_select/rows/bf16/L8192/k64",
        ("bf16 few 256x4", "bf16 sorting 32x32"),
    ),
    "TopkSelectNumbers.short_few_k": ("topk_select/k/f32/N500/L1024/sorted", ("f32 few 256x1", "f32 many 256x1")),
    "TopkSelectNumbers.ordered_k": (
        "topk_select/k/bf16/N1024/L4096/sorted",
        ("bf16 many 256x2", "bf16 many 512x1"),
    ),
    "TopkSelectNumbers.crowded_k": ("topk_select/k/f32/N100/L8192/sorted", ("f32 many 512x4", "f32 many 1024x2")),
    "TopkSelectNumbers.long_block_k": (
        "topk_select/k/f32/N1024/L8192",
        ("f32 streamed 128, 1 blocks a row", "f32 many 512x4"),
    ),
    "TopkSelectNumbers.long_ordered_k": (
        "topk_select/k/bf16/N400/L8192/sorted",
        ("bf16 streamed 256, 1 blocks a row", "bf16 many 512x2"),
    ),
    "TopkSelectNumbers.narrow_length": (
        "topk_select/length/f32/N256/k64",
        ("f32 streamed 256, 1 blocks a row", "f32 streamed 512, 1 blocks a row"),
    ),
    "room for more blocks of 256 threads": (
        "topk_select/k/f32/N1024/L16384",
        (
            "f32 streamed 256, 1 blocks a row",
            "f32 streamed 512, 1 blocks a row",
            "f32 streamed 256, 1 blocks a row",
        ),
    ),
    "room for all blocks of 256 threads": (
        "topk_select/rows/f32/L16384/k2400",
        ("f32 streamed 256, 1 blocks a row", "f32 streamed 512, 1 blocks a row"),
    ),
    "TopkSelectNumbers.narrow_length of few rows": (
        "topk_select/length/f32/N64/k64",
        ("f32 streamed 256, 2 blocks a row", "f32 streamed 512, 2 blocks a row"),
    ),
    "TopkSelectNumbers.narrow_few_k": (
        "topk_select/k/f32/N1/L16384",
        ("f32 streamed 256, 4 blocks a row", "f32 streamed 512, 4 blocks a row"),
    ),
    "TopkSelectNumbers.narrowest_rows": (
        "topk_select/rows/bf16/L16384/k64",
        ("bf16 streamed 256, 1 blocks a row", "bf16 streamed 128, 1 blocks a row"),
    ),
    "TopkSelectNumbers.narrowest_k": (
        "topk_select/k/bf16/N1024/L16384",
        ("bf16 streamed 128, 1 blocks a row", "bf16 streamed 256, 1 blocks a row"),
    ),
    "TopkSelectNumbers.narrowest_bytes": (
        "topk_select/length/f32/N1024/k512/sorted",
        ("f32 streamed 128, 1 blocks a row", "f32 streamed 256, 1 blocks a row"),
    ),
    "TopkSelectNumbers.small_cluster and part_length": (
        "topk_select/length/f32/N1/k512",
        (
            "f32 streamed 512, 4 blocks a row",
            "f32 streamed 512, 8 blocks a row",
            "f32 streamed 512, 16 blocks a row",
        ),
    ),
    "TopkSelectNumbers, room for clusters": (
        "topk_select/rows/f32/L65536/k512",
        (
            "f32 streamed 512, 8 blocks a row",
            "f32 streamed 512, 4 blocks a row",
            "f32 streamed 512, 2 blocks a row",
        ),
    ),
    "kOneExperts": (
        "dense_router/experts/bf16/D4096/N1/k8",
        ("bf16 logits one of 256", "bf16 logits one of 512", UNFUSED),
    ),
    "one token": (
        "dense_router/rows/bf16/D4096/E256/k8",
        ("bf16 logits one of 256", "bf16 logits few 16x8 of 256"),
    ),
    "DenseRouterNumbers.few_tokens": (
        "dense_router/rows/bf16/D4096/E1024/k8",
        ("bf16 logits few 16x16 of 1024", UNFUSED),
    ),
    "DenseRouterNumbers.few_experts": (
        "dense_router/experts/bf16/D4096/N32/k8",
        ("bf16 logits few 64x32 of 1024", UNFUSED),
    ),
    "DenseRouterNumbers.small_tile_tokens": (
        "dense_router/rows/bf16/D4096/E256/k8",
        ("bf16 logits few 16x16 of 256", "bf16 logits few 64x16 of 256"),
    ),
    "DenseRouterNumbers.tile_tokens": (
        "dense_router/rows/f32/D4096/E256/k8",
        ("f32 logits few 16x16 of 256", UNFUSED),
    ),
    "DenseRouterNumbers.least_experts": (
        "dense_router/experts/bf16/D4096/N100/k8",
        (UNFUSED, "bf16 logits few 64x32 of 256"),
    ),
    "DenseRouterNumbers.most_experts": (
        "dense_router/experts/bf16/D4096/N100/k8",
        ("bf16 logits few 64x48 of 384", UNFUSED),
    ),
    "DenseRouterNumbers.clusters": (
        "dense_router/rows/bf16/D4096/E256/k8",
        (
            "bf16 logits many 24 by 4",
            "bf16 logits many 40 by 4",
            "bf16 logits many 56 by 4",
            "bf16 logits many 72 by 4",
            "bf16 logits many 56 by 2",
            "bf16 logits many 72 by 2",
            "bf16 logits many 112 by 2",
            "bf16 logits many 144 by 2",
            UNFUSED,
        ),
    ),
    "DenseRouterNumbers.filled_eighths": (
        "dense_router/experts/bf16/D4096/N1024/k8",
        (UNFUSED, "bf16 logits many 40 by 4", UNFUSED, "bf16 logits many 72 by 4"),
    ),
    "DenseRouterNumbers.filled_tenths": (
        "dense_router/rows/bf16/D4096/E256/k8",
        (UNFUSED, "bf16 logits many 112 by 1", "bf16 logits many 128 by 1", UNFUSED),
    ),
    "DenseRouterNumbers.wide_filled_tenths": (
        "dense_router/rows/bf16/D4096/E256/k8",
        (UNFUSED, "bf16 logits many 128 wide"),
    ),
    "the wave of wide blocks": (
        "dense_router/rows/bf16/D7168/E256/k8",
        (UNFUSED, "bf16 logits many 128 wide", UNFUSED),
    ),
    "kManyWideHidden": (
        "dense_router/hidden/bf16/N16384/E256/k8",
        (UNFUSED, "bf16 logits many 128 wide"),
    ),
    "kGradientLeastTokens": ("routed_gradients/rows/D4096/E128/k8", (UNFUSED, "bf16")),
    "kGradientLeastExperts": ("routed_gradients/experts/N8192/D4096/k2", (UNFUSED, "bf16", UNFUSED)),
    "ExpertDispatchNumbers.few_experts": (
        "expert_dispatch/experts/N512/k8",
        ("cluster of 256 threads, 16 chunks", "cluster of 512 threads, 8 chunks"),
    ),
    "ExpertDispatchNumbers.few_wave_experts": (
        "expert_dispatch/experts/N16384/k8",
        ("one wave of 256 threads", "one wave of 512 threads"),
    ),
    "ExpertDispatchNumbers.many_experts": (
        "expert_dispatch/experts/N2048/k8",
        ("cluster of 512 threads, 16 chunks", "cluster of 512 threads, 8 chunks"),
    ),
    "ExpertDispatchNumbers.lone_block_unused": (
        "expert_dispatch/tokens/E1024/k8/align128",
        ("cluster of 512 threads, 1 chunks", "cluster of 512 threads, 8 chunks"),
    ),
    "ExpertDispatchNumbers.unused_of_few": (
        "expert_dispatch/tokens/E256/k8/align128",
        ("cluster of 256 threads, 1 chunks", "cluster of 256 threads, 16 chunks"),
    ),
    "kClusterRounds": (
        "expert_dispatch/tokens/E384/k8",
        (
            "cluster of 512 threads, 1 chunks",
            "cluster of 512 threads, 8 chunks",
            "cluster of 512 threads, 16 chunks",
            "one wave of 256 threads",
        ),
    ),
    "kOneWaveCut": ("expert_dispatch/tokens/E256/k8", ("one wave of 512 threads", "longer of 512 threads")),
    "warps of a multiprocessor": (
        "permute/tokens/bf16/D2048/k8",
        ("copy 16 bytes of a slot", "copy 16 bytes x1", "copy 16 bytes x2", "copy 16 bytes x4"),
    ),
    "CombineNumbers.reads_of_row": ("combine/tokens/bf16/slots256/D16384/k8", ("bf16 wide", "bf16 table")),
    "CombineNumbers.filled_tenths and lone_round_tenths": (
        "combine/tokens/bf16/slots256/D2048/k8",
        ("bf16 wide", "bf16 table", "bf16 wide", "bf16 table"),
    ),
    "multiprocessors, combine_cotangent": (
        "combine_cotangent/tokens/bf16/D2048/k8",
        ("bf16 wide of a choice", "bf16 wide of a token"),
    ),
    "ExpertCountsNumbers.lone_block_choices": (
        "expert_counts/tokens/E256/k8",
        ("one cluster", "several clusters"),
    ),
    "HashRouterNumbers.past_l1_rows": ("hash_router/rows/k2", ("width 2 past the L1", "width 2")),
    "RouteAtNumbers.ahead_rows": ("route_at/rows/f32/E256/k8", ("f32 ahead", "f32 choices")),
    "RouteAtNumbers.ahead_rows by a table": (
        "scored_hash_router/rows/f32/E256/k8",
        ("f32 ahead", "f32 choices"),
    ),
    "kManyChoices": ("route_cotangent/k/f32/identity/N1024/E4096", ("f32 choices", "f32 stretches")),
    "kFewChoiceExperts": ("route_cotangent/experts/f32/N4096/k8", ("f32 few choices", "f32 choices")),
}


@pytest.mark.parametrize("number", NUMBERS)
def test_every_number_chooses_on_a_timed_line(number):
    line_id, plans = NUMBERS[number]
    assert LINES[line_id].is_timed
    work = crossings.work_of(LINES[line_id], H100)
    timed = {(found.below, found.above) for found, values in zip(work.found, work.values) if values}
    assert set(itertools.pairwise(plans)) <= timed


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
        taken |= {CUDA.plans(op, H100, **line.sizes(value))[0] for value in steps if op in COMPOSED}
    kernels = {plan.split(",")[0] for plan in taken - {UNFUSED, None}}
    # Fewer threads are for devices with less shared memory.
    never_taken = {f"{kernel} of 128 threads" for kernel in ("cluster", "one wave", "longer")} | {
        "longer of 256 threads"
    }
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
            assert crossing.threshold % line.step == 0
            assert crossing.below == crossings.taken(line, crossing.threshold - line.step, device)
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


class MadeUp:
    """A native module with plans of its own: of each, the first size that takes it, and the last that it can do."""

    def __init__(self, **plans):
        self._plans = plans

    def plans(self, op, device, rows):
        possible = [plan for plan, (_, last) in self._plans.items() if rows <= last]
        return max((first, plan) for plan, (first, _) in self._plans.items() if first <= rows)[1], possible


ROWS = Line("topk_select", "rows", 1, 70000, {})
ANY = 70000


@pytest.fixture
def made_up(monkeypatch):
    """Makes up the plans of ROWS."""
    return lambda **plans: monkeypatch.setattr(crossings, "native_module", lambda platform: MadeUp(**plans))


@pytest.fixture
def three_plans(made_up):
    made_up(few=(1, ANY), more=(1025, ANY), many=(4096, ANY))


@pytest.mark.usefixtures("three_plans")
def test_sizes_around_a_threshold():
    work = crossings.work_of(ROWS, H100)
    assert [(found.threshold, found.below, found.above) for found in work.found] == [
        (1025, "few", "more"),
        (4096, "more", "many"),
    ]
    assert work.values == [[512, 769, 1025, 1281, 2050], [2048, 3072, 4096, 5120, 8192]]
    assert crossings.work_of(ROWS, H100, quick=True).values == [[769, 1025, 1281], [3072, 4096, 5120]]


def test_where_the_plan_below_ends_sizes_end_too(made_up):
    """Half and twice a threshold are left out where other plans are taken, and what one of both cannot do."""
    made_up(few=(1, 2048), more=(2049, ANY), many=(3000, ANY))
    assert crossings.work_of(ROWS, H100).values == [[1024, 1537, 2048], [2250, 3000, 3750, 6000]]


def measured(line, us):
    """The line's crossings with a clock that says us(size, plan), and each of the points that it was asked for."""
    asked = []

    def clock(its_line, points):
        assert its_line == line
        asked.extend(points)
        return {(value, plan): us(value, plan) for value, plan in points}

    return crossings.measure(line, crossings.work_of(line, H100), H100, clock), asked


@pytest.mark.usefixtures("three_plans")
def test_figures():
    """Below 1025 rows a size takes as many microseconds, above 1000; few to many cross at 2500, and not at 4096."""
    slopes = {"few": lambda rows: float(rows), "more": lambda rows: 1000.0, "many": lambda rows: 2500000.0 / rows}
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


@pytest.mark.usefixtures("three_plans")
def test_a_plan_that_is_always_faster_crosses_nowhere():
    found, _ = measured(ROWS, lambda value, plan: 2.0 if plan == "more" else 3.0)
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


@pytest.mark.usefixtures("three_plans")
def test_a_line_that_fails_leaves_the_others():
    some = [Line("route_at", "rows", 1, 2000, {}), ROWS]

    def clock(line, points):
        if line.op == "route_at":
            raise RuntimeError("no figure")
        return dict.fromkeys(points, 1.0)

    failures = {}
    work = [(line, crossings.work_of(line, H100)) for line in some]
    (record,) = crossings.records(work, H100, clock, failures)
    assert record.id == ROWS.id
    assert failures == {some[0].id: "RuntimeError: no figure"}


@pytest.mark.usefixtures("three_plans")
def test_the_table_marks_what_costs_more_than_5_percent():
    found, _ = measured(ROWS, lambda value, plan: {"few": 1.04, "more": 1.0, "many": 1.06}[plan])
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
    plans = {crossings.taken(line, line.first, H100)} | ({UNFUSED} if line.op in COMPOSED else set())
    for plan in plans:
        contender, inputs = program(line.op, line.sizes(line.first), plan)
        prepared = jax.eval_shape(contender.prepare, *(spec.struct for spec in inputs))
        assert jax.tree.leaves(jax.eval_shape(contender.run, *prepared))
