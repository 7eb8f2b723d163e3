"""One helper that makes a JAX primitive of an op: evaluation, lowering, batching and sharding, once for all ops."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain, count
from math import prod
from typing import Any, Literal, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.core import InconclusiveDimensionOperation, Primitive
from jax.extend.mlir.dialects import stablehlo
from jax.interpreters import ad, batching, mlir, xla
from jax.sharding import PartitionSpec

from . import _native
from ._check import as_array
from ._sharding import align, inside_shard_map, is_split, merge_specs, shape_of_part, with_results_as


class Operand(NamedTuple):
    """An operand of an op.

    Attributes:
        core_rank: the number of trailing axes that belong to one problem; the axes before them are batch axes.
        batched: whether it has the batch axes: "always", "never" (all rows share it) or "either".
        optional: whether it may be None. An attribute `has_<name>` tells the kernels.
    """

    core_rank: int
    batched: Literal["always", "never", "either"] = "always"
    optional: bool = False

    def has_batch_axes(self, ndim: int, batch_ndim: int) -> bool:
        """Whether an operand of `ndim` axes has the batch axes, of which there are `batch_ndim`."""
        return self.batched != "never" and ndim == self.core_rank + batch_ndim


class Result(NamedTuple):
    """A result of an op: the axes behind the batch axes, and the dtype."""

    core_shape: tuple[int, ...]
    dtype: Any


def _supports_everything(platform: str, avals: Mapping[str, Any], **params: Any) -> str | None:
    return None


def _always_pays(platform: str, avals: Mapping[str, Any], **params: Any) -> bool:
    return True


def _no_workspace(platform: str, avals: Mapping[str, Any], *, exported: bool, **params: Any) -> int | None:
    return None


OPS: list[Op] = []


@dataclasses.dataclass(frozen=True)
class Op:
    """An op and its primitive.

    Attributes:
        name: of the primitive and of the custom-call targets.
        operands: by name, in order; the first always has the batch axes.
        results: the names, in order; one that only some calls ask for has a "?" behind it.
        result_types: from the operands' avals (a dict by name) and the parameters to the results, in order.
        reference: the mathematics, on operands by keyword and parameters, for any number of batch axes.
        attributes: the parameters that the kernels read, by name, and their types: bool, int, float, str, or a
            dataclass of such, whose fields are attributes by their own names. What other parameters say concerns Python
            alone, or shows in the results, as a dtype does.
        platforms: those that have kernels of the op.
        unsupported: from a platform, the operands' avals and the parameters to the reason why the kernels cannot
            compute a case, or None.
        pays: from the same to whether the kernels, where they can compute a case, are worth it.
        composed: whether `reference` is made of other ops; it then takes `implementation` for them. XLA sees these
            instead of a kernel where axes are split over devices or XLA may split them, because it can split further
            than over batch axes, and in exported programs, which may run anywhere.
        workspace: from a platform, the operands' avals, the parameters and whether the program is `exported` to the
            bytes of memory that the kernels need for each problem besides operands and results, or None if those of
            that platform take none. It is one more result of the custom call, named "workspace" in `results`, so that
            XLA plans it.
        gathers: whether it reads but a few entries of a row of the first operand. Where vmap maps other operands and
            not that one, "auto" takes the reference, which reads them where they are: the kernels would need a copy of
            it for every problem. (A composed op computes what does not depend on the mapped operands once.)
        derives_itself: whether the derivative rules are those of the reference too, because JAX would find a worse
            derivative of it. "reference" is then the same primitive, which is lowered to the reference alone.
        share_again: what the kernels take where vmap maps an operand that all rows of a problem share. From operands by
            name, of which that one, and those with batch axes, have a leading axis for the problems, to operands of
            which all rows of all problems share it again; raises NotImplementedError where there are none. "auto" takes
            the reference there, which leaves the mapped axis sharded as it is.
    """

    name: str
    operands: Mapping[str, Operand]
    results: tuple[str, ...]
    result_types: Callable[..., Sequence[Result]]
    reference: Callable[..., Sequence[Array]]
    attributes: Mapping[str, type] = dataclasses.field(default_factory=dict)
    platforms: Sequence[str] = _native.PLATFORMS
    unsupported: Callable[..., str | None] = _supports_everything
    pays: Callable[..., bool] = _always_pays
    composed: bool = False
    gathers: bool = False
    derives_itself: bool = False
    workspace: Callable[..., int | None] = _no_workspace
    share_again: Callable[[dict[str, Array]], dict[str, Array]] | None = None
    primitive: Primitive = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        primitive = Primitive(f"jax_router.{self.name}")
        primitive.multiple_results = True
        primitive.def_impl(partial(xla.apply_primitive, primitive))
        primitive.def_abstract_eval(self._abstract_eval)
        batching.primitive_batchers[primitive] = self._batch
        mlir.register_lowering(primitive, self._lower_without_module)
        object.__setattr__(self, "primitive", primitive)
        OPS.append(self)

    def __call__(self, operands: Mapping[str, Any], *, implementation: str, **params: Any) -> list[Array]:
        """The results for operands by name, of which optional ones may be None or left out.

        `implementation` is what the caller of a public function asked for:
            "reference": the reference, which JAX maps and differentiates as it does any other function, unless the op
                derives itself.
            "auto": a kernel where there is one and it pays, and else the reference.
            "native": a kernel, or an error. Of a composed op: kernels throughout, its own or those of the ops that it
                is made of. (An op that has kernels on no platform has nothing but its reference to offer.)
        """
        given = {name: as_array(operands[name]) for name in self.operands if operands.get(name) is not None}
        split = any(is_split(value, self.operands[name].core_rank) for name, value in given.items())
        plainly = implementation == "reference" and not self.derives_itself
        if plainly or (self.composed and split):
            return self._run_reference(given, implementation, **params)
        values = vary_over_the_same_axes(list(self._aligned(given).values()))
        return self.primitive.bind(*values, names=tuple(given), implementation=implementation, **params)

    def declaration(self) -> _native.Declaration:
        """How the kernels are called."""
        return {
            "operands": tuple(name + "?" * operand.optional for name, operand in self.operands.items()),
            "results": self.results,
            "attributes": _native.attribute_types(self._sent),
        }

    @property
    def _sent(self) -> dict[str, type]:
        """What is sent with a call: the attributes, and which of the optional operands it has."""
        return {
            **self.attributes,
            **{f"has_{name}": bool for name, operand in self.operands.items() if operand.optional},
        }

    def def_jvp(self, rule: Callable[..., Any]) -> None:
        """`rule(primals, tangents, **params)`, both by operand name, returns the results and their tangents."""

        def jvp(primals, tangents, *, names, **params):
            return rule(dict(zip(names, primals)), dict(zip(names, tangents)), **params)

        ad.primitive_jvps[self.primitive] = jvp

    def def_transpose(self, rule: Callable[..., dict[str, Array]]) -> None:
        """`rule(cotangents, operands, **params)` returns the cotangents of the operands in which the op is linear.

        Cotangents are one a result, of which some may be `ad.Zero`; operands and what is returned are by name. An
        operand whose cotangent is asked for is an `ad.UndefinedPrimal` there.
        """

        def transpose(cotangents, *values, names, **params):
            if all(isinstance(cotangent, ad.Zero) for cotangent in cotangents):
                return [None] * len(values)
            found = rule(cotangents, dict(zip(names, values)), **params)
            return [found[name] if ad.is_undefined_primal(value) else None for name, value in zip(names, values)]

        ad.primitive_transposes[self.primitive] = transpose

    def batch_ndim(self, names: Sequence[str], operands: Sequence[Any]) -> int:
        return operands[0].ndim - self.operands[names[0]].core_rank

    def _abstract_eval(self, *avals, names, implementation, **params):
        batch_ndim = self.batch_ndim(names, avals)
        first = avals[0]
        results = self.result_types(dict(zip(names, avals)), **params)
        # Updates of an operand's aval, not new ones: it carries the mesh and the manual axes that it varies over.
        return [
            first.update(
                shape=(*first.shape[:batch_ndim], *result.core_shape),
                dtype=np.dtype(result.dtype),
                weak_type=False,
                sharding=first.sharding.update(spec=spec),
            )
            for result, spec in zip(results, self._result_specs(names, avals, results))
        ]

    def _result_specs(self, names, avals, results) -> list[PartitionSpec]:
        """How the results are sharded: as the operands' batch axes are, and whole along the others."""
        batch_ndim = self.batch_ndim(names, avals)
        spec = merge_specs(
            aval.sharding.spec[:batch_ndim]
            for name, aval in zip(names, avals)
            if self.operands[name].has_batch_axes(aval.ndim, batch_ndim)
        )
        return [PartitionSpec(*spec, *[None] * len(result.core_shape)) for result in results]

    def _aligned(self, operands: Mapping[str, Array]) -> dict[str, Array]:
        values = align(list(operands.values()), [self.operands[name].core_rank for name in operands])
        return dict(zip(operands, values))

    def _run_reference(self, operands: Mapping[str, Array], implementation: str, **params: Any) -> list[Array]:
        if self.composed:
            return list(self.reference(**operands, implementation=implementation, **params))
        operands = self._aligned(operands)

        def compute(operands: Mapping[str, Array]) -> list[Array]:
            return list(self.reference(**operands, **params))

        # JAX has no rule for all that is in a reference: not for a gather by indices over whose sharded axis vmap maps.
        # It finds no gradient of `auto_axes` inside of a shard_map over other axes.
        has_gradient = any(jnp.issubdtype(value.dtype, jnp.floating) for value in operands.values())
        if has_gradient and inside_shard_map():
            return compute(operands)
        avals = [jax.typeof(value) for value in operands.values()]
        specs = self._result_specs(tuple(operands), avals, self.result_types(dict(zip(operands, avals)), **params))
        return with_results_as(specs, *operands.values())(compute)(operands)

    def _run_without_kernel(self, why: str, *values, names, implementation, **params):
        """The reference, unless the caller insists on a kernel."""
        if implementation == "native" and self.platforms and not self.composed:
            raise NotImplementedError(f"{self.name}(implementation='native'){why}")
        return self._run_reference(dict(zip(names, values)), implementation, **params)

    def _lower_without_kernel(self, why, ctx, *values, **params):
        run = partial(self._run_without_kernel, why, **params)
        return mlir.lower_fun(run, multiple_results=True)(ctx, *values)

    def _lower_without_module(self, ctx, *values, **params):
        platforms = " and ".join(ctx.platforms or ctx.module_context.platforms)
        why = f": no native kernel for {platforms}. {_native.how_to_get_kernels()}"
        return self._lower_without_kernel(why, ctx, *values, **params)

    def lower(self, platform, ctx, *values, **params):
        """The lowering rule for a platform whose native module is registered."""
        avals = _of_a_device(dict(zip(params["names"], ctx.avals_in)))
        options = {name: value for name, value in params.items() if name != "names"}
        partitioned = self.composed and may_be_partitioned(ctx)
        reason = self.reason_against_kernels(platform, avals, partitioned=partitioned, **options)
        if reason is not None:
            return self._lower_without_kernel(f" on {platform}: {reason}", ctx, *values, **params)
        return self._lower_to_kernels(platform, ctx, *values, **params)

    def reason_against_kernels(
        self, platform: str, avals: Mapping[str, Any], *, partitioned: bool, implementation: str, **params: Any
    ) -> str | None:
        """Why a platform's kernels do not compute a case. All that decides between them and the reference is here.

        Args:
            platform: one that the op has kernels for, and whose module is loaded.
            avals: of the operands of one device, by name.
            partitioned: whether XLA may partition the program.
            implementation: what the caller asked for.
            params: the parameters.
        """
        if implementation == "reference":
            return "the reference is asked for"
        if self.composed and partitioned:
            return "XLA may partition the program"
        if symbolic := [name for name in self.attributes if jax.export.is_symbolic_dim(params[name])]:
            return f"the kernels take no symbolic {' and '.join(symbolic)}"
        try:
            if reason := self.unsupported(platform, avals, **params):
                return reason
            insists = implementation == "native" and not self.composed
            return None if insists or self.pays(platform, avals, **params) else "the kernels do not pay"
        except InconclusiveDimensionOperation as error:
            return f"whether the kernels take symbolic sizes is not known: {str(error).splitlines()[0]}"

    def _lower_to_kernels(self, platform, ctx, *values, names, implementation, **params):
        avals_out = list(ctx.avals_out)
        avals = _of_a_device(dict(zip(names, ctx.avals_in)))
        nbytes = self.workspace(platform, avals, exported=_is_exported(ctx), **params)
        if nbytes is not None:
            place = [name.rstrip("?") for name in self.results].index("workspace")
            batch_shape = ctx.avals_in[0].shape[: self.batch_ndim(names, ctx.avals_in)]
            avals_out.insert(place, jax.core.ShapedArray((*batch_shape, nbytes), jnp.uint8))
        call = _Call(self, names, ctx.avals_in, avals_out)
        has = {f"has_{name}": name in names for name in self.operands}
        lower = jax.ffi.ffi_lowering(_native.target_name(self.name), extra_attributes=call.sharding_attributes())
        results = lower(
            ctx.replace(avals_in=call.avals_in, avals_out=call.avals_out),
            *map(_reshape, values, ctx.avals_in, call.avals_in),
            **_native.attribute_values(self._sent, {**params, **has}),
        )
        results = list(map(_reshape, results, call.avals_out, avals_out))
        return results if nbytes is None else results[:place] + results[place + 1 :]

    def _batch(self, values, dims, *, names, implementation, **params):
        mapped = [name for name, dim in zip(names, dims) if dim is not None]
        no_longer_shared = [name for name in mapped if self.operands[name].batched == "never"]
        params.update(names=names, implementation=implementation)
        insists = implementation == "native" and bool(self.platforms) and not self.composed
        shares_first = dims[0] is None and (self.composed or self.gathers)
        if no_longer_shared and self.share_again and implementation == "native":
            operands = self.share_again(self._add_batch_axes(values, dims, names))
            results = self.primitive.bind(*operands.values(), **params)
        elif no_longer_shared or (shares_first and not insists):
            why = f": no kernel takes a mapped {' and '.join(no_longer_shared)}"
            run = partial(self._run_without_kernel, why, **params)
            results = jax.vmap(run, in_axes=tuple(dims))(*values)
        else:
            results = self.primitive.bind(*self._add_batch_axes(values, dims, names).values(), **params)
        return results, [0] * len(results)

    def _add_batch_axes(self, values, dims, names) -> dict[str, Array]:
        size = next(value.shape[dim] for value, dim in zip(values, dims) if dim is not None)
        first_shape = _without_axis(values[0].shape, dims[0])
        batch_shape = first_shape[: len(first_shape) - self.operands[names[0]].core_rank]
        return {
            name: _add_batch_axis(self.operands[name], value, dim, size, batch_shape)
            for name, value, dim in zip(names, values, dims)
        }


