"""Products of groups of rows, against float64: by ragged_dot and, on an H100, by JAX's kernels."""

import re
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_router import _grouped_matmul, grouped_matmul
from models import DTYPES
from oracle import f64

# Rows, group sizes, D and F. The kernels cut rows in blocks of 64 and 128.
CASES = {
    "even": (256, [64, 64, 64, 64], 128, 192),
    "uneven": (300, [1, 130, 0, 69, 100], 64, 128),
    "rows behind": (300, [1, 130, 0, 69, 3], 128, 128),
    "one group": (200, [0, 0, 200], 64, 64),
    "no group has rows": (64, [0, 0], 64, 64),
    "fewer rows than a block": (8, [3, 0, 4], 128, 64),
    "many groups": (512, [4] * 128, 128, 128),
    "aligned": (384, [128, 0, 64, 128], 192, 128),
}
TOLERANCES = {"f32": 1e-5, "bf16": 1e-2, "f16": 2e-3}


@pytest.fixture(params=["native", "reference"])
def implementation(request):
    """Native kernels are for some GPUs alone."""
    if request.param == "native" and (reason := why_no_kernels()):
        pytest.skip(reason)
    return request.param


def why_no_kernels():
    if jax.default_backend() != "gpu":
        return "JAX's kernels need a GPU"
    return _grouped_matmul._reason_against_device()


def draw(rng, case, dtype="bf16"):
    rows, group_sizes, hidden, inner = CASES[case]
    lhs = rng.normal(0, 1, (rows, hidden)).astype(DTYPES[dtype])
    rhs = rng.normal(0, hidden**-0.5, (len(group_sizes), hidden, inner)).astype(DTYPES[dtype])
    return lhs, rhs, np.array(group_sizes, np.int32), rng.normal(0, 1, (rows, inner)).astype(DTYPES[dtype])


def oracle(lhs, rhs, group_sizes, cotangent):
    """The product and its two gradients in float64."""
    lhs, rhs, cotangent = f64(lhs), f64(rhs), f64(cotangent)
    result, of_lhs, of_rhs = np.zeros_like(cotangent), np.zeros_like(lhs), np.zeros_like(rhs)
    for group, (size, end) in enumerate(zip(group_sizes, np.cumsum(group_sizes))):
        rows = slice(end - size, end)
        result[rows] = lhs[rows] @ rhs[group]
        of_lhs[rows] = cotangent[rows] @ rhs[group].T
        of_rhs[group] = lhs[rows].T @ cotangent[rows]
    return result, of_lhs, of_rhs


def with_gradients(lhs, rhs, group_sizes, cotangent, **options):
    product = partial(grouped_matmul, group_sizes=group_sizes, **options)
    result, pullback = jax.vjp(product, lhs, rhs)
    return result, *pullback(cotangent)


def assert_close(got, want, dtype):
    for values, expected in zip(got, want, strict=True):
        assert values.dtype == DTYPES[dtype]
        scale = np.abs(expected).max(initial=1e-30)
        np.testing.assert_allclose(f64(values), expected, rtol=0, atol=TOLERANCES[dtype] * scale)


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case, dtype, implementation, rng):
    operands = draw(rng, case, dtype)
    got = jax.jit(partial(with_gradients, implementation=implementation))(*operands)
    assert_close(got, oracle(*operands), dtype)


def test_f32(rng):
    operands = draw(rng, "uneven", "f32")
    with jax.default_matmul_precision("highest"):
        assert_close(jax.jit(with_gradients)(*operands), oracle(*operands), "f32")


@pytest.mark.parametrize("unused_rows", ["zeros", "undefined"])
@pytest.mark.parametrize("hole", [np.nan, np.inf])
def test_rows_behind_the_last_group(hole, unused_rows, implementation, rng):
    """Zeros in results, if nothing else is asked for, whatever they hold in operands; and they reach nothing."""
    lhs, rhs, group_sizes, cotangent = draw(rng, "rows behind")
    end = group_sizes.sum()
    want = oracle(lhs, rhs, group_sizes, cotangent)
    lhs[end:], cotangent[end:] = hole, hole
    run = partial(with_gradients, unused_rows=unused_rows, implementation=implementation)
    result, of_lhs, of_rhs = jax.jit(run)(lhs, rhs, group_sizes, cotangent)
    assert_close((result[:end], of_lhs[:end], of_rhs), (want[0][:end], want[1][:end], want[2]), "bf16")
    if unused_rows == "zeros":
        assert not f64(result)[end:].any()
        assert not f64(of_lhs)[end:].any()


