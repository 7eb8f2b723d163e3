"""Inputs that broke routers and top-k kernels before this one, compared with the total order on bits or with an answer
that is known exactly.

Sizes that broke them are in test_native.py; results that changed with the batch or from call to call in
test_determinism.py; gradients that were not exactly zero and tables without a gradient in test_derivatives.py.
"""

import functools
import os
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_router
from matrix import OPS
from models import DTYPES
from moves import lay_out
from oracle import (
    assert_routes,
    assert_same_ids,
    assert_weights,
    combine,
    counts,
    dispatch,
    expert_ids,
    f64,
    permute,
    products,
    scores,
    select,
    weights_at,
)
from oracle import top_k as oracle_top_k

NEGATIVE_NAN = np.array(0xFFC00000, np.uint32).view(np.float32)
INF = np.inf


@functools.cache
def op(name, **options):
    """The op, jitted: the same program for calls with the same options and shapes."""
    return jax.jit(partial(getattr(jax_router, name), **options))


def with_bits(bits):
    return np.asarray(bits).astype(np.uint32).view(np.float32)


# NaN of both signs


@pytest.mark.parametrize("keys", ["logits", "scores", "groups"])
@pytest.mark.parametrize("score_fn", ["sqrtsoftplus", "sigmoid", "softmax"])
def test_nan_rows(score_fn, keys, implementation, rng):
    """All NaN, one NaN, one negative NaN: k distinct ids in range, and the rows beside them do not change."""
    clean = rng.normal(0, 1, (8, 32)).astype(np.float32)
    logits = clean.copy()
    logits[1] = np.nan
    logits[3] = NEGATIVE_NAN
    logits[4, 17] = np.nan
    logits[6, 30] = NEGATIVE_NAN
    bias = np.zeros(32, np.float32) if keys == "scores" else None
    options = {"top_k": 4, "score_fn": score_fn, **({"num_groups": 4, "top_groups": 2} if keys == "groups" else {})}
    route = op("activation_topk", implementation=implementation, **options)
    weights, ids = route(logits, bias)
    assert_routes((weights, ids), logits, bias, **options)
    np.testing.assert_array_equal(np.asarray(ids)[[1, 3]], [[0, 1, 2, 3]] * 2)
    assert np.isnan(np.asarray(weights)[[1, 3]]).all()
    if keys == "logits" or score_fn != "softmax":  # one NaN makes all softmax scores NaN, and all keys equal
        np.testing.assert_array_equal(np.asarray(ids)[[4, 6], 0], [17, 30])
        assert np.isnan(np.asarray(weights)[[4, 6]]).all()
    rest = np.array([0, 2, 5, 7])
    clean_weights, clean_ids = route(clean, bias)
    np.testing.assert_array_equal(ids[rest], clean_ids[rest])
    np.testing.assert_array_equal(weights[rest], clean_weights[rest])


@pytest.mark.parametrize("dtype", DTYPES)
def test_select_with_nans_of_both_signs(dtype, implementation, rng):
    x = rng.normal(0, 1, (4, 300)).astype(np.float32)
    x[0, ::50] = np.nan
    x[1, ::50] = NEGATIVE_NAN
    x[1, 25::50] = np.nan
    x[2] = NEGATIVE_NAN
    x[3, 5:] = -INF
    x = x.astype(DTYPES[dtype])
    values, indices = op("topk_select", k=9, implementation=implementation)(x)
    want_values, want_indices = select(x, 9)
    np.testing.assert_array_equal(indices, want_indices)
    np.testing.assert_array_equal(f64(values), f64(want_values))


# Ids out of range


