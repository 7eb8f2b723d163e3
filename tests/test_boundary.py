"""What reaches the native handlers past the public functions: a saved program, or a custom call written by hand.

Whatever it holds, the answer is an error that names the target and the argument. tests/fuzz looks for what is not here.
"""

import os
import re
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_router import HashTable, Router, RouterConfig, _native, activation_topk

PLATFORM = jax.default_backend()
if PLATFORM == "gpu":
    PLATFORM = "cuda"


def of(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype)


F32, F16, BF16, F64 = (partial(of, dtype) for dtype in (jnp.float32, jnp.float16, jnp.bfloat16, np.float64))
F8 = partial(of, jnp.float8_e4m3fn)
I8, I16, I32, U8, BOOL = (partial(of, dtype) for dtype in (jnp.int8, jnp.int16, jnp.int32, jnp.uint8, jnp.bool_))

SCORING = {"score_fn": "sigmoid", "renormalize": np.bool_(True), "scale": np.float32(1), "eps": np.float32(1e-20)}
SELECTION = {
    **SCORING,
    "top_k": np.int64(2),
    "num_groups": np.int64(1),
    "top_groups": np.int64(1),
    "group_score": "top2_sum",
    "has_bias": np.bool_(False),
    "has_token_mask": np.bool_(False),
}
ROUTING = {"weights": F32(3, 2), "expert_ids": I32(3, 2)}

MOVED = {"token_index": I32(8), "slot": I32(3, 2)}

# Of each target: operands, results and attributes that it accepts.
RIGHT = {
    "hash_router": ({"token_ids": I32(3), "hash_lut": I32(5, 2)}, ROUTING, {"scale": np.float32(1)}),
    "activation_topk": ({"logits": F32(3, 8)}, ROUTING, SELECTION),
    "route_at": ({"logits": F32(3, 8), "expert_ids": I32(3, 2)}, ROUTING, SCORING),
    "scored_hash_router": ({"logits": F32(3, 8), "token_ids": I32(3), "hash_lut": I32(5, 2)}, ROUTING, SCORING),
    "route_cotangent": (
        {"grad_weights": F32(3, 2), "expert_ids": I32(3, 2), "residual": F32(3, 2)},
        {"grad_logits": F32(3, 8)},
        {**SCORING, "num_experts": np.int64(8), "has_residual": np.bool_(True)},
    ),
    "routed_cotangent": (
        {"grad_weights": F32(3, 2), "expert_ids": I32(3, 2), "residual": F32(3, 2)},
        {"grad_logits": BF16(3, 8, 2), "grad_chosen": F32(3, 2)},
        {**SCORING, "num_experts": np.int64(8)},
    ),
    "routed_gradients": (
        {
            "grad_weights": F32(3, 2),
            "expert_ids": I32(3, 2),
            "residual": F32(3, 2),
            "x": BF16(3, 16),
            "weight": BF16(8, 16),
        },
        {"grad_x": BF16(3, 16), "grad_weight": BF16(8, 16), "workspace": U8(2**17)},
        {**SCORING, "num_experts": np.int64(8)},
    ),
    "topk_select": (
        {"scores": F32(3, 8)},
        {"values": F32(3, 2), "indices": I32(3, 2)},
        {"k": np.int64(2), "sorted": np.bool_(True), "has_lengths": np.bool_(False)},
    ),
    "expert_dispatch": (
        {"expert_ids": I32(3, 2)},
        {"token_index": I32(24), "slot": I32(3, 2), "group_sizes": I32(8)},
        {"num_experts": np.int64(8), "align": np.int64(4), "capacity": np.int64(5)},
    ),
    "expert_counts": (
        {"expert_ids": I32(3, 2)},
        {"counts": I32(8)},
        {"num_experts": np.int64(8), "has_token_mask": np.bool_(False)},
    ),
    "permute": (
        {"x": F32(3, 16), **MOVED, "weights": F32(3, 2)},
        {"rows": F32(8, 16)},
        {"has_weights": np.bool_(True)},
    ),
    "combine": (
        {"y": F32(8, 16), **MOVED, "weights": F32(3, 2)},
        {"rows": F32(3, 16)},
        {"has_weights": np.bool_(True)},
    ),
    "permute_cotangent": (
        {"grad": F32(8, 16), "x": F32(3, 16), **MOVED, "weights": F32(3, 2)},
        {"grad_x": F32(3, 16), "grad_weights": F32(3, 2)},
        {},
    ),
    "combine_cotangent": (
        {"grad": F32(3, 16), "y": F32(8, 16), **MOVED, "weights": F32(3, 2)},
        {"grad_y": F32(8, 16), "grad_weights": F32(3, 2)},
        {},
    ),
    "dense_router": (
        {"x": F32(3, 16), "weight": F32(8, 16)},
        {**ROUTING, "workspace": U8(3, 65536)},
        {**SELECTION, "has_logit_bias": np.bool_(False)},
    ),
}

