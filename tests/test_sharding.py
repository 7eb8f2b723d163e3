"""Every op on sharded operands: two tables of docs/transformations.md, of the collectives in the compiled programs.

The results must be those of one device, and their sharding what it should be.
"""

import collections
import dataclasses
import functools
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jax_router
from cases import draw
from matrix import (
    LOGITS,
    OF_ALL_TOKENS,
    OPS,
    SHARED_BIAS,
    Case,
    Operand,
    Table,
    assert_close,
    assert_documented,
    call_counts,
    native,
)
from oracle import counts

P = PartitionSpec
MODES = {"Auto": AxisType.Auto, "Explicit": AxisType.Explicit}
COLLECTIVES = re.compile(
    r" (all-gather|all-reduce|all-to-all|collective-permute|collective-broadcast|reduce-scatter)(?:-start)?\("
)


def make_mesh(devices, names, mode):
    shape = (len(devices),) if len(names) == 1 else (2, len(devices) // 2)
    return jax.make_mesh(shape, names, (MODES[mode],) * len(names), devices=devices)


def put(mesh, array, spec):
    return jax.device_put(array, NamedSharding(mesh, P(*spec)))


def compile_and_run(function, values, mesh, specs):
    """The results, how many collectives of which kind compute them, and the types they have before compilation."""
    sharded = [put(mesh, value, spec) for value, spec in zip(values, specs)]
    with jax.set_mesh(mesh):
        compiled = jax.jit(function).lower(*sharded).compile()
        types = jax.eval_shape(function, *sharded)
        results = compiled(*sharded)
    assert "jax_router." in compiled.as_text(), "the native kernel must be what is sharded"
    return results, count_collectives(compiled), types


def count_collectives(compiled):
    return collections.Counter(COLLECTIVES.findall(compiled.as_text()))


def describe(counts):
    return ", ".join(f"{number} {kind}" for kind, number in sorted(counts.items())) or "none"


# Table: tokens sharded over every layout.

# The axes of the tokens, the mesh, and the spec of those axes.
LAYOUTS = {
    "rows": ((16,), ("d",), ("d",)),
    "rows over two mesh axes": ((16,), ("a", "b"), (("a", "b"),)),
    "batch of rows": ((8, 3), ("d",), ("d",)),
    "second axis": ((3, 8), ("d",), (None, "d")),
    "two axes": ((8, 4), ("a", "b"), ("a", "b")),
    "three axes": ((2, 8, 3), ("d",), (None, "d", None)),
}
GRADIENT_LAYOUTS = [LAYOUTS["rows"], LAYOUTS["two axes"]]

# What takes all its tokens for one problem: here it is mapped over the leading axes.
OVER_BATCHES = {
    f"{op}, one problem a batch entry": dataclasses.replace(
        case, operands=tuple(Operand(name, (20, *axes)) for name, axes, _ in case.operands)
    )
    for op, case in OPS.items()
    if op.startswith(OF_ALL_TOKENS)
}
TOKEN_OPS = {**{op: case for op, case in OPS.items() if not op.startswith(OF_ALL_TOKENS)}, **OVER_BATCHES}


def token_function(op, tokens):
    """The op with its native kernel. What takes all tokens for one problem is mapped over the leading axes here."""
    call = partial(TOKEN_OPS[op].call, implementation="native")
    for _ in tokens if op in OVER_BATCHES else ():
        call = jax.vmap(call)
    return call


@functools.cache
def on_one_device(op, tokens, floats):
    """The results of so many tokens, and the gradients in these operands."""
    case = only(TOKEN_OPS[op], floats)
    return jax.jit(case.derivative_of(token_function(op, tokens)))(*case.draw(*tokens))


def only(case, floats):
    """The case with derivatives in these operands alone."""
    return dataclasses.replace(case, floats=floats)


def jitted(op, mode, layouts, devices, gradient=False):
    """The gradient is that in the operand which is one a token: a shared one's is summed over the devices."""
    total = collections.Counter()
    case = only(TOKEN_OPS[op], TOKEN_OPS[op].floats[:1] if gradient else ())
    for tokens, axes, spec in layouts:
        function, values = case.derivative_of(token_function(op, tokens)), case.draw(*tokens)
        mesh = make_mesh(devices, axes, mode)
        specs = [spec if operand.per_token else () for operand in case.operands]
        results, counts, types = compile_and_run(function, values, mesh, specs)
        total += counts
        assert_close(results, on_one_device(op, tokens, case.floats))
        for leaf in jax.tree.leaves(results):
            assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, P(*spec)), leaf.ndim), leaf.sharding
        for leaf in jax.tree.leaves(types) if mode == "Explicit" else ():
            assert leaf.sharding.spec == P(*spec, *[None] * (leaf.ndim - len(spec))), leaf.sharding.spec
    return total


