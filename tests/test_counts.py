"""A router's counts of its experts, and the bias that follows them: over calls, layers, devices and recomputation."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_router import ExpertCounts, MoE, Router, RouterConfig, update_selection_biases

D, E, K, L = 8, 8, 2, 3
CONFIG = RouterConfig(D, E, K, score_fn="sigmoid", count_experts=True)
HASH = RouterConfig(D, E, K, mode="hash", vocab_size=9, count_experts=True)
RATE = 0.25  # exact in f32


def counts_of(expert_ids):
    ids = np.asarray(expert_ids)
    return np.bincount(ids[ids >= 0], minlength=E)


def stepped(bias, counts):
    return bias + np.float32(RATE) * np.sign(counts.mean(-1, keepdims=True) - counts).astype(np.float32)


def draw(rng, *leading):
    return jnp.asarray(rng.normal(0, 1, (*leading, D)) + 1, jnp.float32)


def make_layer():
    init = nnx.initializers.constant(0.5)  # compiles little
    return MoE(Router(CONFIG, rngs=nnx.Rngs(0)), 4, kernel_init=init, rngs=nnx.Rngs(0))


@pytest.fixture
def router():
    return Router(CONFIG, rngs=nnx.Rngs(0))


def test_counts_of_calls(router, rng):
    """Every call adds; masked tokens do not count, replayed experts do; nothing counts in evaluation."""
    x, mask = draw(rng, 4, 6), jnp.asarray(rng.random((4, 6)) < 0.6)
    ids = router(x, token_mask=mask).expert_ids
    assert isinstance(router.counts, ExpertCounts)
    np.testing.assert_array_equal(router.counts[...], counts_of(ids))
    replayed = jnp.full((4, 6, K), 3, jnp.int32).at[..., 1].set(-1)
    nnx.jit(lambda router: router(x, expert_ids=replayed))(router)
    total = counts_of(ids) + counts_of(replayed)
    np.testing.assert_array_equal(router.counts[...], total)
    nnx.view(router, deterministic=True)(x)
    router.eval()
    router(x)
    np.testing.assert_array_equal(router.counts[...], total)
    router.train()
    router(x)
    assert router.counts[...].sum() == total.sum() + 24 * K
    assert not hasattr(Router(RouterConfig(D, E, K), rngs=nnx.Rngs(0)), "counts")


def test_one_token(router, rng):
    x = draw(rng)
    one, of_a_batch = router(x), router(x[None])
    np.testing.assert_array_equal(one.expert_ids, of_a_batch.expert_ids[0])
    np.testing.assert_array_equal(router.counts[...], 2 * counts_of(one.expert_ids))


def test_update(router, rng):
    """The sign rule on what was counted, then zeros; nothing where `when` is False."""
    bias = rng.normal(0, 1, E).astype(np.float32)
    router.bias[...] = jnp.asarray(bias)
    want = counts_of(router(draw(rng, 40)).expert_ids)
    update = nnx.jit(partial(update_selection_biases, rate=RATE))
    unused = update(router, when=jnp.array(False))
    np.testing.assert_array_equal(router.bias[...], bias)
    np.testing.assert_array_equal(router.counts[...], want)
    used = update(router, when=jnp.array(True))
    np.testing.assert_array_equal(router.bias[...], stepped(bias, want))
    np.testing.assert_array_equal(router.counts[...], 0)
    for (counts,) in (unused.values(), used.values()):
        np.testing.assert_array_equal(counts, want)
    router(draw(rng, 5))
    router.bias[...] = jnp.asarray(bias)
    router.update_selection_bias(centred=True)
    np.testing.assert_allclose(router.bias[...].mean(), bias.mean(), atol=1e-6)


def test_hash_router(rng):
    """It has no bias: its counts are returned and cleared."""
    router = Router(HASH, rngs=nnx.Rngs(0))
    token_ids = jnp.asarray(rng.integers(0, 10, 30), jnp.int32)  # one is out of range
    ids = router(draw(rng, 30), token_ids=token_ids).expert_ids
    (counts,) = update_selection_biases(router).values()
    np.testing.assert_array_equal(counts, counts_of(ids))
    np.testing.assert_array_equal(router.counts[...], 0)


def remat(model, x):
    return nnx.remat(lambda model, x: model(x))(model, x)


def checkpointed(model, x):
    graph, state = nnx.split(model)

    @partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names("jax_router.dispatch"))
    def pure(state, x):
        model = nnx.merge(graph, state)
        y = model(x)
        return y, nnx.state(model)

    y, state = pure(state, x)
    nnx.update(model, state)
    return y


@pytest.mark.parametrize("recompute", [remat, checkpointed])
def test_recomputation_counts_once(recompute, rng):
    """The backward pass routes a second time; gradients are what they were."""
    x, gradients = draw(rng, 20), []
    for call in (lambda model, x: model(x), recompute):
        model = make_layer()
        want = counts_of(nnx.view(model.router, deterministic=True)(x).expert_ids)
        gradients.append(nnx.jit(nnx.grad(lambda model, call=call: (call(model, x) ** 2).sum()))(model))
        np.testing.assert_array_equal(model.router.counts[...], want)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), *gradients)


@nnx.split_rngs(splits=L)
@nnx.vmap(in_axes=0)
def make_layers(rngs):
    return Router(CONFIG, rngs=rngs)


def through_layers(layers, x):
    """A scan over stacked layers, recomputed in the backward pass."""

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    @nnx.remat
    def layer(router, x):
        weights, expert_ids = router(x)
        return x + weights.sum(-1, keepdims=True) * jnp.cos(expert_ids.sum(-1, keepdims=True).astype(x.dtype))

    return layer(layers, x)


def test_stacked_layers(rng):
    """Under a scan over layers each has counts and a bias of its own."""
    layers, x = make_layers(nnx.Rngs(0)), draw(rng, 20)

    @nnx.jit
    def step(layers, x):
        gradients = nnx.grad(lambda layers: through_layers(layers, x).sum())(layers)
        return gradients, update_selection_biases(layers, rate=RATE)

    graph, state = nnx.split(layers)
    routers = [nnx.merge(graph, jax.tree.map(lambda leaf, index=index: leaf[index], state)) for index in range(L)]
    (counts,) = step(layers, x)[1].values()
    for index, router in enumerate(routers):
        weights, expert_ids = router(x)
        np.testing.assert_array_equal(counts[index], counts_of(expert_ids))
        x = x + weights.sum(-1, keepdims=True) * jnp.cos(expert_ids.sum(-1, keepdims=True).astype(x.dtype))
    np.testing.assert_array_equal(layers.bias[...], stepped(np.zeros((L, E), np.float32), np.asarray(counts)))
    np.testing.assert_array_equal(layers.counts[...], np.zeros((L, E)))


def test_accumulation_steps(rng):
    """With optax.MultiSteps the bias moves when the parameters do, by the counts of all accumulated steps."""
    model, batches = make_layer(), draw(rng, 4, 10)
    optimizer = nnx.Optimizer(model, optax.MultiSteps(optax.sgd(0.1), every_k_schedule=2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        gradients = nnx.grad(lambda model: (model(x) ** 2).sum())(model)
        with jax.numpy_dtype_promotion("standard"):  # optax divides by an integer
            optimizer.update(model, gradients)
        return update_selection_biases(model, rate=RATE, when=optimizer.opt_state.mini_step == 0)["router"]

    bias, so_far = np.zeros(E, np.float32), np.zeros(E, int)
    for index, x in enumerate(batches):
        so_far = so_far + counts_of(nnx.view(model.router, deterministic=True)(x).expert_ids)
        weight = np.asarray(model.experts.gate_proj[...])
        np.testing.assert_array_equal(step(model, optimizer, x), so_far)
        assert (model.experts.gate_proj[...] != weight).any() == (index % 2 == 1)
        if index % 2:
            bias, so_far = stepped(bias, so_far), np.zeros(E, int)
        np.testing.assert_array_equal(model.router.bias[...], bias)
        np.testing.assert_array_equal(model.router.counts[...], so_far)


def route_and_update(router, x):
    router(x)
    return update_selection_biases(router, rate=RATE)


@pytest.mark.parametrize("mode", [AxisType.Auto, AxisType.Explicit])
def test_sharded_tokens(mode, devices, router, rng):
    """Under jit the counts are those of the tokens of all devices."""
    x = draw(rng, 16, 3)
    want = counts_of(nnx.view(router, deterministic=True)(x).expert_ids)
    mesh = jax.make_mesh((len(devices),), ("d",), (mode,), devices=devices)
    with jax.set_mesh(mesh):
        (counts,) = nnx.jit(route_and_update)(router, jax.device_put(x, NamedSharding(mesh, P("d")))).values()
    np.testing.assert_array_equal(counts, want)
    np.testing.assert_array_equal(router.bias[...], stepped(np.zeros(E, np.float32), want))
    assert router.bias[...].sharding.is_fully_replicated


def test_in_shard_map(devices, rng):
    """Calls sum over the axis that splits tokens: in a loop, and between steps, all devices have the same counts."""
    router = Router(replace(CONFIG, count_axis_name="d"), rngs=nnx.Rngs(0))
    x = draw(rng, 16, 3)
    want = counts_of(nnx.view(router, deterministic=True)(x).expert_ids)
    mesh = jax.make_mesh((len(devices),), ("d",), (AxisType.Auto,), devices=devices)
    graph, state = nnx.split(router)

    def local(state, x, when):
        router = nnx.merge(graph, state)
        route = nnx.scan(lambda router, x: (router, router(x).weights), in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
        route(router, x)
        (counts,) = update_selection_biases(router, rate=RATE, when=when).values()
        return nnx.state(router), counts

    mapped = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(P(), P("d"), P()), out_specs=P()))
    state, counts = mapped(state, x, False)
    np.testing.assert_array_equal(counts, want)
    np.testing.assert_array_equal(state["counts"][...], want)
    state, counts = mapped(state, x, True)
    np.testing.assert_array_equal(counts, 2 * want)
    np.testing.assert_array_equal(state["bias"][...], stepped(np.zeros(E, np.float32), want))
    np.testing.assert_array_equal(state["counts"][...], 0)


@pytest.mark.parametrize(
    ("when", "error"), [(np.ones(E, bool), ValueError), (1, TypeError), (None, TypeError)], ids=str
)
def test_when_is_one_bool(when, error):
    router = Router(CONFIG, rngs=nnx.Rngs(0))
    with pytest.raises(error, match="when must"):
        update_selection_biases(router, when=when)


def test_nothing_to_update():
    silent = Router(RouterConfig(D, E, K), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="model must have a Router whose configuration has count_experts=True"):
        update_selection_biases(silent)
    with pytest.raises(ValueError, match="the configuration must have count_experts=True, got False"):
        silent.update_selection_bias()
    with pytest.raises(TypeError, match="count_experts must be True or False, got 1"):
        RouterConfig(D, E, K, count_experts=1)
    with pytest.raises(ValueError, match="count_axis_name must be None, the default, without count_experts, got 'd'"):
        RouterConfig(D, E, K, count_axis_name="d")
    with pytest.raises(TypeError, match=r"count_axis_name must be a mesh axis or a sequence of them, .* got \(1,\)"):
        replace(CONFIG, count_axis_name=(1,))
    assert replace(CONFIG, count_axis_name=["a", "b"]) == replace(CONFIG, count_axis_name=("a", "b"))
