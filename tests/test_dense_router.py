"""Which programs hold the fused kernel of dense_router, and what holds of that kernel alone."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jax_router
from jax_router import _native
from models import DTYPES, MODELS

FUSED, UNFUSED = "jax_router.dense_router", "jax_router.activation_topk"


@pytest.fixture(scope="module")
def cuda():
    module = _native.load("cuda")
    if isinstance(module, ImportError):
        pytest.skip(str(module))
    return module


def fuses(cuda, **size):
    """Whether the native module fuses a size: it can, and it is faster."""
    return not cuda.dense_router_unsupported(**size) and cuda.pays_everywhere("dense_router", **size)


def bf16(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def program(function, *operands, **shardings):
    """For CUDA, as text."""
    return jax.jit(function, **shardings).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()


def calls(function, *operands, **shardings):
    """The custom calls of this project in the program for CUDA."""
    return re.findall(r"custom_call @(jax_router\.\w+)", program(function, *operands, **shardings))


@pytest.mark.parametrize("name", ["deepseek-v4-flash", "deepseek-v4-pro", "gpt-oss-120b"])
def test_few_tokens_are_one_call(name, cuda):
    model = MODELS[name]
    route = partial(jax_router.dense_router, **model.selection)
    weight = bf16(model.num_experts, model.hidden_size)
    assert calls(route, bf16(8, model.hidden_size), weight) == [FUSED]
    assert calls(route, bf16(2, 4, model.hidden_size), weight) == [FUSED]
    assert calls(jax.vmap(route, in_axes=(0, None)), bf16(2, 4, model.hidden_size), weight) == [FUSED]
    assert calls(route, bf16(65, model.hidden_size), weight) == [FUSED]
    assert calls(route, bf16(128, model.hidden_size), weight) == [FUSED]


def test_many_tokens_are_one_call_where_a_kernel_is_faster(cuda):
    """That kernel is for compute capability 9.0 alone."""
    route = partial(jax_router.dense_router, top_k=6)
    fused = partial(fuses, cuda, hidden=4096, k=6, num_groups=1, dtype="bf16")
    for tokens in (129, 512, 4096, 16384):
        expected = FUSED if fused(rows=tokens, experts=256) else UNFUSED
        assert calls(route, bf16(tokens, 4096), bf16(256, 4096)) == [expected]
    hopper = jax.default_backend() == "gpu" and {d.compute_capability for d in jax.devices()} == {"9.0"}
    assert fused(rows=512, experts=256) == (hopper and "90a" in cuda.architectures)
    assert not fused(rows=512, experts=257)


@pytest.mark.parametrize(
    ("num_experts", "hidden", "options"),
    [(256, 4097, {}), (1500, 4096, {}), (256, 4096, {"top_k": 30}), (60, 4096, {"num_groups": 6, "top_groups": 3})],
)
def test_other_sizes_are_a_product_and_a_selection(num_experts, hidden, options, cuda):
    route = partial(jax_router.dense_router, **{"top_k": 6, "implementation": "native", **options})
    assert calls(route, bf16(8, hidden), bf16(num_experts, hidden)) == [UNFUSED]


def test_xla_sees_the_product_where_it_may_partition_it(cuda, devices):
    """It can split it over D and E, which a kernel cannot; a device of its own computes alone."""
    route = partial(jax_router.dense_router, top_k=6)
    operands = bf16(8, 4096), bf16(256, 4096)
    mesh = jax.make_mesh((len(devices),), ("d",), (jax.sharding.AxisType.Auto,), devices=devices)
    shardings = NamedSharding(mesh, P(None, "d")), NamedSharding(mesh, P(None, "d"))
    assert calls(route, *operands, in_shardings=shardings) == [UNFUSED]
    specs = {"in_specs": (P("d"), P()), "out_specs": P("d")}
    assert calls(jax.shard_map(route, mesh=mesh, **specs), bf16(8 * len(devices), 4096), operands[1]) == [FUSED]


def test_a_device_of_an_explicit_mesh_has_a_kernel_for_its_own_tokens(cuda, devices):
    """Which kernel runs, and with what scratch memory, follows from what a device has, and not from all tokens."""
    mesh = jax.make_mesh((len(devices),), ("d",), (jax.sharding.AxisType.Explicit,), devices=devices)
    tokens, size = 128, {"hidden": 4096, "experts": 256, "k": 6, "num_groups": 1, "dtype": "bf16"}
    assert fuses(cuda, rows=tokens, **size)
    x = jax.ShapeDtypeStruct((tokens * len(devices), 4096), jnp.bfloat16, sharding=NamedSharding(mesh, P("d")))
    weight = jax.ShapeDtypeStruct((256, 4096), jnp.bfloat16, sharding=NamedSharding(mesh, P()))
    with jax.set_mesh(mesh):
        text = program(partial(jax_router.dense_router, top_k=6), x, weight)
    assert f"@{FUSED}" in text
    (scratch,) = re.findall(rf"@{FUSED}.*-> .*tensor<1x{tokens * len(devices)}x(\d+)xui8>\)", text)
    assert int(scratch) * tokens == cuda.workspace_bytes("dense_router", rows=tokens, **size) > 0


def test_exported_programs_run_anywhere(cuda):
    """On GPUs that this installation has no kernel for, too."""
    exported = export.export(
        jax.jit(partial(jax_router.dense_router, top_k=6)),
        platforms=("cuda",),
        disabled_checks=[export.DisabledSafetyCheck.custom_call(UNFUSED)],
    )(bf16(8, 4096), bf16(256, 4096))
    assert FUSED not in exported.mlir_module()


def test_gradient_selects_once(cuda):
    """Forward: the fused call, which leaves the ids and the chosen logits. Backward: their gradient, and sums."""

    def loss(x, weight):
        return jax_router.dense_router(x, weight, top_k=6).weights.sum()

    found = calls(jax.grad(loss, argnums=(0, 1)), bf16(8, 4096), bf16(256, 4096))
    assert found == [FUSED, "jax_router.routed_cotangent", "jax_router.combine"]


def fused_tokens(cuda, counts, dtype, num_experts, hidden):
    """Those of the numbers of tokens for which there is a fused kernel that is faster, on this machine."""
    size = {"experts": num_experts, "hidden": hidden, "k": 6, "num_groups": 1, "dtype": dtype}
    return [tokens for tokens in counts if fuses(cuda, rows=tokens, **size)]


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="XLA's product of another shape may sum in another order")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_experts", "hidden"), [(36, 8), (200, 1032), (257, 2880), (384, 7168), (1024, 104)])
@pytest.mark.parametrize("counts", [(2, 7, 16), (17, 33, 63, 64, 65, 96, 128)])
def test_a_token_does_not_know_its_batch(num_experts, hidden, dtype, counts, cuda, rng):
    """Numbers of tokens that the kernel for few tokens adds up alike."""
    fused = fused_tokens(cuda, counts, dtype, num_experts, hidden)
    if len(fused) < 2:
        pytest.skip("not fused on this machine")
    x = rng.normal(0, 1, (max(fused), hidden)).astype(DTYPES[dtype])
    weight = rng.normal(0, hidden**-0.5, (num_experts, hidden)).astype(DTYPES[dtype])
    bias = rng.normal(0, 0.1, num_experts).astype(np.float32)
    route = jax.jit(partial(jax_router.dense_router, top_k=6, implementation="native"))
    whole = route(x, weight, bias)
    for tokens in fused:
        for mine, all_rows in zip(route(x[-tokens:], weight, bias), whole):
            np.testing.assert_array_equal(mine, all_rows[-tokens:])


@pytest.mark.parametrize("tokens", [1, 9, 40])
@pytest.mark.parametrize(("num_experts", "num_groups"), [(256, 8), (288, 9), (320, 20), (384, 12), (512, 16)])
def test_groups_of_few_tokens(num_experts, num_groups, tokens, rng):
    """Integer operands make the logits exact. The best groups lie anywhere."""
    options = {"top_k": 8, "score_fn": "sigmoid", "num_groups": num_groups, "top_groups": 4}
    x = rng.integers(-3, 4, (tokens, 72)).astype(DTYPES["bf16"])
    weight = rng.integers(-3, 4, (num_experts, 72)).astype(DTYPES["bf16"])
    logits = np.float32(x) @ np.float32(weight).T + 0.0
    bias = rng.normal(0, 0.3, num_experts).astype(np.float32)
    got = jax.jit(partial(jax_router.dense_router, **options))(x, weight, bias)
    for mine, theirs in zip(got, jax.jit(partial(jax_router.activation_topk, **options))(logits, bias)):
        np.testing.assert_array_equal(mine, theirs)


MANY_TOKENS = {
    "logits": {"top_k": 6, "score_fn": "sqrtsoftplus", "scale": 1.5},
    "k 16": {"top_k": 16, "score_fn": "softmax"},
    "whole row": {"top_k": 3, "score_fn": "softmax", "renormalize": False},
    "bias": {"top_k": 8, "score_fn": "sigmoid"},
    "groups": {"top_k": 8, "score_fn": "sigmoid", "num_groups": 8, "top_groups": 4},
}


@pytest.mark.parametrize("name", MANY_TOKENS)
@pytest.mark.parametrize(
    ("num_experts", "hidden", "dtype", "counts"),
    [
        (256, 1032, "bf16", (129, 500, 840, 1000, 1681, 2100, 3000, 4095, 4400, 8200, 16300)),
        (256, 40, "f16", (130, 3000, 5000)),
        (250, 200, "bf16", (360, 4300)),
        (121, 8, "f16", (129, 4099)),
        (301, 72, "bf16", (700,)),
    ],
)
def test_many_tokens(num_experts, hidden, dtype, counts, name, rng):
    """Integer operands make the logits exact, so that all bits are those of activation_topk; some rows hold a NaN."""
    options = MANY_TOKENS[name]
    if num_experts % options.get("num_groups", 1):
        pytest.skip("no such groups")
    logit_bias = rng.integers(-9, 10, num_experts).astype(np.float32) if name == "bias" else None
    bias = rng.normal(0, 0.3, num_experts).astype(np.float32) if name in ("bias", "groups") else None
    route = jax.jit(partial(jax_router.dense_router, **options))
    select = jax.jit(partial(jax_router.activation_topk, **options))
    weight = rng.integers(-3, 4, (num_experts, hidden)).astype(DTYPES[dtype])
    on_gpu = jax.default_backend() == "gpu"
    for tokens in counts if on_gpu and name == "logits" else counts[::3] if on_gpu else counts[:1]:
        x = rng.integers(-3, 4, (tokens, hidden)).astype(DTYPES[dtype])
        logits = np.float32(x) @ np.float32(weight).T + (0 if logit_bias is None else logit_bias) + 0.0
        broken = rng.integers(0, tokens, 5)
        x[broken, hidden // 2] = np.nan
        logits[broken] = np.nan
        mask = rng.random(tokens) < 0.9
        got = route(x, weight, bias, logit_bias=logit_bias, token_mask=mask)
        for mine, theirs in zip(got, select(logits, bias, token_mask=mask)):
            np.testing.assert_array_equal(mine, theirs, err_msg=f"{tokens} tokens")


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="the fused kernel runs on a GPU")
@pytest.mark.parametrize("counts", [(129, 200, 360), (1100, 1680), (3400, 4096, 4320), (8000, 8192)])
def test_a_token_does_not_know_its_batch_within_a_plan(counts, cuda, rng):
    """Numbers of tokens that the kernel for many tokens divides alike."""
    fused = fused_tokens(cuda, counts, "bf16", 256, 4096)
    if len(fused) < 2:
        pytest.skip("not fused on this machine")
    x = rng.normal(0, 1, (max(fused), 4096)).astype(DTYPES["bf16"])
    weight = rng.normal(0, 1 / 64, (256, 4096)).astype(DTYPES["bf16"])
    route = jax.jit(partial(jax_router.dense_router, top_k=6, implementation="native"))
    whole = route(x, weight)
    for tokens in fused:
        for mine, all_rows in zip(route(x[-tokens:], weight), whole):
            np.testing.assert_array_equal(mine, all_rows[-tokens:])


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="the fused kernel runs on a GPU")
def test_calls_that_follow_each_other(rng):
    """1000 calls of changing shapes, queued without waiting, from two threads' worth of programs: equal bits."""
    programs = []
    for tokens, name in (
        (1, "deepseek-v4-flash"),
        (128, "deepseek-v4-pro"),
        (600, "deepseek-v4-flash"),
        (17, "gpt-oss-120b"),
    ):
        model = MODELS[name]
        x = jnp.asarray(rng.normal(0, 1, (tokens, model.hidden_size)).astype(DTYPES["bf16"]))
        weight = rng.normal(0, model.hidden_size**-0.5, (model.num_experts, model.hidden_size)).astype(DTYPES["bf16"])
        route = jax.jit(partial(jax_router.dense_router, **model.selection))
        programs.append((route, x, jnp.asarray(weight)))
    want = [route(x, weight) for route, x, weight in programs]
    same = jax.jit(lambda a, b: jnp.all(a[0] == b[0]) & jnp.all(a[1] == b[1]))
    verdicts = []
    for call in range(1000):
        route, x, weight = programs[call % len(programs)]
        verdicts.append(same(route(x, weight), want[call % len(programs)]))
    assert all(map(bool, verdicts))


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="what the memory of a GPU held before")
def test_nothing_rests_on_what_memory_held_before(rng):
    """Constants that hash tables and random generators are full of, in memory that is freed just before the call."""
    x = jnp.asarray(rng.normal(0, 1, (16, 4096)), jnp.bfloat16)
    weight = jnp.asarray(rng.normal(0, 4096**-0.5, (256, 4096)), jnp.bfloat16)
    route = jax.jit(partial(jax_router.dense_router, top_k=6))
    want = jax.tree.map(np.asarray, route(x, weight))
    for constant in (0x9E3779B9, 0x7F4A7C15, 0xFFFFFFFF, 0x00000001):
        for words in ((0x7F4A7C15, constant), (constant, constant), (constant, 0x9E3779B9)):
            fills = [jnp.tile(jnp.asarray(words, jnp.uint32), 1 << 18) for _ in range(64)]
            jax.block_until_ready(fills)
            del fills
            for got, first in zip(route(x, weight), want):
                np.testing.assert_array_equal(got, first)
