"""The MoE layer: equal to the dense computation in float64, values and gradients; masks, replay, presets, devices."""

import copy
import functools
import pickle
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_router import MoE, Router, RouterConfig, Routing, models, presets
from jax_router.moe import ExpertWeights, sum_of_experts

pytestmark = pytest.mark.usefixtures("f32_products")

D, F, E, V = 16, 8, 6, 20
SHARED = {"shared_intermediate_size": 12}


def with_nan_behind(rows, group_sizes):
    row = lax.broadcasted_iota(jnp.int32, (len(rows), 1), 0)
    return jnp.where(row < group_sizes.sum(), rows, jnp.nan)


@jax.custom_vjp
def leaves_nan(lhs, rhs, group_sizes):
    """A product of groups that leaves anything behind the last group, as kernels do; in the gradient of lhs too."""
    return with_nan_behind(lax.ragged_dot(lhs, rhs, group_sizes), group_sizes)


def leaves_nan_backward(operands, cotangent):
    lhs, rhs, group_sizes = operands
    _, vjp = jax.vjp(lambda lhs, rhs: lax.ragged_dot(lhs, rhs, group_sizes), lhs, rhs)
    of_lhs, of_rhs = vjp(cotangent)
    return with_nan_behind(of_lhs, group_sizes), of_rhs, None


leaves_nan.defvjp(lambda *operands: (leaves_nan(*operands), operands), leaves_nan_backward)


def config(top_k=2, **options):
    return RouterConfig(D, E, top_k, **{"score_fn": "softmax", "selection_bias": False, **options})


LAYERS = {
    "groups, bias, shared expert": (
        config(score_fn="sigmoid", scale=2.5, num_groups=3, top_groups=2, selection_bias=True),
        {**SHARED, "matmul": leaves_nan},
    ),
    "null experts, gate of the shared expert": (
        config(renormalize=False, scale=6.0, num_null_experts=2, implementation="reference"),
        {**SHARED, "shared_expert_gate": True, "activation": jax.nn.gelu},
    ),
    "weighed input, scale an expert, groups in tiles": (
        config(1, score_fn="sigmoid", renormalize=False, per_expert_scale=True),
        {"weigh": "input", "matmul": lax.ragged_dot, "align": 8},
    ),
    "hash, scored": (config(score_fn="sqrtsoftplus", mode="hash", hash_weights="scored", vocab_size=V), {}),
}
FIRST, SECOND, *_ = LAYERS.values()


def numpy_init():
    """An initializer that compiles nothing."""
    rng = np.random.default_rng(3)
    return lambda key, shape, dtype: jnp.asarray(rng.normal(0, shape[-2] ** -0.5, shape), dtype)


def draw_table(key, shape, num_experts):
    return np.argsort(np.random.default_rng(3).random((shape[0], num_experts)), axis=1)[:, : shape[1]]


def make(router, options):
    init, rngs = numpy_init(), nnx.Rngs(3)
    existing = Router(router, rngs=rngs, weight_init=init, hash_lut_init=draw_table)
    moe = MoE(existing, F, kernel_init=init, rngs=rngs, **options)
    assert moe.router is existing
    if router.per_expert_scale:
        moe.router.per_expert_scale[...] = jnp.linspace(0.5, 2, E, dtype=jnp.float32)
    if router.has_selection_bias:
        moe.router.bias[...] = jnp.linspace(-0.1, 0.1, E, dtype=jnp.float32)
    return moe


def draw(rng, *tokens):
    """Hidden states, NaN in masked rows; the mask; token ids; a cotangent."""
    tokens = tokens or (4, 6)
    mask = rng.random(tokens) < 0.8
    x = np.where(mask[..., None], rng.normal(0, 1, (*tokens, D)), np.nan).astype(np.float32)
    return x, mask, rng.integers(0, V, tokens).astype(np.int32), rng.normal(0, 1, x.shape).astype(np.float32)


SCORES = {
    "softmax": jax.nn.softmax,
    "sigmoid": jax.nn.sigmoid,
    "sqrtsoftplus": lambda z: jnp.sqrt(jax.nn.softplus(z)),
}


