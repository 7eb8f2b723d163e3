"""The Flax NNX module: modes, parameters and their kinds, transformations, masks."""

from dataclasses import replace
from functools import partial
from typing import get_overloads, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jax_router
from jax_router import HashTable, Router, RouterConfig, Routing, SelectionBias, random_hash_table

DENSE = RouterConfig(hidden_size=32, num_experts=16, top_k=3, score_fn="sigmoid", scale=2.5, num_groups=4, top_groups=2)
UNIFORM = RouterConfig(hidden_size=32, num_experts=16, top_k=3, scale=1.5, mode="hash", vocab_size=50)
SCORED = replace(UNIFORM, hash_weights="scored")
CONFIGS = {"dense": DENSE, "uniform": UNIFORM, "scored": SCORED}


def make(name):
    router = Router(CONFIGS[name], rngs=nnx.Rngs(1))
    if name == "dense":
        router.bias[...] = jnp.linspace(-1, 1, 16, dtype=jnp.float32)
    return router


@pytest.fixture
def tokens(rng):
    """Hidden states, token ids (one out of range), a mask."""
    ids = rng.integers(0, 50, (4, 6)).astype(np.int32)
    ids[1, 1] = 50
    return {
        "x": jnp.asarray(rng.normal(0, 1, (4, 6, 32)), jnp.float32),
        "token_ids": jnp.asarray(ids),
        "token_mask": jnp.asarray(rng.random((4, 6)) < 0.8),
    }


def functional(router, weight, x, token_ids, token_mask, implementation="auto"):
    """What the module stands for, in terms of the ops."""
    config = router.config
    if config.mode == "dense":
        return jax_router.dense_router(
            x, weight, router.bias[...], token_mask=token_mask, implementation=implementation, **config.selection
        )
    hashed = jax_router.hash_router(jnp.where(token_mask, token_ids, -1), router.hash_lut[...], scale=config.scale)
    if weight is None:
        return hashed
    logits = jax_router.reference.router_logits(x, weight)
    return jax_router.route_at(logits, hashed.expert_ids, implementation=implementation, **config.scoring)


@pytest.mark.parametrize("name", CONFIGS)
def test_routes_as_the_ops_do(name, tokens):
    router = make(name)
    ids, mask = tokens["token_ids"], tokens["token_mask"]
    weights, expert_ids = nnx.jit(lambda router, tokens: router(**tokens))(router, tokens)
    weight = router.weight[...] if router.config.has_weight else None
    want = jax.jit(partial(functional, router))(weight, **tokens)
    np.testing.assert_array_equal(expert_ids, want.expert_ids)
    np.testing.assert_allclose(weights, want.weights, rtol=1e-6)
    np.testing.assert_array_equal(expert_ids[~mask], -1)
    np.testing.assert_array_equal(weights[~mask], 0)
    if name != "dense":
        np.testing.assert_array_equal(expert_ids[1, 1], -1)
        np.testing.assert_array_equal(weights[1, 1], 0)
    real = mask if name == "dense" else mask & (ids < 50)
    np.testing.assert_allclose(weights[real].sum(-1), router.config.scale, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("dense", {"weight": nnx.Param, "bias": SelectionBias}),
        ("uniform", {"hash_lut": HashTable}),
        ("scored", {"weight": nnx.Param, "hash_lut": HashTable}),
    ],
)
def test_state(name, kinds):
    """Each mode has the variables it needs and no other; only the weight is a Param."""
    router = make(name)
    state = dict(nnx.to_flat_state(nnx.state(router)))
    assert {path[-1]: type(variable) for path, variable in state.items()} == kinds
    shapes = {"weight": ((16, 32), jnp.float32), "bias": ((16,), jnp.float32), "hash_lut": ((50, 3), jnp.int32)}
    for path, variable in state.items():
        assert (variable[...].shape, variable[...].dtype) == shapes[path[-1]]
    assert bool(nnx.to_flat_state(nnx.state(router, nnx.Param))) == (name != "uniform")


