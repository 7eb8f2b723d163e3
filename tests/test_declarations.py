"""Python and the native modules say the same of every op, or the package does not load."""

import re

import pytest

from jax_router import _native, _primitive
from jax_router._native import PLATFORMS

LOADED = [platform for platform in PLATFORMS if not isinstance(_native.load(platform), ImportError)]


def declared(platform):
    """What Python says."""
    return {op.name: op.declaration() for op in _primitive.OPS if platform in op.platforms}


@pytest.mark.parametrize("platform", LOADED)
def test_the_loaded_module_says_the_same(platform):
    said = _native.native_module(platform).declarations()
    assert said == declared(platform)
    assert set(said) == set(_native.native_module(platform).targets())


def test_dense_router_has_kernels_on_cuda_alone():
    assert "dense_router" in declared("cuda")
    assert "dense_router" not in declared("cpu")
    assert not any("route_tangent" in declared(platform) for platform in PLATFORMS)


def test_a_declaration():
    assert declared("cpu")["topk_select"] == {
        "operands": ("scores", "lengths?"),
        "results": ("values", "indices"),
        "attributes": {"k": "int64", "sorted": "bool", "has_lengths": "bool"},
    }
    assert declared("cpu")["activation_topk"]["attributes"] == {
        "score_fn": "string",
        "renormalize": "bool",
        "scale": "float32",
        "eps": "float32",
        "top_k": "int64",
        "num_groups": "int64",
        "top_groups": "int64",
        "group_score": "string",
        "has_bias": "bool",
        "has_token_mask": "bool",
    }


def without(mapping, name):
    return {key: value for key, value in mapping.items() if key != name}


# What Python would say of topk_select if somebody had made a mistake, and what the error says.
MISTAKES = {
    "swapped operands": ("operands", lambda names: names[::-1], "(scores, lengths?) (lengths?, scores)"),
    "an operand is not optional": ("operands", lambda names: ("scores", "lengths"), "lengths? lengths)"),
    "an operand too many": ("operands", lambda names: (*names, "mask?"), "lengths? mask?"),
    "a result is missing": ("results", lambda names: names[:1], "(values, indices) (values)"),
    "misspelt result": ("results", lambda names: ("values", "indexes"), "indices indexes"),
    "misspelt attribute": ("attributes", lambda types: {**without(types, "k"), "top_k": types["k"]}, "k: int64 top_k"),
    "an attribute that nobody reads": ("attributes", lambda types: {**types, "scale": "float32"}, "scale: float32"),
    "an attribute that nobody sends": ("attributes", lambda types: without(types, "sorted"), "sorted: bool k: int64"),
    "an attribute of another type": ("attributes", lambda types: {**types, "k": "float32"}, "k: int64 k: float32"),
}


def says(words):
    return ".*".join(map(re.escape, words.split()))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_an_import_error(mistake):
    part, change, words = MISTAKES[mistake]
    ops = declared(LOADED[0])
    ops["topk_select"] = {**ops["topk_select"], part: change(ops["topk_select"][part])}
    with pytest.raises(ImportError, match=says(f"{part} topk_select {words}")):
        _native.register(LOADED[0], ops)


def test_ops_that_one_of_both_lacks():
    """As a misspelt name looks from both sides."""
    ops = declared(LOADED[0])
    ops["topk_selekt"] = ops.pop("topk_select")
    with pytest.raises(ImportError, match=says("no op topk_selekt Python has no op topk_select Build it again")):
        _native.register(LOADED[0], ops)


def test_every_op_is_compared(monkeypatch):
    """One that nobody wrote a kernel of stops the import, unless it says so."""
    monkeypatch.setattr(_primitive, "OPS", list(_primitive.OPS))
    template = {"operands": {"x": _primitive.Operand(1)}, "results": ("y",), "result_types": None, "reference": None}
    _primitive.Op(name="without_kernels", platforms=(), **template)
    _primitive.Op(name="misspelt", **template)
    with pytest.raises(ImportError, match=says("misspelt")) as error:
        _primitive.use_kernels()
    assert "without_kernels" not in str(error.value)