def test_token_ids_out_of_range(implementation, rng):
    """A sampler's id V, padding, and bit patterns of floats."""
    lut = rng.integers(0, 9, (50, 3)).astype(np.int32)
    wild = np.array([50, 51, -1, -50, 2**31 - 1, -(2**31), *np.float32([1.5, -2, np.nan]).view(np.int32)], np.int32)
    ids = np.concatenate([wild, np.arange(50, dtype=np.int32)])
    routing = op("hash_router", implementation=implementation)(ids, lut)
    np.testing.assert_array_equal(routing.expert_ids[: wild.size], -1)
    np.testing.assert_array_equal(routing.weights[: wild.size], 0)
    np.testing.assert_array_equal(routing.expert_ids[wild.size :], lut)
    logits = rng.normal(0, 1, (ids.size, 9)).astype(np.float32)
    scored = op("scored_hash_router", implementation=implementation)(logits, ids, lut)
    np.testing.assert_array_equal(scored.expert_ids, routing.expert_ids)
    assert_weights(scored.weights, weights_at(logits, routing.expert_ids, "sqrtsoftplus", True, 1.0))


def test_table_entries_out_of_range(implementation, rng):
    """They pass through hash_router, have weight 0 in route_at, and lie in no group of expert_dispatch."""
    lut = rng.integers(0, 8, (20, 4)).astype(np.int32)
    lut[3] = [8, -1, 2**31 - 1, -(2**31)]
    lut[4, 1] = np.float32(0.7).view(np.int32)
    token_ids = np.array([[3, 4, 5], [4, 3, 0]], np.int32)
    ids = op("hash_router", implementation=implementation)(token_ids, lut).expert_ids
    np.testing.assert_array_equal(ids, lut[token_ids])
    logits = rng.normal(0, 1, (2, 3, 8)).astype(np.float32)
    routing = op("route_at", score_fn="softmax", implementation=implementation)(logits, ids)
    assert_weights(routing.weights, weights_at(logits, ids, "softmax", True, 1.0))
    np.testing.assert_array_equal(routing.expert_ids[0, 0], -1)
    for got, want in zip(op("expert_dispatch", num_experts=8, implementation=implementation)(ids), dispatch(ids, 8)):
        np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(
        op("expert_counts", num_experts=8, implementation=implementation)(ids), counts(ids, 8)
    )


# Loads of the experts

LOADS = {
    "all on one expert": np.full((700, 4), 5),
    "all on the first": np.zeros((700, 4)),
    "all on the last": np.full((700, 4), 99),
    "none": np.full((700, 4), -1),
    "the same expert twice in a row": np.repeat(np.arange(200) % 40, 4).reshape(200, 4),
    "experts without tokens": np.arange(600).reshape(150, 4) % 3 * 33,
    "one token": np.array([[7, 7, 100, -1]]),
    "one choice": np.array([[99]]),
}