def test_initial_values():
    """LeCun normal over the hidden size; a zero bias; tables of distinct experts; all by the seed."""
    wide = RouterConfig(hidden_size=1024, num_experts=64, top_k=2)
    router = Router(wide, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(np.std(router.weight[...]), 1024**-0.5, rtol=0.02)
    np.testing.assert_array_equal(router.bias[...], 0)
    np.testing.assert_array_equal(router.weight[...], Router(wide, rngs=nnx.Rngs(0)).weight[...])
    assert (router.weight[...] != Router(wide, rngs=nnx.Rngs(1)).weight[...]).mean() > 0.99
    table = np.sort(random_hash_table(jax.random.key(0), (2000, 4), 16), axis=-1)
    assert (np.diff(table, axis=-1) > 0).all()
    counts = np.bincount(table.ravel(), minlength=16)
    assert counts.size == 16
    assert (abs(counts - 500) < 100).all()


def test_own_initializers():
    router = Router(
        SCORED,
        rngs=nnx.Rngs(0),
        weight_init=nnx.initializers.ones_init(),
        hash_lut_init=lambda key, shape, num_experts: np.full(shape, num_experts - 1),
    )
    np.testing.assert_array_equal(router.weight[...], 1)
    np.testing.assert_array_equal(router.hash_lut[...], 15)
    assert router.hash_lut[...].dtype == jnp.int32


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_dtypes(dtype, tokens):
    """The product's operands are cast to `dtype`, or to that of the hidden states; the logits are f32."""
    config = replace(DENSE, dtype=dtype, param_dtype=jnp.bfloat16)
    router = Router(config, rngs=nnx.Rngs(0))
    assert router.weight[...].dtype == jnp.bfloat16
    (weights, expert_ids), logits = router(tokens["x"], return_logits=True)
    assert (weights.dtype, expert_ids.dtype, logits.dtype) == (jnp.float32, jnp.int32, jnp.float32)
    cast = jnp.float32 if dtype is None else dtype
    want = jax_router.reference.router_logits(tokens["x"].astype(cast), router.weight[...].astype(cast))
    np.testing.assert_allclose(logits, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["dense", "scored"])
def test_logits(name, tokens):
    router = make(name)
    routing, logits = router(**tokens, return_logits=True)
    assert logits.shape == (4, 6, 16)
    want = np.asarray(tokens["x"], np.float64) @ np.asarray(router.weight[...], np.float64).T
    routed = np.asarray(tokens["token_mask"]) & (name == "dense" or np.asarray(tokens["token_ids"]) < 50)
    np.testing.assert_allclose(logits, np.where(routed[..., None], want, 0), rtol=1e-4, atol=1e-5)
    plain = router(**tokens)
    np.testing.assert_array_equal(routing.expert_ids, plain.expert_ids)
    np.testing.assert_allclose(routing.weights, plain.weights, rtol=1e-5)


@pytest.mark.parametrize("name", ["dense", "scored"])
def test_gradient(name, tokens):
    """nnx.grad gives the weight's gradient, that of the ops, and has nothing for bias and table."""
    router = make(name)

    def loss(router, tokens):
        return (router(**tokens).weights[..., 0] ** 2).sum()

    gradient = nnx.jit(nnx.grad(loss))(router, tokens)
    (path, value), *others = nnx.to_flat_state(gradient)
    assert path == ("weight",)
    assert others == []

    def functional_loss(weight):
        return (functional(router, weight, **tokens, implementation="reference").weights[..., 0] ** 2).sum()

    want = jax.jit(jax.grad(functional_loss))(router.weight[...])
    assert np.abs(want).max() > 1e-4
    np.testing.assert_allclose(value[...], want, rtol=1e-4, atol=1e-6)


def test_gradient_of_the_whole_state(tokens):
    """Differentiating everything, table and bias too: float0 for the integers, zero for the bias."""
    for name, other in (("scored", "hash_lut"), ("dense", "bias")):
        graph, state = nnx.split(make(name))

        def loss(state, graph=graph):
            return (nnx.merge(graph, state)(**tokens).weights[..., 0] ** 2).sum()

        gradient = jax.grad(loss, allow_int=True)(state)
        leaf = gradient[other][...]
        if name == "scored":
            assert leaf.dtype == jax.dtypes.float0
        else:
            np.testing.assert_array_equal(leaf, 0)


def test_a_training_step_moves_the_weight_alone(tokens):
    router = make("dense")
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(router)))

    @nnx.jit
    def step(router, tokens):
        gradient = nnx.grad(lambda router: (router(**tokens).weights[..., 0] ** 2).sum())(router)
        nnx.update(router, jax.tree.map(lambda p, g: p - 0.1 * g, nnx.state(router, nnx.Param), gradient))

    step(router, tokens)
    assert (before["weight"] != np.asarray(router.weight[...])).any()
    np.testing.assert_array_equal(before["bias"], router.bias[...])


