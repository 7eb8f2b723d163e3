"""Experts over the devices at hand: what the links do, and a layer each way, over loads and numbers of devices.

A figure is the wall-clock time of a call, over calls that are queued one after another, so that the device waits for no
host; the median of several such series. A call takes milliseconds, and what one more costs the host stays beside it.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.table import Table

from jax_router import Routing, expert_dispatch, expert_parallel, grouped_matmul
from jax_router._timing import Timing
from jax_router._ways import Weights, swiglu

from .experts import EXPERTS

AXIS = "expert"
LOADS = ("balanced", "zipf", "one-device")
WHAT = ("experts", "moved")
DIRECTIONS = ("forward", "forward_and_backward")
WHOLE = "experts", "forward_and_backward"
# What the limits of the sized ways have beyond an even load.
HEADROOM = 1.05
# With strong scaling, how many times the tokens of a device all devices have together.
STRONG = 4
_CALLS, _SERIES, _REPEATS = 4, 7, 32
_SHARED_BY = 8  # devices, at least


@dataclasses.dataclass(frozen=True)
class Sizes:
    """A layer: E experts from D to F and back, k a token, and the tokens of a device with weak scaling."""

    name: str
    hidden: int
    inner: int
    num_experts: int
    top_k: int
    tokens: int

    @property
    def row(self) -> int:
        """Bytes of a token."""
        return 2 * self.hidden


def real_sizes(tokens: int = 8192) -> Sizes:
    (experts,) = (experts for experts in EXPERTS if experts.name == "deepseek-v4-flash")
    model = experts.model
    return Sizes(experts.name, model.hidden_size, experts.inner, model.num_experts, model.top_k, tokens)


def tiny_sizes(tokens: int = 64) -> Sizes:
    """For a machine without GPUs."""
    return Sizes("tiny", 32, 16, 16, 3, tokens)


# The ways


swiglu_experts = partial(swiglu, partial(grouped_matmul, unused_rows="undefined"))  # rows which nobody reads


def identity_experts(weights: Weights, rows: Array, group_sizes: Array) -> Array:
    return rows


def by_choices(x: Array, routing: Routing, experts: Callable[..., Array], num_experts: int) -> tuple[Array, Array]:
    """Every choice in a slot of its own, enough slots for the worst case, as plain JAX has it."""
    devices = lax.axis_size(AXIS)
    (tokens, hidden), top_k, own = x.shape, routing.expert_ids.shape[1], num_experts // devices
    slots = tokens * min(top_k, own)
    by_expert = expert_dispatch(routing.expert_ids, num_experts)
    sizes = by_expert.group_sizes.reshape(devices, own)
    first = jnp.cumsum(sizes.sum(axis=1)) - sizes.sum(axis=1)
    choice = first[:, None] + jnp.arange(slots, dtype=jnp.int32)
    sent = x.at[by_expert.token_index.at[choice].get(mode="clip")].get(mode="clip")
    received = lax.all_to_all(sent, AXIS, 0, 0)
    ends = jnp.cumsum(lax.all_to_all(sizes, AXIS, 0, 0), axis=1)
    expert = (jnp.arange(slots, dtype=jnp.int32)[:, None] >= ends[:, None, :]).sum(axis=-1, dtype=jnp.int32)
    local = expert_dispatch(expert.reshape(-1, 1), own)
    results = experts(received.reshape(-1, hidden).at[local.token_index].get(mode="clip"), local.group_sizes)
    slot = local.slot[:, 0]
    results = jnp.where(slot[:, None] >= 0, results.at[slot].get(mode="clip"), 0)
    returned = lax.all_to_all(results.reshape(devices, slots, hidden), AXIS, 0, 0)
    device = routing.expert_ids // own
    chosen = returned[device, by_expert.slot - first[device]]
    weighted = chosen.astype(jnp.float32) * routing.weights[..., None]
    return weighted.sum(axis=1).astype(x.dtype), jnp.zeros((), jnp.int32)


def by_library(
    x: Array, routing: Routing, experts: Callable[..., Array], num_experts: int, *, way: str, sized: bool
) -> tuple[Array, Array]:
    (tokens, _), top_k, devices = x.shape, routing.expert_ids.shape[1], lax.axis_size(AXIS)
    options: dict[str, Any] = {"way": way}
    if sized:
        # In blocks of 128 rows, the tiles of grouped_matmul.
        options["rows"] = -(-int(HEADROOM * tokens * top_k) // 128) * 128
    if sized and way == "exchange":
        options["slots"] = expert_parallel.expected_slots(tokens, top_k, devices, headroom=HEADROOM)
    return expert_parallel.compute(x, routing, experts, num_experts=num_experts, axis_name=AXIS, **options)


WAYS: dict[str, Callable[..., tuple[Array, Array]]] = {
    "gather": partial(by_library, way="gather", sized=False),
    "gather-sized": partial(by_library, way="gather", sized=True),
    "exchange": partial(by_library, way="exchange", sized=False),
    "exchange-sized": partial(by_library, way="exchange", sized=True),
    "choices": by_choices,
}
# On one device nothing moves, whichever way.
ALONE = partial(by_library, way="gather", sized=False)


# Cases


@dataclasses.dataclass(frozen=True)
class Program:
    """What is compiled once and timed for all loads."""

    sizes: Sizes
    devices: int
    tokens: int  # of a device
    way: str
    what: str
    direction: str


@dataclasses.dataclass(frozen=True)
class Case:
    program: Program
    load: str

    @property
    def id(self) -> str:
        program = self.program
        return (
            f"exchange/{program.sizes.name}/{program.what}/{program.direction}/{program.devices}x{program.tokens}/"
            f"{self.load}/{program.way}"
        )


def alone(sizes: Sizes, tokens: int, what: str, direction: str) -> Program:
    """One device with all experts."""
    return Program(sizes, 1, tokens, "alone", what, direction)


def share(sizes: Sizes, devices: int, tokens: int, what: str, direction: str) -> Program:
    """One device with the experts that each of so many has, and as many choices: its work where nothing moves."""
    fewer = dataclasses.replace(sizes, num_experts=sizes.num_experts // devices)
    return Program(fewer, 1, tokens, f"share-of-{devices}", what, direction)


def counts_of_devices(most: int) -> list[int]:
    return [1 << power for power in range(most.bit_length())]


def cases(sizes: Sizes, most_devices: int, what: Sequence[str] = WHAT) -> list[Case]:
    """The largest numbers of devices first, and the movement before the experts, in case the time runs out."""
    counts = counts_of_devices(most_devices)
    # One device has the share of several where these are not here, too.
    several = counts_of_devices(max(most_devices, _SHARED_BY))[1:]
    on = {devices: (sizes.tokens, sizes.tokens * STRONG // devices) for devices in (1, *several)}
    found: dict[Case, None] = {}
    for part, devices, direction in itertools.product(reversed(what), reversed(counts), DIRECTIONS):
        if devices > 1:
            programs = [Program(sizes, devices, tokens, way, part, direction) for tokens in on[devices] for way in WAYS]
            of_loads = list(itertools.product(programs, LOADS))
        else:
            programs = [alone(sizes, tokens, part, direction) for tokens in on[1]]
            of_loads = list(itertools.product(programs, LOADS))
            for sharers in several:
                if sizes.num_experts // sharers >= sizes.top_k:
                    shares = [share(sizes, sharers, tokens, part, direction) for tokens in on[sharers]]
                    of_loads += [(program, "balanced") for program in shares]
        found |= dict.fromkeys(Case(*pair) for pair in of_loads)
    return list(found)


@dataclasses.dataclass
class Record:
    """A layer on several devices.

    Attributes:
        id: what is computed ("moved": experts that return their rows), direction, devices and tokens of each, load and
            way.
        us, us_range: of a call, the median, the least and the most.
        floor_us: the rows that this load must move, a token once to each device that has experts of its own and is not
            its own, there and back, by the device that moves most, at the speed of an all-to-all; None where that was
            not measured.
        temporary, arguments, results: bytes of memory on a device.
        dropped: the part of the choices that found no place.
        device, jax, commit: where, with what, and of which state of this project.
    """

    id: str
    us: float
    us_range: tuple[float, float]
    floor_us: float | None
    temporary: int
    arguments: int
    results: int
    dropped: float
    device: str = ""
    jax: str = jax.__version__
    commit: str = ""


@dataclasses.dataclass
class LinkRecord:
    """The constants of `jax_router.expert_parallel.Links`, as measured."""

    id: str
    all_to_all: float
    all_gather: float
    reduce_scatter: float
    memory: float
    latency: float
    device: str = ""
    jax: str = jax.__version__
    commit: str = ""


def links_id(devices: int) -> str:
    return f"exchange/links/{devices}"


# Taking figures


def timing(run: Callable[[], Any], calls: int = _CALLS) -> Timing:
    jax.block_until_ready([run(), run()])
    times = []
    for _ in range(_SERIES):
        start = time.perf_counter()
        for _ in range(calls):
            result = run()
        jax.block_until_ready(result)
        times.append(1e6 * (time.perf_counter() - start) / calls)
    return Timing.of(times)


def make_mesh(devices: int) -> jax.sharding.Mesh:
    return jax.make_mesh((devices,), (AXIS,), (AxisType.Auto,), devices=jax.devices()[:devices])


def measure_links(sizes: Sizes, devices: int) -> LinkRecord:
    """Collectives of as many bytes as the layer's, and an all-to-all of next to none for the latency."""
    mesh = make_mesh(devices)

    def timed(function: Callable[[Array], Array], rows: int, repeats: int = 1) -> float:
        mapped = jax.jit(jax.shard_map(function, mesh=mesh, in_specs=P(AXIS), out_specs=P(AXIS), check_vma=False))
        x = jax.device_put(jnp.ones((devices * rows, sizes.hidden), jnp.bfloat16), NamedSharding(mesh, P(AXIS)))
        return timing(partial(mapped, x)).us / 1e6 / repeats

    def exchange(x):
        return lax.all_to_all(x, AXIS, 0, 0, tiled=True)

    def exchange_often(x):
        for _ in range(_REPEATS):
            x = exchange(x)
        return x

    # Every device gets a row of the results, so that they need no memory beside what the collective writes.
    sent = (devices - 1) * sizes.tokens * sizes.row
    copied = 2 * devices * sizes.tokens * sizes.row
    return LinkRecord(
        links_id(devices),
        sent / timed(exchange, devices * sizes.tokens),
        sent / timed(lambda x: lax.all_gather(x, AXIS, tiled=True), sizes.tokens),
        sent / timed(lambda x: lax.psum_scatter(x, AXIS, tiled=True), devices * sizes.tokens),
        copied / timed(lambda x: x + x, devices * sizes.tokens),
        timed(exchange_often, devices, repeats=_REPEATS),
    )