@pytest.mark.parametrize(
    ("align", "capacity"),
    [(1, None), (1, 0), (1, 1), (1, 2799), (1, 2800), (128, None), (128, 0), (128, 1), (128, 2801), (4096, None)],
)
@pytest.mark.parametrize("load", LOADS)
def test_loads(load, align, capacity, implementation):
    """Down to no slot at all, and with capacities around the load of one expert that has it all."""
    ids = LOADS[load].astype(np.int32)
    sort = op("expert_dispatch", num_experts=100, align=align, capacity=capacity, implementation=implementation)
    for got, want in zip(sort(ids), dispatch(ids, 100, align, capacity), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("load", LOADS)
def test_loads_are_counted(load, implementation, rng):
    ids = LOADS[load].astype(np.int32)
    for mask in (None, np.zeros(len(ids), bool), rng.random(len(ids)) < 0.5):
        got = op("expert_counts", num_experts=100, implementation=implementation)(ids, token_mask=mask)
        np.testing.assert_array_equal(got, counts(ids, 100, mask))


# Biases that cancel


@pytest.mark.parametrize("steer", [12.0, 1e4, -1e5])
@pytest.mark.parametrize("groups", [1, 4])
def test_bias_does_not_cancel(steer, groups, implementation, rng):
    """Sigmoid scores near 1e-8: (s + 12) - 12 has lost them, and a bias of -1e5 must not lose to a sentinel."""
    logits = rng.normal(-18.4, 0.5, (16, 32)).astype(np.float32)
    bias = np.full(32, steer, np.float32)
    options = {"top_k": 4, "score_fn": "sigmoid", "num_groups": groups, "top_groups": groups}
    routing = op("activation_topk", renormalize=False, implementation=implementation, **options)(logits, bias)
    assert_weights(routing.weights, weights_at(logits, routing.expert_ids, "sigmoid", False, 1.0))
    np.testing.assert_array_equal(routing.expert_ids, [[0, 1, 2, 3]] * 16)  # all keys are equal once rounded


def test_bias_that_makes_ties(implementation):
    """Scores a few units in the last place apart, and a bias of 8.08 that rounds the differences away."""
    logits = np.linspace(1 + 1e-6, 1 + 2e-6, 9, dtype=np.float32)[None]
    assert len(np.unique(logits)) == 9
    bias = np.full(9, 8.0801, np.float32)
    routing = op("activation_topk", top_k=6, score_fn="sigmoid", implementation=implementation)(logits, bias)
    sums = (scores(logits, "sigmoid") + f64(bias)).astype(np.float32)
    assert (sums == sums[0, 0]).all()
    np.testing.assert_array_equal(routing.expert_ids, [[0, 1, 2, 3, 4, 5]])


@pytest.mark.parametrize("groups", [{}, {"num_groups": 8, "top_groups": 4}])
@pytest.mark.parametrize("score_fn", ["sqrtsoftplus", "sigmoid"])
@pytest.mark.parametrize("steps", [30, 3000, 1 << 20])
def test_keys_of_bias_alone(steps, score_fn, groups, implementation, rng):
    """Scores of 0 and biases in steps of 2^-22, whose sums of two are exact: so are the ids, however near the keys."""
    logits = np.full((4100, 256), -INF, np.float32)
    bias = (1 + rng.integers(0, steps, logits.shape) * 2.0**-22).astype(np.float32)
    want = expert_ids(logits, bias, 8, score_fn, **groups)
    route = op("activation_topk", top_k=8, score_fn=score_fn, implementation=implementation, **groups)
    for rows in (slice(None), slice(0, 40)):
        np.testing.assert_array_equal(route(logits[rows], bias[rows]).expert_ids, want[rows])


# Underflow and overflow of scores

SCORE_EDGES = np.array(
    [-100, -30, -17, -16.6, np.nextafter(np.float32(20), 0), 20, np.nextafter(np.float32(20), 21), 88.7, 89, 1e4],
    np.float32,
)


def test_sqrtsoftplus_edges(implementation):
    routing = op("activation_topk", top_k=1, renormalize=False, implementation=implementation)(SCORE_EDGES[:, None])
    assert_weights(routing.weights[:, 0], scores(SCORE_EDGES, "sqrtsoftplus"), rtol=1e-6)
    infinite = op("activation_topk", top_k=1, renormalize=False, implementation=implementation)(
        np.float32([[INF], [-INF]])
    )
    np.testing.assert_array_equal(infinite.weights, [[INF], [0]])


@pytest.mark.parametrize("score_fn", ["sqrtsoftplus", "sigmoid"])
def test_large_logits_with_a_bias(score_fn, implementation, rng):
    """Logits around those whose exponential overflows, far beyond, and infinite, with biases of all sizes."""
    logits = rng.normal(0, 1, (4100, 64)) * np.repeat([40.0, 100.0, 1e4, 1e30], 1025)[:, None]
    logits = np.where(rng.random(logits.shape) < 0.01, INF, logits).astype(np.float32)
    bias = rng.normal(0, 1, logits.shape) * np.tile([1.0, 1e3, 1e30, INF], 1025)[:, None]
    bias = bias.astype(np.float32)
    options = {"top_k": 6, "score_fn": score_fn, "renormalize": False}
    route = op("activation_topk", implementation=implementation, **options)
    for rows in (slice(None), slice(0, 40)):
        assert_routes(route(logits[rows], bias[rows]), logits[rows], bias[rows], **options)


def test_row_where_every_weight_underflows(implementation):
    logits = np.full((2, 8), -500, np.float32)
    logits[1] = -INF
    routing = op("activation_topk", top_k=3, implementation=implementation)(logits)
    np.testing.assert_array_equal(routing.weights, 0)
    np.testing.assert_array_equal(routing.expert_ids, [[0, 1, 2]] * 2)


# Few candidates


def test_fewer_than_k_finite_scores(implementation):
    logits = np.full((3, 12), -INF, np.float32)
    logits[0, [7, 3]] = [1, 2]
    logits[1, 11] = -1e30
    route = op("activation_topk", top_k=4, score_fn="softmax", implementation=implementation)
    routing = route(logits)
    np.testing.assert_array_equal(routing.expert_ids, [[3, 7, 0, 1], [11, 0, 1, 2], [0, 1, 2, 3]])
    np.testing.assert_allclose(routing.weights, [[0.7310586, 0.26894143, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]], rtol=1e-6)


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("score_fn", ["sqrtsoftplus", "sigmoid", "softmax"])
def test_no_choice_and_no_expert(score_fn, renormalize, implementation):
    """Weights at no ids, and at ids of which none is an expert, with their gradient."""
    route = op("route_at", score_fn=score_fn, renormalize=renormalize, implementation=implementation)
    for experts, k in ((5, 0), (0, 2), (0, 0)):
        logits, ids = np.ones((3, experts), np.float32), np.zeros((3, k), np.int32)
        weights, valid_ids = route(logits, ids)
        np.testing.assert_array_equal(weights, np.zeros((3, k)))
        np.testing.assert_array_equal(valid_ids, np.full((3, k), -1))
        gradient = jax.grad(lambda x, ids=ids: route(x, ids).weights.sum())(logits)
        np.testing.assert_array_equal(gradient, np.zeros((3, experts)))


@pytest.mark.parametrize("k", [0, 2])
def test_scores_without_a_dtype_of_their_own(k, implementation):
    """As jnp.full makes them; indices without one would become int8 beside an int8."""
    scores = jnp.full((3, 8), 1.0)
    assert scores.weak_type
    results = op("topk_select", k=k, implementation=implementation)(scores)
    assert [result.dtype for result in results] == [jnp.float32, jnp.int32]
    assert not any(result.weak_type for result in results)


@pytest.mark.parametrize("shape", [(3, 4), (3, 0), (0,), (2, 0, 5)])
def test_the_none_best(shape, implementation):
    """k = 0, of rows of any length, as of `jax.lax.top_k`: values and indices, and their gradient."""
    x = jnp.ones(shape, jnp.bfloat16)
    select = op("topk_select", k=0, implementation=implementation)
    for mine, want in zip(select(x), jax.lax.top_k(x, 0)):
        assert (mine.shape, mine.dtype) == (want.shape, want.dtype)
    lengths = jnp.zeros(shape[:-1], jnp.int32)
    assert select(x, lengths=lengths)[0].shape == (*shape[:-1], 0)
    np.testing.assert_array_equal(jax.grad(lambda x: select(x)[0].astype(jnp.float32).sum())(x), jnp.zeros_like(x))


def test_every_expert_is_chosen(implementation, rng):
    logits = rng.normal(0, 1, (5, 16)).astype(np.float32)
    routing = op("activation_topk", top_k=16, score_fn="softmax", implementation=implementation)(logits)
    np.testing.assert_array_equal(routing.expert_ids, oracle_top_k(logits, 16))
    np.testing.assert_allclose(np.sum(routing.weights, -1), 1, rtol=1e-6)


# Ties, of experts and of groups


@pytest.mark.parametrize(("num_experts", "dtype"), [(40, "f32"), (40, "bf16"), (384, "f32"), (256, "f16")])
def test_ties_go_to_the_lower_id(num_experts, dtype, implementation, rng):
    """At the k-th place, in a whole row, +0 against -0, and by rounding to half precision; at several row counts."""
    x = rng.integers(-1, 2, (70, num_experts)).astype(np.float32)
    x[0] = 0
    x[1] = np.where(rng.random(num_experts) < 0.5, 0.0, -0.0)
    x[2] = np.where(np.arange(num_experts) == num_experts - 1, 0.0, -0.0)
    x[3:40] = rng.normal(0, 1, (37, num_experts)).astype(DTYPES["bf16"]).astype(np.float32)
    x = x.astype(DTYPES[dtype])
    want = oracle_top_k(x, 6)
    route = op("activation_topk", top_k=6, score_fn="sigmoid", implementation=implementation)
    np.testing.assert_array_equal(route(x).expert_ids, want)
    np.testing.assert_array_equal(route(x[:4]).expert_ids, want[:4])
    np.testing.assert_array_equal(op("topk_select", k=6, implementation=implementation)(x)[1], want)


@pytest.mark.parametrize("group_score", ["top2_sum", "max"])
def test_ties_of_groups_and_within_groups(group_score, implementation, rng):
    """Few distinct logits; k is no multiple of top_groups. Equal logits have equal scores: the ids are exact."""
    logits = rng.integers(0, 3, (100, 32)).astype(np.float32)
    logits[0] = 1
    groups = {"num_groups": 8, "top_groups": 3, "group_score": group_score}
    routing = op("activation_topk", top_k=7, score_fn="sigmoid", implementation=implementation, **groups)(logits)
    # Scores with exact sums, in the order of those of sigmoid: two of logit 1 beat one of 2 and one of 0.
    stand_in = np.array([0.5, 0.75, 0.875])[logits.astype(int)]
    assert 2 * scores(1.0, "sigmoid") > scores(2.0, "sigmoid") + scores(0.0, "sigmoid")
    best = np.sort(stand_in.reshape(100, 8, 4), -1)[..., -2 if group_score == "top2_sum" else -1 :]
    chosen = oracle_top_k(best.sum(-1), 3)
    eligible = (chosen[..., None] == np.arange(8)).any(-2).repeat(4, -1)
    np.testing.assert_array_equal(routing.expert_ids, oracle_top_k(np.where(eligible, stand_in, -1), 7))
    np.testing.assert_array_equal(routing.expert_ids[0], [0, 1, 2, 3, 4, 5, 6])


def test_ties_are_broken_alike_on_all_paths(implementation, rng):
    """One token, many tokens, and the product before the selection, with integer logits that tie all the time."""
    x = rng.integers(-1, 2, (130, 64)).astype(DTYPES["bf16"])
    weight = rng.integers(-1, 2, (256, 64)).astype(DTYPES["bf16"])
    logits = (f64(x) @ f64(weight).T).astype(np.float32) + 0.0
    want = oracle_top_k(logits, 6)
    dense = op("dense_router", top_k=6, implementation=implementation)
    route = op("activation_topk", top_k=6, implementation=implementation)
    for rows in (slice(None), slice(0, 64), slice(3, 4)):
        np.testing.assert_array_equal(dense(x[rows], weight).expert_ids, want[rows])
        np.testing.assert_array_equal(route(logits[rows]).expert_ids, want[rows])


# Rows of few distinct leading bits

NARROW = {
    "consecutive bits": lambda rng, shape: with_bits(0x3F800000 + rng.permuted(np.indices(shape)[1], axis=1)),
    "low bits alone": lambda rng, shape: with_bits(0x3F800000 + rng.integers(0, 1024, shape)),
    "one bucket": lambda rng, shape: with_bits(np.where(rng.random(shape) < 0.3, 0x3F8A0000, 0xBF000000)),
    "all equal": lambda rng, shape: np.full(shape, -2.5, np.float32),
}


@pytest.mark.parametrize(
    ("length", "k"),
    [(700, 9), (1000, 100), (4096, 64), (8191, 2048), (131072, 2048), (262144, 2048), (262209, 2048)],
)
@pytest.mark.parametrize("name", NARROW)
def test_rows_of_a_narrow_range(name, length, k, rng):
    x = NARROW[name](rng, (2, length))
    want_values, want_indices = select(x, k)
    values, indices = op("topk_select", k=k, implementation="native")(x)
    np.testing.assert_array_equal(indices, want_indices)
    np.testing.assert_array_equal(values, want_values)


def test_zeros_of_both_signs(rng):
    """Rows of -1 with stretches of -0 and a few 0, which promise more than k of these to a sample of the stretches.

    A comparison of floats lets -0 pass for 0, and the order does not.
    """
    x = np.full((100, 40960), -1, np.float32)
    stretches = np.arange(x.shape[1]) % 2560 < 512
    x[:, stretches] = np.where(rng.random((len(x), stretches.sum())) < 0.02, 0.0, -0.0)
    want_values, want_indices = select(x, 512)
    values, indices = op("topk_select", k=512, implementation="native")(x)
    np.testing.assert_array_equal(indices, want_indices)
    np.testing.assert_array_equal(np.signbit(values), np.signbit(want_values))


# Both ends of the range


@pytest.mark.parametrize("dtype", DTYPES)
def test_mixed_infinities_denormals_and_large_values(dtype, implementation):
    row = np.float32([1e-40, -1e-40, 0, -0.0, 1e-45, 3e38, -3e38, 65504, 7e4, INF, -INF, 1, -1, 6e-8, 1e-38, -1e-38])
    with np.errstate(over="ignore"):
        x = np.stack([row, row[::-1], np.roll(row, 5)]).astype(DTYPES[dtype])
    for k in (3, 16):
        values, indices = op("topk_select", k=k, implementation=implementation)(x)
        want_values, want_indices = select(x, k)
        np.testing.assert_array_equal(indices, want_indices)
        np.testing.assert_array_equal(
            np.asarray(values).view(np.uint8), np.ascontiguousarray(want_values).view(np.uint8)
        )
    routing = op("activation_topk", top_k=5, score_fn="sigmoid", implementation=implementation)(x)
    np.testing.assert_array_equal(routing.expert_ids, oracle_top_k(x, 5))


# Offsets beyond 31 bits


def test_offsets_beyond_two_to_the_31():
    """Elements beyond 2^31 and, where the memory allows, 2^32, in f16. On CPU this needs 5 GiB; 9 GiB on a GPU.

    Every row is zeros and a pattern, planted on the device, that names its row."""
    length = 262144
    rows = (1 << 32) // length + 3 if jax.default_backend() == "gpu" else (1 << 31) // length + 3
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if jax.default_backend() == "cpu" and memory < 16 << 30:
        pytest.skip(f"this needs a machine with 16 GiB of memory, not {memory >> 30}")

    @jax.jit
    def plant():
        row = jnp.arange(rows, dtype=jnp.int32)
        place = jnp.stack([(row * 7919) % length, (row * 104729 + 11) % length], -1)
        zeros = jnp.zeros((rows, length), jnp.float16)
        return zeros.at[row[:, None], place].set(jnp.array([2, 1], jnp.float16)), place

    x, place = plant()
    values, indices = op("topk_select", k=2, implementation="native")(x)
    np.testing.assert_array_equal(indices, place)
    np.testing.assert_array_equal(f64(values), [[2, 1]] * rows)


# Masks in CUDA graphs, and no tokens at all


def test_mask_that_changes_within_a_loop(implementation, rng):
    """Padding is poisoned with NaN and moves at every step of one compiled loop: on a GPU, a CUDA graph's replays."""
    steps, tokens, experts = 12, 40, 64
    logits = rng.normal(0, 1, (steps, tokens, experts)).astype(np.float32)
    masks = rng.random((steps, tokens)) < 0.7
    poisoned = np.where(masks[..., None], logits, np.nan)

    @jax.jit
    def run(poisoned, masks):
        def step(carry, inputs):
            routing = jax_router.activation_topk(
                inputs[0], top_k=6, score_fn="sigmoid", token_mask=inputs[1], implementation=implementation
            )
            sizes = jax_router.expert_dispatch(routing.expert_ids, experts, implementation=implementation).group_sizes
            return carry + sizes, routing

        return jax.lax.scan(step, jnp.zeros(experts, jnp.int32), (poisoned, masks))

    for _ in range(3):
        sizes, routing = run(poisoned, masks)
        assert_routes(routing, logits, token_mask=masks, top_k=6, score_fn="sigmoid")
        want = np.bincount(np.asarray(routing.expert_ids)[masks].ravel(), minlength=experts)
        np.testing.assert_array_equal(sizes, want)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 4)])
