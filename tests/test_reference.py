"""The reference against numpy and float64: scores, selection, groups, masks, weights, long rows, dispatch, hash."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_router
from cases import EXPERT_COUNTS, ODD_EXPERT_COUNTS, ROWS
from jax_router import reference
from jax_router._shapes import dispatch_slots
from models import DTYPES, MODELS
from moves import MOVES, draw_move
from oracle import activation_topk as oracle_activation_topk
from oracle import (
    assert_rounded,
    assert_routes,
    assert_same_ids,
    assert_weights,
    combine,
    counts,
    dispatch,
    f64,
    hash_router,
    order_keys,
    permute,
    scores,
    select,
    weights_at,
)

EDGES = [0.0, 1e-30, 1e-8, 1e-3, 0.5, 1, 9.2, 16.6, 17, 20, 30, 87, 88.7, 89, 100, 170, 1e4, 1e30, 3e38, np.inf]


def reference_jit(name, **options):
    return jax.jit(partial(getattr(reference, name), **options))


def test_order_keys_are_the_order_of_top_k():
    """The oracle's order itself, on bits, and lax.top_k agrees with it wherever there is no negative NaN."""
    ascending = np.array(
        [-np.inf, -3e38, -1, -1e-38, -1e-45, -0.0, 0.0, 1e-45, 1e-38, 1, 3e38, np.inf, np.nan], np.float32
    )
    keys = order_keys(ascending)
    assert (keys[1:] > keys[:-1]).all()
    assert order_keys(np.array([0xFFC00000], np.uint32).view(np.float32)) == keys[-1]
    shuffled = np.random.default_rng(0).permutation(np.repeat(ascending, 3))
    _, ids = jax.lax.top_k(jnp.asarray(shuffled), 39)
    np.testing.assert_array_equal(ids, np.argsort(~order_keys(shuffled), kind="stable"))


@pytest.mark.parametrize("score_fn", ["sqrtsoftplus", "sigmoid"])
def test_scores(score_fn):
    x = np.concatenate([np.linspace(-110, 110, 20001), EDGES, np.negative(EDGES)]).astype(np.float32)
    got = jax.jit(getattr(reference, score_fn))(x)
    np.testing.assert_allclose(f64(got), scores(x, score_fn), rtol=1e-6, atol=2e-38)


def test_sqrtsoftplus_vanishes_only_with_exp():
    """log(1 + exp(x)) is 0 in float32 below -17, and its square root must not be."""
    x = np.float32([-17, -30, -100, -150, -174])
    np.testing.assert_allclose(jax.jit(reference.sqrtsoftplus)(x), np.exp(f64(x) / 2), rtol=2e-6)


def test_softmax(rng):
    x = rng.normal(0, 5, (64, 100)).astype(np.float32)
    x[0] = -np.inf
    x[1, :50] = -np.inf
    x[2] = 3e38
    got = jax.jit(reference.softmax)(x)
    np.testing.assert_allclose(f64(got), scores(x, "softmax"), rtol=3e-6, atol=2e-38)
    np.testing.assert_array_equal(got[0], 0)


