"""What is wrong with a call is said at trace time, with the argument, what it got and what it takes."""

import inspect
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jax_router
from jax_router import Dispatch, Router, RouterConfig, _native, random_hash_table
from matrix import OPS, native

F32 = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
BF16 = partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
F64 = partial(jax.ShapeDtypeStruct, dtype=jnp.float64)
I32 = partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
BOOL = partial(jax.ShapeDtypeStruct, dtype=jnp.bool_)

F8 = partial(jax.ShapeDtypeStruct, dtype=jnp.float8_e4m3fn)
F4 = partial(jax.ShapeDtypeStruct, dtype=jnp.float4_e2m1fn)

LOGITS = F32((4, 16))
DISPATCH = Dispatch(I32((8,)), I32((4, 2)), I32((9,)))
X, WEIGHT = F32((4, 8)), F32((16, 8))

TOP_1 = {"top_k": 1}

HUGE, MOST = 2**31, "2^31 - 1 = 2147483647"

# The op, its operands, its options, the error, and what its message says in this order.
ERRORS = {
    # activation_topk
    "logits have no axis": ("activation_topk", [F32(())], TOP_1, ValueError, "logits 1 axes ()"),
    "logits are integers": ("activation_topk", [I32((4, 16))], TOP_1, TypeError, "logits float32 int32"),
    "logits are bool": ("activation_topk", [BOOL((4, 16))], TOP_1, TypeError, "logits float32 bool"),
    "no experts": ("activation_topk", [F32((4, 0))], TOP_1, ValueError, "logits at least one expert (4, 0)"),
    "bias of other experts": ("activation_topk", [LOGITS, F32((15,))], TOP_1, ValueError, "bias (16,) (4, 16) (15,)"),
    "bias of other tokens": ("activation_topk", [LOGITS, F32((5, 16))], TOP_1, ValueError, "bias (4, 16) (5, 16)"),
    "bias in bf16": ("activation_topk", [LOGITS, BF16((16,))], TOP_1, TypeError,
                     "bias float32 bfloat16 cast .astype(jnp.float32)"),
    "logits in fp8": ("activation_topk", [jax.ShapeDtypeStruct((4, 16), jnp.float8_e4m3fn)], TOP_1, TypeError,
                      "logits bfloat16 float8_e4m3fn cast .astype(jnp.float32)"),
    "bias of integers": ("activation_topk", [LOGITS, I32((16,))], TOP_1, TypeError, "bias float32 int32"),
    "k above E": ("activation_topk", [LOGITS], {"top_k": 17}, ValueError, "top_k between 1 and 16 17"),
    "k is 0": ("activation_topk", [LOGITS], {"top_k": 0}, ValueError, "top_k between 1 and 16 0"),
    "k is negative": ("activation_topk", [LOGITS], {"top_k": -1}, ValueError, "top_k between 1 and 16 -1"),
    "k is a float": ("activation_topk", [LOGITS], {"top_k": 2.0}, TypeError, "top_k int 2.0"),
    "k is a bool": ("activation_topk", [LOGITS], {"top_k": True}, TypeError, "top_k int True"),
    "k is none": ("activation_topk", [LOGITS], {"top_k": None}, TypeError, "top_k int None"),
    "score_fn": ("activation_topk", [LOGITS], {"top_k": 1, "score_fn": "tanh"}, ValueError,
                 "score_fn 'sqrtsoftplus', 'sigmoid', 'softmax' 'tanh'"),
    "score_fn of the derivatives alone": ("activation_topk", [LOGITS], {"top_k": 1, "score_fn": "identity"}, ValueError,
                                          "score_fn 'identity'"),
    "renormalize": ("activation_topk", [LOGITS], {"top_k": 1, "renormalize": 1}, TypeError, "renormalize True False 1"),
    "scale is no number": ("activation_topk", [LOGITS], {"top_k": 1, "scale": None}, TypeError, "scale number None"),
    "scale beyond float32": ("activation_topk", [LOGITS], {"top_k": 1, "scale": 1e39}, ValueError,
                             "scale range of float32 1e+39"),
    "scale below float32": ("activation_topk", [LOGITS], {"top_k": 1, "scale": 1e-39}, ValueError,
                            "scale 0 range of float32 1e-39"),
    "scale is text": ("activation_topk", [LOGITS], {"top_k": 1, "scale": "2"}, TypeError, "scale number '2'"),
    "scale is a bool": ("activation_topk", [LOGITS], {"top_k": 1, "scale": True}, TypeError, "scale number True"),
    "scale is nan": ("activation_topk", [LOGITS], {"top_k": 1, "scale": float("nan")}, ValueError, "scale finite nan"),
    "groups do not divide": ("activation_topk", [LOGITS], {"top_k": 1, "num_groups": 3}, ValueError,
                             "num_groups divide 16 3"),
    "groups above E": ("activation_topk", [LOGITS], {"top_k": 1, "num_groups": 17}, ValueError,
                       "num_groups between 1 and 16 17"),
    "groups and none of them": ("activation_topk", [LOGITS], {"top_k": 1, "num_groups": 4}, ValueError,
                                "top_groups num_groups = 4 between 1 and 4 None"),
    "no groups": ("activation_topk", [LOGITS], {"top_k": 1, "num_groups": 0}, ValueError,
                  "num_groups between 1 and 16 0"),
    "top_groups above groups": ("activation_topk", [LOGITS], {"top_k": 1, "num_groups": 4, "top_groups": 5}, ValueError,
                                "top_groups between 1 and 4 5"),
    "too few eligible": ("activation_topk", [LOGITS], {"top_k": 9, "num_groups": 4, "top_groups": 2}, ValueError,
                         "top_k between 1 and 8 2 of 4 groups 9"),
    "groups of one": ("activation_topk", [LOGITS], {"top_k": 1, "num_groups": 16, "top_groups": 2}, ValueError,
                      "top2_sum 2 experts a group 16 max"),
    "group_score": ("activation_topk", [LOGITS], {"top_k": 1, "group_score": "sum"}, ValueError,
                    "group_score 'top2_sum', 'max' 'sum'"),
    "mask of integers": ("activation_topk", [LOGITS], {"top_k": 1, "token_mask": I32((4,))}, TypeError,
                         "token_mask bool int32"),
    "mask of other tokens": ("activation_topk", [LOGITS], {"top_k": 1, "token_mask": BOOL((16,))}, ValueError,
                             "token_mask (4,) (16,)"),
    # route_at
    "ids of floats": ("route_at", [LOGITS, F32((4, 2))], {}, TypeError, "expert_ids integer float32"),
    "ids of bools": ("route_at", [LOGITS, BOOL((4, 2))], {}, TypeError, "expert_ids integer bool"),
    "ids of other tokens": ("route_at", [LOGITS, I32((5, 2))], {}, ValueError, "expert_ids (4, 2) (5, 2)"),
    "ids of other rank": ("route_at", [LOGITS, I32((2,))], {}, ValueError, "expert_ids (4, 2) (2,)"),
    "ids have no axis": ("route_at", [LOGITS, I32(())], {}, ValueError, "expert_ids 1 axes ()"),
    "route_at: score_fn": ("route_at", [LOGITS, I32((4, 2))], {"score_fn": None}, ValueError, "score_fn None"),
    # hash_router
    "token ids of floats": ("hash_router", [F32((4,)), I32((9, 2))], {}, TypeError, "token_ids integer float32"),
    "table of floats": ("hash_router", [I32((4,)), F32((9, 2))], {}, TypeError, "hash_lut integer float32"),
    "table of one axis": ("hash_router", [I32((4,)), I32((9,))], {}, ValueError, "hash_lut (vocab_size, k) (9,)"),
    "table without columns": ("hash_router", [I32((4,)), I32((9, 0))], {}, ValueError, "hash_lut at least 1 (9, 0)"),
    "table without rows": ("hash_router", [I32((4,)), I32((0, 2))], {}, ValueError, "hash_lut at least 1 (0, 2)"),
    "hash_router: scale": ("hash_router", [I32((4,)), I32((9, 2))], {"scale": np.inf}, ValueError, "scale finite inf"),
    # scored_hash_router
    "scored: token ids of other rows": ("scored_hash_router", [LOGITS, I32((5,)), I32((9, 2))], {}, ValueError,
                                        "token_ids (4,) (5,)"),
    "scored: token ids of floats": ("scored_hash_router", [LOGITS, F32((4,)), I32((9, 2))], {}, TypeError,
                                    "token_ids integer float32"),
    "scored: table of one axis": ("scored_hash_router", [LOGITS, I32((4,)), I32((9,))], {}, ValueError,
                                  "hash_lut (vocab_size, k) (9,)"),
    "scored: mask of integers": ("scored_hash_router", [LOGITS, I32((4,)), I32((9, 2))], {"token_mask": I32((4,))},
                                 TypeError, "token_mask bool int32"),
    "scored: score_fn": ("scored_hash_router", [LOGITS, I32((4,)), I32((9, 2))], {"score_fn": "relu"}, ValueError,
                         "score_fn 'relu'"),
    # topk_select
    "scores have no axis": ("topk_select", [F32(())], {"k": 1}, ValueError, "scores 1 axes ()"),
    "scores of integers": ("topk_select", [I32((4, 9))], {"k": 1}, TypeError, "scores float32 int32"),
    "k above L": ("topk_select", [F32((4, 9))], {"k": 10}, ValueError, "k between 0 and 9 scores 10"),
    "select fewer than none": ("topk_select", [F32((4, 9))], {"k": -1}, ValueError, "k between 0 and 9 -1"),
    "lengths of floats": ("topk_select", [F32((4, 9))], {"k": 1, "lengths": F32((4,))}, TypeError,
                          "lengths integer float32"),
    "lengths of other rows": ("topk_select", [F32((4, 9))], {"k": 1, "lengths": I32((9,))}, ValueError,
                              "lengths (4,) (9,)"),
    "sorted": ("topk_select", [F32((4, 9))], {"k": 1, "sorted": "yes"}, TypeError, "sorted True False 'yes'"),
    # dense_router
    "x has no axis": ("dense_router", [F32(()), WEIGHT], TOP_1, ValueError, "x 1 axes ()"),
    "x of integers": ("dense_router", [I32((4, 8)), WEIGHT], TOP_1, TypeError, "x float32 int32"),
    "weight is transposed": ("dense_router", [X, F32((8, 16))], TOP_1, ValueError, "weight (num_experts, 8) (8, 16)"),
    "weight of one axis": ("dense_router", [X, F32((8,))], TOP_1, ValueError, "weight (num_experts, 8) (8,)"),
    "weight of no expert": ("dense_router", [X, F32((0, 8))], TOP_1, ValueError, "weight (0, 8)"),
    "weight of less than x": ("dense_router", [X, BF16((16, 8))], TOP_1, TypeError, "weight float32 bfloat16 cast"),
    "weight of another half": ("dense_router", [BF16((4, 8)), jax.ShapeDtypeStruct((16, 8), jnp.float16)], TOP_1,
                               TypeError, "weight bfloat16 or float32 float16 cast"),
    "precision": ("dense_router", [X, WEIGHT], {"top_k": 1, "precision": "exact"}, ValueError,
                  "precision 'highest' 'exact'"),
    "logit_bias in bf16": ("dense_router", [X, WEIGHT], {"top_k": 1, "logit_bias": BF16((16,))}, TypeError,
                           "logit_bias float32 bfloat16"),
    "logit_bias of other experts": ("dense_router", [X, WEIGHT], {"top_k": 1, "logit_bias": F32((8,))}, ValueError,
                                    "logit_bias (16,) (8,)"),
    "dense_router: bias": ("dense_router", [X, WEIGHT, F32((8,))], TOP_1, ValueError, "bias (16,) (8,)"),
    "dense_router: k above E": ("dense_router", [X, WEIGHT], {"top_k": 17}, ValueError, "top_k between 1 and 16 17"),
    # expert_dispatch
    "dispatch of floats": ("expert_dispatch", [F32((4, 2))], {"num_experts": 3}, TypeError,
                           "expert_ids integer float32"),
    "dispatch of a scalar": ("expert_dispatch", [I32(())], {"num_experts": 3}, ValueError, "expert_ids [..., k] ()"),
    "dispatch of a flat list": ("expert_dispatch", [I32((12,))], {"num_experts": 3}, ValueError,
                                "expert_ids [..., k] axis of tokens (12,) [N, 1] [1, k]"),
    "dispatch of no choice": ("expert_dispatch", [I32((4, 0))], {"num_experts": 3}, ValueError, "expert_ids (4, 0)"),
    "dispatch to none": ("expert_dispatch", [I32((4, 2))], {"num_experts": 0}, ValueError, "num_experts at least 1 0"),
    "dispatch to a float": ("expert_dispatch", [I32((4, 2))], {"num_experts": 3.0}, TypeError, "num_experts int 3.0"),
    # permute and combine
    "permute: integers": ("permute", [I32((4, 8)), DISPATCH], {}, TypeError, "x float32 8 bits int32"),
    "permute: f4": ("permute", [F4((4, 8)), DISPATCH], {}, TypeError, "x float32 8 bits float4_e2m1fn"),
    "permute: f8 with weights": ("permute", [F8((4, 8)), DISPATCH, F32((4, 2))], {}, TypeError,
                                 "x float32 float8_e4m3fn cast"),
    "permute: other tokens": ("permute", [F32((5, 8)), DISPATCH], {}, ValueError, "x (4, 'D') dispatch.slot (5, 8)"),
    "permute: another rank": ("permute", [F32((2, 2, 8)), DISPATCH], {}, ValueError, "x (4, 'D') (2, 2, 8)"),
    "permute: a scalar": ("permute", [F32(()), DISPATCH], {}, ValueError, "x 1 axes ()"),
    "permute: no dispatch": ("permute", [F32((4, 8)), I32((4, 2))], {}, TypeError, "dispatch Dispatch expert_dispatch"),
    "permute: slots in two axes": ("permute", [F32((4, 8)), Dispatch(I32((4, 2)), I32((4, 2)), I32((9,)))], {},
                                   ValueError, "dispatch.token_index one axis (4, 2)"),
    "permute: slots of floats": ("permute", [F32((4, 8)), Dispatch(I32((8,)), F32((4, 2)), I32((9,)))], {},
                                 TypeError, "dispatch.slot integer float32"),
    "permute: weights in bf16": ("permute", [F32((4, 8)), DISPATCH, BF16((4, 2))], {}, TypeError,
                                 "weights float32 bfloat16 cast"),
    "permute: weights of slots": ("permute", [F32((4, 8)), DISPATCH, F32((8,))], {}, ValueError, "weights (4, 2) (8,)"),
    "combine: integers": ("combine", [I32((8, 8)), DISPATCH], {}, TypeError, "y float32 int32"),
    "combine: f8": ("combine", [F8((8, 8)), DISPATCH], {}, TypeError, "y float32 float8_e4m3fn cast"),
    "combine: other slots": ("combine", [F32((4, 8)), DISPATCH], {}, ValueError,
                             "y (8, 'D') dispatch.token_index (4, 8)"),
    "combine: no dispatch": ("combine", [F32((8, 8)), (I32((8,)), I32((4, 2)), I32((9,)))], {}, TypeError,
                             "dispatch Dispatch expert_dispatch"),
    "combine: weights of others": ("combine", [F32((8, 8)), DISPATCH, F32((4, 3))], {}, ValueError,
                                   "weights (4, 2) (4, 3)"),
    "dispatch to align 0": ("expert_dispatch", [I32((4, 2))], {"num_experts": 3, "align": 0}, ValueError,
                            "align at least 1 0"),
    "dispatch to half a tile": ("expert_dispatch", [I32((4, 2))], {"num_experts": 3, "align": 0.5}, TypeError,
                                "align int 0.5"),
    "dispatch of less than nothing": ("expert_dispatch", [I32((4, 2))], {"num_experts": 3, "capacity": -1}, ValueError,
                                      "capacity at least 0 -1"),
    "dispatch of a share": ("expert_dispatch", [I32((4, 2))], {"num_experts": 3, "capacity": 1.25}, TypeError,
                            "capacity int 1.25"),
    "dispatch to too many slots": ("expert_dispatch", [I32((4, 2))], {"num_experts": 3, "align": 2**30}, ValueError,
                                   "align = 1073741824 num_experts = 3 (4, 2) 3221225472 slots 2147483647"),
    # expert_counts
    "counts of floats": ("expert_counts", [F32((4, 2))], {"num_experts": 3}, TypeError, "expert_ids integer float32"),
    "counts of a flat list": ("expert_counts", [I32((12,))], {"num_experts": 3}, ValueError,
                              "expert_ids [..., k] (12,)"),
    "counts of none": ("expert_counts", [I32((4, 2))], {"num_experts": 0}, ValueError, "num_experts at least 1 0"),
    "counts and a mask of choices": ("expert_counts", [I32((4, 2))], {"num_experts": 3, "token_mask": BOOL((4, 2))},
                                     ValueError, "token_mask (4,) (4, 2)"),
    "counts and a mask of integers": ("expert_counts", [I32((4, 2))], {"num_experts": 3, "token_mask": I32((4,))},
                                      TypeError, "token_mask bool int32"),
    # Axes past int32
    "logits of too many tokens": ("activation_topk", [BF16((HUGE, 1))], TOP_1, ValueError, f"logits {MOST} {HUGE}"),
    "too many experts": ("activation_topk", [BF16((1, HUGE))], TOP_1, ValueError, f"logits {MOST} {HUGE}"),
    "ids of too many tokens": ("route_at", [F32((HUGE, 0)), I32((HUGE, 2))], {}, ValueError, f"logits {MOST} {HUGE}"),
    "too many ids": ("route_at", [F32((1, 4)), I32((1, HUGE))], {}, ValueError, f"expert_ids {MOST} {HUGE}"),
    "too many token ids": ("hash_router", [I32((HUGE,)), I32((9, 2))], {}, ValueError, f"token_ids {MOST} {HUGE}"),
    "a table too long": ("hash_router", [I32((4,)), I32((HUGE, 2))], {}, ValueError, f"hash_lut {MOST} {HUGE}"),
    "a scored table too long": ("scored_hash_router", [LOGITS, I32((4,)), I32((HUGE, 2))], {}, ValueError,
                                f"hash_lut {MOST} {HUGE}"),
    "a row too long": ("topk_select", [BF16((1, HUGE))], {"k": 1}, ValueError, f"scores {MOST} {HUGE}"),
    "a hidden size too large": ("dense_router", [F32((2, HUGE)), F32((16, HUGE))], TOP_1, ValueError,
                                f"x {MOST} {HUGE}"),
    "a weight too long": ("dense_router", [X, F32((HUGE, 8))], TOP_1, ValueError, f"weight {MOST} {HUGE}"),
    "a mask too long": ("activation_topk", [LOGITS], {"top_k": 1, "token_mask": BOOL((HUGE,))}, ValueError,
                        f"token_mask {MOST} {HUGE}"),
    "a bias too long": ("activation_topk", [LOGITS, F32((HUGE,))], TOP_1, ValueError, f"bias {MOST} {HUGE}"),
    "lengths too long": ("topk_select", [F32((4, 9))], {"k": 1, "lengths": I32((HUGE,))}, ValueError,
                         f"lengths {MOST} {HUGE}"),
    "a dispatch of too many choices": ("expert_dispatch", [I32((2**28, 8))], {"num_experts": 3}, ValueError,
                                       f"expert_ids {MOST} choices in all (268435456, 8)"),
    "a dispatch in several axes": ("expert_dispatch", [I32((2**16, 2**12, 8))], {"num_experts": 3}, ValueError,
                                   f"expert_ids {MOST} choices in all (65536, 4096, 8)"),
    "a dispatch of too many tokens": ("expert_dispatch", [I32((HUGE, 1))], {"num_experts": 3}, ValueError,
                                      f"expert_ids {MOST} {HUGE}"),
    "a dispatch to too many": ("expert_dispatch", [I32((4, 2))], {"num_experts": HUGE}, ValueError,
                               f"num_experts at most {MOST} {HUGE}"),
}  # fmt: skip


