"""What tests and benchmarks share: the routers of real models, an oracle, and the examples as modules.

The tests have this folder itself on their path (`pythonpath` in pyproject.toml), and import its modules by their own
names: the root of a checkout must stay off the path of the tests, where its `jax_router` would hide the installed one.
`python -m benchmarks` has the root on its path, and imports `support.<module>`. So that both work, the modules import
nothing of each other.
"""
