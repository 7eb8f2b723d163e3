"""Rows sharded over devices: no collective, the right type and sharding of the results, the values of one device."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jax_router

P = PartitionSpec
MODES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
COLLECTIVES = re.compile(
    r"(all-gather|all-reduce|all-to-all|collective-permute|collective-broadcast|reduce-scatter)\S*\("
)

# The leading axes of the tokens, the mesh, and the spec of those axes.
LAYOUTS = {
    "rows": ((16,), ("d",), ("d",)),
    "rows over two mesh axes": ((16,), ("a", "b"), (("a", "b"),)),
    "batch of rows": ((8, 3), ("d",), ("d",)),
    "second axis": ((3, 8), ("d",), (None, "d")),
    "two axes": ((8, 4), ("a", "b"), ("a", "b")),
    "three axes": ((2, 8, 3), ("d",), (None, "d", None)),
}

TOKENS, SHARED = "one a token", "one for all"
FLOAT, BOOL = "float", "bool"


def loss(route):
    return lambda *operands: (route(*operands)[0] ** 2).sum()


# The op, and its operands: what kind (or the bound of integers), whether it is one a token, and its own axes.
OPS = {
    "activation_topk": (partial(jax_router.activation_topk, top_k=3), [(FLOAT, TOKENS, (16,))]),
    "with a bias": (
        lambda logits, bias: jax_router.activation_topk(logits, bias, top_k=3, score_fn="sigmoid"),
        [(FLOAT, TOKENS, (16,)), (FLOAT, SHARED, (16,))],
    ),
    "with a bias a token and a mask": (
        lambda logits, bias, mask: jax_router.activation_topk(logits, bias, top_k=3, token_mask=mask),
        [(FLOAT, TOKENS, (16,)), (FLOAT, TOKENS, (16,)), (BOOL, TOKENS, ())],
    ),
    "with groups, a bias and a mask": (
        lambda logits, bias, mask: jax_router.activation_topk(
            logits, bias, top_k=3, token_mask=mask, num_groups=4, top_groups=2
        ),
        [(FLOAT, TOKENS, (16,)), (FLOAT, SHARED, (16,)), (BOOL, TOKENS, ())],
    ),
    "route_at": (jax_router.route_at, [(FLOAT, TOKENS, (16,)), (17, TOKENS, (2,))]),
    "hash_router": (jax_router.hash_router, [(25, TOKENS, ()), (16, SHARED, (24, 2))]),
    "topk_select": (partial(jax_router.topk_select, k=5), [(FLOAT, TOKENS, (16,))]),
    "topk_select with lengths": (
        lambda scores, lengths: jax_router.topk_select(scores, 5, lengths=lengths),
        [(FLOAT, TOKENS, (16,)), (18, TOKENS, ())],
    ),
    "dense_router": (
        lambda x, weight, logit_bias, bias: jax_router.dense_router(x, weight, bias, logit_bias=logit_bias, top_k=3),
        [(FLOAT, TOKENS, (8,)), (FLOAT, SHARED, (16, 8)), (FLOAT, SHARED, (16,)), (FLOAT, SHARED, (16,))],
    ),
    "gradient": (
        jax.grad(loss(partial(jax_router.activation_topk, top_k=3))),
        [(FLOAT, TOKENS, (16,)), (FLOAT, SHARED, (16,))],
    ),
    "gradient of softmax": (
        jax.grad(loss(partial(jax_router.activation_topk, top_k=3, score_fn="softmax", renormalize=False))),
        [(FLOAT, TOKENS, (16,)), (FLOAT, SHARED, (16,))],
    ),
    "gradient of route_at": (jax.grad(loss(jax_router.route_at)), [(FLOAT, TOKENS, (16,)), (17, TOKENS, (2,))]),
    "gradient of topk_select": (jax.grad(loss(partial(jax_router.topk_select, k=5))), [(FLOAT, TOKENS, (16,))]),
    "gradient of dense_router in x": (
        jax.grad(loss(partial(jax_router.dense_router, top_k=3))),
        [(FLOAT, TOKENS, (8,)), (FLOAT, SHARED, (16, 8))],
    ),
}


def make_mesh(devices, names, mode):
    shape = (len(devices),) if len(names) == 1 else (2, len(devices) // 2)
    return jax.make_mesh(shape, names, (MODES[mode],) * len(names), devices=devices)


def draw(rng, kind, shape):
    if kind == FLOAT:
        return rng.normal(0, 1, shape).astype(np.float32)
    if kind == BOOL:
        return rng.random(shape) < 0.7
    return rng.integers(-1, kind, shape).astype(np.int32)


def put(mesh, array, *spec):
    return jax.device_put(array, NamedSharding(mesh, P(*spec)))


def assert_close(got, want):
    for mine, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        if other.dtype == np.float32:
            np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-7)
        else:
            np.testing.assert_array_equal(mine, other)


# Every op over two layouts, and those with every kind of shared operand over all.
CASES = [
    (op, layout, mode)
    for op in OPS
    for layout in LAYOUTS
    for mode in MODES
    if layout in ("rows", "two axes") or (op in ("with a bias", "hash_router", "dense_router") and mode == "auto")
]


@pytest.mark.parametrize(("op", "layout", "mode"), CASES)
def test_no_collective(op, layout, mode, devices, rng):
    function, operands = OPS[op]
    tokens, axes, spec = LAYOUTS[layout]
    mesh = make_mesh(devices, axes, mode)
    values = [draw(rng, kind, (*tokens, *own) if role is TOKENS else own) for kind, role, own in operands]
    want = jax.jit(function)(*values)
    specs = [spec if role is TOKENS else () for _, role, _ in operands]
    sharded = [put(mesh, value, *its) for value, its in zip(values, specs)]
    with jax.set_mesh(mesh):
        compiled = jax.jit(function).lower(*sharded).compile()
        got = compiled(*sharded)
        if mode == "explicit":
            for leaf in jax.tree.leaves(jax.eval_shape(function, *sharded)):
                assert leaf.sharding.spec == P(*spec, *[None] * (leaf.ndim - len(spec))), leaf.sharding.spec
    text = compiled.as_text()
    assert COLLECTIVES.findall(text) == []
    assert "jax_router." in text, "the native kernel must be what is sharded"
    for leaf in jax.tree.leaves(got):
        assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, P(*spec)), leaf.ndim), leaf.sharding
        assert leaf.sharding.shard_shape(leaf.shape) != leaf.shape
    assert_close(got, want)


@pytest.mark.parametrize("mode", MODES)
def test_vmapped_expert_dispatch(mode, devices, rng):
    """Independent sorts over a sharded batch axis."""
    mesh = make_mesh(devices, ("d",), mode)
    ids = rng.integers(-1, 9, (8, 20, 2)).astype(np.int32)
    function = jax.vmap(partial(jax_router.expert_dispatch, num_experts=8))
    want = jax.jit(function)(ids)
    with jax.set_mesh(mesh):
        compiled = jax.jit(function).lower(put(mesh, ids, "d")).compile()
        got = compiled(put(mesh, ids, "d"))
    assert COLLECTIVES.findall(compiled.as_text()) == []
    assert_close(got, want)


@pytest.mark.parametrize("mode", MODES)
def test_gradient_of_a_shared_weight_is_one_sum(mode, devices, rng):
    """The weight's gradient is summed over the devices, and nothing else is exchanged."""
    mesh = make_mesh(devices, ("d",), mode)
    x, weight = draw(rng, FLOAT, (16, 8)), draw(rng, FLOAT, (24, 8))
    gradient = jax.grad(loss(partial(jax_router.dense_router, top_k=3)), argnums=1)
    with jax.set_mesh(mesh):
        compiled = jax.jit(gradient).lower(put(mesh, x, "d"), put(mesh, weight)).compile()
        got = compiled(put(mesh, x, "d"), put(mesh, weight))
    assert set(COLLECTIVES.findall(compiled.as_text())) == {"all-reduce"}
    np.testing.assert_allclose(got, jax.jit(gradient)(x, weight), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "op",
    ["activation_topk", "with a bias", "topk_select", "dense_router", "gradient", "gradient of softmax",
     "gradient of dense_router in x"],
)  # fmt: skip
@pytest.mark.parametrize("mode", MODES)
def test_sharded_experts(op, mode, devices, rng):
    """The experts' axis of logits, biases and weights is gathered: the result is right, whatever it costs."""
    mesh = make_mesh(devices, ("d",), mode)
    function, operands = OPS[op]
    values = [draw(rng, kind, (6, *own) if role is TOKENS else own) for kind, role, own in operands]
    want = jax.jit(function)(*values)
    with jax.set_mesh(mesh):
        got = jax.jit(function)(
            *[put(mesh, value, *("d" if size == 16 else None for size in value.shape)) for value in values]
        )
    assert_close(got, want)


