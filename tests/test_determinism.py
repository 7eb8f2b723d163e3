"""The same input gives the same bits: in any batch, at every repeat, beside other calls at the same time."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jax_router
from matrix import OF_ALL_TOKENS, OPS, Case
from models import DTYPES, MODELS

# Tokens of a batch. On a GPU with scores to compute, a token has a block, a warp or half of one, by how many there are.
BATCHES = (1, 2, 31, 64, 65, 130, 1100, 4200)


def assert_same_bits(got, want):
    for mine, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        mine, other = np.ascontiguousarray(mine), np.ascontiguousarray(other)
        np.testing.assert_array_equal(mine.view(np.uint8), other.view(np.uint8))


@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-v4-flash", "olmoe"])
def test_a_token_is_routed_alike_in_any_batch(name, rng):
    """In a batch of any size, at another place in it, and with NaN in all other tokens."""
    model = MODELS[name]
    logits, bias = model.logits(rng, max(BATCHES)), model.bias(rng)
    route = jax.jit(partial(jax_router.activation_topk, implementation="native", **model.selection))
    whole = route(logits, bias)
    for size in BATCHES:
        start = max(BATCHES) - size
        assert_same_bits(route(logits[start:], bias), [array[start:] for array in whole])
        poisoned = np.full((size, model.num_experts), np.nan, np.float32)
        poisoned[size // 2] = logits[7]
        assert_same_bits([array[size // 2] for array in route(poisoned, bias)], [array[7] for array in whole])


def test_a_gradient_row_is_the_same_in_any_batch(rng):
    logits, cotangent = rng.normal(0, 1, (130, 64)).astype(np.float32), rng.normal(0, 1, (130, 6)).astype(np.float32)
    ids = rng.integers(-1, 70, (130, 6)).astype(np.int32)

    @jax.jit
    def gradient(logits, ids, cotangent):
        return jax.vjp(lambda x: jax_router.route_at(x, ids).weights, logits)[1](cotangent)[0]

    whole = gradient(logits, ids, cotangent)
    for rows in (slice(0, 1), slice(17, 50), slice(64, 129)):
        assert_same_bits(gradient(logits[rows], ids[rows], cotangent[rows]), whole[rows])


@pytest.mark.parametrize(
    ("rows", "length", "k"), [(4200, 200, 6), (1100, 700, 100), (140, 4096, 512), (140, 40000, 600)]
)
def test_a_row_is_selected_alike_in_any_batch(rows, length, k, rng):
    """On a GPU few and many rows of a length take different kernels; half precision has ties at the k-th place."""
    x = rng.normal(0, 1, (rows, length)).astype(DTYPES["bf16"])
    select = jax.jit(partial(jax_router.topk_select, k=k, implementation="native"))
    whole = select(x)
    for size in (1, 2, 33, rows // 2):
        assert_same_bits(select(x[-size:]), [array[-size:] for array in whole])


@pytest.mark.parametrize("tokens", [5, 100])
def test_dense_router_repeats(tokens, rng):
    """Partial sums that arrive in another order would show here."""
    model = MODELS["deepseek-v4-flash"]
    x = jnp.asarray(rng.normal(0, 1, (tokens, 4096)).astype(DTYPES["bf16"]))
    weight = jnp.asarray(rng.normal(0, 1 / 64, (256, 4096)).astype(DTYPES["bf16"]))
    route = jax.jit(partial(jax_router.dense_router, implementation="native", **model.selection))
    want = route(x, weight)
    for _ in range(20):
        assert_same_bits(route(x, weight), want)


def test_dense_router_looks_at_no_other_token(rng):
    """One program gives a token the same bits whatever the other 63 hold. (In test_dense_router.py: in any batch.)"""
    x = rng.normal(0, 1, (64, 1024)).astype(DTYPES["bf16"])
    weight = rng.normal(0, 1 / 32, (64, 1024)).astype(DTYPES["bf16"])
    route = jax.jit(partial(jax_router.dense_router, top_k=6, implementation="native"))
    whole = route(x, weight)
    poisoned = np.full_like(x, np.nan)
    poisoned[40] = x[40]
    assert_same_bits([array[40] for array in route(poisoned, weight)], [array[40] for array in whole])


def program_of(cases):
    """One program of ops and their gradients in the operand that is one a token, and its operands for 1000 tokens."""
    derivatives = [
        Case(case.call, case.operands, case.floats[:1]).derivative_of(partial(case.call, implementation="native"))
        for case in cases
    ]

    @jax.jit
    def run(operands):
        return [derivative(*values) for derivative, values in zip(derivatives, operands)]

    return run, [case.draw(1000) for case in cases]


def test_all_ops_repeat():
    """Repeats of one compiled program of all ops and their gradients."""
    run, operands = program_of(OPS.values())
    want = run(operands)
    for _ in range(10):
        assert_same_bits(run(operands), want)


def test_calls_that_follow_each_other(rng):
    """Calls of one program that take over each other's scratch memory, and repeats of that program."""
    x = jnp.asarray(rng.normal(0, 1, (200, 64)).astype(np.float32))
    long = jnp.asarray(rng.integers(0, 2000, (2, 100_000)).astype(np.float32))

    @jax.jit
    def run(x, long):
        results = []
        for shift in range(3):
            routing = jax_router.activation_topk(x + shift, top_k=6)
            results += [routing, jax_router.expert_dispatch(routing.expert_ids, 64), jax_router.topk_select(long, 700)]
        return results

    want = run(x, long)
    for _ in range(10):
        assert_same_bits(run(x, long), want)


