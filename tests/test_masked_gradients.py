"""Nothing that a masked token, or a choice of id -1, holds reaches a gradient: it is that of the batch without it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jax_router
from cases import draw
from jax_router import Router, RouterConfig

TOKENS, POISON = 6, np.array([np.nan, np.inf, -np.inf, 3e38])
ROUTED = np.array([True, False, True, False, True, True])
SCORINGS = [("sqrtsoftplus", True), ("sigmoid", False), ("softmax", True), ("softmax", False)]


def poisoned(rng, *shape):
    """Random rows, those of masked tokens with NaN, infinities and large numbers in them."""
    x = draw(rng, "x", TOKENS, *shape)
    x[~ROUTED] = np.resize(POISON, x[~ROUTED].shape)
    x[1, 1:] = draw(rng, "x", *x[1, 1:].shape)  # one number is enough
    return x


@pytest.fixture(params=["native", "reference", "jax_router.reference"])
def op(request):
    def find(name, **options):
        if request.param == "jax_router.reference":
            return partial(getattr(jax_router.reference, name), **options)
        return partial(getattr(jax_router, name), implementation=request.param, **options)

    return find


def check(loss, shared, masked, clean):
    """The gradient of `loss(*shared, *per token)` in all of its operands, twice, against that of the routed tokens."""

    def second(*values):
        gradients = jax.grad(loss, tuple(range(len(values))))(*values)
        return sum((jnp.where(jnp.isfinite(g), g, 1e9) ** 2).sum() for g in gradients)

    @jax.jit
    def gradients(*values):
        return [jax.grad(function, tuple(range(len(values))))(*values) for function in (loss, second)]

    for got, want in zip(gradients(*shared, *masked), gradients(*shared, *clean)):
        for i, (mine, other) in enumerate(zip(got, want)):
            assert np.isfinite(mine).all()
            if i >= len(shared):
                np.testing.assert_array_equal(mine[~ROUTED], 0)
                mine = mine[ROUTED]
            np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("score_fn", "renormalize", "x_dtype"),
    [*((*scoring, jnp.float32) for scoring in SCORINGS), ("sigmoid", False, jnp.bfloat16)],
)
def test_dense_router(score_fn, renormalize, x_dtype, op, rng):
    x, weight, logit_bias = poisoned(rng, 8), draw(rng, "weight", 16, 8), draw(rng, "logit_bias", 16)
    cotangent = draw(rng, "c", TOKENS, 3)
    cotangents = {TOKENS: cotangent, ROUTED.sum(): cotangent[ROUTED]}
    route = op("dense_router", top_k=3, score_fn=score_fn, renormalize=renormalize)

    def loss(weight, logit_bias, x):
        mask = ROUTED if len(x) == TOKENS else None
        routing = route(x.astype(x_dtype), weight, logit_bias=logit_bias, token_mask=mask)
        return (routing.weights * cotangents[len(x)]).sum()

    check(loss, [weight, logit_bias], [x], [x[ROUTED]])


@pytest.mark.parametrize(("score_fn", "renormalize"), SCORINGS)
@pytest.mark.parametrize("name", ["activation_topk", "route_at", "scored_hash_router"])
def test_ops_of_logits(name, score_fn, renormalize, op, rng):
    """By a mask, by ids of -1, by token ids of -1. The cotangents of masked weights are NaN."""
    logits = poisoned(rng, 16)
    ids, token_ids, table = draw(rng, "lut", TOKENS, 3), np.arange(TOKENS, dtype=np.int32), draw(rng, "lut", 12, 3)
    ids[~ROUTED], token_ids[~ROUTED] = -1, -1
    options = {"score_fn": score_fn, "renormalize": renormalize}
    call = {
        "activation_topk": lambda x, rows: op(name, top_k=3, **options)(x, token_mask=ROUTED[rows]),
        "route_at": lambda x, rows: op(name, **options)(x, ids[rows]),
        "scored_hash_router": lambda x, rows: op(name, **options)(x, token_ids[rows], table),
    }[name]
    cotangent = draw(rng, "c", TOKENS, 3)
    cotangent[~ROUTED] = np.nan

    def gradient(logits):
        rows = slice(None) if len(logits) == TOKENS else ROUTED
        return jax.vjp(lambda x: call(x, rows).weights, logits)[1](cotangent[rows])[0]

    got, want = jax.jit(gradient)(logits), jax.jit(gradient)(logits[ROUTED])
    np.testing.assert_array_equal(got[~ROUTED], 0)
    np.testing.assert_allclose(got[ROUTED], want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("score_fn", "renormalize"), SCORINGS)
def test_one_invalid_choice_among_others(score_fn, renormalize, op, rng):
    """The cotangent of its weight, which may be NaN, is that of a constant."""
    logits, ids = draw(rng, "logits", 3, 16), np.array([[3, -1, 5], [-1, 2, 16], [7, 8, 9]], np.int32)
    cotangent = draw(rng, "c", 3, 3)
    route = op("route_at", score_fn=score_fn, renormalize=renormalize)
    pull = jax.jit(lambda x, c: jax.vjp(lambda x: route(x, ids).weights, x)[1](c)[0])
    valid = (ids >= 0) & (ids < 16)
    want = pull(logits, np.where(valid, cotangent, 0))
    np.testing.assert_array_equal(pull(logits, np.where(valid, cotangent, np.nan)), want)


CONFIGS = {
    "dense": RouterConfig(8, 16, 3, logit_bias=True),
    "half precision": RouterConfig(8, 16, 3, score_fn="softmax", renormalize=False, dtype=jnp.bfloat16),
    "scored": RouterConfig(8, 16, 3, mode="hash", vocab_size=12, hash_weights="scored", logit_bias=True),
}


@pytest.mark.parametrize("with_logits", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_router(name, with_logits, rng):
    router = Router(CONFIGS[name], rngs=nnx.Rngs(0))
    x, token_ids, cotangent = poisoned(rng, 8), np.arange(TOKENS, dtype=np.int32), draw(rng, "c", TOKENS, 3)

    def loss(router, x, token_ids, token_mask, cotangent):
        tokens = {"token_ids": token_ids, "token_mask": token_mask}
        if not with_logits:
            return (router(x, **tokens).weights * cotangent).sum()
        routing, logits = router(x, **tokens, return_logits=True)
        assert logits.dtype == jnp.float32
        return (routing.weights * cotangent).sum() + (logits**2).sum() + jax.nn.logsumexp(logits, axis=-1).sum()

    gradient = nnx.jit(nnx.grad(loss, argnums=(0, 1)))
    got, got_x = gradient(router, x, token_ids, ROUTED, cotangent)
    # A row of zeros adds a constant to the loss.
    want, want_x = gradient(router, x[ROUTED], token_ids[ROUTED], np.ones(4, bool), cotangent[ROUTED])
    for mine, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.abs(other).max() > 1e-3
        np.testing.assert_allclose(mine, other, rtol=1e-2 if name == "half precision" else 1e-4, atol=1e-5)
    np.testing.assert_array_equal(got_x[~ROUTED], 0)
    np.testing.assert_allclose(got_x[ROUTED], want_x, rtol=1e-4, atol=1e-5)
    if with_logits:
        _, logits = router(x, token_ids=token_ids, token_mask=ROUTED, return_logits=True)
        np.testing.assert_array_equal(logits[~ROUTED], 0)


def test_a_hash_layer_without_experts_for_a_token(rng):
    """Padding by a token id of -1, by one of the vocabulary's size, and by a row of the table without experts."""
    router = Router(CONFIGS["scored"], rngs=nnx.Rngs(0))
    router.hash_lut[...] = router.hash_lut[...].at[7].set(jnp.array([-1, 16, -1], jnp.int32))
    token_ids = np.array([0, -1, 2, 7, 12, 5], np.int32)
    x = draw(rng, "x", TOKENS, 8)
    x[[1, 3, 4]] = np.nan

    def loss(router, rows):
        routing, logits = router(x[rows], token_ids=token_ids[rows], return_logits=True)
        return (routing.weights[..., 0] ** 2).sum() + (logits**2).sum()

    got, want = (nnx.grad(partial(loss, rows=np.array(rows)))(router) for rows in ([0, 1, 2, 3, 4, 5], [0, 2, 5]))
    for mine, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-6)


