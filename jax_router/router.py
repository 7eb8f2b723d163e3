"""The Flax NNX module: a router that is dense or hash by construction."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from jax.typing import DTypeLike

from . import _check
from ._activation_topk import activation_topk
from ._dense_router import dense_router
from ._hash_router import hash_reference, hash_router, table_operands
from ._ids import as_int32_ids
from ._logits import router_logits
from ._route_at import scored_hash_router
from ._sharding import shard_as
from ._topk_select import topk_select
from ._types import GroupScore, Implementation, Routing, ScoreFn, Selection

Initializer = Callable[..., Array]

_FLOAT32 = np.dtype(np.float32)
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

    Args:
        hidden_size: D, of the hidden states.
        num_experts: E.
        top_k: the number of experts a token, from 1 to the number of experts in `top_groups` groups.
        score_fn: `"sqrtsoftplus"` (default), `"sigmoid"` or `"softmax"`.
        renormalize: whether the weights of a token are divided by their sum; default True.
        scale: a number that all weights are multiplied by; default 1.
        num_groups: the number of groups of experts, which divides E; default 1, no groups.
        top_groups: how many groups stay eligible; needed by `num_groups` above 1.
        group_score: of a group, `"top2_sum"` (default) or `"max"` of its keys.
        mode: `"dense"` (default), by the hidden state, or `"hash"`, by the token id.
        vocab_size: V, of the token ids; needed by `"hash"`.
        hash_weights: in a hash layer, `"uniform"` (default), scale / k, or `"scored"`, by the scores of the table's
            experts.
        logit_bias: whether the logits have a trained bias, as those of gpt-oss; default False.
        precision: of the product, as in `jax.lax.dot_general`; default None, f32 accuracy where the hidden states or
            the weight are f32. See `dense_router`.
        implementation: of all ops, `"auto"` (default), `"native"` or `"reference"`.
        dtype: to cast the product's operands to; default None leaves the hidden states as they are, and the weight in
            their dtype or in f32.
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
    top_groups: int | None = None
    group_score: GroupScore = "top2_sum"
    mode: Literal["dense", "hash"] = "dense"
    vocab_size: int | None = None
    hash_weights: Literal["uniform", "scored"] = "uniform"
    logit_bias: bool = False
    precision: lax.PrecisionLike = None
    implementation: Implementation = "auto"
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = _FLOAT32

    def __post_init__(self) -> None:
        _check.static_int("hidden_size", self.hidden_size, 1, None)
        _check.static_int("num_experts", self.num_experts, 1, None)
        _check.choice("mode", self.mode, ("dense", "hash"))
        _check.choice("hash_weights", self.hash_weights, ("uniform", "scored"))
        self._selection  # checks the options  # noqa: B018
        if self.vocab_size is not None:
            _check.static_int("vocab_size", self.vocab_size, 1, None)
        elif self.mode == "hash":
            raise ValueError("vocab_size must be an int for mode='hash', got None")
        if self.mode == "dense" and self.hash_weights != "uniform":
            raise ValueError(
                f"hash_weights must be 'uniform', the default, for mode='dense', got {self.hash_weights!r}"
            )
        if _check.static_bool("logit_bias", self.logit_bias) and not self.has_weight:
            raise ValueError("logit_bias must be False for a hash router with uniform weights, which has no logits")
        _check.implementation(self.implementation)
        # One value for all ways to write it, so that equal configurations compare equal.
        object.__setattr__(self, "precision", _check.precision(self.precision))
        object.__setattr__(self, "param_dtype", _check.float_dtype("param_dtype", self.param_dtype))
        if self.dtype is not None:
            object.__setattr__(self, "dtype", _check.float_dtype("dtype", self.dtype))

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
    """A table `[V, k]` of k distinct experts a token id, uniformly at random.

    Args:
        key: a key of `jax.random`.
        shape: `(V, k)`.
        num_experts: the number of experts, at least k.

    Raises:
        TypeError: shape is no pair of ints, or num_experts no int.
        ValueError: more experts a token id than there are.
    """
    if not isinstance(shape, Sequence) or len(shape) != 2:
        raise TypeError(f"shape must be a pair (vocab_size, k), got {shape!r}")
    num_experts = _check.static_int("num_experts", num_experts, 1, None)
    vocab_size = _check.static_int("shape[0] (vocab_size)", shape[0], 1, None)
    k = _check.static_int("shape[1] (k)", shape[1], 1, num_experts, " (num_experts)")
    _, table = topk_select(jax.random.uniform(key, (vocab_size, num_experts), jnp.float32), k)
    return table


class Router(nnx.Module):
    """Which experts compute each token.

    A dense router scores hidden states, `dense_router(x, weight, bias)`. A hash router looks token ids up in a table,
    and weighs the experts uniformly or by the scores of the hidden state (DeepSeek-V4's first layers).

    Attributes:
        weight: Param `[E, D]` in `param_dtype`, unless the router is hash with uniform weights.
        bias: SelectionBias f32 `[E]`, zeros, of a dense router.
        logit_bias: Param f32 `[E]`, zeros, where the configuration asks for it.
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

    Raises:
        TypeError: config is no RouterConfig, rngs are no Rngs, or the initial table is not of integers.
        ValueError: the initial table has a wrong shape.
    """

    def __init__(
        self,
        config: RouterConfig,
        *,
        rngs: nnx.Rngs,
        weight_init: Initializer = _LECUN_NORMAL,
        hash_lut_init: Callable[[Array, tuple[int, int], int], Array] = random_hash_table,
    ):
        _check.instance("config", config, RouterConfig, "RouterConfig(**options)")
        _check.instance("rngs", rngs, nnx.Rngs, "nnx.Rngs(0)")
        self.config = config
        if config.has_weight:
            shape = (config.num_experts, config.hidden_size)
            self.weight = nnx.Param(weight_init(rngs.params(), shape, config.param_dtype))
        if config.logit_bias:
            self.logit_bias = nnx.Param(jnp.zeros(config.num_experts, jnp.float32))
        if config.mode == "dense":
            self.bias = SelectionBias(jnp.zeros(config.num_experts, jnp.float32))
        else:
            assert config.vocab_size is not None
            table_shape = (config.vocab_size, config.top_k)
            table = hash_lut_init(rngs.params(), table_shape, config.num_experts)
            table = _check.int_array("the result of hash_lut_init", table)
            _check.same_shape("the result of hash_lut_init", table, table_shape)
            self.hash_lut = HashTable(as_int32_ids(table, 2**31))

    @overload
    def __call__(
        self,
        x: Array,
        *,
        token_ids: Array | None = None,
        token_mask: Array | None = None,
        return_logits: Literal[False] = False,
    ) -> Routing: ...

    @overload
    def __call__(
        self,
        x: Array,
        *,
        token_ids: Array | None = None,
        token_mask: Array | None = None,
        return_logits: Literal[True],
    ) -> tuple[Routing, Array]: ...

    @overload
    def __call__(
        self,
        x: Array,
        *,
        token_ids: Array | None = None,
        token_mask: Array | None = None,
        return_logits: bool,
    ) -> Routing | tuple[Routing, Array]: ...

    def __call__(
        self,
        x: Array,
        *,
        token_ids: Array | None = None,
        token_mask: Array | None = None,
        return_logits: bool = False,
    ) -> Routing | tuple[Routing, Array]:
        """Routes tokens.

        Args:
            x: hidden states f32, bf16 or f16 `[..., D]`.
            token_ids: integers `[...]`; needed by a hash router, not used by a dense one.
            token_mask: bool `[...]`; where False the ids are -1 and the weights 0.
            return_logits: also return the logits, f32 `[..., E]`, for balance losses: 0 in the rows of masked
                tokens and, in a hash router, of those without an expert.

        Returns:
            `Routing(weights, expert_ids)`, or `(Routing, logits)`.

        Nothing that x holds in such a row reaches a gradient, or the returned logits.

        Raises:
            TypeError: an operand has a wrong dtype.
            ValueError: a wrong shape, or an argument that does not go with the configuration.
            NotImplementedError: `implementation="native"` where no kernel can run.
        """
        config = self.config
        x = _check.float_array("x", x)
        if x.shape[-1] != config.hidden_size:
            raise ValueError(f"x must have shape (..., {config.hidden_size}) (hidden_size), got {x.shape}")
        if token_ids is not None:
            token_ids = _check.int_array("token_ids", token_ids)
            _check.same_shape("token_ids", token_ids, x.shape[:-1])
        if token_mask is not None:
            token_mask = _check.mask_array("token_mask", token_mask, x.shape[:-1])
        if _check.static_bool("return_logits", return_logits) and not config.has_weight:
            raise ValueError("return_logits must be False for a hash router with uniform weights: it has no logits")
        if config.mode == "hash":
            if token_ids is None:
                raise ValueError("token_ids must be given to a hash router, got None")
            return self._hash(x, token_ids, token_mask, return_logits)
        options = {"token_mask": token_mask, "implementation": config.implementation, **config.selection}
        if not return_logits:
            x, weight = self._factors(x)
            options.update(logit_bias=self._logit_bias, precision=config.precision)
            return dense_router(x, weight, self.bias[...], **options)
        logits = self._logits(x, token_mask)
        routing = activation_topk(logits, self.bias[...], **options)
        return routing, _masked(logits, token_mask)

    @property
    def _logit_bias(self) -> Array | None:
        return self.logit_bias[...] if self.config.logit_bias else None

    def _factors(self, x: Array) -> tuple[Array, Array]:
        """x and the weight, in the dtypes in which they are multiplied."""
        dtype, weight = self.config.dtype, self.weight[...]
        if dtype is not None:
            return x.astype(dtype), weight.astype(dtype)
        return x, weight if weight.dtype == x.dtype else weight.astype(jnp.float32)

    def _logits(self, x: Array, token_mask: Array | None) -> Array:
        precision = self.config.precision
        return router_logits(*self._factors(x), self._logit_bias, precision=precision, token_mask=token_mask)

    def _hash(self, x: Array, token_ids: Array, token_mask: Array | None, return_logits: bool) -> Any:
        config, table = self.config, self.hash_lut[...]
        # The table may have been restored in another dtype.
        operands = table_operands(token_ids, table, token_mask)
        if config.hash_weights == "uniform":
            return hash_router(**operands, scale=config.scale, implementation=config.implementation)
        expert_ids = hash_reference(**operands).expert_ids
        has_experts = ((expert_ids >= 0) & (expert_ids < config.num_experts)).any(axis=-1)
        logits = self._logits(x, has_experts)
        routing = scored_hash_router(logits, **operands, implementation=config.implementation, **config.scoring)
        return (routing, _masked(logits, has_experts)) if return_logits else routing


def _masked(logits: Array, token_mask: Array | None) -> Array:
    return logits if token_mask is None else jnp.where(shard_as(logits, token_mask)[..., None], logits, 0.0)
