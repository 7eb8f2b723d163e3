"""The selection once more, in numpy and float64: what `bench` and the tests hold kernels against.

Selections are by an exact total order on bits. A kernel may differ from it only where float32 rounding can.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def f64(x: Any) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # of signalling NaNs
        return np.asarray(x).astype(np.float64)


def order_keys(x: Any) -> np.ndarray:
    """uint64 keys in the order of jax.lax.top_k: -inf < ... < -0 < +0 < ... < +inf < any NaN."""
    bits = np.where(np.isnan(f64(x)), np.nan, f64(x)).view(np.uint64)
    top = np.uint64(1 << 63)
    return np.where(np.isnan(f64(x)), ~np.uint64(0), np.where(bits & top, ~bits, bits | top))


def top_k(x: Any, k: int) -> np.ndarray:
    """Indices of the k best, best first, equal keys to the lower index."""
    return np.argsort(~order_keys(x), axis=-1, kind="stable")[..., :k].astype(np.int32)


def scores(logits: Any, score_fn: str) -> np.ndarray:
    x = f64(logits)
    with np.errstate(all="ignore"):
        if score_fn == "sqrtsoftplus":
            return np.sqrt(np.logaddexp(0, x))
        if score_fn == "sigmoid":
            return np.exp(-np.logaddexp(0, -x))
        top = x.max(axis=-1, keepdims=True)
        exps = np.exp(x - np.where(top == -np.inf, 0, top))
        total = exps.sum(axis=-1, keepdims=True)
        return exps / np.where(total == 0, 1, total)


def selection_keys(logits: Any, bias: Any, score_fn: str, num_groups: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """What is selected by, and the slack of each key: about 8 units in the last place of what was added."""
    if bias is None and num_groups == 1:
        return f64(logits), np.zeros(np.shape(logits))
    s, b = scores(logits, score_fn), 0.0 if bias is None else f64(bias)
    with np.errstate(invalid="ignore"):  # of infinities that cancel
        keys = s + b
    finite = np.where(np.isfinite(keys), np.abs(s) + np.abs(b), 0)
    return keys, 1e-6 * finite + 2e-38  # kernels may flush denormal scores to zero


def group_scores(keys: np.ndarray, num_groups: int, group_score: str) -> np.ndarray:
    grouped = keys.reshape(*keys.shape[:-1], num_groups, -1)
    best = np.take_along_axis(grouped, top_k(grouped, 2 if group_score == "top2_sum" else 1), -1)
    with np.errstate(invalid="ignore"):
        return best.sum(-1)


def expert_ids(
    logits: Any,
    bias: Any,
    top_k_: int,
    score_fn: str,
    num_groups: int = 1,
    top_groups: int = 1,
    group_score: str = "top2_sum",
) -> np.ndarray:
    keys, _ = selection_keys(logits, bias, score_fn, num_groups)
    if num_groups == 1:
        return top_k(keys, top_k_)
    groups = top_k(group_scores(keys, num_groups, group_score), top_groups)
    eligible = (groups[..., None] == np.arange(num_groups)).any(-2)
    ordered = np.where(np.repeat(eligible, keys.shape[-1] // num_groups, -1), order_keys(keys), 0)
    return np.argsort(~ordered, axis=-1, kind="stable")[..., :top_k_].astype(np.int32)


def weights_at(logits: Any, ids: Any, score_fn: str, renormalize: bool, scale: float, eps: float = 1e-20) -> np.ndarray:
    """float64 weights at given ids; 0 where an id is outside."""
    logits, ids = f64(logits), np.asarray(ids).astype(np.int64)
    valid = (ids >= 0) & (ids < logits.shape[-1])
    at = np.where(valid, ids, 0)
    if score_fn == "softmax" and renormalize:
        chosen = np.where(valid, np.take_along_axis(logits, at, -1), -np.inf)
        return scale * np.where(valid, scores(chosen, "softmax"), 0)
    chosen = np.where(valid, np.take_along_axis(scores(logits, score_fn), at, -1), 0)
    with np.errstate(invalid="ignore"):
        if renormalize:
            total = chosen.sum(-1, keepdims=True)
            chosen = chosen / np.where(total == 0, 1, total + eps)
        return np.where(valid, scale * chosen, 0)
