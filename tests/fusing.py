"""Prints which custom calls dense_router is on CUDA, for a native module that says what it is told to say."""

import functools
import importlib.machinery
import json
import re
import sys
import types

import jax
import jax.numpy as jnp
from jax import lax

cuda = types.ModuleType("jax_router._cuda")
cuda.__spec__ = importlib.machinery.ModuleSpec(cuda.__name__, loader=None)
sys.modules[cuda.__name__] = cuda
answers = {"unsupported": "", "unsupported weight in float32": "", "pays": True}


def declarations():
    from jax_router._primitive import OPS

    return {op.name: op.declaration() for op in OPS if "cuda" in op.platforms}


cuda.ffi_api_version = (0, 0)
cuda.max_experts, cuda.max_top_k = 4096, 64
cuda.targets = dict
cuda.declarations = declarations
cuda.dense_router_unsupported = lambda *, dtype, weight_dtype, **sizes: answers[
    "unsupported" if dtype == weight_dtype else "unsupported weight in float32"
]
cuda.pays_everywhere = lambda op, **sizes: answers["pays"]
cuda.workspace_bytes = lambda op, **sizes: 4096

import jax_router  # noqa: E402


def calls(implementation, num_experts=256, dtype=jnp.bfloat16, weight_dtype=None, tokens=4, precision=None):
    route = functools.partial(jax_router.dense_router, top_k=6, precision=precision, implementation=implementation)
    x = jax.ShapeDtypeStruct((tokens, 32), dtype)
    weight = jax.ShapeDtypeStruct((num_experts, 32), weight_dtype or dtype)
    try:
        text = jax.jit(route).trace(x, weight).lower(lowering_platforms=("cuda",)).as_text()
    except NotImplementedError as error:
        return str(error).partition(" on cuda: ")[2]
    return re.findall(r"custom_call @jax_router\.(\w+)", text)


printed = {implementation: calls(implementation) for implementation in ("auto", "native")}
answers["unsupported"] = "no kernel takes so many experts"
printed |= {f"{implementation}, unsupported": calls(implementation) for implementation in ("auto", "native")}
printed["native, unsupported, nor is the selection"] = calls("native", num_experts=5000)
answers.update(unsupported="", pays=False)
printed |= {f"{implementation}, does not pay": calls(implementation) for implementation in ("auto", "native")}
answers["pays"] = True
printed["native, of float32 at another precision"] = calls("native", dtype=jnp.float32, precision=lax.Precision.DEFAULT)
mixed = functools.partial(calls, "native", weight_dtype=jnp.float32)
printed["weight in float32"] = mixed(tokens=65)
answers["unsupported weight in float32"] = "no kernel takes an x in another dtype"
printed |= {f"{tokens} tokens, unsupported weight in float32": mixed(tokens=tokens) for tokens in (4, 65)}
print(json.dumps(printed))
