"""The MoE layer with its experts spread over a mesh axis: a training step, beside the same layer on one device."""

import functools
from functools import partial

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_router import MoE, RouterConfig, balance, expert_counts
from matrix import assert_close

pytestmark = pytest.mark.usefixtures("f32_products")

AXIS, DATA = "expert", "data"
HIDDEN, INNER, EXPERTS, NULL, TOP_K = 8, 12, 16, 2, 3


@pytest.fixture(autouse=True)
def as_exact_as_a_cpu():
    with jax.default_matmul_precision("highest"):
        yield


def make(**options):
    """The layer, without values: nothing is compiled to draw them."""
    config = RouterConfig(HIDDEN, EXPERTS + NULL, TOP_K, score_fn="sigmoid", num_null_experts=NULL)
    shared = {"shared_intermediate_size": 4, "shared_expert_gate": True}
    return nnx.eval_shape(lambda: MoE(config, INNER, **shared, rngs=nnx.Rngs(0), **options))


@functools.cache
def parameters():
    """The values, by the same names on one device and on several."""
    rng = np.random.default_rng(1)
    shapes = nnx.to_pure_dict(nnx.state(make()))
    return jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(leaf.dtype), shapes)


def draw():
    """A batch, NaN where it is masked; the mask; a cotangent."""
    rng = np.random.default_rng(0)
    mask = rng.random((8, 3)) < 0.8
    x = np.where(mask[..., None], rng.normal(size=(8, 3, HIDDEN)), np.nan).astype(np.float32)
    return x, mask, rng.normal(size=x.shape).astype(np.float32)


def step(params, x, mask, cotangent, *, token_axes=(), **options):
    """The result, gradients, what was dropped, and the next bias."""
    graph, state = nnx.split(make(**options))
    nnx.replace_by_pure_dict(state, params)

    def loss(params, x):
        nnx.replace_by_pure_dict(state, params)
        moe = nnx.merge(graph, state)
        routing = moe.router(x, token_mask=mask)
        y, dropped = moe.apply_experts(x, routing, token_mask=mask, return_dropped=True)
        counts = expert_counts(routing.expert_ids, EXPERTS + NULL, axis_name=token_axes or None)
        return (y * cotangent).sum(), (y, dropped, balance.update_expert_bias(moe.router.bias[...], counts))

    gradient, result = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)
    return result, gradient


def spec_of(path, _):
    return P(AXIS) if path[0].key == "experts" else P()


def specs():
    return jax.tree.map_with_path(spec_of, parameters())


def make_mesh(devices, mode):
    return jax.make_mesh((2, len(devices) // 2), (DATA, AXIS), (mode,) * 2, devices=devices)


@functools.cache
def on_one_device():
    return jax.jit(step)(parameters(), *draw())


@pytest.mark.parametrize(
    ("mode", "tokens", "way"),
    [
        (AxisType.Auto, P((DATA, AXIS)), "gather"),
        (AxisType.Explicit, P((DATA, AXIS)), "exchange"),
        (AxisType.Explicit, P(DATA), "auto"),
    ],
    ids=str,
)
def test_under_jit(mode, tokens, way, devices):
    """Data parallel and expert parallel: results, gradients, and the bias of all tokens; nothing is dropped."""
    mesh = make_mesh(devices, mode)
    options = {"expert_axis": AXIS, "expert_options": {"way": way}}
    with jax.set_mesh(mesh):
        where = jax.tree.map(partial(NamedSharding, mesh), (specs(), tokens, tokens, tokens))
        operands = jax.device_put((parameters(), *draw()), where)
        (y, dropped, bias), gradients = jax.jit(partial(step, **options))(*operands)
    assert_close(((y, dropped, bias), gradients), on_one_device(), rtol=1e-4, atol=1e-5)
    assert gradients[0]["experts"]["up_proj"].sharding.spec[0] == AXIS


def test_in_shard_map(devices):
    """Each device with its own tokens and experts; gradients of what all share are summed by shard_map."""
    mesh, tokens = make_mesh(devices, AxisType.Auto), P((DATA, AXIS))
    local = partial(step, token_axes=(DATA, AXIS), expert_axis=AXIS)
    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=(specs(), *[tokens] * 3), out_specs=((tokens, P(), P()), (specs(), tokens))
    )
    assert_close(jax.jit(mapped)(parameters(), *draw()), on_one_device(), rtol=1e-4, atol=1e-5)


def test_dropped_choices_are_counted(devices):
    with jax.set_mesh(make_mesh(devices, AxisType.Auto)):
        run = jax.jit(partial(step, expert_axis=AXIS, expert_options={"way": "exchange", "slots": 0}))
        (_, dropped, _), _ = run(parameters(), *draw())
    mask = draw()[1]
    assert 0 < dropped <= mask.sum() * TOP_K


def test_options_need_an_axis():
    with pytest.raises(ValueError, match="expert_options must be None without expert_axis, got "):
        make(expert_options={"way": "gather"})
