"""Prints what a decode loop of 100 steps routed, and how often it launched CUDA graphs and kernels."""

import hashlib
import json
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp

from jax_router import (
    activation_topk,
    combine,
    dense_router,
    expert_dispatch,
    hash_router,
    permute,
    route_at,
    topk_select,
)

STEPS, ROWS, HIDDEN, EXPERTS, VOCABULARY = 100, 8, 64, 32, 5000

keys = iter(jax.random.split(jax.random.key(0), 8))
gate = jax.random.normal(next(keys), (EXPERTS, HIDDEN))
bias = jax.random.normal(next(keys), (EXPERTS,))
values = jax.random.normal(next(keys), (EXPERTS, HIDDEN))
head = jax.random.normal(next(keys), (HIDDEN, VOCABULARY))
table = jax.random.randint(next(keys), (VOCABULARY, 4), 0, EXPERTS, jnp.int32)
options = {"implementation": "native"}


@jax.jit
def step(h, tokens):
    """Every op, each on what the one before it gave; then the next token of each row."""
    hashed = route_at(h @ gate.T, hash_router(tokens, table, **options).expert_ids, **options)
    h = jnp.tanh(h + jnp.einsum("nk,nkd->nd", hashed.weights, values[hashed.expert_ids]))
    dense = dense_router(h, gate, bias, top_k=4, score_fn="sigmoid", **options)
    h = jnp.tanh(h + jnp.einsum("nk,nkd->nd", dense.weights, values[dense.expert_ids]))
    plain = activation_topk(h @ gate.T, top_k=4, **options)
    dispatch = expert_dispatch(plain.expert_ids, EXPERTS, **options)
    rows = permute(h, dispatch, **options) * jnp.repeat(
        dispatch.group_sizes, dispatch.group_sizes, total_repeat_length=ROWS * 4
    )[:, None].astype(h.dtype)
    h = jnp.tanh(h + combine(rows, dispatch, plain.weights, **options))
    best, next_tokens = topk_select(h @ head, 50, **options)
    return h, next_tokens[:, 3], (hashed, dense, plain, dispatch, best, next_tokens)


h, tokens = jax.random.normal(next(keys), (ROWS, HIDDEN)), jnp.arange(ROWS, dtype=jnp.int32)
jax.block_until_ready(step(h, tokens))
bits = hashlib.sha256()
with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
        for _ in range(STEPS):
            h, tokens, results = step(h, tokens)
            for leaf in jax.tree.leaves(results):
                bits.update(jax.device_get(leaf).tobytes())
    (trace,) = Path(folder).rglob("*.xplane.pb")
    names = [
        event.name
        for plane in jax.profiler.ProfileData.from_file(str(trace)).planes
        for line in plane.lines
        for event in line.events
    ]
# An event of a graph has the graph's number behind its name.
calls = [name.partition(" ")[0] for name in names if name.startswith(("cuGraph", "cuLaunch"))]
launches = {name: calls.count(name) for name in sorted(set(calls))}
print(json.dumps({"bits": bits.hexdigest(), "tokens": tokens.tolist(), "launches": launches}))
