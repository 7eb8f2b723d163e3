"""The gradient of hidden states: sums of their experts' rows of the weight, in place of a product with all of them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from cases import draw
from jax_router import _native, dense_router
from jax_router._routed_product import _EXPERTS_A_CHOICE

TOKENS, HIDDEN, EXPERTS, K = 12, 24, 128, 3
HAS_KERNELS = not isinstance(_native.load("cpu" if jax.default_backend() == "cpu" else "cuda"), ImportError)
NUMBERS = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])


@pytest.fixture
def operands(rng):
    shapes = {"x": (TOKENS, HIDDEN), "w": (EXPERTS, HIDDEN), "c": (TOKENS, K)}
    return tuple(jnp.asarray(draw(rng, name, *shape)) for name, shape in shapes.items())


def loss(x, weight, cotangent, **options):
    weights = dense_router(x, weight, top_k=K, **options).weights
    return (weights * cotangent).sum()


def sums_rows(function, *operands):
    return "jax_router.combine" in jax.jit(function).lower(*operands).as_text()


def assert_close(found, expected, dtype):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
        rtol = {jnp.float32: 1e-5, jnp.bfloat16: 2e-2, jnp.float16: 2e-3}[dtype]
        np.testing.assert_allclose(one, other, rtol=rtol, atol=rtol * np.abs(other).max())


@NUMBERS
@pytest.mark.parametrize("options", [{}, {"score_fn": "softmax"}, {"token_mask": np.arange(TOKENS) % 4 != 1}])
def test_gradients_are_those_of_the_product(dtype, options, operands):
    x, weight, cotangent = operands[0].astype(dtype), operands[1].astype(dtype), operands[2]
    gradient = partial(jax.grad(loss, (0, 1)), x, weight, cotangent)
    of_sums, of_product = (
        jax.jit(partial(gradient, **options, implementation=name))() for name in ("auto", "reference")
    )
    assert_close(of_sums, of_product, dtype)
    assert sums_rows(partial(jax.grad(loss), **options), x, weight, cotangent) == HAS_KERNELS


@NUMBERS
def test_other_derivatives_are_those_of_the_product(dtype, operands):
    x, weight, cotangent = operands[0].astype(dtype), operands[1].astype(dtype), operands[2]

    def derivatives(implementation):
        value = partial(loss, cotangent=cotangent, implementation=implementation)

        def square(x, weight):
            return sum((part.astype(jnp.float32) ** 2).sum() for part in jax.grad(value, (0, 1))(x, weight))

        pushed = jax.jvp(value, (x, weight), (weight[:TOKENS], x[:1] + weight))[1]
        mapped = jax.vmap(jax.grad(lambda x, c: loss(x, weight, c, implementation=implementation)))(x, cotangent)
        of_weights = jax.vmap(jax.grad(value), (None, 0))(x, jnp.stack([weight, weight[::-1]]))
        return pushed, mapped, of_weights, jax.grad(square, (0, 1))(x, weight)

    found, expected = (jax.jit(derivatives, static_argnums=0)(name) for name in ("auto", "reference"))
    assert_close(found, expected, dtype)


def test_no_other_expert_reaches_a_gradient(operands):
    """Not even one whose row is not a number."""
    x, weight, cotangent = operands
    expert_ids = dense_router(x, weight, top_k=K).expert_ids
    unused = np.setdiff1d(np.arange(EXPERTS), expert_ids)[0]
    infinite = weight.at[unused].set(jnp.full(HIDDEN, -jnp.inf))
    bias = jnp.zeros(EXPERTS).at[unused].set(-jnp.inf)  # whatever its logit is
    x = jnp.abs(x)
    expected = jax.grad(loss)(x, weight, cotangent, bias=bias)
    if HAS_KERNELS:
        np.testing.assert_array_equal(jax.grad(loss)(x, infinite, cotangent, bias=bias), expected)


def test_a_product_where_choices_are_many_or_xla_may_split_it(operands):
    x, weight, cotangent = operands
    enough = _EXPERTS_A_CHOICE * K
    assert not sums_rows(jax.grad(loss), x, weight[: enough - 1], cotangent)
    assert sums_rows(jax.grad(loss), x, weight[:enough], cotangent) == HAS_KERNELS
    mesh = jax.make_mesh((min(2, jax.device_count()),), ("a",), axis_types=(AxisType.Auto,))
    if mesh.size > 1:
        x = jax.device_put(x, NamedSharding(mesh, P("a")))
        assert not sums_rows(jax.grad(loss), x, weight, cotangent)


def test_a_mapped_axis_that_is_sharded(operands, devices):
    """In a mesh with Explicit axes, where the mapped function cannot see it."""
    x, weight, cotangent = operands
    batch = jnp.stack([x + number for number in range(len(devices))])
    found, expected = (
        jax.jit(jax.vmap(jax.grad(partial(loss, implementation=name)), (0, None, None)))
        for name in ("auto", "reference")
    )
    expected = expected(batch, weight, cotangent)
    mesh = jax.make_mesh((len(devices),), ("a",), (AxisType.Explicit,), devices=devices)
    with jax.set_mesh(mesh):
        found = found(jax.device_put(batch, NamedSharding(mesh, P("a"))), weight, cotangent)
    assert_close(found, expected, jnp.float32)
    assert found.sharding.spec == P("a", None, None)