def zero_tangent(primal: Array) -> ad.Zero:
    """The tangent of a result that does not move."""
    return ad.Zero(jax.typeof(primal).to_tangent_aval())


def those_that_move(tangents: Mapping[str, Any]) -> dict[str, Array]:
    """The tangents by operand name, without those of operands that do not move."""
    return {name: tangent for name, tangent in tangents.items() if not isinstance(tangent, ad.Zero)}


def multilinear_jvp(
    op: Op, primals: Mapping[str, Any], tangents: Mapping[str, Any], **params: Any
) -> tuple[list[Array], list[Any]]:
    """The derivative rule of an op of one result that is linear in each float operand: a term for each that moves."""
    (result,) = op(primals, **params)
    terms = [op({**primals, name: tangent}, **params)[0] for name, tangent in those_that_move(tangents).items()]
    return [result], [sum(terms[1:], terms[0]) if terms else zero_tangent(result)]


def jvp_in_parts(
    op: Op, parts: Callable[..., list[Array]], primals: Mapping[str, Any], tangents: Mapping[str, Any], **params: Any
) -> tuple[list[Array], list[Any]]:
    """The derivative rule of an op by that of `parts`, the ops that it is made of."""
    results = op(primals, **params)
    moving = those_that_move(tangents)
    if not moving:
        return results, [zero_tangent(result) for result in results]
    at = {name: primals[name] for name in moving}
    return results, jax.jvp(lambda moved: parts(**{**primals, **moved}, **params), (at,), (moving,))[1]


