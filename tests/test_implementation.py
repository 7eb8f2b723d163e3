"""What `implementation` means, the same for every op and everywhere: "native" is a kernel, or an error."""

import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jax_router
from cases import draw
from jax_router._primitive import OPS as PRIMITIVES
from matrix import OPS, native

PLATFORM = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())


def lowered(function, *operands, platform=PLATFORM):
    return jax.jit(function).trace(*operands).lower(lowering_platforms=(platform,)).as_text()


def calls(*arguments, **options):
    return re.findall(r"custom_call @jax_router\.(\w+)", lowered(*arguments, **options))


# Mapped operands that rows share

TABLES, VOCABULARY = 3, 12


@pytest.fixture
def tables(rng):
    """The tables of three problems, and their token ids, of which many are in no table or would be in another one's."""
    return draw(rng, "lut", TABLES, VOCABULARY, 2), rng.integers(-VOCABULARY, 3 * VOCABULARY, (TABLES, 40), np.int32)


def test_a_mapped_hash_table_is_one_kernel(tables):
    tables, token_ids = tables
    route = jax.vmap(partial(jax_router.hash_router, implementation="native"))
    assert calls(route, token_ids, tables) == ["hash_router"]
    got = jax.jit(route)(token_ids, tables)
    for i in range(TABLES):
        want = jax_router.reference.hash_router(jnp.asarray(token_ids[i]), jnp.asarray(tables[i]))
        np.testing.assert_array_equal(got.expert_ids[i], want.expert_ids)
        np.testing.assert_array_equal(got.weights[i], want.weights)


def test_mapped_hash_tables_of_shared_token_ids(tables):
    tables, token_ids = tables
    route = jax.vmap(partial(jax_router.hash_router, implementation="native"), in_axes=(None, 0))
    assert calls(route, token_ids, tables) == ["hash_router"]
    want = jax.vmap(jax_router.reference.hash_router, in_axes=(None, 0))(token_ids, tables)
    np.testing.assert_array_equal(jax.jit(route)(token_ids, tables).expert_ids, want.expert_ids)


def test_a_mapped_table_of_a_scored_hash_layer_is_one_kernel(tables, rng):
    tables, token_ids = tables
    logits = draw(rng, "logits", TABLES, 40, 16)
    route, plain = (
        jax.vmap(partial(jax_router.scored_hash_router, implementation=implementation))
        for implementation in ("native", "reference")
    )
    assert calls(route, logits, token_ids, tables) == ["scored_hash_router"]
    got, want = jax.jit(route)(logits, token_ids, tables), jax.jit(plain)(logits, token_ids, tables)
    np.testing.assert_array_equal(got.expert_ids, want.expert_ids)
    np.testing.assert_allclose(got.weights, want.weights, rtol=1e-5)


def test_too_many_mapped_tables():
    """Token ids are int32, and so are the rows of all tables together."""
    token_ids, tables = jax.ShapeDtypeStruct((3, 5), jnp.int32), jax.ShapeDtypeStruct((3, 2**30, 1), jnp.int32)
    with pytest.raises(NotImplementedError, match=r"native.*3 tables of 1073741824 rows.*int32"):
        jax.eval_shape(jax.vmap(partial(jax_router.hash_router, implementation="native")), token_ids, tables)
    assert jax.eval_shape(jax.vmap(jax_router.hash_router), token_ids, tables).expert_ids.shape == (3, 5, 1)


def test_a_mapped_weight_keeps_the_selection_kernel(rng):
    x, weights = draw(rng, "x", 5, 8), draw(rng, "weight", 3, 16, 8)
    route = partial(jax_router.dense_router, top_k=3, implementation="native")
    assert calls(jax.vmap(route, in_axes=(None, 0)), x, weights) == ["activation_topk"]


# dense_router: kernels throughout


@pytest.mark.parametrize("mode", [AxisType.Auto, AxisType.Explicit])
def test_dense_router_over_a_split_axis_insists_on_kernels(mode, devices):
    """XLA multiplies what is split over D; the selection is the kernel, or an error that says why not."""
    mesh = jax.make_mesh((len(devices),), ("d",), (mode,), devices=devices)
    split = NamedSharding(mesh, PartitionSpec(None, "d"))
    route = jax.jit(partial(jax_router.dense_router, top_k=3, implementation="native"))

    def lower(num_experts):
        shapes = [jax.ShapeDtypeStruct((rows, 8), jnp.float32, sharding=split) for rows in (4, num_experts)]
        with jax.set_mesh(mesh):
            return route.lower(*shapes)

    assert "jax_router.activation_topk" in lower(16).as_text()
    with pytest.raises(NotImplementedError, match=r"native.*4096 experts.*5000"):
        lower(5000)


def test_fusing():
    """With a CUDA module that has opinions: what it cannot, or what does not pay, is a product and a selection."""
    printed = subprocess.check_output([sys.executable, str(Path(__file__).with_name("fusing.py"))])
    assert json.loads(printed.splitlines()[-1]) == {
        "auto": ["dense_router"],
        "native": ["dense_router"],
        "auto, unsupported": ["activation_topk"],
        "native, unsupported": ["activation_topk"],
        "auto, does not pay": ["activation_topk"],
        "native, does not pay": ["activation_topk"],
        "native, unsupported, nor is the selection": "at most 4096 experts, got 5000",
        "native, of float32 at another precision": ["activation_topk"],
        "weight in float32": ["dense_router"],
        "4 tokens, unsupported weight in float32": ["dense_router"],  # with x in f32
        "65 tokens, unsupported weight in float32": ["activation_topk"],
    }


# Derivatives


@pytest.mark.parametrize("implementation", ["auto", "native"])
@pytest.mark.parametrize("op", [op for op, case in OPS.items() if case.floats])
def test_gradients_insist_as_the_op_does(op, implementation):
    case = OPS[op]
    gradient = case.derivative_of(partial(case.call, implementation=implementation))
    jaxpr = str(jax.make_jaxpr(gradient)(*case.draw(4)))
    asked = dict(re.findall(r"jax_router\.(\w+)\[[^\]]*\bimplementation=(\w+)", jaxpr))
    asked.pop("expert_dispatch", None)  # has no gradient
    gradients = {"permute": "combine", "permute, weights": "permute_cotangent", "combine": "combine_cotangent"}
    expected = [op.partition(",")[0], gradients.get(op, "route_cotangent")]
    expected += ["routed_rows"] * (op.startswith("dense_router") and "f32 weight" not in op)
    assert asked == dict.fromkeys(expected, implementation)


# What kernels are told


@pytest.mark.parametrize("op", OPS)
def test_calls_have_the_declared_attributes_and_no_other(op):
    text = lowered(OPS[op].derivative_of(native(op)), *OPS[op].draw(4))
    sent = re.findall(r"custom_call @jax_router\.(\w+).*?mhlo\.backend_config = \{(.*?)\}", text)
    assert sent
    declared = {primitive.name: primitive.declaration()["attributes"] for primitive in PRIMITIVES}
    for name, attributes in sent:
        assert set(re.findall(r"(\w+) = ", attributes)) == set(declared[name])
