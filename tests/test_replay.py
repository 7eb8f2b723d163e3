"""Experts that are given to a Router: recorded ones, as replay has them."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_router import Router, RouterConfig, route_at

DENSE = RouterConfig(32, 16, 3, score_fn="sigmoid", scale=2.5, num_groups=4, top_groups=2)
HASHED = RouterConfig(32, 16, 3, scale=1.5, mode="hash", vocab_size=50, hash_weights="scored")
CONFIGS = {
    "dense": DENSE,
    "dense, softmax of all": RouterConfig(32, 16, 3, score_fn="softmax", renormalize=False, selection_bias=False),
    "dense, everything": replace(
        DENSE, logit_bias=True, softcap=3.0, logits_dtype=jnp.bfloat16, per_expert_scale=True, eps=1e-6
    ),
    "dense, by biased logits": RouterConfig(32, 16, 3, score_fn="sigmoid", selection_key="logits"),
    "hash": HASHED,
}


def make(name):
    router = Router(CONFIGS[name], rngs=nnx.Rngs(1))
    if hasattr(router, "bias"):
        router.bias[...] = jnp.linspace(-0.5, 0.5, 16, dtype=jnp.float32)
    if hasattr(router, "per_expert_scale"):
        router.per_expert_scale[...] = jnp.linspace(0.5, 2, 16, dtype=jnp.float32)
    return router


@pytest.fixture
def tokens(rng):
    return {
        "x": jnp.asarray(rng.normal(0, 1, (4, 6, 32)), jnp.float32),
        "token_ids": jnp.asarray(rng.integers(0, 50, (4, 6)), jnp.int32),
    }


def loss_of(router, **inputs):
    routing, logits = router(**inputs, return_logits=True)
    return (routing.weights**2).sum() + jnp.sin(logits).sum(), routing


@nnx.jit
def step(router, inputs):
    """The routing, the gradients of the parameters and of x."""

    def loss(router, x):
        return loss_of(router, **{**inputs, "x": x})

    gradients, routing = nnx.grad(loss, argnums=(0, 1), has_aux=True)(router, inputs["x"])
    return routing, gradients


def assert_same(got, want):
    for mine, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(mine, other)


@pytest.mark.parametrize("name", CONFIGS)
def test_replay_of_own_ids_is_free_routing(name, tokens):
    """The same gradients, and bit-equal weights, with ids recorded in int16.

    On a GPU, XLA may compile what makes the logits another way in each of the two programs.
    """
    router = make(name)
    routing, gradients = step(router, tokens)
    recorded = routing.expert_ids.astype(jnp.int16)
    replayed, replayed_gradients = step(router, {"x": tokens["x"], "expert_ids": recorded})
    assert replayed.expert_ids.dtype == jnp.int32
    np.testing.assert_array_equal(replayed.expert_ids, routing.expert_ids)
    rounding = 0 if jax.default_backend() == "cpu" else 1e-5
    np.testing.assert_allclose(replayed.weights, routing.weights, rtol=rounding)
    for mine, other in zip(jax.tree.leaves(replayed_gradients), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_other_ids_are_used_as_they_are(name, tokens, rng):
    """Their weights are those of route_at, whatever would have been chosen; masked tokens have none."""
    router = make(name)
    ids = jnp.asarray(rng.integers(-1, 17, (4, 6, 3)), jnp.int8)
    mask = jnp.asarray(rng.random((4, 6)) < 0.8)
    (weights, got), logits = router(tokens["x"], expert_ids=ids, token_mask=mask, return_logits=True)
    is_expert = np.asarray((ids >= 0) & (ids < 16) & mask[..., None])
    np.testing.assert_array_equal(got, np.where(is_expert, ids, -1))
    want = route_at(logits, got, **router.config.scoring).weights
    if router.config.per_expert_scale:
        want = want * np.asarray(router.per_expert_scale[...])[np.maximum(got, 0)]
    np.testing.assert_allclose(weights, want, rtol=1e-6)
    np.testing.assert_array_equal(np.asarray(weights)[~is_expert], 0)
    np.testing.assert_array_equal(np.asarray(logits)[~is_expert.any(-1)], 0)


@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_with_an_unset_id_are_routed(name, tokens, rng):
    """All choices of such a token are its own; those of the others are the given ones."""
    router = make(name)
    own = router(**tokens)
    given = np.asarray(rng.permuted(np.tile(np.arange(16), (4, 6, 1)), axis=-1)[..., :3])
    given[0, 1, 2] = given[2, 3, 0] = -1
    given[3] = -1
    unset = (given < 0).any(-1)
    got = router(**tokens, expert_ids=jnp.asarray(given, jnp.int16), unset="route")
    np.testing.assert_array_equal(got.expert_ids, np.where(unset[..., None], own.expert_ids, given))
    # Programs of their own, which a GPU may round each in its own way.
    np.testing.assert_allclose(np.asarray(got.weights)[unset], np.asarray(own.weights)[unset], rtol=1e-5)
    replayed = router(tokens["x"], expert_ids=jnp.asarray(given, jnp.int16))
    np.testing.assert_allclose(np.asarray(got.weights)[~unset], np.asarray(replayed.weights)[~unset], rtol=1e-5)
    masked = router(**tokens, expert_ids=jnp.asarray(given, jnp.int16), unset="route", token_mask=~unset)
    np.testing.assert_array_equal(masked.expert_ids, np.where(unset[..., None], -1, given))


@pytest.mark.parametrize("unset", ["none", "route"])
@pytest.mark.parametrize("name", CONFIGS)
def test_what_tokens_without_experts_hold_reaches_no_gradient(name, unset, tokens):
    """NaN in a masked row, and in one whose ids are all -1, changes nothing."""
    router = make(name)
    mask = jnp.arange(24).reshape(4, 6) % 5 != 0
    ids = jnp.where((jnp.arange(24).reshape(4, 6) % 7 == 1)[..., None], -1, jnp.arange(3)[None, None])
    without = ~mask if unset == "route" else ~mask | (ids < 0).all(-1)
    inputs = {**tokens, "expert_ids": ids, "token_mask": mask}

    def gradients(x):
        def loss(router, x):
            return loss_of(router, **{**inputs, "x": x}, unset=unset)[0]

        return nnx.jit(nnx.grad(loss, argnums=(0, 1)))(router, x)

    poisoned = jnp.where(without[..., None], jnp.nan, tokens["x"])
    got, want = gradients(poisoned), gradients(tokens["x"])
    for mine, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        # The gradient of a scale an expert is a scatter-add, whose order a GPU does not keep.
        np.testing.assert_allclose(mine, other, rtol=1e-6, atol=1e-7)


def test_under_a_scan_over_layers(tokens):
    """Ids of all layers, recorded as int16 `[layers, ..., k]`, and replayed; with gradients."""
    layers = nnx.vmap(lambda rngs: Router(DENSE, rngs=rngs))(nnx.Rngs(0).split(3))
    recorded = jnp.full((3, 4, 6, 3), -1, jnp.int16)

    def run(layers, x, recorded, unset):
        @nnx.scan(in_axes=(nnx.Carry, 0, 0), out_axes=(nnx.Carry, 0))
        def layer(x, router, ids):
            weights, ids = router(x, expert_ids=ids, unset=unset)
            return x * (1 + weights.sum(-1, keepdims=True)), (weights, ids.astype(jnp.int16))

        return layer(x, layers, recorded)

    def loss(layers, x, recorded, unset):
        x, (weights, ids) = run(layers, x, recorded, unset)
        return (weights[..., 0] ** 2).sum(), (weights, ids)

    step = nnx.jit(nnx.grad(loss, has_aux=True), static_argnums=3)
    gradient, (weights, ids) = step(layers, tokens["x"], recorded, "route")
    assert ids.dtype == jnp.int16
    replayed_gradient, (replayed, same_ids) = step(layers, tokens["x"], ids, "none")
    np.testing.assert_array_equal(same_ids, ids)
    np.testing.assert_array_equal(replayed, weights)
    assert_same(replayed_gradient, gradient)


def test_recorded_ids_of_another_precision(tokens):
    """Inference in bf16 chooses other experts at near ties; replay has its ids, and the weights of this router."""
    router = make("dense")
    x = jnp.asarray(np.random.default_rng(0).normal(0, 1, (2000, 32)), jnp.float32)
    serving = Router(replace(DENSE, dtype=jnp.bfloat16, logits_dtype=jnp.bfloat16), rngs=nnx.Rngs(1))
    serving.bias[...] = router.bias[...]
    recorded = serving(x).expert_ids
    own = router(x)
    differ = np.asarray((recorded != own.expert_ids).any(-1))
    assert differ.any()
    replayed = router(x, expert_ids=recorded)
    np.testing.assert_array_equal(replayed.expert_ids, recorded)
    np.testing.assert_array_equal(np.asarray(replayed.weights)[~differ], np.asarray(own.weights)[~differ])


IDS = jnp.zeros((4, 3), jnp.int32)


@pytest.mark.parametrize(
    ("config", "options", "error", "words"),
    [
        (DENSE, {"expert_ids": IDS[:, :2]}, ValueError, r"expert_ids must have shape \(4, 3\), got \(4, 2\)"),
        (DENSE, {"expert_ids": IDS.astype(jnp.float32)}, TypeError, "expert_ids must have an integer dtype"),
        (DENSE, {"expert_ids": IDS, "unset": "keep"}, ValueError, "unset must be one of 'none', 'route'; got 'keep'"),
        (DENSE, {"unset": "route"}, ValueError, "unset must be 'none', the default, without expert_ids, got 'route'"),
        (HASHED, {"expert_ids": IDS, "unset": "route"}, ValueError, "token_ids must be given"),
        (replace(HASHED, hash_weights="uniform"), {"expert_ids": IDS}, ValueError, "expert_ids must be None"),
    ],
)
def test_wrong_arguments(config, options, error, words):
    router = Router(config, rngs=nnx.Rngs(0))
    with pytest.raises(error, match=words):
        router(jnp.ones((4, 32)), **options)