@pytest.mark.parametrize("name", OPS)
def test_no_tokens(name, shape, implementation):
    """Results of the right shapes, and no expert has a token."""
    values = OPS[name].draw(*shape)
    results = jax.jit(partial(OPS[name].call, implementation=implementation))(*values)
    if name.startswith("expert_dispatch"):
        assert [leaf.shape for leaf in results] == [(0,), (*shape, 2), (16,)]
        np.testing.assert_array_equal(results.group_sizes, 0)
    elif name.startswith(("permute", "combine")):
        rows, group_sizes = results
        assert rows.shape == (*(shape if name == "combine" else (0,)), 8)
        np.testing.assert_array_equal(group_sizes, 0)
    elif name.startswith("expert_counts"):
        np.testing.assert_array_equal(results, np.zeros(16, np.int32))
    else:
        first, second = results
        assert first.shape == second.shape == (*shape, first.shape[-1])


# Lengths, unaligned rows, a dirty workspace


@pytest.mark.parametrize("length", [40, 5000])
def test_lengths_around_k(length, implementation, rng):
    """0, below k, k, k + 1, above L; past the end lie better entries that must not be seen; rows start unaligned."""
    k = 12
    lengths = np.array([0, 1, k - 1, k, k + 1, length - 1, length, length + 1, -3, 2**31 - 1], np.int32)
    x = rng.normal(0, 1, (len(lengths), length)).astype(np.float32)
    x[np.arange(length) >= np.clip(lengths, 0, length)[:, None]] = np.nan
    for sorted in (True, False):
        got = op("topk_select", k=k, sorted=sorted, implementation=implementation)(x, lengths=lengths)
        for mine, want in zip(got, select(x, k, lengths, sorted)):
            np.testing.assert_array_equal(mine, want)


