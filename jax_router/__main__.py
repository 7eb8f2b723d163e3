"""The command line: `python -m jax_router`, or `jax-router`."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import jaxlib

from . import _native, _show_presets
from ._version import __version__
from .checkpoints import CheckpointError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="jax-router", description="The router of a mixture-of-experts layer, native to JAX."
    )
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
    demo.add_argument("--rows", type=_count, default=20, metavar="N", help="tokens to show of each layer (default: 20)")
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
    try:
        from ._demo import DemoError, run
    except ImportError as error:
        print(f"The demo needs {error.name}: pip install 'jax-router[demo]'", file=sys.stderr)
        return 1
    try:
        return run(arguments.file, arguments.rows)
    except DemoError as error:
        demo.error(str(error))


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a number, 0 or more, got {text!r}")
    return int(text)


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
    lines += [("device", f"{device.platform}: {device.device_kind}") for device in jax.devices()]
    lines.append(("custom calls", " ".join(_native.custom_call_targets())))
    for name, text in lines:
        print(f"{name:<13} {text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