def use_kernels() -> None:
    """Once all ops exist: lowers them to the kernels of the native modules that are there.

    Raises:
        ImportError: a module does not have the ops that Python takes it to have.
    """
    for platform in _native.PLATFORMS:
        if isinstance(_native.load(platform), ImportError):
            continue
        ops = [op for op in OPS if platform in op.platforms]
        _native.register(platform, {op.name: op.declaration() for op in ops})
        for op in ops:
            mlir.register_lowering(op.primitive, partial(op.lower, platform), platform=platform)


class _Call:
    """An op as a custom call whose batch axes XLA can shard without gathering them.

    XLA's partitioner takes the first `num_batch_dims` axes of every operand for batch axes, except that an operand of
    a lower rank is whole on every device; and it takes the sharding from operands that have further axes. So shared
    operands are passed flat, rows get a leading axis of size 1 where they have but one batch axis, and an operand
    without core axes gets one of size 1. None of this moves data: the buffers are the same.
    """

    def __init__(self, op: Op, names: Sequence[str], avals_in: Sequence[Any], avals_out: Sequence[Any]):
        self.batch_ndim = op.batch_ndim(names, avals_in)
        self.shared = [
            not op.operands[name].has_batch_axes(aval.ndim, self.batch_ndim) for name, aval in zip(names, avals_in)
        ]
        padding = (1,) if self.batch_ndim == 1 and any(self.shared) else ()
        self.is_static = all(isinstance(size, int) for aval in (*avals_in, *avals_out) for size in aval.shape)
        # Programs with symbolic shapes, as jax.export makes them, are partitioned when they are compiled, if at all.
        self.is_sharded = self.is_static and self.batch_ndim > 0
        self.avals_in, self.avals_out = list(avals_in), list(avals_out)
        if self.is_sharded:
            self.batch_ndim += len(padding)
            for index, (name, aval, shared) in enumerate(zip(names, avals_in, self.shared)):
                core = () if op.operands[name].core_rank else (1,)
                shape = (prod(aval.shape),) if shared else (*padding, *aval.shape, *core)
                self.avals_in[index] = jax.core.ShapedArray(shape, aval.dtype)
            self.avals_out = [jax.core.ShapedArray((*padding, *aval.shape), aval.dtype) for aval in avals_out]

    def sharding_attributes(self) -> dict[str, Any] | None:
        """Every batch axis is a factor of its own that passes through; every other axis is whole on each device."""
        if not self.is_sharded:
            return None
        letters = chain("ijklmnopqrstuvwxyz", (f"z_{number}" for number in count(1)))  # as Shardy names its factors
        batch = [next(letters) for _ in range(self.batch_ndim)]
        sizes: dict[str, int] = {}

        def factors(aval, shared: bool) -> str:
            axes = [] if shared else list(batch)
            axes += [next(letters) for _ in range(aval.ndim - len(axes))]
            sizes.update(zip(axes, aval.shape))
            return f"[{', '.join(axes)}]"

        operands = ", ".join(map(factors, self.avals_in, self.shared))
        results = ", ".join(factors(aval, False) for aval in self.avals_out)
        table = ", ".join(f"{letter}={size}" for letter, size in sizes.items())
        whole = ", ".join(letter for letter in sizes if letter not in batch)
        rule = f"<({operands})->({results}) {{{table}}} need_replication={{{whole}}}, custom>"
        return {
            "mhlo.frontend_attributes": mlir.ir_attribute({"num_batch_dims": str(self.batch_ndim)}),
            "sdy.sharding_rule": mlir.ir.Attribute.parse(f"#sdy.op_sharding_rule{rule}"),
        }


