"""Hidden states in half precision and a weight in f32, as training has them: multiplied to the accuracy of f32."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jax_router
from jax_router import Router, RouterConfig
from jax_router._logits import _dot_in_parts, router_logits
from jax_router._product import bf16_parts
from models import DTYPES
from oracle import f64
from oracle import top_k as oracle_top_k

HALF = ["bf16", "f16"]


@pytest.fixture
def operands(rng):
    """Many tokens, and a weight whose rounding to bf16 shows."""
    return rng.normal(0, 1, (200, 512)).astype(np.float32), rng.normal(0, 512**-0.5, (64, 512)).astype(np.float32)


@pytest.mark.parametrize("product", [router_logits, _dot_in_parts])  # what this platform takes, and what a GPU takes
@pytest.mark.parametrize("dtype", HALF)
def test_accuracy(dtype, product, operands):
    x, weight = operands[0].astype(DTYPES[dtype]), operands[1] * np.logspace(-20, 20, 64, dtype=np.float32)[:, None]
    logits = jax.jit(product)(x, weight)
    assert logits.dtype == jnp.float32
    magnitude = np.abs(f64(x)) @ np.abs(f64(weight)).T
    assert (np.abs(f64(logits) - f64(x) @ f64(weight).T) <= 3e-7 * magnitude).all()


def test_parts_are_exact(rng):
    """Of all f32, but for those whose last part underflows. Infinity is the first part, and NaN stays NaN."""
    bits = rng.integers(0, 1 << 32, 100_000).astype(np.uint32)
    values = np.concatenate([bits.view(np.float32), np.float32([0, -0.0, np.finfo(np.float32).max, np.inf, -np.inf])])
    values = np.append(
        values, np.array(0x7F800001, np.uint32).view(np.float32)
    )  # a NaN whose first bits are infinity's
    parts = f64(jax.jit(partial(bf16_parts, count=3))(values))
    assert np.isnan(parts.sum(0)[np.isnan(values)]).all()
    rest = values[~np.isnan(values)]
    np.testing.assert_allclose(parts.sum(0)[~np.isnan(values)], f64(rest), rtol=0, atol=2e-38)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("tokens", [1, 64, 65, 200])
def test_ids(tokens, dtype, implementation, operands):
    """They are those of float64, where those of a rounded weight are not."""
    x, weight = operands[0][:tokens].astype(DTYPES[dtype]), operands[1]
    routing = jax.jit(partial(jax_router.dense_router, top_k=6, implementation=implementation))(x, weight)
    np.testing.assert_array_equal(routing.expert_ids, oracle_top_k(f64(x) @ f64(weight).T, 6))
    if (tokens, dtype) == (200, "bf16"):
        rounded = jax_router.dense_router(x, weight.astype(x.dtype), top_k=6)
        assert (rounded.expert_ids != routing.expert_ids).any()


@pytest.mark.parametrize("dtype", HALF)
def test_gradient(dtype, implementation, operands):
    """That of the f32 product, which x and its gradient are converted for; the weight's is not rounded."""
    x, weight = operands[0].astype(DTYPES[dtype]), operands[1]

    def loss(x, weight):
        weights = jax_router.dense_router(x, weight, top_k=6, implementation=implementation).weights
        return (weights * jnp.linspace(-1, 1, 6)[None]).sum()

    got = jax.jit(jax.grad(loss, (0, 1)))(x, weight)
    want = jax.jit(jax.grad(loss, (0, 1)))(x.astype(np.float32), weight)
    assert (got[0].dtype, got[1].dtype) == (x.dtype, weight.dtype)
    np.testing.assert_allclose(f64(got[0]), f64(want[0]), rtol=1e-2, atol=1e-5)
    # On a GPU the default precision of JAX rounds the operands of this product to 11 bits.
    rtol = 1e-5 if jax.default_backend() == "cpu" else 2e-3
    np.testing.assert_allclose(got[1], want[1], rtol=rtol, atol=rtol * np.abs(want[1]).max())


def products(function, *operands, platform):
    """The operand dtypes of the products of a program."""
    text = jax.jit(function).trace(*operands).lower(lowering_platforms=(platform,)).as_text()
    return re.findall(r"dot_general.*tensor<[0-9x]*x(\w+)>, tensor<[0-9x]*x(\w+)>\) ->", text)


def test_products_of_the_platforms():
    """bf16 alone where tensor cores are, and f32 on a CPU, for few tokens, and at a precision that is asked for."""
    x, weight = jax.ShapeDtypeStruct((200, 32), jnp.bfloat16), jax.ShapeDtypeStruct((16, 32), jnp.float32)
    route = partial(jax_router.dense_router, top_k=2)
    assert products(route, x, weight, platform="tpu") == [("bf16", "bf16")]
    assert products(route, x, weight, platform="cpu") == [("f32", "f32")]
    few = jax.ShapeDtypeStruct((64, 32), jnp.bfloat16)
    assert products(route, few, weight, platform="tpu") == [("f32", "f32")]
    assert products(partial(route, precision="default"), x, weight, platform="tpu") == [("f32", "f32")]


@pytest.mark.parametrize("specs", [(("d", None), (None, None)), ((None, "d"), (None, "d")), ((None, None), ("d", None)),
                                   (("d", None), ("d", None))])  # fmt: skip
@pytest.mark.parametrize("dtype", HALF)
def test_parts_in_an_explicit_mesh(dtype, specs, devices, operands):
    mesh = jax.make_mesh((len(devices),), ("d",), (AxisType.Explicit,), devices=devices)
    values = [operands[0].astype(DTYPES[dtype]), operands[1]]
    with jax.set_mesh(mesh):
        sharded = [jax.device_put(v, NamedSharding(mesh, PartitionSpec(*spec))) for v, spec in zip(values, specs)]
        got = jax.jit(_dot_in_parts)(*sharded)
    np.testing.assert_allclose(np.asarray(got), jax.jit(_dot_in_parts)(*values), rtol=1e-5, atol=1e-5)
    assert got.sharding.spec[0] == specs[0][0]


def test_router(operands):
    """f32 parameters are not rounded, unless its `dtype` says so; half-precision ones are taken as they are."""
    x, weight = jnp.asarray(operands[0], jnp.bfloat16), operands[1]

    def route(x, weight, **options):
        config = RouterConfig(512, 64, 6, param_dtype=weight.dtype, **options)
        return Router(config, rngs=nnx.Rngs(0), weight_init=lambda *_: jnp.asarray(weight))(x, return_logits=True)

    want = oracle_top_k(f64(x) @ f64(weight).T, 6)
    np.testing.assert_array_equal(route(x, weight)[0].expert_ids, want)
    rounded = weight.astype(jnp.bfloat16)
    logits_of_rounded = f64(x) @ f64(rounded).T
    for routing, logits in (
        route(x, weight, dtype=jnp.bfloat16),
        route(x, rounded),
        route(x.astype(jnp.float32), rounded),
        route(x, rounded, dtype=jnp.float32),
    ):
        np.testing.assert_allclose(logits, logits_of_rounded, rtol=1e-4, atol=1e-5)
        assert (np.asarray(routing.expert_ids) != want).any()
    half = weight.astype(np.float16)
    np.testing.assert_allclose(route(x, half)[1], f64(x) @ f64(half).T, rtol=1e-4, atol=1e-5)
