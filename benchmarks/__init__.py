"""Benchmarks: `python -m benchmarks`, from the root of a checkout. See `timing.py` for how a figure is taken."""
