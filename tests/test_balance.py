"""The losses, rules and statistics of `jax_router.balance` against numpy and float64, and on several devices."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_router import activation_topk, balance
from oracle import counts, f64, scores

E, K = 8, 2
SCORE_FNS = ["softmax", "sigmoid", "sqrtsoftplus"]


def probabilities(logits, score_fn):
    s = scores(f64(logits), score_fn)
    return s if score_fn == "softmax" else s / (s.sum(-1, keepdims=True) + 1e-20)


def load_balancing_loss(logits, ids, score_fn, mask):
    logits, ids = logits[mask], ids[mask]
    if not len(logits):
        return 0.0
    f = f64(counts(ids, E)) / ids.size
    return E * (f * probabilities(logits, score_fn).mean(0)).sum()


def sequence_balance_loss(logits, ids, score_fn, mask):
    losses = [load_balancing_loss(*one, score_fn, valid) for *one, valid in zip(logits, ids, mask) if valid.any()]
    return np.mean(losses) if losses else 0.0


def z_loss(logits, mask):
    logits = f64(logits[mask])
    return (np.log(np.exp(logits).sum(-1)) ** 2).mean() if len(logits) else 0.0


def draw(rng, shape=(4, 16), load="random"):
    logits = rng.normal(0, 1, (*shape, E)).astype(np.float32)
    mask = rng.random(shape) < 0.7
    if load == "one expert":
        logits[..., 3] += 20
    if load == "no valid token":
        mask[:] = False
    if load == "one token":
        mask[:] = False
        mask.flat[5] = True
    ids = np.array(activation_topk(logits, top_k=K, score_fn="softmax", token_mask=mask).expert_ids)
    if load == "one expert":
        ids[mask] = 3
    return logits, ids, mask


LOADS = ["random", "one expert", "no valid token", "one token"]
over_losses = pytest.mark.parametrize("name", ["load_balancing_loss", "sequence_balance_loss", "z_loss"])


def loss_of(name, logits, ids, mask, score_fn="softmax", **options):
    if name == "z_loss":
        return balance.z_loss(logits, token_mask=mask, **options)
    return getattr(balance, name)(logits, ids, score_fn=score_fn, token_mask=mask, **options)


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("score_fn", SCORE_FNS)
def test_losses(score_fn, load, rng):
    """Values, with masked rows that hold NaN, and gradients against finite differences; none at masked rows."""
    logits, ids, mask = draw(rng, load=load)
    poisoned = np.where(mask[..., None], logits, np.nan)
    oracles = {
        "load_balancing_loss": lambda logits: load_balancing_loss(logits, ids, score_fn, mask),
        "sequence_balance_loss": lambda logits: sequence_balance_loss(logits, ids, score_fn, mask),
        "z_loss": lambda logits: z_loss(logits, mask),
    }
    for name, oracle in oracles.items():
        loss, gradient = jax.jit(
            jax.value_and_grad(lambda logits, name=name: loss_of(name, logits, ids, mask, score_fn))
        )(poisoned)
        np.testing.assert_allclose(loss, oracle(f64(logits)), rtol=1e-5)
        np.testing.assert_array_equal(gradient[~mask], 0)
        for _ in range(3):
            step = 1e-4 * rng.normal(0, 1, logits.shape)
            want = (oracle(f64(logits) + step) - oracle(f64(logits) - step)) / 2
            np.testing.assert_allclose((f64(gradient) * step).sum(), want, rtol=1e-3, atol=1e-9)


def test_without_a_mask(rng):
    logits, ids, _ = draw(rng, load="random")
    ids = np.asarray(activation_topk(logits, top_k=K).expert_ids)
    everything = np.ones(logits.shape[:-1], bool)
    for name in ("load_balancing_loss", "sequence_balance_loss", "z_loss"):
        np.testing.assert_array_equal(
            loss_of(name, logits, ids, None, "softmax"), loss_of(name, logits, ids, everything, "softmax")
        )


def test_even_load_has_loss_one():
    ids = np.arange(E)[:, None]
    for logits in (np.zeros((E, E), np.float32), np.eye(E, dtype=np.float32) * 50):
        np.testing.assert_allclose(balance.load_balancing_loss(logits, ids), 1, rtol=1e-6)
    np.testing.assert_allclose(balance.load_balancing_loss(np.eye(E, dtype=np.float32)[:1] * 99, [[0]]), E, rtol=1e-6)


@over_losses
def test_vmap_and_scan(name, rng):
    problems = [draw(rng) for _ in range(3)]
    stacked = tuple(map(np.stack, zip(*problems)))
    gradient = jax.grad(partial(loss_of, name))
    want = [gradient(*problem) for problem in problems]
    np.testing.assert_allclose(jax.vmap(gradient)(*stacked), want, rtol=1e-5, atol=1e-8)
    scanned = jax.lax.scan(lambda carry, problem: (carry, gradient(*problem)), 0, stacked)[1]
    np.testing.assert_allclose(scanned, want, rtol=1e-5, atol=1e-8)


# Several devices


def place(mesh, values, spec):
    return [jax.device_put(value, NamedSharding(mesh, spec)) for value in values]


@pytest.mark.parametrize("mode", [AxisType.Auto, AxisType.Explicit], ids=["Auto", "Explicit"])
@over_losses
def test_losses_of_sharded_tokens(name, mode, rng, devices):
    """As on one device, and so are their gradients, which are sharded as the logits."""
    values = draw(rng, (16, 24))
    mesh = jax.make_mesh((len(devices),), ("d",), (mode,), devices=devices)
    loss = jax.jit(jax.value_and_grad(partial(loss_of, name)))
    want = loss(*values)
    for spec in (P("d"), P(None, "d")):
        with jax.set_mesh(mesh):
            got = loss(*place(mesh, values, spec))
        np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
        np.testing.assert_allclose(got[1], want[1], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("mode", [AxisType.Auto, AxisType.Explicit], ids=["Auto", "Explicit"])
@over_losses
def test_losses_of_sharded_experts(name, mode, masked, rng, devices):
    """The logits of a router whose weight is sharded over its experts."""
    logits, ids, mask = draw(rng, (4, 8))
    mesh = jax.make_mesh((2,), ("d",), (mode,), devices=devices[:2])
    loss = jax.jit(jax.value_and_grad(partial(loss_of, name, ids=ids, mask=mask if masked else None)))
    want = loss(logits)
    with jax.set_mesh(mesh):
        got = loss(*place(mesh, (logits,), P(None, None, "d")))
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-5, atol=1e-8)  # sums over experts in another order


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("check_vma", [True, False])
@over_losses
def test_global_batch_in_shard_map(name, check_vma, masked, rng, devices):
    """The mean over devices, which have different numbers of valid tokens, is the loss of the whole batch."""
    logits, ids, mask = draw(rng, (16, 32))
    mask[:, :4] = False
    mesh = jax.make_mesh((len(devices),), ("d",), (AxisType.Auto,), devices=devices)
    spec = P(None, "d")  # every device has a part of each sequence
    mask = mask if masked else None

    def own(*values):
        return jax.lax.pmean(loss_of(name, *values, axis_name="d"), "d")

    mapped = jax.shard_map(own, mesh=mesh, in_specs=(spec,) * 3, out_specs=P(), check_vma=check_vma)
    got = jax.jit(jax.value_and_grad(mapped))(logits, ids, mask)
    want = jax.value_and_grad(partial(loss_of, name))(logits, ids, mask)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-5, atol=1e-9)


# The rules for the bias


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("load", [[5, 3, 1, 3], [0, 0, 0, 0], [7, 0, 0, 0], [2, 2, 2, 3], [2**29, 2**29 + 1, 2**29, 1]])
def test_update_expert_bias(load, centred, rng):
    bias, load = rng.normal(0, 1, 4).astype(np.float32), np.array(load, np.int32)
    step = 1e-3 * np.sign(load.mean() - load)
    want = f64(bias) + step - (step.mean() if centred else 0)
    update = jax.jit(lambda rate: balance.update_expert_bias(bias, load, rate=rate, centred=centred))
    np.testing.assert_allclose(update(1e-3), want, rtol=1e-6, atol=1e-9)  # as a schedule has it
    stacked = balance.update_expert_bias(np.stack([bias] * 2), np.stack([load] * 2), centred=centred)
    np.testing.assert_allclose(stacked, [want] * 2, rtol=1e-6, atol=1e-9)


def test_rate_of_a_schedule_in_float64():
    """As a Python number is that jax.jit traces where 64 bits are enabled."""
    bias, load = jnp.zeros(2), jnp.array([1, 3])
    with jax.enable_x64(True):
        moved = jax.jit(lambda rate: balance.update_expert_bias(bias, load, rate=rate))(0.5)
    assert moved.dtype == jnp.float32
    np.testing.assert_array_equal(moved, [0.5, -0.5])


def test_the_rule_balances(rng):
    """A skewed router: the most loaded expert comes from far above to near the mean."""
    logits = (rng.normal(0, 1, (4096, E)) + np.linspace(0, 2, E)).astype(np.float32)

    @jax.jit
    def step(bias, _):
        ids = activation_topk(logits, bias, top_k=K, score_fn="sigmoid").expert_ids
        load = balance.expert_counts(ids, E)
        return balance.update_expert_bias(bias, load, rate=5e-3), balance.load_statistics(load).max_violation

    _, violation = jax.lax.scan(step, jnp.zeros(E), length=150)
    assert violation[0] > 0.8
    assert violation[-1] < 0.15


def quantile_bias(s, bias, mask):
    s, bias = f64(s[mask]), f64(bias)
    if not len(s):
        return bias
    needed = np.sort(s + bias, axis=-1)[:, -K - 1, None]
    new = np.quantile(needed - s, K / E, axis=0)
    return new - new.mean()


@pytest.mark.parametrize("load", LOADS)
def test_quantile_bias(load, rng):
    """Exact, and by histograms within the width of a bin or, of few tokens, the distance of two of them."""
    logits, _, mask = draw(rng, (64, 32), load)
    s, bias = np.array(jax.nn.sigmoid(logits)), rng.normal(0, 0.1, E).astype(np.float32)
    poisoned = np.where(mask[..., None], s, np.nan)
    want = quantile_bias(s, bias, mask)
    rule = partial(balance.quantile_bias, top_k=K)
    np.testing.assert_allclose(jax.jit(partial(rule, bins=None))(poisoned, bias, token_mask=mask), want, atol=1e-5)
    got = jax.jit(rule)(poisoned, bias, token_mask=mask)
    np.testing.assert_allclose(got, want, atol=1e-2)
    if load == "no valid token":
        np.testing.assert_array_equal(got, bias)


NOT_FINITE = {
    "an expert that no token may choose": (..., 2, -np.inf),
    "an expert of all tokens": (..., 2, np.inf),
    "fewer experts than choices": (3, slice(2, None), -np.inf),
    "more experts than choices": (3, slice(0, K + 2), np.inf),
    "a token without a score": (3, ..., -np.inf),
    "one NaN": (3, 2, np.nan),
    "a token of NaN": (3, ..., np.nan),
}


@pytest.mark.parametrize("bins", [1000, None])
@pytest.mark.parametrize("name", NOT_FINITE)
def test_quantile_bias_of_scores_that_are_not_finite(name, bins, rng):
    """As of differences at the ends of the range, or 0 between equal infinities."""
    token, expert, value = NOT_FINITE[name]
    s, bias = rng.random((2048, E)).astype(np.float32), rng.normal(0, 0.1, E).astype(np.float32)
    s[token, expert] = value
    ordered = np.where(np.isnan(s), np.inf, s)
    with np.errstate(invalid="ignore"):
        difference = np.sort(ordered + bias, axis=-1)[:, -K - 1, None] - ordered
    difference = np.nan_to_num(difference, nan=0, neginf=bias.min() - 1, posinf=bias.max() + 1)
    want = np.quantile(difference, K / E, axis=0)
    got = jax.jit(partial(balance.quantile_bias, top_k=K, bins=bins))(s, bias)
    np.testing.assert_allclose(got, want - want.mean(), atol=1e-5 if bins is None else 1e-2)


def test_quantile_bias_balances_in_one_step(rng):
    logits = (rng.normal(0, 1, (8192, E)) + np.linspace(0, 2, E)).astype(np.float32)
    s, bias = jax.nn.sigmoid(logits), jnp.zeros(E)
    for _ in range(4):
        bias = balance.quantile_bias(s, bias, top_k=K)
    ids = activation_topk(logits, bias, top_k=K, score_fn="sigmoid").expert_ids
    assert balance.load_statistics(balance.expert_counts(ids, E)).max_violation < 0.1


@pytest.mark.parametrize("mode", ["Auto", "Explicit", "shard_map"])
def test_rules_on_several_devices(mode, rng, devices):
    """Histograms and counts are integers: the same biases, bit for bit, as on one device."""
    logits, ids, mask = draw(rng, (16, 32))
    s, bias = np.array(jax.nn.sigmoid(logits)), rng.normal(0, 0.1, E).astype(np.float32)

    def rules(s, ids, mask, axis_name=None):
        load = balance.expert_counts(ids, E, token_mask=mask, axis_name=axis_name)
        return (
            balance.quantile_bias(s, jnp.asarray(bias), top_k=K, token_mask=mask, axis_name=axis_name),
            balance.update_expert_bias(jnp.asarray(bias), load, centred=True),
        )

    want = jax.jit(rules)(s, ids, mask)
    kind = AxisType.Explicit if mode == "Explicit" else AxisType.Auto
    mesh = jax.make_mesh((len(devices),), ("d",), (kind,), devices=devices)
    call = rules
    if mode == "shard_map":
        call = jax.shard_map(partial(rules, axis_name="d"), mesh=mesh, in_specs=(P("d"),) * 3, out_specs=P())
    with jax.set_mesh(mesh):
        got = jax.jit(call)(*place(mesh, (s, ids, mask), P("d")))
    for mine, other in zip(got, want, strict=True):
        np.testing.assert_array_equal(mine, other)


@pytest.mark.parametrize("bins", [1000, None])
@pytest.mark.parametrize(
    ("scores_spec", "bias_spec"), [(P("d"), P()), (P(None, None, "d"), P()), (P(), P("d")), (P("d"), P("d"))], ids=str
)
def test_quantile_bias_of_sharded_operands(scores_spec, bias_spec, bins, rng, devices):
    """In a mesh with Explicit axes, where JAX selects and sorts along whole axes alone."""
    logits, _, mask = draw(rng, (16, 32))
    s, bias = np.array(jax.nn.sigmoid(logits)), rng.normal(0, 0.1, E).astype(np.float32)
    rule = jax.jit(partial(balance.quantile_bias, top_k=K, bins=bins))
    want = rule(s, bias, token_mask=mask)
    mesh = jax.make_mesh((len(devices),), ("d",), (AxisType.Explicit,), devices=devices)
    with jax.set_mesh(mesh):
        (s,), (bias,) = place(mesh, (s,), scores_spec), place(mesh, (bias,), bias_spec)
        np.testing.assert_array_equal(rule(s, bias, token_mask=mask), want)


@pytest.mark.parametrize("sharded", [(0,), (0, 1), (1,), (2,)], ids=str)
@over_losses
def test_losses_of_operands_that_are_sharded_differently(name, sharded, rng, devices):
    """As where the mask is a constant."""
    values = draw(rng, (16, 24))
    loss = jax.jit(partial(loss_of, name))
    want = loss(*values)
    mesh = jax.make_mesh((len(devices),), ("d",), (AxisType.Explicit,), devices=devices)
    with jax.set_mesh(mesh):
        placed = place(mesh, values, P("d"))
        got = loss(*(placed[i] if i in sharded else value for i, value in enumerate(values)))
    np.testing.assert_allclose(got, want, rtol=1e-6)


# Statistics and errors


@pytest.mark.parametrize("load", [[5, 3, 1, 3], [4, 4, 4, 4], [9, 0, 0, 0], [0, 0, 0, 0]])
def test_load_statistics(load):
    load = np.array(load)
    got = balance.load_statistics(np.stack([load, load[::-1]]))
    share = load / max(load.sum(), 1)
    entropy = -(share[share > 0] * np.log(share[share > 0])).sum() / np.log(4)
    mean = load.mean() or 1
    want = [load.max() / mean - (load.sum() > 0), load.std() / mean, entropy, (load == 0).sum()]
    for leaf, value in zip(got, want, strict=True):
        np.testing.assert_allclose(leaf, [value] * 2, rtol=1e-6, atol=1e-6)
    assert got.dead_experts.dtype == jnp.int32


LOGITS, IDS = np.zeros((4, E), np.float32), np.zeros((4, K), np.int32)
COUNTS = np.zeros(E, np.int32)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: balance.load_balancing_loss(IDS, IDS), TypeError, "logits.*float32.*int32"),
        (lambda: balance.load_balancing_loss(LOGITS, IDS[:3]), ValueError, r"expert_ids.*\(4, 2\).*\(3, 2\)"),
        (lambda: balance.load_balancing_loss(LOGITS, LOGITS), TypeError, "expert_ids.*integer.*float32"),
        (lambda: balance.load_balancing_loss(LOGITS, IDS, score_fn="relu"), ValueError, "score_fn.*'relu'"),
        (lambda: balance.z_loss(LOGITS, token_mask=np.ones(4)), TypeError, "token_mask.*bool.*float"),
        (lambda: balance.update_expert_bias(LOGITS[0], IDS[0]), ValueError, r"counts.*\(8,\).*\(2,\)"),
        (lambda: balance.update_expert_bias(LOGITS[0], LOGITS[0]), TypeError, "counts.*integer.*float32"),
        (lambda: balance.load_statistics(np.zeros((3, 0), np.int32)), ValueError, r"counts.*expert.*\(3, 0\)"),
        (
            lambda: balance.update_expert_bias(LOGITS[0], COUNTS, rate=jnp.ones(8)),
            ValueError,
            r"rate.*\(\), got \(8,\)",
        ),
        (lambda: balance.update_expert_bias(LOGITS[0], COUNTS, rate=jnp.array(1)), TypeError, "rate.*float.*int32"),
        (lambda: balance.z_loss(LOGITS[:, :0]), ValueError, r"logits.*one expert, got shape \(4, 0\)"),
        (lambda: balance.quantile_bias(LOGITS, LOGITS[0], top_k=E), ValueError, "top_k.*1 and 7.*8"),
        (lambda: balance.quantile_bias(LOGITS, LOGITS[0], top_k=1, bins=0), ValueError, "bins.*0"),
        (
            lambda: balance.quantile_bias(LOGITS, LOGITS[0], top_k=1, bins=None, axis_name="d"),
            ValueError,
            "bins.*axis_name = 'd'",
        ),
        (lambda: balance.quantile_bias(LOGITS[:, :1], LOGITS[0, :1], top_k=1), ValueError, r"scores.*two.*\(4, 1\)"),
        (lambda: balance.load_statistics(LOGITS[0]), TypeError, "counts.*integer.*float32"),
        (lambda: balance.z_loss(LOGITS, axis_name=0), TypeError, "axis_name.*strings, got 0"),
        (lambda: balance.load_balancing_loss(LOGITS, IDS, axis_name=[0]), TypeError, r"axis_name.*strings, got \[0\]"),
    ],
)
def test_errors(call, error, words):
    with pytest.raises(error, match=words):
        call()
