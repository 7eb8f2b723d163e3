"""The result types and options that the ops, the reference and the Router share."""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

from jax import Array, export

ScoreFn = Literal["sqrtsoftplus", "sigmoid", "softmax"]
GroupScore = Literal["top2_sum", "max"]
Implementation = Literal["auto", "native", "reference"]
# What the weights of a token's choices multiply, of its experts.
Weigh = Literal["output", "input"]


NamedTupleType = TypeVar("NamedTupleType", bound=type[tuple[Any, ...]])


def exportable(kind: NamedTupleType) -> NamedTupleType:
    """Registers a NamedTuple, which functions may then take and return that `jax.export` saves.

    JAX keeps the first class of a name: where the package was deleted from sys.modules and is imported again, the names
    stay with the classes of the first import.
    """
    with contextlib.suppress(ValueError):
        export.register_namedtuple_serialization(kind, serialized_name=f"jax_router.{kind.__name__}")
    return kind


@exportable
class Routing(NamedTuple):
    """Which experts compute each token, and with what weights.

    Attributes:
        weights: f32 `[..., k]`.
        expert_ids: int32 `[..., k]`, best first; -1 where a token has no expert (masked, padding, invalid id).

    Example:
        >>> import jax.numpy as jnp
        >>> from jax_router import activation_topk
        >>> weights, expert_ids = activation_topk(jnp.zeros((5, 7, 16)), top_k=3)
        >>> weights.shape, expert_ids.shape
        ((5, 7, 3), (5, 7, 3))
    """

    weights: Array
    expert_ids: Array


@exportable
class Dispatch(NamedTuple):
    """Tokens sorted by expert, in S slots: `N * k`, or with `align` and `capacity` as many as suffice for any ids.

    Attributes:
        token_index: int32 `[S]`, the token of each slot, -1 in slots without a choice; an expert's slots lie together,
            its choices first and in token order.
        slot: int32 `[..., k]`, where each choice went, -1 where it has no slot: its id is outside `[0, num_experts)`,
            or its expert was full.
        group_sizes: int32 `[num_experts]`, the slots of each expert as laid out, a multiple of `align`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax_router import expert_dispatch
        >>> expert_dispatch(jnp.array([[1, 0]]), 2).group_sizes
        Array([1, 1], dtype=int32)
    """

    token_index: Array
    slot: Array
    group_sizes: Array


@dataclass(frozen=True)
class Scoring:
    """How chosen logits become weights: `score_fn(logits)`, over their sum + `eps` if `renormalize`, times `scale`.

    `score_fn="identity"` exists for the derivative of plain top-k alone.
    """

    score_fn: str = "sqrtsoftplus"
    renormalize: bool = True
    scale: float = 1.0
    eps: float = 1e-20

    @property
    def options(self) -> dict[str, Any]:
        """As keyword arguments."""
        return dataclasses.asdict(self)

    @property
    def needs_whole_row(self) -> bool:
        """Softmax without renormalisation is the one score that depends on the logits that were not chosen."""
        return self.score_fn == "softmax" and not self.renormalize


@dataclass(frozen=True)
class Selection:
    """Which experts a Scoring is applied to: the `top_k` best, among the `top_groups` best groups."""

    scoring: Scoring = Scoring()
    top_k: int = 1
    num_groups: int = 1
    top_groups: int = 1
    group_score: str = "top2_sum"

    @property
    def options(self) -> dict[str, Any]:
        """As keyword arguments, those of the scoring among them."""
        options = dataclasses.asdict(self)
        return {**options.pop("scoring"), **options}
