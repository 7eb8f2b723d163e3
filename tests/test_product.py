"""The product of bf16 operands, and its gradients, which multiply an f32 cotangent in two bf16 parts."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_router
from jax_router import _product
from jax_router._logits import router_logits
from jax_router._product import Axes, product
from jax_router._sharding import product_sharding
from models import DTYPES
from oracle import f64

BF16 = DTYPES["bf16"]


@pytest.fixture
def operands(rng):
    """x [2, 40, 64], the weight [16, 64], and a cotangent of the logits whose rows differ by orders of magnitude."""
    scales = np.logspace(-12, 12, 80, dtype=np.float32).reshape(2, 40, 1)
    return (
        rng.normal(0, 1, (2, 40, 64)).astype(BF16),
        rng.normal(0, 0.1, (16, 64)).astype(BF16),
        rng.normal(0, 1, (2, 40, 16)).astype(np.float32) * scales,
    )


@pytest.fixture(params=["as here", "in parts"])
def way(request, monkeypatch):
    """A CPU multiplies in f32; there, "in parts" is what all other devices do."""
    if request.param == "in parts":
        jax.clear_caches()
        monkeypatch.setattr(_product, "_dot_in_f32", _product._dot_in_parts)
    yield request.param
    jax.clear_caches()


def gradients(x, weight, cotangent):
    return jax.vjp(router_logits, x, weight)[1](cotangent)


BATCHED = Axes(((0,), (2,)), ((1,), (1,)))


@pytest.mark.parametrize(
    ("axes", "is_swapped"),
    [(Axes(((1,), (1,))), False), (Axes(((0,), (1,))), False), (Axes(((0,), (1,))), True), (BATCHED, True)],
)
def test_accuracy(axes, is_swapped, way, rng):
    """2^-16 of the sum of magnitudes, where one bf16 part loses 2^-9: however the axes lie, and on both sides."""
    sizes = {0: 48, 1: 32}
    lhs = (rng.normal(0, 1, (48, 32)) * np.logspace(-10, 10, 32)).astype(np.float32)
    shape = [24] * (1 + len(axes.batch[0]) + 1)
    for of_lhs, of_rhs in ((*axes.contracted,), (*axes.batch,)):
        for left, right in zip(of_lhs, of_rhs):
            shape[right] = sizes[left]
    rhs = rng.normal(0, 1, shape).astype(BF16)
    left, right, axes = (rhs, lhs, axes.swapped()) if is_swapped else (lhs, rhs, axes)
    got = jax.jit(partial(product, axes=axes, dtype=jnp.float32))(left, right)

    def dot(lhs, rhs):
        return np.asarray(jax.lax.dot_general(lhs, rhs, axes))

    with jax.enable_x64(True):
        want, magnitude = dot(f64(left), f64(right)), dot(np.abs(f64(left)), np.abs(f64(right)))
    assert (np.abs(f64(got) - want) <= 2.0**-16 * magnitude).all()
    assert (np.abs(f64(got) - want) > 0).any()


def test_gradients_are_rounded_once(way, operands):
    x, weight, cotangent = operands
    of_x, of_weight = jax.jit(gradients)(x, weight, cotangent)
    assert of_x.dtype == of_weight.dtype == jnp.bfloat16
    for got, sum_of in ((of_x, "nte,ed->ntd"), (of_weight, "nte,ntd->ed")):
        other = weight if got is of_x else x
        want = np.einsum(sum_of, f64(cotangent), f64(other))
        magnitude = np.einsum(sum_of, np.abs(f64(cotangent)), np.abs(f64(other)))
        assert (np.abs(f64(got) - want) <= 2.0**-8 * np.abs(want) + 2.0**-16 * magnitude).all()


def test_infinite_cotangents(way, operands):
    x, weight, cotangent = operands
    cotangent[0, 3, 5], cotangent[1, 2, 7] = np.inf, np.nan
    of_x, of_weight = map(f64, jax.jit(gradients)(x, weight, cotangent))
    sign = np.sign(f64(weight[5]))
    np.testing.assert_array_equal(of_x[0, 3], sign * np.inf)
    assert np.isnan(of_x[1, 2]).all()
    assert np.isnan(of_weight[7]).all()
    assert np.isfinite(np.delete(of_weight, [5, 7], axis=0)).all()


MAPPED = {"x": (0, None, 0), "x and weight": (0, 0, 0), "weight": (None, 0, 0), "another axis of x": (1, None, 1)}


@pytest.mark.parametrize("mapped", MAPPED)
@pytest.mark.parametrize("inside", ["gradient", "product"])
def test_vmap(mapped, inside, way, operands):
    """Of the gradient, and the gradient of that of the product: as calls one by one, added up where all share one."""
    x, weight, cotangent = operands
    values = [x, np.stack([weight, 2 * weight]) if MAPPED[mapped][1] == 0 else weight, cotangent]
    values = [
        value[0] if axis is None and index == 0 else value
        for index, (value, axis) in enumerate(zip(values, MAPPED[mapped]))
    ]
    if inside == "gradient":
        got = jax.jit(jax.vmap(gradients, MAPPED[mapped]))(*values)
    else:
        many = jax.vmap(router_logits, MAPPED[mapped][:2], out_axes=MAPPED[mapped][2])
        got = jax.jit(lambda x, weight, cotangent: jax.vjp(many, x, weight)[1](cotangent))(*values)
    count = cotangent.shape[MAPPED[mapped][2]]
    ones = [
        gradients(*(v if axis is None else np.take(v, index, axis) for v, axis in zip(values, MAPPED[mapped])))
        for index in range(count)
    ]
    for of, axis, each in zip(got, MAPPED[mapped][:2], zip(*ones)):
        want = np.stack([f64(one) for one in each])
        found = f64(of)
        if inside == "product" and axis is None:
            want = want.sum(0)
        elif inside == "product":
            found = np.moveaxis(found, axis, 0)
        np.testing.assert_allclose(found, want, rtol=2e-2, atol=2e-2 * np.abs(want).max())


def test_second_derivatives(way, operands):
    """As those of f32 operands that hold the same."""

    def gradient_of_gradient(x, weight):
        def loss(x, weight):
            return (jnp.tanh(router_logits(x, weight)) ** 2).sum()

        def of_gradient(x, weight):
            return sum((part.astype(jnp.float32) ** 2).sum() for part in jax.grad(loss, (0, 1))(x, weight))

        return jax.jit(jax.grad(of_gradient, (0, 1)))(x, weight)

    x, weight, _ = operands
    got = gradient_of_gradient(x, weight)
    want = gradient_of_gradient(x.astype(np.float32), weight.astype(np.float32))
    for values, expected in zip(got, want):
        np.testing.assert_allclose(f64(values), expected, rtol=0, atol=1e-2 * np.abs(expected).max())


SPECS = {
    "tokens": (P(None, "d"), P()),
    "hidden": (P(None, None, "d"), P(None, "d")),
    "experts": (P(), P("d")),
    "tokens and experts": (P(None, "d"), P("d")),
}
COLLECTIVES = r"= \S+ (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("sharded", SPECS)
def test_sharding(sharded, axis_type, way, devices, operands):
    """Gradients are where their primals are, and no more collectives bring them there than JAX's own gradient has."""
    mesh = jax.make_mesh((2,), ("d",), (axis_type,), devices=devices[:2])

    def run(function, x, weight):
        logits, pullback = jax.vjp(function, x, weight)
        return pullback(logits)

    def plain(x, weight):
        out_sharding = product_sharding(x, weight)
        return jax.lax.dot_general(
            x, weight, (((2,), (1,)), ((), ())), preferred_element_type=jnp.float32, out_sharding=out_sharding
        )

    with jax.set_mesh(mesh):
        x, weight = (jax.device_put(v, NamedSharding(mesh, spec)) for v, spec in zip(operands, SPECS[sharded]))
        compiled, want = (jax.jit(partial(run, f)).lower(x, weight).compile() for f in (router_logits, plain))
        got = compiled(x, weight)
    assert len(re.findall(COLLECTIVES, compiled.as_text())) <= len(re.findall(COLLECTIVES, want.as_text()))
    for values, expected, primal in zip(got, want(x, weight), (x, weight)):
        np.testing.assert_allclose(f64(values), f64(expected), rtol=2e-2, atol=1e-2)
        if axis_type == AxisType.Explicit:
            assert values.sharding.is_equivalent_to(primal.sharding, primal.ndim)


