"""The figures that documents show, as Markdown made of benchmarks/results.

A document has each between `<!-- figures NAME, written by tests -->` and `<!-- end -->`;
`pytest tests/test_docs.py --write-docs` writes them.
"""

from __future__ import annotations

import itertools
import json
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TARGETS = ROOT / "benchmarks" / "targets.json"
H100 = "nvidia-h100-80gb-hbm3"
KERNEL_TIMES = f"{H100}-quick"  # of all cases, on the device that the targets are for
NEWER_TIMES = "nvidia-h200-quick"  # of all cases, with the newest kernels
CPU = "amd-epyc-2-cores"
EXACTNESS = "nvidia-h200-exactness"
LAYER_TIMES = "nvidia-h200-layer"
GROUPED_TIMES = "nvidia-h200-grouped"

Record = Mapping[str, Any]

# The rows of README.md: what is computed, the case, and what a JAX user has instead.
CHOSEN = (
    ("`activation_topk`, 256 experts, k = 6, 1 token", "activation_topk/E256/k6/N1", "`jnp` and `lax.top_k`"),
    ("4096 tokens", "activation_topk/E256/k6/N4096", ""),
    ("65536 tokens", "activation_topk/E256/k6/N65536", ""),
    ("as DeepSeek-V3, 8192 tokens", "activation_topk/sigmoid/E256/k8/groups8-4/N8192", ""),
    ("`dense_router`, bf16, D = 4096, 1 token", "dense_router/bf16/D4096/E256/k6/N1", "a product, then the same"),
    ("64 tokens", "dense_router/bf16/D4096/E256/k6/N64", ""),
    ("4096 tokens", "dense_router/bf16/D4096/E256/k6/N4096", ""),
    ("its gradients, 8192 tokens", "dense_router_grad/bf16/D4096/E256/k6/N8192", "the gradients of that"),
    ("`topk_select`, 1 row of 65536, k = 512, worst of 64 draws", "topk_select/B1/L65536/k512/sorted", "`lax.top_k`"),
    ("64 rows, k = 2048", "topk_select/B64/L65536/k2048/sorted", ""),
    ("`expert_dispatch`, k = 6, 65536 tokens", "expert_dispatch/E256/k6/N65536", "`argsort`"),
    ("`permute`, bf16, D = 7168, k = 8, 8192 tokens", "permute/bf16/D7168/k8/N8192", "`x[token]`"),
    ("its gradient", "permute_grad/bf16/D7168/k8/N8192", "a scatter-add"),
    ("`combine`, the same", "combine/bf16/D7168/k8/N8192", "`y[slot]` and a sum"),
    ("its gradients", "combine_grad/bf16/D7168/k8/N8192", "a scatter-add and more"),
    ("`hash_router`, 65536 tokens", "hash_router/V129280/k6/N65536", "`table[token_ids]`"),
)

LAYERS = {"qwen3-30b-a3b": "Qwen3-30B-A3B", "deepseek-v4-flash": "DeepSeek-V4-Flash", "deepseek-v3": "DeepSeek-V3"}
DIRECTIONS = {"forward": "forward", "forward_and_backward": "forward and backward"}


def records(name: str) -> dict[str, Record]:
    """The records of a file of results, by id."""
    return {record["id"]: record for record in json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))}


def table(head: Sequence[str], rows: Iterable[Sequence[str]], words: Sequence[int] = (0,)) -> str:
    """A table in Markdown. Columns have numbers, but for those with words."""
    rule = ["---" if column in words else "---:" for column in range(len(head))]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *rows))


def number(value: float | None) -> str:
    """Microseconds or milliseconds as a person reads them. What is next to nothing, or was not taken, is a dash."""
    if not value:
        return "-"
    return f"{value:.2f}" if value < 1 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def ours(value: float | None) -> str:
    return f"**{number(value)}**"


def times(record: Record) -> str:
    """How many times faster."""
    return f"{record['xla_us'] / record['us']:.1f}" if record["xla_us"] else "-"


