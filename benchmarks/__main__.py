"""The command line of the benchmarks."""

from __future__ import annotations

import argparse
import sys
import time
from importlib import import_module
from pathlib import Path

from rich.console import Console
from rich.progress import track

from jax_router._timing import Pool, device_name

from .cases import cpu_cases, gpu_cases
from .results import RESULTS, current_commit, data_matter, save, slug, table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Times the ops of jax_router against XLA on this machine's default JAX device.",
        epilog="Records go to benchmarks/results/<device>.json. jax_router/_timing.py says how a figure is taken.",
    )
    parser.add_argument(
        "what",
        nargs="?",
        choices=("cases", "sweep", "exactness", "crossings", "grouped", "layer", "exchange"),
        default="cases",
        help=(
            "cases: the table of targets.json and variants of it (default); sweep: time over sizes, with pictures; "
            "exactness: ids against an oracle over many rows; crossings: the sizes from which another kernel is taken, "
            "with the times of both, on a GPU; grouped: products of groups of rows and their errors, on a GPU; layer: "
            "a whole layer of experts by stage, on a GPU; exchange: experts over several devices, and what moves"
        ),
    )
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="GLOB",
        help="cases (sweeps, scenarios, lines) whose id matches one, such as 'topk_select/*'",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="kernel time alone: no rivals besides XLA, no time in jit; of crossings, fewer sizes",
    )
    parser.add_argument(
        "--no-reference", action="store_true", help="do not time XLA and other rivals, nor draw pictures"
    )
    parser.add_argument(
        "--rows",
        type=float,
        metavar="N",
        help="rows of exactness, a tenth as many for dense_router (1e8; on a CPU 1e5)",
    )
    parser.add_argument("--list", action="store_true", help="list the ids and stop")
    parser.add_argument("--out", type=Path, metavar="PATH", help="the file of the records")
    parser.add_argument("--device-kind", metavar="NAME", help="what to call the device in the records")
    parser.add_argument("--commit", help="the commit in the records (default: JAX_ROUTER_COMMIT, else what git says)")
    exchange = parser.add_argument_group("exchange")
    exchange.add_argument(
        "--exchange-only", action="store_true", help="without the experts' products: what moves, alone"
    )
    exchange.add_argument("--tokens", type=int, default=None, metavar="T", help="of a device (8192; tiny: 64)")
    exchange.add_argument("--tiny", action="store_true", help="a layer for a machine without GPUs")
    exchange.add_argument("--draw", action="store_true", help="only draw the picture of the records")
    exchange.add_argument(
        "--paper", action="store_true", help="only print the tables of the records, and what many GPUs would do by them"
    )
    return parser


def main() -> int:
    arguments = _parser().parse_args()
    import jax

    from . import exactness, run, sweep

    device = arguments.device_kind or device_name()
    commit = arguments.commit or current_commit()
    on_gpu = jax.default_backend() == "gpu"
    console = Console(width=None if sys.stdout.isatty() else 200)
    if arguments.what == "exactness":
        scenarios = run.select(exactness.SCENARIOS, arguments.only, lambda scenario: scenario.name)
        if arguments.list:
            print("\n".join(scenario.name for scenario in scenarios))
            return 0
        rows = int(arguments.rows or (1e8 if on_gpu else 1e5))
        path = arguments.out or RESULTS / f"{slug(device)}-exactness.json"
        found = []
        for scenario in scenarios:
            found.append(exactness.Count(scenario.name, *scenario.count(rows), device=device, commit=commit))
            save(found, path)
        console.print(exactness.table(found, device))
        return 1 if any(count.wrong for count in found) else 0
    if arguments.what == "crossings":
        return _crossings(arguments, console, device, commit, on_gpu)
    if arguments.what in ("grouped", "layer"):
        return _experts(arguments, console, device, commit, on_gpu)
    if arguments.what == "exchange":
        return _exchange(arguments, console, device, commit)
    is_sweep = arguments.what == "sweep"
    if is_sweep:
        sweeps = run.select(sweep.sweeps(on_gpu), arguments.only, lambda item: item.name)
        ids = [item.name for item in sweeps]
        cases = sweep.cases(sweeps)
    else:
        cases = run.select(gpu_cases() if on_gpu else cpu_cases(), arguments.only, lambda case: case.id)
        ids = [case.id for case in cases]
    if arguments.list:
        print("\n".join(ids))
        return 0
    suffix = "-sweep" if is_sweep else ""
    path = arguments.out or RESULTS / f"{slug(device)}{suffix}.json"
    benchmark = run.Benchmark(
        console,
        on_gpu=on_gpu,
        quick=arguments.quick,
        with_rivals=not arguments.no_reference,
        is_sweep=is_sweep,
    )
    records = []
    for record in benchmark.records(cases, device, commit):
        records.append(record)
        save(records, path)
    console.print(table(records, device))
    if said := data_matter(records):
        console.print(said, highlight=False)
    if is_sweep and not arguments.no_reference:
        for picture in sweep.draw(sweeps, records, slug(device), device):
            console.print(f"drawn: {picture}")
    console.print(f"{len(records)} records in {path}")
    for case_id, error in benchmark.failures.items():
        console.print(f"[red]{case_id}[/]: {error}", highlight=False)
    return 1 if benchmark.failures else 0