def test_along_a_direction_that_is_not_finite(op, rng):
    """Forward mode, and the gradient of its result."""
    x, weight = poisoned(rng, 8), draw(rng, "weight", 16, 8)
    route = op("dense_router", top_k=3)

    def pushed(weight, x, mask):
        return jax.jvp(lambda x, w: route(x, w, token_mask=mask).weights, (x, weight), (x, weight))[1]

    got, want = jax.jit(pushed)(weight, x, ROUTED), jax.jit(pushed)(weight, x[ROUTED], np.ones(4, bool))
    np.testing.assert_array_equal(got[~ROUTED], 0)
    np.testing.assert_allclose(got[ROUTED], want, rtol=1e-5, atol=1e-6)
    by_weight = jax.jit(jax.grad(lambda *operands: (pushed(*operands) ** 2).sum()))
    np.testing.assert_allclose(
        by_weight(weight, x, ROUTED), by_weight(weight, x[ROUTED], np.ones(4, bool)), rtol=1e-4, atol=1e-6
    )


def test_under_vmap_and_scan(op, rng):
    x, weight = np.stack([poisoned(rng, 8), poisoned(rng, 8)]), draw(rng, "weight", 16, 8)
    masks = np.stack([ROUTED, ROUTED])
    route = op("dense_router", top_k=3)

    def weights(weight, x, mask):
        return route(x, weight, token_mask=mask).weights[..., 0] ** 2

    def by_vmap(weight):
        return jax.vmap(weights, in_axes=(None, 0, 0))(weight, x, masks).sum()

    def by_scan(weight):
        return jax.lax.scan(lambda _, row: (None, weights(weight, *row)), None, (x, masks))[1].sum()

    def one_by_one(weight):
        return sum(weights(weight, one[ROUTED], np.ones(4, bool)).sum() for one in x)

    want = jax.jit(jax.grad(one_by_one))(weight)
    for function in (by_vmap, by_scan):
        np.testing.assert_allclose(jax.jit(jax.grad(function))(weight), want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(
    ("x_dtype", "specs"),
    [
        (jnp.float32, (("d", None), (None, None), ("d",))),
        (jnp.float32, (("d", None), ("d", None), (None,))),
        (jnp.bfloat16, ((None, "d"), (None, "d"), (None,))),
        (jnp.bfloat16, (("d", None), (None, None), (None,))),
    ],
)
def test_sharded(specs, mode, x_dtype, devices, rng):
    tokens = 2 * len(devices)
    x, weight = draw(rng, "x", tokens, 16), draw(rng, "weight", 16, 16)
    mask = np.arange(tokens) % 3 > 0
    x[~mask] = np.nan
    mesh = jax.make_mesh((len(devices),), ("d",), (mode,), devices=devices)
    values = [x.astype(x_dtype), weight, mask]

    def loss(x, weight, mask):
        return (jax_router.dense_router(x, weight, top_k=3, token_mask=mask).weights[..., 0] ** 2).sum()

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    want = gradient(values[0][mask], weight, np.ones(mask.sum(), bool))
    with jax.set_mesh(mesh):
        sharded = [jax.device_put(v, NamedSharding(mesh, PartitionSpec(*s))) for v, s in zip(values, specs)]
        got = gradient(*sharded)
    rtol = 1e-4 if x_dtype == jnp.float32 else 2e-2
    np.testing.assert_allclose(np.asarray(got[1]), want[1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        np.asarray(got[0], np.float32)[mask], np.asarray(want[0], np.float32), rtol=rtol, atol=1e-3
    )
    np.testing.assert_array_equal(np.asarray(got[0], np.float32)[~mask], 0)


def test_the_forward_pass_keeps_no_masked_copy():
    """What waits for the backward pass is x itself, which may be NaN, and the mask."""
    x, weight, mask = jnp.full((256, 8), jnp.nan), jnp.ones((16, 8)), jnp.arange(256) > 300

    def weights(x, weight):
        return jax_router.dense_router(x, weight, top_k=3, token_mask=mask).weights

    kept = [leaf for leaf in jax.tree.leaves(jax.vjp(weights, x, weight)[1]) if leaf.shape == x.shape]
    np.testing.assert_array_equal(kept, [x])
