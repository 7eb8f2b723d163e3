"""`python -m jax_router doctor`: why a call is not native, or not fused, and how to mend it.

It needs nothing but the package itself, so that it runs where something is missing.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
import textwrap
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from types import ModuleType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from . import _native
from ._activation_topk import activation_topk
from ._case import Case
from ._dense_router import dense_router
from ._expert_dispatch import expert_dispatch
from ._explain import Answer, devices, explain, kernel_platform
from ._grouped_matmul import grouped_matmul
from ._native import GPUS
from ._permute import combine, permute
from ._types import Dispatch
from ._version import __version__


class Finding(NamedTuple):
    """One thing that was looked at.

    Attributes:
        level: "wrong" where a kernel cannot run that should; "note" where there is something to know.
        subject: what was looked at.
        text: what was found.
        mend: what to do about it.
    """

    level: Literal["ok", "note", "wrong"]
    subject: str
    text: str
    mend: str = ""


def run(case: Case, gpu: str | None) -> int:
    """Shows all findings. Returns 1 if something is wrong, else 0."""
    # A GPU whose memory another process holds is no finding; read when JAX makes its client.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    driver = find_driver()
    sections = {
        "Installation": [*versions(), *modules(is_needed=bool(gpu or (driver and driver.gpus)))],
        "Machine": [*machine(driver), *architectures(driver, gpu), *flags(os.environ.get("XLA_FLAGS", "")), *mesh()],
        f"Case: {case.describe()}" + f", on {gpu}" * bool(gpu): ops(case, gpu),
    }
    width = min(shutil.get_terminal_size().columns, 120)
    for title, findings in sections.items():
        print(textwrap.fill(title, width))
        for finding in findings:
            print(_shown(finding, width))
        print()
    wrong = sum(finding.level == "wrong" for findings in sections.values() for finding in findings)
    print(f"Wrong: {wrong}" if wrong else "Nothing is wrong.")
    return 1 if wrong else 0


def _shown(finding: Finding, width: int) -> str:
    head = f"  {finding.level:<6}{finding.subject:<21}"
    rest = " " * len(head)
    fill = partial(textwrap.fill, width=width, break_long_words=False, break_on_hyphens=False, subsequent_indent=rest)
    lines = [fill(finding.text, initial_indent=head)]
    if finding.mend:
        lines.append(fill(finding.mend, initial_indent=f"{rest}-> ", subsequent_indent=f"{rest}   "))
    return "\n".join(lines)


# The installation


def versions() -> Iterator[Finding]:
    names = "jax", "jaxlib", "flax", "numpy"
    found = ", ".join(f"{name} {metadata.version(name)}" for name in names)
    yield Finding("ok", "versions", f"jax_router {__version__}, {found}, Python {platform.python_version()}")


def modules(*, is_needed: bool) -> Iterator[Finding]:
    """The native modules. That of CUDA is needed where there is a GPU, or one is asked for."""
    runtime = "{}.{}".format(*_native.runtime_ffi_api())
    for name in _native.PLATFORMS:
        module = _native.load(name)
        if isinstance(module, ImportError):
            level: Literal["note", "wrong"] = "wrong" if is_needed or name == "cpu" else "note"
            mend = (
                "" if "install" in str(module) else "install jax-router again"
            )  # as most of these errors say themselves
            yield Finding(level, f"{name} kernels", f"not loaded: {module}", mend)
            continue
        text = "built for XLA FFI API {}.{}".format(*module.ffi_api_version) + f", this jaxlib has {runtime}"
        if name == "cuda":
            text += f"; with the runtime of CUDA {_release(module.cuda_version)}, for {module.architectures}"
        yield Finding("ok", f"{name} kernels", text)


def _release(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


# The machine


class Driver(NamedTuple):
    """NVIDIA's driver: the newest CUDA that it supports, 13000 for 13.0, and the GPUs, with 90 for 9.0."""

    version: int
    gpus: tuple[tuple[str, int], ...]


