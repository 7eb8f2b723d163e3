"""Every op under every transformation: a table of docs/transformations.md, and what programs hold.

The results and the derivatives through a transformation must be those of the reference without it.
"""

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax
from jax.experimental import checkify

import jax_router
from cases import draw
from jax_router import _native, balance, expert_parallel, moe
from matrix import OF_ALL_TOKENS, OPS, Table, assert_close, assert_documented, native, sum_of_squares
from oracle import top_k as oracle_top_k

B, T = 3, 4  # problems, and tokens in each
RESULTS, DERIVATIVES = "=", "= ∂"


def problem(op, values, i):
    return [value[i] if operand.per_token else value for operand, value in zip(OPS[op].operands, values)]


def each_problem(op, call):
    """From a function of one problem to one of all: stacked calls, without any transformation."""

    def calls(*values):
        results = [call(*problem(op, values, i)) for i in range(B)]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)

    return calls


@functools.cache
def expected(op):
    """The operands of B problems of T tokens; the reference's results and the gradient through them."""
    values = OPS[op].draw(B, T)
    call = each_problem(op, partial(OPS[op].call, implementation="reference"))
    return values, jax.jit(OPS[op].derivative_of(call))(*values)


def agrees(op, call):
    """Compares a function of all problems, jitted, and its gradient, with the reference. Returns what the cell says."""
    values, want = expected(op)
    assert_close(jax.jit(OPS[op].derivative_of(call))(*values), want)
    return DERIVATIVES if OPS[op].floats else RESULTS


def results_agree(op, results):
    assert_close(results, expected(op)[1][0])
    return RESULTS


# The rows of the table. Each takes the op's name.


def eager(op):
    return results_agree(op, each_problem(op, native(op))(*expected(op)[0]))


def jit(op):
    return agrees(op, each_problem(op, native(op)))


def lower_and_compile(op):
    values, want = expected(op)
    function = jax.jit(OPS[op].derivative_of(each_problem(op, native(op))))
    avals = [jax.ShapeDtypeStruct(value.shape, value.dtype) for value in values]
    assert_close(function.lower(*avals).compile()(*values), want)
    return DERIVATIVES if OPS[op].floats else RESULTS


def jvp(op):
    """Along the operands themselves, and with float0 for integers."""
    values = OPS[op].draw(T)

    def tangents(implementation, *values):
        call = partial(OPS[op].call, implementation=implementation)
        directions = [
            value if value.dtype == np.float32 else np.zeros(value.shape, jax.dtypes.float0) for value in values
        ]
        leaves = jax.tree.leaves(jax.jvp(call, tuple(values), tuple(directions)))
        return [leaf for leaf in leaves if leaf.dtype != jax.dtypes.float0]

    got, want = (jax.jit(partial(tangents, implementation))(*values) for implementation in ("native", "reference"))
    assert_close(got, want, atol=1e-5)
    return DERIVATIVES if OPS[op].floats else RESULTS


def vjp_of_vjp(op):
    """The gradient of the squared norm of the gradient."""
    values = OPS[op].draw(T)

    def norm(implementation, *floats):
        call = partial(OPS[op].call, implementation=implementation)
        return sum_of_squares(OPS[op].derivative_of(call)(*OPS[op].with_floats(values, floats))[1])

    floats = [values[i] for i in OPS[op].floats]
    got, want = (
        jax.jit(jax.grad(partial(norm, implementation), tuple(range(len(floats)))))(*floats)
        for implementation in ("native", "reference")
    )
    assert_close(got, want, atol=1e-5)
    return DERIVATIVES