NO_WEIGHTS = {"has_weights": np.bool_(False)}
BIAS, MASK, LENGTHS = ({name: np.bool_(True)} for name in ("has_bias", "has_token_mask", "has_lengths"))
LARGE = np.int64(2**32 + 2)

# A target, what is other than in RIGHT (None: not there), and what the error says, in this order.
WRONG = {
    "experts above the limit": ("activation_topk", {"logits": F32(3, 8192)}, "logits 1 to 4096 float32 [3, 8192]"),
    "no experts": ("activation_topk", {"logits": F32(3, 0)}, "logits 1 to 4096 [3, 0]"),
    "logits of one number": ("activation_topk", {"logits": F32()}, "logits 1 axes float32 []"),
    "logits of integers": ("activation_topk", {"logits": I32(3, 8)}, "logits bfloat16 int32 [3, 8]"),
    "logits of float64": ("activation_topk", {"logits": F64(3, 8)}, "logits float32 float64"),
    "k above the limit": ("activation_topk", {"logits": F32(3, 99), "top_k": np.int64(65)}, "top_k 1 to 64 65"),
    "k above the experts": ("activation_topk", {"top_k": np.int64(9)}, "top_k 1 to 8 9"),
    "no k": ("activation_topk", {"top_k": np.int64(0)}, "top_k 1 to 8 0"),
    "a k that int32 cuts to 2": ("activation_topk", {"top_k": LARGE}, "top_k 1 to 8 4294967298"),
    "k above the eligible": ("activation_topk", {"num_groups": np.int64(4), "top_k": np.int64(3)}, "top_k 1 to 2 3"),
    "k is a float": ("activation_topk", {"top_k": np.float32(2.5)}, "top_k int64 float32"),
    "k is missing": ("activation_topk", {"top_k": None}, "top_k int64 none"),
    "no groups": ("activation_topk", {"num_groups": np.int64(0)}, "num_groups 1 to 8 0"),
    "groups above the experts": ("activation_topk", {"num_groups": np.int64(100000)}, "num_groups 1 to 8 100000"),
    "groups do not divide": ("activation_topk", {"num_groups": np.int64(3)}, "num_groups divisor 8 3"),
    "groups of one": ("activation_topk", {"num_groups": np.int64(8)}, "num_groups divisor two 8"),
    "top_groups above": ("activation_topk", {"top_groups": np.int64(4000)}, "top_groups 1 to 1 4000"),
    "group_score": ("activation_topk", {"group_score": "mean"}, "group_score top2_sum max mean"),
    "score_fn of derivatives": ("activation_topk", {"score_fn": "identity"}, "score_fn softmax identity"),
    "score_fn is a number": ("activation_topk", {"score_fn": np.int64(1)}, "score_fn string int64"),
    "scale is an integer": ("activation_topk", {"scale": np.int64(77)}, "scale float32 int64"),
    "eps is missing": ("activation_topk", {"eps": None}, "eps float32 none"),
    "ids in int8": ("activation_topk", {"expert_ids": I8(3, 2)}, "expert_ids int32 int8 [3, 2]"),
    "weights in float16": ("activation_topk", {"weights": F16(3, 2)}, "weights float32 float16 [3, 2]"),
    "weights of other rows": ("activation_topk", {"weights": F32(2, 2)}, "weights 3 rows float32 [2, 2]"),
    "weights the other way": ("activation_topk", {"weights": F32(2, 3)}, "weights 2] float32 [2, 3]"),
    "chosen logits of another k": ("activation_topk", {"chosen_logits": F32(3, 3)}, "chosen_logits 2] [3, 3]"),
    "a result too many": ("activation_topk", {"chosen_logits": F32(3, 2), "more": F32(3, 2)}, "results 3 4"),
    "a result is missing": ("activation_topk", {"expert_ids": None}, "expert_ids given 1 results"),
    "an operand too many": ("activation_topk", {"bias": F32(8)}, "operands 1 2"),
    "bias is missing": ("activation_topk", BIAS, "bias given 1 operands"),
    "bias in bfloat16": ("activation_topk", {"bias": BF16(8), **BIAS}, "bias float32 bfloat16 [8]"),
    "bias of other experts": ("activation_topk", {"bias": F32(7), **BIAS}, "bias 8] float32 [7]"),
    "bias of other rows": ("activation_topk", {"bias": F32(2, 8), **BIAS}, "bias 3 rows float32 [2, 8]"),
    "mask of integers": ("activation_topk", {"token_mask": I8(3), **MASK}, "token_mask bool int8 [3]"),
    "mask of other rows": ("activation_topk", {"token_mask": BOOL(2), **MASK}, "token_mask 3 rows bool [2]"),
    "no logits": ("activation_topk", {"logits": None}, "logits given 0 operands"),
    "hash_router: ids": ("hash_router", {"token_ids": I8(3)}, "token_ids int32 int8"),
    "hash_router: table": ("hash_router", {"hash_lut": I16(5, 2)}, "hash_lut int32 int16 [5, 2]"),
    "hash_router: table of another k": ("hash_router", {"hash_lut": I32(5, 3)}, "hash_lut 2] int32 [5, 3]"),
    "hash_router: flat table of another k": ("hash_router", {"hash_lut": I32(9)}, "hash_lut 2] int32 [9]"),
    "hash_router: k": ("hash_router", {"weights": F32(3, 65)}, "weights 1 to 64 float32 [3, 65]"),
    "route_at: k": ("route_at", {"expert_ids": I32(3, 257)}, "expert_ids 0 to 64 int32 [3, 257]"),
    "route_at: rows": ("route_at", {"expert_ids": I32(4, 2)}, "expert_ids 3 rows int32 [4, 2]"),
    "route_at: experts": ("route_at", {"logits": F32(3, 4097)}, "logits 0 to 4096 [3, 4097]"),
    "scored_hash_router: ids": ("scored_hash_router", {"token_ids": U8(3)}, "token_ids int32 uint8"),
    "scored_hash_router: table": ("scored_hash_router", {"hash_lut": I16(5, 2)}, "hash_lut int32 int16"),
    "route_cotangent: no residual": (
        "route_cotangent",
        {"residual": None, "has_residual": np.bool_(False)},
        "has_residual true false",
    ),
    "route_cotangent: residual": ("route_cotangent", {"residual": F32(3, 3)}, "residual 2] float32 [3, 3]"),
    "route_cotangent: residual of a row": (
        "route_cotangent",
        {"residual": F32(3, 8), "grad_logits": BF16(3, 8), "score_fn": "softmax", "renormalize": np.bool_(False)},
        "residual bfloat16 float32 [3, 8]",
    ),
    "route_cotangent: experts": ("route_cotangent", {"num_experts": LARGE}, "num_experts 2147483647 4294967298"),
    "route_cotangent: other experts": ("route_cotangent", {"num_experts": np.int64(9)}, "grad_logits 9] [3, 8]"),
    "route_cotangent: ids": ("route_cotangent", {"expert_ids": I8(3, 2)}, "expert_ids int32 int8"),
    "routed_cotangent: another dtype": (
        "routed_cotangent",
        {"grad_logits": F32(3, 8)},
        "grad_logits bfloat16 [..., 8, 2] float32 [3, 8]",
    ),
    "routed_cotangent: chosen": ("routed_cotangent", {"grad_chosen": F32(3, 3)}, "grad_chosen 2] float32 [3, 3]"),
    "routed_cotangent: k": ("routed_cotangent", {"grad_weights": F32(3, 65)}, "grad_weights 0 to 64 float32 [3, 65]"),
    "routed_cotangent: experts": ("routed_cotangent", {"num_experts": np.int64(4097)}, "num_experts 0 to 4096 4097"),
    "routed_gradients: weight": ("routed_gradients", {"weight": BF16(9, 16)}, "weight 16] bfloat16 [9, 16]"),
    "routed_gradients: x in f32": ("routed_gradients", {"x": F32(3, 16)}, "x bfloat16 float32 [3, 16]"),
    "routed_cotangent: softmax of all": (
        "routed_cotangent",
        {"score_fn": "softmax", "renormalize": np.bool_(False)},
        "renormalize true false",
    ),
    "topk_select: k of 2^62": ("topk_select", {"k": np.int64(2**62)}, "k 1 to 8 4611686018427387904"),
    "topk_select: no k": ("topk_select", {"k": np.int64(0)}, "k 1 to 8 0"),
    "topk_select: empty rows": ("topk_select", {"scores": F32(3, 0)}, "scores 1 to 2147483647 float32 [3, 0]"),
    "topk_select: another dtype": ("topk_select", {"values": F16(3, 2)}, "values float32 float16 [3, 2]"),
    "topk_select: lengths": ("topk_select", {"lengths": I16(3), **LENGTHS}, "lengths int32 int16"),
    "topk_select: sorted": ("topk_select", {"sorted": None}, "sorted bool none"),
    "expert_dispatch: experts": ("expert_dispatch", {"num_experts": np.int64(4097)}, "num_experts 1 to 4096 4097"),
    "expert_dispatch: align": ("expert_dispatch", {"align": np.int64(0)}, "align 1 to 2147483647 0"),
    "expert_dispatch: slots past int32": ("expert_dispatch", {"align": np.int64(2**30)}, "align 2^31 - 1 1073741824"),
    "expert_dispatch: capacity": ("expert_dispatch", {"capacity": np.int64(-1)}, "capacity 0 to 2147483647 -1"),
    "expert_dispatch: no capacity": ("expert_dispatch", {"capacity": None}, "capacity int64 none"),
    "expert_dispatch: slots of another align": ("expert_dispatch", {"align": np.int64(2)}, "token_index 12] [24]"),
    "expert_dispatch: k of 4": ("expert_dispatch", {"slot": I32(3, 4)}, "slot 3, 2] int32 [3, 4]"),
    "expert_dispatch: ids of one axis": ("expert_dispatch", {"expert_ids": I32(6)}, "expert_ids 2 axes int32 [6]"),
    "expert_dispatch: sizes": ("expert_dispatch", {"group_sizes": I32(9)}, "group_sizes 8] int32 [9]"),
    "permute: rows of integers": (
        "permute",
        {"x": I32(3, 16), "weights": None, **NO_WEIGHTS},
        "x float32 8 bits int32",
    ),
    "permute: rows of f8 with weights": ("permute", {"x": F8(3, 16)}, "x float32 bfloat16"),
    "permute: rows of another dtype": ("permute", {"rows": BF16(8, 16)}, "rows float32 bfloat16"),
    "permute: other tokens": ("permute", {"x": F32(4, 16)}, "x 3, 16] float32 [4, 16]"),
    "permute: other slots": ("permute", {"rows": F32(9, 16)}, "rows 8, 16] float32 [9, 16]"),
    "permute: k": ("permute", {"slot": I32(3, 65), "weights": F32(3, 65)}, "slot 0 to 64 [3, 65]"),
    "permute: slots of int16": ("permute", {"token_index": I16(8)}, "token_index int32 int16"),
    "permute: weights": ("permute", {"weights": BF16(3, 2)}, "weights float32 bfloat16"),
    "combine: rows of f8": ("combine", {"y": F8(8, 16)}, "y bfloat16"),
    "combine: other slots": ("combine", {"y": F32(7, 16)}, "y 8, 16] float32 [7, 16]"),
    "combine: other tokens": ("combine", {"rows": F32(2, 16)}, "rows 3, 16] float32 [2, 16]"),
    "combine: weights of other choices": ("combine", {"weights": F32(3, 3)}, "weights 3, 2] float32 [3, 3]"),
    "combine: weights are missing": ("combine", {"weights": None}, "weights given 3 operands"),
    "permute_cotangent: x": ("permute_cotangent", {"x": BF16(3, 16)}, "x float32 bfloat16"),
    "permute_cotangent: grad_x": ("permute_cotangent", {"grad_x": F32(3, 8)}, "grad_x 3, 16] float32 [3, 8]"),
    "permute_cotangent: products": ("permute_cotangent", {"grad_weights": F16(3, 2)}, "grad_weights float32 float16"),
    "combine_cotangent: y": ("combine_cotangent", {"y": F32(3, 16)}, "y 8, 16] float32 [3, 16]"),
    "combine_cotangent: grad_y": ("combine_cotangent", {"grad_y": F16(8, 16)}, "grad_y float32 float16"),
    "combine_cotangent: products": ("combine_cotangent", {"grad_weights": F32(3, 1)}, "grad_weights 2] [3, 1]"),
    "expert_counts: mask of integers": ("expert_counts", {"token_mask": I8(3), **MASK}, "token_mask bool int8 [3]"),
    "expert_counts: mask of other tokens": ("expert_counts", {"token_mask": BOOL(2), **MASK}, "token_mask 3] bool [2]"),
    "expert_counts: experts": ("expert_counts", {"num_experts": np.int64(9)}, "counts 9] int32 [8]"),
    "expert_counts: floats": ("expert_counts", {"expert_ids": F32(3, 2)}, "expert_ids int32 float32 [3, 2]"),
    "dense_router: no hidden elements": ("dense_router", {"x": F32(3, 0), "weight": F32(8, 0)}, "x 1 to [3, 0]"),
    "dense_router: weight": ("dense_router", {"weight": F32(8, 15)}, "weight 16] float32 [8, 15]"),
    "dense_router: dtypes": ("dense_router", {"weight": BF16(8, 16)}, "weight float32 bfloat16"),
    "dense_router: experts": ("dense_router", {"weight": F32(4097, 16)}, "weight 1 to 4096 [4097, 16]"),
    "dense_router: no groups": ("dense_router", {"num_groups": np.int64(0)}, "num_groups 1 to 8 0"),
    "dense_router: k": ("dense_router", {"weight": F32(99, 16), "top_k": np.int64(65)}, "top_k 1 to 64 65"),
}


