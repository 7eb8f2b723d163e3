"""The version that the build gives the distribution."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from scikit_build_core.metadata import regex


def dynamic_metadata(settings: Mapping[str, Any], project: Mapping[str, Any]) -> dict[str, str]:
    """That of the package, `__version__`, with the environment's JAX_ROUTER_LOCAL_VERSION behind it: 0.1.0+cuda13.

    Wheels of one version, one with and one without CUDA kernels, have different names by that.
    """
    version = regex.dynamic_metadata("version", {"input": "jax_router/_version.py"})
    local = os.environ.get("JAX_ROUTER_LOCAL_VERSION")
    return {"version": f"{version}+{local}" if local else version}