def vmap(op):
    """Over the operands of a problem; over every operand alone, at its last axis; over all of them, at the middle."""
    per_token = [operand.per_token for operand in OPS[op].operands]
    cell = agrees(op, jax.vmap(native(op), in_axes=tuple(0 if batched else None for batched in per_token)))
    one = jax.jit(native(op))
    values = OPS[op].draw(T)
    for batched in [*np.eye(len(values), dtype=bool), np.ones(len(values), bool)]:
        axes = [(-1 if sum(batched) == 1 else value.ndim // 2) if b else None for b, value in zip(batched, values)]
        stacked = [
            value if axis is None else np.stack([np.roll(value, i, -1) for i in range(B)], axis)
            for axis, value in zip(axes, values)
        ]
        got = jax.jit(jax.vmap(native(op), in_axes=tuple(axes)))(*stacked)
        for i in range(B):
            want = one(*[value if axis is None else value.take(i, axis) for axis, value in zip(axes, stacked)])
            assert_close(jax.tree.map(lambda leaf, i=i: leaf[i], got), want)
    return cell


def vmap_of_vmap(op):
    """The inner one over shared operands too, down to problems without an axis of tokens where the op takes such."""
    tokens = (T,) if op.startswith(OF_ALL_TOKENS) else ()
    outer = [0 if operand.per_token else None for operand in OPS[op].operands]
    values = OPS[op].draw(2, B, *tokens)
    values = [np.stack([np.roll(v, i, 0) for i in range(B)]) if axis is None else v for axis, v in zip(outer, values)]
    inner = jax.vmap(native(op))
    got = jax.jit(jax.vmap(inner, in_axes=tuple(outer)))(*values)
    one = jax.jit(native(op))
    for i in range(2):
        for j in range(B):
            want = one(*[value[j] if axis is None else value[i, j] for axis, value in zip(outer, values)])
            assert_close(jax.tree.map(lambda leaf, i=i, j=j: leaf[i, j], got), want)
    return RESULTS


def scan(op):
    def call(*values):
        return lax.scan(lambda _, i: (None, native(op)(*problem(op, values, i))), None, jnp.arange(B))[1]

    return agrees(op, call)


def while_loop(op):
    """The trip count depends on what was routed. A loop of that kind has no transpose: results, and tangents."""
    values, (want, _) = expected(op)

    def call(*values):
        empty = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(lambda: tuple(jax.tree.leaves(want)))
        )

        def body(state):
            i, _, out = state
            results = tuple(jax.tree.leaves(native(op)(*problem(op, values, i))))
            stored = jax.tree.map(lambda all, one: lax.dynamic_update_index_in_dim(all, one, i, 0), out, results)
            return i + 1, jax.tree.leaves(results)[-1].max(), stored

        return lax.while_loop(lambda state: (state[0] < B) & (state[1] < 100), body, (0, jnp.int32(0), empty))[2]

    if not OPS[op].floats:
        return results_agree(op, jax.jit(call)(*values))

    def along(call, *values):
        def of_floats(*floats):
            return [leaf for leaf in call(*OPS[op].with_floats(values, floats)) if leaf.dtype == np.float32]

        floats = tuple(values[i] for i in OPS[op].floats)
        return call(*values), jax.jvp(of_floats, floats, floats)[1]

    reference = each_problem(op, partial(OPS[op].call, implementation="reference"))
    got, want = jax.jit(partial(along, call))(*values), jax.jit(partial(along, reference))(*values)
    assert_close(got, want, atol=1e-5)
    return DERIVATIVES


def cond(op):
    def call(*values):
        def one(*values):
            empty = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(native(op), *values))
            return lax.cond(jnp.all(values[0] < 100), native(op), lambda *_: empty, *values)

        return each_problem(op, one)(*values)

    return agrees(op, call)


def remat(op):
    """Each problem under another policy."""
    policies = jax.checkpoint_policies
    problems = iter(
        jax.checkpoint(native(op), policy=policy)
        for policy in (
            None,
            policies.save_only_these_names("jax_router.routing"),
            policies.dots_with_no_batch_dims_saveable,
        )
        * 2
    )
    return agrees(op, each_problem(op, lambda *values: next(problems)(*values)))


def custom_vjp(op):
    call = jax.custom_vjp(native(op))
    call.defvjp(lambda *values: jax.vjp(native(op), *values), lambda pull, cotangents: pull(cotangents))
    return agrees(op, each_problem(op, call))


def checkify_all(op):
    """checkify with all checks: of indices, NaN and division by zero."""
    call = checkify.checkify(each_problem(op, native(op)), errors=checkify.all_checks)
    error, results = jax.jit(call)(*expected(op)[0])
    error.throw()
    return results_agree(op, results)


def donation(op):
    """The buffer of an operand becomes that of a result while the op still needs its values."""
    values = [jnp.array(value) for value in expected(op)[0]]

    def call(donated, *rest):
        return donated + 1, each_problem(op, native(op))(donated, *rest)

    moved, results = jax.jit(call, donate_argnums=0)(*values)
    assert values[0].is_deleted()
    assert_close(moved, expected(op)[0][0] + 1)
    return results_agree(op, results)


