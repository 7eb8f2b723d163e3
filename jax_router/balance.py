"""Balance of the experts' load: the losses, the rules for the selection bias, and what to watch.

Every function takes what a router layer has: the router's logits `[..., E]`, ids `[..., k]`, a mask `[...]`. Counts are
sums of integers over the axes that split tokens, never means; a masked token enters nothing, whatever its row holds;
gradients flow through the probabilities alone.

On several devices:

- Under `jit` over sharded arrays nothing needs to be named: sums and counts are those of all tokens.
- Inside `shard_map`, `axis_name` names the mesh axes that split tokens. Counts and numbers of tokens are summed over
  them before anything is multiplied, which is the *global batch* form of a loss (arXiv 2501.11873); the probabilities
  stay a device's own. The mean of what the devices return, `jax.lax.pmean`, is then the loss of the whole batch, also
  where devices have different numbers of valid tokens, and so are the means of its gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import Array, lax

from . import _check, reference
from ._expert_counts import expert_counts
from ._shapes import numbers, with_rank
from ._sharding import align, shard_as, whole
from ._types import ScoreFn, exportable

AxisName = str | Sequence[str] | None

_EPSILON = 1e-20
_SCORE_FNS = {"softmax": reference.softmax, "sigmoid": reference.sigmoid, "sqrtsoftplus": reference.sqrtsoftplus}


@exportable
class LoadStatistics(NamedTuple):
    """How the load lies on the experts.

    Attributes:
        max_violation: f32, `max(c) / mean(c) - 1`; 0 is balanced (arXiv 2408.15664).
        coefficient_of_variation: f32, the standard deviation over the mean.
        entropy: f32, of `c / sum(c)`, over that of an even load: 1 is balanced, 0 is one expert for all.
        dead_experts: int32, how many experts have no token.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax_router.balance import load_statistics
        >>> load_statistics(jnp.array([2, 2, 0, 0])).dead_experts
        Array(2, dtype=int32)
    """

    max_violation: Array
    coefficient_of_variation: Array
    entropy: Array
    dead_experts: Array


def load_balancing_loss(
    logits: Array,
    expert_ids: Array,
    *,
    score_fn: ScoreFn = "softmax",
    token_mask: Array | None = None,
    axis_name: AxisName = None,
) -> Array:
    """The auxiliary loss of the Switch Transformer for k choices: 1 for an even load, up to E.

    `E * sum_e f_e P_e`, with `f_e = c_e / (k T)` how often the T valid tokens chose expert e, and `P_e` the mean of its
    probability. Probabilities are `softmax(logits)`, for the other score functions `s / (sum(s) + 1e-20)`.

    Args:
        logits: f32, bf16 or f16 `[..., E]`.
        expert_ids: integers `[..., k]`; ids outside `[0, E)` count nowhere.
        score_fn: `"softmax"`, `"sigmoid"` or `"sqrtsoftplus"`, the router's.
        token_mask: bool `[...]`; False: the token enters nothing.
        axis_name: mesh axes of the surrounding `shard_map` that split tokens, for the loss of the global batch: see the
            module.

    Returns:
        f32 scalar; 0 where no token is valid.

    Raises:
        TypeError, ValueError: a wrong dtype, shape or option.

    Source: Switch Transformer, arXiv 2101.03961; its global batch form: arXiv 2501.11873.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax_router.balance import load_balancing_loss
        >>> logits, expert_ids = jnp.zeros((4, 2)), jnp.array([[0], [1], [0], [1]])
        >>> load_balancing_loss(logits, expert_ids)
        Array(1., dtype=float32)
    """
    logits, token_mask = _checked("logits", logits, token_mask)
    expert_ids = _checked_ids(expert_ids, logits)
    counts = expert_counts(expert_ids, logits.shape[-1], token_mask=token_mask, axis_name=axis_name)
    probabilities = _probabilities(logits, token_mask, score_fn).sum(axis=tuple(range(logits.ndim - 1)))
    tokens = _number_of_tokens(logits, token_mask, axis_name)
    return _products(counts, probabilities, tokens, expert_ids.shape[-1], axis_name)


def sequence_balance_loss(
    logits: Array,
    expert_ids: Array,
    *,
    score_fn: ScoreFn = "softmax",
    token_mask: Array | None = None,
    axis_name: AxisName = None,
) -> Array:
    """The auxiliary loss of each sequence by itself, mean over sequences: DeepSeek-V3's complement of its bias rule.

    Of a sequence of S valid tokens: `sum_e E / (k S) c_e * mean_t p_te`, with probabilities as in
    `load_balancing_loss`. Sequences without a valid token do not enter the mean.

    Args:
        logits: f32, bf16 or f16 `[..., S, E]`: the last axis but one is that of a sequence.
        expert_ids: integers `[..., S, k]`.
        score_fn: `"softmax"`, `"sigmoid"` or `"sqrtsoftplus"`.
        token_mask: bool `[..., S]`.
        axis_name: mesh axes of the surrounding `shard_map` that split *sequences* (context parallelism), every device
            having a part of each. Axes that split the batch need no name: take the mean over them.

    Returns:
        f32 scalar; 0 where no token is valid.

    Raises:
        TypeError, ValueError: a wrong dtype, shape or option.

    Source: DeepSeek-V3, arXiv 2412.19437, equations 17 to 20.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax_router.balance import sequence_balance_loss
        >>> logits = jnp.zeros((2, 4, 2))  # two sequences of four tokens, two experts
        >>> expert_ids = jnp.array([[[0], [1], [0], [1]], [[1], [0], [1], [0]]])
        >>> sequence_balance_loss(logits, expert_ids)
        Array(1., dtype=float32)
    """
    logits, token_mask = _checked("logits", logits, token_mask)
    expert_ids = _checked_ids(expert_ids, logits)

    def count(ids: Array, mask: Array | None) -> Array:
        return expert_counts(ids, logits.shape[-1], token_mask=mask, axis_name=axis_name)

    for _ in range(logits.ndim - 2):
        count = jax.vmap(count, in_axes=(0, None if token_mask is None else 0))
    counts = count(expert_ids, None) if token_mask is None else count(*align([expert_ids, token_mask], [1, 0]))
    probabilities = _probabilities(logits, token_mask, score_fn).sum(axis=-2)
    tokens = _number_of_tokens(logits, token_mask, axis_name, axis=-1)
    losses = _products(counts, probabilities, tokens, expert_ids.shape[-1], axis_name)
    return losses.sum() / jnp.maximum((tokens > 0).sum(dtype=jnp.int32), 1).astype(jnp.float32)


def z_loss(logits: Array, *, token_mask: Array | None = None, axis_name: AxisName = None) -> Array:
    """`mean_t logsumexp(logits_t)^2` over valid tokens: keeps logits small.

    Args:
        logits: f32, bf16 or f16 `[..., E]`.
        token_mask: bool `[...]`; False: the token enters nothing.
        axis_name: as in `load_balancing_loss`.

    Returns:
        f32 scalar; 0 where no token is valid.

    Raises:
        TypeError, ValueError: a wrong dtype or shape.

    Source: ST-MoE, arXiv 2202.08906.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax_router.balance import z_loss
        >>> z_loss(jnp.zeros((3, 1)))
        Array(0., dtype=float32)
    """
    logits, token_mask = _checked("logits", logits, token_mask)
    squares = jax.nn.logsumexp(_clean(logits, token_mask), axis=-1) ** 2
    if token_mask is not None:
        squares = jnp.where(token_mask, squares, 0.0)
    tokens = _number_of_tokens(logits, token_mask, axis_name)
    return _share(squares.sum(), tokens, axis_name)


def update_expert_bias(bias: Array, counts: Array, *, rate: float | Array = 1e-3, centred: bool = False) -> Array:
    """The selection bias after a step of the rule that balances without a loss: up for experts below the mean load.

    `b + d` with `d = rate * sign(mean(c) - c)`; centred, `b + d - mean(d)`. The sign is exact, in integers: equal
    counts give equal biases on all replicas. Once per optimizer step, with the counts of all its tokens: of all
    devices (`expert_counts` with `axis_name`, or under sharded `jit`) and of all accumulation steps.

    Args:
        bias: f32 `[..., E]`, of one layer or of a stack of them.
        counts: int32 `[..., E]`, at most 2^31 - 1 in all for a layer.
        rate: by how much a bias moves; a number, or an array `[]`, of a schedule say.
        centred: keeps the mean of the bias.

    Returns:
        f32 `[..., E]`.

    Raises:
        TypeError, ValueError: a wrong dtype or shape.

    Source: arXiv 2408.15664; centred: torchtitan, pull request 1506.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax_router.balance import update_expert_bias
        >>> update_expert_bias(jnp.zeros(3), jnp.array([5, 3, 1]), rate=0.5)
        Array([-0.5,  0. ,  0.5], dtype=float32)
    """
    bias = _check.float32_array("bias", bias)
    counts = _counts(counts)
    _check.same_shape("counts", counts, bias.shape)
    total, experts = counts.sum(axis=-1, keepdims=True, dtype=jnp.int32), counts.shape[-1]
    quotient, remainder = total // experts, total % experts  # the mean is quotient + remainder / experts
    below = (counts < quotient) | ((counts == quotient) & (remainder > 0))
    step = _rate(rate) * (below.astype(jnp.float32) - (counts > quotient).astype(jnp.float32))
    return bias + (step - step.mean(axis=-1, keepdims=True) if _check.static_bool("centred", centred) else step)


def quantile_bias(
    scores: Array,
    bias: Array,
    *,
    top_k: int,
    token_mask: Array | None = None,
    axis_name: AxisName = None,
    bins: int | None = 1000,
) -> Array:
    """The selection bias that balances these tokens in one step, by quantiles.

    With `a_t` the (k+1)-th largest of `s_t + b`, what an expert must exceed to be chosen: `b_e` becomes the quantile
    over tokens, at k / E, of `a_t - s_te`, so that k of E tokens choose e; then the mean is subtracted. With `bins` the
    quantile is that of a histogram over `[min(b) - 1, max(b) + 1]`, where these differences lie for scores between 0
    and 1 (others count in the outer bins), interpolated linearly; histograms are integers, which are summed over
    devices. Without, it is exact, `jnp.quantile` of the valid tokens.

    A NaN counts as +inf, as in a selection. An infinite difference is an end of that range, with and without bins, and
    0 where score and a_t are the same infinity: so a finite bias stays finite, whatever the scores hold.

    Args:
        scores: f32, bf16 or f16 `[..., E]`: `score_fn(logits)`, without the bias.
        bias: f32 `[E]`.
        top_k: choices a token, below E.
        token_mask: bool `[...]`; False: the token enters nothing.
        axis_name: mesh axes of the surrounding `shard_map` to sum histograms over.
        bins: of the histogram, or None for the exact quantile of the tokens that are given.

    Returns:
        f32 `[E]`, no gradient; the bias as it is where no token is valid.

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape or number, or axis_name without bins.

    Source: Kimi-K3 report, arXiv 2607.24653, 2.3.3.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax_router.balance import quantile_bias
        >>> scores = jnp.array([[0.9, 0.8], [0.9, 0.7], [0.9, 0.4], [0.9, 0.1]])  # all tokens prefer the first expert
        >>> bias = quantile_bias(scores, jnp.zeros(2), top_k=1, bins=None)
        >>> (scores + bias).argmax(axis=-1)
        Array([1, 1, 0, 0], dtype=int32)
    """
    bias = lax.stop_gradient(_check.float32_array("bias", bias))
    scores, token_mask = _checked("scores", scores, token_mask)
    experts = scores.shape[-1]
    if experts < 2:
        raise ValueError(f"scores must have at least two experts, of which one is not chosen, got shape {scores.shape}")
    _check.same_shape("bias", bias, (experts,))
    scores, bias = align([scores, bias], [1, 1])  # a selection needs all scores of a token
    top_k = _check.static_int("top_k", top_k, 1, experts - 1, " (num_experts - 1)")
    if bins is not None:
        bins = _check.static_int("bins", bins, 1, _check.MAX_SIZE // experts)
    elif axis_name is not None:
        raise ValueError(f"bins must be given with axis_name = {axis_name!r}: exact quantiles are those of one device")
    scores = lax.stop_gradient(_clean(scores, token_mask))
    scores = jnp.where(jnp.isnan(scores), jnp.inf, scores)
    needed = lax.top_k(scores + with_rank(bias, scores.ndim), top_k + 1)[0][..., -1:]
    low, high = bias.min() - 1, bias.max() + 1
    differences = jnp.nan_to_num(needed - scores, nan=0.0, posinf=high, neginf=low)
    tokens = _number_of_tokens(scores, token_mask, axis_name)
    if bins is None:
        new = _exact_quantile(differences, token_mask, tokens, top_k / experts)
    else:
        new = _histogram_quantile(differences, token_mask, tokens, top_k / experts, low, high, bins, axis_name)
    return jnp.where(tokens > 0, new - new.mean(), bias)


def load_statistics(counts: Array) -> LoadStatistics:
    """What to watch of the load: see `LoadStatistics`.

    Args:
        counts: int32 `[..., E]`, of `expert_counts`, at most 2^31 - 1 in all for a layer.

    Returns:
        LoadStatistics of arrays `[...]`. Without any choice max_violation, coefficient_of_variation and entropy are 0.

    Raises:
        TypeError, ValueError: a wrong dtype or shape.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax_router.balance import load_statistics
        >>> load_statistics(jnp.array([2, 2, 0, 0])).max_violation
        Array(1., dtype=float32)
    """
    counts = _counts(counts)
    experts = counts.shape[-1]
    total = counts.sum(axis=-1, keepdims=True, dtype=jnp.int32)
    share = counts.astype(jnp.float32) / jnp.maximum(total, 1).astype(jnp.float32)
    load = share * experts
    any_choice = total[..., 0] > 0
    # Of one expert the load is always even.
    entropy = (
        -jax.scipy.special.xlogy(share, share).sum(axis=-1) / jnp.log(jnp.float32(experts)) if experts > 1 else 1.0
    )
    return LoadStatistics(
        jnp.where(any_choice, load.max(axis=-1) - 1, 0.0),
        jnp.where(any_choice, jnp.sqrt(((load - 1) ** 2).mean(axis=-1)), 0.0),
        jnp.where(any_choice, entropy, 0.0),
        (counts == 0).sum(axis=-1, dtype=jnp.int32),
    )


def _checked(name: str, logits: Any, token_mask: Any | None) -> tuple[Array, Array | None]:
    """Logits in f32, and the mask."""
    logits = _check.float_array(name, logits, min_rank=2)
    if logits.shape[-1] < 1:
        raise ValueError(f"{name} must have at least one expert, got shape {logits.shape}")
    if token_mask is not None:
        token_mask = shard_as(logits, _check.mask_array("token_mask", token_mask, logits.shape[:-1]))
    return logits.astype(jnp.float32), token_mask


def _checked_ids(expert_ids: Any, logits: Array) -> Array:
    expert_ids = _check.int_array("expert_ids", expert_ids, min_rank=2)
    _check.same_shape("expert_ids", expert_ids, (*logits.shape[:-1], expert_ids.shape[-1]))
    return expert_ids


def _rate(rate: Any) -> Array:
    """A number, or a traced one, of a schedule."""
    if isinstance(rate, Array):
        _check.same_shape("rate", rate, ())
        if not jnp.issubdtype(rate.dtype, jnp.floating):
            raise TypeError(f"rate must have a float dtype, got {rate.dtype}")
        return rate.astype(jnp.float32)  # from float64 too, where that is enabled
    return jnp.float32(_check.static_float("rate", rate))


def _counts(counts: Any) -> Array:
    counts = _check.int_array("counts", counts, min_rank=1)
    if counts.shape[-1] < 1:
        raise ValueError(f"counts must have at least one expert, got shape {counts.shape}")
    return counts.astype(jnp.int32)


def _clean(logits: Array, token_mask: Array | None) -> Array:
    """Nothing that a masked row holds reaches a sum or a gradient."""
    return logits if token_mask is None else jnp.where(token_mask[..., None], logits, 0.0)


def _probabilities(logits: Array, token_mask: Array | None, score_fn: str) -> Array:
    """f32 `[..., E]`, rows of 0 for masked tokens."""
    scores = _SCORE_FNS[_check.choice("score_fn", score_fn, get_args(ScoreFn))](_clean(logits, token_mask))
    if score_fn != "softmax":
        scores = scores / (scores.sum(axis=-1, keepdims=True) + jnp.float32(_EPSILON))
    return scores if token_mask is None else jnp.where(token_mask[..., None], scores, 0.0)


def _number_of_tokens(logits: Array, token_mask: Array | None, axis_name: AxisName, axis: int | None = None) -> Array:
    """int32, of valid tokens on all devices; along one of their axes, or of all."""
    # Not of a column of the logits, which an Explicit mesh may have split over the experts.
    valid = shard_as(logits, jnp.ones(logits.shape[:-1], jnp.bool_)) if token_mask is None else token_mask
    number = valid.sum(axis=axis, dtype=jnp.int32)
    return number if axis_name is None else lax.psum(number, _check.axis_names("axis_name", axis_name))


def _share(sums: Array, tokens: Array, axis_name: AxisName) -> Array:
    """A device's sums over the mean number of tokens of a device: the mean over devices is that over all tokens."""
    devices = 1 if axis_name is None else lax.psum(1, axis_name)
    return sums * jnp.float32(devices) / jnp.maximum(tokens, 1).astype(jnp.float32)