def says(words: str) -> str:
    """A pattern of words in this order, whatever lies between."""
    return ".*".join(map(re.escape, words.split()))


@pytest.mark.parametrize("name", ERRORS)
def test_message(name, implementation):
    op, operands, options, error, words = ERRORS[name]
    arrays = {key: value for key, value in options.items() if isinstance(value, jax.ShapeDtypeStruct)}
    static = {key: value for key, value in options.items() if key not in arrays}
    function = partial(getattr(jax_router, op), implementation=implementation, **static)
    with pytest.raises(error, match=says(words)):
        jax.eval_shape(function, *operands, **arrays)


@pytest.mark.parametrize("op", OPS)
def test_unknown_implementation(op):
    function = partial(OPS[op].call, implementation="cuda")
    with pytest.raises(ValueError, match=says("implementation 'auto', 'native', 'reference' 'cuda'")):
        jax.eval_shape(function, *OPS[op].draw(4))


@pytest.mark.parametrize("op", [op for op, case in OPS.items() if case.floats and "," not in op])
def test_float64_says_to_cast(op):
    first, *others = OPS[op].draw(4)
    with jax.enable_x64(True), pytest.raises(TypeError, match=says("float32, bfloat16 or float16 float64 cast")):
        jax.eval_shape(OPS[op].call, first.astype(np.float64), *others)


