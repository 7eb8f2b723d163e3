"""The native modules: finding them, checking that they are what Python takes them for, and what they can compute."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module, metadata
from importlib.machinery import PathFinder
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any, TypedDict, get_type_hints

import jax
import jaxlib
import numpy as np

from ._version import __version__

# By lowering platform: the module, and what jax.ffi calls that platform.
_MODULES = {"cpu": ("_cpu", "cpu"), "cuda": ("_cuda", "CUDA")}

PLATFORMS = tuple(_MODULES)

_BUILD_AGAIN = "pip install --force-reinstall --no-deps . (in the folder of its source)"

HOW_TO_BUILD_CUDA = (
    "To get the CUDA kernels, install jax-router from source with the environment variable JAX_ROUTER_CUDA=ON and nvcc "
    "on PATH, or with JAX_ROUTER_CUDA_WHEELS=1, which takes nvcc from wheels."
)


# Loading


@functools.cache
def load(platform: str) -> ModuleType | ImportError:
    """The native module of a platform, or why it is not there.

    Raises:
        ImportError: it is there, and this jaxlib cannot run it.
    """
    name, _ = _MODULES[platform]
    try:
        module = _find(f"{__package__}.{name}")
    except ImportError as error:
        return error
    _check_ffi_api(module)
    return module


def _find(full_name: str) -> ModuleType:
    """Imports a native module.

    It lies beside this file, with one exception: in a checkout, `python -m jax_router` imports the source folder, which
    Python finds in the current folder before it looks at what is installed, and which holds no compiled code. The
    native module is then taken from the installation, if that has the same version.

    Raises:
        ImportError: there is no such module, with what to do about it; or it does not load.
    """
    if importlib.util.find_spec(full_name):
        return import_module(full_name)
    here = Path(__file__).parent
    try:
        installed = metadata.distribution("jax-router")
    except metadata.PackageNotFoundError:
        raise ImportError(f"jax_router is not installed: run `pip install {here.parent}`", name=full_name) from None
    if installed.version != __version__:
        raise ImportError(
            f"jax_router {__version__} in {here} cannot use the native modules of the installed version "
            f"{installed.version}: run `pip install {here.parent}`",
            name=full_name,
        )
    spec = PathFinder.find_spec(full_name, [str(installed.locate_file(__package__))])
    if spec is None or spec.loader is None:
        obstacle = ""
        if full_name == f"{__package__}._cuda" and isinstance(cpu := load("cpu"), ModuleType):
            obstacle = f": {cpu.cuda_obstacle}"
        raise ImportError(f"this installation of jax_router was built without {full_name}{obstacle}", name=full_name)
    module = importlib.util.module_from_spec(spec)
    sys.modules[full_name] = module
    spec.loader.exec_module(module)
    return module


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
            f"{runtime[0]}.{runtime[1]}. Upgrade jax and jaxlib, or build jax-router again, for the oldest jaxlib that "
            f"it supports: {_BUILD_AGAIN}"
        )


# Declarations: what Python and a native module say of an op


class Declaration(TypedDict):
    """How an op is called.

    Attributes:
        operands: the names, in order; an optional one has a "?" behind it.
        results: likewise.
        attributes: by name, the types; `has_<operand>` of each optional operand among them.
    """

    operands: tuple[str, ...]
    results: tuple[str, ...]
    attributes: dict[str, str]


# Of each type of a parameter: the attribute's type, and the value as which it is sent. JAX caches attributes by Python
# equality, where 2 == 2.0 == np.int32(2), so that every number must get its own type here.
_ATTRIBUTE_TYPES: dict[type, tuple[str, Callable[[Any], Any]]] = {
    bool: ("bool", np.bool_),
    int: ("int64", np.int64),
    float: ("float32", np.float32),
    str: ("string", str),
}


def attribute_types(parameters: Mapping[str, type]) -> dict[str, str]:
    """The attributes as which parameters of these types are sent. A dataclass is sent as its fields."""
    types: dict[str, str] = {}
    for name, kind in parameters.items():
        if dataclasses.is_dataclass(kind):
            types.update(attribute_types(get_type_hints(kind)))
        else:
            types[name] = _ATTRIBUTE_TYPES[kind][0]
    return types


def attribute_values(parameters: Mapping[str, type], values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of those attributes."""
    attributes: dict[str, Any] = {}
    for name, kind in parameters.items():
        if dataclasses.is_dataclass(kind):
            attributes.update(attribute_values(get_type_hints(kind), vars(values[name])))
        else:
            attributes[name] = _ATTRIBUTE_TYPES[kind][1](values[name])
    return attributes


def register(platform: str, declared: Mapping[str, Declaration]) -> None:
    """Registers the custom-call targets of a platform that has a native module.

    Raises:
        ImportError: the module does not have these ops, no other ones, and as they are declared.
    """
    module = native_module(platform)
    differences = _differences(declared, module.declarations())
    if differences:
        raise ImportError(
            f"{module.__name__} is not the native module of jax_router {__version__} in {Path(__file__).parent}: "
            f"{'; '.join(differences)}. Build it again: {_BUILD_AGAIN}"
        )
    for name, handler in module.targets().items():
        jax.ffi.register_ffi_target(target_name(name), handler, platform=_MODULES[platform][1])
        jax.ffi.register_ffi_target_as_batch_partitionable(target_name(name))


