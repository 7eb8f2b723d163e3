"""Settings of the whole suite: several CPU devices, no implicit promotion, and property tests that repeat."""

import os

# Before JAX makes its CPU client, so that sharding is tested on a machine without accelerators too.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

import hypothesis
import jax
import numpy as np
import pytest

import matrix

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile(
    "jax_router",
    deadline=None,  # a new shape compiles
    derandomize=True,
    max_examples=40,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("jax_router")


# Tests of rounding, and of what repeats to the bit: of the code that users run.
OPTIMIZED = {
    "test_derivatives",
    "test_determinism",
    "test_mixed_precision",
    "test_product",
    "test_properties",
    "test_reference",
}


@pytest.fixture(scope="module", autouse=True)
def _little_optimization(request):
    """Most of the suite's time is LLVM's: on CPU, XLA leaves its optimizations out, but not those of its own passes."""
    plain = jax.default_backend() == "cpu" and request.path.stem not in OPTIMIZED
    jax.config.update("jax_disable_most_optimizations", plain)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module", autouse=True)
def _forgotten_programs():
    """JAX would keep the thousands of programs of the whole suite, each with a context of MLIR."""
    yield
    jax.clear_caches()


def pytest_addoption(parser):
    parser.addoption("--write-docs", action="store_true", help=f"write what the tests measure to {matrix.DOCUMENT}")


def pytest_configure(config):
    matrix.writing = config.getoption("--write-docs")


def pytest_sessionfinish():
    if matrix.writing:
        for table in matrix.TABLES:
            table.write()


@pytest.fixture
def rng():
    return np.random.default_rng(2026)


@pytest.fixture(params=["native", "reference"])
def implementation(request):
    return request.param


@pytest.fixture
def f32_products():
    """Products of f32 in f32, where a GPU would take fewer bits by default."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="session")
def devices():
    """The most local devices that are a power of two, at least two of them."""
    local = jax.local_devices()
    if len(local) < 2:
        pytest.skip(f"sharding needs several devices; this machine has one: {local[0]}")
    return local[: 1 << (len(local).bit_length() - 1)]
