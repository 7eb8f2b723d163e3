"""Loads the native modules, checks that this jaxlib can run them, and registers their custom-call targets."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from types import ModuleType

import jax
import jaxlib

from ._install import native_module

# Native module by lowering platform, and what jax.ffi calls that platform.
_MODULES = {"cpu": ("_cpu", "cpu"), "cuda": ("_cuda", "CUDA")}


@functools.cache
def load(platform: str) -> ModuleType | ImportError:
    """The native module of a platform with its targets registered, or why it is not there."""
    name, ffi_platform = _MODULES[platform]
    try:
        module = native_module(name)
    except ImportError as error:
        return error
    _check_ffi_api(module)
    for op_name, handler in module.targets().items():
        jax.ffi.register_ffi_target(target_name(op_name), handler, platform=ffi_platform)
        jax.ffi.register_ffi_target_as_batch_partitionable(target_name(op_name))
    return module


def target_name(op_name: str) -> str:
    """The name of an op's custom-call target, the same on every platform."""
    return f"jax_router.{op_name}"


def platforms_of(op_name: str) -> list[str]:
    """The platforms that have a native kernel of an op."""
    return [platform for platform in _MODULES if op_name in _op_names(platform)]


def custom_call_targets() -> tuple[str, ...]:
    """All custom-call targets that this installation may put into a program, for the safety check of `jax.export`."""
    return tuple(sorted({target_name(name) for platform in _MODULES for name in _op_names(platform)}))


def how_to_get_kernels() -> str:
    """What to do where a native kernel is missing."""
    missing = [f"{name}: {error}" for name in _MODULES if isinstance(error := load(name), ImportError)]
    have = [name for name in _MODULES if not isinstance(load(name), ImportError)]
    advice = "" if not missing else f" Not loaded: {'; '.join(missing)}."
    return (
        f"Kernels are loaded for: {', '.join(have) or 'no platform'}.{advice} implementation='auto' falls back to the "
        "reference; to get the CUDA kernels, install jax-router again with nvcc on the PATH."
    )


def _op_names(platform: str) -> frozenset[str]:
    module = load(platform)
    return frozenset() if isinstance(module, ImportError) else frozenset(module.targets())


def runtime_ffi_api() -> tuple[int, int]:
    """The version of XLA's FFI API that this jaxlib has."""
    header = (Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h").read_text()
    major, minor = (
        int(re.search(rf"#define XLA_FFI_API_{part} (\d+)", header)[1])  # type: ignore[index]
        for part in ("MAJOR", "MINOR")
    )
    return major, minor


def _check_ffi_api(module: ModuleType) -> None:
    """XLA runs handlers that were built for its FFI API version or an older one, and fails obscurely on newer ones."""
    runtime = runtime_ffi_api()
    built = tuple(module.ffi_api_version)
    if built[0] != runtime[0] or built > runtime:
        raise ImportError(
            f"{module.__name__} was built for XLA FFI API {built[0]}.{built[1]}, but jaxlib {jaxlib.__version__} has "
            f"{runtime[0]}.{runtime[1]}. Upgrade jax and jaxlib, or rebuild jax-router against this jaxlib: "
            "pip install --force-reinstall --no-deps jax-router."
        )