def test_minus_infinity_inside_a_length(implementation):
    """An entry of -inf within the length has its index; what lies past the length has none."""
    x = np.full((2, 9), -INF, np.float32)
    values, indices = op("topk_select", k=4, implementation=implementation)(x, lengths=np.int32([2, 9]))
    np.testing.assert_array_equal(indices, [[0, 1, -1, -1], [0, 1, 2, 3]])
    np.testing.assert_array_equal(values, np.float32(-INF))


def test_long_rows_after_other_rows(rng):
    """A workspace that an earlier call left dirty: calls of several shapes, each repeated after the others."""
    shapes = [(3, 40000, 600), (1, 262209, 2048), (7, 9000, 64)]
    rows = [rng.normal(0, 1, (n, length)).astype(np.float32) for n, length, _ in shapes]
    for _ in range(2):
        for x, (_, _, k) in zip(rows, shapes):
            np.testing.assert_array_equal(op("topk_select", k=k)(x)[1], select(x, k)[1])


# Products of half precision


def test_half_precision_operands_choose_as_float32_would(implementation, rng):
    """A product rounded to bf16 chooses other experts, or the same in another order, for some tokens in a hundred."""
    x = rng.normal(0, 1, (256, 512)).astype(DTYPES["bf16"])
    weight = rng.normal(0, 1, (64, 512)).astype(DTYPES["bf16"])
    exact = f64(x) @ f64(weight).T
    rounded = oracle_top_k(exact.astype(DTYPES["bf16"]), 6)
    assert (rounded != oracle_top_k(exact, 6)).any(-1).mean() > 0.03
    ids = op("dense_router", top_k=6, implementation=implementation)(x, weight).expert_ids
    assert_same_ids(ids, oracle_top_k(exact, 6), exact, 1e-3)


