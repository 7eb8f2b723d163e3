"""Selection over an axis that is sharded, without gathering it: k candidates of each shard, then the best of those.

For use inside of `jax.shard_map`. The order is that of the ops themselves, ties included: candidates of equal rank come
in the order of the shards, and within one in the order of their indices. `main` shows what it saves:

    python examples/sharded_selection.py
"""

import os
from functools import partial

if __name__ == "__main__":  # before JAX starts: several devices on a machine without accelerators
    os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec as P

from jax_router import Routing, activation_topk, topk_select

AXIS = "shard"


def topk_over_shards(scores: Array, k: int) -> tuple[Array, Array]:
    """`topk_select` of rows `[..., L]`, of which every device has an equal run `[..., L / devices]`."""
    values, indices = topk_select(scores, min(k, scores.shape[-1]))
    candidates, indices = gather(values), gather(indices + scores.shape[-1] * lax.axis_index(AXIS))
    values, place = topk_select(candidates, k)
    return values, jnp.take_along_axis(indices, place, axis=-1)


def route_over_shards(logits: Array, bias: Array, *, top_k: int, score_fn: str = "sqrtsoftplus") -> Routing:
    """`activation_topk` with a bias, both sharded over the experts.

    A score must be a function of one logit: softmax without renormalize and groups need the whole row.
    """
    experts = logits.shape[-1]
    scores, ids = activation_topk(logits, bias, top_k=min(top_k, experts), score_fn=score_fn, renormalize=False)
    keys = lax.stop_gradient(scores) + bias[ids]  # in f32, as the op adds them
    keys, scores, ids = gather(keys), gather(scores), gather(ids + experts * lax.axis_index(AXIS))
    _, place = topk_select(keys, top_k)
    scores, ids = (jnp.take_along_axis(array, place, axis=-1) for array in (scores, ids))
    return Routing(scores / (scores.sum(axis=-1, keepdims=True) + 1e-20), ids)


def gather(local: Array) -> Array:
    """The candidates of all shards, in the order of the shards."""
    return lax.all_gather(local, AXIS, axis=local.ndim - 1, tiled=True)


def over_shards(function, mesh: jax.sharding.Mesh, *specs: P):
    """A function of whole arrays, whose results every device has. JAX cannot see that they all have the same."""
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False))


def main() -> None:
    devices = jax.devices()
    mesh = jax.make_mesh((len(devices),), (AXIS,), (jax.sharding.AxisType.Auto,))
    rows, length, k = 16, 2**14 * len(devices), 50
    scores = jax.random.normal(jax.random.key(0), (rows, length)).astype(jnp.bfloat16)  # bf16: with ties
    scores = jax.device_put(scores, jax.sharding.NamedSharding(mesh, P(None, AXIS)))
    merged = over_shards(partial(topk_over_shards, k=k), mesh, P(None, AXIS))
    gathered = jax.jit(partial(topk_select, k=k))
    same = all(bool((a == b).all()) for a, b in zip(merged(scores), gathered(scores)))
    print(f"the {k} best of {length} scores on {len(devices)} devices, {rows} rows: equal, ties included: {same}")
    for name, function in (("gathered", gathered), ("merged", merged)):
        memory = function.lower(scores).compile().memory_analysis()
        print(f"  {name}: {memory.temp_size_in_bytes / 2**10:.0f} KiB of temporary memory on a device")


if __name__ == "__main__":
    main()