def shard_map(op, check_vma, devices):
    """Results and gradients inside of the mapped function."""
    mesh = make_mesh(devices, ("d",), "Auto")
    case = only(TOKEN_OPS[op], TOKEN_OPS[op].floats[:1])
    function, values = case.derivative_of(token_function(op, (16,))), case.draw(16)
    specs = tuple(P("d") if operand.per_token else P() for operand in case.operands)
    mapped = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=P("d"), check_vma=check_vma)
    results, counts, _ = compile_and_run(mapped, values, mesh, specs)
    assert_close(results, on_one_device(op, (16,), case.floats))
    return counts


def gradient_around_shard_map(op, check_vma, devices):
    """In every operand. The gradients of shared operands are summed over the devices, whoever does it."""
    mesh = make_mesh(devices, ("d",), "Auto")
    case = TOKEN_OPS[op]
    values = case.draw(16)
    specs = tuple(P("d") if operand.per_token else P() for operand in case.operands)
    function = token_function(op, (16,))
    mapped = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=P("d"), check_vma=check_vma)
    results, counts, _ = compile_and_run(case.derivative_of(mapped), values, mesh, specs)
    assert_close(results, on_one_device(op, (16,), case.floats), atol=1e-5)
    return counts


TOKEN_COLUMNS = {
    "Auto": partial(jitted, mode="Auto", layouts=LAYOUTS.values()),
    "Explicit": partial(jitted, mode="Explicit", layouts=LAYOUTS.values()),
    "`grad`, Auto": partial(jitted, mode="Auto", layouts=GRADIENT_LAYOUTS, gradient=True),
    "`grad`, Explicit": partial(jitted, mode="Explicit", layouts=GRADIENT_LAYOUTS, gradient=True),
    "`shard_map`, `check_vma=True`": partial(shard_map, check_vma=True),
    "`shard_map`, `check_vma=False`": partial(shard_map, check_vma=False),
    "`grad` of `shard_map`, `check_vma=True`": partial(gradient_around_shard_map, check_vma=True),
    "`grad` of `shard_map`, `check_vma=False`": partial(gradient_around_shard_map, check_vma=False),
}
TOKEN_TABLE = Table(
    "sharded tokens",
    list(TOKEN_OPS),
    list(TOKEN_COLUMNS),
    {
        (op, column): "no float operand"
        for op, case in TOKEN_OPS.items()
        for column in TOKEN_COLUMNS
        if "grad" in column and not case.floats
    },
)


@pytest.mark.parametrize(("op", "column"), TOKEN_TABLE.cells())
def test_sharded_tokens(op, column, devices):
    enter(TOKEN_TABLE, op, column, TOKEN_COLUMNS[column](op, devices=devices), devices)


def enter(table, row, column, counts, devices, axes=("d",)):
    """The document is of 8 devices.

    On fewer of them XLA may combine collectives, and along a mesh axis of one device it needs none. GPUs have a
    reduce-scatter for an all-reduce of which each device keeps a part. But there are no others than documented, and not
    none instead where every mesh axis has several devices.
    """
    if len(devices) == 8:
        return table.enter(row, column, describe(counts))
    counts = collections.Counter("all-reduce" if kind == "reduce-scatter" else kind for kind in counts.elements())
    text = table.documented()[row, column]
    documented = collections.Counter({kind: int(number) for number, kind in re.findall(r"(\d+) ([a-z-]+)", text)})
    assert counts <= documented, f"{describe(counts)}, but {text} are documented"
    if len(devices) >= 2 ** len(axes):
        assert bool(counts) == bool(documented), f"{describe(counts)}, but {text} are documented"


# Table: other axes sharded, and what is exchanged then.


def call_with_bias(logits, bias, **options):
    return jax_router.activation_topk(logits, bias, top_k=3, **options)


BIASED = Case(call_with_bias, (LOGITS, SHARED_BIAS), (0,))
DENSE, DENSE_BIASES = OPS["dense_router"], OPS["dense_router, biases"]

