"""Benchmarks: `python -m benchmarks`, from the root of a checkout. `jax_router/_timing.py` takes the figures."""
