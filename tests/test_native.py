"""The native kernels against the oracle: every op, dtype and option.

Where rounding may decide, `activation_topk` and `dense_router` are compared with the reference as well.
"""

import functools
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_router
from cases import EXPERT_COUNTS, ODD_EXPERT_COUNTS, ROWS, TOKEN_COUNTS
from models import DTYPES, MODELS
from moves import MOVES, draw_move
from oracle import (
    assert_rounded,
    assert_routes,
    assert_same_ids,
    assert_same_routing,
    assert_weights,
    combine,
    counts,
    dispatch,
    f64,
    hash_router,
    permute,
    products,
    select,
    selection_keys,
    weights_at,
)


@functools.cache
def native(op, **options):
    """The op on its native kernel, jitted: the same program for calls with the same options and shapes."""
    return jax.jit(partial(getattr(jax_router, op), implementation="native", **options))


def assert_activation_topk(logits, bias=None, *, token_mask=None, rtol=3e-6, **options):
    """The kernel agrees with the reference and with the oracle."""
    reference = jax.jit(partial(jax_router.reference.activation_topk, **options))
    got = native("activation_topk", **options)(logits, bias, token_mask=token_mask)
    want = reference(logits, bias, token_mask=token_mask)
    keys, slack = selection_keys(logits, bias, options["score_fn"], options.get("num_groups", 1))
    assert_same_routing(got, want, keys, slack, 2 * rtol)
    assert_routes(got, logits, bias, token_mask=token_mask, rtol=rtol, **options)


HALF_PRECISION = [
    (name, dtype) for name in ("deepseek-v2", "deepseek-v3", "qwen3-30b-a3b") for dtype in ("bf16", "f16")
]


@pytest.mark.parametrize(("name", "dtype"), [*((name, "f32") for name in MODELS), *HALF_PRECISION])
def test_models(name, dtype, rng):
    model = MODELS[name]
    logits = model.logits(rng, 2, 65, dtype=DTYPES[dtype])
    assert_activation_topk(logits, model.bias(rng), token_mask=rng.random((2, 65)) < 0.8, **model.selection)


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("score_fn", ["sqrtsoftplus", "sigmoid", "softmax"])
def test_scores(score_fn, renormalize, rng):
    """Logits so wide that the difference of two, in a softmax, is rounded by 4e-6."""
    logits = rng.normal(0, 30, (200, 64)).astype(np.float32)
    options = {"score_fn": score_fn, "renormalize": renormalize, "scale": 0.5}
    assert_activation_topk(logits, top_k=6, rtol=1e-5 if score_fn == "softmax" else 3e-6, **options)


@pytest.mark.parametrize("group_score", ["top2_sum", "max"])
@pytest.mark.parametrize(
    ("num_experts", "num_groups", "top_groups", "top_k"),
    [(8, 4, 2, 3), (60, 6, 5, 7), (96, 3, 1, 32), (256, 8, 8, 8), (512, 64, 3, 11), (1024, 2, 1, 64)],
)
def test_groups(num_experts, num_groups, top_groups, top_k, group_score, rng):
    logits = rng.normal(0, 2, (40, num_experts)).astype(np.float32)
    bias = rng.normal(0, 0.5, num_experts).astype(np.float32)
    groups = {"num_groups": num_groups, "top_groups": top_groups, "group_score": group_score}
    assert_activation_topk(logits, bias, top_k=top_k, score_fn="sigmoid", **groups)


@pytest.mark.parametrize("rows", [2900, 4200])  # few and many
def test_groups_that_are_hard_to_tell_apart(rows, rng):
    """Equal groups, groups apart by rounding alone, groups without eligible experts, far and infinite biases, NaN."""
    model = MODELS["deepseek-v3"]
    logits = model.logits(rng, 4200)
    logits[:600] = np.tile(logits[:600, :32], 8)  # all groups are equal
    logits[600:1200, 32:64] = logits[600:1200, :32]  # two are
    logits[1200:1800, 128:160] = logits[1200:1800, :32] * (1 + 1e-6 * rng.normal(size=(600, 32)))
    logits[1800:1803, 7] = np.nan
    bias = np.tile(rng.normal(0, 0.1, 256).astype(np.float32), (4200, 1))
    bias[:1800] = np.tile(bias[:1800, :32], 8)
    bias[2000:2400, rng.permutation(256)[:128]] = -1e5
    bias[2400:2800, :96] = -np.inf
    bias[2800:2850, 50] = 1e4
    bias[2850:2900, 10::32] = np.inf  # in every group
    assert_activation_topk(logits[:rows], bias[:rows], **model.selection)


