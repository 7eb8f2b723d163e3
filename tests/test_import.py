"""Importing the package, a second time too."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from jax_router import _native

PROGRAM = """
import sys
import jax
import jax.numpy as jnp
import jax_router
before = jax_router.Routing
for name in [name for name in sys.modules if name.partition(".")[0] == "jax_router"]:
    del sys.modules[name]
import jax_router
assert jax_router.Routing is not before
x = jnp.arange(16.0).reshape(2, 8)
weights, ids = jax.jit(lambda x: jax_router.activation_topk(x, top_k=2, implementation="native"))(x)
assert ids.tolist() == [[7, 6], [7, 6]]
assert jax.grad(lambda x: jax_router.activation_topk(x, top_k=2).weights[0, 0])(x).shape == x.shape
"""


def test_again_after_it_was_deleted():
    """As notebooks and test runners do it: JAX has registered its types and targets by then."""
    subprocess.run([sys.executable, "-W", "error", "-c", PROGRAM], check=True)


def built_for(*ffi_api):
    return SimpleNamespace(__name__="jax_router._cpu", ffi_api_version=ffi_api)


def test_modules_for_this_jaxlib_and_older_ones_load():
    major, minor = _native.runtime_ffi_api()
    for older in range(minor + 1):
        _native._check_ffi_api(built_for(major, older))


@pytest.mark.parametrize(("majors", "minors"), [(0, 1), (1, 0), (-1, 0)])
def test_a_module_for_another_jaxlib_does_not_load(majors, minors):
    """XLA would refuse its handlers when they are called, and not say why."""
    major, minor = _native.runtime_ffi_api()
    with pytest.raises(ImportError, match=rf"{major + majors}\.{minor + minors}, but jaxlib .* has {major}\.{minor}"):
        _native._check_ffi_api(built_for(major + majors, minor + minors))