# Rows between tokens and slots


LAYOUTS = {
    "all on one expert": ([[3, 5]] * 9, 8, {}),
    "an expert twice in a row": ([[2, 2], [0, 1], [1, 1]], 4, {}),
    "experts without tokens": ([[7, 0], [7, 0]], 9, {"align": 4}),
    "no id is valid": ([[-1, 8], [9, -1]], 8, {"align": 16}),
    "tiles larger than groups": ([[0, 1], [2, 1], [0, 3]], 4, {"align": 256}),
    "no capacity": ([[0, 1], [0, 1]], 4, {"capacity": 0}),
    "a capacity of one": ([[0, 1], [0, 1], [0, 0]], 4, {"capacity": 1}),
    "a capacity that all fit in": ([[0, 1], [0, 1], [0, 0]], 4, {"capacity": 4, "align": 2}),
    "no tokens": (np.zeros((0, 2)), 4, {"align": 8}),
    "no choices": (np.zeros((3, 0)), 4, {}),
}


def moved_and_pulled_back(implementation, dispatch):
    """permute and combine with weights and, behind each, its gradients, those of rows and of weights."""
    moved, added = op("permute", implementation=implementation), op("combine", implementation=implementation)

    def run(x, y, weights):
        permuted, pull_permuted = jax.vjp(lambda x, w: moved(x, dispatch, w), x, weights)
        combined, pull_combined = jax.vjp(lambda y, w: added(y, dispatch, w), y, weights)
        return permuted, *pull_permuted(y), combined, *pull_combined(x)

    return run


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_of_moved_rows(name, implementation, rng):
    """With NaN in what is not used: slots of y and of a cotangent, and the rows of tokens that have no slot."""
    ids, num_experts, options = LAYOUTS[name]
    dispatch = lay_out(np.array(ids, np.int32), num_experts, **options)
    slots = len(dispatch.token_index)
    used, routed = dispatch.token_index >= 0, (dispatch.slot >= 0).any(-1)
    x, y = (rng.normal(0, 1, (rows, 24)).astype(np.float32) for rows in (len(routed), slots))
    weights = rng.normal(0, 1, dispatch.slot.shape).astype(np.float32)
    weights[dispatch.slot < 0] = np.nan
    x[~routed], y[~used] = np.nan, np.nan

    got = jax.jit(moved_and_pulled_back(implementation, dispatch))(x, y, weights)
    by_weights = products(x, y, dispatch)
    rows, sums = permute(x, dispatch, weights), combine(y, dispatch, weights)
    for mine, want in zip(got, (rows, sums, by_weights, sums, rows, by_weights), strict=True):
        assert np.isfinite(mine).all()
        np.testing.assert_allclose(mine, want, rtol=1e-5, atol=1e-5)