def _differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """What Python and the module say differently of the ops, one sentence each."""
    found = [f"it has no op {name}" for name in ours if name not in theirs]
    found += [f"Python has no op {name}" for name in theirs if name not in ours]
    for name in ours:
        for part in Declaration.__annotations__ if name in theirs else ():
            mine, its = ours[name][part], theirs[name][part]
            if mine != its:
                found.append(f"the {part} of {name} are {_shown(its)} there and {_shown(mine)} in Python")
    return found


def _shown(part: Any) -> str:
    names = [f"{name}: {kind}" for name, kind in sorted(part.items())] if isinstance(part, dict) else part
    return f"({', '.join(names)})"


def target_name(op_name: str) -> str:
    """The name of an op's custom-call target, the same on every platform."""
    return f"jax_router.{op_name}"


def custom_call_targets() -> tuple[str, ...]:
    """All custom-call targets that this installation may put into a program, for the safety check of `jax.export`.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jax_router import custom_call_targets, topk_select
        >>> allowed = [jax.export.DisabledSafetyCheck.custom_call(target) for target in custom_call_targets()]
        >>> step = jax.jit(lambda scores: topk_select(scores, 2))
        >>> exported = jax.export.export(step, disabled_checks=allowed)(jnp.array([3.0, 1.0, 2.0]))
        >>> saved = exported.serialize()
        >>> jax.export.deserialize(saved).call(jnp.array([3.0, 1.0, 2.0]))[1]
        Array([0, 2], dtype=int32)
    """
    modules = [module for platform in PLATFORMS if isinstance(module := load(platform), ModuleType)]
    return tuple(sorted({target_name(name) for module in modules for name in module.targets()}))


# What there is, and its limits


# What the native modules call the dtypes that kernels compute with.
NATIVE_DTYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}

# GPUs, as the plans of the CUDA module want them described.
GPUS = {
    "A100": {"compute_capability": 80, "multiprocessors": 108, "shared_bytes": 163 * 1024},
    "L40S": {"compute_capability": 89, "multiprocessors": 142, "shared_bytes": 99 * 1024},
    "H100": {"compute_capability": 90, "multiprocessors": 132, "shared_bytes": 227 * 1024},
    "H200": {"compute_capability": 90, "multiprocessors": 132, "shared_bytes": 227 * 1024},
    "B200": {"compute_capability": 100, "multiprocessors": 148, "shared_bytes": 227 * 1024},
}


def native_module(platform: str) -> ModuleType:
    """The native module of a platform that has one. Its attributes are the limits of its kernels."""
    module = load(platform)
    assert isinstance(module, ModuleType), module
    return module


@contextlib.contextmanager
def forced_plan(op: str, plan: str) -> Iterator[None]:
    """Within it, every launch of an op's CUDA kernels in this process takes the plan of that name, or fails.

    For tests and measurements: afterwards, plans are chosen again. `plan` is one of the names that the CUDA module's
    `plans` gives for the sizes, or "" for the chosen one.

    Raises:
        ValueError: no op has that name.
    """
    module = native_module("cuda")
    module.force_plan(op, plan)
    try:
        yield
    finally:
        module.force_plan(op, "")


def choice_sizes(expert_ids: Any, num_experts: int) -> dict[str, int]:
    """Ids `[..., N, k]` as plans want to know them. Of open sizes it is one problem, which may be the largest."""
    *batch, tokens, k = expert_ids.shape
    problems = prod(batch) if all(isinstance(size, int) for size in batch) else 1
    if not isinstance(k, int):
        tokens, k = 2**31 - 1, 1  # as many choices as there can be
    tokens = tokens if isinstance(tokens, int) else (2**31 - 1) // k
    return {"batch": problems, "tokens": tokens, "k": k, "experts": num_experts}


def workspace_of_choices(op: str, platform: str, expert_ids: Any, num_experts: int, *, exported: bool) -> int | None:
    """Bytes a problem of an op on ids, where one of its kernels counts for another.

    An exported program may run on other GPUs, which share the choices out otherwise. It has what those of `GPUS` need,
    and an H100 for the longest problems: with that, every GPU finds a kernel.
    """
    if platform != "cuda":
        return None
    needed_on = functools.partial(native_module(platform).workspace_bytes, op)
    sizes = choice_sizes(expert_ids, num_experts)
    nbytes = needed_on(**sizes)
    if exported:
        longest = sizes | {"tokens": (2**31 - 1) // sizes["k"]}
        nbytes = max(nbytes, needed_on(GPUS["H100"], **longest), *(needed_on(gpu, **sizes) for gpu in GPUS.values()))
    return -(-nbytes // max(sizes["batch"], 1))


def unsupported_selection(platform: str, num_experts: int, top_k: int) -> str | None:
    """Why the kernels of a platform cannot select `top_k` of `num_experts`, or None."""
    limits = native_module(platform)
    if num_experts > limits.max_experts:
        return f"at most {limits.max_experts} experts, got {num_experts}"
    if top_k > limits.max_top_k:
        return f"at most top_k = {limits.max_top_k}, got {top_k}"
    return None


def how_to_get_kernels() -> str:
    """What to do where a native kernel is missing."""
    missing = [f"{name}: {error}" for name in PLATFORMS if isinstance(error := load(name), ImportError)]
    have = [name for name in PLATFORMS if not isinstance(load(name), ImportError)]
    advice = "" if not missing else f" Not loaded: {'; '.join(missing)}."
    return (
        f"Kernels are loaded for: {', '.join(have) or 'no platform'}.{advice} implementation='auto' falls back to the "
        f"reference. {HOW_TO_BUILD_CUDA}"
    )