def products(function, *operands, platform):
    """The operands of the products of a program."""
    text = jax.jit(function).trace(*operands).lower(lowering_platforms=(platform,)).as_text()
    return re.findall(r"dot_general.*tensor<([0-9x]*x\w+)>, tensor<([0-9x]*x\w+)>\) ->", text)


IN_PARTS = {("200x16x2xbf16", "16x2x64xbf16"), ("200x16x2xbf16", "200x64xbf16")}


def test_products_of_the_platforms():
    """In parts where tensor cores are, both gradients of the same parts; in f32 on a CPU, and with a precision."""
    shapes = [((200, 64), jnp.bfloat16), ((16, 64), jnp.bfloat16), ((200, 16), jnp.float32)]
    x, weight, cotangent = (jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes)
    assert set(products(gradients, x, weight, cotangent, platform="tpu")) == IN_PARTS
    in_f32 = {("200x16xf32", "16x64xf32"), ("200x16xf32", "200x64xf32")}
    assert set(products(gradients, x, weight, cotangent, platform="cpu")) == in_f32

    def precise(x, weight, cotangent):
        return jax.vjp(partial(router_logits, precision="highest"), x, weight)[1](cotangent)

    assert not IN_PARTS & set(products(precise, x, weight, cotangent, platform="tpu"))


def test_dense_router_multiplies_its_gradient_in_parts():
    x, weight = jax.ShapeDtypeStruct((200, 64), jnp.bfloat16), jax.ShapeDtypeStruct((16, 64), jnp.bfloat16)

    def loss(x, weight):
        return (jax_router.dense_router(x, weight, top_k=3).weights ** 2).sum()

    found = products(jax.grad(loss, (0, 1)), x, weight, platform="tpu")
    assert set(found) >= IN_PARTS


def test_parts_as_halves_of_words_are_the_parts(rng):
    values = np.ldexp(rng.normal(size=1000), rng.integers(-100, 100, 1000)).astype(np.float32)
    values = np.concatenate([values, np.float32([0.0, -0.0, np.inf, -np.inf, 3e38])])
    found, want = (
        jax.jit(parts)(values) for parts in (_product.bf16_halves, partial(_product.bf16_parts, count=2, axis=1))
    )
    np.testing.assert_array_equal(np.asarray(found).view(np.uint16), np.asarray(want).view(np.uint16))
