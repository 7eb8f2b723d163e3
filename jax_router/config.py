"""What a Router is: its sizes and options, from arguments, from a preset, or from a model's own config.json."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any, Literal

import numpy as np
from jax import lax
from jax.typing import DTypeLike

from . import _check, models
from ._types import GroupScore, Implementation, ScoreFn, Selection

_FLOAT32 = np.dtype(np.float32)

# What a field is as a Python number, by its type.
_AS_PYTHON: dict[str, Callable[[str, Any], Any]] = {
    "int": functools.partial(_check.static_int, low=0, high=None),
    "float": _check.static_float,
    "bool": _check.static_bool,
}


@dataclasses.dataclass(frozen=True)
class RouterConfig:
    """What a Router is: its sizes, its options, and whether it is dense or hash. Frozen and hashable.

    With hidden states x, a token's logits are `z = x @ weight.T (+ logit_bias)`, then
    `softcap * tanh(z * logit_scale / softcap)`. Its experts are the `top_k` with the best keys `score_fn(z) + bias`,
    among the `top_groups` best of `num_groups` groups. Their weights are their scores without the bias, divided by
    their sum + `eps` if `renormalize`, times `scale`. `activation_topk` has the formulas.

    Example::

        >>> from jax_router import RouterConfig
        >>> deepseek_v3 = RouterConfig(
        ...     hidden_size=7168, num_experts=256, top_k=8, score_fn="sigmoid", num_groups=8, top_groups=4, scale=2.5
        ... )
        >>> RouterConfig.from_preset("deepseek_v3") == deepseek_v3
        True

    Args:
        hidden_size: D, of the hidden states.
        num_experts: E.
        top_k: the number of experts a token, from 1 to the number of experts in `top_groups` groups.
        score_fn: `"sqrtsoftplus"` (default), `"sigmoid"` or `"softmax"`.
        renormalize: whether the weights of a token are divided by their sum; default True.
        scale: a number that all weights are multiplied by; default 1.
        eps: what `renormalize` adds to the sum; default 1e-20. LFM2 adds 1e-6, MiniMax and Step nothing. The softmax
            over the chosen sums to 1 and has no use for it.
        num_groups: the number of groups of experts, which divides E; default 1, no groups.
        top_groups: how many groups stay eligible; needed by `num_groups` above 1.
        group_score: of a group, `"top2_sum"` (default) or `"max"` of its keys.
        selection_bias: whether a dense router has a bias that steers the selection; default True. Zeros are not the
            same as none: without one the selection is by logits, which is faster, and rounding of the scores makes no
            ties. Mixtral, Qwen and gpt-oss have none. A hash router, which selects nothing, has none either.
        selection_key: what the selection bias is added to, the `"scores"` (default) or the `"logits"` (Kolibri).
        num_null_experts: how many of the E experts, the last ones, compute the identity (LongCat); default 0. They are
            chosen like all others; `null_experts_output` is what they add, and `num_real_experts` what to dispatch to.
        per_expert_scale: whether weights are multiplied by a trained number of their expert at the end (Gemma 4);
            default False.
        logit_bias: whether the logits have a trained bias, as those of gpt-oss; default False.
        logits_dtype: what the logits are rounded to before everything else, for parity with models that score in half
            precision; default None.
        logit_scale: a number that the logits are multiplied by (Muse Spark); default 1.
        softcap: the c of `c * tanh(logits * logit_scale / c)` (Grok: 30); default None, not capped.
        mode: `"dense"` (default), by the hidden state, or `"hash"`, by the token id.
        vocab_size: V, of the token ids; needed by `"hash"`.
        hash_weights: in a hash layer, `"uniform"` (default), scale / k, or `"scored"`, by the scores of the table's
            experts (DeepSeek-V4).
        count_experts: whether a router counts how often it chooses each expert, for `update_selection_biases`; default
            False.
        count_axis_name: mesh axes of the surrounding `shard_map` that split tokens, to sum these counts over; default
            None. Under `jit` they are of all tokens without.
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

    # Weights of the chosen experts.
    score_fn: ScoreFn = "sqrtsoftplus"
    renormalize: bool = True
    scale: float = 1.0
    eps: float = 1e-20
    per_expert_scale: bool = False

    # Which experts are chosen.
    num_groups: int = 1
    top_groups: int | None = None
    group_score: GroupScore = "top2_sum"
    selection_bias: bool = True
    selection_key: Literal["scores", "logits"] = "scores"
    num_null_experts: int = 0

    # Logits, before they are scored.
    logit_bias: bool = False
    logits_dtype: DTypeLike | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    # Hash layers.
    mode: Literal["dense", "hash"] = "dense"
    vocab_size: int | None = None
    hash_weights: Literal["uniform", "scored"] = "uniform"

    # What it remembers.
    count_experts: bool = False
    count_axis_name: str | Sequence[str] | None = None

    # How it is computed.
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
        self._check_selection()
        self._check_hash()
        self._check_logits()
        self._check_counts()
        _check.implementation(self.implementation)
        # One value for all ways to write it, so that equal configurations compare equal, and all have a hash.
        for field in dataclasses.fields(RouterConfig):
            as_python = _AS_PYTHON.get(str(field.type).removesuffix(" | None"))
            if as_python and getattr(self, field.name) is not None:
                object.__setattr__(self, field.name, as_python(field.name, getattr(self, field.name)))
        object.__setattr__(self, "precision", _check.precision(self.precision))
        object.__setattr__(self, "param_dtype", _check.float_dtype("param_dtype", self.param_dtype))
        for name in ("dtype", "logits_dtype"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _check.float_dtype(name, getattr(self, name)))

    def _check_selection(self) -> None:
        _check.static_bool("selection_bias", self.selection_bias)
        _check.choice("selection_key", self.selection_key, ("scores", "logits"))
        if self.selection_key == "logits" and (self.num_groups > 1 or not self.selection_bias):
            raise ValueError(
                "selection_key must be 'scores', the default, with groups or without a selection bias, got 'logits'"
            )
        _check.static_int("num_null_experts", self.num_null_experts, 0, self.num_experts - 1, " (num_experts - 1)")

    def _check_hash(self) -> None:
        if self.vocab_size is not None:
            _check.static_int("vocab_size", self.vocab_size, 1, None)
        elif self.mode == "hash":
            raise ValueError("vocab_size must be an int for mode='hash', got None")
        if self.mode == "dense" and self.hash_weights != "uniform":
            raise ValueError(
                f"hash_weights must be 'uniform', the default, for mode='dense', got {self.hash_weights!r}"
            )

    def _check_logits(self) -> None:
        for name in ("logit_bias", "per_expert_scale"):
            if _check.static_bool(name, getattr(self, name)) and not self.has_weight:
                raise ValueError(f"{name} must be False for a hash router with uniform weights, which has no logits")
        _check.static_float("logit_scale", self.logit_scale)
        if self.softcap is not None and _check.static_float("softcap", self.softcap) <= 0:
            raise ValueError(f"softcap must be None or above 0, got {self.softcap}")

    def _check_counts(self) -> None:
        counts, names = _check.static_bool("count_experts", self.count_experts), self.count_axis_name
        if names is None:
            return
        if not counts:
            raise ValueError(f"count_axis_name must be None, the default, without count_experts, got {names!r}")
        object.__setattr__(self, "count_axis_name", _check.axis_names("count_axis_name", names))

    @classmethod
    def from_preset(cls, name: str, layer: int | None = None) -> RouterConfig:
        """The router of a model, by the name of its preset.

        Args:
            name: one of `jax_router.presets()`.
            layer: which of the model's layers, from 0; default its usual layer of experts. The first layers of some
                models are hash layers, `from_preset("deepseek_v4_flash", layer=0)`.

        Raises:
            TypeError: layer is no int.
            ValueError: there is no such preset, it has a router that no options describe, or there is no router in
                that layer.

        Example:
            >>> from jax_router import RouterConfig
            >>> RouterConfig.from_preset("mixtral_8x7b").num_experts
            8
            >>> RouterConfig.from_preset("deepseek_v4_flash", layer=0).mode
            'hash'
        """
        return cls(**models.preset(name).options(layer))

    @classmethod
    def from_hf_config(cls, config: str | PathLike[str] | Mapping[str, Any], layer: int | None = None) -> RouterConfig:
        """The router of a model from its config.json, as Hugging Face writes it: of a fine-tune with other sizes too.

        The family's own field names are read (`n_routed_experts`, `moe_topk`, ...), in `text_config` where a
        multimodal model has one. What the file does not say is what all presets of that family say.

        Args:
            config: the path of the file or of its folder, or what is in it.
            layer: as in `from_preset`.

        Raises:
            OSError: the file cannot be read.
            TypeError: layer is no int, or a field has a wrong type.
            ValueError: its `model_type` is unknown (the message lists the known ones), it lacks a field or has one with
                a wrong value, or there is no router in that layer.

        Example:
            >>> from jax_router import RouterConfig
            >>> config = {"model_type": "mixtral", "hidden_size": 64, "num_local_experts": 4, "num_experts_per_tok": 1}
            >>> RouterConfig.from_hf_config({**config, "num_hidden_layers": 2}).num_experts
            4
        """
        return cls(**models.hf_options(config, layer))

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

    @property
    def has_selection_bias(self) -> bool:
        """Whether a router has a selection bias: only if it is dense."""
        return self.mode == "dense" and self.selection_bias

    @property
    def num_real_experts(self) -> int:
        """The experts that compute something: all but the null ones."""
        return self.num_experts - self.num_null_experts

    @property
    def changes_logits(self) -> bool:
        """Whether logits are more than the product and its bias."""
        return self.logits_dtype is not None or self.logit_scale != 1 or self.softcap is not None