def dense(params, x, ids, router, options):
    """The formula: every expert over every token `[N, D]`, in the dtype of its operands."""
    weights = jnp.full(ids.shape, router.scale / router.top_k, x.dtype)
    if router.has_weight:
        weights = jnp.take_along_axis(SCORES[router.score_fn](x @ params["router"]["weight"].T), ids, axis=-1)
        weights = weights / weights.sum(axis=-1, keepdims=True) if router.renormalize else weights
        weights = weights * router.scale
    if router.per_expert_scale:
        weights = weights * params["router"]["per_expert_scale"][ids]
    share = (weights[..., None] * jax.nn.one_hot(ids, E, dtype=x.dtype)).sum(axis=1)

    def swiglu(x, of, gate="nd,df->nf", down="nf,fd->nd"):
        inner = options.get("activation", jax.nn.silu)(jnp.einsum(gate, x, of["gate_proj"]))
        return jnp.einsum(down, inner * jnp.einsum(gate, x, of["up_proj"]), of["down_proj"])

    real = share[:, : router.num_real_experts, None]
    read = x[:, None] * (real if options.get("weigh") == "input" else jnp.ones_like(real))
    results = swiglu(read, params["experts"], "ned,edf->nef", "nef,efd->ned")
    y = (results if options.get("weigh") == "input" else results * real).sum(axis=1)
    y = y + x * share[:, router.num_real_experts :].sum(axis=-1, keepdims=True)
    if "shared_expert" in params:
        shared = swiglu(x, params["shared_expert"])
        if "shared_expert_gate" in params:
            shared = shared * jax.nn.sigmoid(x @ params["shared_expert_gate"])
        y = y + shared
    return y


def in_float64(function, *arguments):
    with jax.enable_x64(True):
        arguments = jax.tree.map(lambda leaf: np.float64(leaf) if leaf.dtype == np.float32 else leaf, arguments)
        return jax.tree.map(np.asarray, jax.jit(function)(*arguments))


def assert_close(results, wanted):
    for (path, value), want in zip(jax.tree.leaves_with_path(results), jax.tree.leaves(wanted), strict=True):
        value = np.asarray(value)
        largest = max(np.abs(want).max(), 1e-3)
        np.testing.assert_allclose(value / largest, want / largest, atol=1e-5, err_msg=jax.tree_util.keystr(path))


def gradients(moe, x, mask, token_ids, cotangent):
    """Gradients in all parameters and x, and the result."""

    def loss(moe, x):
        y = moe(x, token_ids=token_ids, token_mask=mask)
        return (y * cotangent).sum(), y

    (of_params, of_x), y = nnx.grad(loss, argnums=(0, 1), has_aux=True)(moe, x)
    return nnx.to_pure_dict(of_params), of_x, y


@pytest.mark.parametrize("name", LAYERS)
def test_equals_the_dense_computation(name, rng):
    """Forward and in all gradients; masked rows that hold NaN are as if they were not there."""
    moe, batch = make(*LAYERS[name]), draw(rng)
    x, mask, _, cotangent = batch

    @nnx.jit
    def layer(moe, *batch):
        routing = moe.router(batch[0], token_mask=batch[1], token_ids=batch[2])
        return gradients(moe, *batch), routing.expert_ids

    (of_params, of_x, y), ids = jax.tree.map(np.asarray, layer(moe, *batch))

    def oracle(params, x, ids, cotangent):
        y, vjp = jax.vjp(lambda params, x: dense(params, x, ids, *LAYERS[name]), params, x)
        return *vjp(cotangent), y

    params = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(moe, nnx.Param)))
    assert_close((of_params, of_x[mask], y[mask]), in_float64(oracle, params, x[mask], ids[mask], cotangent[mask]))
    np.testing.assert_array_equal(y[~mask], 0)
    np.testing.assert_array_equal(of_x[~mask], 0)


call = nnx.jit(lambda moe, x, **options: moe(x, **options), static_argnames="unset")


def test_replay(rng):
    """Recorded experts give what their own choice gave; a choice that is -1 adds nothing."""
    moe, x = make(config(), {}), jnp.asarray(rng.normal(0, 1, (5, D)), jnp.float32)
    recorded, want = moe.router(x).expert_ids.astype(jnp.int8), call(moe, x)
    np.testing.assert_allclose(call(moe, x, expert_ids=recorded), want, rtol=1e-5, atol=1e-6)
    none = jnp.full_like(recorded, -1)
    np.testing.assert_array_equal(call(moe, x, expert_ids=none), 0)
    np.testing.assert_allclose(call(moe, x, expert_ids=none, unset="route"), want, rtol=1e-5, atol=1e-6)