# The op, the mesh axes, and the specs of the operands.
EXCHANGES = {
    "`activation_topk`: logits over E": (OPS["activation_topk"], ("d",), [(None, "d")]),
    "logits over E, tokens over another axis": (OPS["activation_topk"], ("a", "b"), [("a", "b")]),
    "logits and bias over E": (BIASED, ("d",), [(None, "d"), ("d",)]),
    "bias over E, tokens over the same axis": (BIASED, ("d",), [("d",), ("d",)]),
    "softmax of all: logits over E": (OPS["activation_topk, softmax of all, mask"], ("d",), [(None, "d"), ()]),
    "`topk_select`: scores over L": (OPS["topk_select"], ("d",), [(None, "d")]),
    "`route_at`: logits over E": (OPS["route_at"], ("d",), [(None, "d"), ()]),
    "`scored_hash_router`: logits over E": (OPS["scored_hash_router"], ("d",), [(None, "d"), (), ()]),
    "`hash_router`: table over V": (OPS["hash_router"], ("d",), [(), ("d",)]),
    "table over V, tokens over the same axis": (OPS["hash_router"], ("d",), [("d",), ("d",)]),
    "`expert_dispatch`: tokens, one sort": (OPS["expert_dispatch"], ("d",), [("d",)]),
    "`permute`: tokens, one sort": (OPS["permute"], ("d",), [("d",), ("d",)]),
    "`combine`: tokens, one sort": (OPS["combine"], ("d",), [("d",), ("d",), ("d",)]),
    "`expert_counts`: tokens and mask": (OPS["expert_counts, mask"], ("d",), [("d",), ("d",)]),
    "tokens alone": (OPS["expert_counts, mask"], ("d",), [("d",), ()]),
    "`dense_router`: x and weight over D": (DENSE, ("d",), [(None, "d"), (None, "d")]),
    "x and weight over D, tokens over another axis": (DENSE, ("a", "b"), [("a", "b"), (None, "b")]),
    "weight over D": (DENSE, ("d",), [(), (None, "d")]),
    "x over D": (DENSE, ("d",), [(None, "d"), ()]),
    "weight over E": (DENSE, ("d",), [(), ("d",)]),
    "weight over E, tokens over another axis": (DENSE, ("a", "b"), [("a",), ("b",)]),
    "weight and biases over E": (DENSE_BIASES, ("d",), [(), ("d",), ("d",), ("d",)]),
    "weight over D, tokens over the same axis": (DENSE, ("d",), [("d",), (None, "d")]),
    "weight over E, tokens over the same axis": (DENSE, ("d",), [("d",), ("d",)]),
    "weight and biases over E, tokens over the same axis": (DENSE_BIASES, ("d",), [("d",)] * 4),
}
EXCHANGE_TABLE = Table(
    "other axes",
    list(EXCHANGES),
    ["Auto", "Explicit", "`grad`, Auto", "`grad`, Explicit"],
    {
        (row, column): "no float operand"
        for row, (case, *_) in EXCHANGES.items()
        for column in ("`grad`, Auto", "`grad`, Explicit")
        if not case.floats
    },
)


@pytest.mark.parametrize(("row", "column"), EXCHANGE_TABLE.cells())
def test_other_axes(row, column, devices):
    check_other_axes(row, column, devices)


@pytest.mark.parametrize("row", [row for row, column in EXCHANGE_TABLE.cells() if column == "`grad`, Auto"])
def test_other_axes_of_two_devices(row, devices):
    """As on a machine with two devices: a mesh of two axes has one device along the second."""
    check_other_axes(row, "`grad`, Auto", devices[:2])


@functools.cache
def exchange(row, gradient):
    """The function of a row, its operands, and its results on one device."""
    case = EXCHANGES[row][0]
    values = case.draw(16)
    if row.startswith(("`hash_router`", "table")):
        values[1] = np.concatenate([values[1], values[1][:4]])  # 16 rows
    function = case.derivative_of(case.call) if gradient else case.call
    return function, values, jax.jit(function)(*values)


def check_other_axes(row, column, devices):
    """A gradient has the sharding of its operand where that is part of the type."""
    case, axes, specs = EXCHANGES[row]
    function, values, want = exchange(row, column.startswith("`grad`"))
    mesh = make_mesh(devices, axes, mode=column.split()[-1])
    results, counts, types = compile_and_run(function, values, mesh, specs)
    assert_close(results, want)
    if column == "`grad`, Explicit":
        for index, leaf in zip(case.floats, types[1]):
            assert leaf.sharding.spec == P(*specs[index], *[None] * (leaf.ndim - len(specs[index])))
    enter(EXCHANGE_TABLE, row, column, counts, devices, axes)


