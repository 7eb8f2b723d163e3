"""Tables of experts by token id: distinct experts, balanced loads, the same table every time."""

import jax
import numpy as np
import pytest
from flax import nnx

from jax_router import Router, RouterConfig, make_hash_table

KEY = jax.random.key(0)


def load(table, counts, num_experts):
    """How many tokens each expert gets."""
    result = np.zeros(num_experts)
    np.add.at(result, np.asarray(table).ravel(), np.repeat(counts, table.shape[1]))
    return result


def assert_table(table, vocab_size, num_experts, top_k):
    table = np.asarray(table)
    assert (table.shape, table.dtype) == ((vocab_size, top_k), np.int32)
    assert table.min() >= 0
    assert table.max() < num_experts
    assert (np.diff(np.sort(table, axis=1), axis=1) > 0).all()


SIZES = [(129280, 256, 6), (5000, 384, 6), (1000, 7, 5), (1000, 8, 8), (10, 64, 3), (100, 5, 1), (1, 1, 1), (17, 3, 2)]


@pytest.mark.parametrize(("vocab_size", "num_experts", "top_k"), SIZES)
def test_every_expert_has_as_many_token_ids(vocab_size, num_experts, top_k):
    table = make_hash_table(vocab_size, num_experts, top_k, key=KEY)
    assert_table(table, vocab_size, num_experts, top_k)
    loads = load(table, np.ones(vocab_size), num_experts)
    assert loads.max() - loads.min() <= 1


@pytest.mark.parametrize(("vocab_size", "num_experts", "top_k"), SIZES)
def test_balance_over_counts(vocab_size, num_experts, top_k, rng):
    """No worse than greedy one by one, which is no worse than the mean and the largest count."""
    counts = np.floor(1e6 / rng.permutation(np.arange(1, vocab_size + 1)) ** 1.1)
    table = make_hash_table(vocab_size, num_experts, top_k, key=KEY, token_counts=counts)
    assert_table(table, vocab_size, num_experts, top_k)
    loads = load(table, counts, num_experts)
    assert loads.max() <= max(1.02 * loads.mean(), loads.mean() + 2, counts.max())


def greedy(counts, num_experts, top_k):
    loads = np.zeros(num_experts)
    for count in -np.sort(-counts):
        loads[np.argsort(loads, kind="stable")[:top_k]] += count
    return loads


@pytest.mark.parametrize("kind", ["equal", "uniform", "two kinds", "lognormal"])
def test_as_balanced_as_one_by_one(kind, rng):
    """Rows are filled many at once; the loads are those of the rule that fills them one by one."""
    counts = {
        "equal": np.full(3000, 7.0),
        "uniform": rng.integers(1, 1000, 3000),
        "two kinds": np.r_[np.full(30, 1000), np.ones(2970)],
        "lognormal": rng.lognormal(3, 2, 3000),
    }[kind].astype(np.float64)
    loads = load(make_hash_table(3000, 48, 5, key=KEY, token_counts=counts), counts, 48)
    want = greedy(counts, 48, 5)
    assert loads.max() <= want.max() + 0.01 * want.mean()


def test_token_ids_that_a_text_has_not():
    """They are spread evenly, whatever the others are."""
    counts = np.zeros(3000)
    counts[::3] = 1000 // (1 + np.arange(1000))
    table = np.asarray(make_hash_table(3000, 16, 3, key=KEY, token_counts=counts))
    loads = load(table[counts == 0], np.ones(2000), 16)
    assert loads.max() - loads.min() <= 1


@pytest.mark.parametrize("counts", [None, np.arange(500) % 50])
def test_the_same_table_every_time(counts):
    def make(seed):
        return np.asarray(make_hash_table(500, 16, 3, key=jax.random.key(seed), token_counts=counts))

    np.testing.assert_array_equal(make(1), make(1))
    assert (make(1) != make(2)).any()


def test_progress():
    calls = []
    make_hash_table(200000, 64, 8, key=KEY, token_counts=np.ones(200000), progress=lambda *call: calls.append(call))
    assert len(calls) > 2
    assert calls == sorted(calls)
    assert calls[-1] == (200000, 200000)


def test_as_the_table_of_a_router():
    config = RouterConfig(8, 16, 3, mode="hash", vocab_size=40)
    router = Router(config, rngs=nnx.Rngs(0), hash_lut_init=lambda key, shape, e: make_hash_table(40, e, 3, key=key))
    assert_table(router.hash_lut[...], 40, 16, 3)


def test_a_traced_key():
    with pytest.raises(TypeError, match="key must be known, since the table is made on the host"):
        jax.jit(lambda key: make_hash_table(10, 4, 2, key=key))(KEY)


@pytest.mark.parametrize(
    ("sizes", "counts", "error", "words"),
    [
        ((10, 4, 5), None, ValueError, r"top_k must be between 1 and 4 \(num_experts\), got 5"),
        ((0, 4, 2), None, ValueError, "vocab_size must be at least 1, got 0"),
        ((10, 4.5, 2), None, TypeError, "num_experts must be"),
        ((10, 4, 2), np.ones(9), ValueError, r"token_counts must have shape \(10,\)"),
        ((10, 4, 2), 5 - np.arange(10), ValueError, "token_counts must be finite and 0 or more, got -1.0 at 6"),
        ((10, 4, 2), np.full(10, np.nan), ValueError, "token_counts must be finite and 0 or more, got nan at 0"),
        ((10, 4, 2), ["a"] * 10, TypeError, "token_counts must be numbers"),
    ],
)
def test_wrong_arguments(sizes, counts, error, words):
    with pytest.raises(error, match=words):
        make_hash_table(*sizes, key=KEY, token_counts=counts)


@pytest.mark.parametrize("key", [0, None, np.zeros((2, 2), np.uint32)], ids=str)
def test_what_is_no_key(key):
    with pytest.raises(TypeError, match=r"key must be a key, jax.random.key\(0\) for example, got "):
        make_hash_table(10, 4, 2, key=key)


def test_progress_is_no_function():
    with pytest.raises(TypeError, match="progress must be a function, print for example, got 1"):
        make_hash_table(10, 4, 2, key=KEY, progress=1)