def test_no_token_is_dropped():
    """However uneven the load: all tokens on one expert, and no token at all."""
    moe = make(config(), {})
    x = jnp.abs(jax.random.normal(jax.random.key(0), (40, D)))
    moe.router.weight[...] = jnp.zeros((E, D)).at[:2].set(jnp.array([[200.0], [100.0]]))
    np.testing.assert_array_equal(moe.router(x).expert_ids, np.broadcast_to([0, 1], (40, 2)))
    first = jax.tree.map(lambda weight: np.float64(weight[0]), moe.experts.weights(x.dtype))
    gate, up = np.float64(x) @ first.gate_proj, np.float64(x) @ first.up_proj
    np.testing.assert_allclose(call(moe, x), (gate / (1 + np.exp(-gate)) * up) @ first.down_proj, rtol=1e-4, atol=1e-6)
    assert call(moe, x[:0]).shape == (0, D)


def test_dtypes(rng):
    """The experts compute in `dtype`, or in that of x; the router stays exact, and gradients have the parameters'."""
    x = jnp.asarray(rng.normal(0, 1, (10, D)), jnp.bfloat16)
    moe, with_dtype = (make(config(), {**SHARED, "dtype": dtype}) for dtype in (None, jnp.bfloat16))

    @nnx.jit
    def values_and_gradients(moe, x):
        def loss(moe):
            y = moe(x)
            return y.astype(jnp.float32).sum(), y

        return nnx.grad(loss, has_aux=True)(moe)

    of_params, y = values_and_gradients(moe, x)
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(of_params)} == {jnp.dtype(jnp.float32)}
    np.testing.assert_array_equal(call(with_dtype, x.astype(jnp.float32)), y)
    np.testing.assert_allclose(y.astype(jnp.float32), call(moe, x.astype(jnp.float32)), atol=0.05)
    half = nnx.eval_shape(lambda: MoE(config(), F, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    assert (half.experts.gate_proj.dtype, half.router.weight.dtype) == (jnp.bfloat16, jnp.float32)


def test_parameters():
    """Their names and shapes; LeCun normal, each expert by itself."""
    state = nnx.to_flat_state(nnx.state(make(*SECOND), nnx.Param))
    assert {".".join(path): value[...].shape for path, value in state} == {
        "experts.gate_proj": (E - 2, D, F),  # two are null
        "experts.up_proj": (E - 2, D, F),
        "experts.down_proj": (E - 2, F, D),
        "router.weight": (E, D),
        "shared_expert.gate_proj": (D, 12),
        "shared_expert.up_proj": (D, 12),
        "shared_expert.down_proj": (12, D),
        "shared_expert_gate": (D, 1),
    }
    wide = MoE(RouterConfig(64, 3, 2), 256, rngs=nnx.Rngs(0))
    for name, inputs in (("gate_proj", 64), ("down_proj", 256)):
        np.testing.assert_allclose(np.std(getattr(wide.experts, name)[...], axis=(1, 2)), inputs**-0.5, rtol=0.05)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda moe: pickle.loads(pickle.dumps(moe)), nnx.clone])
def test_copies(copied):
    """Of the same structure, so that a tree_map takes both, as an average of parameters over steps is made."""
    moe = MoE(config(), F, expert_axis="e", expert_options={"data_axes": ["d"]}, rngs=nnx.Rngs(0))
    other = copied(moe)
    assert nnx.graphdef(other) == nnx.graphdef(moe)
    assert hash(nnx.graphdef(other)) == hash(nnx.graphdef(moe))
    jax.tree.map(np.testing.assert_array_equal, moe, other)


def test_tabulate():
    """The table of Flax, in which each part has a row."""
    table = nnx.tabulate(make(*SECOND), jnp.ones((3, D)), console_kwargs={"width": 300})
    assert all(part in table for part in ("router", "apply_experts", "shared_expert/weights"))