@pytest.mark.parametrize("top_groups", [1, 3])
def test_groups_without_bias(top_groups, rng):
    logits = rng.normal(0, 2, (64, 48)).astype(np.float32)
    assert_activation_topk(logits, top_k=4, score_fn="sqrtsoftplus", num_groups=6, top_groups=top_groups)


def test_one_bias_a_token(rng):
    logits = rng.normal(0, 2, (3, 20, 72)).astype(np.float32)
    bias = rng.normal(0, 1, (3, 20, 72)).astype(np.float32)
    assert_activation_topk(logits, bias, top_k=5, score_fn="sigmoid")


@pytest.mark.parametrize("num_experts", [*EXPERT_COUNTS, *ODD_EXPERT_COUNTS, 2048, 4096])
def test_expert_counts(num_experts, rng):
    """Exact ids: the keys are the logits."""
    route = native("activation_topk", top_k=min(6, num_experts))
    logits = rng.normal(0, 2, (17, num_experts)).astype(np.float32)
    assert_routes(route(logits), logits, top_k=min(6, num_experts), score_fn="sqrtsoftplus")


@pytest.mark.parametrize("tokens", [*TOKEN_COUNTS, 1000])
def test_token_counts(tokens, rng):
    route = native("activation_topk", top_k=6)
    logits = rng.normal(0, 2, (tokens, 256)).astype(np.float32)
    assert_routes(route(logits), logits, top_k=6, score_fn="sqrtsoftplus")


@pytest.mark.parametrize("top_k", [1, 2, 3, 5, 9, 12, 16, 33, 64])
def test_top_k(top_k, rng):
    route = native("activation_topk", top_k=top_k, score_fn="sigmoid")
    logits = rng.normal(0, 2, (33, 100)).astype(np.float16)
    assert_routes(route(logits), logits, top_k=top_k, score_fn="sigmoid")


def test_more_than_two_batch_axes(rng):
    logits = rng.normal(0, 2, (2, 3, 1, 5, 24)).astype(np.float32)
    assert_activation_topk(logits, top_k=3, score_fn="softmax", token_mask=rng.random((2, 3, 1, 5)) < 0.5)


def test_one_row_without_batch_axes(rng):
    assert_activation_topk(rng.normal(0, 2, 24).astype(np.float32), top_k=3, score_fn="sigmoid")


@pytest.mark.parametrize(
    ("score_fn", "renormalize", "dtype"),
    [
        *itertools.product(["sqrtsoftplus", "sigmoid", "softmax"], [True, False], ["f32"]),
        *itertools.product(["softmax"], [True, False], ["bf16", "f16"]),
    ],
)
def test_route_at(score_fn, renormalize, dtype, rng):
    route = native("route_at", score_fn=score_fn, renormalize=renormalize, scale=2.0)
    logits = rng.normal(0, 3, (65, 40)).astype(DTYPES[dtype])
    ids = rng.integers(-3, 44, (65, 6)).astype(np.int32)
    weights, valid_ids = route(logits, ids)
    np.testing.assert_array_equal(valid_ids, np.where((ids >= 0) & (ids < 40), ids, -1))
    assert_weights(weights, weights_at(logits, ids, score_fn, renormalize, 2.0), rtol=6e-6)


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("score_fn", ["sqrtsoftplus", "sigmoid", "softmax"])
def test_scored_hash_router(score_fn, renormalize, rng):
    """Token ids and entries of the table out of range among the others, and masked tokens that hold NaN."""
    route = native("scored_hash_router", score_fn=score_fn, renormalize=renormalize, scale=2.0)
    logits = rng.normal(0, 3, (5, 13, 40)).astype(np.float32)
    token_ids = rng.integers(-3, 33, (5, 13)).astype(np.int32)
    table = rng.integers(-1, 42, (30, 6)).astype(np.int32)
    mask = rng.random((5, 13)) < 0.8
    logits[~mask] = np.nan
    weights, expert_ids = route(logits, token_ids, table, token_mask=mask)
    known = (token_ids >= 0) & (token_ids < 30) & mask
    ids = np.where(known[..., None], table[np.where(known, token_ids, 0)], -1)
    np.testing.assert_array_equal(expert_ids, np.where((ids >= 0) & (ids < 40), ids, -1))
    logits[~mask] = 0
    assert_weights(weights, weights_at(logits, ids, score_fn, renormalize, 2.0), rtol=6e-6)


