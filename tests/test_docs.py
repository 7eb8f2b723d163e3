"""The pages: their Python runs as it is written, their figures are those of benchmarks/results, and nothing is missing.

A page may say to these tests, in comments that a reader does not see:

- `<!-- not run: REASON -->` before a block: it needs a GPU or a file that is not here;
- `<!-- run first`, lines of Python, `-->`: what the blocks after it have from elsewhere.

The blocks of a page share their names, as the cells of a notebook do.
"""

import ast
import builtins
import doctest
import inspect
import re
from pathlib import Path

import jax
import pytest

import figures
import jax_router
import matrix
from figures import ROOT
from test_registries import OPS

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("**/*.md")])
BLOCK = re.compile(
    r"^<!-- run first\n(?P<hidden>.*?)^-->$|(?P<not_run>^<!-- not run: [^\n]+ -->\n+)?^```python\n(?P<shown>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)


def blocks(page: Path) -> list[tuple[int, str]]:
    """The code of a page, and the line where each block of it begins."""
    text = page.read_text(encoding="utf-8")
    found = [match for match in BLOCK.finditer(text) if not match["not_run"]]
    starts = [match.start("hidden" if match["shown"] is None else "shown") for match in found]
    return [(text.count("\n", 0, start), match["shown"] or match["hidden"]) for start, match in zip(starts, found)]


@pytest.fixture
def as_a_user():
    """JAX as it comes, not as strict as the package's own tests; with random numbers that compile in half the time."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"), jax.default_prng_impl("rbg"):
        yield


@pytest.mark.parametrize("page", [pytest.param(page, id=str(page.relative_to(ROOT))) for page in PAGES if blocks(page)])
@pytest.mark.usefixtures("as_a_user")
def test_python_runs_as_it_is_written(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": page.stem}
    for line, code in blocks(page):
        exec(compile("\n" * line + code, page, "exec"), names)


@pytest.mark.parametrize(
    ("document", "name"), [(doc, name) for doc, names in figures.FIGURES.items() for name in names]
)
def test_figures_are_those_of_the_results(document, name):
    path = ROOT / document
    text = path.read_text(encoding="utf-8")
    found = re.search(figures.pattern(name), text, re.DOTALL)
    assert found is not None, f"{document} has no figures {name}"
    want = figures.FIGURES[document][name]()
    if matrix.writing:
        path.write_text(f"{text[: found.start(1)]}{want}{text[found.end(1) :]}", encoding="utf-8")
    else:
        assert found[1] == want, "benchmarks/results has others: pytest tests/test_docs.py --write-docs"


EXPORTED = {name: getattr(jax_router, name) for name in jax_router.__all__ if not name.startswith("_")}


def with_docstrings():
    """All functions and classes that a user may call, by name: what is exported, its methods and its members."""
    for name, value in EXPORTED.items():
        if not inspect.ismodule(value):
            yield name, value
        if inspect.isroutine(value):
            continue
        home = value.__name__ if inspect.ismodule(value) else value.__module__
        for inner, member in vars(value).items():
            member = getattr(member, "__func__", member)  # of a class method
            if not inner.startswith("_") and callable(member) and member.__module__ == home:
                yield f"{name}.{inner}", member


@pytest.mark.parametrize("name", EXPORTED)
def test_the_reference_has_it(name):
    pages = "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "api").glob("*.md"))
    assert re.search(rf"^\.\. auto(function|class|module):: (jax_router\.)?{name}\b", pages, re.MULTILINE), (
        f"no page of docs/api has an autofunction, autoclass or automodule {name}"
    )


def names_from_elsewhere(code):
    """What code uses that it neither imports nor makes."""
    nodes = [*ast.walk(ast.parse(code))]
    names = [node for node in nodes if isinstance(node, ast.Name)]
    made = {name.id for name in names if isinstance(name.ctx, ast.Store)}
    made |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    made |= {node.name for node in nodes if isinstance(node, (ast.ClassDef, ast.FunctionDef))}
    made |= {(node.asname or node.name).split(".")[0] for node in nodes if isinstance(node, ast.alias)}
    return {name.id for name in names} - made - {*dir(builtins)}


@pytest.mark.parametrize(("name", "value"), [pytest.param(*pair, id=pair[0]) for pair in with_docstrings()])
def test_everything_public_has_an_example(name, value):
    """One that runs as it is copied; `pytest --doctest-modules` runs it among the names of its module."""
    text = inspect.getdoc(value)
    assert ">>> " in text or text.startswith("See `jax_router."), f"the docstring of {name} has no Example"
    code = "".join(example.source for example in doctest.DocTestParser().get_examples(text))
    missing = names_from_elsewhere(code)
    assert not missing, f"the Example of {name} lacks imports of {missing}"


FOLDERS = ("benchmarks", "csrc", "jax_router", "support", "tests")
SOURCES = [
    path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in {".py", ".h", ".cc", ".cu"}
]
SOURCES += [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "targets.json"]


def test_add_an_op_names_every_place():
    """What names every op, in snake case as Python does or in camel case as C++ does, is a place to add one."""
    page = (ROOT / "docs" / "background" / "add_an_op.md").read_text(encoding="utf-8")
    named = {path for path in re.findall(r"`([^`\s]+)`", page) if "/" in path}
    texts = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in SOURCES}

    def places(op):
        names = re.compile(rf"(?<![a-z]){op}(?![a-z])|\bk?{op.title().replace('_', '')}\b")
        return {path.replace(op, "<op>") for path, text in texts.items() if names.search(text)}

    missing = {path for path in set.intersection(*map(places, OPS)) if f"`{path}`" not in page}
    assert not missing, f"the page does not name {missing}"
    gone = {path for path in named if not any((ROOT / path.replace("<op>", op)).exists() for op in OPS)}
    assert not gone, f"the page names {gone}, which no op has"