def find_driver() -> Driver | None:
    """What the driver itself says, without JAX; None where there is none."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    number = ctypes.c_int()

    def ask(function: str, *arguments: Any) -> int:
        return number.value if getattr(cuda, function)(ctypes.byref(number), *arguments) == 0 else 0

    version = ask("cuDriverGetVersion")
    if cuda.cuInit(0) != 0:
        return Driver(version, ())
    gpus = []
    for ordinal in range(ask("cuDeviceGetCount")):
        name = ctypes.create_string_buffer(100)
        cuda.cuDeviceGetName(name, len(name), ordinal)
        major, minor = (ask("cuDeviceGetAttribute", attribute, ordinal) for attribute in (75, 76))
        gpus.append((name.value.decode(), 10 * major + minor))
    return Driver(version, tuple(gpus))


def machine(driver: Driver | None) -> Iterator[Finding]:
    """Driver and GPUs, and whether JAX uses them."""
    gpus = driver.gpus if driver else ()
    if driver is None:
        yield Finding("note", "driver", "there is no NVIDIA driver here")
    else:
        yield from _driver(driver)
    found, reason = devices()
    if reason:
        yield Finding("wrong", "JAX", reason, _platforms_mend())
        return
    kinds = ", ".join(dict.fromkeys(device.device_kind for device in found))
    text = f"computes on {len(found)} x {found[0].platform}: {kinds}"
    if not gpus or found[0].platform == "gpu":
        yield Finding("ok", "JAX", text)
        return
    assert driver is not None
    extra = "cuda13" if driver.version >= 13000 else "cuda12"
    mend = _platforms_mend() or f"pip install 'jax-router[{extra}]'"
    yield Finding("wrong", "JAX", f"{text}, though there is a GPU: {gpus[0][0]}", mend)


def _platforms_mend() -> str:
    platforms = jax.config.jax_platforms  # type: ignore[attr-defined]
    return f"JAX_PLATFORMS, or jax_platforms of jax.config, is {platforms!r}: leave it unset" if platforms else ""


def _driver(driver: Driver) -> Iterator[Finding]:
    text = f"supports CUDA {_release(driver.version)}"
    names = [f"{name}, compute capability {capability // 10}.{capability % 10}" for name, capability in driver.gpus]
    module = _native.load("cuda")
    if isinstance(module, ModuleType) and driver.gpus and driver.version < module.cuda_version:
        built = _release(module.cuda_version)
        is_older = driver.version // 1000 < module.cuda_version // 1000
        yield Finding(
            "wrong" if is_older else "note",
            "driver",
            f"{text}, and the CUDA kernels hold the runtime of CUDA {built}"
            + ("" if is_older else ": machine code runs, PTX does not"),
            f"update the driver, or install jax-router with the nvcc of CUDA {_release(driver.version)} on PATH",
        )
    else:
        yield Finding("ok", "driver", text)
    for name in dict.fromkeys(names):
        yield Finding("ok", "GPU", f"{names.count(name)} x {name}" if len(names) > 1 else name)
    if not driver.gpus:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        mend = f"CUDA_VISIBLE_DEVICES is {hidden!r}: unset it" if hidden is not None else ""
        yield Finding("note", "GPU", "the driver has none for this process", mend)


def architectures(driver: Driver | None, gpu: str | None) -> Iterator[Finding]:
    """Whether the CUDA module has code for the GPUs."""
    module = _native.load("cuda")
    if isinstance(module, ImportError):
        return
    capabilities = {GPUS[gpu]["compute_capability"]} if gpu else {which for _, which in (driver.gpus if driver else ())}
    for capability in sorted(capabilities):
        shown, own = f"{capability // 10}.{capability % 10}", f"{capability}{'a' if capability >= 90 else ''}-real"
        mend = f"install again with -C cmake.define.JAX_ROUTER_CUDA_ARCHS={own}"
        if not covers(module.architectures, capability):
            text = f"no code for compute capability {shown}: the kernels are for {module.architectures}"
            yield Finding("wrong", "architecture", text, mend)
        elif capability == 90 and "90a" not in module.architectures:
            text = "the kernels run, but those of dense_router for many tokens need 90a"
            yield Finding("note", "architecture", text, mend)
        else:
            yield Finding("ok", "architecture", f"there is code for compute capability {shown}")


def covers(built_for: str, capability: int) -> bool:
    """Whether code for these architectures, as CMake writes them, runs on a GPU of a compute capability, 90 for 9.0."""
    for architecture in built_for.split():
        match = re.fullmatch(r"(\d+)([af]?)(-real|-virtual)?", architecture)
        if match is None:  # all, native
            return True
        number, kind, form = int(match[1]), match[2], match[3]
        is_same_family = number // 10 == capability // 10 and number <= capability
        if number == capability or (kind == "f" and is_same_family):
            return True
        if not kind and (is_same_family if form == "-real" else number <= capability):
            return True
    return False


# What a flag of XLA means for the kernels, from its value to a remark, or None.
def _command_buffer(value: str) -> str | None:
    if value and (value.startswith("+") or "CUSTOM_CALL" in value.upper()):
        return None
    return "XLA captures no custom call into CUDA graphs: in a decode layer that costs more than the kernel"


_FLAGS: dict[str, Callable[[str], str | None]] = {
    "xla_gpu_enable_command_buffer": _command_buffer,
    "xla_gpu_graph_min_graph_size": lambda value: (
        f"XLA makes CUDA graphs of {value} or more launches alone" if int(value) > 5 else None
    ),
    "xla_gpu_autotune_level": lambda value: "XLA does not tune its products" if int(value) == 0 else None,
}


def flags(xla_flags: str) -> Iterator[Finding]:
    """The flags of XLA, and the settings of JAX, that make the kernels slow."""
    values = dict(re.findall(r"--(\w+)=(\S*)", xla_flags))
    remarks = [(name, remark(values[name])) for name, remark in _FLAGS.items() if name in values]
    for name, text in remarks:
        if text:
            yield Finding("note", "XLA_FLAGS", f"--{name}={values[name]}: {text}", "leave it out")
    if jax.config.jax_disable_jit:  # type: ignore[attr-defined]
        yield Finding("note", "jax_disable_jit", "every op is compiled and launched alone", "unset JAX_DISABLE_JIT")
    if not any(text for _, text in remarks):
        yield Finding("ok", "XLA_FLAGS", "nothing in them slows the kernels down")


def mesh() -> Iterator[Finding]:
    count = len(devices()[0])
    if count > 1:
        yield Finding(
            "note",
            "mesh",
            f"JAX has {count} devices. Where XLA may partition a program (jit over arrays that are sharded in an Auto "
            "mesh), dense_router is XLA's product and the kernel of activation_topk, and grouped_matmul is ragged_dot. "
            "The sharding of tokens costs nothing anywhere.",
            "for fused kernels call the layer inside jax.shard_map; see docs/sharding.md",
        )


# The case


def ops(case: Case, gpu: str | None) -> list[Finding]:
    """How each op of the case is computed, on the GPU of that name or on JAX's default device."""
    if not gpu and devices()[1]:
        return [Finding("note", "ops", "not looked at without a device")]
    where = "cuda" if gpu else kernel_platform()
    if where not in _native.PLATFORMS:
        return [Finding("note", "ops", f"there are no kernels for {where}: XLA computes the reference")]
    if isinstance(_native.load(where), ImportError):
        return [Finding("note", "ops", f"not looked at: the {where} kernels are not loaded")]
    found: dict[str, Finding] = {}
    for name, (call, operands) in calls(case).items():
        for answer in explain(call, *operands, platform=where, device=GPUS[gpu] if gpu else None):
            # The first op of a call bears its name; others are those of its gradient.
            found.setdefault(answer.op, _finding(answer, name))
    grouped = [] if case.inner is None else [_grouped(case, where, gpu)]
    return [*found.values(), *grouped]