@pytest.mark.parametrize("sorted", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ROWS)
def test_topk_select(name, dtype, sorted, rng):
    """Against the exact order: half precision has many ties in a long row."""
    rows, length, k = ROWS[name]
    x = rng.normal(0, 1, (rows, length)).astype(DTYPES[dtype])
    values, indices = native("topk_select", k=k, sorted=sorted)(x)
    want_values, want_indices = select(x, k, sorted=sorted)
    assert_same_ids(indices, want_indices, f64(x))
    assert values.dtype == x.dtype
    np.testing.assert_array_equal(f64(values), f64(want_values))


@pytest.mark.parametrize("sorted", [True, False])
@pytest.mark.parametrize(("length", "k"), [(300, 10), (700, 60), (3001, 90), (5000, 700), (9000, 600)])
def test_topk_select_lengths(length, k, sorted, rng):
    x = rng.integers(-50, 50, (2, 8, length)).astype(np.float32)
    lengths = rng.integers(-2, length + 2, (2, 8)).astype(np.int32)
    lengths[0, :4] = [0, k - 1, k, k + 1]
    results = native("topk_select", k=k, sorted=sorted)(x, lengths=lengths)
    for got, want in zip(results, select(x, k, lengths, sorted)):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("tokens", "k", "num_experts"),
    [(1, 1, 1), (1, 6, 256), (65, 8, 7), (1000, 6, 256), (5000, 2, 1023), (4096, 8, 4096)],
)
def test_expert_dispatch(tokens, k, num_experts, rng):
    ids = rng.integers(-1, num_experts + 1, (tokens, k)).astype(np.int32)
    assert_dispatch(ids, num_experts)


def assert_dispatch(ids, num_experts, **layout):
    got = native("expert_dispatch", num_experts=num_experts, **layout)(ids)
    for mine, want in zip(got, dispatch(ids, num_experts, **layout), strict=True):
        assert mine.dtype == jnp.int32
        np.testing.assert_array_equal(mine, want, err_msg=str(layout))


LAYOUTS = list(itertools.product((1, 16, 64, 128, 256, 100), (None, 0, 1, 37, 512)))


@pytest.mark.parametrize(
    ("tokens", "num_experts"), [(1, 256), (300, 256), (300, 1), (4096, 256), (9000, 36), (9000, 4096), (70000, 64)]
)
def test_expert_dispatch_in_tiles_and_within_a_capacity(tokens, num_experts, rng):
    """At sizes that every kernel has its part of, with loads from none to all of the capacity."""
    ids = np.minimum(rng.geometric(min(4 / num_experts, 1), (tokens, 6)) - 2, num_experts).astype(np.int32)
    for align, capacity in LAYOUTS:
        assert_dispatch(ids, num_experts, align=align, capacity=capacity)


def test_expert_dispatch_of_several_sorts_in_tiles(rng):
    ids = rng.integers(-1, 37, (3, 50, 4)).astype(np.int32)
    for align, capacity in LAYOUTS:
        layout = {"align": align, "capacity": capacity}
        got = jax.vmap(native("expert_dispatch", num_experts=36, **layout))(ids)
        for one, *mine in zip(ids, *got):
            for leaf, want in zip(mine, dispatch(one, 36, **layout)):
                np.testing.assert_array_equal(leaf, want, err_msg=str(layout))


def test_expert_dispatch_of_one_expert_and_none(rng):
    sort = native("expert_dispatch", num_experts=64)
    for ids in (np.full((700, 4), 63), np.full((700, 4), -1), np.full((700, 4), 64)):
        for got, want in zip(sort(ids.astype(np.int32)), dispatch(ids, 64)):
            np.testing.assert_array_equal(got, want)


def test_expert_dispatch_takes_all_leading_axes_for_tokens(rng):
    ids = rng.integers(0, 9, (3, 4, 5, 2)).astype(np.int32)
    for got, want in zip(jax_router.expert_dispatch(jnp.asarray(ids), 9), dispatch(ids, 9)):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("tokens", "k", "num_experts"),
    [
        (1, 1, 1),
        (1, 6, 256),
        (65, 7, 7),
        (1001, 3, 256),
        (5000, 2, 1023),
        (4096, 8, 4096),
        (65536, 6, 256),
        (99999, 9, 36),
    ],
)
def test_counts_of_experts(tokens, k, num_experts, masked, rng):
    ids = rng.integers(-1, num_experts + 1, (tokens, k)).astype(np.int32)
    mask = rng.random(tokens) < 0.7 if masked else None
    got = native("expert_counts", num_experts=num_experts)(ids, token_mask=mask)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, counts(ids, num_experts, mask))


