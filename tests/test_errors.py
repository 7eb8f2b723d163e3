"""What is wrong with a call is said at trace time, with the argument, what it got and what it takes."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jax_router
from jax_router import Router, RouterConfig, _native
from matrix import OPS, native

F32 = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
BF16 = partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
F64 = partial(jax.ShapeDtypeStruct, dtype=jnp.float64)
I32 = partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
BOOL = partial(jax.ShapeDtypeStruct, dtype=jnp.bool_)

LOGITS = F32((4, 16))
X, WEIGHT = F32((4, 8)), F32((16, 8))

TOP_1 = {"top_k": 1}

# The op, its operands, its options, the error, and what its message says in this order.
ERRORS = {
    # activation_topk
    "logits have no axis": ("activation_topk", [F32(())], TOP_1, ValueError, "logits 1 axes ()"),
    "logits are integers": ("activation_topk", [I32((4, 16))], TOP_1, TypeError, "logits float32 int32"),
    "logits are bool": ("activation_topk", [BOOL((4, 16))], TOP_1, TypeError, "logits float32 bool"),
    "no experts": ("activation_topk", [F32((4, 0))], TOP_1, ValueError, "logits at least one expert (4, 0)"),
    "bias of other experts": ("activation_topk", [LOGITS, F32((15,))], TOP_1, ValueError, "bias (16,) (4, 16) (15,)"),
    "bias of other tokens": ("activation_topk", [LOGITS, F32((5, 16))], TOP_1, ValueError, "bias (4, 16) (5, 16)"),
    "bias in bf16": ("activation_topk", [LOGITS, BF16((16,))], TOP_1, TypeError, "bias float32 bfloat16"),
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
    "scale is nan": ("activation_topk", [LOGITS], {"top_k": 1, "scale": float("nan")}, ValueError, "scale finite nan"),
    "groups do not divide": ("activation_topk", [LOGITS], {"top_k": 1, "num_groups": 3}, ValueError,
                             "num_groups divide 16 3"),
    "groups above E": ("activation_topk", [LOGITS], {"top_k": 1, "num_groups": 17}, ValueError,
                       "num_groups between 1 and 16 17"),
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
    # topk_select
    "scores have no axis": ("topk_select", [F32(())], {"k": 1}, ValueError, "scores 1 axes ()"),
    "scores of integers": ("topk_select", [I32((4, 9))], {"k": 1}, TypeError, "scores float32 int32"),
    "k above L": ("topk_select", [F32((4, 9))], {"k": 10}, ValueError, "k between 1 and 9 scores 10"),
    "select none": ("topk_select", [F32((4, 9))], {"k": 0}, ValueError, "k between 1 and 9 0"),
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
    "weight of another dtype": ("dense_router", [X, BF16((16, 8))], TOP_1, TypeError, "weight float32 bfloat16 cast"),
    "logit_bias in bf16": ("dense_router", [X, WEIGHT], {"top_k": 1, "logit_bias": BF16((16,))}, TypeError,
                           "logit_bias float32 bfloat16"),
    "logit_bias of other experts": ("dense_router", [X, WEIGHT], {"top_k": 1, "logit_bias": F32((8,))}, ValueError,
                                    "logit_bias (16,) (8,)"),
    "dense_router: bias": ("dense_router", [X, WEIGHT, F32((8,))], TOP_1, ValueError, "bias (16,) (8,)"),
    "dense_router: k above E": ("dense_router", [X, WEIGHT], {"top_k": 17}, ValueError, "top_k between 1 and 16 17"),
    # expert_dispatch
    "dispatch of floats": ("expert_dispatch", [F32((4, 2))], {"num_experts": 3}, TypeError,
                           "expert_ids integer float32"),
    "dispatch of a scalar": ("expert_dispatch", [I32(())], {"num_experts": 3}, ValueError, "expert_ids 1 axes ()"),
    "dispatch of no choice": ("expert_dispatch", [I32((4, 0))], {"num_experts": 3}, ValueError, "expert_ids (4, 0)"),
    "dispatch to none": ("expert_dispatch", [I32((4, 2))], {"num_experts": 0}, ValueError, "num_experts at least 1 0"),
    "dispatch to a float": ("expert_dispatch", [I32((4, 2))], {"num_experts": 3.0}, TypeError, "num_experts int 3.0"),
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


@pytest.mark.parametrize("op", [op for op, case in OPS.items() if case.floats])
def test_float64_says_to_cast(op):
    first, *others = OPS[op].draw(4)
    with jax.enable_x64(True), pytest.raises(TypeError, match=says("float32, bfloat16 or float16 cast float64")):
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
    with pytest.raises(TypeError, match=says(f"{option} must be a Python int")):
        jax.eval_shape(lambda array, size: getattr(jax_router, op)(array, **{option: size}), array, I32(()))


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
    ],
)
def test_router_config(change, error, words):
    with pytest.raises(error, match=says(words)):
        RouterConfig(**{**CONFIG, **change})


def test_router_call():
    dense = Router(RouterConfig(**CONFIG), rngs=nnx.Rngs(0))
    hashed = Router(RouterConfig(**CONFIG, mode="hash", vocab_size=9), rngs=nnx.Rngs(0))
    x = jnp.ones((4, 8))
    with pytest.raises(ValueError, match=says("x (..., 8) hidden_size (4, 7)")):
        dense(x[:, :7])
    with pytest.raises(TypeError, match=says("x float32 int32")):
        dense(jnp.ones((4, 8), jnp.int32))
    with pytest.raises(ValueError, match=says("token_ids None")):
        hashed(x)
    with pytest.raises(ValueError, match=says("token_ids (4,) (3,)")):
        hashed(x, jnp.zeros(3, jnp.int32))
    with pytest.raises(ValueError, match=says("return_logits False uniform")):
        hashed(x, jnp.zeros(4, jnp.int32), return_logits=True)
    with pytest.raises(ValueError, match=says("token_mask (4,) (3,)")):
        hashed(x, jnp.zeros(4, jnp.int32), jnp.ones(3, bool))