def with_changes(target, changes):
    """Operands, results and attributes of RIGHT, changed."""
    operands, results, attributes = map(dict, RIGHT[target])
    for name, value in changes.items():
        if name in operands or name in results or name in attributes:
            place = operands if name in operands else results if name in results else attributes
        elif name.startswith("has_"):
            place = attributes
        else:
            place = results if name in ("chosen_logits", "more") else operands
        place[name] = value
    return [
        {name: value for name, value in part.items() if value is not None} for part in (operands, results, attributes)
    ]


def call(target, operands, results, attributes):
    if target not in _native.native_module(PLATFORM).targets():
        pytest.skip(f"{target} has no kernel on {PLATFORM}")
    with jax.enable_x64(True):
        values = [jnp.ones(value.shape, value.dtype) for value in operands.values()]
        function = jax.ffi.ffi_call(_native.target_name(target), list(results.values()))
        return jax.block_until_ready(function(*values, **attributes))


@pytest.mark.parametrize("target", RIGHT)
def test_a_call_that_is_right(target):
    operands, results, attributes = RIGHT[target]
    values = call(target, operands, results, attributes)
    assert [value.shape for value in values] == [result.shape for result in results.values()]


@pytest.mark.parametrize("what", WRONG)
def test_a_call_that_is_wrong(what):
    target, changes, words = WRONG[what]
    says = ".*".join(map(re.escape, [f"INVALID_ARGUMENT: jax_router.{target}:", *words.split()]))
    with pytest.raises(jax.errors.JaxRuntimeError, match=says):
        call(target, *with_changes(target, changes))


