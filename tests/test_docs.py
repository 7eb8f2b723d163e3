"""The pages: their Python runs as it is written, their figures are those of benchmarks/results, and nothing is missing.

A page may say to these tests, in comments that a reader does not see:

- `<!-- not run: REASON -->` before a block: it needs a GPU or a file that is not here;
- `<!-- run first`, lines of Python, `-->`: what the blocks after it have from elsewhere.

The blocks of a page share their names, as the cells of a notebook do.
"""

import inspect
import re
import subprocess
from pathlib import Path

import jax
import pytest

import figures
import jax_router
import matrix
from figures import ROOT

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
    """JAX as it comes, not as strict as the package's own tests."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.parametrize(
    "page", [pytest.param(page, id=str(page.relative_to(ROOT))) for page in PAGES if blocks(page)]
)
@pytest.mark.usefixtures("as_a_user")
def test_python_runs_as_it_is_written(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": page.stem}
    for line, code in blocks(page):
        exec(compile("\n" * line + code, page, "exec"), names)


@pytest.mark.parametrize(
    ("document", "block"), [(document, block) for document, of in figures.BLOCKS.items() for block in of]
)
def test_figures_are_those_of_the_results(document, block):
    path = ROOT / document
    text = path.read_text(encoding="utf-8")
    found = re.search(figures.pattern(block), text, re.DOTALL)
    assert found is not None, f"{document} has no figures {block}"
    want = figures.BLOCKS[document][block]()
    if matrix.writing:
        path.write_text(f"{text[: found.start(1)]}{want}{text[found.end(1) :]}", encoding="utf-8")
    else:
        assert found[1] == want, "benchmarks/results has others: pytest tests/test_docs.py --write-docs"


def public():
    """What the package exports, and what is public in that: by its name in the reference."""
    for name in jax_router.__all__:
        value = getattr(jax_router, name)
        if inspect.ismodule(value):
            yield f"jax_router.{name}", value
            for inner, member in vars(value).items():
                if not inner.startswith("_") and getattr(member, "__module__", None) == value.__name__:
                    yield f"jax_router.{name}.{inner}", member
        elif callable(value):
            yield f"jax_router.{name}", value


PUBLIC = dict(public())


@pytest.mark.parametrize("name", PUBLIC)
def test_reference_has_everything_public(name):
    reference = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "api").glob("*.md"))
    entry = re.sub(r"^jax_router\.", "", name)
    of_module = [f".. automodule:: {module}\n   :members:" for module, value in PUBLIC.items() if inspect.ismodule(value)]
    is_there = re.search(rf"^\.\. auto(function|class):: {re.escape(entry)}\b", reference, re.MULTILINE)
    assert is_there or any(
        name.startswith(line.split()[2]) for line in of_module if line in reference
    ), f"docs/api has no page with {name}: an autofunction, an autoclass, or an automodule with its members"


@pytest.mark.parametrize("name", PUBLIC)
def test_everything_public_has_an_example(name):
    if inspect.ismodule(PUBLIC[name]):
        return
    text = inspect.getdoc(PUBLIC[name]) or ""
    assert ">>> " in text or text.startswith("See `jax_router."), f"{name} has no Example in its docstring"