def calls(case: Case) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """The calls of a layer, forward and backward, with the shapes of their operands."""
    config, selection = case.config, case.config.selection
    choices = (case.tokens, config.top_k)
    logits = jax.ShapeDtypeStruct((case.tokens, config.num_experts), jnp.float32)
    ids, weights = (jax.ShapeDtypeStruct(choices, dtype) for dtype in (jnp.int32, jnp.float32))
    slots = case.tokens * config.top_k
    shapes = (slots,), choices, (config.num_experts,)
    places: list[Any] = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes]
    dispatch = Dispatch(*places)
    rows = jax.ShapeDtypeStruct((slots, config.hidden_size), case.dtype)
    bias = case.biases.get("bias")

    def route(x: Any, weight: Any, biases: dict[str, Any]) -> Any:
        return dense_router(x, weight, **biases, **selection)

    def route_grad(x: Any, weight: Any, biases: dict[str, Any]) -> Any:
        return jax.value_and_grad(lambda x, weight: route(x, weight, biases).weights.sum(), argnums=(0, 1))(x, weight)

    def combine_grad(rows: Any, dispatch: Any, weights: Any) -> Any:
        return jax.value_and_grad(
            lambda rows, weights: combine(rows, dispatch, weights).astype(jnp.float32).sum(), argnums=(0, 1)
        )(rows, weights)

    return {
        "dense_router": (route, (case.x, case.weight, case.biases)),
        "activation_topk": (partial(activation_topk, **selection), (logits, bias)),
        "expert_dispatch": (partial(expert_dispatch, num_experts=config.num_experts), (ids,)),
        "permute": (permute, (case.x, dispatch)),
        "combine": (combine, (rows, dispatch, weights)),
        "gradient of dense_router": (route_grad, (case.x, case.weight, case.biases)),
        "gradient of combine": (combine_grad, (rows, dispatch, weights)),
    }


