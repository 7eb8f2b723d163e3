"""What takes more than a command to run: `nox -s NAME`."""

import subprocess

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
            "ASAN_OPTIONS": "detect_leaks=0",  # Python does not free all that it has when it ends
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
