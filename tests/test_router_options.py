"""What models need of a Router: eps, no selection bias, changed logits, null experts, scales an expert."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jax_router
import oracle
from jax_router import Router, RouterConfig, Routing, null_experts_output

EXPERTS, HIDDEN = 16, 32
CONFIG = RouterConfig(HIDDEN, EXPERTS, 3, score_fn="sigmoid", scale=2.5)


def make(config, rng):
    """A router whose every variable is random."""
    router = Router(config, rngs=nnx.Rngs(1))
    for name in ("bias", "logit_bias"):
        if hasattr(router, name):
            getattr(router, name)[...] = jnp.asarray(rng.normal(0, 0.3, EXPERTS), jnp.float32)
    if config.per_expert_scale:
        router.per_expert_scale[...] = jnp.asarray(rng.uniform(0.5, 2, EXPERTS), jnp.float32)
    return router


def hidden_states(rng, *tokens, scale=1.0):
    return jnp.asarray(rng.normal(0, scale, (*tokens, HIDDEN)), jnp.float32)


# eps


@pytest.mark.parametrize("eps", [0.0, 1e-20, 1e-6, 0.5])
@pytest.mark.parametrize("score_fn", ["sqrtsoftplus", "sigmoid", "softmax"])
def test_eps(score_fn, eps, implementation, rng):
    """Added to the sum, in every op, but to softmax over the chosen; logits around -14 are where 1e-6 shows."""
    logits = rng.normal(-14, 1, (9, EXPERTS)).astype(np.float32)
    options = {"score_fn": score_fn, "scale": 1.5, "eps": eps, "implementation": implementation}
    oracle.assert_routes(
        jax_router.activation_topk(logits, top_k=3, **options), logits, top_k=3, score_fn=score_fn, scale=1.5, eps=eps
    )
    ids = rng.integers(-1, EXPERTS, (9, 4)).astype(np.int32)
    want = oracle.weights_at(logits, ids, score_fn, True, 1.5, eps)
    oracle.assert_weights(jax_router.route_at(logits, ids, **options).weights, want)
    hashed = jax_router.scored_hash_router(logits, np.arange(9, dtype=np.int32), ids, **options)
    oracle.assert_weights(hashed.weights, want)
    x = np.eye(9, dtype=np.float32)  # whose product with the logits as a weight is exact
    oracle.assert_routes(
        jax_router.dense_router(x, logits.T, top_k=3, **options), logits, top_k=3, score_fn=score_fn, scale=1.5, eps=eps
    )


def test_scores_of_zero_stay_zero_without_eps(implementation):
    """Where nothing is added, nothing is divided by zero."""
    logits = jnp.full((2, EXPERTS), -200.0)

    def weights(logits):
        options = {"score_fn": "sigmoid", "eps": 0.0, "implementation": implementation}
        return jax_router.activation_topk(logits, top_k=3, **options).weights

    np.testing.assert_array_equal(weights(logits), 0)
    gradient = jax.grad(lambda logits: weights(logits)[:, 0].sum())(logits)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("score_fn", ["sqrtsoftplus", "sigmoid"])
def test_gradient_with_eps(score_fn, implementation, rng):
    """Against differences in float64."""
    logits = rng.normal(-7, 1, (4, EXPERTS)).astype(np.float32)
    ids = oracle.top_k(logits, 3)
    mix = rng.normal(0, 1, 3)
    eps = 2e-3

    def loss(logits):
        routing = jax_router.route_at(logits, ids, score_fn=score_fn, eps=eps, implementation=implementation)
        return (routing.weights * jnp.asarray(mix, jnp.float32)[None]).sum()

    want = np.zeros(logits.shape)
    for step in np.ndindex(logits.shape):
        moved = np.zeros(logits.shape)
        moved[step] = 1e-4
        ahead, behind = (oracle.weights_at(logits + sign * moved, ids, score_fn, True, 1.0, eps) for sign in (1, -1))
        want[step] = ((ahead - behind) * mix).sum() / 2e-4
    np.testing.assert_allclose(jax.grad(loss)(jnp.asarray(logits)), want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("eps", "error", "words"), [(-1e-6, ValueError, "eps must be 0 or more"), ("1", TypeError, "eps must be a Python")]
)
def test_wrong_eps(eps, error, words):
    with pytest.raises(error, match=words):
        RouterConfig(8, 4, 2, eps=eps)
    with pytest.raises(error, match=words):
        jax_router.activation_topk(jnp.ones((2, 4)), top_k=2, eps=eps)


# Selection


def test_no_bias_is_not_a_bias_of_zeros(implementation, rng):
    """Scores of 1 tie where their logits do not."""
    config = replace(CONFIG, implementation=implementation)
    with_bias = Router(config, rngs=nnx.Rngs(1))
    without = Router(replace(config, selection_bias=False), rngs=nnx.Rngs(1))
    assert not hasattr(without, "bias")
    x = hidden_states(rng, 64, scale=20)
    _, logits = without(x, return_logits=True)
    ids = without(x).expert_ids
    np.testing.assert_array_equal(ids, oracle.top_k(np.asarray(logits), 3))
    assert (np.asarray(with_bias(x).expert_ids) != np.asarray(ids)).any()


def test_selection_by_biased_logits(implementation, rng):
    config = replace(CONFIG, selection_key="logits", renormalize=False, implementation=implementation)
    router = make(config, rng)
    x, mask = hidden_states(rng, 20), rng.random(20) < 0.8
    (weights, ids), logits = router(x, token_mask=mask, return_logits=True)
    keys = np.asarray(logits) + np.asarray(router.bias[...])
    np.testing.assert_array_equal(ids, np.where(mask[:, None], oracle.top_k(keys, 3), -1))
    oracle.assert_weights(weights, oracle.weights_at(logits, ids, "sigmoid", False, 2.5))
    gradient = nnx.grad(lambda router: router(x).weights.sum())(router)
    assert np.abs(gradient["weight"][...]).max() > 1e-3
    assert "bias" not in gradient


# Logits


def changed(logits, config):
    """The contract's formula, in float64."""
    if config.logits_dtype is not None:
        logits = jnp.asarray(logits, jnp.float32).astype(config.logits_dtype)
    logits = oracle.f64(logits) * config.logit_scale
    return logits if config.softcap is None else config.softcap * np.tanh(logits / config.softcap)


