"""The figures that documents show, as Markdown made of benchmarks/results.

A document has a block between `<!-- figures NAME, written by tests -->` and `<!-- end -->` for each;
`pytest tests/test_docs.py --write-docs` writes them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
H100 = "nvidia-h100-80gb-hbm3"
CPU = "amd-epyc-2-cores"

Records = Mapping[str, Mapping[str, Any]]

# The rows of README.md: what is computed, the case, and what a JAX user has without this package.
CHOSEN = (
    ("`activation_topk`: 256 experts, k = 6, 1 token", "activation_topk/E256/k6/N1", "jnp and `lax.top_k`"),
    ("4096 tokens", "activation_topk/E256/k6/N4096", ""),
    ("65536 tokens", "activation_topk/E256/k6/N65536", ""),
    (
        "DeepSeek-V3: sigmoid, k = 8, 4 of 8 groups, bias, 8192 tokens",
        "activation_topk/sigmoid/E256/k8/groups8-4/N8192",
        "",
    ),
    ("`dense_router`: bf16, D = 4096, 256 experts, 1 token", "dense_router/bf16/D4096/E256/k6/N1", "the same and a product"),
    ("64 tokens", "dense_router/bf16/D4096/E256/k6/N64", ""),
    ("4096 tokens", "dense_router/bf16/D4096/E256/k6/N4096", ""),
    ("its gradients, 8192 tokens", "dense_router_grad/bf16/D4096/E256/k6/N8192", ""),
    ("`topk_select`: 1 row of 65536, k = 512", "topk_select/B1/L65536/k512/sorted", "`lax.top_k`"),
    ("64 rows of 65536, k = 2048", "topk_select/B64/L65536/k2048/sorted", ""),
    ("`hash_router`: 65536 tokens", "hash_router/V129280/k6/N65536", "`table[ids]`"),
    ("`expert_dispatch`: 256 experts, k = 6, 65536 tokens", "expert_dispatch/E256/k6/N65536", "`argsort`"),
    ("`permute`: bf16, D = 7168, k = 8, 8192 tokens", "permute/bf16/D7168/k8/N8192", "`x[token]`"),
    ("its gradient", "permute_grad/bf16/D7168/k8/N8192", "its gradient, a scatter-add"),
    ("`combine`: the same", "combine/bf16/D7168/k8/N8192", "`y[slot]`, weighted sum"),
    ("its gradients", "combine_grad/bf16/D7168/k8/N8192", "its gradients"),
)


def records(name: str) -> Records:
    """The records of a file of results, by id."""
    return {record["id"]: record for record in json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))}


def us(value: float | None) -> str:
    """Microseconds as a person reads them; nothing, or next to nothing, is a dash."""
    if not value:
        return "-"
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown, whose first column has words and whose others have numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def taken_with(of: Records) -> str:
    """Where figures were taken, and of which state of this project."""
    device, jax, commit = {(record["device"], record["jax"], record["commit"]) for record in of.values()}.pop()
    return f"{device}, jax {jax}, at commit {commit}"


def chosen() -> str:
    """The table of README.md."""
    times = records(f"{H100}-quick")
    rows = [
        [label, f"**{us(times[case]['us'])}**", us(times[case]["xla_us"]), us(times[case]["floor_us"]), instead]
        for label, case, instead in CHOSEN
    ]
    head = ["microseconds", "jax_router", "instead", "floor", "which is"]
    return f"{table(head, rows)}\n\n{taken_with(times)}."


def kernel_times(op: str) -> Callable[[], str]:
    """All cases of an op on the H100."""

    def block() -> str:
        times = {case: record for case, record in records(f"{H100}-quick").items() if re.match(rf"{op}(_grad)?/", case)}
        return table(["case", "us", "XLA", "XLA / us", "floor", "target"], [_row(record) for record in times.values()])

    return block


def _row(record: Mapping[str, Any]) -> list[str]:
    ratio = f"{record['xla_us'] / record['us']:.1f}" if record["xla_us"] else "-"
    reached = record["target_us"] and record["us"] <= record["target_us"]
    target = f"{us(record['target_us'])}{', reached' if reached else ''}"
    return [f"`{record['id']}`", f"**{us(record['us'])}**", us(record["xla_us"]), ratio, us(record["floor_us"]), target]


def in_jit() -> str:
    """What a call adds to a jitted program, beside XLA's, where both were taken."""
    times = records(H100)
    rows = [
        [f"`{case}`", f"**{us(record['in_jit_us'])}**", us(record["xla_in_jit_us"])]
        for case, record in times.items()
        if record["in_jit_us"] and record["xla_in_jit_us"]
    ]
    return f"{table(['case', 'a call adds', 'XLA adds'], rows)}\n\n{taken_with(times)}."


