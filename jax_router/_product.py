"""A product of half-precision matrices whose gradients are products for tensor cores too, accurate as in f32."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.export import is_symbolic_dim
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, xla

from ._primitive import vary_over_the_same_axes


class Axes(NamedTuple):
    """Which axes of two operands are summed over, and which are a batch: as `jax.lax.dot_general` has them."""

    contracted: tuple[tuple[int, ...], tuple[int, ...]]
    batch: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())

    def kept(self, side: int, ndim: int) -> tuple[int, ...]:
        return tuple(axis for axis in range(ndim) if axis not in (*self.contracted[side], *self.batch[side]))

    def swapped(self) -> Axes:
        return Axes(self.contracted[::-1], self.batch[::-1])


def product(lhs: Array, rhs: Array, axes: Axes, *, dtype: Any, out_sharding: Any = None) -> Array:
    """`jax.lax.dot_general` in bf16, summed in f32 and rounded to `dtype`.

    The cotangent of an f32 result is f32, and XLA multiplies it with a bf16 operand in f32, at a fraction of the speed.
    Here gradients multiply two bf16 parts of it, side by side in one product. They add up to it but for 2^-16 of it at
    most. (XLA's product, at JAX's default precision, rounds it to 11 bits on a GPU.) So do the parts of any operand in
    f32.

    Args:
        lhs: bf16 or f32.
        rhs: bf16 or f32.
        axes: of the operands.
        dtype: of the result, f32 or bf16.
        out_sharding: as `jax.lax.dot_general` has it.
    """
    lhs, rhs = vary_over_the_same_axes([lhs, rhs])
    return _PRODUCT.bind(lhs, rhs, axes=axes, dtype=jnp.dtype(dtype), out_sharding=out_sharding)


def bf16_parts(values: Array, count: int, axis: int = 0) -> Array:
    """Parts that add up to the values, the largest first, on a new axis. f32 has three, f16 two; fewer are rounded."""
    rest, parts = values.astype(jnp.float32), []
    for _ in range(count - 1):
        bits, rest = _part_and_rest(rest)
        parts.append(lax.bitcast_convert_type(bits, jnp.float32).astype(jnp.bfloat16))
    return jnp.stack([*parts, rest.astype(jnp.bfloat16)], axis)


def _part_and_rest(values: Array) -> tuple[Array, Array]:
    """The first part of f32 values, as the bits of an f32, and what it leaves.

    Bits, since XLA may take a conversion to bf16 and back for nothing.
    """
    bits = lax.bitcast_convert_type(values, jnp.uint32) & jnp.uint32(0xFFFF0000)
    return bits, jnp.where(jnp.isinf(values), 0.0, values - lax.bitcast_convert_type(bits, jnp.float32))


def _dot(lhs: Array, rhs: Array, *, axes: Axes, dtype: Any, out_sharding: Any) -> Array:
    return lax.dot_general(lhs, rhs, axes, preferred_element_type=dtype, out_sharding=out_sharding)


def _dot_in_f32(lhs: Array, rhs: Array, *, axes: Axes, dtype: Any, out_sharding: Any) -> Array:
    lhs, rhs = lhs.astype(jnp.float32), rhs.astype(jnp.float32)
    return _dot(lhs, rhs, axes=axes, dtype=jnp.float32, out_sharding=out_sharding).astype(dtype)


def _dot_in_parts(lhs: Array, rhs: Array, *, axes: Axes, dtype: Any, out_sharding: Any) -> Array:
    """The product of an f32 lhs and a bf16 rhs. The parts go behind the last axis of lhs, that of the experts.

    Where that stays, so do they, and are added in the end. Else they are summed over, with rhs once for each. So the
    parts multiply the few numbers, those of the weight or of its gradient, and both gradients take the same ones.
    """
    # XLA takes no conversion into halves where sizes are symbolic.
    by_platform = {} if any(map(is_symbolic_dim, lhs.shape)) else {"cuda": bf16_halves}
    in_general = partial(bf16_parts, count=_PARTS, axis=lhs.ndim)
    parts = lax.platform_dependent(lhs, **by_platform, default=in_general)
    return product_of_parts(parts, rhs, axes, dtype=dtype, out_sharding=out_sharding)


def product_of_parts(parts: Array, rhs: Array, axes: Axes, *, dtype: Any, out_sharding: Any = None) -> Array:
    """`product` of an f32 lhs in its two `bf16_halves` and a bf16 rhs; the axes are those of the lhs as a whole."""
    last = parts.ndim - 2
    (lhs_contracted, rhs_contracted), (lhs_batch, rhs_batch) = axes
    if last in axes.kept(0, last + 1):
        at = len(lhs_batch) + axes.kept(0, last + 1).index(last) + 1
        by_part = _with_axis(out_sharding, at, None)
        return _dot(parts, rhs, axes=axes, dtype=jnp.float32, out_sharding=by_part).sum(at).astype(dtype)
    copied = dict(zip((*lhs_contracted, *lhs_batch), (*rhs_contracted, *rhs_batch)))[last] + 1
    moved = partial(_moved, before=copied)
    contracted = ((*lhs_contracted, last + 1), (*moved(rhs_contracted), copied))
    shape = (*rhs.shape[:copied], _PARTS, *rhs.shape[copied:])
    # Behind a barrier, lest XLA add up the parts, rounded, in place of the copies.
    copies = lax.optimization_barrier(jnp.broadcast_to(jnp.expand_dims(rhs, copied), shape))
    in_parts = Axes(contracted, (lhs_batch, moved(rhs_batch)))
    return _dot(parts, copies, axes=in_parts, dtype=dtype, out_sharding=out_sharding)


def few_of_parts(parts: Array, rhs: Array, axes: Axes, *, dtype: Any) -> Array:
    """`product_of_parts` for a sum over few numbers, on a GPU: one kernel, which cuts the f32 lhs in parts itself."""
    lhs = parts.astype(jnp.float32).sum(-1)
    by_parts = lax.DotAlgorithmPreset.BF16_BF16_F32_X3
    return lax.dot_general(lhs, rhs.astype(jnp.float32), axes, precision=by_parts).astype(dtype)


def bf16_halves(values: Array) -> Array:
    """`bf16_parts(values, 2, -1)` as the halves of words, which XLA writes on a GPU at the speed of a copy."""
    high, rest = _part_and_rest(values)
    low = lax.bitcast_convert_type(rest.astype(jnp.bfloat16), jnp.uint16)
    return lax.bitcast_convert_type(high >> 16 | low.astype(jnp.uint32) << 16, jnp.bfloat16)


def _dot_of_parts(lhs: Array, rhs: Array, *, axes: Axes, dtype: Any, out_sharding: Any) -> Array:
    """The product of two f32 operands: all products of their parts but that of the small ones."""
    (high, low), (rhs_high, rhs_low) = bf16_parts(lhs, 2), bf16_parts(rhs, 2)
    contracted, batch = (tuple(_moved(side, before=0) for side in pair) for pair in axes)
    in_parts = Axes(((0, *contracted[0]), (0, *contracted[1])), (batch[0], batch[1]))
    parts = jnp.stack([high, high, low]), jnp.stack([rhs_high, rhs_low, rhs_high])
    return _dot(*parts, axes=in_parts, dtype=dtype, out_sharding=out_sharding)


_PARTS = 2


def _moved(numbers: tuple[int, ...], before: int) -> tuple[int, ...]:
    """The numbers of axes after a new one has come in."""
    return tuple(axis + (axis >= before) for axis in numbers)


def _product(lhs: Array, rhs: Array, **params: Any) -> Array:
    if lhs.dtype == rhs.dtype == jnp.bfloat16:
        return _dot(lhs, rhs, **params)
    if lhs.dtype == jnp.bfloat16:
        return _swapped(lhs, rhs, **params)
    in_parts = _dot_of_parts if rhs.dtype == jnp.float32 else _dot_in_parts
    # On a CPU one product in f32 is faster than several in bf16.
    return lax.platform_dependent(lhs, rhs, cpu=partial(_dot_in_f32, **params), default=partial(in_parts, **params))


def _swapped(lhs: Array, rhs: Array, *, axes: Axes, dtype: Any, out_sharding: Any) -> Array:
    batch, of_lhs = len(axes.batch[0]), len(axes.kept(0, lhs.ndim))
    of_rhs = len(axes.kept(1, rhs.ndim))
    order = [*range(batch), *range(batch + of_rhs, batch + of_rhs + of_lhs), *range(batch, batch + of_rhs)]
    if out_sharding is not None:
        spec = [None] * len(order)
        for axis, source in enumerate(order):
            spec[source] = out_sharding.spec[axis]
        out_sharding = out_sharding.update(spec=tuple(spec))
    return _product(rhs, lhs, axes=axes.swapped(), dtype=dtype, out_sharding=out_sharding).transpose(order)


def _cotangent_of_lhs(
    cotangent: Array, lhs: Any, rhs: Array, *, axes: Axes, result_has_rhs_first: bool = False
) -> Array:
    (lhs_contracted, rhs_contracted), (lhs_batch, rhs_batch) = axes
    lhs_kept, rhs_kept = axes.kept(0, lhs.aval.ndim), axes.kept(1, rhs.ndim)
    first = len(lhs_batch) + (0 if result_has_rhs_first else len(lhs_kept))
    of_rhs = tuple(range(first, first + len(rhs_kept)))
    back = Axes((of_rhs, rhs_kept), (tuple(range(len(lhs_batch))), rhs_batch))
    by_rhs = [lhs_contracted[index] for index in np.argsort(rhs_contracted)]
    found = [*lhs_batch, *lhs_kept, *by_rhs]
    sharding = lhs.aval.sharding
    out_sharding = None if sharding.mesh.empty else sharding.update(spec=tuple(sharding.spec[axis] for axis in found))
    result = product(cotangent, rhs, back, dtype=lhs.aval.dtype, out_sharding=out_sharding)
    return result.transpose(np.argsort(found))


def _transpose_lhs(cotangent: Array, lhs: Any, rhs: Array, *, axes: Axes, **_: Any) -> Array:
    return _cotangent_of_lhs(cotangent, lhs, rhs, axes=axes)


def _transpose_rhs(cotangent: Array, lhs: Array, rhs: Any, *, axes: Axes, **_: Any) -> Array:
    return _cotangent_of_lhs(cotangent, rhs, lhs, axes=axes.swapped(), result_has_rhs_first=True)


def _abstract_eval(lhs: Any, rhs: Any, **params: Any) -> Any:
    (aval,) = jax.make_jaxpr(partial(_dot, **params))(lhs, rhs).out_avals
    return aval


def _batch(values, dims, *, axes: Axes, dtype: Any, out_sharding: Any):
    """A mapped axis goes first in its operand; in the result, before those of the operand, or of both."""
    ndims = [value.ndim - (dim is not None) for value, dim in zip(values, dims)]
    at = 0 if None not in dims else len(axes.batch[0]) + (0 if dims[1] is None else len(axes.kept(0, ndims[0])))
    spec = next(jax.typeof(value).sharding.spec[dim] for value, dim in zip(values, dims) if dim is not None)
    values = [value if dim is None else jnp.moveaxis(value, dim, 0) for value, dim in zip(values, dims)]
    shift = [int(dim is not None) for dim in dims]
    contracted, batch = (
        [tuple(axis + by for axis in side) for side, by in zip(pair, shift)] for pair in (axes.contracted, axes.batch)
    )
    if None not in dims:
        batch = [(0, *side) for side in batch]
    lhs, rhs = values
    mapped = Axes((contracted[0], contracted[1]), (batch[0], batch[1]))
    return product(lhs, rhs, mapped, dtype=dtype, out_sharding=_with_axis(out_sharding, at, spec)), at


def _with_axis(sharding: Any, axis: int, spec: Any) -> Any:
    if sharding is None:
        return None
    before = tuple(sharding.spec)
    return sharding.update(spec=(*before[:axis], spec, *before[axis:]))


_PRODUCT = Primitive("jax_router.product")
_PRODUCT.def_impl(partial(xla.apply_primitive, _PRODUCT))
_PRODUCT.def_abstract_eval(_abstract_eval)
ad.defbilinear(_PRODUCT, _transpose_lhs, _transpose_rhs)
batching.primitive_batchers[_PRODUCT] = _batch
mlir.register_lowering(_PRODUCT, mlir.lower_fun(_product, multiple_results=False))
