"""Every op stands in every table: nothing else would tell that one was forgotten there."""

import functools
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

import jax_router
import matrix
from jax_router import _native

ROOT = Path(__file__).parents[1]


def is_op(value):
    """Whether the package has kernels for it. Those of grouped_matmul are JAX's."""
    if value is jax_router.grouped_matmul:
        return False
    return inspect.isfunction(value) and "implementation" in inspect.signature(value).parameters


# The one list: what the package exports and has kernels for.
OPS = [name for name in jax_router.__all__ if is_op(getattr(jax_router, name))]


class Table(NamedTuple):
    """Where ops are entered: the text, a pattern of the part that is the table, and one of an op's name in an entry."""

    text: Callable[[], str]
    entry: str
    part: str = "(.*)"

    def ops(self, text: str) -> set[str]:
        part = re.search(self.part, text, re.DOTALL)
        assert part is not None, f"no {self.part!r}"
        return set(re.findall(self.entry, part[1], re.MULTILINE))


def in_file(path: str, entry: str, part: str = "(.*)") -> Table:
    return Table((ROOT / path).read_text, entry, part)


def in_document(name: str, entry: str, part: str = r"(.*?)\n\n<!-- end -->") -> Table:
    return in_file("docs/transformations.md", entry, rf"<!-- table {name}, written by tests -->\n\n{part}")


@functools.cache
def benchmark_cases() -> str:
    """The cases of both kinds of device, a line each, from a process with the root of the checkout on its path."""
    program = """
from benchmarks import cases
for kind in (cases.cpu_cases, cases.gpu_cases):
    for case in kind():
        print(kind.__name__, case.id)
"""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.check_output([sys.executable, "-c", program], cwd=ROOT, env=environment, text=True)


TABLES = {
    "jax_router/reference.py": Table(lambda: inspect.getsource(jax_router.reference), r"^def (\w+)\("),
    "custom_call_targets()": Table(lambda: "\n".join(jax_router.custom_call_targets()), r"^jax_router\.(\w+)$"),
    "tests/matrix.py: OPS": Table(lambda: "\n".join(matrix.OPS), r"^(\w+)"),
    "tests/test_reference.py": in_file("tests/test_reference.py", r'reference(?:_jit\("|\.)(\w+)'),
    "tests/test_native.py": in_file("tests/test_native.py", r'native\("(\w+)"'),
    "tests/test_hard_cases.py": in_file("tests/test_hard_cases.py", r'op\("(\w+)"'),
    "tests/test_errors.py": in_file("tests/test_errors.py", r'^    "[^"]+": \("(\w+)", \['),
    "tests/launches/cases.h: kOps": in_file("tests/launches/cases.h", r'\{"(\w+)"', r"\bkOps = (\{.*?\});"),
    "benchmarks/cases.py: cpu_cases": Table(benchmark_cases, r"^cpu_cases (\w+)/"),
    "benchmarks/cases.py: gpu_cases": Table(benchmark_cases, r"^gpu_cases (\w+)/"),
    "docs/transformations.md: transformations": in_document("transformations", r"\| (\w+)", part=r"(.*?)\n"),
    "docs/transformations.md: sharded tokens": in_document("sharded tokens", r"^\| (\w+)[ ,]"),
    "docs/transformations.md: other axes": in_document("other axes", r"^\| `(\w+)`"),
    "README.md": in_file("README.md", r"^\| `(\w+)\(", r"\n## What is in it\n(.*?)\n## "),
}


def check(op: str, name: str, text: str) -> None:
    assert op in TABLES[name].ops(text), f"{op} has no entry in {name}: see 'Add an op' in CONTRIBUTING.md"


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", TABLES)
def test_every_op_stands_in_every_table(name, op):
    if (name, op) == ("custom_call_targets()", "dense_router") and isinstance(_native.load("cuda"), ImportError):
        pytest.skip("only the CUDA module, which is not loaded, multiplies and selects in one kernel")
    check(op, name, TABLES[name].text())


@pytest.mark.parametrize("name", TABLES)
def test_a_missing_entry_is_named(name):
    """The tables as they are, but for one op, which has another name there."""
    text = TABLES[name].text()
    for op in TABLES[name].ops(text).intersection(OPS):
        with pytest.raises(AssertionError, match=re.escape(f"{op} has no entry in {name}")):
            check(op, name, re.sub(rf"\b{op}\b", "renamed", text))


def test_ops():
    """The list that all others are compared with is not empty, and holds no function without a kernel."""
    assert {"activation_topk", "dense_router", "expert_dispatch"} < set(OPS)
    assert not {"custom_call_targets", "random_hash_table"}.intersection(OPS)
