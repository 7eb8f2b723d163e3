"""The contract once more, in numpy and float64, and how results are compared with it.

Selections are by an exact total order on bits. A kernel may differ from it only where float32 rounding can: the
comparisons take the `keys` that were selected by, and the `slack` within which two keys count as equal (0 where keys
are logits, which nobody rounds).
"""

import numpy as np

from jax_router._oracle import expert_ids, f64, selection_keys, top_k, weights_at
from jax_router._oracle import order_keys as order_keys
from jax_router._oracle import scores as scores


def select(scores, k, lengths=None, sorted=True):
    """topk_select: (values, indices)."""
    scores = np.asarray(scores)
    length = scores.shape[-1]
    ids = top_k(scores, length)
    if lengths is not None:
        # Keep the order of what lies within the length, and put `length` in place of the rest.
        inside = ids < np.clip(lengths, 0, length)[..., None]
        ids = np.take_along_axis(np.where(inside, ids, length), np.argsort(~inside, axis=-1, kind="stable"), -1)
    ids = ids[..., :k] if sorted else np.sort(ids[..., :k], axis=-1)
    values = np.take_along_axis(scores, np.minimum(ids, length - 1), -1)
    past = ids == length
    return np.where(past, np.array(-np.inf, scores.dtype), values), np.where(past, -1, ids).astype(np.int32)


def activation_topk(
    logits, bias=None, *, top_k, score_fn, renormalize=True, scale=1.0, eps=1e-20, token_mask=None, **groups
):
    """(weights, expert_ids)"""
    ids = expert_ids(logits, bias, top_k, score_fn, **groups)
    if token_mask is not None:
        ids = np.where(np.asarray(token_mask)[..., None], ids, -1)
    return weights_at(logits, ids, score_fn, renormalize, scale, eps), ids


def hash_router(token_ids, hash_lut, scale=1.0):
    """(weights, expert_ids)"""
    valid = ((token_ids >= 0) & (token_ids < len(hash_lut)))[..., None]
    ids = np.where(valid, hash_lut[np.where(valid[..., 0], token_ids, 0)], -1)
    weights = np.broadcast_to(np.where(valid, np.float32(scale / hash_lut.shape[-1]), np.float32(0)), ids.shape)
    return weights, ids


def counts(ids, num_experts, token_mask=None):
    """How often each expert was chosen."""
    ids = np.asarray(ids)
    if token_mask is not None:
        ids = ids[np.asarray(token_mask)]
    return np.array([np.count_nonzero(ids == expert) for expert in range(num_experts)], np.int32)


