"""An expert-parallel mixture-of-experts layer: tokens and experts sharded over the same devices.

Each device routes its own tokens; `jax_router.expert_parallel` brings them to the devices of their experts, and sums
back, dropping nothing unless `slots` or `rows` say so. `main` compares its two ways with the dense computation, in
which every expert sees every token, and counts memory and collectives of all:

    python examples/expert_parallel.py

The figures of a CPU flatter the dense layer: XLA computes ragged_dot there as one masked product per expert.
"""

import collections
import os
import re
from functools import partial
from typing import Any, NamedTuple

if __name__ == "__main__":  # before JAX starts: several devices on a machine without accelerators
    os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jax_router
from jax_router import Routing, dense_router, grouped_matmul

AXIS = "expert"  # of the mesh


class Weights(NamedTuple):
    """The layer's weights: E experts from D to F and back."""

    gate: Array  # [E, D], on every device
    w_in: Array  # [E, D, F], sharded over E
    w_out: Array  # [E, F, D], sharded over E


SPECS = Weights(P(), P(AXIS), P(AXIS))


def random_weights(key: Array, num_experts: int, hidden: int, inner: int) -> Weights:
    keys = jax.random.split(key, 3)
    shapes = ((num_experts, hidden), (num_experts, hidden, inner), (num_experts, inner, hidden))
    return Weights(*(jax.random.normal(k, shape) * shape[-1] ** -0.5 for k, shape in zip(keys, shapes)))


def expert_parallel(
    x: Array, weights: Weights, mesh: jax.sharding.Mesh, top_k: int, **options: Any
) -> tuple[Array, Routing]:
    """The layer on tokens `[N, D]` that are sharded over the mesh.

    Args:
        x: the tokens.
        weights: sharded as `SPECS` says.
        mesh: one axis, which divides N and E.
        top_k: experts a token.
        options: of `jax_router.expert_parallel.compute`: `way`, `slots`, `rows`.

    Returns:
        the layer's output `[N, D]` and the Routing, sharded as x.
    """

    def on_device(x: Array, weights: Weights) -> tuple[Array, Routing]:
        """n tokens of its own, E / devices experts of its own."""
        num_experts = len(weights.gate)
        routing = dense_router(x, weights.gate, top_k=top_k, score_fn="softmax")

        def experts(rows: Array, group_sizes: Array) -> Array:
            inner = jax.nn.silu(grouped_matmul(rows, weights.w_in, group_sizes))
            return grouped_matmul(inner, weights.w_out, group_sizes)

        result = jax_router.expert_parallel.compute(
            x, routing, experts, num_experts=num_experts, axis_name=AXIS, **options
        )
        return result.output, routing

    return jax.shard_map(on_device, mesh=mesh, in_specs=(P(AXIS), SPECS), out_specs=P(AXIS))(x, weights)


def dense(x: Array, weights: Weights, top_k: int) -> tuple[Array, Routing]:
    """The same layer, computed by every expert for every token."""
    routing = dense_router(x, weights.gate, top_k=top_k, score_fn="softmax")
    chosen = routing.expert_ids[..., None] == jnp.arange(len(weights.gate), dtype=jnp.int32)
    inner = jax.nn.silu(jnp.einsum("nd,edf->nef", x, weights.w_in))
    share = jnp.einsum("nk,nke->ne", routing.weights, chosen.astype(x.dtype))
    return jnp.einsum("nef,efd,ne->nd", inner, weights.w_out, share), routing


def shard(x: Array, weights: Weights, mesh: jax.sharding.Mesh) -> tuple[Array, Weights]:
    """The operands on the devices of the mesh, as the layer takes them."""
    return jax.device_put((x, weights), jax.tree.map(partial(NamedSharding, mesh), (P(AXIS), SPECS)))


def cost(compiled: jax.stages.Compiled) -> tuple[dict[str, int], int]:
    """The number of collectives of each kind in a compiled program, and its bytes of temporary memory on a device."""
    kinds = r" (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
    counts = collections.Counter(re.findall(kinds, compiled.as_text()))
    return dict(counts), compiled.memory_analysis().temp_size_in_bytes


def main() -> None:
    devices = jax.devices()
    mesh = jax.make_mesh((len(devices),), (AXIS,), (jax.sharding.AxisType.Auto,))
    tokens, hidden, inner, num_experts, top_k = 256 * len(devices), 128, 256, 8 * len(devices), 4
    weights = random_weights(jax.random.key(0), num_experts, hidden, inner)
    x = jax.random.normal(jax.random.key(1), (tokens, hidden))
    print(f"{len(devices)} devices ({devices[0].device_kind}): {tokens} tokens, {num_experts} experts, top_k {top_k}")

    def gradient(layer):
        return jax.grad(lambda x, weights: (layer(x, weights)[0] ** 2).sum(), argnums=(0, 1))

    operands = shard(x, weights, mesh)
    rows = 2 * tokens // len(devices) * top_k
    layers = {
        "dense": partial(dense, top_k=top_k),
        "gather": partial(expert_parallel, mesh=mesh, top_k=top_k, way="gather"),
        "exchange": partial(expert_parallel, mesh=mesh, top_k=top_k, way="exchange"),
        f"exchange, {rows} rows, twice an even load": partial(
            expert_parallel, mesh=mesh, top_k=top_k, way="exchange", rows=rows
        ),
    }
    want = None
    for name, layer in layers.items():
        print(name)
        forward = jax.jit(layer).lower(*operands).compile()
        backward = jax.jit(gradient(layer)).lower(*operands).compile()
        for what, compiled in (("forward", forward), ("gradient", backward)):
            collectives, memory = cost(compiled)
            listed = ", ".join(f"{number} {kind}" for kind, number in sorted(collectives.items())) or "no collective"
            print(f"  {what}: {memory / 2**20:.1f} MiB of temporary memory on a device; {listed}")
        results = forward(*operands)[0], *jax.tree.leaves(backward(*operands))
        want = want or results
        worst = max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in zip(results, want))
        print(f"  largest difference to dense, results and gradients: {worst:.1e} of the largest")


if __name__ == "__main__":
    with jax.default_matmul_precision("highest"):
        main()