def where(name: str) -> str:
    """On what the figures of a file of results were taken, and of which states of this project."""

    def all_of(key: str) -> str:
        return ", ".join(sorted({record[key] for record in records(name).values()}))

    return f"{all_of('device')}, jax {all_of('jax')}, this project at {all_of('commit')}."


def where_of_both() -> str:
    return f"{where(KERNEL_TIMES)} *H200*: {where(NEWER_TIMES)}"


def chosen() -> str:
    found, newer = records(KERNEL_TIMES), records(NEWER_TIMES)
    rows = []
    for label, case, instead in CHOSEN:
        us, xla_us, floor_us = (found[case][key] for key in ("us", "xla_us", "floor_us"))
        rows.append([label, ours(us), number(xla_us), instead, number(floor_us), number(newer[case]["us"])])
    head = ["microseconds", "jax_router", "XLA", "XLA is given", "floor", "H200"]
    return f"{table(head, rows, words=(0, 3))}\n\n{where_of_both()}"


def in_words() -> str:
    decode = records(H100)["dense_router/bf16/D4096/E256/k6/N1"]
    cpu = records(CPU)
    route, sort = cpu["activation_topk/E256/k6/N16384"], cpu["expert_dispatch/E256/k6/N16384"]
    lines = [
        f"In a jitted decode step of 32 layers, routing one token adds {number(decode['in_jit_us'])} us to a layer, "
        f"where XLA's kernels add {number(decode['xla_in_jit_us'])} ({decode['device']}, D = 4096, 256 experts).",
        f"On a CPU, {route['device']}, 16384 tokens over 256 experts take {number(route['us'] / 1000)} ms "
        f"where XLA takes {number(route['xla_us'] / 1000)}, and `expert_dispatch` of their choices "
        f"{number(sort['us'] / 1000)} ms where it takes {number(sort['xla_us'] / 1000)}.",
        _exactness_in_words(),
    ]
    return "\n".join(f"- {line}" for line in lines)


def _exactness_in_words() -> str:
    counted = records(EXACTNESS)

    def of(kind: str, key: str) -> int:
        return sum(record[key] for name, record in counted.items() if kind in name)

    wrong = sum(record["wrong"] for record in counted.values())
    return (
        f"Of {of('logits', 'rows') // 10**6} million random rows of logits and {of('tokens', 'rows') // 10**6} million "
        f"random tokens, routed by the kernels and by an oracle in float64, {wrong or 'none'} had a wrong expert; in "
        f"{of('logits', 'by_rounding') + of('tokens', 'by_rounding'):,} of them two keys were closer than f32 can tell."
    )


def kernel_times(op: str) -> str:
    """All cases of an op, and of its gradient."""
    of_op = re.compile(rf"{op}(_grad)?/")
    targets = {target["id"]: target for target in json.loads(TARGETS.read_text(encoding="utf-8"))}
    found = [record for case, record in records(KERNEL_TIMES).items() if of_op.match(case)]
    by_draws = any(record.get("median_us") for record in found)
    newer = records(NEWER_TIMES)
    head = ["case", "us", *(["median", "worst draw"] if by_draws else []), "XLA", "times", "floor", "H200", "target"]
    rows = [_kernel_time(op, record, newer[record["id"]], targets.get(record["id"], {}), by_draws) for record in found]
    words = (0, head.index("worst draw"), len(head)) if by_draws else (0, len(head))
    return table([*head, "best elsewhere"], rows, words)


def _kernel_time(op: str, record: Record, newer: Record, target: Record, by_draws: bool) -> list[str]:
    is_reached = record["target_us"] and record["us"] <= record["target_us"]
    reached = f"{number(record['target_us'])}{' ✓' if is_reached else ''}"
    elsewhere = f"{target['best_peer_us']} {target['best_peer']}" if target.get("best_peer_us") else ""
    draws = [number(record.get("median_us")), record.get("worst_draw") or "one was timed"] if by_draws else []
    figures = [ours(record["us"]), *draws, number(record["xla_us"]), times(record), number(record["floor_us"])]
    case = record["id"].removeprefix(f"{op}/")
    return [f"`{case}`", *figures, number(newer["us"]), reached, elsewhere]