def export_symbolic(op):
    """One program for cpu, cuda and tpu, for any number of tokens, with the gradient in it."""
    (tokens,) = export.symbolic_shape("tokens")
    avals = [
        jax.ShapeDtypeStruct((*((tokens,) if operand.per_token else ()), *operand.axes), value.dtype)
        for operand, value in zip(OPS[op].operands, OPS[op].draw(1))
    ]
    function = jax.jit(OPS[op].derivative_of(OPS[op].call))
    safe = [export.DisabledSafetyCheck.custom_call(target) for target in jax_router.custom_call_targets()]
    exported = export.export(function, platforms=("cpu", "cuda", "tpu"), disabled_checks=safe)(*avals)
    for size in (1, 7):
        values = OPS[op].draw(size)
        assert_close(exported.call(*values), function(*values))
    return DERIVATIVES if OPS[op].floats else RESULTS


def x64(op):
    """No dtype changes with the flag."""
    with jax.enable_x64(True):
        return agrees(op, each_problem(op, native(op)))


def checkers(op):
    with (
        jax.debug_nans(True),
        jax.debug_key_reuse(True),
        jax.enable_checks(True),
        jax.checking_leaks(),
        jax.numpy_dtype_promotion("strict"),
    ):
        return agrees(op, each_problem(op, native(op)))


@functools.cache
def processes_of_all_ops():
    """What two processes in a row print, the settings of JAX coming from the environment. See run_ops.py."""
    run = [sys.executable, str(Path(__file__).with_name("run_ops.py"))]
    with tempfile.TemporaryDirectory() as cache:
        environment = {
            **os.environ,
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_ENABLE_X64": "1",
            "JAX_NUMPY_DTYPE_PROMOTION": "strict",
            "JAX_DEBUG_NANS": "1",
            "JAX_DEBUG_KEY_REUSE": "1",
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # the tests' own process may hold a GPU's memory
        }
        return [json.loads(subprocess.check_output(run, env=environment).splitlines()[-1]) for _ in range(2)]


def persistent_cache(op):
    """The second process takes its programs from the first one's cache, and gets the reference's results."""
    values = OPS[op].draw(T)
    want = jax.jit(OPS[op].derivative_of(partial(OPS[op].call, implementation="reference")))(*values)
    first, second = (process[op] for process in processes_of_all_ops())
    assert (first["cache hits"], second["cache hits"]) == (0, 1)
    for process in (first, second):
        assert_close([np.array(leaf, dtype) for dtype, leaf in process["results"]], want)
    return DERIVATIVES if OPS[op].floats else RESULTS


ROWS = {
    "no transformation": eager,
    "`jit`, `grad`": jit,
    "`jit(f).lower(...).compile()`": lower_and_compile,
    "`jvp`": jvp,
    "`vjp` of `vjp`": vjp_of_vjp,
    "`vmap`, over any operand": vmap,
    "`vmap` of `vmap`": vmap_of_vmap,
    "`lax.scan`": scan,
    "`lax.while_loop`": while_loop,
    "`lax.cond`": cond,
    "`jax.checkpoint`, with policies": remat,
    "`custom_vjp` around it": custom_vjp,
    "`checkify`, all checks": checkify_all,
    "donation": donation,
    "`jax.export`: cpu, cuda, tpu, symbolic tokens": export_symbolic,
    "`enable_x64`": x64,
    "strict promotion, `debug_nans`, `debug_key_reuse`, `enable_checks`, `checking_leaks`": checkers,
    "persistent cache; `JAX_ENABLE_X64` and the checkers from the environment": persistent_cache,
}
TABLE = Table(
    "transformations",
    list(ROWS),
    list(OPS),
    {("`vjp` of `vjp`", op): "no float operand" for op, case in OPS.items() if not case.floats},
)


@pytest.mark.parametrize(("row", "op"), TABLE.cells())
def test_cell(row, op):
    TABLE.enter(row, op, ROWS[row](op))


def test_document():
    assert_documented(TABLE)


# What the table does not show


