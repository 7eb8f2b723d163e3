"""Experts that lie on several devices: which rows go where, and back, inside `jax.shard_map`.

Of the E experts of a layer, device d of the n along a mesh axis has the E / n from `d E / n` on, and it has T tokens of
its own. `compute` brings every token to the devices of its experts, lets these compute, and brings the weighted sums
back. It does so in one of two ways, with the same results to rounding:

    gather     all tokens go to all devices by an all-gather, and a reduce-scatter adds up the devices' sums. Every
               device sends and receives (n - 1) T rows each way, whatever k is.
    exchange   a token goes once to each device that has experts of its own, in one of the `slots` that every pair of
               devices has, by an all-to-all; what the device computes for it comes back as one row, the weighted sum.
               Every device sends and receives (n - 1) `slots` rows each way. Without a limit `slots` is T, enough for
               every load, which is as many rows as gather moves.

What is sent where is decided by int32 maps on the devices: the shapes, and so the program, are the same for every load,
and the host waits for nothing. All maps are inverted by gathers: the results and gradients have the same bits every
time.

`jax.lax.ragged_all_to_all` would move no more rows than there are, and need no limit. It is not used: on four H100 it
takes 27 times as long as an all-to-all of the same bytes (3.6 times with XLA's decomposer of it), and it does not exist
on a CPU.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import PartitionSpec as P

from . import _check
from ._expert_dispatch import expert_dispatch
from ._ids import as_int32_ids
from ._permute import combine, permute, through_experts
from ._sharding import explicit_axes
from ._types import Dispatch, Implementation, Routing, Weigh, exportable

Way = Literal["gather", "exchange"]
# The rows of a device `[S, D]`, sorted by its experts, and how many each has `[E / n]`, to rows `[S, D]`.
Experts = Callable[[Array, Array], Array]


@exportable
class ExpertSum(NamedTuple):
    """What the experts add up to.

    Attributes:
        output: `[..., D]` in the dtype of x, the weighted sum of a token's experts.
        dropped: int32 `[]`, the choices that no expert computed since `slots` or `rows` were too few, of all devices
            along the axis; 0 without these limits. Choices without a valid id do not count.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jax_router import Routing, expert_parallel
        >>> x, routing = jnp.ones((1, 2)), Routing(jnp.ones((1, 1)), jnp.array([[3]]))
        >>> weights = jnp.stack([jnp.eye(2)] * 4)  # of four experts
        >>> def experts(weights, rows, group_sizes):
        ...     return rows
        >>> with jax.set_mesh(jax.make_mesh((1,), ("expert",))):
        ...     expert_parallel.over_mesh(x, routing, experts, weights, expert_axis="expert", rows=0)
        ExpertSum(output=Array([[0., 0.]], dtype=float32), dropped=Array(1, dtype=int32))
    """

    output: Array
    dropped: Array


@dataclasses.dataclass(frozen=True)
class Links:
    """What the devices along a mesh axis can do: the constants by which `way="auto"` chooses.

    `python -m benchmarks exchange` measures them. The defaults are those of four H200 of one host.

    Attributes:
        all_to_all, all_gather, reduce_scatter: bytes a second that a device sends to others in these collectives.
        memory: bytes a second that a device reads or writes when it moves rows in its own memory.
        latency: seconds that a collective takes however little it moves.

    Raises:
        TypeError: one of them is no number.
        ValueError: a speed is not above 0, or the latency is below it or not finite.

    Example:
        >>> from jax_router.expert_parallel import Links
        >>> Links(all_to_all=50e9).latency
        2.8e-05
    """

    all_to_all: float = 257e9
    all_gather: float = 255e9
    reduce_scatter: float = 250e9
    memory: float = 2.3e12
    latency: float = 28e-6

    def __post_init__(self) -> None:
        for name in ("all_to_all", "all_gather", "reduce_scatter", "memory"):
            speed = getattr(self, name)
            if speed != float("inf") and _check.not_negative(name, speed) == 0:
                raise ValueError(f"{name} must be above 0 bytes a second, got {speed}")
        _check.not_negative("latency", self.latency)

    def seconds(
        self, way: Way, *, devices: int, tokens: int, hidden: int, itemsize: int = 2, slots: int | None = None
    ) -> float:
        """How long moving the rows takes, there and back, without what the experts compute.

        Args:
            way: "gather" or "exchange".
            devices: n, along the axis.
            tokens: T, of a device.
            hidden: D.
            itemsize: bytes of an element.
            slots: of a pair of devices; None is T.

        Raises:
            TypeError: a size is no int.
            ValueError: there is no such way, or a size is too small.

        Example:
            >>> from jax_router.expert_parallel import Links
            >>> links = Links(all_to_all=100e9, memory=float("inf"), latency=0.0)
            >>> round(1e3 * links.seconds("exchange", devices=2, tokens=1000, hidden=50_000), 3)  # milliseconds
            2.0
        """
        _check.choice("way", way, get_args(Way))
        others = _check.static_int("devices", devices, 1, None) - 1
        row = _check.static_int("hidden", hidden, 0, None) * _check.static_int("itemsize", itemsize, 1, None)
        tokens = _check.static_int("tokens", tokens, 0, None)
        if way == "gather":
            sent = others * tokens * row
            return 2 * self.latency + sent / self.all_gather + sent / self.reduce_scatter
        slots = tokens if slots is None else _check.static_int("slots", slots, 0, None)
        # The rows are written to their slots before the first all-to-all, and read from them after the second.
        moved = 2 * (others + 1) * slots * row
        return 2 * self.latency + 2 * others * slots * row / self.all_to_all + moved / self.memory


def choose_way(
    links: Links, *, devices: int, tokens: int, hidden: int, itemsize: int = 2, slots: int | None = None
) -> Way:
    """The way that `compute` takes with `way="auto"`: that which `links.seconds` says is the faster.

    Raises:
        TypeError: links are no Links, or a size is no int.
        ValueError: a size is too small.

    Example:
        >>> from jax_router.expert_parallel import Links, choose_way, expected_slots
        >>> choose_way(Links(), devices=8, tokens=8192, hidden=4096, slots=expected_slots(8192, 6, 8, headroom=1.05))
        'exchange'
        >>> choose_way(Links(all_to_all=50e9), devices=8, tokens=8192, hidden=4096)
        'gather'
    """
    _check.instance("links", links, Links, "Links(all_to_all=257e9)")

    def seconds(way: Way) -> float:
        return links.seconds(way, devices=devices, tokens=tokens, hidden=hidden, itemsize=itemsize, slots=slots)

    return min(get_args(Way), key=seconds)


def expected_slots(tokens: int, top_k: int, devices: int, *, headroom: float = 1.0) -> int:
    """How many of its tokens a device sends to another on average, times `headroom`; at most all of them.

    `T (1 - (1 - 1 / n)^k)` for choices that are spread evenly and independently. What a real load needs beyond it is
    for `headroom`; `ExpertSum.dropped` says whether it was enough.

    Args:
        tokens: T, of a device.
        top_k: k.
        devices: n, along the axis.
        headroom: a factor of 0 or more.

    Raises:
        TypeError: a size is no int, or headroom no number.
        ValueError: a size is too small, or headroom below 0.

    Example:
        >>> from jax_router.expert_parallel import expected_slots
        >>> expected_slots(8192, top_k=6, devices=8)
        4516
    """
    tokens = _check.static_int("tokens", tokens, 0, None)
    top_k = _check.static_int("top_k", top_k, 0, None)
    devices = _check.static_int("devices", devices, 1, None)
    headroom = _check.not_negative("headroom", headroom)
    return min(tokens, math.ceil(headroom * tokens * (1 - (1 - 1 / devices) ** top_k)))


def compute(
    x: Array,
    routing: Routing,
    experts: Experts,
    *,
    num_experts: int,
    axis_name: str | Sequence[str],
    way: Way | Literal["auto"] = "auto",
    slots: int | None = None,
    rows: int | None = None,
    align: int = 1,
    weigh: Weigh = "output",
    links: Links | None = None,
    implementation: Implementation = "auto",
) -> ExpertSum:
    """`sum over j of weights[t, j] * expert(ids[t, j])(x[t])` with the experts spread over a mesh axis.

    Call it inside `jax.shard_map`, on each device with the tokens that are its own (a device may have any tokens, also
    none that has experts). With tokens that are split over further mesh axes (data parallel) nothing moves along these.

    Args:
        x: f32, bf16 or f16 `[..., D]`, T tokens in all.
        routing: of these tokens, `[..., k]`, with the ids of all E experts. Ids outside `[0, E)` (masked tokens,
            padding) are computed by nobody and add nothing.
        experts: computes this device's experts: from rows `[S, D]`, in which those of an expert lie together, and
            `group_sizes` int32 `[E / n]`, to rows `[S, D]` in the dtype of x. `grouped_matmul` takes both. Rows behind
            the last group are zeros, and what they become is not read.
        num_experts: E, which n divides.
        axis_name: of the mesh axis, or of several, over which the experts are spread.
        way: "gather", "exchange", or "auto" by `links`.
        slots: of "exchange", how many tokens a device sends to another one at most, first come, first served; the
            choices of further ones there are dropped. None is enough for all. Where "auto" is gather, none is dropped.
        rows: how many choices a device's experts compute at most; those of its last experts are dropped. It is S, by
            which the memory of the experts goes; a multiple of `align`. None is enough for all: `n T k` with gather,
            `n slots k` with exchange, and what `align` adds.
        align: what every expert's rows begin at a multiple of, as `expert_dispatch` has it.
        weigh: what the weights multiply, the `"output"` of the experts or their `"input"` (Llama 4).
        links: what the devices can do. None is `Links()`.
        implementation: of the ops, `"auto"`, `"native"` or `"reference"`.

    Returns:
        `ExpertSum(output, dropped)`.

    Differentiable in x, the weights, and what `experts` depends on. Where the devices' sums are added in bf16 or f16
    by "gather", they are rounded n - 1 times; those of "exchange" are added in f32 and rounded once.

    Raises:
        TypeError: a wrong dtype, or an option is no int.
        ValueError: a wrong shape or number; n does not divide `num_experts`; `slots` with `way="gather"`.
        NameError: there is no such mesh axis here.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jax.sharding import PartitionSpec as P
        >>> from jax_router import Routing, expert_parallel
        >>> mesh = jax.make_mesh((1,), ("expert",), (jax.sharding.AxisType.Auto,))
        >>> @jax.jit
        ... @jax.shard_map(mesh=mesh, in_specs=P("expert"), out_specs=P("expert"))
        ... def layer(x, routing):
        ...     def experts(rows, group_sizes):  # a device's own
        ...         return 2 * rows
        ...     return expert_parallel.compute(x, routing, experts, num_experts=4, axis_name="expert").output
        >>> layer(jnp.ones((1, 2)), Routing(jnp.array([[0.25, 0.5]]), jnp.array([[3, 0]])))
        Array([[1.5, 1.5]], dtype=float32)
    """
    x, weights, expert_ids = _checked(x, routing)
    num_experts = _check.static_int("num_experts", num_experts, 1, 2**24, " (ids are exact in f32)")
    axis = _check.axis_names("axis_name", axis_name)
    devices = lax.axis_size(axis)
    experts_of_device = _share(num_experts, devices, f"axis_name = {axis!r}")
    _check.function("experts", experts, "one by grouped_matmul")
    _check.choice("way", way, ("auto", *get_args(Way)))
    _check.choice("weigh", weigh, get_args(Weigh))
    links = Links() if links is None else links
    _check.instance("links", links, Links, "Links(all_to_all=257e9)")
    slots = None if slots is None else _check.concrete_int("slots", slots, 0)
    rows = None if rows is None else _check.concrete_int("rows", rows, 0)
    align = _check.concrete_int("align", align, 1)
    if rows is not None and rows % align:
        raise ValueError(f"rows must be a multiple of align = {align}, got {rows}")
    if way == "gather" and slots is not None:
        raise ValueError(f"slots must be None with way='gather', which has none, got {slots}")

    tokens, hidden, top_k = math.prod(x.shape[:-1]), x.shape[-1], expert_ids.shape[-1]
    if slots is not None:
        slots = min(slots, tokens)
    if way == "auto":
        sizes: dict[str, Any] = {"devices": devices, "tokens": tokens, "hidden": hidden, "itemsize": x.dtype.itemsize}
        way = choose_way(links, slots=slots, **sizes)

    ids = as_int32_ids(expert_ids, num_experts).reshape(tokens, top_k)
    valid = (ids >= 0) & (ids < num_experts)
    own = x.reshape(tokens, hidden), _packed(weights.reshape(tokens, top_k), jnp.where(valid, ids, -1))
    local = _Local(experts, experts_of_device, axis, rows, align, weigh, implementation)
    if tokens == 0 or slots == 0:  # XLA refuses collectives of nothing, or crashes
        output, computed = jnp.where(np.False_, own[0], 0), jnp.zeros((), jnp.int32)
    elif way == "gather":
        sums, computed = local(*(lax.all_gather(values, axis, tiled=True) for values in own))
        output = lax.psum_scatter(sums, axis, tiled=True)
    else:
        device = jnp.where(valid, ids // experts_of_device, -1)
        plan = _plan(device, devices, tokens if slots is None else slots, implementation)
        sent = (permute(values, plan, implementation=implementation) for values in own)
        sums, computed = local(*(_all_to_all(values, axis) for values in sent))
        output = combine(_all_to_all(sums, axis), plan, implementation=implementation)
    if slots is None and rows is None:
        dropped = jnp.zeros((), jnp.int32)
    else:
        dropped = lax.psum(valid.sum(dtype=jnp.int32) - computed, axis)
    return ExpertSum(output.reshape(x.shape), dropped)


def over_mesh(
    x: Array,
    routing: Routing,
    experts: Callable[[Any, Array, Array], Array],
    weights: Any,
    *,
    expert_axis: str,
    data_axes: str | Sequence[str] | None = None,
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh | None = None,
    **options: Any,
) -> ExpertSum:
    """`compute` for the tokens of a whole mesh: under `jit`, or eagerly, with Auto and with Explicit axes.

    The tokens are split over `data_axes` and `expert_axis`, those that are sharded otherwise are moved, and where the
    devices do not divide their number, tokens without experts make it up. Inside a `jax.shard_map` over `expert_axis`
    this is `compute` with the device's tokens and weights.

    Args:
        x: f32, bf16 or f16 `[..., D]`, of all tokens.
        routing: of all tokens.
        experts: as of `compute`, with the device's part of `weights` before its arguments.
        weights: arrays `[E, ...]`, sharded over `expert_axis` and the same along `data_axes`, in any pytree.
        expert_axis: the mesh axis over which the experts are spread.
        data_axes: a further mesh axis that splits the tokens, or several. None is all others of the mesh, without those
            of a `jax.shard_map` around this, along which the tokens are a device's own (with jax 0.10.2 or later).
        mesh: None is that of `jax.set_mesh`, which one with Explicit axes must be.
        options: of `compute`.

    Returns:
        `ExpertSum(output, dropped)`, `output` sharded as x in a mesh with Explicit axes; `dropped` of all devices.

    Raises:
        TypeError, ValueError: as of `compute`; there is no mesh, or it has no such axis or Explicit axes and is not
            entered; weights have different E.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jax_router import Routing, expert_parallel
        >>> def experts(scales, rows, group_sizes):
        ...     return rows * jnp.repeat(scales, group_sizes, total_repeat_length=len(rows))[:, None]
        >>> routing = Routing(jnp.array([[0.5], [2.0], [1.0]]), jnp.array([[1], [0], [-1]]))
        >>> scales = jnp.array([10.0, 100.0])
        >>> with jax.set_mesh(jax.make_mesh((1,), ("expert",))):
        ...     expert_parallel.over_mesh(jnp.ones((3, 1)), routing, experts, scales, expert_axis="expert").output
        Array([[50.],
               [20.],
               [ 0.]], dtype=float32)
    """
    x, *choices = _checked(x, routing)
    routing = Routing(*choices)
    _check.function("experts", experts, "one by grouped_matmul")
    if mesh is not None and not isinstance(mesh, jax.sharding.Mesh | jax.sharding.AbstractMesh):
        raise TypeError(f"mesh must be a jax.sharding.Mesh, jax.make_mesh((8,), ('expert',)) for example, got {mesh!r}")
    if not isinstance(expert_axis, str):
        raise TypeError(f"expert_axis must be a mesh axis, a string, got {expert_axis!r}")
    sizes = {jnp.shape(array)[:1] for array in jax.tree.leaves(weights)}
    if len(sizes) != 1 or not all(sizes):
        raise ValueError(f"weights must be arrays [E, ...] with one E, got leading axes {sorted(sizes)}")
    ((num_experts,),) = sizes
    context = jax.sharding.get_abstract_mesh()
    if expert_axis in context.manual_axes:
        local = partial(experts, weights)
        num_experts *= lax.axis_size(expert_axis)
        return compute(x, routing, local, num_experts=num_experts, axis_name=expert_axis, **options)
    mesh = context if mesh is None else mesh
    if expert_axis not in mesh.axis_names:
        raise ValueError(
            f"expert_axis must be an axis of the mesh, which has {mesh.axis_names or 'none'}, got {expert_axis!r}: "
            "enter a mesh with jax.set_mesh, or give one as mesh"
        )
    others = [name for name in mesh.axis_names if name != expert_axis and name not in context.manual_axes]
    data_axes = others if data_axes is None else _check.axis_names("data_axes", data_axes)
    data_axes = (data_axes,) if isinstance(data_axes, str) else tuple(data_axes)
    if len(data_axes) != len(set(data_axes) & set(others)):
        raise ValueError(f"data_axes must be some of the mesh's other axes, {others}, got {data_axes!r}")
    axes = *data_axes, expert_axis
    devices = math.prod(mesh.shape[name] for name in axes)
    _share(num_experts, mesh.shape[expert_axis], f"expert_axis = {expert_axis!r}")

    def on_device(x: Array, routing: Routing, weights: Any) -> tuple[Array, Array]:
        local = partial(experts, weights)
        output, dropped = compute(x, routing, local, num_experts=num_experts, axis_name=expert_axis, **options)
        return output, lax.psum(dropped, tuple(data_axes)) if data_axes else dropped

    def of_all(x: Array, routing: Routing, weights: Any) -> tuple[Array, Array]:
        tokens = math.prod(x.shape[:-1])
        if tokens == 0:  # XLA refuses to map nothing
            return x, jnp.zeros((), jnp.int32)
        missing = -tokens % devices

        def flat(values: Array, fill: int) -> Array:
            values = values.reshape(tokens, values.shape[-1])
            return jnp.pad(values, ((0, missing), (0, 0)), constant_values=fill)

        on_devices = jax.shard_map(
            on_device,
            mesh=jax.sharding.get_abstract_mesh() if explicit else mesh,  # whose axes are Auto here
            in_specs=(P(axes), P(axes), P(expert_axis)),
            out_specs=(P(axes), P()),
            axis_names=set(axes),
        )
        padded = Routing(flat(routing.weights, 0), flat(routing.expert_ids, -1))
        output, dropped = on_devices(flat(x, 0), padded, weights)
        return output[:tokens].reshape(x.shape), dropped

    explicit = explicit_axes(mesh)
    if not set(explicit) <= set(context.axis_names):
        raise ValueError(
            f"mesh must have Auto axes or be that of jax.set_mesh, got {mesh}, which has Explicit axes and is not "
            "entered: call this under jax.set_mesh(mesh)"
        )
    if explicit:
        of_all = jax.sharding.auto_axes(of_all, axes=explicit, out_sharding=(jax.typeof(x).sharding.spec, P()))
    return ExpertSum(*of_all(x, routing, weights))


def _share(num_experts: int, devices: int, axis: str) -> int:
    """How many experts a device has."""
    if num_experts % devices:
        raise ValueError(f"the {devices} devices of {axis} must divide num_experts, got {num_experts}")
    return num_experts // devices


def _checked(x: Array, routing: Routing) -> tuple[Array, Array, Array]:
    """x, weights and ids, of the same tokens."""
    weights, expert_ids = _check.routing_arrays("routing", routing)
    x = _check.float_array("x", x, min_rank=2)
    if x.shape[:-1] != expert_ids.shape[:-1]:
        raise ValueError(
            f"x must have shape {(*expert_ids.shape[:-1], 'D')}, with the tokens of routing; got {x.shape}"
        )
    return x, weights, expert_ids


def _packed(weights: Array, ids: Array) -> Array:
    """The weights of a token's choices and their ids in one row `[T, 2 k]` of f32, that one collective moves.

    Ids count from 1 in it, so that rows of zeros are those of no token. f32 has all integers up to 2^24.
    """
    return jnp.concatenate([weights, (ids + 1).astype(jnp.float32)], axis=-1)


def _unpacked(choices: Array) -> tuple[Array, Array]:
    weights, ids = jnp.split(choices, 2, axis=-1)
    return weights, ids.astype(jnp.int32) - 1


@dataclasses.dataclass(frozen=True)
class _Local:
    """What a device computes: its experts, of whichever tokens it is given."""

    experts: Experts
    num_experts: int
    axis: str | tuple[str, ...]
    rows: int | None
    align: int
    weigh: Weigh
    implementation: Implementation

    def __call__(self, x: Array, choices: Array) -> tuple[Array, Array]:
        """The weighted sums of this device's experts, a row for each of x, and how many choices they computed."""
        weights, ids = _unpacked(choices)
        first = lax.axis_index(self.axis).astype(jnp.int32) * self.num_experts
        dispatch = expert_dispatch(ids - first, self.num_experts, align=self.align, implementation=self.implementation)
        if self.rows is not None:
            dispatch = _cut(dispatch, self.rows)
        how: dict[str, Any] = {"weigh": self.weigh, "implementation": self.implementation}
        sums = through_experts(x, dispatch, weights, self.experts, **how)
        return sums, (dispatch.slot >= 0).sum(dtype=jnp.int32)