@pytest.mark.parametrize("tokens", [5, 1001, 60001])
def test_counts_of_experts_in_several_problems(tokens, rng):
    """Of which the second does not begin where the kernel's loads are aligned."""
    ids, mask = rng.integers(-1, 37, (3, tokens, 3)).astype(np.int32), rng.random((3, tokens)) < 0.5
    got = jax.vmap(lambda ids, mask: native("expert_counts", num_experts=36)(ids, token_mask=mask))(ids, mask)
    np.testing.assert_array_equal(got, [counts(*one, mask) for one, mask in zip(zip(ids, [36] * 3), mask)])


@pytest.mark.parametrize(("vocab", "k", "tokens"), [(1, 1, (1,)), (1000, 6, (7, 33)), (129280, 6, (4096,))])
def test_hash_router(vocab, k, tokens, rng):
    lut = rng.integers(0, 256, (vocab, k)).astype(np.int32)
    token_ids = rng.integers(-2, vocab + 2, tokens).astype(np.int32)
    for got, want in zip(native("hash_router", scale=1.5)(token_ids, lut), hash_router(token_ids, lut, scale=1.5)):
        np.testing.assert_array_equal(got, want)


def test_hash_router_of_one_token():
    routing = jax_router.hash_router(jnp.int32(2), jnp.arange(12, dtype=jnp.int32).reshape(4, 3))
    np.testing.assert_array_equal(routing.expert_ids, [6, 7, 8])


DENSE_TOKENS = (1, 8, 17, 64, 65, 200)


@pytest.mark.parametrize("tokens", DENSE_TOKENS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_router(dtype, tokens, rng):
    """Integer operands make the logits exact in any order of summation, and the ids with them; ties are common."""
    x = rng.integers(-3, 4, (tokens, 256)).astype(DTYPES[dtype])
    weight = rng.integers(-3, 4, (64, 256)).astype(DTYPES[dtype])
    logit_bias = rng.integers(-9, 10, 64).astype(np.float32)
    mask = rng.random(tokens) < 0.9
    got = native("dense_router", top_k=6, score_fn="sigmoid")(x, weight, logit_bias=logit_bias, token_mask=mask)
    logits = f64(x) @ f64(weight).T + logit_bias
    assert_routes(got, logits + 0.0, token_mask=mask, top_k=6, score_fn="sigmoid")


@pytest.mark.parametrize("tokens", [1, 64, 65, 128, 200])
@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-v4-pro", "gpt-oss-120b", "mixtral-8x7b"])
def test_dense_router_of_models(name, tokens, rng):
    """bf16 with random operands, at the models' own sizes: float32 sums of another order, so close keys may swap."""
    model = MODELS[name]
    dtype = DTYPES["bf16"]
    x = rng.normal(0, 1, (tokens, model.hidden_size)).astype(dtype)
    weight = rng.normal(0, model.hidden_size**-0.5, (model.num_experts, model.hidden_size)).astype(dtype)
    logit_bias = rng.normal(0, 1, model.num_experts).astype(np.float32) if model.has_logit_bias else None
    bias = model.bias(rng)
    got = native("dense_router", **model.selection)(x, weight, bias, logit_bias=logit_bias)
    logits = f64(x) @ f64(weight).T + (0 if logit_bias is None else logit_bias)
    reference = jax.jit(partial(jax_router.reference.activation_topk, **model.selection))
    want = reference(logits.astype(np.float32), bias)
    keys, slack = selection_keys(logits, bias, model.score_fn, model.num_groups)
    assert_same_routing(got, want, keys, slack + 1e-4, rtol=1e-4)


def test_dense_router_multiplies_float32_to_float32_accuracy(rng):
    """TF32, or bf16 in one pass, would be wrong by 1e-3."""
    x = rng.normal(0, 1, (40, 500)).astype(np.float32)
    weight = rng.normal(0, 1, (16, 500)).astype(np.float32)
    got = native("dense_router", top_k=16, score_fn="sigmoid", renormalize=False)(x / 20, weight)
    logits = f64(x / 20) @ f64(weight).T
    assert_weights(got.weights, np.sort(1 / (1 + np.exp(-logits)), axis=-1)[:, ::-1], rtol=1e-5)


@pytest.mark.parametrize("hidden", [0, 1, 7, 63, 100, 1000])
def test_dense_router_of_any_hidden_size(hidden, rng):
    x = rng.integers(1, 4, (3, 5, hidden)).astype(DTYPES["bf16"])  # a product of a zero may be -0
    weight = rng.integers(1, 4, (30, hidden)).astype(DTYPES["bf16"])
    route = native("dense_router", top_k=3)
    assert_routes(route(x, weight), f64(x) @ f64(weight).T, top_k=3, score_fn="sqrtsoftplus")


def test_auto_falls_back_where_no_kernel_can_run(rng):
    """More experts and choices than the kernels take."""
    logits = rng.normal(0, 1, (2, 5000)).astype(np.float32)
    assert_routes(jax_router.activation_topk(logits, top_k=6), logits, top_k=6, score_fn="sqrtsoftplus")
    many = jax_router.activation_topk(logits[:, :200], top_k=100, score_fn="sigmoid")
    assert_routes(many, logits[:, :200], top_k=100, score_fn="sigmoid")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MOVES)
