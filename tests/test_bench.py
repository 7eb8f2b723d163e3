"""`python -m jax_router bench`: what it compares, what it times, and what it says of it."""

import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("rich", reason="bench needs the extra `bench`")

from jax_router import RouterConfig, Routing, _bench, _timing, _ways, grouped_matmul
from jax_router.__main__ import main
from jax_router._case import Case

SMALL = ["--tokens=48", "--experts=32", "--top-k=4", "--hidden=64"]
PARTS = ("dense_router", "activation_topk", "expert_dispatch", "permute", "combine")


def test_a_case_is_compared_and_timed(capsys, monkeypatch):
    """On inputs that are random, each copy another one, and never zeros."""
    timed = []

    def timings(programs, copies, **options):
        timed.append(copies)
        return _timing.timings(programs, copies, **options)

    monkeypatch.setattr(_bench, "timings", timings)
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["bench", *SMALL, "--groups=4", "--top-groups=2", "--inner=8"]) == 0
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    assert max(map(len, lines)) <= 80
    assert "48 tokens, 32 experts, top 4, 2 of 4 groups, hidden size 64" in lines[0]
    for part in PARTS:
        compared, times = (line for line in lines if line.startswith(part))
        assert "right" in compared
        assert len(re.findall(r"\d (?:us|ms|s)\b", times)) == 3
    assert "lax.top_k alone" in shown
    assert "\nwhole layer" in shown
    assert "GB/s" in shown
    assert ("figures of a CPU" in shown) == (jax.default_backend() == "cpu")
    assert _timing.device_name() in " ".join(shown.split())
    assert len(timed) == len(PARTS) + 1
    for leaf in jax.tree.leaves(timed):
        assert len(np.unique(np.asarray(leaf))) > min(leaf.size, 8) // 2