MOST_OVER_MEDIAN = 1.1  # of the worst draw


def spread_in_words(ratios: Mapping[str, float]) -> str:
    """How far the worst draw is from the median over the draws, by case; nothing of no cases."""
    if not ratios:
        return ""
    worst = max(ratios, key=ratios.__getitem__)
    above = sum(ratio > MOST_OVER_MEDIAN for ratio in ratios.values())
    return (
        f"The worst draw takes at most {ratios[worst]:.2f} times the median over the draws (`{worst}`); "
        f"more than {MOST_OVER_MEDIAN} in {above} of {len(ratios)} cases."
    )


def draws() -> str:
    def of(name: str) -> str:
        drawn = (record for record in records(name).values() if record.get("median_us"))
        return spread_in_words({record["id"]: record["us"] / record["median_us"] for record in drawn})

    return f"{of(KERNEL_TIMES)}\nWith the newer kernels, on the H200: {of(NEWER_TIMES)}"


NEARLY = 1.05


def missed() -> str:
    """The cases that are above their targets: those that nearly reach them in a sentence, the others in a table."""
    newer = records(NEWER_TIMES)
    aimed = {case: record for case, record in records(KERNEL_TIMES).items() if record["target_us"]}
    over = {case: record["us"] / record["target_us"] for case, record in aimed.items()}
    above = sorted((case for case in over if over[case] > 1), key=over.__getitem__, reverse=True)
    nearly = [case for case in above if over[case] <= NEARLY]
    listed = ", ".join(f"`{case}`" for case in sorted(nearly))
    sentence = (
        f"{len(above)} of {len(aimed)} figures are above their targets, {len(nearly)} of them by 5 % or less: "
        f"{listed}. The others:"
    )
    reached = sum(newer[case]["us"] <= record["target_us"] for case, record in aimed.items())
    rows = [_missed(aimed[case], newer[case], over[case]) for case in above if case not in nearly]
    head = ["case", "us", "target", "above it", "H200", "floor", "median", "worst draw"]
    lines = textwrap.fill(sentence, 128, break_long_words=False, break_on_hyphens=False)
    with_newer = f"With the newer kernels, an H200 reaches {reached} of the {len(aimed)} targets."
    return f"{lines}\n\n{table(head, rows, words=(0, len(head) - 1))}\n\n{with_newer}\n\n{where_of_both()}"


def _missed(record: Record, newer: Record, over: float) -> list[str]:
    of_draws = [number(record.get("median_us")), record.get("worst_draw") or "-"]
    times = [ours(record["us"]), number(record["target_us"]), f"{100 * (over - 1):.0f} %", number(newer["us"])]
    return [f"`{record['id']}`", *times, number(record["floor_us"]), *of_draws]


def in_jit() -> str:
    """What a call adds to a jitted program, beside XLA's, where both were taken."""
    both = [record for record in records(H100).values() if record["in_jit_us"] and record["xla_in_jit_us"]]
    rows = [[f"`{record['id']}`", ours(record["in_jit_us"]), number(record["xla_in_jit_us"])] for record in both]
    return f"{table(['case', 'a call adds', 'XLA adds'], rows)}\n\n{where(H100)}"


STAGES = ("route", "dispatch", "permute", "combine")


def _layer(key: str, tokens: int, direction: str) -> Record:
    return records(LAYER_TIMES)[f"layer/{key}/N{tokens}/{direction}"]