def _products(counts: Array, probabilities: Array, tokens: Array, k: int, axis_name: AxisName) -> Array:
    """`E * sum_e f_e P_e`, from counts of all tokens and sums of this device's probabilities."""
    tokens = tokens[..., None]
    f = counts.astype(jnp.float32) / (jnp.maximum(tokens, 1).astype(jnp.float32) * k)
    return counts.shape[-1] * (f * _share(probabilities, tokens, axis_name)).sum(axis=-1)


def _exact_quantile(values: Array, token_mask: Array | None, tokens: Array, q: float) -> Array:
    """As `jnp.quantile` of the valid rows of `[..., E]`."""
    if token_mask is not None:
        values = jnp.where(token_mask[..., None], values, jnp.inf)  # go last
    ordered = jnp.sort(whole(values).reshape(-1, values.shape[-1]), axis=0)
    place = (jnp.maximum(tokens, 1) - 1).astype(jnp.float32) * jnp.float32(q)
    low = jnp.floor(place).astype(jnp.int32)
    high = jnp.minimum(low + 1, jnp.maximum(tokens, 1) - 1)
    part = place - low.astype(jnp.float32)
    return ordered[low] * (1 - part) + ordered[high] * part


def _histogram_quantile(
    values: Array,
    token_mask: Array | None,
    tokens: Array,
    q: float,
    low: Array,
    high: Array,
    bins: int,
    axis_name: AxisName,
) -> Array:
    experts = values.shape[-1]
    width = (high - low) / bins
    place = jnp.clip(jnp.floor((values - low) / width), 0, bins - 1).astype(jnp.int32)
    cells = numbers(experts, values.ndim) * bins + place  # of each expert's histogram
    histogram = expert_counts(cells, experts * bins, token_mask=token_mask, axis_name=axis_name).reshape(experts, bins)
    until = jnp.cumsum(histogram, axis=-1, dtype=jnp.int32)
    wanted = jnp.float32(q) * tokens.astype(jnp.float32)
    found = jnp.argmax(until.astype(jnp.float32) >= wanted, axis=-1).astype(jnp.int32)[:, None]
    inside = jnp.take_along_axis(histogram, found, axis=-1).astype(jnp.float32)
    before = jnp.take_along_axis(until, found, axis=-1).astype(jnp.float32) - inside
    return (low + width * (found.astype(jnp.float32) + (wanted - before) / jnp.maximum(inside, 1)))[:, 0]