def dispatch(ids, num_experts, align=1, capacity=None):
    """(token_index, slot, group_sizes), an expert at a time."""
    ids = np.asarray(ids)
    flat = ids.reshape(-1).astype(np.int64)
    group = np.where((flat >= 0) & (flat < num_experts), flat, num_experts)
    counts = np.bincount(group, minlength=num_experts + 1)
    *chosen, _ = np.split(np.argsort(group, kind="stable"), np.cumsum(counts)[:-1])
    token_index = np.full(dispatch_slots(ids.size, num_experts, align, capacity), -1, np.int32)
    slot = np.full(ids.size, -1, np.int32)
    sizes = np.zeros(num_experts, np.int32)
    begin = 0
    for expert, choices in enumerate(chosen):
        choices = choices[:capacity]
        slot[choices] = begin + np.arange(len(choices))
        token_index[slot[choices]] = choices // ids.shape[-1]
        sizes[expert] = -(-len(choices) // align) * align
        begin += sizes[expert]
    return token_index, slot.reshape(ids.shape), sizes


def dispatch_slots(choices, num_experts, align=1, capacity=None):
    """The slots that the worst ids need: block by block, each opened in the cheapest way."""
    blocks, held = 0, 0
    while choices > 0 and (capacity is None or held < capacity):
        cost = align if held else 1  # choices that open one more block of a group
        opened = min(num_experts, choices // cost)
        if opened == 0:
            break
        if held and capacity is None:  # all that is left, at one price
            opened = choices // cost
        blocks += opened
        choices -= opened * cost
        held += align
    return blocks * align


def _flat(x):
    """float64, with one axis of tokens."""
    return f64(x).reshape(int(np.prod(np.shape(x)[:-1])), np.shape(x)[-1])


def _choices(dispatch):
    """(n, j, s) of the choices that have slots."""
    slot = _flat(dispatch.slot).astype(np.int64)
    n, j = np.nonzero((slot >= 0) & (slot < len(dispatch.token_index)))
    return n, j, slot[n, j]


def permute(x, dispatch, weights=None):
    n, j, s = _choices(dispatch)
    n, j, s = (index[dispatch.token_index[s] == n] for index in (n, j, s))
    rows = _flat(x)[n]
    if weights is not None:
        rows = _flat(weights)[n, j, None] * rows
    out = np.zeros((len(dispatch.token_index), rows.shape[-1]))
    out[s] = rows  # the last one where several choices are in a slot
    return out


def combine(y, dispatch, weights=None):
    n, j, s = _choices(dispatch)
    rows = f64(y)[s]
    if weights is not None:
        rows = _flat(weights)[n, j, None] * rows
    tokens = np.shape(dispatch.slot)[:-1]
    out = np.zeros((int(np.prod(tokens)), rows.shape[-1]))
    np.add.at(out, n, rows)
    return out.reshape(*tokens, rows.shape[-1])


def products(x, y, dispatch):
    """What the weights of either op get: the product of the row of its token and that of its slot for each choice."""
    n, j, s = _choices(dispatch)
    slot = np.asarray(dispatch.slot)
    out = np.zeros_like(_flat(slot))
    out[n, j] = (_flat(x)[n] * f64(y)[s]).sum(-1)
    return out.reshape(slot.shape)


def assert_rounded(got, want, slack=1e-6):
    """Rows against float64 ones: equal but for one rounding to their dtype, and that of f32 sums before it."""
    got = np.asarray(got)
    step = {4: 2.0**-23, 2: 2.0**-10 if got.dtype == np.float16 else 2.0**-7}[got.dtype.itemsize]
    size = np.abs(want)
    allowed = (step / 2 + slack) * size + slack * size.max(initial=1) + 1e-7
    np.testing.assert_array_less(np.abs(f64(got) - want), allowed)


def assert_same_ids(got, want, keys, slack=0.0):
    """Equal ids, but for those whose keys are within their slack of each other."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    assert got.dtype == want.dtype == np.int32
    differ = got != want
    if not differ.any():
        return
    assert np.array_equal(got[want < 0], want[want < 0]), "ids where there is no expert"
    assert ((got >= 0) == (want >= 0)).all(), "no id where there is an expert"
    assert got.max() < keys.shape[-1]
    sorted_ids = np.sort(got, axis=-1)
    assert ((np.diff(sorted_ids, axis=-1) > 0) | (sorted_ids[..., 1:] < 0)).all(), "an id twice in a row"
    slack = np.broadcast_to(slack, keys.shape)

    def at(values, ids):
        return np.take_along_axis(values, np.maximum(ids, 0).astype(np.int64), -1)[differ]

    with np.errstate(invalid="ignore"):
        distance = np.abs(at(keys, got) - at(keys, want))
    allowed = at(slack, got) + at(slack, want)
    close = (distance <= allowed) & (allowed > 0)
    assert close.all(), f"ids {got[differ][~close][:8]} where {want[differ][~close][:8]} have better keys"
    assert differ.mean() <= 0.02 or differ.sum() <= 2, f"{differ.sum()} of {differ.size} ids differ by rounding"


def assert_weights(got, want, rtol=3e-6, atol=2e-38):
    """f32 weights against float64 ones, NaN where and only where they are NaN."""
    assert np.asarray(got).dtype == np.float32
    np.testing.assert_allclose(f64(got), f64(want), rtol=rtol, atol=atol)


def assert_same_routing(got, want, keys, slack=0.0, rtol=3e-6, atol=2e-38):
    """(weights, expert_ids) against another pair: same ids, and the same weights in the rows whose ids are the same."""
    assert_same_ids(got[1], want[1], keys, slack)
    same = (np.asarray(got[1]) == np.asarray(want[1])).all(axis=-1)
    assert_weights(np.asarray(got[0])[same], np.asarray(want[0])[same], rtol, atol)


def assert_routes(got, logits, bias=None, *, token_mask=None, rtol=3e-6, **options):
    """(weights, expert_ids) of activation_topk against this file: the ids, and the weights at the ids it chose."""
    _, ids = activation_topk(logits, bias, token_mask=token_mask, **options)
    keys, slack = selection_keys(logits, bias, options["score_fn"], options.get("num_groups", 1))
    assert_same_ids(got[1], ids, keys, slack)
    scoring = {"renormalize": True, "scale": 1.0, "eps": 1e-20}
    scoring = {name: options.get(name, default) for name, default in scoring.items()}
    assert_weights(got[0], weights_at(logits, got[1], options["score_fn"], **scoring), rtol)