def layers() -> str:
    """Layers by stage, ours and in brackets the same one written with indexing, whose gradients are scatter-adds."""
    rows = []
    for tokens, direction, (key, model) in itertools.product((8192, 64), DIRECTIONS, LAYERS.items()):
        record = _layer(key, tokens, direction)
        mine, theirs = record["stages"], record["others_stages"]["indexing"]
        whole = f"{ours(record['us'])} ({number(record['others_us']['indexing'])})"
        stages = [f"{ours(mine[stage])} ({number(theirs[stage])})" for stage in STAGES]
        label = f"{model}, {tokens} tokens, {DIRECTIONS[direction]}"
        rows.append([label, *stages, number(mine["experts"] + mine["swiglu"]), whole])
    return f"{table(['layer', *STAGES, 'products', 'in all'], rows)}\n\n{where(LAYER_TIMES)}"


def training() -> str:
    """Layers forward and backward, in milliseconds: in all, and what is not a product."""
    rows = []
    for key, model in LAYERS.items():
        record = _layer(key, 8192, "forward_and_backward")
        whole, stages = record["others_us"], record["others_stages"]
        of_ways = [
            (record["us"], record["stages"]),
            *((whole[way], stages[way]) for way in ("indexing", "scatter-add")),
        ]
        moving = [sum(of[stage] for stage in STAGES) for _, of in of_ways]
        shown = [show(us / 1000) for show, (us, _) in zip((ours, number, number), of_ways)]
        rows.append([model, *(f"{us} ({number(part / 1000)})" for us, part in zip(shown, moving))])
    head = ["milliseconds", "jax_router", "`y[slot]`", "`.at[].add`"]
    return f"{table(head, rows)}\n\n{where(LAYER_TIMES)}"


def grouped() -> str:
    """Grouped products and their gradients: microseconds, TFLOP/s, and the largest error."""
    rows = []
    for case, record in records(GROUPED_TIMES).items():
        _, key, tokens, weight, direction = case.split("/")
        label = f"{LAYERS[key]}, {tokens[1:]} tokens, `{weight}`, {direction.replace('_', ' ')}"
        rows.append([label, ours(record["us"]), number(record["tflops"]), f"{record['error']:.1e}"])
    return f"{table(['product', 'us', 'TFLOP/s', 'error'], rows)}\n\n{where(GROUPED_TIMES)}"


def exactness() -> str:
    """Rows that were compared with an oracle."""
    rows = [
        [name, f"{record['rows']:,}", f"{record['wrong']}", f"{record['by_rounding']:,}"]
        for name, record in records(EXACTNESS).items()
    ]
    head = ["what is routed", "rows", "wrong", "by rounding"]
    return f"{table(head, rows)}\n\n{where(EXACTNESS)}"


def cpu() -> str:
    """All cases on a CPU, in milliseconds."""
    rows = [
        [f"`{case}`", ours(record["us"] / 1000), number(record["xla_us"] / 1000), times(record)]
        for case, record in records(CPU).items()
    ]
    return f"{table(['case', 'ms', 'XLA', 'times'], rows)}\n\n{where(CPU)}"


_OPS = (
    *("activation_topk", "dense_router", "topk_select", "expert_dispatch", "permute", "combine"),
    *("hash_router", "scored_hash_router", "route_at"),
)

# Of each document, what writes its figures, by name.
FIGURES: Mapping[str, Mapping[str, Callable[[], str]]] = {
    "README.md": {"chosen": chosen, "in words": in_words, "training": training},
    "docs/background/performance.md": {
        "kernel times": where_of_both,
        "pictures": partial(where, f"{H100}-sweep"),
        **{op: partial(kernel_times, op) for op in _OPS},
        "draws": draws,
        "in jit": in_jit,
        "layers": layers,
        "grouped": grouped,
        "exactness": exactness,
        "cpu": cpu,
    },
    "docs/background/bounds.md": {"missed": missed},
}


def pattern(name: str) -> str:
    """Of the figures in a document: their text is the one group."""
    return rf"<!-- figures {re.escape(name)}, written by tests -->\n\n(.*?)\n\n<!-- end -->"