def test_while_loop_of_routing_of_its_state():
    """The state is what is routed, and the trip count depends on the ids."""

    def run(x, implementation):
        def largest(x):
            return jax_router.activation_topk(x, top_k=1, implementation=implementation).expert_ids.max()

        return lax.while_loop(lambda x: largest(x) > 3, lambda x: jnp.roll(x, -1, axis=-1), x)

    x = np.sin(np.arange(16, dtype=np.float32))
    got, want = (jax.jit(partial(run, implementation=implementation))(x) for implementation in ("native", "reference"))
    assert np.any(got != x)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("policy", "selections"),
    [
        (None, 2),
        (jax.checkpoint_policies.save_only_these_names("jax_router.routing"), 1),
        (jax.checkpoint_policies.everything_saveable, 1),
        (jax.checkpoint_policies.dots_with_no_batch_dims_saveable, 2),
    ],
)
@pytest.mark.parametrize("op", ["activation_topk, bias", "route_at", "topk_select", "dense_router"])
def test_policies_of_checkpoint_know_the_routing(op, policy, selections):
    """With the name saved, the backward pass neither selects again nor can choose other experts."""
    call = jax.checkpoint(lambda *values: sum_of_squares(OPS[op].call(*values)), policy=policy)
    gradient = jax.make_jaxpr(jax.grad(lambda *values: jnp.sin(call(*values))))(*OPS[op].draw(T))
    name = f"jax_router.{op.partition(',')[0]}"
    assert len(re.findall(rf"= {name}\[", str(gradient))) == selections


@pytest.mark.parametrize(
    ("policy", "sorts"),
    [
        (None, 2),
        (jax.checkpoint_policies.save_only_these_names("jax_router.dispatch"), 1),
        (jax.checkpoint_policies.everything_saveable, 1),
    ],
)
def test_policies_of_checkpoint_know_the_dispatch(policy, sorts, implementation, rng):
    """With the name saved, the backward pass sorts nothing again, and selects nothing again for the sort."""
    logits, x = draw(rng, "logits", T, 16), draw(rng, "x", T, 8)

    def layer(logits, x):
        ids = jax_router.activation_topk(logits, top_k=3, implementation=implementation).expert_ids
        token_index, slot, _ = jax_router.expert_dispatch(ids, 16, align=4, implementation=implementation)
        return (jnp.sin(x[token_index])[slot] ** 2).sum()

    call = jax.checkpoint(layer, policy=policy)
    gradient = jax.grad(lambda x: jnp.sin(call(logits, x)))
    text = str(jax.make_jaxpr(gradient)(x))
    sort, select = (
        (r"= jax_router\.expert_dispatch\[", r"= jax_router\.activation_topk\[")
        if implementation == "native"
        else (r"= sort\[", r"= top_k\[")
    )
    assert len(re.findall(sort, text)) == len(re.findall(select, text)) == sorts
    assert_close(gradient(x), jax.grad(lambda x: jnp.sin(layer(logits, x)))(x))


def test_names_for_checkpoint_cost_nothing(rng):
    """No copy of what the kernel wrote."""
    ids = draw(rng, "ids", 64, 4)
    text = jax.jit(partial(jax_router.expert_dispatch, num_experts=16)).lower(ids).compile().as_text()
    assert "custom-call" in text
    assert not re.search(r" (copy|fusion|add)\(", text), text


@pytest.mark.parametrize("op", ["route_at", "scored_hash_router"])
@pytest.mark.parametrize("gradient", [False, True])
def test_vmap_over_ids_does_not_copy_shared_logits(gradient, op, rng):
    """Nor does its gradient: 64 problems of 256 KiB of logits, in a fraction of these 16 MiB."""
    problems, tokens, experts = 64, 256, 256
    logits, table = draw(rng, "logits", tokens, experts), draw(rng, "lut", 12, 4)
    ids = draw(rng, "ids", problems, tokens, 4) if op == "route_at" else draw(rng, "token_ids", problems, tokens)
    others = () if op == "route_at" else (table,)
    call = partial(getattr(jax_router, op), renormalize=False)

    def weights(logits, ids, call=call):
        return jax.vmap(lambda ids: call(logits, ids, *others).weights)(ids)

    def run(logits, ids):
        return jax.grad(lambda x: (weights(x, ids) ** 2).sum())(logits) if gradient else weights(logits, ids)

    compiled = jax.jit(run).lower(logits, ids).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 << 20
    if not gradient:
        one_by_one = [call(logits, one, *others, implementation="native").weights for one in ids]
        np.testing.assert_allclose(compiled(logits, ids), one_by_one, rtol=1e-5)