@pytest.mark.parametrize("table", [TOKEN_TABLE, EXCHANGE_TABLE], ids=lambda table: table.name)
def test_document(table):
    assert_documented(table)


# What the tables do not show


@pytest.mark.parametrize("op", OPS)
def test_reference_in_an_explicit_mesh(op, devices):
    """The reference, and so the lowering where there is no kernel, takes what the kernels take."""
    mesh = make_mesh(devices, ("d",), "Explicit")
    case = OPS[op]
    function = case.derivative_of(partial(case.call, implementation="reference"))
    values = case.draw(16)
    for axis in (0, -1):
        specs = [
            P(*("d" if i == axis % value.ndim and size == 16 else None for i, size in enumerate(value.shape)))
            for value in values
        ]
        with jax.set_mesh(mesh):
            results = jax.jit(function)(*(put(mesh, value, spec) for value, spec in zip(values, specs)))
        assert_close(results, jax.jit(function)(*values))


def test_without_a_kernel_in_an_explicit_mesh(devices):
    """The lowering of what no kernel takes: more experts than one can, with operands that vmap shards apart."""
    mesh = make_mesh(devices, ("d",), "Explicit")
    rng = np.random.default_rng(0)
    logits, masks = rng.normal(0, 1, (5, 5000)).astype(np.float32), rng.random((16, 5)) < 0.5
    function = MASKED.derivative_of(jax.vmap(MASKED.call, in_axes=(None, 0)))
    with jax.set_mesh(mesh):
        results = jax.jit(function)(put(mesh, logits, ()), put(mesh, masks, ("d",)))
    assert results[0].expert_ids.sharding.spec == P("d", None, None)
    assert_close(results, jax.jit(function)(logits, masks), atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_dispatch_of_tokens_in_several_axes(mode, implementation, devices):
    """One sort of all tokens, whichever of their axes is sharded."""
    mesh = make_mesh(devices, ("d",), mode)
    (ids,) = OPS["expert_dispatch"].draw(3, 8)
    dispatch = jax.jit(partial(OPS["expert_dispatch"].call, implementation=implementation))
    with jax.set_mesh(mesh):
        results = dispatch(put(mesh, ids, (None, "d")))
    assert_close(results, dispatch(ids))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("axes", [("d",), ("a", "b")])
def test_counts_of_tokens_in_several_axes(axes, mode, devices):
    """Whichever of them are sharded, nothing moves but counts: an all-reduce for each mesh axis, and the same bits."""
    mesh = make_mesh(devices, axes, mode)
    call, values = native("expert_counts, mask"), OPS["expert_counts, mask"].draw(8, 24)
    want = jax.jit(call)(*values)
    for spec in [axes, axes[::-1]] if len(axes) == 2 else [("d",), (None, "d")]:
        results, moved, _ = compile_and_run(call, values, mesh, [spec, spec])
        assert set(moved) == {"all-reduce"}
        assert moved["all-reduce"] <= len(axes)
        np.testing.assert_array_equal(results, want)


@pytest.mark.parametrize("check_vma", [True, False])
def test_counts_inside_shard_map(check_vma, implementation, devices):
    """Of a device's own tokens, and with an axis of all: there a single kernel, whose result is replicated."""
    mesh = make_mesh(devices, ("d",), "Auto")
    ids, mask = OPS["expert_counts, mask"].draw(64)

    def mapped(axis_name, out_specs):
        def count(ids, mask):
            return call_counts(ids, mask, axis_name=axis_name, implementation=implementation)

        return jax.jit(
            jax.shard_map(count, mesh=mesh, in_specs=(P("d"), P("d")), out_specs=out_specs, check_vma=check_vma)
        )

    np.testing.assert_array_equal(mapped("d", P())(ids, mask), counts(ids, 16, mask))
    own = [
        counts(*part) for part in zip(np.split(ids, len(devices)), [16] * len(devices), np.split(mask, len(devices)))
    ]
    np.testing.assert_array_equal(mapped(None, P("d"))(ids, mask), np.concatenate(own))


def test_counts_over_a_named_axis_of_vmap(implementation, rng):
    ids = draw(rng, "ids", 3, 10, 2)
    count = partial(jax_router.expert_counts, num_experts=16, axis_name="replica", implementation=implementation)
    got = jax.vmap(count, axis_name="replica")(ids)
    np.testing.assert_array_equal(got, [counts(ids, 16)] * 3)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("modes", [("Auto", "Explicit"), ("Explicit", "Auto"), ("Explicit", "Explicit")], ids="-".join)
def test_mixed_meshes(modes, check_vma, devices):
    """Meshes with axes of both kinds, and `shard_map` over one axis of two, which is no worse than for `jnp.sin`."""
    mesh = jax.make_mesh((2, len(devices) // 2), ("a", "b"), tuple(MODES[mode] for mode in modes), devices=devices)
    case = OPS["activation_topk"]
    values, function = case.draw(8, 8), case.derivative_of(native("activation_topk"))
    want = jax.jit(function)(*values)
    results, counts, _ = compile_and_run(function, values, mesh, [("a", "b")])
    assert not counts
    assert_close(results, want)

    def over_a(function):
        return jax.shard_map(
            function, mesh=mesh, in_specs=P("a"), out_specs=P("a"), axis_names={"a"}, check_vma=check_vma
        )  # fmt: skip

    results, counts, _ = compile_and_run(over_a(native("activation_topk")), values, mesh, [("a", "b")])
    assert_close(results, want[0])
    with jax.set_mesh(mesh):
        least = jax.jit(over_a(jnp.sin)).lower(put(mesh, values[0], ("a", "b"))).compile()
    assert counts <= count_collectives(least)


@pytest.mark.parametrize("implementation", ["native", "reference"])
@pytest.mark.parametrize("op", ["activation_topk, bias", "scored_hash_router"])
def test_gradient_of_shard_map_over_one_axis(op, implementation, devices):
    """Beside an Explicit one, over which the tokens may be sharded too."""
    mesh, case = make_mesh(devices, ("a", "b"), "Explicit"), OPS[op]
    values = case.draw(8, 8)
    want = jax.jit(case.derivative_of(native(op)))(*values)
    in_specs = tuple(P("a") if operand.per_token else P() for operand in case.operands)
    call = partial(case.call, implementation=implementation)
    mapped = jax.shard_map(call, mesh=mesh, in_specs=in_specs, out_specs=P("a"), axis_names={"a"})
    for spec in ("a",), ("a", "b"):
        placed = [put(mesh, value, spec if operand.per_token else ()) for value, operand in zip(values, case.operands)]
        with jax.set_mesh(mesh):
            assert_close(jax.jit(case.derivative_of(mapped))(*placed), want)


def call_with_mask(logits, mask, **options):
    return jax_router.activation_topk(logits, top_k=3, token_mask=mask, **options)


MASKED = Case(call_with_mask, (LOGITS, Operand("mask", ())), (0,))


@pytest.mark.parametrize("mode", MODES)
def test_operands_sharded_in_conflict(mode, devices):
    """Tokens that two operands shard differently: the results are sharded as the first one, and right."""
    mesh = make_mesh(devices, ("a", "b"), mode)
    rng = np.random.default_rng(0)
    logits, mask = rng.normal(0, 1, (8, 8, 16)).astype(np.float32), rng.random((8, 8)) < 0.5

    function = MASKED.derivative_of(MASKED.call)
    for specs in ([("a",), (None, "a")], [(None, "a"), ("a",)], [("a",), ("b", "a")], [(), ("b",)]):
        results, _, types = compile_and_run(function, [logits, mask], mesh, specs)
        assert_close(results, jax.jit(function)(logits, mask))
        if mode == "Explicit":
            (weights, _), (cotangent,) = types
            assert all(mine is None or mine == its for mine, its in zip(specs[0], weights.sharding.spec))
            assert cotangent.sharding.spec == P(*specs[0], *[None] * (3 - len(specs[0])))


@pytest.mark.parametrize("mode", MODES)
def test_vmap_over_a_sharded_axis_of_one_operand(mode, devices):
    """The gradient in the operand that is not mapped has that operand's type."""
    mesh = make_mesh(devices, ("d",), mode)
    (logits, _), (_, masks) = MASKED.draw(5), MASKED.draw(16, 5)
    function = MASKED.derivative_of(jax.vmap(MASKED.call, in_axes=(None, 0)))
    results, _, types = compile_and_run(function, [logits, masks], mesh, [(), ("d",)])
    assert_close(results, jax.jit(function)(logits, masks), atol=1e-5)
    if mode == "Explicit":
        assert types[1][0].sharding.spec == P(None, None)
        assert types[0].weights.sharding.spec == P("d", None, None)


@pytest.mark.parametrize(
    ("op", "implementation"),
    [(op, how) for op in OPS if not op.startswith(OF_ALL_TOKENS) for how in ("auto", "reference")]
    + [(op, "native") for op in ("hash_router", "route_at", "scored_hash_router")],  # "auto" is another way there
)
def test_vmap_of_each_operand_over_a_sharded_axis(op, implementation, devices):
    """The others are shared, with tokens that are sharded over another axis of the mesh."""
    mesh, case = make_mesh(devices, ("a", "b"), "Explicit"), OPS[op]
    shared = case.draw(16)
    for index, operand in enumerate(case.operands):
        tokens = [("b",) if operand.per_token else () for operand in case.operands]
        values, specs = list(shared), list(tokens)
        values[index] = np.stack([np.roll(shared[index], n, axis=0) for n in range(4)])
        specs[index] = ("a", *tokens[index])
        axes = [0 if i == index else None for i in range(len(values))]
        mapped = jax.jit(jax.vmap(case.derivative_of(partial(case.call, implementation=implementation)), axes))
        with jax.set_mesh(mesh):
            results = mapped(*(put(mesh, value, spec) for value, spec in zip(values, specs)))
        assert_close(results, mapped(*values), atol=1e-5)
        if operand.name != "lut" or implementation != "native":  # which has all tables on every device
            assert {leaf.sharding.spec[:2] for leaf in jax.tree.leaves(results[0])} == {("a", "b")}


@pytest.mark.parametrize("op", ["activation_topk, bias a token, groups, mask", "route_at", "dense_router, biases"])
def test_constants_beside_sharded_operands(op, devices):
    """Operands that are no argument of the compiled function have no mesh in their types."""
    mesh = make_mesh(devices, ("d",), "Explicit")
    values = OPS[op].draw(16)
    want = jax.jit(OPS[op].call)(*values)
    for index, (value, operand) in enumerate(zip(values, OPS[op].operands)):

        def function(value, index=index):
            return OPS[op].call(*values[:index], value, *values[index + 1 :])

        results = jax.jit(function)(put(mesh, value, ("d",)))
        assert_close(results, want)
        if operand.per_token:
            assert results.weights.sharding.spec == P("d", None)


def test_shard_map_knows_that_results_vary(devices):
    """Where the first operand is replicated and another one is not, the results are not; nor may they pass for it."""
    mesh = make_mesh(devices, ("d",), "Auto")
    rng = np.random.default_rng(0)
    logits, mask = rng.normal(0, 1, (2, 16)).astype(np.float32), rng.random(2 * len(devices)) < 0.7

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


def test_exported_programs(devices):
    """With sizes in numbers they are sharded as any other; with symbolic ones the tokens are gathered."""
    mesh = make_mesh(devices, ("d",), "Auto")
    tokens = NamedSharding(mesh, P("d"))
    (logits,) = OPS["activation_topk"].draw(2 * len(devices))
    safe = [export.DisabledSafetyCheck.custom_call(target) for target in jax_router.custom_call_targets()]
    counts = {}
    for shape in (str(logits.shape[0]), f"{len(devices)}*n"):
        aval = jax.ShapeDtypeStruct(export.symbolic_shape(f"{shape}, 16"), jnp.float32, sharding=tokens)
        program = jax.jit(OPS["activation_topk"].call, in_shardings=tokens)
        exported = jax.jit(export.export(program, disabled_checks=safe)(aval).call)
        compiled = exported.lower(jax.device_put(logits, tokens)).compile()
        counts["n" in shape] = describe(count_collectives(compiled))
        assert_close(compiled(jax.device_put(logits, tokens)), OPS["activation_topk"].call(logits))
    assert counts == {False: "none", True: "1 all-gather"}


def test_local_devices_have_their_own_results(devices):
    """The same compiled call on every device."""
    (logits,) = OPS["activation_topk"].draw(6)
    want = jax_router.activation_topk(logits, top_k=3)
    for device in devices:
        got = jax_router.activation_topk(jax.device_put(jnp.asarray(logits), device), top_k=3)
        assert got.expert_ids.devices() == {device}
        assert_close(got, want)
