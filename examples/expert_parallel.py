"""An expert-parallel mixture-of-experts layer: tokens and experts sharded over the same devices.

Each device routes its own tokens, sorts the choices by expert, sends every choice to the device that has the expert,
computes its experts, and sends the results back. No choice is dropped unless a `capacity` says so. `main` compares it
with the dense computation, in which every expert sees every token, and counts memory and collectives of both:

    python examples/expert_parallel.py

all_to_all exchanges slots of one size for every pair of devices: enough for the worst case, or `capacity`. (On GPU and
TPU jax.lax.ragged_all_to_all exchanges no more than there is; XLA has none for CPU.) The figures of a CPU flatter the
dense layer: XLA computes ragged_dot there as one masked product per expert.
"""

import collections
import os
import re
from functools import partial
from typing import NamedTuple

if __name__ == "__main__":  # before JAX starts: several devices on a machine without accelerators
    os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jax_router import Routing, dense_router, expert_dispatch

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


def expert_parallel(x: Array, weights: Weights, mesh: jax.sharding.Mesh, top_k: int, capacity: int | None = None):
    """The layer on tokens `[N, D]` that are sharded over the mesh.

    Args:
        x: the tokens.
        weights: sharded as `SPECS` says.
        mesh: one axis, which divides N and E.
        top_k: experts a token.
        capacity: how many choices a device sends to another at most; the rest are dropped. None is enough for all.

    Returns:
        the layer's output `[N, D]` and the Routing, sharded as x.
    """
    local = partial(_local, top_k=top_k, capacity=capacity, num_devices=mesh.shape[AXIS])
    return jax.shard_map(local, mesh=mesh, in_specs=(P(AXIS), SPECS), out_specs=P(AXIS))(x, weights)


def _local(x: Array, weights: Weights, *, top_k: int, capacity: int | None, num_devices: int):
    """What a device does: n tokens of its own, `experts` experts of its own."""
    (num_experts, _), (experts, *_) = weights.gate.shape, weights.w_in.shape
    if capacity is None:
        capacity = len(x) * min(top_k, experts)  # a token's experts are distinct

    routing = dense_router(x, weights.gate, top_k=top_k, score_fn="softmax")

    # The choices sorted by expert are sorted by device. To device d go those from first[d] on, in `capacity` slots.
    sorted_choices = expert_dispatch(routing.expert_ids, num_experts)
    sizes = sorted_choices.group_sizes.reshape(num_devices, experts)
    first = jnp.cumulative_sum(sizes.sum(axis=1), include_initial=True)[:-1]
    choice = first[:, None] + jnp.arange(capacity, dtype=jnp.int32)
    sent = x.at[sorted_choices.token_index.at[choice].get(mode="clip")].get(mode="clip")  # [devices, capacity, D]

    received = lax.all_to_all(sent, AXIS, 0, 0)
    received_sizes = lax.all_to_all(sizes, AXIS, 0, 0)  # [devices, experts]: how many of whom for which expert

    # What came from each device is sorted by expert already; sorted once more, all of an expert lies together. Slots
    # that hold no choice get an id that no expert has: they are in no group, and ragged_dot does not compute them.
    ends = jnp.cumsum(received_sizes, axis=1)
    expert = (jnp.arange(capacity, dtype=jnp.int32)[:, None] >= ends[:, None, :]).sum(axis=-1, dtype=jnp.int32)
    by_expert = expert_dispatch(expert[..., None], experts)
    rows = received.reshape(-1, x.shape[-1])[by_expert.token_index]
    inner = jax.nn.silu(lax.ragged_dot(rows, weights.w_in, by_expert.group_sizes))
    results = lax.ragged_dot(inner, weights.w_out, by_expert.group_sizes)
    slot = by_expert.slot[..., 0]
    results = jnp.where((slot >= 0)[..., None], results[slot], 0)  # [devices, capacity, D], as received

    returned = lax.all_to_all(results, AXIS, 0, 0)

    # A choice's result is where the choice was sent from.
    device = jnp.maximum(routing.expert_ids, 0) // experts
    place = sorted_choices.slot - first[device]
    kept = (sorted_choices.slot >= 0) & (place < capacity)
    chosen = returned[device, jnp.where(kept, place, 0)]  # [n, k, D]
    weight = jnp.where(kept, routing.weights, 0)
    return jnp.einsum("nk,nkd->nd", weight, chosen), routing


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
    return dict(
        collections.Counter(re.findall(kinds, compiled.as_text()))
    ), compiled.memory_analysis().temp_size_in_bytes


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
    even = 2 * tokens // len(devices) * top_k // len(devices)
    layers = {
        "dense": partial(dense, top_k=top_k),
        "expert parallel": partial(expert_parallel, mesh=mesh, top_k=top_k),
        f"capacity {even}, twice an even load": partial(expert_parallel, mesh=mesh, top_k=top_k, capacity=even),
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