def test_repeats_are_bit_equal(implementation, rng):
    operands = draw(rng, "many groups")
    run = jax.jit(partial(with_gradients, implementation=implementation))
    first = run(*operands)
    for _ in range(3):
        for values, again in zip(first, run(*operands)):
            np.testing.assert_array_equal(f64(values), f64(again))


def test_group_sizes_of_any_integer_dtype(rng):
    lhs, rhs, group_sizes, _ = draw(rng, "uneven")
    want = grouped_matmul(lhs, rhs, group_sizes)
    for dtype in (np.uint8, np.int16):
        np.testing.assert_array_equal(f64(grouped_matmul(lhs, rhs, group_sizes.astype(dtype))), f64(want))


@pytest.mark.parametrize("mapped", [(0, 0, 0), (0, None, 0), (None, 0, None), (0, None, None)])
def test_vmap(mapped, implementation, rng):
    """Of values and gradients: as calls one by one."""
    lhs, rhs, group_sizes, cotangent = draw(rng, "uneven")
    operands = [
        np.stack([value, np.roll(value, 1, axis=0)]) if axis == 0 else value
        for value, axis in zip((lhs, rhs, group_sizes), mapped)
    ]
    run = partial(with_gradients, implementation=implementation)
    got = jax.jit(jax.vmap(run, (*mapped, None)))(*operands, cotangent)
    for index in range(2):
        one = [value[index] if axis == 0 else value for value, axis in zip(operands, mapped)]
        assert_close([value[index] for value in got], oracle(*one, cotangent), "bf16")


def test_gradient_of_vmap(rng):
    lhs, rhs, group_sizes, cotangent = draw(rng, "uneven", "f32")
    with jax.default_matmul_precision("highest"):
        mapped = jax.vmap(lambda rows: grouped_matmul(rows, rhs, group_sizes))
        (got,) = jax.vjp(mapped, np.stack([lhs, lhs]))[1](np.stack([cotangent, 2 * cotangent]))
    want = oracle(lhs, rhs, group_sizes, cotangent)[1]
    np.testing.assert_allclose(got, np.stack([want, 2 * want]), atol=1e-4)


def test_derivatives_of_second_order(implementation, rng):
    """Of a function that is quadratic in each operand, against the same of a dense product."""
    lhs, rhs, group_sizes, _ = draw(rng, "uneven")
    group = np.repeat(np.arange(len(group_sizes)), group_sizes)

    def dense(lhs, rhs):
        return jnp.einsum("sd,sdf->sf", lhs, rhs[group], precision="highest")

    def gradient_of_gradient(product, lhs, rhs):
        def loss(lhs, rhs):
            return (product(lhs, rhs).astype(jnp.float32) ** 2).mean()

        def of_gradient(lhs, rhs):
            return sum((part.astype(jnp.float32) ** 2).sum() for part in jax.grad(loss, (0, 1))(lhs, rhs))

        return jax.jit(jax.grad(of_gradient, (0, 1)))(lhs, rhs)

    got = gradient_of_gradient(
        partial(grouped_matmul, group_sizes=group_sizes, implementation=implementation), lhs, rhs
    )
    want = gradient_of_gradient(dense, *(value.astype(np.float32) for value in (lhs, rhs)))
    for values, expected in zip(got, want):
        np.testing.assert_allclose(f64(values), expected, rtol=0, atol=3e-2 * np.abs(expected).max())


def test_forward_mode(implementation, rng):
    lhs, rhs, group_sizes, _ = draw(rng, "uneven")
    product = partial(grouped_matmul, group_sizes=group_sizes, implementation=implementation)
    _, tangent = jax.jvp(product, (lhs, rhs), (lhs, rhs))
    np.testing.assert_allclose(f64(tangent), 2 * f64(product(lhs, rhs)), rtol=2e-2, atol=2e-2)