# What to do about a reason, by words in it.
_MENDS = {
    "multiple of 8": "pad hidden states and weight with zeros, to a multiple of 8",
    "top_k = 16": "16 choices or fewer are fused",
    "groups of": "groups of other sizes are not fused",
    "in bf16 where": "hidden states in bf16 are fused with a weight in f32, which is not rounded",
    "at most": "within that limit there is a kernel; the reference has none",
}


def _finding(answer: Answer, call: str) -> Finding:
    subject = answer.op
    if answer.native:
        return Finding("ok", subject, f"native: {answer.how}" + ("" if answer.op == call else f" ({call})"))
    mend = next((mend for words, mend in _MENDS.items() if words in answer.how), "")
    if not answer.parts:
        return Finding("wrong", subject, f"by the reference: {answer.how}", mend)
    if answer.parts[0].op == answer.op:  # with other operands
        inner = _finding(answer.parts[0], call)
        return inner._replace(text=f"{inner.text}; with x in f32: {answer.how}")
    text = f"XLA's product, then {', '.join(map(_part, answer.parts))}; not one kernel: {answer.how}"
    if not answer.is_native_throughout:
        return Finding("wrong", subject, text, mend)
    is_choice = any(words in answer.how for words in ("do not pay", "kernels are for", "for so many tokens"))
    return Finding("ok" if is_choice else "note", subject, text, "" if is_choice else mend)


def _part(part: Answer) -> str:
    return f"{part.op} ({part.how})" if part.native else f"{part.op} by the reference ({part.how})"


def _grouped(case: Case, where: str, gpu: str | None) -> Finding:
    """grouped_matmul, which says itself why its kernels do not run, when it is lowered."""
    if gpu:
        return Finding("note", "grouped_matmul", "answers for the GPU of this process alone: leave --gpu out")
    config = case.config
    assert case.inner is not None
    operands = (
        jax.ShapeDtypeStruct((case.tokens * config.top_k, config.hidden_size), case.dtype),
        jax.ShapeDtypeStruct((config.num_experts, config.hidden_size, 2 * case.inner), case.dtype),
        jax.ShapeDtypeStruct((config.num_experts,), jnp.int32),
    )
    call = jax.jit(partial(grouped_matmul, implementation="native"))
    try:
        call.trace(*operands).lower(lowering_platforms=(where,))
    except NotImplementedError as error:
        reason = str(error).partition(": ")[2]
        return Finding("note", "grouped_matmul", f"jax.lax.ragged_dot: {reason}")
    return Finding("ok", "grouped_matmul", "native")