def test_bias_update_between_steps(tokens):
    """A balancing rule writes the bias; a compiled router sees it."""
    router = make("dense")
    route = nnx.jit(lambda router, x: router(x))
    route(router, tokens["x"])
    router.bias[...] = jnp.zeros(16).at[jnp.array([2, 3, 9])].set(100.0)
    ids = np.unique(route(router, tokens["x"]).expert_ids)
    assert set(ids) == {2, 3, 9}


@pytest.mark.parametrize("name", CONFIGS)
def test_split_and_merge(name, tokens):
    router = make(name)
    graph, state = nnx.split(router)
    rebuilt = nnx.merge(graph, jax.tree.map(lambda leaf: leaf, state))
    assert rebuilt.config == router.config
    for mine, want in zip(rebuilt(**tokens), router(**tokens)):
        np.testing.assert_array_equal(mine, want)


def test_layers_in_a_scan(tokens):
    """Routers of one configuration, stacked by nnx.vmap and run by nnx.scan."""
    x = tokens["x"]
    create = nnx.vmap(lambda rngs: Router(DENSE, rngs=rngs))
    stacked = create(nnx.Rngs(0).split(3))
    assert stacked.weight[...].shape == (3, 16, 32)

    @nnx.jit
    def run(stacked, x):
        return nnx.scan(
            lambda x, router: (x * router(x).weights.sum(-1, keepdims=True), router(x).expert_ids),
            in_axes=(nnx.Carry, 0),
            out_axes=(nnx.Carry, 0),
        )(x, stacked)

    _, ids = run(stacked, x)
    for layer in range(3):
        graph, state = nnx.split(stacked)
        one = nnx.merge(graph, jax.tree.map(lambda leaf, layer=layer: leaf[layer], state))
        np.testing.assert_array_equal(ids[layer], one(x).expert_ids)
        x = x * one(x).weights.sum(-1, keepdims=True)


def test_dense_router_ignores_token_ids(tokens):
    router = make("dense")
    for mine, want in zip(router(tokens["x"], token_ids=tokens["token_ids"]), router(tokens["x"])):
        np.testing.assert_array_equal(mine, want)


def test_config_is_frozen_and_hashable():
    assert hash(DENSE) == hash(replace(DENSE))
    with pytest.raises(AttributeError):
        DENSE.top_k = 1


def test_precision_of_a_router():
    def program(**options):
        router = Router(RouterConfig(32, 16, 2, **options), rngs=nnx.Rngs(0))
        return jax.jit(router).lower(jnp.ones((200, 32))).as_text()

    assert "precision = [HIGHEST, HIGHEST]" in program()
    assert "precision = [DEFAULT, DEFAULT]" in program(precision="default")
    assert "precision = [HIGH, HIGH]" in program(precision=jax.lax.Precision.HIGH)