@pytest.mark.parametrize("name", ["deepseek-v2", "deepseek-v3", "deepseek-v4-flash", "olmoe"])
def test_models(name, rng):
    model = MODELS[name]
    logits, bias = model.logits(rng, 3, 32), model.bias(rng)
    mask = rng.random((3, 32)) < 0.8
    routing = reference_jit("activation_topk", **model.selection)(logits, bias, token_mask=mask)
    assert_routes(routing, logits, bias, token_mask=mask, **model.selection)
    np.testing.assert_array_equal(routing.expert_ids[~mask], -1)
    np.testing.assert_array_equal(routing.weights[~mask], 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_half_precision_logits_are_scored_in_float32(dtype, rng):
    model = MODELS["deepseek-v4-flash"]
    logits = model.logits(rng, 64, dtype=DTYPES[dtype])
    routing = reference_jit("activation_topk", **model.selection)(logits)
    assert_routes(routing, logits, **model.selection)


def test_selection_of_groups_by_hand():
    """Groups of scores (0.5 at logit 0): the best two together beat the best one alone, and the other way round."""
    logits = np.array([[9, -9, -9, 3, 3, -9, 2, 2, 2]], np.float32)
    options = {"top_k": 2, "score_fn": "sigmoid", "num_groups": 3, "top_groups": 1}
    by_two = reference_jit("activation_topk", **options)(logits)
    by_one = reference_jit("activation_topk", group_score="max", **options)(logits)
    np.testing.assert_array_equal(by_two.expert_ids, [[3, 4]])
    np.testing.assert_array_equal(by_one.expert_ids, [[0, 1]])


@pytest.mark.parametrize("group_score", ["top2_sum", "max"])
@pytest.mark.parametrize("score_fn", ["sqrtsoftplus", "sigmoid", "softmax"])
def test_groups(score_fn, group_score, rng):
    logits = rng.normal(0, 2, (128, 48)).astype(np.float32)
    bias = rng.normal(0, 0.5, (128, 48)).astype(np.float32)
    options = {
        "top_k": 5, "score_fn": score_fn, "num_groups": 6, "top_groups": 3, "group_score": group_score, "scale": 0.5,
    }  # fmt: skip
    assert_routes(reference_jit("activation_topk", **options)(logits, bias), logits, bias, **options)


def test_bias_steers_the_selection_and_not_the_weights(rng):
    logits = rng.normal(0, 1, (16, 8)).astype(np.float32)
    bias = np.zeros(8, np.float32)
    bias[[2, 5]] = 100
    routing = reference_jit("activation_topk", top_k=2, score_fn="sigmoid")(logits, bias)
    assert set(np.unique(routing.expert_ids)) == {2, 5}
    assert_weights(routing.weights, weights_at(logits, routing.expert_ids, "sigmoid", True, 1.0))


@pytest.mark.parametrize("num_experts", [*EXPERT_COUNTS[::5], *ODD_EXPERT_COUNTS[::3]])
def test_expert_counts(num_experts, rng):
    logits = rng.normal(0, 2, (5, num_experts)).astype(np.float32)
    options = {"top_k": min(6, num_experts), "score_fn": "sqrtsoftplus"}
    assert_routes(reference_jit("activation_topk", **options)(logits), logits, **options)


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("score_fn", ["sqrtsoftplus", "sigmoid", "softmax"])
def test_route_at(score_fn, renormalize, rng):
    logits = rng.normal(0, 3, (4, 8, 20)).astype(np.float32)
    ids = rng.integers(-3, 24, (4, 8, 5)).astype(np.int32)
    ids[0, 0] = -1
    ids[0, 1] = [3, 3, 3, 25, 3]
    routing = reference_jit("route_at", score_fn=score_fn, renormalize=renormalize, scale=1.5)(logits, ids)
    valid = (ids >= 0) & (ids < 20)
    np.testing.assert_array_equal(routing.expert_ids, np.where(valid, ids, -1))
    assert_weights(routing.weights, weights_at(logits, ids, score_fn, renormalize, 1.5))
    table, token_ids = ids.reshape(32, 5), np.arange(32, dtype=np.int32).reshape(4, 8)
    options = {"score_fn": score_fn, "renormalize": renormalize, "scale": 1.5}
    hashed = reference_jit("scored_hash_router", **options)(logits, token_ids, table)
    np.testing.assert_array_equal(hashed.expert_ids, routing.expert_ids)
    # Two programs, which XLA may round each in its own way.
    np.testing.assert_allclose(hashed.weights, routing.weights, rtol=3e-7)


@pytest.mark.parametrize(
    ("name", "dtype", "sorted"),
    [
        *((name, "f32", True) for name, (_, length, _) in ROWS.items() if length < 10_000),
        ("no tile multiple", "bf16", True),
        ("no tile multiple", "f16", False),
    ],
)
def test_topk_select(name, dtype, sorted, rng):
    rows, length, k = ROWS[name]
    x = rng.normal(0, 1, (rows, length)).astype(DTYPES[dtype])
    values, indices = reference_jit("topk_select", k=k, sorted=sorted)(x)
    want_values, want_indices = select(x, k, sorted=sorted)
    assert_same_ids(indices, want_indices, f64(x))
    assert values.dtype == x.dtype
    np.testing.assert_array_equal(f64(values), f64(want_values))


@pytest.mark.parametrize("sorted", [True, False])
def test_topk_select_lengths(sorted, rng):
    x = rng.integers(-3, 3, (9, 40)).astype(np.float32)  # many ties
    x[4, :7] = -np.inf
    lengths = np.array([-5, 0, 1, 6, 7, 8, 39, 40, 99], np.int32)
    values, indices = reference_jit("topk_select", k=7, sorted=sorted)(x, lengths=lengths)
    want_values, want_indices = select(x, 7, lengths, sorted)
    np.testing.assert_array_equal(indices, want_indices)
    np.testing.assert_array_equal(values, want_values)
    np.testing.assert_array_equal((indices >= 0).sum(-1), np.clip(lengths, 0, 7))


def test_dense_router(rng):
    """The products are integers, exact in any order, so that the ids must be exact."""
    x = rng.integers(-4, 5, (3, 7, 64)).astype(np.float32)
    weight = rng.integers(-4, 5, (24, 64)).astype(np.float32)
    logit_bias = rng.integers(-4, 5, 24).astype(np.float32)
    options = {"top_k": 4, "score_fn": "softmax"}
    routing = reference_jit("dense_router", **options)(x, weight, logit_bias=logit_bias)
    want_weights, want_ids = oracle_activation_topk(x @ weight.T + logit_bias, **options)
    np.testing.assert_array_equal(routing.expert_ids, want_ids)
    assert_weights(routing.weights, want_weights, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_router_logits_are_accumulated_in_float32(dtype, rng):
    x = rng.normal(0, 1, (16, 512)).astype(DTYPES[dtype])
    weight = rng.normal(0, 1, (32, 512)).astype(DTYPES[dtype])
    logits = jax.jit(reference.router_logits)(x, weight)
    assert logits.dtype == jnp.float32
    magnitude = np.abs(f64(x)) @ np.abs(f64(weight)).T
    assert (np.abs(f64(logits) - f64(x) @ f64(weight).T) <= 3e-6 * magnitude).all()


@pytest.mark.parametrize(("tokens", "k", "num_experts"), [(1, 1, 1), (50, 6, 16), (300, 2, 1000)])
def test_expert_dispatch(tokens, k, num_experts, rng):
    ids = rng.integers(-2, num_experts + 2, (tokens, k)).astype(np.int32)
    layouts = list(itertools.product((1, 16, 100), (None, 0, 1, 7, 1000)))

    @jax.jit
    def run(ids):
        return [reference.expert_dispatch(ids, num_experts, align=a, capacity=c) for a, c in layouts]

    for layout, got in zip(layouts, run(ids)):
        for mine, want in zip(got, dispatch(ids, num_experts, *layout)):
            assert mine.dtype == jnp.int32
            np.testing.assert_array_equal(mine, want, err_msg=str(layout))


@pytest.mark.parametrize("capacity", [None, 0, 1, 2, 3, 5])
@pytest.mark.parametrize("align", [1, 2, 3, 4])
def test_slots_suffice_and_are_as_few_as_that(align, capacity):
    """Over all loads that few choices can make of few experts."""
    for num_experts, choices in itertools.product(range(1, 4), range(9)):
        kept = [
            [load if capacity is None else min(load, capacity) for load in loads]
            for loads in itertools.product(range(choices + 1), repeat=num_experts)
            if sum(loads) <= choices
        ]
        want = max(sum(-(-load // align) * align for load in loads) for loads in kept)
        assert dispatch_slots(choices, num_experts, align, capacity) == want


def test_counts_of_experts(rng):
    """The sum of counts of parts is the count of all; ids of -1 are not those of expert 0."""
    ids, mask = rng.integers(-2, 12, (3, 50, 4)).astype(np.int32), rng.random((3, 50)) < 0.6
    got = reference_jit("expert_counts", num_experts=10)(ids, token_mask=mask)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, counts(ids, 10, mask))
    np.testing.assert_array_equal(got, sum(counts(*part) for part in zip(ids, [10] * 3, mask)))


def test_block_experts(rng):
    ids = rng.integers(-1, 9, (40, 3)).astype(np.int32)
    for align in (1, 4, 16, 64):
        sorted_choices = jax_router.expert_dispatch(ids, 9, align=align)
        sizes = np.asarray(sorted_choices.group_sizes)
        want = np.full(len(sorted_choices.token_index) // align, -1)
        blocks = np.repeat(np.arange(9), sizes // align)
        want[: len(blocks)] = blocks
        for block in (align, 1):
            got = jax.jit(jax_router.block_experts, static_argnums=1)(sorted_choices, block)
            assert got.dtype == jnp.int32
            np.testing.assert_array_equal(got, np.repeat(want, align // block))
    one, other = (jax_router.expert_dispatch(ids, 9, align=4) for ids in (ids, ids[::-1] // 2))
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), one, other)
    for got, want in zip(jax_router.block_experts(both, 4), (one, other)):
        np.testing.assert_array_equal(got, jax_router.block_experts(want, 4))


def test_expert_dispatch_feeds_ragged_dot(rng):
    """x[token_index] with group_sizes computes every chosen expert, and slot brings the results back."""
    x = rng.integers(-3, 4, (10, 8)).astype(np.float32)
    experts = rng.integers(-3, 4, (5, 8, 4)).astype(np.float32)
    ids = np.stack([rng.permutation(5)[:2] for _ in range(10)]).astype(np.int32)

    @jax.jit
    def compute(x, experts, ids):
        token_index, slot, group_sizes = reference.expert_dispatch(ids, 5)
        return jax.lax.ragged_dot(x[token_index], experts, group_sizes, precision="highest")[slot]

    np.testing.assert_array_equal(compute(x, experts, ids), np.einsum("nd,nkdf->nkf", x, experts[ids]))


def test_hash_router(rng):
    lut = rng.integers(0, 16, (30, 4)).astype(np.int32)
    token_ids = np.array([[0, 29, 30], [-1, 5, 2**31 - 1]], np.int32)
    results = reference_jit("hash_router", scale=2.5)(token_ids, lut)
    for got, want in zip(results, hash_router(token_ids, lut, scale=2.5)):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MOVES)
def test_permute_and_combine(name, dtype, rng):
    dispatch, x, y, weights = draw_move(rng, name, DTYPES[dtype])

    def run(permute, combine, *values):
        dispatch, x, y, weights = values
        return [
            move(rows, dispatch, its_weights)
            for its_weights in (None, weights)
            for move, rows in ((permute, x), (combine, y))
        ]

    values = dispatch, x, y, weights
    got = jax.jit(partial(run, reference.permute, reference.combine))(*values)
    for mine, other in zip(got, run(permute, combine, *values)):
        assert_rounded(mine, other)