def test_x64(implementation, rng):
    operands = draw(rng, "uneven")
    with jax.enable_x64(True):
        got = jax.jit(partial(with_gradients, implementation=implementation))(*operands)
    assert_close(got, oracle(*operands), "bf16")


def test_shard_map(implementation, devices, rng):
    """Each device has rows of its own; all have the matrices, whose gradient is summed."""
    lhs, rhs, group_sizes, cotangent = draw(rng, "uneven")
    count = len(devices)
    mesh = jax.make_mesh((count,), ("d",), (jax.sharding.AxisType.Auto,), devices=devices)
    shard, whole = jax.sharding.PartitionSpec("d"), jax.sharding.PartitionSpec()
    mapped = jax.shard_map(
        partial(with_gradients, implementation=implementation),
        mesh=mesh,
        in_specs=(shard, whole, shard, shard),
        out_specs=(shard, shard, whole),
    )
    got = jax.jit(mapped)(np.tile(lhs, (count, 1)), rhs, np.tile(group_sizes, count), np.tile(cotangent, (count, 1)))
    result, of_lhs, of_rhs = oracle(lhs, rhs, group_sizes, cotangent)
    assert_close(got, (np.tile(result, (count, 1)), np.tile(of_lhs, (count, 1)), count * of_rhs), "bf16")


def explicit_mesh(devices):
    return jax.make_mesh((len(devices),), ("d",), (jax.sharding.AxisType.Explicit,), devices=devices)


