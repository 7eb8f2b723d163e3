"""Decoding with sparse attention: an indexer scores all cached keys, and attention reads the k best of them alone.

The indexer is that of DeepSeek-V3.2-Exp (equation 1 of its report): `score[s] = sum_h w[h] relu(q[h] . key[s])`. The
selection is `topk_select`, with the number of keys that there are so far as `lengths`. `main` decodes with it and with
`jax.lax.top_k`:

    python examples/sparse_attention.py
"""

import time
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jax_router import topk_select


class Cache(NamedTuple):
    """The keys of the indexer `[L, I]`, the keys and values of the attention `[L, D]`, and how many there are."""

    index_keys: Array
    keys: Array
    values: Array
    length: Array


class Weights(NamedTuple):
    """The indexer's queries `[H, D, I]` and head weights `[D, H]`, and its key `[D, I]`."""

    index_queries: Array
    head_weights: Array
    index_key: Array


def select_native(scores: Array, length: Array, k: int) -> Array:
    """The places of the k best scores, in ascending order; -1 where there are fewer than k."""
    return topk_select(scores, k, lengths=length, sorted=False)[1]


def select_by_sort(scores: Array, length: Array, k: int) -> Array:
    """The same with `jax.lax.top_k`, which knows no lengths, and orders by score."""
    there = jnp.arange(scores.shape[-1]) < length
    _, places = lax.top_k(jnp.where(there, scores, -jnp.inf), k)
    return jnp.where(jnp.arange(k) < length, places, -1)


def step(select, k: int, weights: Weights, cache: Cache, x: Array) -> tuple[Cache, Array]:
    """Appends the token x `[D]` to the cache, and attends from it to the k keys that the indexer prefers."""
    length = cache.length + 1
    rows = (x @ weights.index_key, x, jnp.tanh(x))
    arrays = (
        lax.dynamic_update_index_in_dim(array, row, cache.length, 0) for array, row in zip(cache[:3], rows, strict=True)
    )
    cache = Cache(*arrays, length)
    return cache, attend(select, k, weights, cache, x)


def attend(select, k: int, weights: Weights, cache: Cache, x: Array) -> Array:
    """Attention from the token x `[D]` to the k keys that the indexer prefers."""
    queries = jnp.einsum("d,hdi->hi", x, weights.index_queries)
    scores = (x @ weights.head_weights) @ jax.nn.relu(queries @ cache.index_keys.T)
    places = select(scores, cache.length, k)
    chosen = jnp.maximum(places, 0)
    logits = jnp.where(places >= 0, cache.keys[chosen] @ x / x.size**0.5, -jnp.inf)
    return jax.nn.softmax(logits) @ cache.values[chosen]


def decode(select, k: int, steps: int, weights: Weights, cache: Cache, x: Array) -> tuple[Array, Array]:
    """Each token is made of the attention's output for the one before. Returns the last token and all of them."""

    def body(carry, _):
        cache, x = carry
        cache, attended = step(select, k, weights, cache, x)
        x = jnp.tanh(x + attended)
        return (cache, x), x

    (_, x), tokens = lax.scan(body, (cache, x), length=steps)
    return x, tokens


def random_state(key: Array, capacity: int, length: int, size: int, heads: int, index_size: int):
    """Weights, a cache with `length` of `capacity` places in use, and a first token."""
    keys = iter(jax.random.split(key, 7))

    def draw(*shape):
        return jax.random.normal(next(keys), shape, jnp.float32)

    weights = Weights(draw(heads, size, index_size) / size**0.5, draw(size, heads), draw(size, index_size) / size**0.5)
    cache = Cache(draw(capacity, index_size), draw(capacity, size), draw(capacity, size), jnp.int32(length))
    return weights, cache, jnp.tanh(draw(size))


def main() -> None:
    capacity, k, steps = 65536, 512, 64
    state = random_state(jax.random.key(0), capacity, capacity - 2 * steps, size=128, heads=4, index_size=64)
    print(f"{steps} steps over {capacity} keys, attention to {k} of them, on {jax.devices()[0].device_kind}")
    tokens = {}
    for name, select in (("topk_select", select_native), ("lax.top_k", select_by_sort)):
        run = jax.jit(partial(decode, select, k, steps))
        jax.block_until_ready(run(*state))
        start = time.perf_counter()
        _, tokens[name] = jax.block_until_ready(run(*state))
        print(f"  {name}: {1e6 * (time.perf_counter() - start) / steps:.0f} us a step")
    print(f"largest difference: {jnp.abs(tokens['topk_select'] - tokens['lax.top_k']).max():.1e}")


if __name__ == "__main__":
    main()