@pytest.mark.parametrize(
    ("op", "array", "option"),
    [
        ("activation_topk", LOGITS, "top_k"),
        ("topk_select", LOGITS, "k"),
        ("expert_dispatch", I32((4, 2)), "num_experts"),
    ],
)
def test_traced_size(op, array, option):
    with pytest.raises(TypeError, match=says(f"{option} must be a Python int jax.jit static_argnames ('{option}',)")):
        jax.eval_shape(lambda array, size: getattr(jax_router, op)(array, **{option: size}), array, I32(()))


def test_an_array_for_a_choice():
    with pytest.raises(ValueError, match=says("score_fn 'softmax' array")):
        jax_router.activation_topk(jnp.zeros((4, 16)), top_k=1, score_fn=np.array(["softmax", "sigmoid"]))


@pytest.mark.parametrize("option", ["top_k", "scale", "renormalize", "score_fn", "implementation"])
@pytest.mark.parametrize("array", [np.zeros((99, 9), np.float32), jnp.zeros((99, 9))], ids=["numpy", "jax"])
def test_a_large_array_for_an_option(option, array):
    """Its type is said, and not what it holds."""
    with pytest.raises(
        (TypeError, ValueError), match=says(f"{option} array of shape (99, 9) and dtype float32")
    ) as info:
        jax_router.activation_topk(jnp.zeros((4, 16)), **{"top_k": 1, option: array})
    assert len(str(info.value)) < 200


