"""The gradients of hidden states and gate together: the same as each by itself, under every transformation."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import jax_router
from jax_router import _routed_gradient

SCORINGS = {
    "sqrtsoftplus": {},
    "softmax": {"score_fn": "softmax"},
    "apart": {"score_fn": "sigmoid", "renormalize": False},
}


def draw(rng, *shape):
    return jnp.asarray(rng.normal(0, 1, shape), jnp.bfloat16)


def route(x, weight, **options):
    return jax_router.dense_router(x, weight, top_k=3, **options).weights


def gradients(x, weight, cotangent, **options):
    return jax.vjp(partial(route, **options), x, weight)[1](cotangent)


def assert_close(found, wanted):
    for mine, its in zip(jax.tree.leaves(found), jax.tree.leaves(wanted)):
        mine, its = (np.asarray(value, np.float32) for value in (mine, its))
        assert_allclose(mine, its, rtol=2**-6, atol=2**-9 * np.abs(its).max())


def from_kernel(params, grad_weights, known):
    return _routed_gradient._gradients_from_kernel(grad_weights, known, **dict(params))


@pytest.mark.parametrize("how", SCORINGS)
def test_both_gradients(how, rng):
    x, weight, cotangent = draw(rng, 4, 5, 16), draw(rng, 80, 16), rng.normal(0, 1, (4, 5, 3)).astype(np.float32)
    found = jax.jit(partial(gradients, **SCORINGS[how]))(x, weight, cotangent)
    assert_close(found, gradients(x, weight, cotangent, implementation="reference", **SCORINGS[how]))


@pytest.mark.parametrize("how", SCORINGS)
@pytest.mark.parametrize("masked", [False, True])
def test_many_tokens(how, masked, rng):
    """As many as one kernel on a GPU finds both gradients of, which no tile of it divides."""
    x, weight = draw(rng, 3, 430, 136), draw(rng, 100, 136)
    cotangent = rng.normal(0, 1, (3, 430, 3)).astype(np.float32)
    options = dict(SCORINGS[how])
    if masked:
        options["token_mask"] = mask = rng.random((3, 430)) < 0.8
        x, cotangent = jnp.where(mask[..., None], x, jnp.nan), np.where(mask[..., None], cotangent, np.nan)
    found = jax.jit(partial(gradients, **options))(x, weight, cotangent)
    assert_close(found, gradients(x, weight, cotangent, implementation="reference", **options))
    if masked:
        assert_array_equal(np.asarray(found[0], np.float32)[~mask], 0)


@pytest.mark.parametrize("how", SCORINGS)
@pytest.mark.parametrize("masked", [False, True])
def test_from_the_two_forms_of_the_cotangent(how, masked, rng, monkeypatch):
    """As on a GPU, from dense halves and the chosen numbers, whatever computes these."""
    x, weight, cotangent = draw(rng, 20, 16), draw(rng, 80, 16), rng.normal(0, 1, (20, 3)).astype(np.float32)
    options = dict(SCORINGS[how])
    if masked:
        options["token_mask"] = np.arange(20) % 3 > 0
        x = jnp.where(options["token_mask"][:, None], x, jnp.nan)
    wanted = gradients(x, weight, cotangent, **options)

    monkeypatch.setattr(_routed_gradient, "_gradients", from_kernel)
    found = gradients(x, weight, cotangent, **options)
    assert all(np.isfinite(np.asarray(value, np.float32)).all() for value in found)
    assert_close(found, wanted)


def test_many_columns(rng):
    """So many that a block of an H100's kernel has all tokens: more tiles than it has places for at a time."""
    x, weight, cotangent = draw(rng, 1100, 8712), draw(rng, 40, 8712), rng.normal(0, 1, (1100, 3)).astype(np.float32)
    x = x * 8712**-0.5
    found = jax.jit(gradients)(x, weight, cotangent)
    assert_close(found, gradients(x, weight, cotangent, implementation="reference"))


@pytest.mark.parametrize("shape", [(20, 0), (2, 0, 16)])
def test_gradients_of_nothing(shape, monkeypatch):
    """No hidden elements, or no tokens."""
    x, weight = jnp.zeros(shape, jnp.bfloat16), jnp.zeros((80, shape[-1]), jnp.bfloat16)
    monkeypatch.setattr(_routed_gradient, "_gradients", from_kernel)
    grad_x, grad_weight = gradients(x, weight, np.ones((*shape[:-1], 3), np.float32))
    assert grad_x.shape == shape
    assert grad_weight.shape == weight.shape
    assert not np.asarray(grad_weight, np.float32).any()


def test_derivatives_of_the_gradients(rng):
    """Forward over reverse and reverse over reverse, against those of the reference in f32."""
    x, weight, cotangent = draw(rng, 6, 16), draw(rng, 80, 16), rng.normal(0, 1, (6, 3)).astype(np.float32)
    moves = draw(rng, 6, 16), draw(rng, 80, 16)

    def second(implementation, dtype):
        of = partial(gradients, cotangent=cotangent, implementation=implementation)
        at, by = ((a.astype(dtype), b.astype(dtype)) for a, b in ((x, weight), moves))
        forward = jax.jvp(of, at, by)[1]
        reverse = jax.vjp(of, *at)[1](by)
        return forward, reverse

    assert_close(second("auto", jnp.bfloat16), second("reference", jnp.float32))


def test_mapped(rng):
    """Over tokens with one gate, and over gates."""
    x, cotangent = draw(rng, 2, 6, 16), rng.normal(0, 1, (2, 6, 3)).astype(np.float32)
    weight, weights = draw(rng, 80, 16), draw(rng, 2, 80, 16)
    shared = jax.vmap(gradients, (0, None, 0))(x, weight, cotangent)
    assert_close(shared, [np.stack(both) for both in zip(*(gradients(x[i], weight, cotangent[i]) for i in range(2)))])
    own = jax.vmap(gradients)(x, weights, cotangent)
    assert_close(own, [np.stack(both) for both in zip(*(gradients(x[i], weights[i], cotangent[i]) for i in range(2)))])
