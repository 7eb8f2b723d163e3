"""Importing the package, a second time too."""

import subprocess
import sys

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
