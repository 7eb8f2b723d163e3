"""Programs that are exported with symbolic sizes: of any axis, with what its constraints say of it and no more."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import jax_router
from cases import draw
from matrix import assert_close, sum_of_squares

SAFE = [export.DisabledSafetyCheck.custom_call(target) for target in jax_router.custom_call_targets()]
CONSTRAINTS = {"E >= 8": ["e >= 8"], "8 <= E <= 4096": ["e >= 8", "e <= 4096"]}


def exported(function, shapes, constraints=()):
    """For cpu, cuda and tpu. Shapes as "n, e", with the dtype behind a colon if it is not float32."""
    scope = export.SymbolicScope(constraints)
    avals = []
    for text in shapes:
        shape, _, dtype = text.partition(":")
        avals.append(jax.ShapeDtypeStruct(export.symbolic_shape(shape, scope=scope), dtype or "float32"))
    return export.export(jax.jit(function), platforms=("cpu", "cuda", "tpu"), disabled_checks=SAFE)(*avals)


def check(function, shapes, values, constraints=()):
    assert_close(exported(function, shapes, constraints).call(*values), function(*values))


def gradient(function):
    return jax.grad(lambda *values: sum_of_squares(function(*values)))


# By name: an op of logits [n, e] and what else it takes, as shapes and as names of `draw`.
OPS = {
    "activation_topk": (partial(jax_router.activation_topk, top_k=3), [], []),
    "activation_topk, softmax of all": (
        partial(jax_router.activation_topk, top_k=3, score_fn="softmax", renormalize=False), [], []
    ),
    "activation_topk, bias": (partial(jax_router.activation_topk, top_k=3), ["e"], [("bias", (16,))]),
    "topk_select": (partial(jax_router.topk_select, k=3), [], []),
    "route_at": (jax_router.route_at, ["n, 2:int32"], [("ids", (7, 2))]),
    "scored_hash_router": (
        jax_router.scored_hash_router, ["n:int32", "v, 2:int32"], [("token_ids", (7,)), ("lut", (12, 2))]
    ),
}  # fmt: skip


@pytest.mark.parametrize("constraints", CONSTRAINTS)
@pytest.mark.parametrize("name", OPS)
def test_symbolic_experts(name, constraints, rng):
    """Kernels where the constraints leave no doubt that they can; the gradient too."""
    op, shapes, operands = OPS[name]
    values = [draw(rng, "logits", 7, 16), *(draw(rng, name, *shape) for name, shape in operands)]
    for function in (op, gradient(op)):
        check(function, ["n, e", *shapes], values, CONSTRAINTS[constraints])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_symbolic_experts_of_mapped_weights(dtype, rng):
    """Whether the gradient of hidden states is a sum of rows or a product is not known of them."""
    values = [draw(rng, "x", 2, 7, 8).astype(dtype), draw(rng, "weight", 2, 60, 8).astype(dtype)]
    shapes = [f"b, n, d:{dtype}", f"b, e, d:{dtype}"]
    check(jax.vmap(gradient(partial(jax_router.dense_router, top_k=2))), shapes, values, ["e >= 2"])


def test_a_bound_decides_about_the_kernel():
    route = partial(jax_router.activation_topk, top_k=3)
    for constraints, calls in ((["e >= 8"], 0), (["e >= 8", "e <= 4096"], 1)):
        scope = export.SymbolicScope(constraints)
        logits = jax.ShapeDtypeStruct(export.symbolic_shape("n, e", scope=scope), jnp.float32)
        text = export.export(jax.jit(route), platforms=("cpu",), disabled_checks=SAFE)(logits).mlir_module()
        assert text.count("custom_call @jax_router.activation_topk") == calls


def test_native_without_a_bound_says_so():
    route = partial(jax_router.activation_topk, top_k=3, implementation="native")
    scope = export.SymbolicScope(["e >= 8"])
    logits = jax.ShapeDtypeStruct(export.symbolic_shape("n, e", scope=scope), jnp.float32)
    with pytest.raises(NotImplementedError, match=r"symbolic sizes.*e.*4096"):
        export.export(jax.jit(route), platforms=("cpu",), disabled_checks=SAFE)(logits)


@pytest.mark.parametrize(
    "k", [lambda length: length - 1, lambda length: length // 2, lambda length: length], ids=["L - 1", "L // 2", "L"]
)
def test_symbolic_k(k, rng):
    """As `jax.lax.top_k` exports it."""
    scores = draw(rng, "logits", 7, 16)
    check(lambda x: jax_router.topk_select(x, k(x.shape[-1])), ["n, l"], [scores])
    check(gradient(lambda x: jax_router.topk_select(x, k(x.shape[-1]))), ["n, l"], [scores])
    exported(lambda x: jax.lax.top_k(x, k(x.shape[-1])), ["n, l"])


@pytest.mark.parametrize("dtype", ["int32", "uint32", "uint8"])
def test_symbolic_experts_of_a_dispatch_and_lengths(dtype, rng):
    """Ids of any dtype, with a bound that is symbolic."""
    ids, x = rng.integers(0, 40, (7, 2)).astype(dtype), draw(rng, "logits", 7, 16)
    sort = lambda x, ids: jax_router.expert_dispatch(ids, x.shape[-1])  # noqa: E731
    check(sort, ["n, e", f"n, 2:{dtype}"], [x, ids])
    check(lambda x, ids: jax_router.topk_select(x, 3, lengths=ids), ["n, e", f"n:{dtype}"], [x, ids[:, 0]], ["e >= 3"])
    check(
        jax_router.hash_router, [f"n:{dtype}", f"v, 2:{dtype}"], [ids[:, 0], np.arange(60, dtype=dtype).reshape(30, 2)]
    )


@pytest.mark.parametrize("shape", ["n, k:int32", "7, k:int32"])
@pytest.mark.parametrize("op", [jax_router.expert_dispatch, jax_router.expert_counts])
def test_symbolic_choices(op, shape, rng):
    """As many of a token as the program is called with; its kernels on CUDA have memory for any number."""
    check(partial(op, num_experts=16), [shape], [draw(rng, "ids", 7, 3)])
    check(jax.vmap(partial(op, num_experts=16)), [f"2, {shape}"], [draw(rng, "ids", 2, 7, 3)])


@pytest.mark.parametrize(
    ("op", "argument"),
    [(partial(jax_router.activation_topk, top_k=3), "top_k"), (partial(jax_router.topk_select, k=3), "k")],
)
def test_what_constraints_do_not_say_is_named(op, argument):
    with pytest.raises(ValueError, match=rf"{argument} must be between . and e .*got 3.*not known.*constraints"):
        exported(op, ["n, e"])