def test_every_target_has_calls_here():
    native = _native.native_module(PLATFORM).targets()
    assert set(native) <= set(RIGHT)
    assert set(native) <= {target for target, _, _ in WRONG.values()}


def test_attributes_that_nobody_reads_are_let_be():
    """Programs that older versions saved have some."""
    operands, results, attributes = RIGHT["activation_topk"]
    call("activation_topk", operands, results, {**attributes, "return_chosen": np.bool_(False)})


@pytest.mark.parametrize("with_bias", [False, True])
def test_mask_bytes_other_than_0_and_1(rng, with_bias):
    """An array made of another one's memory may hold them. Native and reference take the same for True."""
    logits = jnp.asarray(rng.normal(size=(8, 16)).astype(np.float32))
    mask = jnp.asarray(np.array([0, 1, 2, 3, 128, 254, 255, 16], np.uint8).view(np.bool_))
    bias = jnp.zeros(16) if with_bias else None
    route = partial(activation_topk, logits, bias, top_k=2, token_mask=mask)
    native, reference = route(implementation="native"), route(implementation="reference")
    np.testing.assert_array_equal(native.expert_ids, reference.expert_ids)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.int16, jnp.uint8, np.int64])
def test_a_restored_table_of_another_dtype(dtype):
    config = RouterConfig(4, 16, 2, mode="hash", vocab_size=20, hash_weights="scored")
    router = Router(config, rngs=nnx.Rngs(0))
    x, token_ids = jnp.ones((3, 4)), jnp.array([3, 0, 19])
    expected = router(x, token_ids=token_ids)
    with jax.enable_x64(dtype == np.int64):
        router.hash_lut = HashTable(router.hash_lut[...].astype(dtype))
        result = router(x, token_ids=token_ids)
    np.testing.assert_array_equal(result.expert_ids, expected.expert_ids)
    np.testing.assert_array_equal(result.weights, expected.weights)


OUT_OF_MEMORY = """
import resource
import jax, numpy as np
from jax_router import _native
k = 1 << 22
attributes = dict(score_fn="identity", renormalize=np.bool_(False), scale=np.float32(1), eps=np.float32(0),
                  num_experts=np.int64(8), has_residual=np.bool_(False))
call = jax.ffi.ffi_call(_native.target_name("route_cotangent"), [jax.ShapeDtypeStruct((1, 8), np.float32)])
run = jax.jit(lambda weights, ids: call(weights, ids, **attributes))
operands = jax.device_put((np.ones((1, k), np.float32), np.zeros((1, k), np.int32)))
run = run.lower(*operands).compile()
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (256 << 20),) * 2)
try:
    jax.block_until_ready(run(*operands))
except jax.errors.JaxRuntimeError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the memory of a process as Linux does")
def test_no_memory_on_the_cpu_is_an_error():
    """The kernel asks for half a gigabyte of its own, where the process may have a quarter of one more."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", OUT_OF_MEMORY], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # Between the two the runtime may put words of its own, by when it learns of the error.
    assert re.search("RESOURCE_EXHAUSTED: .*jax_router.route_cotangent: out of memory", done.stdout), done.stdout