def draw_ids(sizes: Sizes, tokens: int, devices: int, load: str) -> np.ndarray:
    """Ids of k distinct experts a token, of all devices' tokens."""
    rng = np.random.default_rng(0)
    probabilities = 1.0 / np.arange(1, sizes.num_experts + 1) if load == "zipf" else np.ones(sizes.num_experts)
    if load == "one-device":
        probabilities[max(sizes.num_experts // devices, sizes.top_k) :] = 0
    else:
        rng.shuffle(probabilities)
    with np.errstate(divide="ignore"):
        scores = np.log(probabilities, dtype=np.float32)
    ids = np.empty((devices, tokens, sizes.top_k), np.int32)
    for part in ids:  # the k largest of scores with Gumbel noise are a draw without replacement
        noisy = scores - np.log(rng.standard_exponential((tokens, sizes.num_experts), np.float32))
        part[:] = np.argpartition(-noisy, sizes.top_k - 1, axis=1)[:, : sizes.top_k]
    return ids.reshape(-1, sizes.top_k)


def rows_that_must_move(ids: np.ndarray, sizes: Sizes, devices: int) -> int:
    """By the device that sends or receives most."""
    device = ids.reshape(devices, -1, sizes.top_k) // (sizes.num_experts // devices)
    wanted = (device[..., None] == np.arange(devices)).any(axis=2).sum(axis=1)  # of each source, to each target
    np.fill_diagonal(wanted, 0)
    return int(max(wanted.sum(axis=0).max(), wanted.sum(axis=1).max()))


@dataclasses.dataclass(frozen=True)
class Operands:
    """Of the programs of a number of devices; random, and made where they lie."""

    sizes: Sizes
    mesh: jax.sharding.Mesh

    def on_each(self, function: Callable[[Array], Any]) -> Any:
        """What a function of a key makes on each device, with another key on each."""

        def own() -> Any:
            return function(jax.random.fold_in(jax.random.key(0), lax.axis_index(AXIS)))

        return jax.jit(jax.shard_map(own, mesh=self.mesh, in_specs=(), out_specs=P(AXIS), check_vma=False))()

    def weights(self, what: str) -> Weights:
        sizes, own = self.sizes, self.sizes.num_experts // self.mesh.size

        def normal(key: Array, *shape: int) -> Array:
            """Row by row: the weights fill much of a GPU, and leave no room for a copy."""
            scale = jnp.bfloat16(shape[1] ** -0.5)
            return lax.map(lambda k: jax.random.normal(k, shape[1:], jnp.bfloat16) * scale, jax.random.split(key, own))

        if what == "moved":
            return self.on_each(lambda _: Weights(jnp.zeros((1, 1, 1)), jnp.zeros((1, 1, 1))))
        return self.on_each(
            lambda key: Weights(
                normal(key, own, sizes.hidden, 2 * sizes.inner),
                normal(jax.random.fold_in(key, 1), own, sizes.inner, sizes.hidden),
            )
        )

    def tokens(self, tokens: int) -> tuple[Array, Array, Array]:
        """Hidden states, weights of choices, and a cotangent."""
        shape = tokens, self.sizes.hidden
        return self.on_each(
            lambda key: (
                jax.random.normal(key, shape, jnp.bfloat16),
                jax.random.uniform(key, (tokens, self.sizes.top_k)),
                jax.random.normal(jax.random.fold_in(key, 1), shape, jnp.bfloat16),
            )
        )


def program_of(program: Program, mesh: jax.sharding.Mesh) -> Callable[..., Any]:
    sizes, tokens = program.sizes, P(AXIS)
    way = WAYS.get(program.way, ALONE)
    experts = swiglu_experts if program.what == "experts" else identity_experts

    def layer(x, weights, ids, parameters):
        return tuple(way(x, Routing(weights, ids), partial(experts, parameters), sizes.num_experts))

    mapped = jax.shard_map(layer, mesh=mesh, in_specs=(tokens, tokens, tokens, P(AXIS)), out_specs=(tokens, P()))

    def run(x, weights, cotangent, ids, parameters):
        if program.direction == "forward":
            return mapped(x, weights, ids, parameters)
        output, pullback, dropped = jax.vjp(
            lambda x, weights, parameters: mapped(x, weights, ids, parameters), x, weights, parameters, has_aux=True
        )
        return output, dropped, pullback(cotangent)

    return jax.jit(run)


def records(
    selected: Sequence[Case], links: Callable[[int], LinkRecord | None], failures: dict[str, str]
) -> Iterator[Record]:
    """The cases of a program one after another: it is compiled once.

    Args:
        selected: the cases.
        links: what was measured for a number of devices.
        failures: filled with what went wrong, by the id of the case.
    """
    kept: tuple[Any, Any] = None, None
    for program, of_program in itertools.groupby(selected, key=lambda case: case.program):
        mesh = make_mesh(program.devices)
        operands = Operands(program.sizes, mesh)
        which = program.devices, program.sizes.num_experts, program.what
        if kept[0] != which:
            kept = None, None  # before others are made
            kept = which, operands.weights(program.what)
        measured = links(program.devices)
        yield from _of_program(program, list(of_program), mesh, operands, kept[1], measured, failures)


def _of_program(
    program: Program,
    selected: Sequence[Case],
    mesh: jax.sharding.Mesh,
    operands: Operands,
    parameters: Weights,
    links: LinkRecord | None,
    failures: dict[str, str],
) -> Iterator[Record]:
    sizes = program.sizes
    inputs = operands.tokens(program.tokens)
    compiled = None
    for case in selected:
        ids = draw_ids(sizes, program.tokens, program.devices, case.load)
        floor = None
        if links is not None:
            trips = 2 if program.direction == "forward" else 4
            moved = trips * rows_that_must_move(ids, sizes, program.devices) * sizes.row
            floor = 1e6 * moved / links.all_to_all
        elif program.devices == 1:
            floor = 0.0
        arguments = (*inputs, jax.device_put(ids, NamedSharding(mesh, P(AXIS))), parameters)
        try:
            if compiled is None:
                compiled = program_of(program, mesh).lower(*arguments).compile()
            found = timing(partial(compiled, *arguments))
            dropped = int(compiled(*arguments)[1]) / ids.size
        except Exception as error:  # too little memory for one must not cost the figures of the others
            failures[case.id] = f"{type(error).__name__}: {str(error)[:300]}"
            continue
        memory = compiled.memory_analysis()
        yield Record(
            case.id,
            round(found.us, 1),
            (round(found.least, 1), round(found.most, 1)),
            None if floor is None else round(floor, 1),
            memory.temp_size_in_bytes,
            memory.argument_size_in_bytes,
            memory.output_size_in_bytes,
            round(dropped, 5),
        )


# What the records say


def read(path: Path) -> tuple[dict[str, Record], dict[int, LinkRecord]]:
    """Layers by id, and links by number of devices."""
    layers, links = {}, {}
    for entry in json.loads(path.read_text()):
        if entry["id"].startswith("exchange/links/"):
            links[int(entry["id"].rsplit("/", 1)[1])] = LinkRecord(**entry)
        else:
            layers[entry["id"]] = Record(**entry)
    return layers, links


def share_id(case_id: str) -> str:
    """The share of a case of several devices."""
    *first, sizes, load, _ = case_id.split("/")
    devices, tokens = sizes.split("x")
    return "/".join((*first, f"1x{tokens}", load, f"share-of-{devices}"))


def least_us(record: Record, records: dict[str, Record]) -> float | None:
    """What a device computes where nothing moves, plus the bytes that must move at the measured speed."""
    computing = records.get(share_id(record.id))
    return None if computing is None or record.floor_us is None else computing.us + record.floor_us


def efficiency(record: Record, records: dict[str, Record]) -> float | None:
    least = least_us(record, records)
    return None if least is None else least / record.us


def table(found: Sequence[Record], records: dict[str, Record], device: str) -> Table:
    result = Table(title=f"experts over devices, {device}", title_justify="left")
    result.add_column("layer", no_wrap=True)
    for heading in ("us", "floor", "efficiency", "temporary MiB", "dropped"):
        result.add_column(heading, justify="right", no_wrap=True)
    for record in found:
        part = efficiency(record, records)
        result.add_row(
            record.id.removeprefix("exchange/"),
            f"{record.us:.0f}",
            "" if record.floor_us is None else f"{record.floor_us:.0f}",
            "" if part is None else f"{part:.2f}",
            f"{record.temporary / 2**20:.0f}",
            f"{record.dropped:.1%}" if record.dropped else "",
        )
    return result


def links_table(found: Sequence[LinkRecord], device: str) -> Table:
    result = Table(title=f"links of {device}, GB/s that a device sends", title_justify="left")
    for heading in ("devices", "all-to-all", "all-gather", "reduce-scatter", "memory", "latency us"):
        result.add_column(heading, justify="right", no_wrap=True)
    for record in found:
        speeds = record.all_to_all, record.all_gather, record.reduce_scatter, record.memory
        cells = (f"{speed / 1e9:.1f}" for speed in speeds)
        result.add_row(record.id.rsplit("/", 1)[1], *cells, f"{record.latency * 1e6:.1f}")
    return result


def markdown(records: dict[str, Record], links: dict[int, LinkRecord], sizes: Sizes) -> str:
    """The tables of docs/expert_parallel.md: the links, then the layer and what moves alone, forward and backward."""
    lines = ["| devices | all-to-all | all-gather | reduce-scatter | latency |", "|---:|---:|---:|---:|---:|"]
    for devices, link in sorted(links.items()):
        speeds = (link.all_to_all, link.all_gather, link.reduce_scatter)
        cells = " | ".join(f"{speed / 1e9:.0f} GB/s" for speed in speeds)
        lines.append(f"| {devices} | {cells} | {1e6 * link.latency:.0f} us |")
    most_first = sorted(links, reverse=True)
    tables = [("experts", "the layer", devices) for devices in most_first] + [("moved", "what moves alone", max(links))]
    for what, title, devices in tables:
        columns = (*LOADS, *(["efficiency"] if what == "experts" else []), "temporary memory")
        head = f"| {title}, {devices} devices, {sizes.tokens} tokens each | {' | '.join(columns)} |"
        lines += ["", head, "|---|" + len(columns) * "---:|"]
        for way in WAYS:
            program = Program(sizes, devices, sizes.tokens, way, what, DIRECTIONS[1])
            of_loads = [records.get(Case(program, load).id) for load in LOADS]
            cells = [_milliseconds(record) for record in of_loads]
            if first := of_loads[0]:
                part = efficiency(first, records)
                cells += ["" if part is None else f"{part:.2f}"] if what == "experts" else []
                cells.append(f"{first.temporary / 2**30:.1f} GiB")
            lines.append(f"| {way} | {' | '.join(cells)} |")
        least = records.get(share_id(Case(program, LOADS[0]).id))
        if least is not None:
            lines.append(f"| a device's share, nothing moved | {least.us / 1e3:.1f} ms | | | | |")
    return "\n".join(lines)


def _milliseconds(record: Record | None) -> str:
    if record is None:
        return ""
    dropped = f" ({record.dropped:.0%} dropped)" if record.dropped else ""
    return f"{record.us / 1e3:.1f} ms{dropped}"


def draw(records: dict[str, Record], sizes: Sizes, device: str, path: Path, load: str = "balanced") -> None:
    """Weak and strong scaling of a layer, forward and backward, by way, beside what the bytes need at least."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot
    from matplotlib.ticker import ScalarFormatter

    most = max((int(key.split("/")[4].split("x")[0]) for key in records), default=1)
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    for axis, (title, tokens_on) in zip(
        axes,
        (
            (f"weak: {sizes.tokens} tokens a device", lambda devices: sizes.tokens),
            (f"strong: {sizes.tokens * STRONG} tokens in all", lambda devices: sizes.tokens * STRONG // devices),
        ),
    ):

        def record_at(devices: int, way: str, tokens_on: Callable[[int], int] = tokens_on) -> Record | None:
            program = Program(sizes, devices, tokens_on(devices), way, "experts", DIRECTIONS[1])
            return records.get(Case(program, load).id)

        counts = counts_of_devices(most)
        for index, way in enumerate(WAYS):
            points = [(1, record_at(1, "alone")), *((devices, record_at(devices, way)) for devices in counts[1:])]
            known = [(devices, record.us / 1e3) for devices, record in points if record]
            if len(known) > 1:
                axis.plot(*zip(*known), "o-", color=f"C{index}", label=way, markersize=4)
        floors = []
        for devices in counts[1:]:
            found = [record for way in WAYS if (record := record_at(devices, way))]
            if found and (least := least_us(found[0], records)):
                floors.append((devices, least / 1e3))
        if floors:
            axis.plot(*zip(*floors), "k_:", label="a device's share, and the bytes", markersize=12)
        axis.set_title(title)
        axis.set_xscale("log", base=2)
        axis.set_xticks(counts, map(str, counts))
        axis.set_xlabel("devices")
        axis.set_ylabel("forward and backward [ms]")
        axis.set_yscale("log", base=2)
        axis.yaxis.set_major_formatter(ScalarFormatter())
    handles = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles))
    figure.suptitle(f"{sizes.name}, {load} load, {device}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