def test_presets():
    """A layer around a router of each kind of model, with true E and k."""
    of_programs = {models.preset(name).program: (name,) for name in presets()}.values()
    for row in (*of_programs, ("longcat_flash",), ("gemma4_26b_a4b",), ("deepseek_v4_flash", 0)):
        router = replace(RouterConfig.from_preset(*row), hidden_size=D)
        ids = {"token_ids": jnp.zeros(4, jnp.int32)} if router.mode == "hash" else {}

        def run(x, router=router, ids=ids):
            moe = MoE(router, F, kernel_init=nnx.initializers.zeros_init(), rngs=nnx.Rngs(0))
            return moe(x, **ids), moe.experts.gate_proj[...]

        y, gate_proj = nnx.eval_shape(run, jnp.zeros((4, D)))
        assert (y.shape, gate_proj.shape) == ((4, D), (router.num_real_experts, D, F))


@functools.cache
def on_one_device():
    batch = draw(np.random.default_rng(7), 8, 3)
    return batch, jax.tree.map(np.asarray, nnx.jit(gradients)(make(*FIRST), *batch))


@pytest.mark.parametrize("mode", [AxisType.Auto, AxisType.Explicit])
def test_sharded_tokens(mode, devices):
    """Under jit, over devices, the same values and gradients as on one; tokens stay where they are."""
    batch, want = on_one_device()
    mesh = jax.make_mesh((len(devices),), ("d",), (mode,), devices=devices)
    with jax.set_mesh(mesh):
        sharded = [jax.device_put(array, NamedSharding(mesh, P("d"))) for array in batch]
        results = nnx.jit(gradients)(make(*FIRST), *sharded)
    assert results[-1].sharding.is_equivalent_to(NamedSharding(mesh, P("d")), 3)
    assert_close(results, want)


def test_whole_tokens_in_an_explicit_mesh(devices):
    """As those of a decode step may be: JAX has no rule for products of groups there."""
    batch, want = on_one_device()
    with jax.set_mesh(jax.make_mesh((len(devices),), ("d",), (AxisType.Explicit,), devices=devices)):
        assert_close(nnx.jit(gradients)(make(*FIRST), *batch), want)


def test_parameters_sharded_over_the_axis_of_the_tokens(devices):
    """Over their last axis, in a mesh with Explicit axes, where a product by itself refuses it."""
    batch, want = on_one_device()
    mesh = jax.make_mesh((2,), ("d",), (AxisType.Explicit,), devices=devices[:2])
    graph, state = nnx.split(make(*FIRST))

    def place(array):
        spec = P(*[None] * (array.ndim - 1), "d") if array.ndim > 1 and array.shape[-1] % 2 == 0 else P()
        return jax.device_put(array, NamedSharding(mesh, spec))

    with jax.set_mesh(mesh):
        sharded = [jax.device_put(array, NamedSharding(mesh, P("d"))) for array in batch]
        moe = nnx.merge(graph, jax.tree.map(place, state))
        assert moe.shared_expert.gate_proj[...].sharding.spec == P(None, "d")
        assert_close(nnx.jit(gradients)(moe, *sharded), want)


