"""The ops that the tests of transformations and of sharding run over, and the tables which those tests keep true.

Each test of a cell says what it measured. That must be what docs/transformations.md has in that cell; with
`pytest --write-docs` it is written there instead.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_router
from cases import draw

DOCUMENT = Path(__file__).parents[1] / "docs" / "transformations.md"


class Operand(NamedTuple):
    """Its name (see `cases.draw`), its own axes, and whether the axes of the tokens come before them."""

    name: str
    axes: tuple[int, ...]
    per_token: bool = True


@dataclass(frozen=True)
class Case:
    """An op with some of its operands.

    Attributes:
        call: takes the operands in order, and `implementation`.
        operands: what it takes.
        floats: the indices of the operands that it has derivatives in.
    """

    call: Callable[..., Any]
    operands: tuple[Operand, ...]
    floats: tuple[int, ...] = ()

    def draw(self, *tokens: int) -> list[np.ndarray]:
        """Operands of that many tokens."""
        rng = np.random.default_rng(2026)
        return [draw(rng, name, *(tokens if per_token else ()), *axes) for name, axes, per_token in self.operands]

    def derivative_of(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """A function that returns the results of `call`, and the gradient of the sum of their squares."""

        def derivative(*values):
            def loss(*floats):
                results = call(*self.with_floats(values, floats))
                return sum_of_squares(results), results

            arguments = tuple(range(len(self.floats)))
            gradients, results = jax.grad(loss, arguments, has_aux=True)(*(values[i] for i in self.floats))
            return results, gradients

        return derivative if self.floats else lambda *values: (call(*values), ())

    def with_floats(self, values, floats) -> list[Any]:
        replaced = dict(zip(self.floats, floats))
        return [replaced.get(i, value) for i, value in enumerate(values)]


def sum_of_squares(results):
    return sum((leaf**2).sum() for leaf in jax.tree.leaves(results) if jnp.issubdtype(leaf.dtype, jnp.floating))


LOGITS = Operand("logits", (16,))
SHARED_BIAS = Operand("bias", (16,), per_token=False)
X, WEIGHT = Operand("x", (8,)), Operand("weight", (16, 8), per_token=False)


def call_with_bias(logits, bias, **options):
    return jax_router.activation_topk(logits, bias, top_k=3, score_fn="sigmoid", **options)


def call_with_everything(logits, bias, mask, **options):
    return jax_router.activation_topk(logits, bias, top_k=3, token_mask=mask, num_groups=4, top_groups=2, **options)


def call_softmax(logits, mask, **options):
    return jax_router.activation_topk(
        logits, top_k=3, token_mask=mask, score_fn="softmax", renormalize=False, **options
    )


def call_with_lengths(scores, lengths, **options):
    return jax_router.topk_select(scores, 5, lengths=lengths, **options)


def call_dense(x, weight, logit_bias, bias, **options):
    return jax_router.dense_router(x, weight, bias, logit_bias=logit_bias, top_k=3, **options)


def call_counts(ids, mask, **options):
    return jax_router.expert_counts(ids, 16, token_mask=mask, **options)


def call_half(x, weight, **options):
    # Rounded by an operation of its own: in one program, XLA may take a conversion to bf16 and back for nothing.
    x = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return jax_router.dense_router(x.astype(jnp.bfloat16), weight, top_k=3, **options)


def call_permute(x, ids, weights=None, **options):
    dispatch = jax_router.expert_dispatch(ids, 16, **options)
    return jax_router.permute(x, dispatch, weights, **options), dispatch.group_sizes


def call_combine(y, ids, weights, **options):
    dispatch = jax_router.expert_dispatch(ids, 16, **options)
    return jax_router.combine(y.reshape(-1, y.shape[-1]), dispatch, weights, **options), dispatch.group_sizes


IDS, WEIGHTS = Operand("ids", (2,)), Operand("weights", (2,))

# What takes all its tokens for one problem.
OF_ALL_TOKENS = ("expert_dispatch", "expert_counts", "permute", "combine")

OPS = {
    "hash_router": Case(
        jax_router.hash_router, (Operand("token_ids", ()), Operand("lut", (12, 2), per_token=False))
    ),
    "topk_select": Case(partial(jax_router.topk_select, k=5), (LOGITS,), (0,)),
    "topk_select, lengths": Case(call_with_lengths, (LOGITS, Operand("lengths", ())), (0,)),
    "activation_topk": Case(partial(jax_router.activation_topk, top_k=3), (LOGITS,), (0,)),
    "activation_topk, bias": Case(call_with_bias, (LOGITS, SHARED_BIAS), (0,)),
    "activation_topk, bias a token, groups, mask": Case(
        call_with_everything, (LOGITS, Operand("bias", (16,)), Operand("mask", ())), (0,)
    ),
    "activation_topk, softmax of all, mask": Case(call_softmax, (LOGITS, Operand("mask", ())), (0,)),
    "route_at": Case(jax_router.route_at, (LOGITS, Operand("ids", (2,))), (0,)),
    "scored_hash_router": Case(
        jax_router.scored_hash_router,
        (LOGITS, Operand("token_ids", ()), Operand("lut", (12, 2), per_token=False)),
        (0,),
    ),
    "dense_router": Case(partial(jax_router.dense_router, top_k=3), (X, WEIGHT), (0, 1)),
    "dense_router, biases": Case(
        call_dense, (X, WEIGHT, Operand("logit_bias", (16,), per_token=False), SHARED_BIAS), (0, 1, 2)
    ),
    "dense_router, bf16 x and f32 weight": Case(call_half, (X, WEIGHT), (0, 1)),
    "expert_dispatch": Case(partial(jax_router.expert_dispatch, num_experts=16), (IDS,)),
    "expert_dispatch, aligned, capacity": Case(
        partial(jax_router.expert_dispatch, num_experts=16, align=4, capacity=3), (IDS,)
    ),
    "expert_counts": Case(partial(jax_router.expert_counts, num_experts=16), (IDS,)),
    "expert_counts, mask": Case(call_counts, (IDS, Operand("mask", ()))),
    "permute": Case(call_permute, (X, IDS), (0,)),
    "permute, weights": Case(call_permute, (X, IDS, WEIGHTS), (0, 2)),
    "combine": Case(call_combine, (Operand("y", (2, 8)), IDS, WEIGHTS), (0, 2)),
}  # fmt: skip


def native(op: str) -> Callable[..., Any]:
    return partial(OPS[op].call, implementation="native")


def assert_close(got, want, rtol=1e-4, atol=1e-6):
    """Integers are equal, floats close."""
    for mine, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert mine.dtype == other.dtype
        if jnp.issubdtype(other.dtype, jnp.floating):
            np.testing.assert_allclose(mine, other, rtol=rtol, atol=atol)
        else:
            np.testing.assert_array_equal(mine, other)


# The document


class Table:
    """A table of the document: its name there, and its cells by row and column.

    A cell that no test measures holds the reason why.
    """

    def __init__(self, name: str, rows: list[str], columns: list[str], reasons: dict[tuple[str, str], str]):
        self.name, self.rows, self.columns, self.reasons = name, rows, columns, reasons
        self.measured: dict[tuple[str, str], str] = {}
        TABLES.append(self)

    def cells(self) -> list[tuple[str, str]]:
        """The cells to measure."""
        return [(row, column) for row in self.rows for column in self.columns if (row, column) not in self.reasons]

    def enter(self, row: str, column: str, measured: str) -> None:
        """Says what a cell holds."""
        self.measured[row, column] = measured
        if not writing:
            want = self.documented().get((row, column))
            assert measured == want, (
                f"{row}, {column}: measured {measured!r}, but {DOCUMENT.name} has {want!r}; see pytest --write-docs"
            )

    def documented(self) -> dict[tuple[str, str], str]:
        block = re.search(self._pattern(), DOCUMENT.read_text(), re.DOTALL)
        assert block is not None, f"{DOCUMENT} has no table {self.name}"
        head, _, *lines = (
            [cell.strip() for cell in line.strip("|").split("|")] for line in block[1].splitlines() if line
        )
        return {(row, column): text for row, *texts in lines for column, text in zip(head[1:], texts, strict=True)}

    def write(self) -> None:
        """Puts what was measured, and the reasons, into the document. What was not measured in this run stays."""
        cells = {**self.documented(), **self.measured, **self.reasons}
        lines = [["", *self.columns], ["---"] * (1 + len(self.columns))]
        lines += [[row, *(cells.get((row, column), "not measured") for column in self.columns)] for row in self.rows]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        text = DOCUMENT.read_text()
        start, end = re.search(self._pattern(), text, re.DOTALL).span(1)
        DOCUMENT.write_text(f"{text[:start]}{table}{text[end:]}")

    def _pattern(self) -> str:
        return rf"<!-- table {self.name}, written by tests -->\n\n(.*?)\n\n<!-- end -->"


TABLES: list[Table] = []
writing = False  # set by the option --write-docs


def assert_documented(table: Table) -> None:
    """The document has the cells of the table and no others, and the reason for each that no test measures."""
    if writing:
        pytest.skip("the document is written at the end of this run")
    documented = table.documented()
    assert list(documented) == [(row, column) for row in table.rows for column in table.columns]
    for cell in documented:
        assert documented[cell] == table.reasons.get(cell, documented[cell]) != "not measured", cell