def test_concurrent_calls(rng):
    """Eight threads call four compiled programs: handlers run at the same time, and share nothing."""
    rows = [jnp.asarray(rng.normal(0, 1, (50 + 30 * i, 256)).astype(np.float32)) for i in range(4)]
    long = [jnp.asarray(rng.normal(0, 1, (1 + i, 70000)).astype(np.float32)) for i in range(4)]

    @jax.jit
    def run(x, long):
        routing = jax_router.activation_topk(x, top_k=6, num_groups=8, top_groups=4)
        return routing, jax_router.expert_dispatch(routing.expert_ids, 256), jax_router.topk_select(long, 1000)

    want = [run(x, row) for x, row in zip(rows, long)]

    def work(thread):
        return [run(rows[(thread + i) % 4], long[(thread + i) % 4]) for i in range(12)]

    with ThreadPoolExecutor(8) as pool:
        for thread, results in enumerate(pool.map(work, range(8))):
            for i, got in enumerate(results):
                assert_same_bits(got, want[(thread + i) % 4])


def test_concurrent_calls_on_every_device(devices):
    """Two threads a device call every op and its gradient: the handlers of all devices run in one process at once."""
    run, operands = program_of(OPS.values())
    placed = [jax.device_put(operands, device) for device in devices]
    want = run(placed[0])

    def work(thread):
        return [run(placed[thread % len(devices)]) for _ in range(5)]

    with ThreadPoolExecutor(2 * len(devices)) as pool:
        for thread, results in enumerate(pool.map(work, range(2 * len(devices)))):
            for got in results:
                assert {leaf.device for leaf in jax.tree.leaves(got)} == {devices[thread % len(devices)]}
                assert_same_bits(got, want)


def test_concurrent_calls_of_a_sharded_program(devices):
    """Each call runs its handlers on all devices at once, and four threads call it."""
    cases = [case for op, case in OPS.items() if not op.startswith(OF_ALL_TOKENS)]  # which exchange something
    run, operands = program_of(cases)
    mesh = jax.make_mesh((len(devices),), ("d",), (AxisType.Auto,), devices=devices)
    whole, rows = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("d",)))
    sharded = [
        [jax.device_put(value, rows if operand.per_token else whole) for value, operand in zip(values, case.operands)]
        for case, values in zip(cases, operands)
    ]
    want = run(sharded)
    assert all(leaf.sharding.is_equivalent_to(rows, leaf.ndim) for leaf in jax.tree.leaves(want))
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda _: run(sharded), range(12)):
            assert_same_bits(got, want)


@pytest.mark.parametrize("hidden", [1000, 2048, 7168])
def test_a_token_is_moved_alike_in_any_batch(hidden, rng):
    """Rows, and sums and products of both gradients, of bf16: few tokens and many take different plans on a GPU."""
    ids = rng.integers(0, 16, (600, 8)).astype(np.int32)
    x, values = (rng.normal(0, 1, shape).astype(DTYPES["bf16"]) for shape in ((600, hidden), (600, 8, hidden)))
    weights = rng.normal(0, 1, (600, 8)).astype(np.float32)

    @jax.jit
    def moved(x, values, ids, weights):
        """What does not depend on the order of the slots, in which a batch is all that counts."""
        dispatch = jax_router.expert_dispatch(ids, 16)
        native = {"implementation": "native"}
        y = jnp.zeros((ids.size, hidden), x.dtype).at[dispatch.slot.reshape(-1)].set(values.reshape(-1, hidden))
        _, pull_permuted = jax.vjp(lambda x, w: jax_router.permute(x, dispatch, w, **native), x, weights)
        combined, pull_combined = jax.vjp(lambda y, w: jax_router.combine(y, dispatch, w, **native), y, weights)
        of_y, of_weights = pull_combined(x)
        return combined, *pull_permuted(y), of_y[dispatch.slot], of_weights

    whole = moved(x, values, ids, weights)
    for rows in (slice(0, 1), slice(17, 81), slice(100, 400)):
        assert_same_bits(moved(x[rows], values[rows], ids[rows], weights[rows]), [array[rows] for array in whole])
