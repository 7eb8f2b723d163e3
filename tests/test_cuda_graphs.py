"""CUDA graphs: XLA may capture the handlers, does so, and the captured calls compute the same."""

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jax_router import _native

STEPS, CALLS = 100, 8  # of decode_loop.py: steps, and our calls in each


class ApiVersion(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_size_t), ("extension", ctypes.c_void_p), ("major", ctypes.c_int), ("minor", ctypes.c_int)
    ]  # fmt: skip


class Metadata(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_size_t), ("api", ApiVersion), ("traits", ctypes.c_uint32), ("state_type", ctypes.c_int64)
    ]  # fmt: skip


class MetadataExtension(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_size_t), ("type", ctypes.c_int), ("next", ctypes.c_void_p),
        ("metadata", ctypes.POINTER(Metadata)),
    ]  # fmt: skip


class CallFrame(ctypes.Structure):
    # The API, context, stage, arguments, results and attributes of a call are zeros here; the size of all is checked.
    _fields_ = [
        ("size", ctypes.c_size_t), ("extension", ctypes.POINTER(MetadataExtension)), ("rest", ctypes.c_char * 152)
    ]  # fmt: skip


def metadata_of(handler):
    """What a handler answers to XLA when it is registered. The structs are those of XLA's c_api.h."""
    address = ctypes.pythonapi.PyCapsule_GetPointer
    address.restype, address.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    metadata = Metadata(ctypes.sizeof(Metadata))
    extension = MetadataExtension(ctypes.sizeof(MetadataExtension), 1, None, ctypes.pointer(metadata))
    frame = CallFrame(ctypes.sizeof(CallFrame), ctypes.pointer(extension))
    call = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(CallFrame))(address(handler, None))
    assert call(ctypes.byref(frame)) is None
    return (metadata.api.major, metadata.api.minor), metadata.traits


@pytest.mark.parametrize(("platform", "traits"), [("cpu", 0), ("cuda", 1)])
def test_traits(platform, traits):
    """Every CUDA handler says that it is compatible with command buffers (bit 0), and was built for the API it says."""
    module = _native.load(platform)
    if isinstance(module, ImportError):
        pytest.skip(str(module))
    for name, handler in module.targets().items():
        assert metadata_of(handler) == (tuple(module.ffi_api_version), traits), name


def decode_loop(flags):
    environment = {
        **os.environ,
        "XLA_FLAGS": f"--xla_gpu_autotune_level=0 {flags}",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # this process may hold the GPU's memory
    }
    run = [sys.executable, str(Path(__file__).with_name("decode_loop.py"))]
    return json.loads(subprocess.check_output(run, env=environment).splitlines()[-1])


def test_decode_loop_with_and_without_graphs():
    """100 steps give the same bits; and a step is fewer graphs than if XLA had to cut them at each of our calls."""
    if jax.default_backend() != "gpu":
        pytest.skip(f"CUDA graphs need a GPU; this machine has {jax.local_devices()[0]}")
    captured = decode_loop("--xla_gpu_graph_min_graph_size=1")
    plain = decode_loop("--xla_gpu_enable_command_buffer=")
    assert captured["bits"] == plain["bits"]
    assert plain["launches"].get("cuGraphLaunch", 0) == 0, plain["launches"]
    assert STEPS <= captured["launches"].get("cuGraphLaunch", 0) < CALLS * STEPS, captured["launches"]
