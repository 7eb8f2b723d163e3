"""Argument checks at trace time. Every message names the argument, what it got and what it takes."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.export import is_symbolic_dim
from jax.extend.core import InconclusiveDimensionOperation

from ._types import Dispatch, GroupScore, Implementation, Routing, ScoreFn, Scoring, Selection

FLOATS = (jnp.float32, jnp.bfloat16, jnp.float16)

# XLA numbers the elements of an axis, and so do ids and indices, by int32.
MAX_SIZE = 2**31 - 1


def as_array(value: Any) -> Array:
    """jnp.asarray, which would convert a JAX array to its own dtype: jax 0.10.0 swaps axes when vmap shards that."""
    return value if isinstance(value, Array) else jnp.asarray(value)


def array(name: str, value: Any, *, min_rank: int = 0) -> Array:
    """An array with axes that int32 can number."""
    try:
        values = as_array(value)
    except OverflowError as error:
        raise ValueError(f"{name} must be an array whose dtype holds its integers, got {value!r}") from error
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be an array, got {value!r}") from error
    if values.ndim < min_rank:
        raise ValueError(f"{name} must have at least {min_rank} axes, got shape {values.shape}")
    for size in values.shape:
        if isinstance(size, int) and size > MAX_SIZE:
            raise ValueError(
                f"{name} must have at most 2^31 - 1 = {MAX_SIZE} elements an axis, got shape {values.shape}"
            )
    return values


def float_array(name: str, value: Any, *, min_rank: int = 1) -> Array:
    """An f32, bf16 or f16 array of at least `min_rank` axes."""
    values = array(name, value, min_rank=min_rank)
    if values.dtype not in FLOATS:
        raise TypeError(f"{name} must have dtype float32, bfloat16 or float16, got {values.dtype}{_cast(values)}")
    return values


def hidden_states(value: Any, hidden_size: int) -> Array:
    """The x of a router or a layer."""
    x = float_array("x", value)
    if x.shape[-1] != hidden_size:
        raise ValueError(f"x must have shape (..., {hidden_size}) (hidden_size), got {x.shape}")
    return x


def rows_to_copy(name: str, value: Any) -> Array:
    """Rows of any float dtype of at most 32 bits."""
    values = array(name, value, min_rank=1)
    # Not by the size of an element, which is a byte of floats of 4 bits too.
    if not jnp.issubdtype(values.dtype, jnp.floating) or jnp.finfo(values.dtype).bits not in (8, 16, 32):
        raise TypeError(
            f"{name} must have dtype float32, bfloat16 or float16, or a float dtype of 8 bits, got {values.dtype}"
            f"{_cast(values)}"
        )
    return values


def dispatch_arrays(name: str, value: Any) -> Dispatch:
    """A Dispatch of integers."""
    instance(name, value, Dispatch, "expert_dispatch(expert_ids, num_experts)")
    token_index = int_array(f"{name}.token_index", value.token_index)
    if token_index.ndim != 1:
        raise ValueError(f"{name}.token_index must have one axis, that of the slots, got shape {token_index.shape}")
    return value._replace(token_index=token_index, slot=int_array(f"{name}.slot", value.slot, min_rank=1))


def routing_arrays(name: str, value: Any) -> Routing:
    """A Routing of weights and ids of the same shape."""
    instance(name, value, Routing, "router(x)")
    weights, expert_ids = value
    weights = float32_array(f"{name}.weights", weights)
    expert_ids = int_array(f"{name}.expert_ids", expert_ids, min_rank=1)
    same_shape(f"{name}.weights", weights, expert_ids.shape)
    return Routing(weights, expert_ids)


def float32_array(name: str, value: Any) -> Array:
    """An f32 array."""
    values = array(name, value)
    if values.dtype != jnp.float32:
        raise TypeError(f"{name} must have dtype float32, got {values.dtype}{_cast(values)}")
    return values


def _cast(values: Array) -> str:
    """What to do about a float dtype that no op takes here."""
    return ": cast it with .astype(jnp.float32)" if jnp.issubdtype(values.dtype, jnp.floating) else ""


def int_array(name: str, value: Any, *, min_rank: int = 0) -> Array:
    """An array of any integer dtype; bool does not count as one."""
    values = array(name, value, min_rank=min_rank)
    if not jnp.issubdtype(values.dtype, jnp.integer):
        raise TypeError(f"{name} must have an integer dtype, got {values.dtype}")
    return values


def choices(name: str, expert_ids: Array) -> Any:
    """How many choices there are of all tokens: at least one a token, and as many as int32 numbers."""
    shape = expert_ids.shape
    if len(shape) < 2:
        raise ValueError(
            f"{name} must have shape [..., k], with an axis of tokens before that of their choices, got {shape}: give "
            "[N, 1] for N tokens of one choice, and [1, k] for one token"
        )
    if shape[-1] < 1:
        raise ValueError(f"{name} must have at least one choice a token, got shape {shape}")
    number = prod(shape)
    if isinstance(number, int) and number > MAX_SIZE:
        raise ValueError(
            f"{name} must have at most 2^31 - 1 = {MAX_SIZE} choices in all, which int32 numbers; got shape {shape}"
        )
    return number


def mask_array(name: str, value: Any, shape: Sequence[int]) -> Array:
    values = array(name, value)
    if values.dtype != jnp.bool_:
        raise TypeError(f"{name} must have dtype bool, got {values.dtype}")
    same_shape(name, values, shape)
    return values


def same_shape(name: str, array: Array, shape: Sequence[int]) -> None:
    if array.shape != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {array.shape}")


def selection_bias(name: str, value: Any, logits_shape: Sequence[int]) -> Array:
    """An f32 bias, one for all tokens `[E]` or one a token."""
    bias = float32_array(name, value)
    if bias.shape not in (tuple(logits_shape[-1:]), tuple(logits_shape)):
        raise ValueError(
            f"{name} must have shape {tuple(logits_shape[-1:])} (num_experts) or, one bias a token, "
            f"{tuple(logits_shape)}; got {bias.shape}"
        )
    return bias


def static_int(name: str, value: Any, low: int, high: int | None, meaning: str = "") -> int:
    """A Python integer in `[low, high]`, of which None means the largest size of an axis.

    A symbolic dimension of `jax.export` is one where its constraints say that it is in that range.
    """
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be an int, got {shown(value)}")
    is_symbolic = is_symbolic_dim(value)
    if not is_symbolic:
        try:
            value = operator.index(value)
        except Exception as error:
            raise TypeError(
                f"{name} must be a Python int (it decides shapes), got {shown(value)}{_static_under_jit(name, value)}"
            ) from error
    limits = f"at least {low}" if high is None else f"between {low} and {high}"
    try:
        # What is symbolic is the size of an axis, or is computed from one.
        inside = value >= low and (is_symbolic or value <= MAX_SIZE if high is None else value <= high)
    except InconclusiveDimensionOperation as error:
        raise ValueError(
            f"{name} must be {limits}{meaning}, got {value}, of which that is not known: say it in the constraints of "
            "jax.export.symbolic_shape"
        ) from error
    if inside:
        return value
    if high is None and value > MAX_SIZE:
        limits = f"at most 2^31 - 1 = {MAX_SIZE}"
    raise ValueError(f"{name} must be {limits}{meaning}, got {value}")


def concrete_int(name: str, value: Any, low: int) -> int:
    """A Python integer of at least `low`, which no size decides."""
    if is_symbolic_dim(value):
        raise TypeError(f"{name} must be an int, got the symbolic dimension {value}")
    return static_int(name, value, low, None)


def static_float(name: str, value: Any) -> float:
    """A Python number that f32 can hold."""
    try:
        if isinstance(value, (bool, np.bool_, str, bytes)):
            raise TypeError
        number = float(value)
    except Exception as error:
        raise TypeError(
            f"{name} must be a Python number, got {shown(value)}{_static_under_jit(name, value)}"
        ) from error
    if not np.isfinite(number):
        raise ValueError(f"{name} must be finite, got {number}")
    if not (number == 0 or _TINY <= abs(number) <= _LARGEST):
        raise ValueError(f"{name} must be 0 or in the range of float32, {_TINY:.1e} to {_LARGEST:.1e}, got {number}")
    return number


def not_negative(name: str, value: Any) -> float:
    number = static_float(name, value)
    if number < 0:
        raise ValueError(f"{name} must be 0 or more, got {number}")
    return number


_TINY, _LARGEST = (float(limit) for limit in (np.finfo(np.float32).tiny, np.finfo(np.float32).max))


def shown(value: Any) -> str:
    """What an option is instead; of an array its type alone, since it may be large, and on a device."""
    if isinstance(value, (np.ndarray, Array)) and value.ndim > 0:
        return f"an array of shape {value.shape} and dtype {value.dtype}"
    return repr(value)


def _static_under_jit(name: str, value: Any) -> str:
    """What to do about a value that jax.jit traces."""
    return (
        f": name it in static_argnames of jax.jit, static_argnames=({name!r},)"
        if isinstance(value, jax.core.Tracer)
        else ""
    )


def static_bool(name: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, got {shown(value)}{_static_under_jit(name, value)}")
    return bool(value)


def precision(value: Any) -> Any:
    """What `jax.lax.dot_general` takes as its precision, made hashable."""
    value = tuple(value) if isinstance(value, list) else value
    if value is not None:
        one = jax.ShapeDtypeStruct((1, 1), jnp.float32)
        try:
            jax.eval_shape(partial(lax.dot, precision=value), one, one)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"precision must be None or what jax.lax.dot_general takes, 'highest' for example; got {shown(value)}"
            ) from error
    return value


def instance(name: str, value: Any, kinds: type | tuple[type, ...], example: str) -> None:
    if not isinstance(value, kinds):
        wanted = " or ".join(kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
        raise TypeError(f"{name} must be of type {wanted}, {example} for example, got {shown(value)}")


def function(name: str, value: Any, example: str) -> None:
    if not callable(value):
        raise TypeError(f"{name} must be a function, {example} for example, got {shown(value)}")


def key(name: str, value: Any) -> Any:
    """A key of `jax.random`, traced or not."""
    try:
        jax.eval_shape(jax.random.bits, value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be a key, jax.random.key(0) for example, got {shown(value)}") from error
    return value


def axis_names(name: str, value: Any) -> str | tuple[str, ...]:
    """One mesh axis or several, hashable."""
    if isinstance(value, str):
        return value
    if not isinstance(value, Sequence) or not all(isinstance(axis, str) for axis in value):
        raise TypeError(f"{name} must be a mesh axis or a sequence of them, strings, got {shown(value)}")
    return tuple(value)


def float_dtype(name: str, value: Any) -> np.dtype[Any]:
    """The dtype float32, bfloat16 or float16, however it is written."""
    try:
        dtype = jnp.dtype(value)
    except TypeError:
        dtype = None
    if value is None or dtype not in FLOATS:
        raise TypeError(f"{name} must be one of jnp.float32, jnp.bfloat16 and jnp.float16, got {shown(value)}")
    return dtype


def choice(name: str, value: Any, choices: Sequence[str]) -> str:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {shown(value)}")
    return value


def implementation(value: Any) -> str:
    return choice("implementation", value, get_args(Implementation))


def scoring(score_fn: Any, renormalize: Any, scale: Any, eps: Any) -> Scoring:
    """A Scoring of checked options."""
    return Scoring(
        score_fn=choice("score_fn", score_fn, get_args(ScoreFn)),
        renormalize=static_bool("renormalize", renormalize),
        scale=static_float("scale", scale),
        eps=not_negative("eps", eps),
    )


def selection(
    num_experts: int, *, top_k: Any, num_groups: Any, top_groups: Any, group_score: Any, **scoring_options: Any
) -> Selection:
    """A Selection among `num_experts`, of checked options."""
    num_groups = static_int("num_groups", num_groups, 1, num_experts, " (num_experts)")
    if num_experts % num_groups:
        raise ValueError(f"num_groups must divide num_experts = {num_experts}, got {num_groups}")
    if top_groups is None:
        if num_groups > 1:
            raise ValueError(
                f"top_groups (how many groups stay eligible) must be given with num_groups = {num_groups}, between 1 "
                f"and {num_groups}; got None"
            )
        top_groups = 1
    top_groups = static_int("top_groups", top_groups, 1, num_groups, " (num_groups)")
    group_score = choice("group_score", group_score, get_args(GroupScore))
    experts_a_group = num_experts // num_groups
    if num_groups > 1 and group_score == "top2_sum" and experts_a_group < 2:
        raise ValueError(
            f"group_score='top2_sum' needs at least 2 experts a group, got num_experts = {num_experts} in num_groups = "
            f"{num_groups}; use group_score='max'"
        )
    eligible = top_groups * experts_a_group
    where = f" (the experts of {top_groups} of {num_groups} groups)" if num_groups > 1 else " (num_experts)"
    return Selection(
        scoring=scoring(**scoring_options),
        top_k=static_int("top_k", top_k, 1, eligible, where),
        num_groups=num_groups,
        top_groups=top_groups,
        group_score=group_score,
    )