LAYERS = {"qwen3-30b-a3b": "Qwen3-30B-A3B", "deepseek-v4-flash": "DeepSeek-V4-Flash", "deepseek-v3": "DeepSeek-V3"}


def layers() -> str:
    """A layer forward by stage, ours and in brackets the same one written with indexing."""
    times = records(f"{H100}-layer")
    rows = []
    for key, model in LAYERS.items():
        record = times[f"layer/{key}/N8192/forward"]
        ours, theirs = record["stages"], record["others_stages"]["indexing"]
        routing = [f"**{us(ours[stage])}** ({us(theirs[stage])})" for stage in ("route", "dispatch", "permute", "combine")]
        rows.append([model, *routing, us(ours["experts"] + ours["swiglu"]), f"{us(record['us'])} ({us(record['others_us']['indexing'])})"])
    head = ["layer", "route", "dispatch", "permute", "combine", "products", "in all"]
    return f"{table(head, rows)}\n\n{taken_with(times)}."


def exactness() -> str:
    """Rows that were compared with an oracle."""
    rows = [
        [name, f"{record['rows']:,}", f"{record['wrong']}", f"{record['by_rounding']:,}"]
        for name, record in records(f"{H100}-exactness").items()
    ]
    return table(["what is routed", "rows", "wrong", "decided by rounding"], rows)


def exactness_in_words() -> str:
    """The same in a sentence."""
    counted = records(f"{H100}-exactness")
    logits = [record for name, record in counted.items() if "logits" in name]
    tokens = [record for name, record in counted.items() if "tokens" in name and "16384" not in name]
    wrong = sum(record["wrong"] for record in counted.values())
    return (
        f"Of {_millions(logits)} million random rows of logits, routed by the kernels and by an oracle in float64, {wrong} "
        f"have a wrong id; in {_rounded(logits)} two keys are closer than f32 can tell. Of {_millions(tokens)} million "
        f"tokens that the kernels of `dense_router` multiply and route, {wrong} are wrong, and {_rounded(tokens)} have "
        "logits closer than one part in a million."
    )


def _millions(of: Sequence[Mapping[str, Any]]) -> str:
    return f"{sum(record['rows'] for record in of) // 1_000_000}"


def _rounded(of: Sequence[Mapping[str, Any]]) -> str:
    return f"{sum(record['by_rounding'] for record in of):,}"


def cpu() -> str:
    """All cases on a CPU, in milliseconds."""
    times = records(CPU)
    rows = [
        [f"`{case}`", f"**{record['us'] / 1000:.2f}**", f"{record['xla_us'] / 1000:.2f}", f"{record['xla_us'] / record['us']:.1f}"]
        for case, record in times.items()
    ]
    return f"{table(['case', 'ms', 'XLA', 'XLA / ms'], rows)}\n\n{taken_with(times)}."


# Of each document the blocks: their names, and what writes them.
BLOCKS: Mapping[str, Mapping[str, Callable[[], str]]] = {
    "README.md": {"chosen": chosen, "exactness": exactness_in_words},
    "docs/background/performance.md": {
        **{op: kernel_times(op) for op in ("activation_topk", "dense_router", "topk_select", "permute", "combine")},
        **{op: kernel_times(op) for op in ("expert_dispatch", "route_at", "hash_router", "scored_hash_router")},
        "in jit": in_jit,
        "layers": layers,
        "exactness": exactness,
        "cpu": cpu,
    },
}


def pattern(block: str) -> str:
    """Of a block in a document: its text is the one group."""
    return rf"<!-- figures {re.escape(block)}, written by tests -->\n\n(.*?)\n\n<!-- end -->"
