"""The recipes of examples/recipes.py against their formulas, in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import oracle
from jax_router import Router, RouterConfig
from programs import load_example

recipes = load_example("recipes")

CONFIG = RouterConfig(8, 16, 3, score_fn="sigmoid", scale=2.0)


def f32(values):
    return jnp.asarray(values, jnp.float32)


def at(values, ids):
    return np.take_along_axis(np.asarray(values, np.float64), np.asarray(ids), -1)


def sigmoid(z):
    return 1 / (1 + np.exp(-np.asarray(z, np.float64)))


@pytest.fixture
def logits(rng):
    return rng.normal(0, 2, (40, 16)).astype(np.float32)


@pytest.fixture
def x(rng):
    return f32(rng.normal(0, 1, (40, 8)))


def make(rng, seed=0):
    router = Router(CONFIG, rngs=nnx.Rngs(seed))
    router.bias[...] = f32(rng.normal(0, 0.3, 16))
    return router


def test_modalities(rng, x):
    text, vision = make(rng), make(rng, 1)
    is_vision = jnp.asarray(rng.random(40) < 0.4)
    weights, ids = jax.jit(recipes.route_by_modality)(text, vision, x, is_vision)
    for router, of_kind, first in ((text, ~is_vision, 0), (vision, is_vision, 16)):
        want = router(x[of_kind])
        np.testing.assert_array_equal(ids[of_kind], want.expert_ids + first)
        np.testing.assert_allclose(weights[of_kind], want.weights, rtol=1e-6)


def test_bias_by_kind(rng, x):
    router, image_bias = make(rng), f32(rng.normal(0, 0.3, 16))
    is_image = jnp.asarray(rng.random(40) < 0.4)
    weights, ids = jax.jit(recipes.route_with_bias_by_kind)(router, image_bias, x, is_image)
    _, logits = router(x, return_logits=True)
    bias = np.where(np.asarray(is_image)[:, None], image_bias, router.bias[...])
    oracle.assert_routes((weights, ids), logits, bias, top_k=3, score_fn="sigmoid", scale=2.0)
    assert (np.asarray(ids) != np.asarray(router(x).expert_ids)).any()


def test_expert_pools(rng, logits):
    documents = jnp.asarray(np.repeat([0, 1, 2, 1], 10))
    scores = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    pools = recipes.document_pools(f32(scores), documents, 3, 6)
    for document in range(3):
        of_it = np.asarray(documents) == document
        best = np.argsort(-scores[of_it].sum(0))[:6]
        np.testing.assert_array_equal(pools[of_it], np.tile(np.isin(np.arange(16), best), (of_it.sum(), 1)))
    weights, ids = jax.jit(lambda z, pool: recipes.route_in_pool(z, pool, top_k=4, score_fn="softmax"))(logits, pools)
    want = oracle.top_k(np.where(pools, logits, -np.inf), 4)
    np.testing.assert_array_equal(ids, want)
    chosen = at(np.exp(np.asarray(logits, np.float64)), want)
    np.testing.assert_allclose(weights, chosen / chosen.sum(-1, keepdims=True), rtol=1e-5)


@pytest.mark.parametrize(("best_of", "outside"), [(2, -np.inf), (1, -np.inf), (3, -np.inf), (2, 0.0)])
def test_groups(best_of, outside, logits):
    """Also where keys are negative, so that an expert which is masked with 0 comes before them."""
    got = recipes.choose_in_groups(f32(logits), num_groups=4, top_groups=2, top_k=5, best_of=best_of, outside=outside)
    grouped = logits.reshape(40, 4, 4)
    score = np.sort(grouped, -1)[..., -best_of:].astype(np.float64).sum(-1)
    masked = np.full(grouped.shape, outside, np.float32)
    for row in range(40):
        for group in np.argsort(-score[row], kind="stable")[:2]:
            masked[row, group] = grouped[row, group]
    np.testing.assert_array_equal(got, oracle.top_k(masked.reshape(40, 16), 5))
    if outside == 0:
        inside = recipes.choose_in_groups(f32(logits), num_groups=4, top_groups=2, top_k=5)
        assert (np.asarray(got) != np.asarray(inside)).any()


def test_shared_experts(rng, logits):
    """The weights of Inkling: exp(logsigmoid(z) - logsumexp(logsigmoid(z) of chosen and shared)) * scale."""
    bias = f32(rng.normal(0, 0.1, 14))
    routing, shared = jax.jit(lambda z: recipes.route_with_shared_experts(z, bias, 2, top_k=3, scale=8.0))(logits)
    scores = sigmoid(logits)
    np.testing.assert_array_equal(routing.expert_ids, oracle.top_k(scores[:, :14] + np.asarray(bias), 3))
    chosen = np.concatenate([at(scores, routing.expert_ids), scores[:, 14:]], -1)
    want = 8 * chosen / chosen.sum(-1, keepdims=True)
    np.testing.assert_allclose(np.concatenate([routing.weights, shared], -1), want, rtol=1e-5)


def test_clamped_sum(rng):
    """Above the clamp the weights of a router that renormalises; below it, less."""
    weights = f32([[0.25, 0.25], [3e-13, 2e-13], [0.0, 0.0]])
    got = recipes.with_clamped_sum(recipes.Routing(weights, jnp.zeros((3, 2), jnp.int32)))
    np.testing.assert_allclose(got.weights, [[0.5, 0.5], [0.3, 0.2], [0, 0]], rtol=1e-6)


def test_many_experts(rng):
    logits = rng.normal(0, 1, (3, 16384)).astype(np.float32)
    weights, ids = jax.jit(recipes.route_among_many, static_argnums=1)(logits, 8)
    np.testing.assert_array_equal(ids, oracle.top_k(logits, 8))
    chosen = np.exp(at(logits, ids))
    np.testing.assert_allclose(weights, chosen / chosen.sum(-1, keepdims=True), rtol=1e-5)


def test_plausible_experts(rng, x):
    """The threshold rule, and that a replay takes its result."""
    router = make(rng)
    recorded = jnp.asarray(rng.permuted(np.tile(np.arange(16), (40, 1)), axis=1)[:, :3], jnp.int16)
    kept = jax.jit(recipes.keep_plausible, static_argnums=3)(router, x, recorded, 0.7)
    own, logits = router(x, return_logits=True)
    scores = sigmoid(logits)
    weakest = at(scores, own.expert_ids).min(-1, keepdims=True)
    np.testing.assert_array_equal(kept, np.where(at(scores, recorded) >= 0.7 * weakest, recorded, -1))
    assert 0 < (np.asarray(kept) < 0).mean() < 1
    replayed = router(x, expert_ids=kept, unset="route")
    dropped = (np.asarray(kept) < 0).any(-1)
    np.testing.assert_array_equal(np.asarray(replayed.expert_ids)[dropped], np.asarray(own.expert_ids)[dropped])