def test_permute_and_combine(name, dtype, rng):
    dispatch, x, y, weights = draw_move(rng, name, DTYPES[dtype])
    for its_weights in (None, weights):
        assert_rounded(native("permute")(x, dispatch, its_weights), permute(x, dispatch, its_weights))
        assert_rounded(native("combine")(y, dispatch, its_weights), combine(y, dispatch, its_weights))


def pulled_back(function, grad, *operands):
    return jax.jit(lambda grad, *operands: jax.vjp(function, *operands)[1](grad))(grad, *operands)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MOVES)
def test_cotangents_of_permute_and_combine(name, dtype, rng):
    """NaN in unused slots, of y and of cotangents, reaches none of them."""
    dispatch, x, y, weights = draw_move(rng, name, DTYPES[dtype])
    (grad,) = pulled_back(partial(native("permute"), dispatch=dispatch), y, x)
    assert_rounded(grad, combine(y, dispatch))
    of_x, of_weights = pulled_back(lambda x, w: native("permute")(x, dispatch, w), y, x, weights)
    assert_rounded(of_x, combine(y, dispatch, weights))
    assert_rounded(of_weights, products(x, y, dispatch), slack=1e-5)
    (grad,) = pulled_back(partial(native("combine"), dispatch=dispatch), x, y)
    assert_rounded(grad, permute(x, dispatch))
    of_y, of_weights = pulled_back(lambda y, w: native("combine")(y, dispatch, w), x, y, weights)
    assert_rounded(of_y, permute(x, dispatch, weights))
    assert_rounded(of_weights, products(x, y, dispatch), slack=1e-5)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("hidden", [1, 24, 64])
def test_permute_copies_any_bits(hidden, dtype, rng):
    """NaN of any kind, and zeros of both signs."""
    dispatch = draw_move(rng, "tiles", np.float32)[0]
    dtype = jnp.dtype(dtype)
    x = rng.integers(0, 256, (100, hidden * dtype.itemsize), np.uint8).view(dtype)
    got = np.asarray(native("permute")(x, dispatch)).view(np.uint8)
    want = np.zeros((len(dispatch.token_index), hidden * dtype.itemsize), np.uint8)
    used = dispatch.token_index >= 0
    want[used] = x.view(np.uint8)[dispatch.token_index[used]]
    np.testing.assert_array_equal(got, want)


def test_tokens_of_several_axes(rng):
    dispatch, x, y, weights = draw_move(rng, "tiles", np.float32)
    shaped = dispatch._replace(slot=dispatch.slot.reshape(5, 2, 10, 6))
    of_x, of_weights = x.reshape(5, 2, 10, -1), weights.reshape(5, 2, 10, 6)
    np.testing.assert_array_equal(native("permute")(of_x, shaped, of_weights), native("permute")(x, dispatch, weights))
    combined = native("combine")(y, shaped, of_weights)
    np.testing.assert_array_equal(combined, native("combine")(y, dispatch, weights).reshape(of_x.shape))
    one = dispatch._replace(slot=dispatch.slot[3])
    np.testing.assert_array_equal(native("combine")(y, one), native("combine")(y, dispatch)[3])
