"""`python -m benchmarks`, without a GPU: how its figures are made of the kernels that a GPU ran."""

import json
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from jax_router import _timing
from jax_router._timing import Kernel, Peaks, Pool, Spec, Timing

ROOT = Path(__file__).parents[1]

pytest.importorskip("rich", reason="benchmarks need the extra `bench`")


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)


def test_draws_are_of_every_kind():
    from benchmarks import draws

    make = draws.compiled(Spec((3, 512)))
    drawn = {draws.name(number): np.asarray(make(number)) for number in range(2 * len(draws.KINDS))}
    assert len(drawn) == 2 * len(draws.KINDS)
    for turn in (0, 1):
        kinds = {kind: drawn[f"{kind} {turn}"] for kind in draws.KINDS}
        for kind, x in kinds.items():
            assert x.shape == (3, 512)
            assert len(np.unique(x)) > 300, kind
        assert abs(kinds["normal"].std() - 1) < 0.1
        assert 0 <= kinds["uniform"].min() < 0.01 < 0.99 < kinds["uniform"].max() < 1
        assert kinds["exponential"].min() >= 0
        rounded = kinds["rounded to bf16"]
        assert (rounded == rounded.astype(jnp.bfloat16).astype(np.float32)).all()
        assert (np.diff(kinds["ascending"]) >= 0).all()
        assert (np.diff(kinds["descending"]) <= 0).all()
        assert 0 < (abs(kinds["with outliers"]) > 100).sum() < 50
    assert not np.array_equal(drawn["normal 0"], drawn["normal 1"])
    np.testing.assert_array_equal(drawn["normal 1"], make(len(draws.KINDS)))  # the same in every run


@pytest.mark.parametrize(("nbytes", "count"), [(1, 64), (2**20 + 1, 128), (2**27, 64), (2**28, 32), (2**31, 14)])
def test_how_many_draws(nbytes, count):
    from benchmarks import draws

    assert draws.count(nbytes) == count


def test_draws_stay_cached_or_take_turns():
    from benchmarks import draws

    assert [*draws.call_order(2, 2**20)] == [0] * draws.CALLS + [1] * draws.CALLS
    assert [*draws.call_order(2, 2**20 + 1)] == [0, 1] * draws.CALLS


@pytest.fixture
def gpu(monkeypatch):
    """The part of the benchmarks that times cases, ready to take this machine for a GPU."""
    from benchmarks import run

    monkeypatch.setattr(run, "measured_peaks", lambda pool: Peaks(1e6, 1e9))
    monkeypatch.setattr(run, "GPU_POOL", 2**14)
    return run