def test_blocks_of_no_dispatch():
    with pytest.raises(TypeError, match=says("dispatch Dispatch expert_dispatch (1, 2, 3)")):
        jax_router.block_experts((1, 2, 3), 4)


@pytest.mark.parametrize("part", ["token_index", "group_sizes"])
def test_blocks_of_a_dispatch_without_arrays(part):
    dispatch = jax_router.expert_dispatch(jnp.array([[1]]), 3)
    with pytest.raises(TypeError, match=says(f"dispatch.{part} must be an array None")):
        jax_router.block_experts(dispatch._replace(**{part: None}), 1)
    with pytest.raises(ValueError, match=says(f"dispatch.{part} axes ()")):
        jax_router.block_experts(dispatch._replace(**{part: 3}), 1)


def test_traced_scale():
    with pytest.raises(TypeError, match=says("scale must be a Python number jax.jit static_argnames ('scale',)")):
        jax.eval_shape(lambda x, scale: jax_router.activation_topk(x, top_k=1, scale=scale), LOGITS, F32(()))


@pytest.mark.parametrize(
    ("op", "operands", "argument"),
    [
        ("activation_topk", [None], "logits"),
        ("activation_topk", ["logits"], "logits"),
        ("topk_select", [{}], "scores"),
        ("route_at", [np.ones((4, 16), np.float32), None], "expert_ids"),
        ("hash_router", [None, np.ones((9, 2), np.int32)], "token_ids"),
        ("scored_hash_router", [np.ones((4, 16), np.float32), np.ones(4, np.int32), None], "hash_lut"),
        ("dense_router", [np.ones((4, 8), np.float32), None], "weight"),
        ("expert_dispatch", [None], "expert_ids"),
        ("permute", [None, DISPATCH], "x"),
        ("combine", [None, DISPATCH], "y"),
        ("expert_counts", [None], "expert_ids"),
    ],
)
def test_no_array(op, operands, argument):
    required = {"top_k": 1, "k": 1, "num_experts": 3}
    names = inspect.signature(getattr(jax_router, op)).parameters
    options = {name: value for name, value in required.items() if name in names}
    with pytest.raises(TypeError, match=says(f"{argument} must be an array got")):
        getattr(jax_router, op)(*operands, **options)


