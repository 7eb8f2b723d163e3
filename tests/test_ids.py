"""Ids, lengths and tables of any integer dtype: they mean the same numbers in all of them, on every implementation.

A narrow dtype cannot hold -1, or the number of experts; a wide one holds numbers that int32 cannot.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jax_router
from jax_router import Router, RouterConfig
from jax_router import reference as plain_reference
from oracle import dispatch, select

DTYPES = ["uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"]


@pytest.fixture(params=["native", "reference", "jax_router.reference"])
def op(request):
    """An op by name: public, on kernels or not, or that of `jax_router.reference` itself."""

    def find(name, **options):
        if request.param == "jax_router.reference":
            return partial(getattr(plain_reference, name), **options)
        return partial(getattr(jax_router, name), implementation=request.param, **options)

    return find


@pytest.fixture(params=DTYPES)
def dtype(request):
    """A dtype, in a test that runs with 64 bits where it has them."""
    with jax.enable_x64(request.param.endswith("64")):
        yield np.dtype(request.param)


def numbers(dtype, *bounds):
    """Ids of a dtype: on both sides of every bound, and its own ends."""
    ends = np.iinfo(dtype)
    near = {number for bound in bounds for number in (bound - 1, bound)} | {
        0,
        1,
        -1,
        ends.min,
        ends.max,
        2**32,
        2**32 + 3,
    }
    return np.array(sorted(n for n in near if ends.min <= n <= ends.max), dtype)


def run_all(calls, operands):
    """What each call makes of its operands, all in one program."""
    return jax.jit(lambda operands: [call(*mine) for call, mine in zip(calls, operands, strict=True)])(operands)


def test_route_at(dtype, op, rng):
    sizes = (5, 200, 256, 300)
    all_ids = [numbers(dtype, size, 128, 256)[None] for size in sizes]
    all_logits = [rng.normal(0, 1, (1, size)).astype(np.float32) for size in sizes]
    call = op("route_at", score_fn="sigmoid", renormalize=False)
    results = run_all([call] * len(sizes), list(zip(all_logits, all_ids)))
    for num_experts, ids, logits, (weights, expert_ids) in zip(sizes, all_ids, all_logits, results):
        valid = (ids.astype(object) >= 0) & (ids.astype(object) < num_experts)
        want = np.where(valid, ids, 0).astype(np.int64)
        assert expert_ids.dtype == np.int32
        np.testing.assert_array_equal(expert_ids, np.where(valid, want, -1))
        scores = 1 / (1 + np.exp(-np.take_along_axis(logits, want, -1)))
        np.testing.assert_allclose(weights, np.where(valid, scores, 0), rtol=1e-5)


def test_token_ids(dtype, op, rng):
    """Of hash_router and scored_hash_router, also with a mask."""
    hashed, scored = op("hash_router"), op("scored_hash_router")

    def routings(logits, ids, table, mask):
        of_each = hashed(ids, table), scored(logits, ids, table), scored(logits, ids, table, token_mask=mask)
        return [routing.expert_ids for routing in of_each]

    operands, wants = [], []
    for vocab_size in (5, 200, 256, 70000):
        table = rng.integers(0, 16, (vocab_size, 2)).astype(np.int32)
        ids = numbers(dtype, vocab_size, 128, 256, 65536)
        valid = (ids.astype(object) >= 0) & (ids.astype(object) < vocab_size)
        want = np.where(valid[:, None], table[np.where(valid, ids, 0).astype(np.int64)], -1)
        mask = np.arange(ids.size) % 2 == 0
        operands.append((rng.normal(0, 1, (ids.size, 16)).astype(np.float32), ids, table, mask))
        wants.append([want, want, np.where(mask[:, None], want, -1)])
    for results, want in zip(run_all([routings] * len(operands), operands), wants, strict=True):
        for mine, other in zip(results, want, strict=True):
            np.testing.assert_array_equal(mine, other)


def test_tables(dtype, op, rng):
    """Entries that int32 can hold pass through hash_router; the others are as invalid as -1, which they become."""
    table = np.stack([numbers(dtype, 16, 128, 256)] * 2, axis=1)
    fits = table.astype(object) < 2**31
    fits &= table.astype(object) >= -(2**31)
    want = np.where(fits, table, 0).astype(np.int64)
    token_ids = np.arange(len(table), dtype=np.int32)
    logits = rng.normal(0, 1, (len(table), 16)).astype(np.float32)

    @jax.jit
    def run(logits, token_ids, table):
        hashed, scored = op("hash_router")(token_ids, table), op("scored_hash_router")(logits, token_ids, table)
        return hashed.expert_ids, scored.expert_ids

    ids, scored_ids = run(logits, token_ids, table)
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(ids, np.where(fits, want, -1))
    np.testing.assert_array_equal(scored_ids, np.where(fits & (want >= 0) & (want < 16), want, -1))


def test_dispatch_and_counts(dtype, op):
    sizes = (5, 200, 256) if dtype.itemsize == 1 else (256,)  # 200 and 256 are around the ends of a byte alone
    all_ids = [numbers(dtype, size, 128, 256)[:, None] for size in sizes]
    dispatched, counted = (
        run_all([op(name, num_experts=size) for size in sizes], [(ids,) for ids in all_ids])
        for name in ("expert_dispatch", "expert_counts")
    )
    for num_experts, ids, *results in zip(sizes, all_ids, dispatched, counted):
        valid = (ids.astype(object) >= 0) & (ids.astype(object) < num_experts)
        want = dispatch(np.where(valid, ids, 0).astype(np.int64) - np.where(valid, 0, 1), num_experts)
        want_counts = np.bincount(ids[valid].astype(np.int64), minlength=num_experts)
        for mine, other in zip(jax.tree.leaves(results), (*want, want_counts), strict=True):
            assert mine.dtype == np.int32
            np.testing.assert_array_equal(mine, other)


def test_group_sizes(dtype):
    """Whose sums a narrow dtype does not hold."""
    sizes = np.array([120, 0, 60, 120], dtype)
    dispatch = jax_router.Dispatch(np.zeros(360, np.int32), np.zeros((180, 2), np.int32), sizes)
    np.testing.assert_array_equal(jax_router.block_experts(dispatch, 60), [0, 0, 2, 3, 3, -1])


def test_lengths(dtype, op, rng):
    lengths = numbers(dtype, 128, 256, 300)
    scores = rng.normal(0, 1, (lengths.size, 300)).astype(np.float32)
    _, indices = jax.jit(op("topk_select", k=290))(scores, lengths=lengths)
    clamped = np.clip(lengths.astype(object), 0, 300).astype(np.int32)
    np.testing.assert_array_equal(indices, select(scores, 290, clamped)[1])


@pytest.mark.parametrize("weights", ["uniform", "scored"])
def test_masked_token_of_a_router(weights, dtype):
    """-1 is no token id of an unsigned dtype: 65535 in uint16, which may be one of the vocabulary."""
    config = RouterConfig(4, 16, 2, mode="hash", vocab_size=70000, hash_weights=weights)
    router = Router(config, rngs=nnx.Rngs(0))
    token_ids = jnp.asarray(np.array([[1, 2, np.iinfo(dtype).max]], dtype))
    routing = router(
        jnp.ones((1, 3, 4), jnp.float32), token_ids=token_ids, token_mask=jnp.array([[True, False, False]])
    )
    np.testing.assert_array_equal(routing.expert_ids[0, 0], router.hash_lut[1])
    np.testing.assert_array_equal(routing.expert_ids[0, 1:], -1)
    np.testing.assert_array_equal(routing.weights[0, 1:], 0)
