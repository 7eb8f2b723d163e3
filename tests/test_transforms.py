"""The ops under every JAX transformation but differentiation: batching, control flow, export, what programs hold."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.experimental import checkify

import jax_router
from cases import draw
from jax_router import _ffi
from oracle import assert_same_routing, f64
from oracle import top_k as oracle_top_k


def assert_equal(got, want):
    for mine, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(mine, other)


# Batching: vmap is the stack of the calls it stands for.

OPS = {
    "activation_topk": lambda logits: jax_router.activation_topk(logits, top_k=3),
    "with bias": lambda logits, bias: jax_router.activation_topk(logits, bias, top_k=3, score_fn="sigmoid"),
    "with bias and mask": lambda logits, bias, mask: jax_router.activation_topk(
        logits, bias, top_k=3, token_mask=mask, num_groups=4, top_groups=2
    ),
    "with mask": lambda logits, mask: jax_router.activation_topk(logits, top_k=3, token_mask=mask),
    "route_at": jax_router.route_at,
    "hash_router": jax_router.hash_router,
    "topk_select": lambda logits: jax_router.topk_select(logits, 5),
    "topk_select lengths": lambda logits, lengths: jax_router.topk_select(logits, 5, lengths=lengths),
    "dense_router": lambda x, weight: jax_router.dense_router(x, weight, top_k=3),
    "dense_router biases": lambda x, weight, logit_bias, bias: jax_router.dense_router(
        x, weight, bias, logit_bias=logit_bias, top_k=3
    ),
    "expert_dispatch": lambda ids: jax_router.expert_dispatch(ids, 16),
}

# op: operands as (name, shape with its batch axis, in_axes)
B = 3
BATCHES = [
    ("activation_topk", [("logits", (B, 5, 16), 0)]),
    ("activation_topk", [("logits", (5, B, 16), 1)]),
    ("activation_topk", [("logits", (5, 16, B), -1)]),
    ("activation_topk", [("logits", (B, 16), 0)]),
    ("with bias", [("logits", (B, 5, 16), 0), ("bias", (16,), None)]),
    ("with bias", [("logits", (B, 5, 16), 0), ("bias", (B, 16), 0)]),
    ("with bias", [("logits", (5, 16), None), ("bias", (16, B), 1)]),
    ("with bias", [("logits", (5, 16), None), ("bias", (5, B, 16), 1)]),
    ("with bias", [("logits", (B, 16), 0), ("bias", (16,), None)]),
    ("with bias", [("logits", (B, 16), 0), ("bias", (B, 16), 0)]),
    ("with bias", [("logits", (B, 5, 16), 0), ("bias", (5, 16), None)]),
    ("with mask", [("logits", (5, 16), None), ("mask", (5, B), 1)]),
    ("with bias and mask", [("logits", (B, 5, 16), 0), ("bias", (B, 16), 0), ("mask", (5,), None)]),
    ("route_at", [("logits", (B, 5, 16), 0), ("ids", (5, 2), None)]),
    ("route_at", [("logits", (5, 16), None), ("ids", (5, 2, B), 2)]),
    ("hash_router", [("token_ids", (B, 5), 0), ("lut", (12, 2), None)]),
    ("hash_router", [("token_ids", (5,), None), ("lut", (12, B, 2), 1)]),
    ("hash_router", [("token_ids", (5, B), 1), ("lut", (B, 12, 2), 0)]),
    ("hash_router", [("token_ids", (B,), 0), ("lut", (12, 2), None)]),
    ("topk_select", [("logits", (5, 16, B), 2)]),
    ("topk_select lengths", [("logits", (5, 16), None), ("lengths", (B, 5), 0)]),
    ("topk_select lengths", [("logits", (B, 5, 16), 0), ("lengths", (5,), None)]),
    ("dense_router", [("x", (B, 5, 8), 0), ("weight", (16, 8), None)]),
    ("dense_router", [("x", (5, 8), None), ("weight", (16, B, 8), 1)]),
    ("dense_router", [("x", (5, B, 8), 1), ("weight", (B, 16, 8), 0)]),
    ("dense_router biases", [("x", (5, 8), None), ("weight", (16, 8), None), ("l", (B, 16), 0), ("bias", (16,), None)]),
    ("dense_router biases", [("x", (B, 5, 8), 0), ("weight", (16, 8), None), ("l", (16,), None), ("bias", (B, 16), 0)]),
    ("expert_dispatch", [("ids", (B, 5, 2), 0)]),
    ("expert_dispatch", [("ids", (5, 2, B), 2)]),
]


@pytest.mark.parametrize(
    ("op", "operands"), BATCHES, ids=[f"{op} {[axis for *_, axis in args]}" for op, args in BATCHES]
)
def test_vmap(op, operands, rng):
    values = [draw(rng, name, *shape) for name, shape, _ in operands]
    axes = [axis for *_, axis in operands]
    got = jax.jit(jax.vmap(OPS[op], in_axes=tuple(axes)))(*values)
    one = jax.jit(OPS[op])
    for i in range(B):
        want = one(*[value if axis is None else value.take(i, axis) for value, axis in zip(values, axes)])
        if op.startswith("dense_router"):  # a product of another shape sums in another order
            jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), [array[i] for array in got], list(want))
        else:
            assert_equal([array[i] for array in got], want)


@pytest.mark.parametrize("op", ["activation_topk", "hash_router", "expert_dispatch", "topk_select lengths"])
def test_nested_vmap(op, rng):
    operands = {
        "activation_topk": [(draw(rng, "logits", 2, 5, 3, 16), 0, 1)],
        "hash_router": [(draw(rng, "token_ids", 2, 5, 3), 0, 1), (draw(rng, "lut", 3, 12, 2), None, 0)],
        "expert_dispatch": [(draw(rng, "ids", 2, 5, 3, 2), 0, 1)],
        "topk_select lengths": [(draw(rng, "logits", 2, 5, 3, 16), 0, 1), (draw(rng, "lengths", 3, 5), None, 0)],
    }[op]
    values, outer, inner = zip(*operands)
    got = jax.jit(jax.vmap(jax.vmap(OPS[op], in_axes=inner), in_axes=outer))(*values)
    one = jax.jit(OPS[op])
    for i in range(2):
        for j in range(3):
            rows = [v if o is None else v.take(i, o) for v, o in zip(values, outer)]
            rows = [v if a is None else v.take(j, a) for v, a in zip(rows, inner)]
            assert_equal([array[i, j] for array in got], one(*rows))


# Control flow


def loss_of(implementation):
    def loss(x):
        weights, ids = jax_router.activation_topk(x, top_k=3, implementation=implementation)
        return (weights * jnp.cos(ids.astype(jnp.float32))).sum()

    return loss


def through_scan(f, x):
    return jax.lax.scan(lambda carry, row: (carry + f(row), None), jnp.float32(0), x)[0]


def through_remat(f, x):
    return jax.checkpoint(lambda x: jnp.sin(f(x)))(x)


def through_cond(f, x):
    return jax.lax.cond(x[0, 0, 0] > 1e9, lambda x: x.sum(), f, x)


def through_while(f, x):
    return jax.lax.fori_loop(0, 3, lambda i, total: total + f(x + i.astype(jnp.float32)), jnp.float32(0))


def through_remat_in_scan(f, x):
    return jax.lax.scan(jax.checkpoint(lambda carry, row: (carry + f(carry * row), None)), jnp.float32(1), x)[0]


FLOWS = [through_scan, through_remat, through_cond, through_while, through_remat_in_scan]


@pytest.mark.parametrize("flow", FLOWS)
def test_control_flow(flow, rng):
    x = draw(rng, "x", 4, 5, 16)
    native, plain = (jax.value_and_grad(partial(flow, loss_of(name))) for name in ("native", "reference"))
    got, want = jax.jit(native)(x), jax.jit(plain)(x)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-4, atol=1e-6)


def test_while_loop_with_a_routed_condition(rng):
    """The trip count depends on the ids."""

    def run(x, implementation):
        def largest(x):
            return jax_router.activation_topk(x, top_k=1, implementation=implementation).expert_ids.max()

        return jax.lax.while_loop(lambda x: largest(x) > 3, lambda x: jnp.roll(x, -1, axis=-1), x)

    x = draw(rng, "x", 16)
    got, want = (jax.jit(partial(run, implementation=implementation))(x) for implementation in ("native", "reference"))
    np.testing.assert_array_equal(got, want)


def test_checkify(rng):
    logits = draw(rng, "logits", 5, 16)
    checked = jax.jit(checkify.checkify(partial(jax_router.activation_topk, top_k=3), errors=checkify.all_checks))
    error, routing = checked(logits)
    error.throw()
    assert_equal(routing, jax_router.activation_topk(logits, top_k=3))


def test_donation(rng):
    """The scores' buffer becomes that of the values: all of the row are selected."""
    scores = jnp.asarray(draw(rng, "logits", 5, 16))
    want = np.sort(scores, axis=-1)[:, ::-1]
    values, _ = jax.jit(partial(jax_router.topk_select, k=16), donate_argnums=0)(scores)
    assert scores.is_deleted()
    np.testing.assert_array_equal(values, want)


