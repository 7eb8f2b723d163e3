"""Routing by a table: the experts of a token are a function of its id."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array

from . import _check, reference
from ._limits import unsupported_selection
from ._primitive import Op, Operand, Result
from ._types import Implementation, Routing


def hash_router(
    token_ids: Array, hash_lut: Array, *, scale: float = 1.0, implementation: Implementation = "auto"
) -> Routing:
    """Looks the experts of each token up: `expert_ids = hash_lut[token_ids]`, `weights = scale / k`.

    A token id outside `[0, V)` (padding, say) gets ids -1 and weights 0. Entries of the table pass through unchanged;
    one outside `[0, E)` is handled by `route_at` and `expert_dispatch`. For weights by score, as the hash layers of
    DeepSeek-V4 have them, use `route_at(logits, hash_lut[token_ids])`. Hash layers: arXiv:2106.04426.

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
    """
    token_ids = _check.int_array("token_ids", token_ids)
    hash_lut = _check.int_array("hash_lut", hash_lut)
    if hash_lut.ndim != 2 or 0 in hash_lut.shape:
        raise ValueError(f"hash_lut must have shape (vocab_size, k), both at least 1, got {hash_lut.shape}")
    scale = _check.static_float("scale", scale)
    token_ids = _check.as_int32_ids(token_ids, hash_lut.shape[0])
    hash_lut = _check.as_int32_ids(hash_lut, jnp.iinfo(jnp.int32).max)
    if _check.implementation(implementation) == "reference":
        return reference.hash_router(token_ids, hash_lut, scale=scale)
    operands = {"token_ids": token_ids, "hash_lut": hash_lut}
    return Routing(*_HASH_ROUTER(operands, scale=scale, implementation=implementation))


def _results(avals: dict[str, Any], **_: Any) -> list[Result]:
    k = avals["hash_lut"].shape[-1:]
    return [Result(k, jnp.float32), Result(k, jnp.int32)]


def _unsupported(platform: str, avals: dict[str, Any], **_: Any) -> str | None:
    return unsupported_selection(platform, 1, avals["hash_lut"].shape[-1])


_HASH_ROUTER = Op(
    name="hash_router",
    operands={"token_ids": Operand(0), "hash_lut": Operand(2, batched="never")},
    results=_results,
    reference=reference.hash_router,
    unsupported=_unsupported,
)
