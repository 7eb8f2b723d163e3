"""Finds the native modules."""

from __future__ import annotations

import importlib.util
import sys
from importlib import import_module, metadata
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

from ._version import __version__


def native_module(name: str) -> ModuleType:
    """Imports `jax_router.<name>`, where `name` is `_cpu` or `_cuda`.

    The module lies beside this file, with one exception: in a checkout, `python -m jax_router` imports the source
    folder, which Python finds in the current folder before it looks at what is installed, and which holds no compiled
    code. The native module is then taken from the installation, if that has the same version.

    Raises:
        ImportError: there is no such module, with what to do about it; or it does not load.
    """
    full_name = f"{__package__}.{name}"
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
        raise ImportError(
            f"this installation of jax_router was built without {full_name}: install it again with CUDA's nvcc on "
            "PATH, or with the environment variable JAX_ROUTER_CUDA_WHEELS=1, which takes the compiler from wheels",
            name=full_name,
        )
    module = importlib.util.module_from_spec(spec)
    sys.modules[full_name] = module
    spec.loader.exec_module(module)
    return module