def test_the_worst_draw_is_the_figure(gpu, monkeypatch):
    """A draw that is slow in every call, and not one call that was slow; rivals are timed on inputs of their own."""
    from benchmarks import draws, results
    from benchmarks.cases import topk_select_case

    slow_draw, given = 9, {}

    def kernels_of_calls(program, copies, calls):
        assert len(copies) == calls == draws.DRAWS * draws.CALLS
        program(*copies[0])
        us_of_calls = [30.0 if call // draws.CALLS == slow_draw else 20.0 for call in range(calls)]
        us_of_calls[:2] = 11.0, 90.0
        return [[Kernel(1e6 * call, 1e6 * call + 1e3 * us, "select")] for call, us in enumerate(us_of_calls)]

    def kernel_timing(program, copies):
        given["rival"] = len(copies)
        return Timing(60.0, 60.0, 60.0, 1)

    monkeypatch.setattr(draws, "kernels_of_calls", kernels_of_calls)
    monkeypatch.setattr(gpu, "kernel_timing", kernel_timing)
    benchmark = gpu.Benchmark(Console(), on_gpu=True, quick=True)
    (record,) = benchmark.records([topk_select_case(1, 256, 6)], "a GPU", "abc")
    assert not benchmark.failures
    assert (record.us, record.us_range) == (30.0, (11.0, 90.0))
    assert (record.median_us, record.worst_draw, record.draws) == (20.0, draws.name(slow_draw), draws.DRAWS)
    assert (record.xla_us, record.kernels, record.others_us) == (60.0, 1, {})
    assert given == {"rival": 1}

    old = results.Record("topk_select/old", us=5.0)
    cells = {column.header: [*column.cells] for column in results.table([record, old], "a GPU").columns}
    assert cells["/ median"] == ["[red]1.50", ""]
    assert cells["worst draw"] == ["exponential 1", ""]
    assert "at most 1.50 times" in results.data_matter([record, old])
    assert "more than 1.1 in 1 of 1 cases" in results.data_matter([record, old])
    assert results.data_matter([old]) == ""


def test_records_of_older_runs_stay(tmp_path):
    from benchmarks import results

    path = tmp_path / "records.json"
    path.write_text('[{"id": "topk_select/B2", "us": 1.0}]')
    results.save([results.Record("topk_select/B1", us=3.0, median_us=2.0)], path)
    new, old = json.loads(path.read_text())
    assert (new["us"], new["median_us"], old) == (3.0, 2.0, {"id": "topk_select/B2", "us": 1.0})


def timeline(runs, pause_ns):
    """Of each run its kernels as (start, end), in nanoseconds from its begin; after each the device idles."""
    now, kernels = 5e9, []
    for run in runs:
        kernels += [Kernel(now + start, now + end, "layer") for start, end in run]
        now += max(end for _, end in run) + pause_ns
    return kernels


def test_a_run_in_jit_is_from_first_start_to_last_end():
    """Gaps between kernels count, kernels that overlap count once, and the last to start may end before another."""
    from benchmarks import in_jit

    without, with_calls = [(0, 1e3), (9e5, 9.1e5)], [(0, 1e3), (500, 2e4), (600, 700)]
    kernels = timeline([without, with_calls] * in_jit.TURNS, 2.1e6)
    assert in_jit.spans_us(kernels, 2) == [[910.0] * in_jit.TURNS, [20.0] * in_jit.TURNS]


@pytest.mark.parametrize(
    ("runs", "pause_ns"),
    [
        (lambda a, b, turns: [a, b] * turns, 5e5),  # one burst
        (lambda a, b, turns: [a, b] * (turns - 1) + [a], 3e6),  # a run has left nothing
        (lambda a, b, turns: [a, b] * (turns - 1) + [a, b[:1]], 3e6),  # a kernel is missing
        (lambda a, b, turns: [], 3e6),
    ],
)
def test_a_timeline_that_is_not_whole_is_no_figure(runs, pause_ns):
    from benchmarks import in_jit

    kernels = timeline(runs([(0, 1e3)], [(0, 1e3), (2e3, 3e3)], in_jit.TURNS), pause_ns)
    with pytest.raises(RuntimeError, match=f"{in_jit.TURNS} turns of 2 programs left .* bursts of kernels"):
        in_jit.spans_us(kernels, 2)


@pytest.mark.parametrize(
    ("tokens", "names", "programs", "calls"), [(4, ("jax_router", "xla"), 3, 3), (65, ("jax_router",), 2, 4)]
)
def test_what_a_call_adds_in_jit(monkeypatch, tokens, names, programs, calls):
    """The median of the differences within a turn, over the calls that make them."""
    from benchmarks import in_jit
    from benchmarks.cases import activation_topk_case, model_with

    monkeypatch.setattr(in_jit, "LAYERS", 3)
    monkeypatch.setattr(in_jit, "_CHAIN", 5)
    case = activation_topk_case(model_with(16, 2), tokens)
    pool = Pool(2**21)
    made = in_jit.InJit(case, names)
    copies = dict.fromkeys(names, pool.copies(case.inputs))

    def clock(runs):
        assert len(runs) == programs
        results = [jax.tree.leaves(run()) for run in runs]
        assert [result.shape for (result,) in results] == [(8, 1024) if case.is_decode else ()] * programs
        return [[100.0 + wave + 12.0 * run + (wave == 300) for wave in (0, 300, 50)] for run in range(programs)]

    added = made.timings(pool, copies, clock)
    assert added == {name: Timing.of([12.0 * run / calls] * 3) for run, name in enumerate(names, 1)}


def test_wall_clock_in_jit():
    """The programs take turns, and what a turn queues is one figure."""
    from benchmarks import in_jit

    ran = []
    runs = [lambda: ran.append("a"), lambda: (ran.append("b"), time.sleep(2e-3))]
    quick, slow = in_jit.wall_us(runs)
    assert ran == (["a"] * 4 + ["b"] * 4) * in_jit.TURNS
    assert len(quick) == len(slow) == in_jit.TURNS
    assert min(slow) >= 2000 > statistics.median(quick)


@pytest.mark.parametrize("names", [("a",), ("a", "b"), ("a", "b", "c")])
def test_no_contender_finds_the_copy_of_another_in_the_cache(names):
    """Between two uses of a copy there are calls with others."""
    used = []
    copies = {name: [(number,) for number in range(12)] for name in names}
    _timing.wall_timings(dict.fromkeys(names, used.append), copies, seconds=0.0, turns=24)
    assert sorted(used) == sorted([*range(12)] * 2 * len(names))
    for number in range(12):
        (places,) = np.nonzero(np.array(used) == number)
        assert np.diff(places).min() >= 12 / len(names)


def test_a_failure_in_jit_costs_no_other_figure(gpu, monkeypatch):
    from benchmarks.cases import NATIVE, XLA, activation_topk_case, model_with

    class InJit:
        def __init__(self, case, names):
            assert names == (NATIVE, XLA)

        def timings(self, pool, copies, clock):
            return clock(copies)

    def fails(copies):
        raise RuntimeError("no figure in jit")

    case = activation_topk_case(model_with(256, 6), 1)
    monkeypatch.setattr(gpu, "InJit", InJit)
    monkeypatch.setattr(gpu, "wall_us", lambda copies: {name: Timing(3.0, 2.0, 9.0) for name in (NATIVE, XLA)})
    monkeypatch.setattr(gpu, "timeline_us", lambda copies: {NATIVE: Timing(2.5, 2.4, 2.6), XLA: Timing(5.0, 4.9, 5.1)})
    monkeypatch.setattr(gpu, "kernel_timing", lambda program, copies: Timing(2.0, 2.0, 2.0, 1))
    benchmark = gpu.Benchmark(Console(), on_gpu=True)
    (record,) = benchmark.records([case], "a GPU", "abc")
    assert (record.in_jit_us, record.in_jit_us_range, record.in_jit_wall_us) == (2.5, (2.4, 2.6), 3.0)
    assert (record.xla_in_jit_us, record.xla_in_jit_us_range, record.xla_in_jit_wall_us) == (5.0, (4.9, 5.1), 3.0)
    monkeypatch.setattr(gpu, "timeline_us", fails)
    (record,) = benchmark.records([case], "a GPU", "abc")
    assert (record.us, record.in_jit_us, record.in_jit_wall_us) == (2.0, None, 3.0)
    assert benchmark.failures == {f"{case.id} in jit": "RuntimeError: no figure in jit"}