def test_whole_operands_in_an_explicit_mesh(devices, rng):
    """Where JAX has no rule for ragged_dot: with the mesh around it, and as part of the operands' types."""
    operands, mesh = draw(rng, "uneven"), explicit_mesh(devices)
    placed = jax.device_put(operands, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    with jax.set_mesh(mesh):
        assert_close(jax.jit(with_gradients)(*operands), oracle(*operands), "bf16")
    assert_close(jax.jit(with_gradients)(*placed), oracle(*operands), "bf16")


@pytest.mark.parametrize("mapped", [(0, 0, 0), (0, None, 0), (None, 0, None), (None, None, 0)])
def test_vmap_over_a_sharded_axis(mapped, devices, rng):
    """Each device has its own calls, and exchanges nothing."""
    names = ("a", "b")
    mesh = jax.make_mesh((2, len(devices) // 2), names, (jax.sharding.AxisType.Explicit,) * len(names), devices=devices)
    *operands, cotangent = draw(rng, "uneven")
    operands = [
        np.stack([np.roll(value, n, axis=0) for n in range(4)]) if axis == 0 else value
        for value, axis in zip(operands, mapped)
    ]
    specs = [jax.sharding.PartitionSpec(*"a" * (axis == 0)) for axis in (*mapped, None)]
    placed = [
        jax.device_put(value, jax.sharding.NamedSharding(mesh, spec))
        for value, spec in zip((*operands, cotangent), specs)
    ]
    run = jax.jit(jax.vmap(with_gradients, (*mapped, None)))
    want = run(*operands, cotangent)
    with jax.set_mesh(mesh):
        compiled = run.lower(*placed).compile()
        got = compiled(*placed)
    assert not re.search(r"all-gather|all-reduce|all-to-all|collective-permute", compiled.as_text())
    assert all(leaf.sharding.spec[0] == "a" for leaf in got)
    assert_close(run(*placed), want, "bf16")
    assert_close(got, want, "bf16")


def test_eager_vmap_over_a_sharded_axis(devices, rng):
    """Of another axis than the first, and under jax.checkpoint."""
    lhs, rhs, group_sizes, _ = draw(rng, "uneven", "f32")
    lhs = np.stack([lhs, 2 * lhs], axis=1)
    sharding = jax.sharding.NamedSharding(explicit_mesh(devices[:2]), jax.sharding.PartitionSpec(None, "d"))

    def loss(lhs):
        call = jax.vmap(lambda lhs: grouped_matmul(lhs, rhs, group_sizes), 1, 1)
        return (jax.checkpoint(call)(lhs) ** 2).sum()

    want = jax.grad(loss)(lhs)
    with jax.set_mesh(sharding.mesh):
        np.testing.assert_allclose(jax.grad(loss)(jax.device_put(lhs, sharding)), want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["lhs", "rhs", "group_sizes"])
def test_operands_that_are_split_over_explicit_axes(name, devices, rng):
    operands = dict(zip(("lhs", "rhs", "group_sizes"), draw(rng, "aligned")))
    sharding = jax.sharding.NamedSharding(explicit_mesh(devices[:2]), jax.sharding.PartitionSpec("d"))
    operands[name] = jax.device_put(operands[name], sharding)
    with pytest.raises(
        ValueError, match=rf"{name} must not be split over Explicit axes of a mesh, got .*@d.*shard_map"
    ):
        jax.jit(grouped_matmul)(**operands)


ERRORS = {
    "lhs must have shape": ((np.zeros(64, np.float32), None, None), ValueError),
    "lhs must have dtype": ((np.zeros((8, 64), np.int32), None, None), TypeError),
    r"rhs must have shape \[G, 64, F\]": ((None, np.zeros((2, 63, 64), np.float32), None), ValueError),
    "rhs must have the dtype of lhs": ((None, np.zeros((2, 64, 64), np.float16), None), TypeError),
    "group_sizes must have shape": ((None, None, np.zeros(3, np.int32)), ValueError),
    "group_sizes must have an integer dtype": ((None, None, np.zeros(2, np.float32)), TypeError),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    changed, error = ERRORS[message]
    right = np.zeros((8, 64), np.float32), np.zeros((2, 64, 64), np.float32), np.zeros(2, np.int32)
    with pytest.raises(error, match=message):
        grouped_matmul(*(one if other is None else other for one, other in zip(right, changed)))


def test_native_says_what_is_missing():
    shapes = [jax.ShapeDtypeStruct((8, 64), jnp.float32), jax.ShapeDtypeStruct((2, 64, 64), jnp.float32)]
    sizes = jax.ShapeDtypeStruct((2,), jnp.int32)
    traced = jax.jit(partial(grouped_matmul, implementation="native")).trace(*shapes, sizes)
    with pytest.raises(NotImplementedError, match="kernels for GPUs alone"):
        traced.lower(lowering_platforms=("cpu",))
    with pytest.raises(NotImplementedError, match="on cuda: the kernels take bfloat16 and float16, got float32"):
        traced.lower(lowering_platforms=("cuda",))


@pytest.fixture
def hopper(monkeypatch):
    """A machine that lowers as one with an H100."""
    try:
        _grouped_matmul.kernels()
    except ImportError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(_grouped_matmul, "_reason_against_device", lambda: None)
    monkeypatch.setattr(jax, "devices", lambda *_: [SimpleNamespace(core_count=132)])  # what one kernel asks for


def kernels_in(function, *operands):
    lowered = jax.jit(function).trace(*operands).lower(lowering_platforms=("cuda",))
    return len(re.findall(r"custom_call @mosaic_gpu", lowered.as_text()))


@pytest.mark.parametrize("case", CASES)
def test_kernels_are_lowered_to(case, hopper, rng):
    """One forward, and one for each gradient."""
    lhs, rhs, group_sizes, cotangent = draw(rng, case)
    assert kernels_in(grouped_matmul, lhs, rhs, group_sizes) == 1
    assert kernels_in(with_gradients, lhs, rhs, group_sizes, cotangent) == 3


def test_what_the_kernels_do_not_take(hopper, rng):
    lhs, rhs, group_sizes, _ = draw(rng, "uneven")
    assert kernels_in(grouped_matmul, lhs[:, :40], rhs[:, :40], group_sizes) == 0
    assert kernels_in(grouped_matmul, lhs[:0], rhs, group_sizes) == 0
    assert kernels_in(grouped_matmul, lhs.astype(np.float32), rhs.astype(np.float32), group_sizes) == 0
    assert kernels_in(partial(grouped_matmul, implementation="reference"), lhs, rhs, group_sizes) == 0


def test_no_kernels_over_several_devices(hopper, devices, rng):
    """XLA cannot split them; on one device there is nothing to split."""
    operands = draw(rng, "uneven")[:3]
    for count, kernels in ((1, 1), (len(devices), 0)):
        mesh = explicit_mesh(devices[:count])
        placed = jax.device_put(operands, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
        with jax.set_mesh(mesh):
            assert kernels_in(grouped_matmul, *placed) == kernels