def _crossings(arguments: argparse.Namespace, console: Console, device: str, commit: str, on_gpu: bool) -> int:
    from . import crossings, run
    from .crossing_lines import lines

    selected = run.select(lines(), arguments.only, lambda line: line.id)
    if arguments.only is None:
        selected = [line for line in selected if line.is_timed]
    if arguments.list:
        print("\n".join(line.id for line in selected))
        return 0
    if not on_gpu:
        raise SystemExit("crossings are those of CUDA kernels, and JAX sees no GPU here")
    start = time.perf_counter()
    work = [(line, crossings.work_of(line, None, quick=arguments.quick)) for line in selected]
    path = arguments.out or RESULTS / f"{slug(device)}-crossings.json"
    records: list[crossings.Record] = []
    failures: dict[str, str] = {}
    clock = crossings.KernelClock(Pool(run.GPU_POOL))
    timed = crossings.records(work, None, clock, failures)
    for record in track(timed, total=len(work), console=console, disable=not console.is_terminal):
        record.device, record.commit = device, commit
        records.append(record)
        save(records, path)
    console.print(crossings.table(records, device))
    timings = sum(len(to_do.points) for _, to_do in work)
    console.print(f"{len(records)} lines, {timings} timings, {time.perf_counter() - start:.0f} s; records in {path}")
    for line_id, error in failures.items():
        console.print(f"[red]{line_id}[/]: {error}", highlight=False)
    return 1 if failures else 0


def _experts(arguments: argparse.Namespace, console: Console, device: str, commit: str, on_gpu: bool) -> int:
    from . import run

    part = import_module(f".{arguments.what}", __package__)
    selected = run.select(part.cases(), arguments.only, lambda case: case.id)
    if arguments.list:
        print("\n".join(case.id for case in selected))
        return 0
    if not on_gpu:
        raise SystemExit(f"{arguments.what} compares kernels for GPUs, and JAX sees no GPU here")
    path = arguments.out or RESULTS / f"{slug(device)}-{arguments.what}.json"
    found, failures = [], dict[str, str]()
    for record in part.records(selected, failures):
        record.device, record.commit = device, commit
        found.append(record)
        save(found, path)
        console.print(part.table([record], device))
    console.print(part.table(found, device))
    console.print(f"{len(found)} records in {path}")
    for name, error in failures.items():
        console.print(f"[red]{name}[/]: {error}", highlight=False)
    return 1 if failures else 0


def _exchange(arguments: argparse.Namespace, console: Console, device: str, commit: str) -> int:
    import jax

    from . import exchange, on_paper, run
    from .sweep import IMAGES

    path = arguments.out or RESULTS / f"{slug(device)}-exchange.json"
    sizes = (exchange.tiny_sizes if arguments.tiny else exchange.real_sizes)(**_given(tokens=arguments.tokens))
    if arguments.draw or arguments.paper:
        if not path.exists():
            raise SystemExit(f"there are no records of {device}, {path}: --device-kind names another device")
        layers, measured = exchange.read(path)
        if arguments.draw:
            picture = IMAGES / f"{slug(device)}-exchange.png"
            exchange.draw(layers, sizes, device, picture)
            console.print(f"drawn: {picture}")
        if arguments.paper:
            case = exchange.Case(exchange.share(sizes, max(measured), sizes.tokens, *exchange.WHOLE), "balanced")
            computing = layers[case.id].us / 1e6 if case.id in layers else None
            print(exchange.markdown(layers, measured, sizes), end="\n\n")
            print(on_paper.markdown([*on_paper.estimates(sizes, measured[max(measured)], computing)]))
        return 0
    what = ("moved",) if arguments.exchange_only else exchange.WHAT
    selected = run.select(exchange.cases(sizes, jax.device_count(), what), arguments.only, lambda case: case.id)
    if arguments.list:
        print("\n".join(case.id for case in selected))
        return 0
    links = {}
    for devices in sorted({case.program.devices for case in selected} - {1}):
        links[devices] = exchange.measure_links(sizes, devices)
        links[devices].device, links[devices].commit = device, commit
    save(links.values(), path)
    console.print(exchange.links_table([*links.values()], device))
    found, failures = [], dict[str, str]()
    for record in exchange.records(selected, links.get, failures):
        record.device, record.commit = device, commit
        found.append(record)
        save([record], path)
        console.print(f"{record.id}: {record.us:.0f} us", highlight=False)
    console.print(exchange.table(found, exchange.read(path)[0], device))
    console.print(f"{len(found)} records in {path}")
    for name, error in failures.items():
        console.print(f"[red]{name}[/]: {error}", highlight=False)
    return 1 if failures else 0


def _given(**options: int | None) -> dict[str, int]:
    return {name: value for name, value in options.items() if value is not None}


if __name__ == "__main__":
    sys.exit(main())