def test_x64(implementation, rng):
    """Dtypes do not change with the flag; 64-bit ids that int32 cannot hold are out of range, and do not wrap."""
    logits, lut = draw(rng, "logits", 4, 16), draw(rng, "lut", 12, 2)
    ops = {
        name: partial(getattr(jax_router, name), implementation=implementation)
        for name in ("hash_router", "activation_topk", "route_at", "expert_dispatch", "topk_select")
    }

    @jax.jit
    def run(logits, lut, token_ids, lengths):
        hashed = ops["hash_router"](token_ids, lut)
        routing = ops["activation_topk"](logits, top_k=3)
        at = ops["route_at"](logits, routing.expert_ids.astype(jnp.int64) + 2**32)
        sizes = ops["expert_dispatch"](token_ids[:, None], 12).group_sizes
        _, indices = ops["topk_select"](logits, 4, lengths=lengths)
        gradient = jax.grad(loss_of(implementation))(logits)
        return (hashed.weights, routing.weights, at.weights, gradient), (
            hashed.expert_ids, routing.expert_ids, at.expert_ids, sizes, indices,
        )  # fmt: skip

    with jax.enable_x64(True):
        token_ids = jnp.array([3, 2**32 + 3, -(2**32) + 3, 12], jnp.int64)
        lengths = jnp.array([2**32, -(2**40), 2, 2**31], jnp.int64)
        floats, integers = run(logits, lut.astype(np.int64), token_ids, lengths)
        assert {array.dtype for array in floats} == {np.dtype(np.float32)}
        assert {array.dtype for array in integers} == {np.dtype(np.int32)}
        hashed_ids, ids, at_ids, sizes, indices = map(np.asarray, integers)
    np.testing.assert_array_equal(hashed_ids, np.stack([lut[3], *[[-1, -1]] * 3]))
    np.testing.assert_array_equal(at_ids, -1)
    np.testing.assert_array_equal(sizes, np.arange(12) == 3)
    np.testing.assert_array_equal((indices >= 0).sum(-1), [4, 0, 2, 4])
    np.testing.assert_array_equal(ids, oracle_top_k(logits, 3))