def _of_a_device(avals: Mapping[str, Any]) -> dict[str, Any]:
    """What one device has of each operand, where types say how they are split: in meshes with Explicit axes."""
    return {name: jax.core.ShapedArray(shape_of_part(aval), aval.dtype) for name, aval in avals.items()}


def _is_exported(ctx: Any) -> bool:
    return bool(ctx.module_context.lowering_parameters.for_export)


def may_be_partitioned(ctx: Any) -> bool:
    """Whether XLA may split what is lowered here over devices as it sees fit, or the program is exported."""
    module = ctx.module_context
    if _is_exported(ctx):
        return True
    mesh = ctx.avals_in[0].sharding.mesh
    if mesh.axis_types and all(axis_type == jax.sharding.AxisType.Explicit for axis_type in mesh.axis_types):
        return False  # how the operands are split is part of their types
    axes = module.axis_context
    if hasattr(axes, "manual_axes"):
        return frozenset(axes.mesh.axis_names) != axes.manual_axes
    return axes.num_devices != 1


def _reshape(value: Any, before: Any, after: Any) -> Any:
    if before.shape == after.shape:
        return value
    return stablehlo.reshape(mlir.ir.RankedTensorType.get(after.shape, value.type.element_type), value)


def _without_axis(shape: tuple[int, ...], axis: int | None) -> tuple[int, ...]:
    return shape if axis is None else shape[:axis] + shape[axis + 1 :]


