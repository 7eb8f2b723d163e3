"""What the native kernels can compute: the limits are those of the C++ code, read from its modules."""

from __future__ import annotations

from types import ModuleType

from . import _ffi


def native_limits(platform: str) -> ModuleType:
    """The native module of a platform that has one: its attributes are its limits."""
    module = _ffi.load(platform)
    assert isinstance(module, ModuleType), module
    return module


def unsupported_selection(platform: str, num_experts: int, top_k: int) -> str | None:
    """Why the kernels of a platform cannot select `top_k` of `num_experts`, or None."""
    limits = native_limits(platform)
    if num_experts > limits.max_experts:
        return f"at most {limits.max_experts} experts, got {num_experts}"
    if top_k > limits.max_top_k:
        return f"at most top_k = {limits.max_top_k}, got {top_k}"
    return None