@pytest.mark.parametrize("op", OPS)
def test_native_without_a_kernel(op):
    """A platform that no native module serves: its lowering names what is loaded and what to do."""
    traced = jax.jit(native(op)).trace(*OPS[op].draw(4))
    with pytest.raises(NotImplementedError, match=says("native no native kernel for tpu loaded auto")):
        traced.lower(lowering_platforms=("tpu",))


def test_advice_without_any_native_module(monkeypatch):
    monkeypatch.setattr(_native, "load", lambda platform: ImportError(f"built without {platform}"))
    assert re.search(says("no platform built without cpu built without cuda nvcc"), _native.how_to_get_kernels())
    assert _native.custom_call_targets() == ()


@pytest.mark.parametrize(
    ("op", "operands", "options", "words"),
    [
        ("activation_topk", [F32((2, 5000))], {"top_k": 2}, "4096 experts 5000"),
        ("activation_topk", [F32((2, 100))], {"top_k": 65}, "top_k = 64 65"),
        ("route_at", [F32((2, 5000)), I32((2, 6))], {}, "4096 experts 5000"),
        ("hash_router", [I32((2,)), I32((9, 65))], {}, "top_k = 64 65"),
        ("dense_router", [F32((2, 8)), F32((5000, 8))], {"top_k": 2}, "4096 experts 5000"),
        ("expert_dispatch", [I32((2, 6))], {"num_experts": 5000}, "4096 experts 5000"),
        ("permute", [F32((2, 8)), Dispatch(I32((130,)), I32((2, 65)), I32((9,)))], {}, "64 choices 65"),
        ("combine", [F32((130, 8)), Dispatch(I32((130,)), I32((2, 65)), I32((9,)))], {}, "64 choices 65"),
        ("expert_counts", [I32((2, 6))], {"num_experts": 5000}, "4096 experts 5000"),
    ],
)
def test_native_beyond_the_kernels(op, operands, options, words):
    function = partial(getattr(jax_router, op), implementation="native", **options)
    with pytest.raises(NotImplementedError, match=says(words)):
        jax.jit(function).lower(*operands)