def dispatches_made_by_hand(rng):
    """Of 40 tokens with 3 choices, in 120 slots, where `token_index` and `slot` contradict each other or themselves."""
    dispatch = lay_out(rng.integers(0, 8, (40, 3)), 8)
    dropped = dispatch._replace(slot=np.where(rng.random((40, 3)) < 0.3, -1, dispatch.slot))
    emptied = dispatch._replace(token_index=np.where(rng.random(120) < 0.3, -1, dispatch.token_index))
    anything = dispatch._replace(
        token_index=rng.integers(-5, 45, 120).astype(np.int32),
        slot=rng.permutation(np.r_[0:110, [-(2**31), 2**31 - 1, 120, -2, -1, 10**6, -7, 121, 500, 150]])
        .reshape(40, 3)
        .astype(np.int32),
    )
    shared = dispatch._replace(slot=np.take_along_axis(dispatch.slot, rng.integers(0, 3, (40, 3)), -1))
    return {"dropped": dropped, "emptied": emptied, "anything": anything, "shared": shared}


@pytest.mark.parametrize("name", dispatches_made_by_hand(np.random.default_rng(0)))
def test_dispatches_made_by_hand(name, implementation, rng):
    """Choices may be dropped in `slot`, which tells both ops, or in `token_index`, which tells permute alone. A token
    may have several choices in one slot, of which the last has it. Equal calls have equal bits, whatever they hold.
    """
    dispatch = dispatches_made_by_hand(rng)[name]
    x, y = (rng.normal(0, 1, (rows, 20)).astype(np.float32) for rows in (40, 120))
    weights = rng.normal(0, 1, (40, 3)).astype(np.float32)

    moved = moved_and_pulled_back(implementation, dispatch)

    @jax.jit
    def run(x, y, weights):
        plain = [op(name, implementation=implementation)(of, dispatch) for name, of in (("permute", x), ("combine", y))]
        return *moved(x, y, weights), *plain

    by_weights = products(x, y, dispatch)
    rows, sums = permute(x, dispatch, weights), combine(y, dispatch, weights)
    want = (rows, sums, by_weights, sums, rows, by_weights, permute(x, dispatch), combine(y, dispatch))
    first, *others = (run(x, y, weights) for _ in range(5))
    for mine, theirs, *again in zip(first, want, *others, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)
        for bits in again:
            np.testing.assert_array_equal(mine, bits)