@pytest.mark.parametrize("mode", MODES)
def test_sharded_table(mode, devices, rng):
    """A hash table whose rows are sharded, as the tokens are, is gathered."""
    mesh = make_mesh(devices, ("d",), mode)
    token_ids, lut = draw(rng, 25, (16,)), draw(rng, 16, (24, 2))
    with jax.set_mesh(mesh):
        got = jax.jit(jax_router.hash_router)(put(mesh, token_ids, "d"), put(mesh, lut, "d"))
    assert_close(got, jax.jit(jax_router.hash_router)(token_ids, lut))


def test_all_tokens_to_one_dispatch(devices, rng):
    """A sort of tokens that are sharded needs their ids in one place; the result is that of one device."""
    mesh = make_mesh(devices, ("d",), "auto")
    ids = rng.integers(-1, 9, (16, 2)).astype(np.int32)
    function = jax.jit(partial(jax_router.expert_dispatch, num_experts=8))
    assert_close(function(put(mesh, ids, "d")), function(ids))


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize(
    "op",
    ["activation_topk", "with a bias", "with groups, a bias and a mask", "hash_router", "dense_router",
     "topk_select with lengths", "gradient", "gradient of softmax"],
)  # fmt: skip
def test_shard_map(op, check_vma, devices, rng):
    mesh = make_mesh(devices, ("d",), "auto")
    function, operands = OPS[op]
    values = [draw(rng, kind, (16, *own) if role is TOKENS else own) for kind, role, own in operands]
    specs = tuple(P("d") if role is TOKENS else P() for _, role, _ in operands)
    mapped = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=P("d"), check_vma=check_vma)
    assert_close(jax.jit(mapped)(*values), jax.jit(function)(*values))