def _cut(dispatch: Dispatch, rows: int) -> Dispatch:
    """The first so many slots."""
    ends = jnp.minimum(jnp.cumsum(dispatch.group_sizes), rows)
    return Dispatch(
        dispatch.token_index[:rows],
        jnp.where(dispatch.slot < rows, dispatch.slot, -1),
        jnp.diff(ends, prepend=jnp.zeros(1, ends.dtype)),
    )


def _plan(device: Array, devices: int, slots: int, implementation: Implementation) -> Dispatch:
    """Which token is sent in which slot, of `slots` for each device, from the devices of its choices `[T, k]`.

    The first choice of a token on a device has the slot, and the others there have none.
    """
    earlier = np.tri(device.shape[-1], k=-1, dtype=bool)[None]
    is_first = ~((device[:, :, None] == device[:, None, :]) & earlier).any(axis=-1)
    by_device = expert_dispatch(jnp.where(is_first, device, -1), devices, implementation=implementation)

    # From slots that lie together to slots of one number a device.
    first = jnp.cumsum(by_device.group_sizes) - by_device.group_sizes
    number = by_device.slot - first.at[device].get(mode="clip")
    slot = jnp.where((by_device.slot >= 0) & (number < slots), device * slots + number, -1)
    place = jnp.arange(slots, dtype=jnp.int32)[None]
    token = by_device.token_index.at[first[:, None] + place].get(mode="clip")
    token_index = jnp.where(place < by_device.group_sizes[:, None], token, -1)
    return Dispatch(token_index.reshape(-1), slot, jnp.full(devices, slots, jnp.int32))


def _all_to_all(rows: Array, axis: str | tuple[str, ...]) -> Array:
    """Rows by the device that they go to, to rows by the device that they come from."""
    return lax.all_to_all(rows, axis, 0, 0, tiled=True)