CHANGES = {
    "logit_scale": {"logit_scale": 0.125},
    "softcap": {"softcap": 1.5},
    "scaled, capped": {"logit_scale": 3.0, "softcap": 2.0, "selection_bias": False},
    "bf16": {"logits_dtype": jnp.bfloat16, "selection_bias": False},
    "f16, capped": {"logits_dtype": jnp.float16, "softcap": 5.0},
    "with a logit bias": {"logit_bias": True, "softcap": 2.0},
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_logits(change, implementation, rng):
    config = replace(CONFIG, implementation=implementation, **CHANGES[change])
    router = make(config, rng)
    x = hidden_states(rng, 40)
    (weights, ids), logits = nnx.jit(partial(Router.__call__, return_logits=True))(router, x)
    bias = router.logit_bias[...] if config.logit_bias else None
    product = jax_router.reference.router_logits(x, router.weight[...], bias)
    np.testing.assert_allclose(logits, changed(product, config), rtol=2e-6, atol=1e-6)
    selection_bias = np.asarray(router.bias[...]) if config.selection_bias else None
    oracle.assert_routes((weights, ids), logits, selection_bias, top_k=3, score_fn="sigmoid", scale=2.5)
    plain = nnx.jit(Router.__call__)(router, x)
    np.testing.assert_array_equal(plain.expert_ids, ids)
    np.testing.assert_allclose(plain.weights, weights, rtol=2e-6)  # of another program of XLA's


def test_rounded_logits_tie_to_the_lower_expert(rng):
    """As in a model that scores in bf16, where f32 logits choose other experts."""
    router = make(replace(CONFIG, logits_dtype=jnp.bfloat16, selection_bias=False), rng)
    x = hidden_states(rng, 4000)
    (_, ids), logits = nnx.jit(partial(Router.__call__, return_logits=True))(router, x)
    np.testing.assert_array_equal(logits, logits.astype(jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_array_equal(ids, oracle.top_k(np.asarray(logits), 3))
    _, unrounded = jax.lax.top_k(jax_router.reference.router_logits(x, router.weight[...]), 3)
    assert (np.asarray(ids) != np.asarray(unrounded)).any()


@pytest.mark.parametrize("change", CHANGES)
def test_masked_tokens_reach_no_gradient_through_changed_logits(change, rng):
    router = make(replace(CONFIG, **CHANGES[change]), rng)
    mask = jnp.arange(6) % 3 != 0
    x = hidden_states(rng, 6)

    def gradients(x):
        def loss(router, x):
            routing, logits = router(x, token_mask=mask, return_logits=True)
            return (routing.weights[:, 0] ** 2).sum() + (logits**2).sum()

        return nnx.grad(loss, argnums=(0, 1))(router, x)

    want, got = gradients(x), gradients(jnp.where(mask[:, None], x, jnp.nan))
    for mine, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(mine, other)


def test_scored_hash_layer_with_changed_logits(rng):
    config = RouterConfig(HIDDEN, EXPERTS, 3, mode="hash", vocab_size=20, hash_weights="scored", softcap=1.0)
    router = make(config, rng)
    x, token_ids = hidden_states(rng, 10), jnp.asarray(rng.integers(0, 21, 10), jnp.int32)
    (weights, ids), logits = router(x, token_ids=token_ids, return_logits=True)
    assert np.abs(logits).max() < 1
    oracle.assert_weights(weights, oracle.weights_at(logits, ids, "sqrtsoftplus", True, 1.0))


# Null experts, and scales an expert


def test_scale_an_expert(rng):
    """Multiplies the weights, is trained, and masked tokens have weight 0 whatever it holds."""
    router = make(replace(CONFIG, per_expert_scale=True), rng)
    x, mask = hidden_states(rng, 12), np.arange(12) % 4 != 0
    plain = make(CONFIG, rng)
    plain.weight[...], plain.bias[...] = router.weight[...], router.bias[...]
    want = plain(x, token_mask=mask)
    scale = np.asarray(router.per_expert_scale[...])
    got = router(x, token_mask=mask)
    np.testing.assert_array_equal(got.expert_ids, want.expert_ids)
    factor = np.where(mask[:, None], scale[np.maximum(want.expert_ids, 0)], 0)
    np.testing.assert_allclose(got.weights, want.weights * factor, rtol=1e-6)
    gradient = nnx.grad(lambda router: router(x, token_mask=mask).weights.sum())(router)
    counted = np.zeros(EXPERTS)
    np.add.at(counted, np.asarray(want.expert_ids)[mask], np.asarray(want.weights)[mask])
    np.testing.assert_allclose(gradient["per_expert_scale"][...], counted, rtol=1e-5, atol=1e-6)
    router.per_expert_scale[...] = jnp.full(EXPERTS, jnp.nan)
    np.testing.assert_array_equal(router(x, token_mask=mask).weights[~mask], 0)


def test_null_experts(rng):
    """With experts that compute something, the layer's output is the sum over all choices."""
    config = replace(CONFIG, num_null_experts=5)
    assert config.num_real_experts == 11
    router = make(config, rng)
    x, mask = hidden_states(rng, 2, 30), jnp.asarray(rng.random((2, 30)) < 0.8)
    routing = router(x, token_mask=mask)
    ids = np.asarray(routing.expert_ids)
    assert (ids >= 11).any()
    _, _, group_sizes = jax_router.expert_dispatch(routing.expert_ids, config.num_real_experts)
    assert group_sizes.sum() == ((ids >= 0) & (ids < 11)).sum()
    got = null_experts_output(x, routing, 11)
    want = oracle.f64(x) * np.where(ids >= 11, oracle.f64(routing.weights), 0).sum(-1, keepdims=True)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)
    assert null_experts_output(x.astype(jnp.bfloat16), routing, 11).dtype == jnp.bfloat16


def test_null_experts_of_tokens_without_them(rng):
    """Zeros, and no gradient, whatever the token holds."""
    routing = Routing(jnp.ones((3, 2)), jnp.array([[0, 1], [0, 3], [-1, -1]], jnp.int32))
    x = jnp.full((3, 4), jnp.nan).at[1].set(2.0)
    np.testing.assert_array_equal(null_experts_output(x, routing, 3), [[0] * 4, [2] * 4, [0] * 4])
    x_bar, weights_bar = jax.grad(
        lambda x, weights: null_experts_output(x, routing._replace(weights=weights), 3).sum(), (0, 1)
    )(x, routing.weights)
    np.testing.assert_array_equal(x_bar, [[0] * 4, [1] * 4, [0] * 4])
    np.testing.assert_array_equal(weights_bar, [[0, 0], [0, 8], [0, 0]])


@pytest.mark.parametrize(
    ("x", "real", "error", "words"),
    [
        (np.ones((3, 4), np.int32), 3, TypeError, "x must have dtype float32"),
        (np.ones((2, 4), np.float32), 3, ValueError, r"x without its last axis must have shape \(3,\)"),
        (np.ones((3, 4), np.float32), 1.5, TypeError, "num_real_experts must be"),
    ],
)
def test_wrong_arguments_of_null_experts(x, real, error, words):
    routing = Routing(jnp.ones((3, 2)), jnp.zeros((3, 2), jnp.int32))
    with pytest.raises(error, match=words):
        null_experts_output(x, routing, real)


@pytest.mark.parametrize(
    ("weights", "expert_ids", "error", "words"),
    [
        (
            np.ones((3, 2), np.float32),
            np.zeros((3, 1), np.int32),
            ValueError,
            r"routing.weights .* \(3, 1\), got \(3, 2\)",
        ),
        (np.ones((3, 2), np.float32), np.zeros((3, 2), np.float32), TypeError, "routing.expert_ids .* float32"),
        (np.ones((3, 2), np.int32), np.zeros((3, 2), np.int32), TypeError, "routing.weights must have dtype float32"),
    ],
)
def test_wrong_routing_of_null_experts(weights, expert_ids, error, words):
    """None of it is broadcast or cast."""
    with pytest.raises(error, match=words):
        null_experts_output(np.ones((3, 4), np.float32), Routing(weights, expert_ids), 0)
    with pytest.raises(TypeError, match="routing must be of type Routing"):
        null_experts_output(np.ones((3, 4), np.float32), (weights, expert_ids), 0)


# Sharded


MESHED = {
    "changed logits": {"logit_bias": True, "softcap": 2.0, "logits_dtype": jnp.bfloat16, "per_expert_scale": True},
    "biased logits": {"selection_key": "logits", "num_null_experts": 5},
}


@pytest.mark.parametrize("sharded", ["experts", "hidden"])
@pytest.mark.parametrize("change", MESHED)
def test_options_in_a_mesh_of_explicit_axes(change, sharded, devices, rng):
    """With tokens over one axis and, over another, everything that has experts, or the hidden elements."""
    config = replace(CONFIG, **MESHED[change])
    router = make(config, rng)
    x, mask = hidden_states(rng, 4, 3), jnp.asarray(rng.random((4, 3)) < 0.8)

    @nnx.jit
    def run(router, x, mask):
        def loss(router, x):
            routing = router(x, token_mask=mask)
            return (routing.weights**2).sum() + null_experts_output(x, routing, config.num_real_experts).sum(), routing

        gradients, routing = nnx.grad(loss, argnums=(0, 1), has_aux=True)(router, x)
        return routing, gradients

    want = run(router, x, mask)
    mesh = jax.make_mesh((len(devices) // 2, 2), ("d", "m"), (AxisType.Explicit,) * 2, devices=devices)
    hidden = "m" if sharded == "hidden" else None

    def put(value, *spec):
        return jax.device_put(value, NamedSharding(mesh, PartitionSpec(*spec)))

    with jax.set_mesh(mesh):
        graph, state = nnx.split(router)
        state = jax.tree.map(lambda leaf: put(leaf, None if hidden else "m", *(hidden,) * (leaf.ndim - 1)), state)
        got = run(nnx.merge(graph, state), put(x, "d", None, hidden), put(mask, "d"))
    for mine, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"selection_bias": 1}, TypeError, "selection_bias must be True or False"),
        ({"selection_key": "keys"}, ValueError, "selection_key must be one of 'scores', 'logits'; got 'keys'"),
        ({"selection_key": "logits", "selection_bias": False}, ValueError, "selection_key must be 'scores'"),
        ({"selection_key": "logits", "num_groups": 4, "top_groups": 2}, ValueError, "selection_key must be 'scores'"),
        (
            {"num_null_experts": 16},
            ValueError,
            "num_null_experts must be between 0 and 15 .num_experts",
        ),
        ({"logit_scale": "2"}, TypeError, "logit_scale must be a Python number"),
        ({"softcap": 0}, ValueError, "softcap must be None or above 0, got 0"),
        ({"softcap": -3.0}, ValueError, "softcap must be None or above 0, got -3.0"),
        ({"logits_dtype": "int8"}, TypeError, "logits_dtype must be one of jnp.float32"),
        ({"per_expert_scale": None}, TypeError, "per_expert_scale must be True or False"),
        ({"per_expert_scale": True, "mode": "hash", "vocab_size": 9}, ValueError, "per_expert_scale must be False"),
    ],
)
def test_wrong_options(change, error, words):
    with pytest.raises(error, match=words):
        replace(CONFIG, **change)