def test_shard_map_knows_that_results_vary(devices, rng):
    """Where the first operand is replicated and another one is not, the results are not; nor may they pass for it."""
    mesh = make_mesh(devices, ("d",), "auto")
    logits, mask = draw(rng, FLOAT, (2, 16)), draw(rng, BOOL, (2 * len(devices),))

    def mapped(out_spec):
        return jax.jit(
            jax.shard_map(
                lambda logits, mask: jax_router.activation_topk(logits, top_k=3, token_mask=mask),
                mesh=mesh, in_specs=(P(), P("d")), out_specs=out_spec,
            )
        )  # fmt: skip

    want = jax_router.activation_topk(np.tile(logits, (len(devices), 1)), top_k=3, token_mask=mask)
    assert_close(mapped(P("d"))(logits, mask), want)
    with pytest.raises(ValueError, match="out_specs"):
        mapped(P())(logits, mask)


@pytest.mark.parametrize("check_vma", [True, False])
def test_gradient_around_shard_map(check_vma, devices, rng):
    """Through a shard_map with a shared weight: the transpose sums over the devices."""
    mesh = make_mesh(devices, ("d",), "auto")
    x, weight = draw(rng, FLOAT, (16, 8)), draw(rng, FLOAT, (24, 8))
    route = partial(jax_router.dense_router, top_k=3)
    mapped = jax.shard_map(
        lambda x, weight: route(x, weight).weights,
        mesh=mesh, in_specs=(P("d"), P()), out_specs=P("d"), check_vma=check_vma,
    )  # fmt: skip
    got = jax.jit(jax.grad(lambda x, w: (mapped(x, w) ** 2).sum(), argnums=(0, 1)))(x, weight)
    want = jax.jit(jax.grad(lambda x, w: (route(x, w).weights ** 2).sum(), argnums=(0, 1)))(x, weight)
    for mine, other in zip(got, want):
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-6)


def test_local_devices_have_their_own_results(devices, rng):
    """The same compiled call on every device."""
    logits = draw(rng, FLOAT, (6, 16))
    want = jax_router.activation_topk(logits, top_k=3)
    for device in devices:
        got = jax_router.activation_topk(jax.device_put(jnp.asarray(logits), device), top_k=3)
        assert got.expert_ids.devices() == {device}
        assert_close(got, want)
