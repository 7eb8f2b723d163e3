"""The examples compute what they say, with the collectives and the memory that they say."""

import subprocess
import sys
from functools import partial

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_router
from matrix import assert_close
from programs import EXAMPLES, load_example


@pytest.fixture(autouse=True)
def ranks_as_users_have_them():
    """The examples are programs of users, who need not spell out ranks as the package does."""
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def expert_parallel(devices):
    """The example, a mesh, and tokens and weights on it."""
    example = load_example("expert_parallel")
    mesh = jax.make_mesh((len(devices),), (example.AXIS,), (jax.sharding.AxisType.Auto,), devices=devices)
    weights = example.random_weights(jax.random.key(0), 16, 8, 12)
    x = jax.random.normal(jax.random.key(1), (64, 8))
    with jax.default_matmul_precision("highest"):
        yield example, mesh, example.shard(x, weights, mesh)


@pytest.mark.parametrize(
    ("way", "forward", "backward"),
    [
        ("gather", {"all-gather": 2, "reduce-scatter": 1}, {"all-gather": 1, "reduce-scatter": 2, "all-reduce": 1}),
        ("exchange", {"all-to-all": 3}, {"all-to-all": 3, "all-reduce": 1}),
    ],
)
def test_expert_parallel_is_the_dense_layer(way, forward, backward, expert_parallel):
    """Results, routing and gradients; the shared weight's gradient is summed beside what the ways move."""
    example, mesh, operands = expert_parallel

    def gradient(layer):
        def loss(x, weights):
            y, routing = layer(x, weights, top_k=3)
            return (y**2).sum(), (y, routing)

        return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True)).lower(*operands).compile()

    layer = partial(example.expert_parallel, mesh=mesh, way=way)
    compiled = gradient(layer)
    assert_close(compiled(*operands), gradient(example.dense)(*operands), rtol=1e-4, atol=1e-5)
    collectives, memory = example.cost(compiled)
    assert_at_most(collectives, {kind: forward.get(kind, 0) + backward.get(kind, 0) for kind in forward | backward})
    collectives, less_memory = example.cost(jax.jit(partial(layer, top_k=3)).lower(*operands).compile())
    assert_at_most(collectives, forward)
    assert 0 < less_memory < memory


def assert_at_most(collectives, limits):
    """These kinds; XLA may combine some of a kind."""
    assert collectives.keys() == limits.keys()
    assert all(collectives[kind] <= limit for kind, limit in limits.items())


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_two_processes_train_as_one_does(platform):
    """Real processes, with gloo or NCCL between them."""
    if platform == "cuda" and (jax.default_backend() != "gpu" or jax.local_device_count() < 2):
        pytest.skip(f"needs two GPUs; this machine has {jax.local_device_count()} devices: {jax.local_devices()[0]}")
    run = [sys.executable, EXAMPLES / "two_processes.py", "--platform", platform]
    printed = subprocess.run(run, capture_output=True, text=True)
    assert printed.returncode == 0, printed.stderr
    assert "20 of 20 shards" in printed.stdout


@pytest.fixture
def sharded_selection(devices):
    example = load_example("sharded_selection")
    return example, jax.make_mesh((len(devices),), (example.AXIS,), (jax.sharding.AxisType.Auto,), devices=devices)


@pytest.mark.parametrize("k", [1, 5, 40])
def test_topk_over_shards(k, sharded_selection, rng):
    """Rows with many ties, of which a shard has fewer than 40 entries, and NaN."""
    example, mesh = sharded_selection
    scores = rng.integers(0, 20, (6, 64)).astype(np.float32)
    scores[0], scores[1, ::7] = 3, np.nan
    merged = example.over_shards(partial(example.topk_over_shards, k=k), mesh, P(None, example.AXIS))
    assert_close(merged(scores), jax.jit(partial(jax_router.topk_select, k=k))(scores), rtol=0, atol=0)


def test_route_over_shards(sharded_selection, rng):
    """With ties at the k-th place; the gradient is that of the op."""
    example, mesh = sharded_selection
    logits, bias = rng.integers(-2, 3, (32, 64)).astype(np.float32), rng.integers(0, 2, 64).astype(np.float32)
    specs = P(None, example.AXIS), P(example.AXIS)

    def gradient(route):
        def loss(logits):
            routing = route(logits, bias)
            return (routing.weights**2).sum(), routing

        return jax.jit(jax.grad(loss, has_aux=True))(logits)

    merged = example.over_shards(partial(example.route_over_shards, top_k=6), mesh, *specs)
    assert_close(gradient(merged), gradient(partial(jax_router.activation_topk, top_k=6)))


def test_sparse_attention_selects_as_a_sort_does():
    """While the cache grows past k: the same sets of keys, so the same tokens but for the order of the sums."""
    example = load_example("sparse_attention")
    state = example.random_state(jax.random.key(0), capacity=64, length=3, size=16, heads=2, index_size=8)
    native, by_sort = (
        jax.jit(partial(example.decode, select, 8, 12))(*state)[1]
        for select in (example.select_native, example.select_by_sort)
    )
    np.testing.assert_allclose(native, by_sort, rtol=1e-4, atol=1e-5)
    scores = jax.random.normal(jax.random.key(1), (64,))
    for length in (0, 5, 8, 40):
        places = np.asarray(example.select_native(scores, np.int32(length), 8))
        assert set(places) == set(np.asarray(example.select_by_sort(scores, length, 8)))
