"""What takes more than a command to run: `nox -s NAME`."""

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