def test_in_shard_map(devices):
    """Each device sorts its own tokens, and gradients are the sums over devices."""
    batch, want = on_one_device()
    mesh = jax.make_mesh((len(devices),), ("d",), (AxisType.Auto,), devices=devices)
    graph, state = nnx.split(make(*FIRST))

    def local(state, *batch):
        return gradients(nnx.merge(graph, state), *batch)

    mapped = jax.shard_map(local, mesh=mesh, in_specs=(P(), *[P("d")] * 4), out_specs=(P(), P("d"), P("d")))
    assert_close(jax.jit(mapped)(state, *batch), want)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: MoE(config(), 0, rngs=nnx.Rngs(0)), ValueError, "intermediate_size must be at least 1, got 0"),
        (lambda: MoE(config(), F, rngs=0), TypeError, "rngs must be of type Rngs"),
        (lambda: MoE(None, F, rngs=nnx.Rngs(0)), TypeError, "router must be of type RouterConfig or Router"),
        (
            lambda: MoE(config(), F, shared_expert_gate=True, rngs=nnx.Rngs(0)),
            ValueError,
            "shared_expert_gate must be False without shared_intermediate_size, got True",
        ),
        (
            lambda: MoE(config(), F, weigh="both", rngs=nnx.Rngs(0)),
            ValueError,
            "weigh must be one of 'output', 'input'",
        ),
        (lambda: MoE(config(), F, dtype=jnp.int8, rngs=nnx.Rngs(0)), TypeError, "dtype must be one of"),
        (lambda: make_and_call(jnp.zeros((3, D + 1))), ValueError, r"x must have shape \(\.\.\., 16\)"),
        (lambda: make_and_call(jnp.zeros((3, D), jnp.int32)), TypeError, "x must have dtype float32"),
        (
            lambda: make_and_call(jnp.zeros((3, D)), routing=Routing(jnp.ones((2, 1)), jnp.zeros((2, 1), jnp.int32))),
            ValueError,
            r"x must have shape \(2, 'D'\), with the tokens of routing.expert_ids; got \(3, 16\)",
        ),
        (lambda: make_and_call(jnp.zeros((3, D)), routing=None), TypeError, "routing must be of type Routing"),
        (
            lambda: make_and_call(jnp.zeros((3, D)), routing=Routing(jnp.ones((3, 1)), jnp.zeros((3, 2), jnp.int32))),
            ValueError,
            r"routing.weights must have shape \(3, 2\), got \(3, 1\)",
        ),
        (lambda: make_and_call(jnp.zeros(D)), ValueError, r"x must have at least 2 axes, got shape \(16,\)"),
        (
            lambda: make_and_call(
                jnp.zeros((3, D + 1)), routing=Routing(jnp.ones((3, 1)), jnp.zeros((3, 1), jnp.int32))
            ),
            ValueError,
            r"x must have shape \(\.\.\., 16\) \(hidden_size\), got \(3, 17\)",
        ),
        (
            lambda: MoE(config(), F, activation="silu", rngs=nnx.Rngs(0)),
            TypeError,
            "activation must be a function, jax.nn.silu for example, got 'silu'",
        ),
        (lambda: MoE(config(), F, matmul=None, rngs=nnx.Rngs(0)), TypeError, "matmul must be a function"),
        (lambda: MoE(config(), F, kernel_init=1, rngs=nnx.Rngs(0)), TypeError, "kernel_init must be a function"),
        (
            lambda: MoE(config(), F, kernel_init=lambda key, shape, dtype: jnp.zeros(shape[::-1]), rngs=nnx.Rngs(0)),
            ValueError,
            r"the result of kernel_init must have shape \(\d+, 16, 8\), got \(8, 16, \d+\)",
        ),
        (
            lambda: MoE(config(), F, expert_axis="expert", expert_options=["way"], rngs=nnx.Rngs(0)),
            TypeError,
            "expert_options must be of type Mapping",
        ),
        (
            lambda: sum_of_experts(
                jnp.zeros((1, D)), Routing(jnp.ones((1, 1)), jnp.zeros((1, 1), jnp.int32)), (1, 2, 3)
            ),
            TypeError,
            "weights must be of type ExpertWeights",
        ),
        (lambda: call_sum(activation="silu"), TypeError, "activation must be a function"),
        (lambda: call_sum(matmul=None), TypeError, "matmul must be a function"),
        (lambda: call_sum(gate_proj="gate"), TypeError, "weights.gate_proj must be an array, got 'gate'"),
        (lambda: call_sum(down_proj=1.0), ValueError, r"weights.down_proj must have shape \[E, F, 16\], got \(\)"),
        (
            lambda: call_sum(up_proj=jnp.zeros((1, F, D))),
            ValueError,
            r"weights.up_proj must have shape \(1, 16, 8\), got \(1, 8, 16\)",
        ),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


def call_sum(**changed):
    routing = Routing(jnp.ones((1, 1)), jnp.zeros((1, 1), jnp.int32))
    weights = ExpertWeights(jnp.zeros((1, D, F)), jnp.zeros((1, D, F)), jnp.zeros((1, F, D)))
    weights = weights._replace(**{name: changed.pop(name) for name in ExpertWeights._fields if name in changed})
    return sum_of_experts(jnp.zeros((1, D)), routing, weights, **changed)


def make_and_call(x, **options):
    moe = make(config(), {})
    return moe.apply_experts(x, **options) if options else moe(x)
