"""The Flax NNX module: a router that is dense or hash by construction."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any, Literal, get_args, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from jax.typing import DTypeLike

from . import _check, checkpoints
from ._activation_topk import activation_topk
from ._dense_router import dense_router
from ._expert_counts import expert_counts
from ._hash_router import hash_router, table_operands
from ._ids import as_int32_ids
from ._logits import router_logits
from ._route_at import route_at, scored_hash_router
from ._shapes import with_rank
from ._sharding import shard_as, shard_last_axis_as, whole, with_rows_as
from ._topk_select import topk_select
from ._types import Routing
from .balance import update_expert_bias
from .config import RouterConfig

Initializer = Callable[..., Array]
Unset = Literal["none", "route"]

_LECUN_NORMAL = nnx.initializers.lecun_normal(in_axis=-1, out_axis=-2)


class SelectionBias(nnx.Variable[Array]):
    """The bias that steers the selection. No Param: gradients do not train it, a balancing rule does.

    Example:
        >>> from flax import nnx
        >>> from jax_router import Router, RouterConfig, SelectionBias
        >>> router = Router(RouterConfig(hidden_size=4, num_experts=3, top_k=1), rngs=nnx.Rngs(0))
        >>> router.bias[...] = router.bias[...].at[2].add(0.1)
        >>> list(nnx.state(router, SelectionBias)), list(nnx.state(router, nnx.Param))
        (['bias'], ['weight'])
    """


class HashTable(nnx.Variable[Array]):
    """The experts of each token id. No Param: integers have no gradient.

    Example:
        >>> from flax import nnx
        >>> from jax_router import HashTable, Router, RouterConfig
        >>> config = RouterConfig(hidden_size=4, num_experts=3, top_k=2, mode="hash", vocab_size=5)
        >>> router = Router(config, rngs=nnx.Rngs(0))
        >>> isinstance(router.hash_lut, HashTable), router.hash_lut.shape
        (True, (5, 2))
    """


class ExpertCounts(nnx.Variable[Array]):
    """How often each expert was chosen since the selection bias was last updated. No Param.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jax_router import Router, RouterConfig
        >>> config = RouterConfig(hidden_size=4, num_experts=3, top_k=1, count_experts=True)
        >>> router = Router(config, rngs=nnx.Rngs(0))
        >>> _ = router(jnp.ones((5, 4)))
        >>> int(router.counts[...].sum())
        5
    """


def random_hash_table(key: Array, shape: tuple[int, int], num_experts: int) -> Array:
    """A table `[V, k]` of k distinct experts a token id, uniformly at random.

    Args:
        key: a key of `jax.random`.
        shape: `(V, k)`.
        num_experts: the number of experts, at least k.

    Returns:
        int32 `[V, k]`.

    Raises:
        TypeError: key is no key, shape no pair of ints, or num_experts no int.
        ValueError: more experts a token id than there are.

    Example:
        >>> import jax
        >>> from jax_router import random_hash_table
        >>> random_hash_table(jax.random.key(0), (5, 2), num_experts=3).shape
        (5, 2)
    """
    if not isinstance(shape, Sequence) or len(shape) != 2:
        raise TypeError(f"shape must be a pair (vocab_size, k), got {shape!r}")
    num_experts = _check.static_int("num_experts", num_experts, 1, None)
    vocab_size = _check.static_int("shape[0] (vocab_size)", shape[0], 1, None)
    k = _check.static_int("shape[1] (k)", shape[1], 1, num_experts, " (num_experts)")
    scores = jax.random.uniform(_check.key("key", key), (vocab_size, num_experts), jnp.float32)
    _, table = topk_select(scores, k)
    return table


class Router(nnx.Module):
    """Which experts compute each token.

    A dense router scores hidden states, `dense_router(x, weight, bias)`. A hash router looks token ids up in a table,
    and weighs the experts uniformly or by the scores of the hidden state (DeepSeek-V4's first layers).

    Attributes:
        weight: Param `[E, D]` in `param_dtype`, unless the router is hash with uniform weights.
        bias: SelectionBias f32 `[E]`, zeros, of a dense router, unless it has `selection_bias=False`.
        logit_bias: Param f32 `[E]`, zeros, where the configuration asks for it.
        per_expert_scale: Param f32 `[E]`, ones, where the configuration asks for it.
        hash_lut: HashTable int32 `[V, k]`, of a hash router.
        counts: ExpertCounts int32 `[E]`, where the configuration says `count_experts`: of all calls since
            `update_selection_biases`. Masked tokens are not counted, replayed experts are.
        deterministic: False; where it is True, as after `model.eval()`, calls are not counted.

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
        TypeError: config is no RouterConfig, rngs are no Rngs, an initializer is no function, or the initial table is
            not of integers.
        ValueError: the initial weight or table has a wrong shape.
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
        _check.function("weight_init", weight_init, "nnx.initializers.lecun_normal(in_axis=-1, out_axis=-2)")
        _check.function("hash_lut_init", hash_lut_init, "random_hash_table")
        self.config = config
        if config.has_weight:
            shape = (config.num_experts, config.hidden_size)
            self.weight = nnx.Param(weight_init(rngs.params(), shape, config.param_dtype))
            _check.same_shape("the result of weight_init", self.weight.get_value(), shape)
        if config.logit_bias:
            self.logit_bias = nnx.Param(jnp.zeros(config.num_experts, jnp.float32))
        if config.per_expert_scale:
            self.per_expert_scale = nnx.Param(jnp.ones(config.num_experts, jnp.float32))
        if config.has_selection_bias:
            self.bias = SelectionBias(jnp.zeros(config.num_experts, jnp.float32))
        if config.mode == "hash":
            assert config.vocab_size is not None
            table_shape = (config.vocab_size, config.top_k)
            table = hash_lut_init(rngs.params(), table_shape, config.num_experts)
            table = _check.int_array("the result of hash_lut_init", table)
            _check.same_shape("the result of hash_lut_init", table, table_shape)
            self.hash_lut = HashTable(as_int32_ids(table, 2**31))
        if config.count_experts:
            self.counts = ExpertCounts(jnp.zeros(config.num_experts, jnp.int32))
        self.deterministic = False

    def set_view(self, deterministic: bool | None = None) -> None:
        """For `nnx.view`, which makes a model of the same variables for evaluation.

        Args:
            deterministic: the attribute.

        Example:
            >>> import jax.numpy as jnp
            >>> from flax import nnx
            >>> from jax_router import Router, RouterConfig
            >>> config = RouterConfig(hidden_size=4, num_experts=3, top_k=1, count_experts=True)
            >>> router = Router(config, rngs=nnx.Rngs(0))
            >>> _ = nnx.view(router, deterministic=True)(jnp.ones((5, 4)))
            >>> int(router.counts[...].sum())
            0
        """
        if deterministic is not None:
            self.deterministic = deterministic

    @classmethod
    def from_checkpoint(
        cls,
        path: checkpoints.Source,
        config: str | RouterConfig,
        layer: int | None = None,
        *,
        dtype: DTypeLike | None = None,
        sharding: jax.sharding.Sharding | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> Router:
        """A router with the weights of a checkpoint, of which only its own tensors are read.

        Tensors are found by the names of the model's family, whatever comes before `layers.` in them, or by those of
        the attributes of a Router, as `save` writes them. A gate that lies transposed, and a bias of one row, are taken
        as what they are.

        Args:
            path: a safetensors file, an index of several, or a folder with either; or a dict of arrays by name. Files
                need the extra `checkpoints`.
            config: the name of a preset, or a configuration: from `RouterConfig.from_hf_config` for a fine-tune.
            layer: of the model; needed where there are several with routers.
            dtype: to cast the weight to; default that of the checkpoint. The configuration's `param_dtype` follows.
            sharding: of the weight `[E, D]`: each device's part is read for it alone.
            rngs: not drawn from; default `nnx.Rngs(0)`.

        Raises:
            ImportError: safetensors is missing.
            OSError: there is no such file.
            TypeError: path is neither a path nor a dict, config neither a name nor a RouterConfig, or layer no int.
            ValueError: the preset or its layer has no router; or, as a `CheckpointError` that lists everything that is
                wrong, tensors are missing, unexpected or doubled, have a wrong shape or dtype, or a table has entries
                outside `[0, E)`.

        Example:
            >>> import jax.numpy as jnp
            >>> from jax_router import Router, RouterConfig
            >>> config = RouterConfig(hidden_size=4, num_experts=3, top_k=1, selection_bias=False)
            >>> router = Router.from_checkpoint({"weight": jnp.ones((3, 4))}, config)
            >>> router.weight.shape
            (3, 4)
        """
        preset = config if isinstance(config, str) else None
        config = RouterConfig.from_preset(config, layer) if isinstance(config, str) else config
        _check.instance("config", config, RouterConfig, "RouterConfig(**options)")
        if dtype is not None:
            dtype = _check.float_dtype("dtype", dtype)
        values = checkpoints.read_router(path, config, preset=preset, layer=layer, dtype=dtype, sharding=sharding)
        if "weight" in values:
            config = dataclasses.replace(config, param_dtype=values["weight"].dtype)
        router = cls(
            config,
            rngs=nnx.Rngs(0) if rngs is None else rngs,
            weight_init=lambda *_: values["weight"],
            hash_lut_init=lambda *_: values["hash_lut"],
        )
        router._set(values)
        return router

    def load_state(self, path: checkpoints.Source, layer: int | None = None, *, preset: str | None = None) -> None:
        """Reads the variables of this router from a checkpoint, as `from_checkpoint` does.

        They keep their dtypes and their shardings. A Router without values, from `nnx.eval_shape`, gets them; its
        counts, of which a checkpoint has none, are then 0. After an error nothing has changed.

        Args:
            path: as in `from_checkpoint`.
            layer: of the model; needed where there are several with routers.
            preset: whose names the tensors have; default all that are known.

        Raises:
            ImportError, OSError, ValueError: as of `from_checkpoint`; or this is a stack of layers.
            TypeError: layer is no int.

        Example:
            >>> import jax.numpy as jnp
            >>> from flax import nnx
            >>> from jax_router import Router, RouterConfig
            >>> router = Router(RouterConfig(hidden_size=4, num_experts=3, top_k=1), rngs=nnx.Rngs(0))
            >>> router.load_state({"weight": jnp.ones((3, 4)), "bias": jnp.zeros(3)})
            >>> float(router.weight[...].sum())
            12.0
        """
        kept: dict[str, Any] = {}
        if (weight := checkpoints.variables_of(self).get("weight")) is not None:
            kept = {"dtype": weight.dtype, "sharding": _placement(weight)}
        values = checkpoints.read_router(path, self.config, preset=preset, layer=layer, **kept)
        if self.config.count_experts and isinstance(counts := self.counts.get_value(), jax.ShapeDtypeStruct):
            values["counts"] = jnp.zeros(counts.shape, counts.dtype)
        self._set(values)

    def save(self, path: str | PathLike[str], layer: int | None = None, *, preset: str | None = None) -> None:
        """Writes the variables to a safetensors file, from which `from_checkpoint` and `load_state` read them.

        Args:
            path: of the file.
            layer: of the model, for the names of a preset.
            preset: whose names to write, for other software; default the names of the attributes.

        Raises:
            ImportError: safetensors is missing.
            OSError: the file cannot be written.
            TypeError: path is none, or layer is no int.
            ValueError: the preset has no name for a variable, only one of layer and preset is given, or this is a stack
                of layers.

        Example:
            >>> import tempfile
            >>> from flax import nnx
            >>> from jax_router import Router, RouterConfig
            >>> router = Router(RouterConfig(hidden_size=4, num_experts=3, top_k=1), rngs=nnx.Rngs(0))
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     router.save(f"{folder}/router.safetensors")
            ...     router.load_state(folder)
        """
        variables = {role: np.asarray(value) for role, value in checkpoints.variables_of(self).items()}
        checkpoints.save_router(path, variables, layer, preset)

    def _set(self, values: dict[str, Array]) -> None:
        for role, value in values.items():
            variable = getattr(self, role)
            was = variable.get_value()
            variable.set_value(jax.device_put(value.astype(was.dtype), _placement(was)))

    @overload
    def __call__(
        self,
        x: Array,
        *,
        token_ids: Array | None = None,
        token_mask: Array | None = None,
        expert_ids: Array | None = None,
        unset: Unset = "none",
        return_logits: Literal[False] = False,
    ) -> Routing: ...

    @overload
    def __call__(
        self,
        x: Array,
        *,
        token_ids: Array | None = None,
        token_mask: Array | None = None,
        expert_ids: Array | None = None,
        unset: Unset = "none",
        return_logits: Literal[True],
    ) -> tuple[Routing, Array]: ...

    @overload
    def __call__(
        self,
        x: Array,
        *,
        token_ids: Array | None = None,
        token_mask: Array | None = None,
        expert_ids: Array | None = None,
        unset: Unset = "none",
        return_logits: bool,
    ) -> Routing | tuple[Routing, Array]: ...

    def __call__(
        self,
        x: Array,
        *,
        token_ids: Array | None = None,
        token_mask: Array | None = None,
        expert_ids: Array | None = None,
        unset: Unset = "none",
        return_logits: bool = False,
    ) -> Routing | tuple[Routing, Array]:
        """Routes tokens.

        Args:
            x: hidden states f32, bf16 or f16 `[..., D]`.
            token_ids: integers `[...]`; needed by a hash router that looks them up, not used by a dense one.
            token_mask: bool `[...]`; where False the ids are -1 and the weights 0.
            expert_ids: integers `[..., k]`: experts to replay. They are used as they are, and weights and gradients
                come from the logits of `x`, as in `route_at`. Any integer dtype: int16 holds what a model records.
            unset: what an id outside of `[0, E)` means, -1 as a rule: `"none"` (default), no expert; `"route"`, that
                this token's k experts are to be chosen, or looked up, as without `expert_ids`.
            return_logits: also return the logits as they are scored, f32 `[..., E]`, for balance losses: 0 in the rows
                of masked tokens and of those for which a hash table or `expert_ids` have no expert.

        Returns:
            `Routing(weights, expert_ids)`, or `(Routing, logits)`.

        Nothing that x holds in such a row reaches a gradient, or the returned logits.

        Raises:
            TypeError: an operand has a wrong dtype.
            ValueError: a wrong shape, or an argument that does not go with the configuration.
            NotImplementedError: `implementation="native"` where no kernel can run.
        """
        config = self.config
        x = _check.hidden_states(x, config.hidden_size)
        if token_ids is not None:
            token_ids = _check.int_array("token_ids", token_ids)
            _check.same_shape("token_ids", token_ids, x.shape[:-1])
        if token_mask is not None:
            token_mask = _check.mask_array("token_mask", token_mask, x.shape[:-1])
        if _check.static_bool("return_logits", return_logits) and not config.has_weight:
            raise ValueError("return_logits must be False for a hash router with uniform weights: it has no logits")
        _check.choice("unset", unset, get_args(Unset))
        if expert_ids is not None:
            if not config.has_weight:
                raise ValueError("expert_ids must be None for a hash router with uniform weights: it has no scores")
            expert_ids = _check.int_array("expert_ids", expert_ids)
            _check.same_shape("expert_ids", expert_ids, (*x.shape[:-1], config.top_k))
        elif unset != "none":
            raise ValueError(f"unset must be 'none', the default, without expert_ids, got {unset!r}")
        if config.mode == "hash" and token_ids is None and (expert_ids is None or unset == "route"):
            raise ValueError("token_ids must be given to a hash router, got None")

        logits: Any
        if expert_ids is not None:
            routing, logits = self._replay(x, expert_ids, unset, token_ids, token_mask)
        elif config.mode == "hash":
            routing, logits = self._hash(x, token_ids, token_mask)
        elif return_logits or config.changes_logits or config.selection_key == "logits":
            routing, logits = self._score(x, token_mask)
        else:
            product: dict[str, Any] = {"logit_bias": self._logit_bias, "precision": config.precision}
            logits = None
            x, weight = self._factors(x)
            routing = dense_router(x, weight, **product, **self._selection(token_mask))
        if config.per_expert_scale:
            routing = routing._replace(weights=routing.weights * self._scale_of(routing.expert_ids))
        if config.count_experts and not self.deterministic:
            counts = expert_counts(
                routing.expert_ids if x.ndim > 1 else routing.expert_ids[None],  # it wants an axis of tokens
                config.num_experts,
                axis_name=config.count_axis_name,
                implementation=config.implementation,
            )
            self.counts[...] = self.counts[...] + counts
        return (routing, logits) if return_logits else routing

    def update_selection_bias(
        self,
        *,
        rate: float | Array = 1e-3,
        centred: bool = False,
        when: Array | bool = True,
    ) -> Array:
        """Moves the selection bias by what was counted, and clears the counts: `update_selection_biases` of one router.

        Args:
            rate: by how much a bias moves; a number, or an array `[]`, of a schedule say.
            centred: keeps the mean of the bias.
            when: bool, which may be traced: whether to do it, else nothing changes.

        Returns:
            the counts that were used, int32 `[E]`.

        Raises:
            ValueError: this router does not count.
            TypeError, ValueError: when is no bool `[]`; or as of `balance.update_expert_bias`.

        Example:
            >>> import jax.numpy as jnp
            >>> from flax import nnx
            >>> from jax_router import Router, RouterConfig
            >>> config = RouterConfig(hidden_size=4, num_experts=3, top_k=1, count_experts=True)
            >>> router = Router(config, rngs=nnx.Rngs(0))
            >>> router.counts[...] = jnp.array([5, 3, 1])
            >>> counts = router.update_selection_bias(rate=0.5)
            >>> router.bias[...]
            Array([-0.5,  0. ,  0.5], dtype=float32)
        """
        if not self.config.count_experts:
            raise ValueError("the configuration must have count_experts=True, got False")
        when = _check.mask_array("when", when, ())
        counts = self.counts[...]
        if self.config.has_selection_bias:
            bias = self.bias[...]
            self.bias[...] = jnp.where(when, update_expert_bias(bias, counts, rate=rate, centred=centred), bias)
        self.counts[...] = jnp.where(when, 0, counts)
        return counts

    def _score(self, x: Array, token_mask: Array | None) -> tuple[Routing, Array]:
        """A dense router, with its logits."""
        logits = self._logits(x, token_mask)
        return self._choose(logits, token_mask), _masked(logits, token_mask)

    def _choose(self, logits: Array, token_mask: Array | None) -> Routing:
        config = self.config
        if config.selection_key == "scores":
            return activation_topk(logits, **self._selection(token_mask))
        keys = lax.stop_gradient(logits) + with_rank(shard_last_axis_as(logits, self.bias[...]), logits.ndim)
        _, expert_ids = topk_select(keys, config.top_k, implementation=config.implementation)
        return self._weigh(logits, _masked(expert_ids, token_mask, -1))

    def _weigh(self, logits: Array, expert_ids: Array) -> Routing:
        return route_at(logits, expert_ids, implementation=self.config.implementation, **self.config.scoring)

    def _replay(
        self, x: Array, expert_ids: Array, unset: Unset, token_ids: Array | None, token_mask: Array | None
    ) -> tuple[Routing, Array]:
        ids = as_int32_ids(expert_ids, self.config.num_experts)
        mask, logits = token_mask, None
        if unset == "route":
            is_set = self._are_experts(ids).all(axis=-1, keepdims=True)
            if self.config.mode == "hash":
                own = self._look_up(token_ids, token_mask)
            else:
                logits = self._logits(x, token_mask)
                own = self._choose(lax.stop_gradient(logits), token_mask).expert_ids
            ids = jnp.where(is_set, ids, own)
        ids = _masked(ids, token_mask, -1)
        if logits is None:
            mask = self._are_experts(ids).any(axis=-1)
            logits = self._logits(x, mask)
        return self._weigh(logits, ids), _masked(logits, mask)

    def _hash(self, x: Array, token_ids: Any, token_mask: Array | None) -> tuple[Routing, Any]:
        config, operands = self.config, self._table_operands(token_ids, token_mask)
        if config.hash_weights == "uniform":
            return hash_router(**operands, scale=config.scale, implementation=config.implementation), None
        has_experts = self._are_experts(hash_router(**operands, implementation="reference").expert_ids).any(axis=-1)
        logits = self._logits(x, has_experts)
        routing = scored_hash_router(logits, **operands, implementation=config.implementation, **config.scoring)
        return routing, _masked(logits, has_experts)

    def _look_up(self, token_ids: Any, token_mask: Array | None) -> Array:
        return hash_router(**self._table_operands(token_ids, token_mask), implementation="reference").expert_ids

    def _table_operands(self, token_ids: Any, token_mask: Array | None) -> dict[str, Any]:
        # The table may have been restored in another dtype.
        return table_operands(token_ids, self.hash_lut[...], token_mask)

    def _are_experts(self, ids: Array) -> Array:
        return (ids >= 0) & (ids < self.config.num_experts)

    def _selection(self, token_mask: Array | None) -> dict[str, Any]:
        """What a selection takes besides the logits, or what they are made of."""
        config = self.config
        bias = self.bias[...] if config.has_selection_bias else None
        return {"bias": bias, "token_mask": token_mask, "implementation": config.implementation, **config.selection}

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
        """The logits as they are scored. Where the mask is False they may be anything."""
        config = self.config
        precision = config.precision
        logits = router_logits(*self._factors(x), self._logit_bias, precision=precision, token_mask=token_mask)
        if not config.changes_logits:
            return logits
        logits = _masked(logits, token_mask)  # what a masked token holds must not reach these derivatives
        if config.logits_dtype is not None:
            finfo = jnp.finfo(config.logits_dtype)
            logits = lax.reduce_precision(logits, finfo.nexp, finfo.nmant)
        logits = logits * jnp.float32(config.logit_scale)
        if config.softcap is not None:
            softcap = jnp.float32(config.softcap)
            logits = softcap * jnp.tanh(logits / softcap)
        return logits

    def _scale_of(self, expert_ids: Array) -> Array:
        """The factor that each choice's expert has, 0 where there is none."""
        column = whole(self.per_expert_scale[...]).astype(jnp.float32)[:, None]
        scale = with_rows_as(expert_ids, lambda ids, column: column[ids])(jnp.maximum(expert_ids, 0), column)
        return jnp.where(expert_ids >= 0, scale[..., 0], 0.0)


def update_selection_biases(
    model: nnx.Module,
    *,
    rate: float | Array = 1e-3,
    centred: bool = False,
    when: Array | bool = True,
) -> dict[str, Array]:
    """Moves the selection biases of all routers in a model by what they counted, and clears the counts.

    The rule is `balance.update_expert_bias`: up for experts that were chosen less often than the mean, down for others.
    Call it once per optimizer step. The counts are then those of all tokens of the step, whatever it was split into:

    - accumulation steps: every call of a router adds to its counts, until they are cleared;
    - layers: each has its own counts, and so have stacked ones under `nnx.scan`, `[layers, E]`;
    - devices: under `jit` over sharded tokens the counts are those of all of them; in `jax.shard_map` the configuration
      names the axes that split tokens, `count_axis_name`, over which every call sums what it counted. These are sums of
      integers: counts and biases are the same on all devices, to the bit;
    - recomputation: counts are state that goes in and comes out of a function. `nnx.remat`, or `jax.checkpoint` over
      `nnx.split` and `nnx.merge`, computes the function again for the backward pass, and drops what comes out.

    Calls after `model.eval()` are not counted. Between two updates there may be at most 2^31 - 1 choices a layer.

    Example::

        >>> import jax, optax
        >>> from flax import nnx
        >>> from jax_router import MoE, RouterConfig, update_selection_biases
        >>> config = RouterConfig(hidden_size=16, num_experts=8, top_k=2, score_fn="sigmoid", count_experts=True)
        >>> model = MoE(config, 8, rngs=nnx.Rngs(0))
        >>> optimizer = nnx.Optimizer(model, optax.MultiSteps(optax.adam(1e-3), every_k_schedule=2), wrt=nnx.Param)
        >>> @nnx.jit
        ... def train_step(model, optimizer, x):
        ...     loss, gradients = nnx.value_and_grad(lambda model: (model(x) ** 2).mean())(model)
        ...     optimizer.update(model, gradients)
        ...     counts = update_selection_biases(model, when=optimizer.opt_state.mini_step == 0)
        ...     return loss, counts
        >>> for key in jax.random.split(jax.random.key(0), 2):
        ...     loss, counts = train_step(model, optimizer, jax.random.normal(key, (4, 16)))
        >>> counts["router"].sum(), model.router.counts[...].sum()  # of 2 times 4 tokens; cleared
        (Array(16, dtype=int32), Array(0, dtype=int32))

    Without `optax.MultiSteps` there is no `when`.

    Args:
        model: with one or more Routers of configurations with `count_experts`. A hash router has no bias: its counts
            are returned and cleared.
        rate: by how much a bias moves; a number, or an array `[]`, of a schedule say.
        centred: keeps the mean of the bias.
        when: bool, which may be traced: whether to do it, else nothing changes. With `optax.MultiSteps`, whether the
            parameters were updated.

    Returns:
        the counts that were used, int32 `[E]` of each router (`[layers, E]` of stacked ones), by its path in the model,
        for `balance.load_statistics`.

    Raises:
        ValueError: no router in the model counts.
        TypeError, ValueError: when is no bool `[]`; or as of `balance.update_expert_bias`.
    """
    counts = {
        ".".join(map(str, path)): module.update_selection_bias(rate=rate, centred=centred, when=when)
        for path, module in nnx.iter_modules(model)
        if isinstance(module, Router) and module.config.count_experts
    }
    if not counts:
        raise ValueError("model must have a Router whose configuration has count_experts=True, got none")
    return counts


def _placement(value: Any) -> jax.sharding.Sharding | None:
    """Where a value was put, on a device or a mesh; None where nobody said where.

    A ShapeDtypeStruct has no sharding but one that it was given.
    """
    return value.sharding if getattr(value, "committed", True) else None


def _masked(values: Array, token_mask: Array | None, instead: Any = 0) -> Array:
    if token_mask is None:
        return values
    return jnp.where(shard_as(values, token_mask)[..., None], values, jnp.asarray(instead, values.dtype))


def null_experts_output(x: Array, routing: Routing, num_real_experts: int) -> Array:
    """What null experts add to the output of a layer: `x` times the sum of their weights.

    Those are the experts with ids of `num_real_experts` and above. They compute the identity (LongCat-Flash). Dispatch
    the others with `expert_dispatch(routing.expert_ids, num_real_experts)`, for which null experts are in no group, and
    add both: what the real experts give, and `null_experts_output(x, routing, num_real_experts)`.

    Args:
        x: what the experts read, f32, bf16 or f16 `[..., D]`.
        routing: of the tokens, `[..., k]`.
        num_real_experts: how many experts come before the null ones, as `RouterConfig.num_real_experts` says.

    Returns:
        `[..., D]` in the dtype of x; the sum and the product are f32. A token without null experts has exact zeros.

    Differentiable in x and in the weights.

    Raises:
        TypeError: an operand has a wrong dtype, routing is none, or num_real_experts is no int.
        ValueError: x, weights and ids are of different tokens.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax_router import Routing, null_experts_output
        >>> routing = Routing(jnp.array([[0.25, 0.75]]), jnp.array([[0, 2]]))
        >>> null_experts_output(jnp.array([[4.0, 8.0]]), routing, num_real_experts=2)
        Array([[3., 6.]], dtype=float32)
    """
    x = _check.float_array("x", x)
    routing = _check.routing_arrays("routing", routing)
    tokens = routing.weights.shape[:-1]
    if x.shape[:-1] != tokens:
        raise ValueError(f"x without its last axis must have shape {tokens}, that of the routing, got {x.shape[:-1]}")
    num_real_experts = _check.static_int("num_real_experts", num_real_experts, 0, None)
    is_null = routing.expert_ids >= num_real_experts
    total = jnp.where(is_null, routing.weights, 0.0).sum(axis=-1, keepdims=True)
    # Not x * 0, which is NaN where x is.
    rows = jnp.where(is_null.any(axis=-1, keepdims=True), x.astype(jnp.float32), 0.0)
    return (rows * total).astype(x.dtype)
