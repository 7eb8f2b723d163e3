"""Sharding that is part of an array's type, in meshes with Explicit axes. Elsewhere nothing here does anything."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from math import prod
from typing import Any

import jax
from jax import Array
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def align(values: Sequence[Array], core_ranks: Sequence[int]) -> list[Array]:
    """The operands of an op, with their core axes whole on every device, and with their batch axes sharded alike.

    Arguments:
        values: the first one has the batch axes, and so have those with as many axes before their core.
        core_ranks: the number of core axes of each, which are the last ones.
    """
    shardings = [jax.typeof(value).sharding for value in values]
    sharded = [sharding for sharding in shardings if any(sharding.spec)]
    if not sharded:
        return list(values)
    batch_specs = [tuple(sharding.spec)[: len(sharding.spec) - core] for sharding, core in zip(shardings, core_ranks)]
    merged = merge_specs(spec for spec in batch_specs if len(spec) == len(batch_specs[0]))

    def aligned(value: Array, batch_spec: tuple[Any, ...]) -> Array:
        batch = merged if len(batch_spec) == len(merged) else (None,) * len(batch_spec)
        return _reshard(value, sharded[0].update(spec=(*batch, *[None] * (value.ndim - len(batch)))))

    return [aligned(value, spec) for value, spec in zip(values, batch_specs)]


def is_split(value: Array, core_rank: int) -> bool:
    """Whether one of the last axes is split over devices."""
    return any(axis is not None for axis in jax.typeof(value).sharding.spec[value.ndim - core_rank :])


def shape_of_part(aval: Any) -> tuple[Any, ...]:
    """The shape of what one device has of an array, as its type says; a symbolic size is that of all devices."""
    devices = (prod(aval.sharding.mesh.shape[name] for name in mesh_axes(entry)) for entry in aval.sharding.spec)
    return tuple(size // parts if isinstance(size, int) else size for size, parts in zip(aval.shape, devices))


def may_split(value: Array) -> bool:
    """Whether XLA may have the array split over devices: not on one device, and not inside of a `shard_map`."""
    if jax.device_count() == 1:
        return False
    return not jax.sharding.get_abstract_mesh().are_all_axes_manual or any(jax.typeof(value).sharding.spec)


def inside_shard_map() -> bool:
    """Whether some axes of the mesh are those of a surrounding `shard_map`."""
    return AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types


def split_axis(value: Array, axis: int, parts: int) -> Array:
    """The array with an axis in so many parts, which are an axis of their own before it, sharded as it was."""
    shape = (*value.shape[:axis], parts, value.shape[axis] // parts, *value.shape[axis + 1 :])
    sharding = jax.typeof(value).sharding
    if not any(sharding.spec):
        return value.reshape(shape)
    spec = (*sharding.spec[: axis + 1], None, *sharding.spec[axis + 1 :])
    return jax.lax.reshape(value, shape, out_sharding=sharding.update(spec=spec))


def shard_last_axis_as(model: Array, value: Array) -> Array:
    """An array `[E]` to be added to one of `[..., E]`: if it is sharded, then as that is."""
    sharding = jax.typeof(value).sharding
    last = jax.typeof(model).sharding.spec[-1:]
    return _reshard(value, sharding.update(spec=last)) if any(sharding.spec) else value


def shard_as(model: Array, value: Array) -> Array:
    """An array with the first axes of `model`: if that is sharded, then as it is."""
    sharding = jax.typeof(model).sharding
    return _reshard(value, sharding.update(spec=sharding.spec[: value.ndim])) if any(sharding.spec) else value


def whole(value: Array) -> Array:
    """An array that is not split over devices."""
    sharding = jax.typeof(value).sharding
    return _reshard(value, sharding.update(spec=(None,) * value.ndim)) if any(sharding.spec) else value


def explicit_axes(mesh: Any) -> tuple[str, ...]:
    return tuple(name for name, kind in zip(mesh.axis_names, mesh.axis_types) if kind is AxisType.Explicit)


def explicit_mesh(*values: Array) -> Any:
    """The mesh with Explicit axes on which values lie or which is entered, or None."""
    meshes = [*(jax.typeof(value).sharding.mesh for value in values), jax.sharding.get_abstract_mesh()]
    return next((mesh for mesh in meshes if explicit_axes(mesh)), None)


def with_results_as(specs: Any, *values: Array) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A function of the values in which XLA decides what lies where, and whose results are sharded by `specs`.

    For what JAX has no rule for in a mesh with Explicit axes. vmap over a sharded axis adds that to the results.
    """
    mesh = explicit_mesh(*values)
    if mesh is None:
        return lambda function: function
    shardings = jax.tree.map(partial(NamedSharding, mesh), specs, is_leaf=lambda spec: isinstance(spec, PartitionSpec))
    return jax.sharding.auto_axes(axes=explicit_axes(mesh), out_sharding=shardings)


def with_rows_as(model: Array, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of `model` and more whose results are rows, one for each element of `model`: sharded as that is."""
    return with_results_as(PartitionSpec(*jax.typeof(model).sharding.spec, None), model)(function)


def merge_specs(specs: Iterable[Sequence[Any]]) -> tuple[Any, ...]:
    """How the axes that several operands share are sharded: as in the first operand that shards them.

    A mesh axis shards one of the axes at most. XLA moves operands that are sharded otherwise.
    """
    first, *others = specs
    merged = list(first)
    for spec in others:
        for index, entry in enumerate(spec):
            if merged[index] is None and mesh_axes(*merged).isdisjoint(mesh_axes(entry)):
                merged[index] = entry
    return tuple(merged)


def product_sharding(x: Array, weight: Array) -> Any:
    """The sharding of `x @ weight.T`, or None where `jax.lax.dot_general` finds it.

    It refuses where both are sharded over D, since the sums may end up anywhere: here they end up on every device, with
    the tokens sharded as in x. And it refuses where one mesh axis shards both the tokens and the experts (FSDP): the
    tokens stay sharded, so that the weight is gathered.
    """
    x_sharding, weight_sharding = jax.typeof(x).sharding, jax.typeof(weight).sharding
    *tokens, x_hidden = x_sharding.spec
    *experts, weight_hidden = weight_sharding.spec
    conflict = not mesh_axes(*tokens).isdisjoint(mesh_axes(*experts))
    if not conflict and (x_hidden is None or weight_hidden is None):
        return None
    return x_sharding.update(spec=(*tokens, *([None] * len(experts) if conflict else experts)))


def _reshard(value: Array, sharding: Any) -> Array:
    return value if jax.typeof(value).sharding.spec == sharding.spec else jax.sharding.reshard(value, sharding)


def mesh_axes(*axes: Any) -> set[str]:
    """The mesh axes in entries of a PartitionSpec."""
    names: set[str] = set()
    for axis in axes:
        names.update(axis if isinstance(axis, tuple) else () if axis is None else (axis,))
    return names