CONFIG = {"hidden_size": 8, "num_experts": 16, "top_k": 2}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"hidden_size": 0}, ValueError, "hidden_size at least 1 0"),
        ({"num_experts": 2.5}, TypeError, "num_experts int 2.5"),
        ({"top_k": 17}, ValueError, "top_k between 1 and 16 17"),
        ({"mode": "soft"}, ValueError, "mode 'dense', 'hash' 'soft'"),
        ({"mode": "hash"}, ValueError, "vocab_size None"),
        ({"mode": "hash", "vocab_size": 0}, ValueError, "vocab_size at least 1 0"),
        ({"hash_weights": "learned"}, ValueError, "hash_weights 'uniform', 'scored' 'learned'"),
        ({"score_fn": "relu"}, ValueError, "score_fn 'relu'"),
        ({"num_groups": 5}, ValueError, "num_groups divide 16 5"),
        ({"num_groups": 4}, ValueError, "top_groups num_groups = 4 between 1 and 4 None"),
        ({"hidden_size": HUGE}, ValueError, f"hidden_size at most {MOST} {HUGE}"),
        ({"num_experts": HUGE}, ValueError, f"num_experts at most {MOST} {HUGE}"),
        ({"mode": "hash", "vocab_size": HUGE}, ValueError, f"vocab_size at most {MOST} {HUGE}"),
        ({"vocab_size": "x"}, TypeError, "vocab_size int 'x'"),
        ({"vocab_size": True}, TypeError, "vocab_size int True"),
        ({"hash_weights": "scored"}, ValueError, "hash_weights 'uniform' mode='dense' 'scored'"),
        ({"logit_bias": 1}, TypeError, "logit_bias True False 1"),
        ({"logit_bias": True, "mode": "hash", "vocab_size": 9}, ValueError, "logit_bias False uniform no logits"),
        ({"precision": "exact"}, ValueError, "precision 'highest' 'exact'"),
        ({"implementation": "cuda"}, ValueError, "implementation 'auto', 'native', 'reference' 'cuda'"),
        ({"scale": 1e39}, ValueError, "scale range of float32 1e+39"),
        ({"scale": "2"}, TypeError, "scale number '2'"),
        ({"scale": True}, TypeError, "scale number True"),
        ({"param_dtype": "bf16"}, TypeError, "param_dtype jnp.bfloat16 'bf16'"),
        ({"param_dtype": None}, TypeError, "param_dtype jnp.float32 None"),
        ({"param_dtype": np.float64}, TypeError, "param_dtype jnp.float32 float64"),
        ({"dtype": jnp.float8_e4m3fn}, TypeError, "dtype jnp.bfloat16 float8_e4m3fn"),
    ],
)
def test_router_config(change, error, words):
    with pytest.raises(error, match=says(words)):
        RouterConfig(**{**CONFIG, **change})


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ([CONFIG], {}, TypeError, "config RouterConfig RouterConfig(**options) {'hidden_size': 8"),
        ([None], {}, TypeError, "config RouterConfig None"),
        ([RouterConfig(**CONFIG)], {"rngs": 0}, TypeError, "rngs Rngs nnx.Rngs(0) 0"),
        ([RouterConfig(**CONFIG)], {"rngs": jax.random.key(0)}, TypeError, "rngs Rngs nnx.Rngs(0) Array"),
        (
            [RouterConfig(**CONFIG)],
            {"weight_init": lambda key, shape, dtype: jnp.zeros(shape[::-1], dtype)},
            ValueError,
            "weight_init must have shape",
        ),
        (
            [RouterConfig(**CONFIG)],
            {"weight_init": None},
            TypeError,
            "weight_init function lecun_normal None",
        ),
        ([RouterConfig(**CONFIG)], {"hash_lut_init": 1}, TypeError, "hash_lut_init function random_hash_table 1"),
    ],
)
def test_router(arguments, options, error, words):
    with pytest.raises(error, match=says(words)):
        Router(*arguments, **{"rngs": nnx.Rngs(0), **options})


