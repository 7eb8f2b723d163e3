"""A mixture-of-experts layer trained by two processes, each with one device, beside one process with both devices.

The two processes form one JAX program through `jax.distributed`: on CPU they talk by gloo, on GPU by NCCL. The layer is
the one of expert_parallel.py: tokens and experts sharded over the devices, moved by either way. `main` trains it in one
process and in two, and compares the routing weights and ids of every step, bit for bit.

    python examples/two_processes.py                     # on CPU
    python examples/two_processes.py --platform cuda     # on two GPUs of this machine
"""

import argparse
import json
import os
import socket
import subprocess
import sys

import jax
import numpy as np
from expert_parallel import AXIS, SPECS, expert_parallel, random_weights
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

STEPS, TOKENS, HIDDEN, INNER, EXPERTS, TOP_K = 5, 64, 16, 32, 8, 2


def train(way: str) -> dict[str, list[str]]:
    """By step and first token of a shard: the bits of the routing weights and ids of the shards of this process."""
    mesh = jax.make_mesh((2,), (AXIS,), (jax.sharding.AxisType.Auto,))

    def sharded(spec, value):
        value = np.asarray(value)
        return jax.make_array_from_callback(value.shape, NamedSharding(mesh, spec), lambda index: value[index])

    # Every process draws everything, and puts what belongs to its devices there.
    weights = jax.tree.map(sharded, SPECS, random_weights(jax.random.key(0), EXPERTS, HIDDEN, INNER))
    x, target = (sharded(P(AXIS), jax.random.normal(jax.random.key(seed), (TOKENS, HIDDEN))) for seed in (1, 2))

    @jax.jit
    def step(weights, x, target):
        def loss(weights):
            y, routing = expert_parallel(x, weights, mesh, TOP_K, way=way)
            return ((y - target) ** 2).mean(), routing

        (value, routing), gradient = jax.value_and_grad(loss, has_aux=True)(weights)
        return jax.tree.map(lambda w, g: w - 3.0 * g, weights, gradient), value, routing

    bits, losses = {}, []
    for number in range(STEPS):
        weights, value, routing = step(weights, x, target)
        losses.append(float(value))
        for shards in zip(*(array.addressable_shards for array in routing)):
            name = f"{way}, step {number}, tokens from {shards[0].index[0].start or 0}"
            bits[name] = [np.asarray(shard.data).tobytes().hex() for shard in shards]
    assert losses[-1] < 0.9 * losses[0], losses
    return bits


def run(platform: str, processes: int) -> dict[str, list[str]]:
    """Starts the processes and puts together what they print, in their last lines: gloo prints too."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, __file__, "--platform", platform, "--processes", str(processes), "--address", address]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": platform,
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        # Every process would time the algorithms of a product by itself, and might choose another one.
        "XLA_FLAGS": "--xla_gpu_autotune_level=0" if platform == "cuda" else "",
    }
    started = [
        subprocess.Popen([*command, "--index", str(index)], env=environment, stdout=subprocess.PIPE)
        for index in range(processes)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit(f"exit statuses {[process.returncode for process in started]}")
    return {shard: bits for output in outputs for shard, bits in json.loads(output.splitlines()[-1]).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--platform", default="cpu", choices=("cpu", "cuda"))
    for internal in ("--processes", "--index", "--address"):  # of the processes that this one starts
        parser.add_argument(internal, help=argparse.SUPPRESS)
    options = parser.parse_args()

    if options.index is None:
        together, apart = run(options.platform, 1), run(options.platform, 2)
        same = sum(together[shard] == apart[shard] for shard in together)
        print(f"{STEPS} steps on 2 devices: the routing of {same} of {len(together)} shards is bit for bit the same")
        if together != apart:
            raise SystemExit(1)
        return

    processes, index = int(options.processes), int(options.index)
    if options.platform == "cpu":
        jax.config.update("jax_num_cpu_devices", 2 // processes)
    if processes == 2:
        if options.platform == "cpu":
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
        own_gpu = [index] if options.platform == "cuda" else None
        jax.distributed.initialize(options.address, processes, index, local_device_ids=own_gpu)
    print(json.dumps(train("gather") | train("exchange")))


if __name__ == "__main__":
    main()