# What a program looks like


def test_jaxpr_holds_one_equation(rng):
    jaxpr = jax.make_jaxpr(lambda x, b: jax_router.activation_topk(x, b, top_k=3))(
        draw(rng, "x", 5, 16), draw(rng, "bias", 16)
    )
    assert [equation.primitive.name for equation in jaxpr.eqns] == ["jax_router.activation_topk"]


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_lowering_is_one_custom_call(platform, rng):
    if isinstance(error := _ffi.load(platform), ImportError):
        pytest.skip(str(error))
    traced = jax.jit(OPS["with bias"]).trace(draw(rng, "x", 5, 16), draw(rng, "bias", 16))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    calls = re.findall(r"custom_call @([\w.]+)", text)
    assert calls == ["jax_router.activation_topk"]
    assert "chlo.top_k" not in text


@pytest.mark.parametrize(
    "op", ["activation_topk", "hash_router", "dense_router", "expert_dispatch", "topk_select lengths"]
)
def test_export(op, rng):
    """One program for three platforms and any number of tokens."""
    (tokens,) = export.symbolic_shape("tokens")
    shapes = {
        "activation_topk": [(tokens, 16)],
        "hash_router": [(tokens,), (12, 2)],
        "dense_router": [(tokens, 8), (16, 8)],
        "expert_dispatch": [(tokens, 2)],
        "topk_select lengths": [(tokens, 16), (tokens,)],
    }[op]
    names = {
        "hash_router": ["token_ids", "lut"],
        "expert_dispatch": ["ids"],
        "topk_select lengths": ["logits", "lengths"],
    }.get(op, ["x", "weight"])
    dtypes = [draw(rng, name, 1).dtype for name in names]
    platforms = ("cpu", "cuda", "tpu")
    exported = export.export(
        jax.jit(OPS[op]),
        platforms=platforms,
        disabled_checks=[export.DisabledSafetyCheck.custom_call(target) for target in jax_router.custom_call_targets()],
    )(*map(jax.ShapeDtypeStruct, shapes, dtypes))
    assert exported.platforms == platforms
    for size in (1, 7):
        values = [draw(rng, name, *[size if d is tokens else d for d in shape]) for name, shape in zip(names, shapes)]
        got, want = exported.call(*values), jax.jit(OPS[op])(*values)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), tuple(got), tuple(want))


def test_export_of_a_gradient(rng):
    (tokens,) = export.symbolic_shape("tokens")
    exported = export.export(
        jax.jit(jax.grad(loss_of("auto"))),
        platforms=("cpu", "cuda", "tpu"),
        disabled_checks=[export.DisabledSafetyCheck.custom_call(target) for target in jax_router.custom_call_targets()],
    )(jax.ShapeDtypeStruct((tokens, 16), np.float32))
    x = draw(rng, "x", 6, 16)
    np.testing.assert_allclose(exported.call(x), jax.jit(jax.grad(loss_of("reference")))(x), rtol=1e-4, atol=1e-6)


def test_custom_call_targets():
    targets = jax_router.custom_call_targets()
    assert targets == tuple(sorted(targets))
    assert {"jax_router.activation_topk", "jax_router.route_cotangent"} <= set(targets)
    assert all(target.startswith("jax_router.") for target in targets)


def test_eager_and_jitted_calls_agree(rng):
    logits = draw(rng, "logits", 5, 16)
    eager = jax_router.activation_topk(logits, top_k=3)
    assert_same_routing(jax.jit(OPS["activation_topk"])(logits), eager, f64(logits))
