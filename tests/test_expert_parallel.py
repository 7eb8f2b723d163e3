"""Experts over several devices, in both ways and for every load, beside all experts on one device."""

import collections
import math
import re
from functools import partial
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jax_router import Routing, expert_parallel, grouped_matmul
from matrix import assert_close

pytestmark = pytest.mark.usefixtures("f32_products")

WAYS = get_args(expert_parallel.Way)
AXIS = "expert"
TOKENS, HIDDEN, INNER, TOP_K = 6, 8, 12, 3  # tokens of a device
LOADS = ("even", "skewed", "one device", "one expert", "half of the devices", "invalid ids", "none")


@pytest.fixture(autouse=True)
def as_exact_as_a_cpu():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def mesh(devices):
    return jax.make_mesh((len(devices),), (AXIS,), (AxisType.Auto,), devices=devices)


def draw(devices, load="even", dtype=jnp.float32, seed=0):
    """Tokens, weights and ids of the choices, weights of two experts a device."""
    rng = np.random.default_rng(seed)
    tokens, experts = TOKENS * devices, 2 * devices
    probabilities = np.arange(1.0, experts + 1) ** (-1.5 if load == "skewed" else 0)
    scores = np.log(probabilities) + rng.gumbel(size=(tokens, experts))
    ids = np.argsort(-scores, axis=1)[:, :TOP_K].astype(np.int32)
    if load == "one device":
        ids = 2 * (devices - 1) + ids % 2
    elif load == "one expert":
        ids[:] = 1
    elif load == "half of the devices":  # the others have no token with an expert
        ids[: tokens // 2] = -1
    elif load == "invalid ids":
        ids.flat[::3] = rng.choice([-1, -(2**31), 2**31 - 1, experts, -experts], ids.size // 3)
    elif load == "none":
        ids[:] = -1
    arrays = [
        rng.normal(size=(tokens, HIDDEN)),
        rng.uniform(0.1, 1, (tokens, TOP_K)),
        rng.normal(size=(experts, HIDDEN, INNER)) * HIDDEN**-0.5,
        rng.normal(size=(experts, INNER, HIDDEN)) * INNER**-0.5,
    ]
    x, weights, w_in, w_out = (jnp.asarray(array, jnp.float32) for array in arrays)
    return x.astype(dtype), weights, jnp.asarray(ids), w_in.astype(dtype), w_out.astype(dtype)


def with_weights(weights, rows, group_sizes):
    w_in, w_out = weights
    return grouped_matmul(jax.nn.silu(grouped_matmul(rows, w_in, group_sizes)), w_out, group_sizes)


def layer(x, weights, expert_ids, w_in, w_out, **options):
    """On a device, with its own tokens and experts."""
    options |= {"num_experts": len(w_in) * jax.lax.axis_size(AXIS), "axis_name": AXIS}
    return expert_parallel.compute(x, Routing(weights, expert_ids), partial(with_weights, (w_in, w_out)), **options)


def mapped(mesh, **options):
    out = expert_parallel.ExpertSum(P(AXIS), P())
    return jax.shard_map(partial(layer, **options), mesh=mesh, in_specs=P(AXIS), out_specs=out)


def on_one_device(x, weights, expert_ids, w_in, w_out, computed=None):
    """By every expert for every token. `computed` says which choices are."""
    chosen = expert_ids[..., None] == jnp.arange(len(w_in), dtype=jnp.int32)[None, None]
    share = jnp.where(chosen, weights[..., None], 0)
    if computed is not None:
        share = jnp.where(computed[..., None], share, 0)
    x, w_in, w_out = (array.astype(jnp.float32) for array in (x, w_in, w_out))
    inner = jax.nn.silu(jnp.einsum("nd,edf->nef", x, w_in, precision="highest"))
    return jnp.einsum("nef,efd,ne->nd", inner, w_out, share.sum(axis=1), precision="highest")


def with_gradients(function):
    """Output, count, and the gradients in all float operands."""

    def run(x, weights, expert_ids, w_in, w_out):
        def loss(x, weights, w_in, w_out):
            result = function(x, weights, expert_ids, w_in, w_out)
            output = result.output if isinstance(result, expert_parallel.ExpertSum) else result
            return (output.astype(jnp.float32) ** 2).sum(), result

        gradient, result = jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(x, weights, w_in, w_out)
        return result, gradient

    return jax.jit(run)


@pytest.fixture(scope="module")
def programs(mesh):
    """One of each way for all loads."""
    return {way: with_gradients(mapped(mesh, way=way)) for way in WAYS}


def count_collectives(text):
    kinds = r" (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
    return collections.Counter(re.findall(kinds, text))


expected = with_gradients(on_one_device)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("load", LOADS)
def test_is_the_layer_of_one_device(way, load, programs, mesh):
    """Results and all gradients, by one program for all loads."""
    operands = draw(mesh.size, load)
    (output, dropped), gradients = programs[way](*operands)
    assert_close((output, gradients), expected(*operands), rtol=1e-4, atol=1e-5)
    assert dropped == 0
    assert programs[way]._cache_size() == 1


@pytest.mark.parametrize("load", ["even", "invalid ids"])
def test_ways_agree(load, programs, mesh):
    """To the order of sums over devices; and each with itself, bit for bit."""
    operands = draw(mesh.size, load)
    gather, exchange = (programs[way](*operands) for way in ("gather", "exchange"))
    assert_close(gather, exchange, rtol=1e-5, atol=1e-6)
    assert_close(exchange, programs["exchange"](*operands), rtol=0, atol=0)


@pytest.mark.parametrize("way", WAYS)
def test_what_a_masked_token_holds_goes_nowhere(way, programs, mesh):
    """NaN in tokens without experts, and in weights of choices without one."""
    x, weights, ids, *experts = draw(mesh.size, "invalid ids")
    ids = ids.at[::5].set(-1)
    is_valid = (ids >= 0) & (ids < 2 * mesh.size)
    clean, poisoned = (
        programs[way](
            jnp.where(is_valid.any(axis=1, keepdims=True), x, value), jnp.where(is_valid, weights, value), ids, *experts
        )
        for value in (0, jnp.nan)
    )
    assert_close(poisoned, clean, rtol=0, atol=0)


def test_weights_of_the_input(mesh):
    """As those of the output, for experts that are linear."""
    x, weights, ids, *_ = draw(mesh.size)

    def run(weigh):
        def call(x, weights, ids):
            options = {"num_experts": 2 * mesh.size, "axis_name": AXIS, "way": "exchange", "weigh": weigh}
            return expert_parallel.compute(x, Routing(weights, ids), lambda rows, _: 2 * rows, **options).output

        mapped = jax.shard_map(call, mesh=mesh, in_specs=P(AXIS), out_specs=P(AXIS))
        return jax.jit(jax.value_and_grad(lambda *args: (mapped(*args, ids) ** 2).sum(), argnums=(0, 1)))(x, weights)

    assert_close(run("input"), run("output"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_x64(way, mesh):
    """Maps stay int32, and ids may be int64."""
    with jax.enable_x64(True):
        x, weights, ids, *experts = draw(mesh.size)
        function = mapped(mesh, way=way, rows=9)
        result = jax.eval_shape(function, x, weights, ids.astype(jnp.int64), *experts)
        jaxpr = str(jax.make_jaxpr(function)(x, weights, ids, *experts))
    assert (result.output.dtype, result.dropped.dtype) == (jnp.float32, jnp.int32)
    assert not re.search(r"[if]64\[\d", jaxpr)


@pytest.mark.parametrize("way", WAYS)
def test_bf16(way, mesh):
    operands = draw(mesh.size, dtype=jnp.bfloat16)
    (output, _), gradients = with_gradients(mapped(mesh, way=way, align=4))(*operands)
    assert output.dtype == gradients[0].dtype == jnp.bfloat16
    want = expected(*operands)
    for got, exact in zip(jax.tree.leaves((output, gradients)), jax.tree.leaves(want)):
        apart = np.asarray(got, np.float32) - np.asarray(exact, np.float32)
        assert np.linalg.norm(apart) < 0.02 * np.linalg.norm(np.asarray(exact, np.float32))


def fits_in_slots(ids, devices, slots):
    """A device sends the first tokens that have an expert there."""
    fits = np.zeros(ids.shape, bool)
    for source in np.split(np.arange(len(ids)), devices):
        for target in range(devices):
            wanted = ids[source] // 2 == target
            sent = source[wanted.any(axis=1)][:slots]
            fits[sent] |= ids[sent] // 2 == target
    return fits


def fits_in_rows(ids, devices, rows):
    """A device computes its first rows, by expert and token."""
    fits = np.zeros(ids.shape, bool)
    for target in range(devices):
        choices = [(ids[n, j], n, j) for n, j in zip(*np.nonzero(ids // 2 == target))]
        for _, n, j in sorted(choices)[:rows]:
            fits[n, j] = True
    return fits


@pytest.mark.parametrize(
    ("options", "fits", "limit"),
    [
        ({"way": "exchange", "slots": 2}, fits_in_slots, 2),
        ({"way": "exchange", "slots": 0}, fits_in_slots, 0),
        ({"way": "exchange", "slots": TOKENS + 1, "rows": 9}, fits_in_rows, 9),
        ({"way": "gather", "rows": 9}, fits_in_rows, 9),
    ],
    ids=["slots", "no slots", "rows, and more slots than tokens", "rows of gather"],
)
def test_limits(options, fits, limit, mesh):
    """What does not fit adds nothing, to results and gradients, and is counted."""
    operands = draw(mesh.size, "skewed")
    computed = fits(np.asarray(operands[2]), mesh.size, limit)
    assert not computed.all()
    (output, dropped), gradients = with_gradients(mapped(mesh, **options))(*operands)
    want = with_gradients(partial(on_one_device, computed=jnp.asarray(computed)))(*operands)
    assert_close((output, gradients), want, rtol=1e-4, atol=1e-5)
    assert dropped == (~computed).sum()


COLLECTIVES = {
    "gather": {"all-gather": 2, "reduce-scatter": 1},
    "exchange": {"all-to-all": 3},
}


@pytest.mark.parametrize("way", WAYS)
def test_collectives(way, mesh):
    """What moves: tokens and their choices there, sums back. Nothing goes to the host."""
    text = jax.jit(mapped(mesh, way=way)).lower(*draw(mesh.size)).compile().as_text()
    found = count_collectives(text)
    assert found.keys() == COLLECTIVES[way].keys()
    assert all(found[kind] <= number for kind, number in COLLECTIVES[way].items())  # XLA may combine some
    assert not re.search("callback|outfeed|infeed", text)


@pytest.mark.parametrize(
    ("mode", "batch", "way"),
    [("Auto", (3, 3), "gather"), ("Explicit", (3, 2), "exchange"), ("Auto", (0, 2), "gather")],
    ids=str,
)
def test_over_mesh(mode, batch, way, devices):
    """Tokens in two axes, of a number that the devices do not divide, or none; along two axes of the mesh."""
    mesh = jax.make_mesh((2, len(devices) // 2), ("data", AXIS), (AxisType[mode],) * 2, devices=devices)
    x, weights, ids, w_in, w_out = draw(len(devices))
    tokens = math.prod(batch)
    x, weights, ids = (array[:tokens].reshape(*batch, array.shape[-1]) for array in (x, weights, ids))
    w_in, w_out, ids = w_in[: len(devices)], w_out[: len(devices)], ids % len(devices)

    def over_mesh(x, weights, ids, w_in, w_out):
        options = {"expert_axis": AXIS, "way": way, "rows": 99}
        return expert_parallel.over_mesh(x, Routing(weights, ids), with_weights, (w_in, w_out), **options)

    def flat(x, weights, ids, w_in, w_out):
        return on_one_device(
            *(array.reshape(tokens, array.shape[-1]) for array in (x, weights, ids)), w_in, w_out
        ).reshape(x.shape)

    with jax.set_mesh(mesh):
        specs = (*[P(None, "data") if mode == "Explicit" else P()] * 3, P(AXIS), P(AXIS))
        operands = [
            jax.device_put(array, jax.NamedSharding(mesh, spec))
            for array, spec in zip((x, weights, ids, w_in, w_out), specs)
        ]
        (output, dropped), gradients = with_gradients(over_mesh)(*operands)
    want = with_gradients(flat)(x, weights, ids, w_in, w_out)
    assert_close((output, gradients), want, rtol=1e-4, atol=1e-5)
    assert dropped == 0
    if mode == "Explicit":
        assert output.sharding.spec[:2] == (None, "data")


@pytest.mark.skipif(jax.__version_info__ < (0, 10, 2), reason="JAX lowers no axis_index in nested shard_maps")
@pytest.mark.parametrize("mode", ["Auto", "Explicit"])
@pytest.mark.parametrize("data_axes", [None, ()])
def test_over_mesh_in_shard_map_over_another_axis(data_axes, mode, devices):
    """The tokens there are those of a device along that axis, and split over the experts' axis alone."""
    mesh = jax.make_mesh((2, len(devices) // 2), ("data", AXIS), (AxisType[mode],) * 2, devices=devices)
    x, weights, ids, w_in, w_out = draw(len(devices))

    def local(x, weights, ids, w_in, w_out):
        options = {"expert_axis": AXIS, "data_axes": data_axes}
        return expert_parallel.over_mesh(x, Routing(weights, ids), with_weights, (w_in, w_out), **options).output

    data = P("data")
    with jax.set_mesh(mesh):
        call = jax.shard_map(local, in_specs=(data, data, data, P(), P()), out_specs=data, axis_names={"data"})
        tokens = jax.device_put((x, weights, ids), jax.NamedSharding(mesh, data))
        output = jax.jit(call)(*tokens, w_in, w_out)
    assert_close(output, on_one_device(x, weights, ids, w_in, w_out), rtol=1e-4, atol=1e-5)


def test_under_remat_and_scan(mesh):
    """Two layers, whose tokens are moved again in the backward pass."""
    operands = draw(mesh.size)

    def twice(function, *operands):
        def step(x, _):
            return jax.checkpoint(function)(x, *operands[1:]), None

        return jax.lax.scan(step, operands[0], length=2)[0]

    def sharded(*operands):
        return mapped(mesh, way="exchange")(*operands).output

    got, want = (with_gradients(partial(twice, function))(*operands) for function in (sharded, on_one_device))
    assert_close(got, want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_experts": 13}, ValueError, "devices of axis_name = 'expert' must divide num_experts, got 13"),
        ({"way": "ragged"}, ValueError, "way must be one of 'auto', 'gather', 'exchange'; got 'ragged'"),
        ({"way": "gather", "slots": 4}, ValueError, "slots must be None with way='gather', which has none, got 4"),
        ({"slots": -1}, ValueError, "slots must be at least 0, got -1"),
        ({"rows": 2.5}, TypeError, "rows must be a Python int"),
        ({"rows": 9, "align": 2}, ValueError, "rows must be a multiple of align = 2, got 9"),
        ({"weigh": "both"}, ValueError, "weigh must be one of 'output', 'input'; got 'both'"),
        (
            {"experts": lambda rows, sizes: rows[1:]},
            ValueError,
            "experts must return rows of shape (",
        ),
        ({"axis_name": "nowhere"}, NameError, "nowhere"),
        ({"axis_name": None}, TypeError, "axis_name must be a mesh axis or a sequence of them, strings, got None"),
        ({"experts": None}, TypeError, "experts must be a function, one by grouped_matmul for example, got None"),
        ({"links": {"latency": 1e-5}}, TypeError, "links must be of type Links, Links(all_to_all=257e9) for example"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_errors(options, error, message, mesh):
    experts = options.pop("experts", lambda rows, sizes: rows)
    options = {"num_experts": 16, "axis_name": AXIS} | options

    def call(x, weights, expert_ids):
        return expert_parallel.compute(x, Routing(weights, expert_ids), experts, **options).output

    x, weights, expert_ids, *_ = draw(mesh.size)
    with pytest.raises(error, match=re.escape(message)):
        jax.eval_shape(jax.shard_map(call, mesh=mesh, in_specs=P(AXIS), out_specs=P(AXIS)), x, weights, expert_ids)


OVER_MESH_ERRORS = {
    "tokens": ({"x": jnp.zeros((4, 8))}, "x must have shape (5, 'D'), with the tokens of routing; got (4, 8)"),
    "choices": ({"weights": jnp.zeros((5, 3))}, "routing.weights must have shape (5, 2), got (5, 3)"),
    "experts": ({"parameters": (jnp.zeros((4, 1)), jnp.zeros(()))}, "weights must be arrays [E, ...] with one E"),
    "division": (
        {"parameters": jnp.zeros((13, 1))},
        "devices of expert_axis = 'expert' must divide num_experts, got 13",
    ),
    "axis": (
        {"expert_axis": "nowhere"},
        "expert_axis must be an axis of the mesh, which has ('expert',), got 'nowhere'",
    ),
    "data axis": (
        {"data_axes": "nowhere"},
        "data_axes must be some of the mesh's other axes, [], got ('nowhere',)",
    ),
    "no data axis": ({"data_axes": 1}, "data_axes must be a mesh axis or a sequence of them, strings, got 1"),
    "no axis": ({"expert_axis": 0}, "expert_axis must be a mesh axis, a string, got 0"),
    "the same axis twice": (
        {"data_axes": ["expert"]},
        "data_axes must be some of the mesh's other axes, [], got ('expert',)",
    ),
    "a number": ({"parameters": (jnp.zeros((16, 1)), 1.0)}, "weights must be arrays [E, ...] with one E"),
}


@pytest.mark.parametrize(("change", "message"), OVER_MESH_ERRORS.values(), ids=OVER_MESH_ERRORS)
def test_errors_over_mesh(change, message, mesh):
    parts = {
        "x": jnp.zeros((5, 8)),
        "weights": jnp.zeros((5, 2)),
        "parameters": jnp.zeros((16, 1)),
        "expert_axis": AXIS,
    }
    x, weights, parameters, *axes = (parts | change).values()
    options = dict(zip(("expert_axis", "data_axes"), axes))
    routing = Routing(weights, jnp.zeros((5, 2), jnp.int32))
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        expert_parallel.over_mesh(x, routing, with_weights, parameters, mesh=mesh, **options)


def test_errors_of_a_mesh():
    routing = Routing(jnp.zeros((5, 2)), jnp.zeros((5, 2), jnp.int32))
    over_mesh = partial(
        expert_parallel.over_mesh, jnp.zeros((5, 8)), routing, with_weights, jnp.zeros((16, 1)), expert_axis=AXIS
    )
    with pytest.raises(TypeError, match=r"mesh must be a jax.sharding.Mesh, .* got 'mesh'"):
        over_mesh(mesh="mesh")
    with pytest.raises(ValueError, match=r"mesh must have Auto axes or be that of jax.set_mesh, got .*'expert'"):
        over_mesh(mesh=jax.make_mesh((jax.device_count(),), (AXIS,), (jax.sharding.AxisType.Explicit,)))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda of: of.expected_slots(1.5, 2, 2), TypeError, "tokens must be a Python int"),
        (lambda of: of.expected_slots(8, 2, 0), ValueError, "devices must be at least 1, got 0"),
        (lambda of: of.expected_slots(8, 2, 2, headroom=-1), ValueError, "headroom must be 0 or more, got -1"),
        (lambda of: of.Links(all_to_all=0), ValueError, "all_to_all must be above 0 bytes a second, got 0"),
        (lambda of: of.Links(memory="fast"), TypeError, "memory must be a Python number"),
        (lambda of: of.Links(latency=-1e-5), ValueError, "latency must be 0 or more"),
        (lambda of: of.choose_way(None, devices=2, tokens=8, hidden=8), TypeError, "links must be of type Links"),
        (lambda of: of.choose_way(of.Links(), devices=2, tokens=8, hidden=None), TypeError, "hidden must be"),
        (lambda of: of.Links().seconds("ragged", devices=2, tokens=8, hidden=8), ValueError, "way must be one of"),
        (lambda of: of.Links().seconds("exchange", devices=2, tokens=8, hidden=8, slots=-1), ValueError, "slots must"),
    ],
)
def test_errors_of_a_choice(call, error, message):
    with pytest.raises(error, match=message):
        call(expert_parallel)


def test_choice_of_way():
    """Few devices that hold most tokens' experts anyway; many, to which few tokens go."""
    few, many = ({"devices": n, "tokens": 8192, "hidden": 4096} for n in (4, 64))
    links = expert_parallel.Links(all_to_all=2e11, all_gather=2e11, reduce_scatter=2e11)
    assert expert_parallel.choose_way(links, **few) == "gather"
    slots = expert_parallel.expected_slots(8192, 6, 64, headroom=1.25)
    assert slots == math.ceil(1.25 * 8192 * (1 - (63 / 64) ** 6))
    assert expert_parallel.choose_way(links, **many, slots=slots) == "exchange"
    assert links.seconds("gather", **few) == pytest.approx(2 * links.latency + 2 * 3 * 8192 * 8192 / 2e11)
    assert expert_parallel.expected_slots(8192, 6, 1) == expert_parallel.expected_slots(8192, 6, 2, headroom=9) == 8192