def test_a_picture(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib", reason="pictures need the extra `bench`")
    timing = _timing.Timing(2.0, 1.0, 3.0)
    parts = {"dense_router": (_bench.OURS, _bench.PLAIN), "activation_topk": (_bench.OURS, _bench.PLAIN, _bench.TOP_K)}
    found = [_bench.Figures(name, dict.fromkeys(names, timing), 1.5, True) for name, names in parts.items()]
    monkeypatch.setattr(_bench, "run", lambda case: (True, found))
    path = tmp_path / "figures.png"
    assert main(["bench", *SMALL, f"--png={path}"]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    assert str(path) in capsys.readouterr().out


@pytest.mark.parametrize(("nbytes", "count"), [(1, 1), (2**20, 1), (2**20 + 1, 128), (2**22, 32), (2**30, 2)])
def test_copies_exceed_every_cache(nbytes, count):
    assert _timing.copies_of(nbytes) == count


def case(tokens=40, dtype=jnp.bfloat16, weight_dtype=jnp.bfloat16, **options):
    config = RouterConfig(**{"hidden_size": 64, "num_experts": 32, "top_k": 4, **options})
    return Case(config, tokens, jnp.dtype(dtype), jnp.dtype(weight_dtype))


@pytest.mark.parametrize(
    "options",
    [
        {"score_fn": "softmax", "selection_bias": False, "renormalize": False},
        {"score_fn": "softmax", "selection_bias": False, "logit_bias": True, "dtype": jnp.float32},
        {"score_fn": "sigmoid", "num_groups": 8, "top_groups": 3, "group_score": "max", "weight_dtype": jnp.float32},
    ],
    ids=["softmax", "bias of logits", "groups"],
)
def test_other_routers_are_right(options):
    bench = _bench.Bench(case(**{"weight_dtype": options.get("dtype", jnp.bfloat16), **options}))
    checks = list(bench.checks(_timing.Pool(2**14)))
    assert [check.name for check in checks] == list(PARTS)
    assert all(check.is_right for check in checks), checks


def test_a_wrong_kernel_is_not_timed(monkeypatch, capsys):
    def wrong(product, **selection):
        way = _ways.ours(product, **selection)

        def route(x, gate, **biases):
            weights, ids = way.route(x, gate, **biases)
            return Routing(weights, (ids + 1) % len(gate))

        return _ways.Way(route, way.sort, way.permute, way.combine, way.product)

    monkeypatch.setattr(_bench, "ours", wrong)
    assert main(["bench", *SMALL]) == 1
    shown = capsys.readouterr().out
    assert "dense_router     wrong: 192 of 192 ids are not those of float64" in shown
    assert " us" not in shown


def test_a_part_that_fails_costs_no_other_figure(monkeypatch, capsys):
    def fails(x):
        raise ValueError("no such [kernel]\nand more")

    def stages(self):
        double = _bench.Contender(lambda x: x * 2, ("x",))
        yield _bench.Stage("first", {_bench.OURS: _bench.Contender(fails, ("x",)), _bench.PLAIN: double}, 1)
        yield _bench.Stage("second", {_bench.OURS: double, _bench.PLAIN: double}, 1)

    monkeypatch.setattr(_bench.Bench, "stages", stages)
    monkeypatch.setattr(_bench.Bench, "checks", lambda self, pool: [])
    assert main(["bench", *SMALL]) == 1
    shown = capsys.readouterr().out
    assert "first: not timed, ValueError: no such [kernel]\n" in shown
    assert re.search(r"^second +\d", shown, re.MULTILINE)


KEYS = np.array([[0.0, 3.0, 1.0, 3.0 + 1e-7, 2.0]], np.float64)


@pytest.mark.parametrize(
    ("ids", "by_rounding", "wrong"),
    [([3, 1, 4], 0, 0), ([1, 3, 4], 2, 0), ([3, 1, 2], 0, 1), ([3, 3, 4], 0, 1), ([3, 1, -1], 0, 1), ([3, 1, 9], 0, 1)],
)
def test_ids_may_differ_where_rounding_explains_it(ids, by_rounding, wrong):
    bench = _bench.Bench(case(1, num_experts=5, top_k=3, score_fn="softmax", renormalize=False, selection_bias=False))
    exps = np.exp(KEYS - KEYS.max())
    weights = (exps / exps.sum())[:, np.clip(ids, 0, 4)].astype(np.float32)
    routing = Routing(weights, np.array([ids], np.int32))
    check = bench._against_float64("made up", routing, np.array([0]), KEYS, np.full((1, 5), 1e-6), None)
    assert (check.by_rounding, check.wrong) == (by_rounding, wrong)
    assert check.is_right == (not wrong)
    routing = routing._replace(weights=weights * 1.01)
    off = bench._against_float64("made up", routing, np.array([0]), KEYS, np.zeros(1), None)
    assert not off.is_right


def test_both_ways_are_one_layer(rng):
    x, gate = (rng.normal(0, 1, shape).astype(np.float32) for shape in ((12, 16), (8, 16)))
    experts = _ways.Weights(*(rng.normal(0, 0.3, shape).astype(np.float32) for shape in ((8, 16, 12), (8, 6, 16))))
    got, want = (
        jax.jit(way(grouped_matmul, top_k=2).layer)(jnp.asarray(x), jnp.asarray(gate), experts)
        for way in (_ways.ours, _ways.plain)
    )
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--top-k=300"], "top_k must be between 1 and 256"),
        (["--groups=8"], "top_groups (how many groups stay eligible) must be given"),
        (["--preset=deepseek_v9"], "near it: deepseek_v"),
        (["--tokens=0"], "--tokens: must be a number, 1 or more, got '0'"),
        (["--png=figures.svg"], "--png: must be the name of a .png file"),
        (["--tokens=200000000"], "GB, and there are"),
        (["--tokens=1000000000"], "--tokens must be below 2^31 / 8, the experts a token, got 1000000000"),
        (["--tokens=2147483648"], "--tokens: must be below 2^31, got '2147483648'"),
        (["--hidden=" + "9" * 5000], "--hidden: invalid number value"),
    ],
)
def test_errors_are_one_line(options, message, capsys):
    with pytest.raises(SystemExit) as error:
        main(["bench", *options])
    assert error.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_without_rich_it_names_the_extra(monkeypatch, capsys):
    for name in [name for name in sys.modules if name == "jax_router._bench" or name.split(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("jax_router._bench")
    monkeypatch.setitem(sys.modules, "rich", None)
    assert main(["bench"]) == 1
    assert "pip install 'jax-router[bench]'" in capsys.readouterr().err