def test_integers_beyond_their_dtype():
    """Python's own, of which JAX makes int32."""
    with pytest.raises(ValueError, match=says("token_ids array holds integers [1000000000000]")):
        jax_router.hash_router([10**12], np.zeros((9, 2), np.int32))


@pytest.mark.parametrize(
    ("table", "error", "words"),
    [
        (np.zeros((9, 2), np.float32), TypeError, "hash_lut_init integer float32"),
        (np.zeros((2, 9), np.int32), ValueError, "hash_lut_init (9, 2) (2, 9)"),
        (np.zeros((9, 3), np.int32), ValueError, "hash_lut_init (9, 2) (9, 3)"),
        (None, TypeError, "hash_lut_init array None"),
    ],
)
def test_initial_table(table, error, words):
    config = RouterConfig(**CONFIG, mode="hash", vocab_size=9)
    with pytest.raises(error, match=says(words)):
        Router(config, rngs=nnx.Rngs(0), hash_lut_init=lambda *_: table)


@pytest.mark.parametrize(
    ("shape", "num_experts", "error", "words"),
    [
        (10, 16, TypeError, "shape (vocab_size, k) 10"),
        ((10,), 16, TypeError, "shape (vocab_size, k) (10,)"),
        ((10, 17), 16, ValueError, "shape[1] (k) between 1 and 16 17"),
        ((0, 2), 16, ValueError, "shape[0] (vocab_size) at least 1 0"),
        ((10, 2), 1.5, TypeError, "num_experts int 1.5"),
    ],
)
def test_random_hash_table(shape, num_experts, error, words):
    with pytest.raises(error, match=says(words)):
        random_hash_table(jax.random.key(0), shape, num_experts)


