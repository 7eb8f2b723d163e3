"""Logical experts to physical ones: against numpy, on several devices, and bad arguments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_router import physical_expert_ids

REPLICAS = np.array([[0, 5, 9], [1, -1, -1], [2, 7, -1], [-1, -1, -1], [3, 8, -1]])


def oracle(ids, index=None):
    out = np.full(ids.shape, -1)
    index = np.arange(ids[..., 0].size).reshape(ids.shape[:-1]) if index is None else index
    for *token, j in np.ndindex(ids.shape):
        e = ids[*token, j]
        if 0 <= e < len(REPLICAS) and (found := REPLICAS[e][REPLICAS[e] >= 0]).size:
            out[*token, j] = found[index[*token] % len(found)]
    return out


@pytest.mark.parametrize("dtype", ["int32", "int16", "uint32"])
def test_against_numpy(dtype, rng):
    """Ids outside of the table, and experts without a replica, are -1; jit and vmap change nothing."""
    ids = rng.integers(0 if dtype == "uint32" else -2, 7, (4, 6, 3)).astype(dtype)
    results = jax.jit(physical_expert_ids)(ids, REPLICAS)
    assert results.dtype == jnp.int32
    np.testing.assert_array_equal(results, oracle(ids.astype(np.int64)))
    index = rng.integers(0, 99, (4, 6))
    given = jax.vmap(lambda ids, index: physical_expert_ids(ids, REPLICAS, token_index=index))(ids, index)
    np.testing.assert_array_equal(given, oracle(ids.astype(np.int64), index))
    assert physical_expert_ids(ids[:0], REPLICAS).shape == (0, 6, 3)


def test_replicas_share_the_tokens():
    """Of one expert, or of a few, as evenly as can be."""
    ids = np.zeros((90, 1), np.int32)
    np.testing.assert_array_equal(np.bincount(physical_expert_ids(ids, REPLICAS).ravel(), minlength=10)[[0, 5, 9]], 30)


@pytest.mark.parametrize("mode", [AxisType.Auto, AxisType.Explicit])
def test_on_several_devices(mode, devices, rng):
    """Tokens are numbered over all devices, and stay where they are; inside of shard_map the caller numbers them."""
    ids = rng.integers(-1, 5, (16, 2)).astype(np.int32)
    mesh = jax.make_mesh((len(devices),), ("d",), (mode,), devices=devices)
    sharded = jax.device_put(ids, NamedSharding(mesh, P("d")))
    with jax.set_mesh(mesh):
        results = jax.jit(physical_expert_ids)(sharded, REPLICAS)
    assert results.sharding.is_equivalent_to(NamedSharding(mesh, P("d")), 2)
    np.testing.assert_array_equal(results, oracle(ids))

    def local(ids):
        index = jax.lax.axis_index("d") * len(ids) + jnp.arange(len(ids), dtype=jnp.int32)
        return physical_expert_ids(ids, REPLICAS, token_index=index)

    mapped = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P("d"), out_specs=P("d")))
    np.testing.assert_array_equal(mapped(sharded), oracle(ids))


def test_a_sharded_table(devices, rng):
    """In a mesh with Explicit axes, where JAX takes rows from whole tables alone."""
    ids, replicas = rng.integers(-1, 16, (16, 2)).astype(np.int32), np.arange(32, dtype=np.int32).reshape(16, 2)
    want = physical_expert_ids(ids, replicas)
    mesh = jax.make_mesh((len(devices),), ("d",), (AxisType.Explicit,), devices=devices)
    with jax.set_mesh(mesh):
        sharded = [jax.device_put(value, NamedSharding(mesh, P("d"))) for value in (ids, replicas)]
        np.testing.assert_array_equal(jax.jit(physical_expert_ids)(*sharded), want)


@pytest.mark.parametrize("mapped", range(3))
def test_vmap_over_a_sharded_axis(mapped, devices, rng):
    """Of one operand, with the others shared."""
    mesh = jax.make_mesh((2, len(devices) // 2), ("a", "b"), (AxisType.Explicit,) * 2, devices=devices)
    values = [rng.integers(-1, 5, (16, 2)), REPLICAS, rng.integers(0, 99, 16)]
    specs = [P("b"), P(), P("b")]
    values[mapped] = np.stack([values[mapped], np.roll(values[mapped], 1, axis=0)])
    specs[mapped] = P("a", *specs[mapped])

    def call(ids, replicas, index):
        return physical_expert_ids(ids, replicas, token_index=index)

    call = jax.jit(jax.vmap(call, [0 if index == mapped else None for index in range(3)]))
    with jax.set_mesh(mesh):
        results = call(*(jax.device_put(value, NamedSharding(mesh, spec)) for value, spec in zip(values, specs)))
    assert results.sharding.spec == P("a", "b", None)
    np.testing.assert_array_equal(results, call(*values))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([[0.5]], REPLICAS), {}, TypeError, "expert_ids must have an integer dtype, got float32"),
        ((0, REPLICAS), {}, ValueError, r"expert_ids must have at least 1 axes, got shape \(\)"),
        (([[0]], [0.5]), {}, TypeError, "replicas must have an integer dtype, got float32"),
        (([[0]], [0, 1]), {}, ValueError, r"replicas must have shape \[num_experts, at least 1\], got \(2,\)"),
        (([[0]], REPLICAS), {"token_index": [0.0]}, TypeError, "token_index must have an integer dtype"),
        (([[0]], REPLICAS), {"token_index": [0, 1]}, ValueError, r"token_index must have shape \(1,\), got \(2,\)"),
    ],
)
def test_bad_arguments(arguments, options, error, message):
    with pytest.raises(error, match=message):
        physical_expert_ids(*map(jnp.asarray, arguments), **{k: jnp.asarray(v) for k, v in options.items()})