def test_vmap_over_the_mask_multiplies_once(rng):
    """What dense_router computes of operands that are not mapped is computed for all problems at once."""
    x, weight, masks = draw(rng, "x", 5, 8), draw(rng, "weight", 16, 8), draw(rng, "mask", 3, 5)

    def route(mask):
        return jax_router.dense_router(x, weight, top_k=3, token_mask=mask)

    text = jax.jit(jax.vmap(route)).lower(masks).as_text()
    assert re.findall(r"dot_general.*-> tensor<(\w+)>", text) == ["5x16xf32"]
    assert_close(jax.vmap(route)(masks), jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(route, masks)))


def test_debug_nans_finds_the_nan():
    """A NaN that is routed is an error where JAX looks for them, and none where the mask excludes the token."""
    logits = OPS["activation_topk"].draw(T)[0]
    logits[1, 2] = np.nan
    with jax.debug_nans(True):
        with pytest.raises(FloatingPointError, match="nan"):
            jax.block_until_ready(jax.jit(native("activation_topk"))(logits))
        weights, _ = jax.jit(native("activation_topk"))(logits, token_mask=np.arange(T) != 1)
    np.testing.assert_array_equal(weights[1], 0)


def test_ids_of_64_bits(implementation, rng):
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
        return (hashed.weights, routing.weights, at.weights), (
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


def test_jaxpr():
    """One equation, which says what the op was given."""
    with_bias = partial(jax_router.activation_topk, top_k=3, num_groups=4, top_groups=2)
    (equation,) = jax.make_jaxpr(with_bias)(*OPS["activation_topk, bias"].draw(T)).eqns
    assert equation.primitive.name == "jax_router.activation_topk"
    text = str(equation)
    for part in ("names=('logits', 'bias')", "top_k=3", "num_groups=4", "score_fn='sqrtsoftplus'"):
        assert part in text, text


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_lowering_is_one_custom_call(platform):
    if isinstance(error := _native.load(platform), ImportError):
        pytest.skip(str(error))
    traced = jax.jit(OPS["activation_topk, bias"].call).trace(*OPS["activation_topk, bias"].draw(T))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    calls = re.findall(r"custom_call @([\w.]+)", text)
    assert calls == ["jax_router.activation_topk"]
    assert "chlo.top_k" not in text


@pytest.mark.parametrize("op", ["activation_topk, bias", "expert_dispatch"])
def test_exported_programs_are_serialized(op):
    """With the types that the ops return, and with their gradients."""
    pytest.importorskip("flatbuffers", reason="jax.export needs flatbuffers to serialize")
    values, function = OPS[op].draw(T), jax.jit(OPS[op].call)
    safe = [export.DisabledSafetyCheck.custom_call(target) for target in jax_router.custom_call_targets()]
    program = export.export(function, disabled_checks=safe)(*values).serialize(vjp_order=1)
    call = export.deserialize(program).call
    assert type(call(*values)) is type(function(*values))
    assert_close(OPS[op].derivative_of(call)(*values), OPS[op].derivative_of(function)(*values))


@pytest.mark.parametrize(
    "value",
    [
        balance.LoadStatistics(*np.ones((3, 2), np.float32), np.ones(2, np.int32)),
        expert_parallel.ExpertSum(np.ones((2, 3)), np.int32(1)),
        moe.ExpertWeights(np.ones((2, 3, 4)), np.ones((2, 3, 4)), np.ones((2, 4, 3))),
    ],
    ids=lambda value: type(value).__name__,
)
def test_other_types_of_exported_programs(value):
    """As arguments and results."""
    pytest.importorskip("flatbuffers", reason="jax.export needs flatbuffers to serialize")
    program = export.export(jax.jit(lambda value: value))(value).serialize()
    result = export.deserialize(program).call(value)
    assert type(result) is type(value)
    assert_close(result, jax.tree.map(jnp.asarray, value))


def test_custom_call_targets():
    targets = jax_router.custom_call_targets()
    assert targets == tuple(sorted(targets))
    assert {"jax_router.activation_topk", "jax_router.route_cotangent"} <= set(targets)
    assert all(target.startswith("jax_router.") for target in targets)
