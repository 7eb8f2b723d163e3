"""What the native kernels can compute: the limits are those of the C++ code, read from its modules."""

from __future__ import annotations

from types import ModuleType

from . import _ffi


def unsupported_selection(platform: str, num_experts: int, top_k: int) -> str | None:
    """Why the kernels of a platform cannot select `top_k` of `num_experts`, or None."""
    module = _ffi.load(platform)
    assert isinstance(module, ModuleType), module
    if num_experts > module.max_experts:
        return f"at most {module.max_experts} experts, got {num_experts}"
    if top_k > module.max_top_k:
        return f"at most top_k = {module.max_top_k}, got {top_k}"
    return None
