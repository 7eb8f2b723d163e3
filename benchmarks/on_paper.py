"""Experts over more GPUs than there were to measure: a layer's time from what was measured of one host.

`docs/expert_parallel.md` has the formulas. Everything here is computed, nothing timed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

from .exchange import LinkRecord, Sizes

# What a GPU's network adapter moves each way: 400 Gbit/s, as sold and not as measured.
NETWORK = 50e9
GPUS_A_HOST = 8
# Experts over so many GPUs, in so many copies.
SCALES = ((8, 1), (64, 1), (64, 16), (256, 4))
_TRIPS = 4  # there and back, forward and backward


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A layer of a device, forward and backward, in seconds.

    Attributes:
        expert_gpus: n, over which the experts are spread.
        copies: how often (data parallel).
        slots: of a pair of devices, four standard deviations more than an even load needs.
        gather, exchange: what moving takes, by way.
        gradients: the all-reduce of the experts' gradients over the copies.
        computing: of one device, as measured; None if it was not.
    """

    expert_gpus: int
    copies: int
    slots: int
    gather: float
    exchange: float
    gradients: float
    computing: float | None

    @property
    def efficiency(self) -> float | None:
        """Of the faster way, with nothing overlapped."""
        if self.computing is None:
            return None
        return self.computing / (self.computing + min(self.gather, self.exchange))


def estimates(
    sizes: Sizes,
    links: LinkRecord,
    computing: float | None,
    *,
    network: float = NETWORK,
    scales: Sequence[tuple[int, int]] = SCALES,
) -> Iterator[Estimate]:
    """By the number of GPUs.

    Args:
        sizes: of the layer.
        links: measured in one host.
        computing: seconds of one device alone.
        network: bytes a second between hosts, a GPU.
        scales: pairs of `expert_gpus` and `copies`.
    """
    for n, copies in scales:
        inside = min(n, GPUS_A_HOST)
        part = 1 - (1 - 1 / n) ** sizes.top_k
        mean = sizes.tokens * part
        slots = min(sizes.tokens, math.ceil(mean + 4 * math.sqrt(mean * (1 - part))))

        def trip(to_host: float, to_others: float, speed: float) -> float:
            """The slower of the links within a host and those between hosts, which move at the same time."""
            return max(to_host * sizes.row / speed, to_others * sizes.row / network)

        # In a ring every row comes into a host once, through one of its adapters, and then to all GPUs in it.
        rows = (n - 1) * sizes.tokens, (n - inside) * sizes.tokens / inside
        gather = _TRIPS / 2 * (trip(*rows, links.all_gather) + trip(*rows, links.reduce_scatter))
        exchange = _TRIPS * trip((inside - 1) * slots, (n - inside) * slots, links.all_to_all)
        weights = 2 * 3 * sizes.hidden * sizes.inner * sizes.num_experts / n
        gradients = 2 * weights * (copies - 1) / copies / network
        yield Estimate(n, copies, slots, gather, exchange, gradients, computing)


def markdown(found: Sequence[Estimate]) -> str:
    lines = [
        "| GPUs | experts over | copies | slots | gather | exchange | gradients | efficiency |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for one in found:
        times = " | ".join(f"{1e3 * seconds:.1f} ms" for seconds in (one.gather, one.exchange, one.gradients))
        part = "" if one.efficiency is None else f"{one.efficiency:.2f}"
        lines.append(
            f"| {one.expert_gpus * one.copies} | {one.expert_gpus} | {one.copies} | {one.slots} | {times} | {part} |"
        )
    return "\n".join(lines)