def _add_batch_axis(operand: Operand, value: Array, dim: int | None, size: int, batch_shape: tuple[int, ...]) -> Array:
    """The operand with a new leading batch axis, unless all rows, old and new, share it."""
    shape = _without_axis(value.shape, dim)
    if dim is None and operand.batched != "always" and len(shape) == operand.core_rank:
        return value
    if dim is not None:
        value = jnp.moveaxis(value, dim, 0)
        if operand.batched == "never":
            return value
        if not operand.has_batch_axes(len(shape), len(batch_shape)):
            value = value.reshape(size, *[1] * len(batch_shape), *shape)
    return jnp.broadcast_to(value, (size, *batch_shape, *shape[len(shape) - operand.core_rank :]))


def vary_over_the_same_axes(values: list[Array]) -> list[Array]:
    """Under shard_map every operand must vary over the manual axes that any of them varies over."""
    varying = [_varying_axes(value) for value in values]
    everywhere = frozenset().union(*varying)
    return [
        jax.lax.pcast(value, tuple(everywhere - axes), to="varying") if everywhere - axes else value
        for value, axes in zip(values, varying)
    ]


def _varying_axes(value: Array) -> frozenset[str]:
    aval = jax.typeof(value)
    manual_axes = getattr(aval, "manual_axis_type", None)  # jax >= 0.11; before, aval.vma
    return frozenset(aval.vma if manual_axes is None else manual_axes.varying)
