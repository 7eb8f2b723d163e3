"""What the build compiles for GPUs, from its settings and what nvidia-smi says of the machine."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

MODULE = Path(__file__).parents[1] / "cmake" / "JaxRouterArchitectures.cmake"
ALL = "80-real;90a-real;100"

pytestmark = pytest.mark.skipif(not shutil.which("cmake"), reason="CMake decides it")


@pytest.mark.parametrize(
    ("capabilities", "settings", "expected"),
    [
        ("", "", "(nvidia-smi found no GPU)"),
        ("9.0", "", "90a-real"),
        ("8.6 9.0 9.0", "", "86-real;90a-real"),
        ("10.0 10.3", "", "100-real;103-real"),
        ("7.5", "", "(the GPU has compute capability 7.5, and the kernels need 8.0)"),
        ("9.0", "CUDA=OFF", "(it was built with JAX_ROUTER_CUDA=OFF)"),
        ("", "CUDA=ON", ALL),
        ("9.0", "CUDA=ON", ALL),
        ("8.0", "CUDA_ARCHS=90a-real;120", "90a-real;120"),
        ("8.0", "CUDA_WHEELS=ON", "80-real"),
        ("", "CUDA_WHEELS=ON", ALL),
    ],
)
def test_architectures(capabilities, settings, expected, tmp_path):
    driver = tmp_path / "nvidia-smi"
    says = "; ".join(f"echo {capability}" for capability in capabilities.split())
    driver.write_text(f"#!/bin/sh\n{says or 'echo No devices were found, in driver 580.65; exit 6'}\n")
    driver.chmod(0o755)
    script = tmp_path / "choose.cmake"
    script.write_text(
        f"include({MODULE})\n"
        "jax_router_choose_architectures(architectures obstacle)\n"
        "if(NOT architectures)\n"
        '  set(architectures "(${obstacle})")\n'
        "endif()\n"
        'message(NOTICE "${architectures}")\n'
    )
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    defines = [f"-DJAX_ROUTER_{settings}"] if settings else []
    run = subprocess.run(["cmake", *defines, "-P", script], env=environment, capture_output=True, text=True, check=True)
    assert run.stderr.strip() == expected