@pytest.mark.parametrize("options", [{}, {"mode": "hash", "vocab_size": 9, "hash_weights": "scored"}])
def test_logit_bias_of_a_router(options, rng):
    """It is part of the logits, and trained."""
    router = Router(RouterConfig(32, 16, 2, logit_bias=True, **options), rngs=nnx.Rngs(0))
    assert type(router.logit_bias) is nnx.Param
    np.testing.assert_array_equal(router.logit_bias, np.zeros(16, np.float32))
    router.logit_bias[...] = jnp.asarray(rng.normal(0, 1, 16), jnp.float32)
    x, token_ids = rng.normal(0, 1, (5, 32)).astype(np.float32), np.arange(5)
    _, logits = router(x, token_ids=token_ids, return_logits=True)
    weight, logit_bias = np.asarray(router.weight[...]), np.asarray(router.logit_bias)
    np.testing.assert_allclose(logits, x @ weight.T + logit_bias, rtol=1e-4, atol=1e-5)
    gradient = nnx.grad(lambda router: router(x, token_ids=token_ids).weights[..., 0].sum())(router)
    assert np.abs(gradient["logit_bias"][...]).max() > 1e-4


def test_implementation_of_a_router():
    def lowered(x, token_ids=None, **options):
        router = Router(RouterConfig(8, 16, 2, **options), rngs=nnx.Rngs(0))
        return jax.jit(lambda x: router(x, token_ids=token_ids)).lower(x).as_text()

    x = jnp.ones((4, 8))
    hashed = {"mode": "hash", "vocab_size": 9}
    for options in ({}, hashed, {**hashed, "hash_weights": "scored"}):
        assert "jax_router." in lowered(x, jnp.arange(4), **options)
        assert "jax_router." not in lowered(x, jnp.arange(4), implementation="reference", **options)
    router = Router(RouterConfig(8, 5000, 2, implementation="native"), rngs=nnx.Rngs(0))
    with pytest.raises(NotImplementedError, match="4096 experts"):
        jax.jit(router).lower(x)


@pytest.mark.parametrize("name", CONFIGS)
def test_with_64_bits(name, tokens):
    """No dtype changes with the flag, neither where the router is made nor where it routes."""
    want = make(name)(**tokens)
    with jax.enable_x64(True):
        router = make(name)
        got = jax.jit(lambda router, tokens: router(**tokens))(router, tokens)
    for path, variable in nnx.to_flat_state(nnx.state(router)):
        assert variable[...].dtype == (jnp.int32 if path[-1] == "hash_lut" else jnp.float32)
    for mine, other in zip(got, want):
        assert mine.dtype == other.dtype
        np.testing.assert_array_equal(mine.shape, other.shape)


def test_types_of_a_call():
    """A type checker knows that logits come with return_logits=True, and else do not."""
    returned = [get_type_hints(overload)["return"] for overload in get_overloads(Router.__call__)]
    assert returned == [Routing, tuple[Routing, jax.Array], Routing | tuple[Routing, jax.Array]]


def test_equal_configurations_compare_equal():
    """However their dtypes and their precision are written; and they read well."""
    one = RouterConfig(8, 16, 2, dtype=jnp.bfloat16, param_dtype="float32", precision=["high", "high"])
    other = RouterConfig(8, 16, 2, dtype=np.dtype(jnp.bfloat16), param_dtype=np.float32, precision=("high", "high"))
    assert one == other
    assert hash(one) == hash(other)
    assert "dtype=dtype(bfloat16), param_dtype=dtype('float32')" in repr(one)


def test_numbers_of_any_kind_are_those_of_python():
    """As one of JAX's, a number would have no hash."""
    sizes = {"hidden_size": np.int64(8), "num_experts": jnp.int32(16), "top_k": np.uint8(3)}
    given = RouterConfig(**sizes, scale=jnp.float32(2), softcap=np.float32(30), renormalize=np.True_)
    plain = RouterConfig(8, 16, 3, scale=2.0, softcap=30.0, renormalize=True)
    assert given == plain
    assert hash(given) == hash(plain)
    assert repr(given) == repr(plain)
