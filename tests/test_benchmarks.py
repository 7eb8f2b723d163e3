"""`python -m benchmarks`, without a GPU: how its figures are made of the kernels that a GPU ran."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from jax_router._timing import Kernel, Peaks, Spec, Timing

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


def test_the_worst_draw_is_the_figure(monkeypatch):
    """A draw that is slow in every call, and not one call that was slow; rivals are timed on inputs of their own."""
    from benchmarks import draws, results, run
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
    monkeypatch.setattr(run, "kernel_timing", kernel_timing)
    monkeypatch.setattr(run, "measured_peaks", lambda pool: Peaks(1e6, 1e9))
    monkeypatch.setattr(run, "GPU_POOL", 2**14)
    benchmark = run.Benchmark(Console(), on_gpu=True, quick=True)
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
