"""Arbitrary values, NaN of both signs, infinities, ties, denormals and zeros of both signs among them."""

from functools import partial

import jax
import ml_dtypes
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

import jax_router
from oracle import (
    assert_same_routing,
    counts,
    dispatch,
    expert_ids,
    f64,
    hash_router,
    select,
    selection_keys,
    weights_at,
)

# Few shapes and options, as each pair compiles; the values are what matters.
DTYPES = st.sampled_from([np.float32, ml_dtypes.bfloat16, np.float16])
SPECIAL = np.array(
    [0.0, -0.0, np.inf, -np.inf, np.nan, -np.nan, 1e-45, -1e-45, 1, -1, np.nextafter(1, 2), 3.4e38, -3.4e38, -17, 88.5],
    np.float32,
)


@st.composite
def arrays(draw, shape, dtype=np.float32, special=True):
    """A mixture: numbers of one magnitude, small integers that tie, arbitrary bits, and special values."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kinds = [
        rng.normal(0, draw(st.sampled_from([1e-3, 1.0, 20.0, 100.0])), shape).astype(np.float32),
        rng.integers(-2, 3, shape).astype(np.float32),
        np.full(shape, rng.normal(), np.float32),
    ]
    if special:
        kinds.append(rng.integers(0, 2**32, shape, dtype=np.uint32).view(np.float32))
        kinds.append(rng.choice(SPECIAL, shape))
    weights = np.array(draw(st.lists(st.sampled_from([0, 1, 8]), min_size=len(kinds), max_size=len(kinds)))) + 1e-3
    which = rng.choice(len(kinds), shape, p=weights / weights.sum())
    with np.errstate(all="ignore"):
        return np.choose(which, kinds).astype(dtype)


COMPILED = {}


def jitted(op, **options):
    key = (op, *sorted(options.items()))
    return COMPILED.setdefault(key, jax.jit(partial(getattr(jax_router, op), **options)))


def topk_select(k, sorted):
    return jitted("topk_select", k=k, sorted=sorted, implementation="native")


@given(st.data())
def test_topk_select_is_exact(data):
    shape, k = data.draw(st.sampled_from([((6, 33), 5), ((6, 33), 33), ((3, 2000), 100), ((1, 20000), 700)]))
    x = data.draw(arrays(shape, data.draw(DTYPES)))
    sorted = data.draw(st.booleans())
    values, indices = topk_select(k, sorted)(x)
    want_values, want_indices = select(x, k, sorted=sorted)
    np.testing.assert_array_equal(indices, want_indices)
    np.testing.assert_array_equal(f64(values), f64(want_values))


@given(st.data())
def test_topk_select_with_lengths_is_exact(data):
    x = data.draw(arrays((8, 300), data.draw(DTYPES)))
    lengths = np.array(data.draw(st.lists(st.integers(-5, 310), min_size=8, max_size=8)), np.int32)
    values, indices = topk_select(20, True)(x, lengths=lengths)
    want_values, want_indices = select(x, 20, lengths)
    np.testing.assert_array_equal(indices, want_indices)
    np.testing.assert_array_equal(f64(values), f64(want_values))


ROUTES = st.sampled_from(
    [
        {"top_k": 4, "score_fn": "sqrtsoftplus"},
        {"top_k": 4, "score_fn": "sigmoid", "scale": 2.5},
        {"top_k": 1, "score_fn": "softmax", "renormalize": False},
        {"top_k": 8, "score_fn": "softmax"},
        {"top_k": 5, "score_fn": "sigmoid", "num_groups": 8, "top_groups": 3},
        {"top_k": 3, "score_fn": "sqrtsoftplus", "num_groups": 4, "top_groups": 2, "group_score": "max"},
    ]
)


@given(st.data())
def test_selection_without_bias_is_exact(data):
    """The keys are the logits: exact, whatever they are."""
    options = data.draw(ROUTES.filter(lambda options: "num_groups" not in options))
    logits = data.draw(arrays((10, 40), data.draw(DTYPES)))
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=10, max_size=10)))
    _, ids = jitted("activation_topk", implementation="native", **options)(logits, token_mask=mask)
    want = np.where(mask[:, None], expert_ids(logits, None, options["top_k"], options["score_fn"]), -1)
    np.testing.assert_array_equal(ids, want)


@given(st.data())
def test_native_and_reference_agree(data):
    """Weights and ids, with a bias, also where scores are NaN, infinite or underflow; masked rows hold anything."""
    options = data.draw(ROUTES)
    logits = data.draw(arrays((10, 40), data.draw(DTYPES)))
    bias = data.draw(st.one_of(arrays((40,), special=False), arrays((10, 40), special=False)))
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=10, max_size=10)))
    got, want = (
        jitted("activation_topk", implementation=implementation, **options)(logits, bias, token_mask=mask)
        for implementation in ("native", "reference")
    )
    keys, slack = selection_keys(logits, bias, options["score_fn"], options.get("num_groups", 1))
    assert_same_routing(got, want, keys, slack, rtol=1e-5, atol=1e-12)


@given(st.data())
def test_every_routing_is_well_formed(data):
    """k distinct ids in range in every row, and weights that are what route_at says."""
    options = data.draw(ROUTES)
    logits = data.draw(arrays((10, 40), data.draw(DTYPES)))
    bias = data.draw(arrays((40,)))
    weights, ids = jitted("activation_topk", implementation="native", **options)(logits, bias)
    ids = np.asarray(ids)
    assert ids.min() >= 0
    assert ids.max() < 40
    assert (np.diff(np.sort(ids, axis=-1), axis=-1) > 0).all()
    scoring = {name: options[name] for name in ("score_fn", "renormalize", "scale") if name in options}
    again = jitted("route_at", implementation="native", **scoring)(logits, ids)
    np.testing.assert_array_equal(weights, again.weights)


@given(st.data())
def test_route_at(data):
    score_fn = data.draw(st.sampled_from(["sqrtsoftplus", "sigmoid", "softmax"]))
    renormalize = data.draw(st.booleans())
    logits = data.draw(arrays((12, 40), special=False))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    ids = np.where(rng.random((12, 4)) < 0.7, rng.integers(-2, 42, (12, 4)), rng.integers(-(2**31), 2**31, (12, 4)))
    ids = ids.astype(np.int32)
    route = jitted("route_at", score_fn=score_fn, renormalize=renormalize, implementation="native")
    weights, valid = route(logits, ids)
    np.testing.assert_array_equal(valid, np.where((ids >= 0) & (ids < 40), ids, -1))
    want = weights_at(logits, ids, score_fn, renormalize, 1.0)
    np.testing.assert_allclose(f64(weights), want, rtol=2e-5, atol=1e-12)


@given(st.data())
def test_expert_counts(data):
    tokens, k, num_experts = data.draw(st.sampled_from([(1, 6, 4), (40, 3, 16), (700, 8, 130)]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    spread = data.draw(st.sampled_from([1, num_experts + 2, 2**31]))
    ids = rng.integers(-1 if spread > 1 else 0, spread, (tokens, k)).astype(np.int32)
    mask = rng.random(tokens) < data.draw(st.sampled_from([0, 0.5, 1]))
    got = jitted("expert_counts", num_experts=num_experts)(ids, token_mask=mask)
    np.testing.assert_array_equal(got, counts(ids, num_experts, mask))


@given(st.data())
def test_expert_dispatch(data):
    tokens, k, num_experts = data.draw(st.sampled_from([(1, 6, 4), (40, 3, 16), (700, 8, 130)]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    spread = data.draw(st.sampled_from([1, num_experts + 2, 2**31]))
    ids = rng.integers(-1 if spread > 1 else 0, spread, (tokens, k)).astype(np.int32)
    layout = data.draw(st.sampled_from([{}, {"align": 16}, {"capacity": 3}, {"align": 7, "capacity": 20}]))
    sort = jitted("expert_dispatch", num_experts=num_experts, **layout)
    for got, want in zip(sort(ids), dispatch(ids, num_experts, **layout), strict=True):
        np.testing.assert_array_equal(got, want)


@given(st.data())
def test_hash_router(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    lut = rng.integers(-(2**31), 2**31, (20, 3)).astype(np.int32)
    token_ids = np.where(rng.random(30) < 0.7, rng.integers(-1, 21, 30), rng.integers(-(2**31), 2**31, 30))
    token_ids = token_ids.astype(np.int32)
    for got, want in zip(jitted("hash_router", implementation="native")(token_ids, lut), hash_router(token_ids, lut)):
        np.testing.assert_array_equal(got, want)
