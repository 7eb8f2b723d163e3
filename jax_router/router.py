"""The Flax NNX module: a router that is dense or hash by construction."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from . import _check
from ._activation_topk import activation_topk
from ._dense_router import dense_router
from ._hash_router import hash_router
from ._logits import router_logits
from ._route_at import scored_hash_router
from ._topk_select import topk_select
from ._types import GroupScore, ScoreFn, Selection

Initializer = Callable[..., Array]

_LECUN_NORMAL = nnx.initializers.lecun_normal(in_axis=-1, out_axis=-2)


class SelectionBias(nnx.Variable[Array]):
    """The bias that steers the selection. No Param: gradients do not train it, a balancing rule does."""


class HashTable(nnx.Variable[Array]):
    """The experts of each token id. No Param: integers have no gradient."""


@dataclasses.dataclass(frozen=True)
class RouterConfig:
    """What a Router is: its sizes, its options, and whether it is dense or hash. Frozen and hashable.

    A token's experts are the `top_k` with the best keys, among the `top_groups` best of `num_groups` groups; their
    weights are their scores, divided by their sum if `renormalize`, times `scale`. `activation_topk` has the formulas.

    Example::

        >>> from jax_router import RouterConfig
        >>> deepseek_v3 = RouterConfig(
        ...     hidden_size=7168, num_experts=256, top_k=8, score_fn="sigmoid", num_groups=8, top_groups=4, scale=2.5
        ... )

    Attributes:
        hidden_size: D, of the hidden states.
        num_experts: E.
        top_k: the number of experts a token, from 1 to the number of experts in `top_groups` groups.
        score_fn: `"sqrtsoftplus"` (default), `"sigmoid"` or `"softmax"`.
        renormalize: whether the weights of a token are divided by their sum; default True.
        scale: a number that all weights are multiplied by; default 1.
        num_groups: the number of groups of experts, which divides E; default 1, no groups.
        top_groups: how many groups stay eligible; default 1.
        group_score: of a group, `"top2_sum"` (default) or `"max"` of its keys.
        mode: `"dense"` (default), by the hidden state, or `"hash"`, by the token id.
        vocab_size: V, of the token ids; needed by `"hash"`.
        hash_weights: in a hash layer, `"uniform"` (default), scale / k, or `"scored"`, by the scores of the table's
            experts.
        dtype: of the product's operands; default None takes that of the hidden states.
        param_dtype: of the weight; default float32.

    Raises:
        TypeError: an option has a wrong type.
        ValueError: an option has a wrong value, or does not go with another one.
    """

    hidden_size: int
    num_experts: int
    top_k: int
    _: dataclasses.KW_ONLY
    score_fn: ScoreFn = "sqrtsoftplus"
    renormalize: bool = True
    scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    group_score: GroupScore = "top2_sum"
    mode: Literal["dense", "hash"] = "dense"
    vocab_size: int | None = None
    hash_weights: Literal["uniform", "scored"] = "uniform"
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        _check.static_int("hidden_size", self.hidden_size, 1, None)
        _check.static_int("num_experts", self.num_experts, 1, None)
        _check.choice("mode", self.mode, ("dense", "hash"))
        _check.choice("hash_weights", self.hash_weights, ("uniform", "scored"))
        self._selection  # checks the options  # noqa: B018
        if self.mode == "hash":
            if self.vocab_size is None:
                raise ValueError("vocab_size must be an int for mode='hash', got None")
            _check.static_int("vocab_size", self.vocab_size, 1, None)

    @functools.cached_property
    def _selection(self) -> Selection:
        return _check.selection(self.num_experts, **{name: getattr(self, name) for name in Selection().options})

    @property
    def scoring(self) -> dict[str, Any]:
        """The options of `route_at`, as keyword arguments."""
        return self._selection.scoring.options

    @property
    def selection(self) -> dict[str, Any]:
        """The options of `activation_topk`, as keyword arguments."""
        return self._selection.options

    @property
    def has_weight(self) -> bool:
        """Whether a router has a weight: not if it is hash with uniform weights."""
        return self.mode == "dense" or self.hash_weights == "scored"


def random_hash_table(key: Array, shape: tuple[int, int], num_experts: int) -> Array:
    """A table `[V, k]` of k distinct experts a token id, uniformly at random."""
    vocab_size, k = shape
    _, table = topk_select(jax.random.uniform(key, (vocab_size, num_experts)), k)
    return table


class Router(nnx.Module):
    """Which experts compute each token.

    A dense router scores hidden states, `dense_router(x, weight, bias)`. A hash router looks token ids up in a table,
    and weighs the experts uniformly or by the scores of the hidden state (DeepSeek-V4's first layers).

    Attributes:
        weight: Param `[E, D]` in `param_dtype`, unless the router is hash with uniform weights.
        bias: SelectionBias f32 `[E]`, zeros, of a dense router.
        hash_lut: HashTable int32 `[V, k]`, of a hash router.

    Example::

        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jax_router import Router, RouterConfig
        >>> router = Router(RouterConfig(hidden_size=64, num_experts=16, top_k=2), rngs=nnx.Rngs(0))
        >>> weights, expert_ids = router(jnp.ones((3, 5, 64)))
        >>> weights.shape, expert_ids.dtype
        ((3, 5, 2), dtype('int32'))

    Args:
        config: what the router is.
        rngs: random streams; `params` draws the weight and the table.
        weight_init: of the weight, called with (key, shape, dtype); default LeCun normal over D.
        hash_lut_init: of the table, called with (key, (V, k), E); default k distinct experts at random.
    """

    def __init__(
        self,
        config: RouterConfig,
        *,
        rngs: nnx.Rngs,
        weight_init: Initializer = _LECUN_NORMAL,
        hash_lut_init: Callable[[Array, tuple[int, int], int], Array] = random_hash_table,
    ):
        self.config = config
        if config.has_weight:
            shape = (config.num_experts, config.hidden_size)
            self.weight = nnx.Param(weight_init(rngs.params(), shape, config.param_dtype))
        if config.mode == "dense":
            self.bias = SelectionBias(jnp.zeros(config.num_experts, jnp.float32))
        else:
            assert config.vocab_size is not None
            table = hash_lut_init(rngs.params(), (config.vocab_size, config.top_k), config.num_experts)
            self.hash_lut = HashTable(jnp.asarray(table, jnp.int32))

    def __call__(
        self,
        x: Array,
        token_ids: Array | None = None,
        token_mask: Array | None = None,
        *,
        return_logits: bool = False,
    ) -> Any:
        """Routes tokens.

        Args:
            x: hidden states `[..., D]`.
            token_ids: integers `[...]`; needed by a hash router, ignored by a dense one.
            token_mask: bool `[...]`; where False the ids are -1 and the weights 0.
            return_logits: also return the logits, f32 `[..., E]`, for balance losses.

        Returns:
            `Routing(weights, expert_ids)`, or `(Routing, logits)`.
        """
        config = self.config
        x = _check.float_array("x", x)
        if x.shape[-1] != config.hidden_size:
            raise ValueError(f"x must have shape (..., {config.hidden_size}) (hidden_size), got {x.shape}")
        if return_logits and not config.has_weight:
            raise ValueError("return_logits must be False for a hash router with uniform weights: it has no logits")
        if config.mode == "hash":
            return self._hash(x, token_ids, token_mask, return_logits)
        if not return_logits:
            return dense_router(*self._product(x), self.bias[...], token_mask=token_mask, **config.selection)
        logits = router_logits(*self._product(x))
        return activation_topk(logits, self.bias[...], token_mask=token_mask, **config.selection), logits

    def _product(self, x: Array) -> tuple[Array, Array]:
        dtype = x.dtype if self.config.dtype is None else self.config.dtype
        return x.astype(dtype), self.weight[...].astype(dtype)

    def _hash(self, x: Array, token_ids: Array | None, token_mask: Array | None, return_logits: bool) -> Any:
        config = self.config
        if token_ids is None:
            raise ValueError("token_ids must be given to a hash router, got None")
        token_ids = _check.int_array("token_ids", token_ids)
        _check.same_shape("token_ids", token_ids, x.shape[:-1])
        if token_mask is not None:
            token_mask = _check.mask_array("token_mask", token_mask, x.shape[:-1])
            token_ids = jnp.where(token_mask, token_ids, -1)
        if config.hash_weights == "uniform":
            return hash_router(token_ids, self.hash_lut[...], scale=config.scale)
        logits = router_logits(*self._product(x))
        token_ids = _check.as_int32_ids(token_ids, self.hash_lut.shape[0])
        hash_lut = _check.as_int32_ids(self.hash_lut[...], config.num_experts)
        routing = scored_hash_router(logits, token_ids, hash_lut, config._selection.scoring)
        return (routing, logits) if return_logits else routing
