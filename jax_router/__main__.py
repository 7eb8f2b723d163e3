"""The command line: `python -m jax_router`, or `jax-router`."""

from __future__ import annotations

import argparse
import platform
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import jax
import jaxlib

from . import _case, _doctor, _explain, _native, _show_presets
from ._timing import device_name
from ._version import __version__
from .checkpoints import CheckpointError


class _Parser(argparse.ArgumentParser):
    """One whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status."""
    parser = _Parser(prog="jax-router", description="The router of a mixture-of-experts layer, native to JAX.")
    parser.add_argument("--version", action="version", version=f"jax-router {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    about_info = "what was built, what loaded and why not, on which devices"
    commands.add_parser("info", help=about_info, description=f"Shows {about_info}.")
    demo = commands.add_parser(
        "demo",
        help="route a text and look at the result",
        description=(
            "Routes a text through a hash layer and a dense layer of DeepSeek-V4-Flash's shape, with random weights: "
            "shows each token's experts, the load of all experts, a check against the reference and the time. "
            "Needs the extra `demo`: pip install 'jax-router[demo]'."
        ),
    )
    demo.add_argument("file", nargs="?", type=Path, metavar="FILE", help="a UTF-8 text (default: a page of Alice)")
    demo.add_argument(
        "--rows", type=_case.number_from(0), default=20, metavar="N", help="tokens to show of each layer (default: 20)"
    )
    presets = commands.add_parser(
        "presets",
        help="the routers of models",
        description="Shows the presets of RouterConfig.from_preset, or all that is known of one of them.",
    )
    presets.add_argument("name", nargs="?", metavar="NAME", help="one preset (default: a line for each)")
    inspect = commands.add_parser(
        "inspect",
        help="the routers in a checkpoint",
        description=(
            "Shows every router in a checkpoint: shapes, dtypes, statistics of gate and bias, the load of each expert "
            "of a hash table. Reads nothing else. Needs the extra `checkpoints`: pip install 'jax-router[checkpoints]'."
        ),
    )
    inspect.add_argument("path", type=Path, metavar="CHECKPOINT", help="a safetensors file, an index, or a folder")
    bench = commands.add_parser(
        "bench",
        help="your own shape: is it right, and how fast",
        description=(
            "Draws random inputs of a case, compares the routing with float64, and times each part of the layer beside "
            "the same in jax.numpy and beside the floor of this very device. Needs the extra `bench`: "
            "pip install 'jax-router[bench]'."
        ),
    )
    _case.add_options(bench)
    bench.add_argument("--png", type=_png, metavar="FILE", help="also draw the figures")
    doctor = commands.add_parser(
        "doctor",
        help="why is my call not native, or not fused",
        description=(
            "Looks at versions, native modules, GPU, driver and flags, and asks the kernels what they would do with a "
            "case. Says how to mend what is wrong; the exit status is then 1."
        ),
    )
    _case.add_options(doctor)
    doctor.add_argument(
        "--gpu", choices=tuple(_native.GPUS), help="answer for this GPU, which need not be here (default: this device)"
    )
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help()
        return 0
    if arguments.command == "info":
        return _info()
    if arguments.command == "presets":
        try:
            print(_show_presets.show(arguments.name) if arguments.name else _show_presets.show_all())
        except ValueError as error:
            presets.error(str(error))
        return 0
    if arguments.command == "inspect":
        try:
            from ._inspect import run as run_inspect

            return run_inspect(arguments.path)
        except ImportError:
            print("inspect needs rich and safetensors: pip install 'jax-router[checkpoints]'", file=sys.stderr)
            return 1
        except (OSError, CheckpointError) as error:
            inspect.error(" ".join(str(error).split()))
    if arguments.command == "bench":
        return _bench(bench, arguments)
    if arguments.command == "doctor":
        return _doctor.run(_case_of(doctor, arguments), arguments.gpu)
    try:
        from ._demo import DemoError, run
    except ImportError as error:
        print(f"The demo needs {error.name}: pip install 'jax-router[demo]'", file=sys.stderr)
        return 1
    _need_a_device(demo)
    try:
        return run(arguments.file, arguments.rows)
    except DemoError as error:
        demo.error(str(error))


def _png(text: str) -> Path:
    if not text.endswith(".png"):
        raise argparse.ArgumentTypeError(f"must be the name of a .png file, got {text!r}")
    if not Path(text).parent.is_dir():
        raise argparse.ArgumentTypeError(f"must be in a folder that exists, got {text!r}")
    return Path(text)


def _need_a_device(parser: argparse.ArgumentParser) -> None:
    _, reason = _explain.devices()
    if reason:
        parser.error(f"{reason} (`jax-router doctor` says more)")


def _case_of(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> _case.Case:
    try:
        return _case.case_of(arguments)
    except ValueError as error:
        parser.error(str(error))


def _bench(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    case = _case_of(parser, arguments)
    try:
        from . import _bench as bench

        if arguments.png:
            from ._bench_picture import draw
    except ImportError as error:
        print(f"bench needs {error.name}: pip install 'jax-router[bench]'", file=sys.stderr)
        return 1
    _need_a_device(parser)
    try:
        is_right, found = bench.run(case)
        if arguments.png and found:
            draw(found, f"{case.describe()}\n{device_name()}", arguments.png)
            print(f"drawn: {arguments.png}")
    except (bench.BenchError, OSError) as error:
        parser.error(str(error))
    return 0 if is_right else 1


def _info() -> int:
    lines = [
        ("jax_router", f"{__version__} in {Path(__file__).parent}"),
        ("JAX", f"jax {jax.__version__}, jaxlib {jaxlib.__version__}, Python {platform.python_version()}"),
        ("XLA FFI API", "{}.{}, of this jaxlib".format(*_native.runtime_ffi_api())),
    ]
    for name in _native.PLATFORMS:
        module = _native.load(name)
        if isinstance(module, ImportError):
            lines.append((f"{name} kernels", f"not loaded: {module}"))
            if name == "cuda":
                lines.append(("", _native.HOW_TO_BUILD_CUDA))
            continue
        architectures = f", for {module.architectures}" if name == "cuda" else ""
        lines.append((f"{name} kernels", "built for XLA FFI API {}.{}".format(*module.ffi_api_version) + architectures))
    devices, reason = _explain.devices()
    lines += [("device", f"{device.platform}: {device.device_kind}") for device in devices]
    lines += [("device", f"none: {reason}")] * bool(reason)
    lines.append(("custom calls", " ".join(_native.custom_call_targets())))
    # As wide as a terminal; in a pipe, a line each.
    width = shutil.get_terminal_size((sys.maxsize, 0)).columns
    for name, text in lines:
        print(
            textwrap.fill(
                text,
                width,
                initial_indent=f"{name:<14}",
                subsequent_indent=" " * 14,
                break_long_words=False,
                break_on_hyphens=False,
            )
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