@pytest.mark.parametrize("key", [0, None, np.zeros(2), np.zeros((2, 2), np.uint32)], ids=str)
def test_random_hash_table_without_a_key(key):
    with pytest.raises(TypeError, match=r"key must be a key, jax.random.key\(0\) for example, got "):
        random_hash_table(key, (5, 2), 3)


X4, IDS4, MASK4 = np.ones((4, 8), np.float32), np.zeros(4, np.int32), np.ones(4, bool)


@pytest.mark.parametrize(
    ("mode", "x", "options", "error", "words"),
    [
        ("dense", X4[:, :7], {}, ValueError, "x (..., 8) hidden_size (4, 7)"),
        ("dense", X4.astype(np.int32), {}, TypeError, "x float32 int32"),
        ("dense", None, {}, TypeError, "x array None"),
        ("dense", X4, {"token_ids": MASK4}, TypeError, "token_ids integer bool"),
        ("dense", X4, {"token_ids": IDS4[:3]}, ValueError, "token_ids (4,) (3,)"),
        ("dense", X4, {"token_mask": IDS4}, TypeError, "token_mask bool int32"),
        ("dense", X4, {"token_mask": MASK4[:3]}, ValueError, "token_mask (4,) (3,)"),
        ("dense", X4, {"return_logits": 1}, TypeError, "return_logits True False 1"),
        ("hash", X4, {}, ValueError, "token_ids None"),
        ("hash", X4, {"token_ids": IDS4[:3]}, ValueError, "token_ids (4,) (3,)"),
        ("hash", X4, {"token_ids": X4[:, 0]}, TypeError, "token_ids integer float32"),
        ("hash", X4, {"token_ids": IDS4, "return_logits": True}, ValueError, "return_logits False uniform"),
        ("hash", X4, {"token_ids": IDS4, "token_mask": MASK4[:3]}, ValueError, "token_mask (4,) (3,)"),
    ],
)
def test_router_call(mode, x, options, error, words):
    router = Router(RouterConfig(**CONFIG, mode=mode, vocab_size=9), rngs=nnx.Rngs(0))
    with pytest.raises(error, match=says(words)):
        router(x, **options)


def test_a_mask_is_not_taken_for_token_ids():
    """All arguments but the hidden states have names."""
    router = Router(RouterConfig(**CONFIG), rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="positional argument"):
        router(X4, MASK4)
