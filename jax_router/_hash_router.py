"""Routing by a table: the experts of a token are a function of its id."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array

from . import _check, reference
from ._ids import as_int32_ids
from ._native import unsupported_selection
from ._primitive import Op, Operand, Result
from ._sharding import align
from ._types import Implementation, Routing


def hash_router(
    token_ids: Array, hash_lut: Array, *, scale: float = 1.0, implementation: Implementation = "auto"
) -> Routing:
    """Looks the experts of each token up: `expert_ids = hash_lut[token_ids]`, `weights = scale / k`.

    A token id outside `[0, V)` (padding, say) gets ids -1 and weights 0. Entries of the table pass through unchanged;
    one outside `[0, E)` is handled by `route_at` and `expert_dispatch`. For weights by score, as the hash layers of
    DeepSeek-V4 have them, use `scored_hash_router`. Hash layers: arXiv:2106.04426.

    Args:
        token_ids: integers `[...]`.
        hash_lut: integers `[V, k]`.
        scale: a Python number, the sum of a token's weights.
        implementation: `"auto"`, `"native"` or `"reference"`.

    Returns:
        `Routing(weights, expert_ids)`: f32 `[..., k]` and int32 `[..., k]`.

    Raises:
        TypeError: an operand has a wrong dtype, or scale is no number.
        ValueError: a wrong shape.
        NotImplementedError: `implementation="native"` where no kernel can run.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax_router import hash_router
        >>> hash_lut = jnp.array([[0, 3], [1, 2], [2, 0]])  # two experts for each of three token ids
        >>> routing = hash_router(jnp.array([2, 1, 7]), hash_lut)
        >>> routing.expert_ids
        Array([[ 2,  0],
               [ 1,  2],
               [-1, -1]], dtype=int32)
        >>> routing.weights
        Array([[0.5, 0.5],
               [0.5, 0.5],
               [0. , 0. ]], dtype=float32)
    """
    scale = _check.static_float("scale", scale)
    operands = table_operands(token_ids, hash_lut)
    return Routing(*_HASH_ROUTER(operands, scale=scale, implementation=_check.implementation(implementation)))


def table_operands(token_ids: Any, hash_lut: Any, token_mask: Any = None) -> dict[str, Any]:
    """Token ids and a table, checked, as int32; -1 where there is a mask and it is False."""
    token_ids = _check.int_array("token_ids", token_ids)
    hash_lut = _check.int_array("hash_lut", hash_lut)
    if hash_lut.ndim != 2 or 0 in hash_lut.shape:
        raise ValueError(f"hash_lut must have shape (vocab_size, k), both at least 1, got {hash_lut.shape}")
    token_ids = as_int32_ids(token_ids, hash_lut.shape[0])
    if token_mask is not None:
        token_mask = _check.mask_array("token_mask", token_mask, token_ids.shape)
        token_ids, token_mask = align([token_ids, token_mask], [0, 0])
        token_ids = jnp.where(token_mask, token_ids, -1)
    return {"token_ids": token_ids, "hash_lut": as_int32_ids(hash_lut, 2**31)}


def share_table_again(operands: dict[str, Array]) -> dict[str, Array]:
    """The tables `[B, V, k]` of B problems as one `[B * V, k]`, and the token ids of each as rows of its part."""
    token_ids, tables = operands["token_ids"], operands["hash_lut"]
    problems, vocab_size, k = tables.shape
    if problems * vocab_size > jnp.iinfo(jnp.int32).max:
        raise NotImplementedError(
            f"implementation='native' under vmap over hash_lut: {problems} tables of {vocab_size} rows have more rows "
            "than int32 can number"
        )
    first_rows = jnp.arange(problems, dtype=jnp.int32).reshape(problems, *[1] * (token_ids.ndim - 1)) * vocab_size
    inside = (token_ids >= 0) & (token_ids < vocab_size)
    rows = jnp.where(inside, first_rows + token_ids, -1)
    return {**operands, "token_ids": rows, "hash_lut": tables.reshape(problems * vocab_size, k)}


def _result_types(avals: dict[str, Any], **_: Any) -> list[Result]:
    k = avals["hash_lut"].shape[-1:]
    return [Result(k, jnp.float32), Result(k, jnp.int32)]


def _unsupported(platform: str, avals: dict[str, Any], **_: Any) -> str | None:
    return unsupported_selection(platform, 1, avals["hash_lut"].shape[-1])


_HASH_ROUTER = Op(
    name="hash_router",
    operands={"token_ids": Operand(0), "hash_lut": Operand(2, batched="never")},
    results=("weights", "expert_ids"),
    result_types=_result_types,
    reference=reference.hash_router,
    attributes={"scale": float},
    unsupported=_unsupported,
    share_again=share_table_again,
)
