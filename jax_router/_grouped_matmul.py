"""Products of groups of rows, each with a matrix of its own, by the kernels for Hopper GPUs that JAX ships."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from enum import Enum
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, xla
from jax.sharding import PartitionSpec

from . import _check
from ._primitive import may_be_partitioned, vary_over_the_same_axes
from ._sharding import align, explicit_axes, explicit_mesh, is_split, mesh_axes, with_results_as
from ._types import Implementation

UnusedRows = Literal["zeros", "undefined"]


def grouped_matmul(
    lhs: Array,
    rhs: Array,
    group_sizes: Array,
    *,
    unused_rows: UnusedRows = "zeros",
    implementation: Implementation = "auto",
) -> Array:
    """`out[s] = lhs[s] @ rhs[g]` for the rows s of group g: `jax.lax.ragged_dot`, but fast on an H100 or H200.

    The groups lie one after another from row 0 on, as `expert_dispatch` has them. Rows behind the last group are zeros
    in the result, and nothing that lhs or a cotangent holds there, NaN or infinite, reaches any result or gradient.

    To write those zeros a kernel's result is read and written once more, unless XLA can do it with what follows. Where
    nobody reads these rows, as between `permute` and `combine`, say `unused_rows="undefined"`: there they may hold
    whatever was in memory, in the result and in the gradient of lhs, to be kept from anything that sums over rows.

    XLA has no fast ragged_dot for a GPU: it multiplies every row with every matrix. On GPUs of compute capability 9.0
    (H100, H200) this calls the Pallas kernels that JAX has among its examples (`jax.experimental.pallas.ops.gpu`,
    `ragged_dot_mgpu` and `transposed_ragged_dot_mgpu`), forward and for both gradients, for bf16 and f16 and D and F
    that are multiples of 64. That part of JAX is experimental; with other versions of it than 0.11 and 0.12, on other
    devices, in programs that XLA may partition (use `jax.shard_map`) and in exported ones this is ragged_dot. In meshes
    with Explicit axes no operand may be split over them.

    The kernels sum a gradient of rhs in blocks of 64 rows. What NaN and infinity stand in a row *of a group* may reach
    the gradient of the groups beside it, where these share a block: never where groups begin at multiples of 64.

    Args:
        lhs: f32, bf16 or f16 `[S, D]`.
        rhs: `[G, D, F]` in the dtype of lhs.
        group_sizes: integers `[G]`, not negative, of at most S rows in all. Elsewhere results are unspecified.
        unused_rows: what the rows behind the last group are, "zeros" (default) or "undefined".
        implementation: "auto"; "native", which is these kernels or an error that says why not; or "reference", which is
            `jax.lax.ragged_dot`.

    Returns:
        `[S, F]` in the dtype of lhs, summed in f32 if that is bf16 or f16.

    Differentiable in lhs and rhs, to any order, in reverse and forward mode. `vmap` is a loop; over an axis that is
    split over Explicit axes, a loop on each device.

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape, or an operand is split over Explicit axes.
        NotImplementedError: `implementation="native"` where the kernels cannot run.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax_router import grouped_matmul
        >>> lhs = jnp.ones((4, 2))
        >>> rhs = jnp.array([1.0, 10.0])[:, None, None] * jnp.ones((2, 2, 1))  # a matrix for each of two groups
        >>> grouped_matmul(lhs, rhs, jnp.array([1, 2]))
        Array([[ 2.],
               [20.],
               [20.],
               [ 0.]], dtype=float32)
    """
    lhs = _check.float_array("lhs", lhs)
    rhs = _check.float_array("rhs", rhs)
    group_sizes = _check.int_array("group_sizes", group_sizes)
    if lhs.ndim != 2:
        raise ValueError(f"lhs must have shape [S, D], got {lhs.shape}")
    if rhs.ndim != 3 or rhs.shape[1] != lhs.shape[1]:
        raise ValueError(f"rhs must have shape [G, {lhs.shape[1]}, F], as lhs has {lhs.shape}; got {rhs.shape}")
    if rhs.dtype != lhs.dtype:
        raise TypeError(f"rhs must have the dtype of lhs, {lhs.dtype}, got {rhs.dtype}: cast one of them")
    _check.same_shape("group_sizes", group_sizes, rhs.shape[:1])
    for name, value in (("lhs", lhs), ("rhs", rhs), ("group_sizes", group_sizes)):
        if is_split(value, value.ndim):
            raise ValueError(
                f"{name} must not be split over Explicit axes of a mesh, got {jax.typeof(value)}: use jax.shard_map or "
                "jax.sharding.reshard"
            )
    _check.choice("unused_rows", unused_rows, get_args(UnusedRows))
    how = {"unused_rows": unused_rows, "implementation": _check.implementation(implementation)}
    return _grouped(lhs, rhs, group_sizes.astype(jnp.int32), form=Form.ROWS, **how)


class Form(Enum):
    """A product, of which each is linear in two operands, and the others its derivatives."""

    ROWS = "lhs [S, D], rhs [G, D, F] -> [S, F]"
    ROWS_TRANSPOSED = "lhs [S, F], rhs [G, D, F] -> [S, D]"
    GROUPS = "lhs [S, D], rhs [S, F] -> [G, D, F]"


_DIMENSION_NUMBERS = {
    form: lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(contracted, ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=groups
    )
    for form, contracted, groups in (
        (Form.ROWS, ((1,), (1,)), [0]),
        (Form.ROWS_TRANSPOSED, ((1,), (2,)), [0]),
        (Form.GROUPS, ((0,), (0,)), []),
    )
}


def _grouped(lhs: Array, rhs: Array, group_sizes: Array, **params: Any) -> Array:
    return _GROUPED.bind(*vary_over_the_same_axes([lhs, rhs, group_sizes]), **params)


def _reference(lhs: Array, rhs: Array, group_sizes: Array, *, form: Form, **how: str) -> Array:
    def compute(lhs: Array, rhs: Array, group_sizes: Array) -> Array:
        return lax.ragged_dot_general(lhs, rhs, group_sizes, _DIMENSION_NUMBERS[form], preferred_element_type=lhs.dtype)

    # In meshes with Explicit axes JAX has no rule for it.
    return with_results_as(PartitionSpec(), lhs, rhs, group_sizes)(compute)(lhs, rhs, group_sizes)


# The kernels


class Tiles(NamedTuple):
    """How a kernel cuts its work; by the names of its arguments."""

    block_m: int
    block_n: int
    block_k: int
    max_concurrent_steps: int
    grid_block_n: int


def tiles(form: Form, rows: int, groups: int, hidden: int, inner: int) -> Tiles:
    """A cut that the kernels take, for S, G, D and F.

    Of eight that were timed on an H100 for the form of groups at the sizes of Qwen3-30B-A3B, the fastest gains 3 %.
    """
    if form is Form.GROUPS:
        block = 128 if hidden % 128 == inner % 128 == 0 else 64
        return Tiles(block, block, 64, 4, 2)
    width = inner if form is Form.ROWS else hidden
    return Tiles(128 if rows > 64 * groups else 64, 128 if width % 128 == 0 else 64, 64, 4, 2)


def _by_kernels(
    lhs: Array, rhs: Array, group_sizes: Array, *, form: Form, unused_rows: str, implementation: str
) -> Array:
    ragged_dot, transposed_ragged_dot = kernels()
    rows, end = len(lhs), group_sizes.sum(dtype=jnp.int32)
    hidden, inner = (lhs.shape[1], rhs.shape[1]) if form is Form.GROUPS else rhs.shape[1:]
    cut = tiles(form, rows, len(group_sizes), hidden, inner)
    lhs = _with_whole_octets(lhs)
    with jax.enable_x64(False):  # the kernels number rows in the default integer
        if form is Form.GROUPS:
            # The last block of rows may reach beyond the groups. What is there is multiplied by 0, and NaN would stay.
            lhs, rhs = (_with_zeros_from(end, values, cut.block_k) for values in (lhs, _with_whole_octets(rhs)))
            return transposed_ragged_dot(lhs, rhs, group_sizes=group_sizes, **cut._asdict())
        is_transposed = form is Form.ROWS_TRANSPOSED
        result = ragged_dot(lhs, rhs, group_sizes=group_sizes, transpose_rhs=is_transposed, **cut._asdict())[:rows]
    if unused_rows == "undefined":  # what was in memory
        return result
    return jnp.where(lax.broadcasted_iota(jnp.int32, (rows, 1), 0) < end, result, 0)


def _with_whole_octets(values: Array) -> Array:
    """More rows, up to a multiple of 8: the kernels take no other number."""
    return jnp.pad(values, ((0, -len(values) % 8), (0, 0)))


def _with_zeros_from(end: Array, values: Array, block: int) -> Array:
    """Zeros from row `end` to the next multiple of `block`."""
    rows = len(values)
    size = min(block, rows)
    first = jnp.minimum(end // block * block, rows - size)
    window = lax.dynamic_slice_in_dim(values, first, size)
    row = first + lax.broadcasted_iota(jnp.int32, (size, 1), 0)
    return lax.dynamic_update_slice_in_dim(values, jnp.where(row < end, window, 0), first, 0)


_VERSIONS = (0, 11), (0, 12)  # whose kernels are known to be right


@functools.cache
def kernels() -> tuple[Callable[..., Array], Callable[..., Array]]:
    """JAX's kernels for the two forms of rows, and for that of groups.

    Raises:
        ImportError: this version of JAX does not have them as they are called here.
    """
    if jax.__version_info__[:2] not in _VERSIONS:
        versions = " and ".join(f"{major}.{minor}" for major, minor in _VERSIONS)
        raise ImportError(f"its kernels are known for jax {versions}, and this is {jax.__version__}")
    found = []
    for name in ("ragged_dot", "transposed_ragged_dot"):
        kernel = getattr(importlib.import_module(f"jax.experimental.pallas.ops.gpu.{name}_mgpu"), name, None)
        if kernel is None or not {"group_sizes", *Tiles._fields} <= inspect.signature(kernel).parameters.keys():
            raise ImportError(f"{name} of jax {jax.__version__} is not called as it was")
        found.append(kernel)
    return found[0], found[1]


def _reason_against_kernels(ctx: Any, form: Form) -> str | None:
    lhs, rhs, _ = ctx.avals_in
    sizes = (*lhs.shape, *rhs.shape)
    if lhs.dtype not in (jnp.bfloat16, jnp.float16):
        return f"the kernels take bfloat16 and float16, got {lhs.dtype}"
    if not all(isinstance(size, int) for size in sizes):
        return "the kernels take no symbolic sizes"
    widths = {lhs.shape[1], *(rhs.shape[1:])}
    if 0 in sizes or any(width % 64 for width in widths):
        return f"the kernels take D and F that are multiples of 64, got {' and '.join(map(str, sorted(widths)))}"
    mesh = lhs.sharding.mesh
    if (mesh.size > 1 and explicit_axes(mesh)) or may_be_partitioned(ctx):
        return "XLA may partition the program, or it is exported; use jax.shard_map"
    return _reason_against_device()


def _reason_against_device() -> str | None:
    try:
        kernels()
        capabilities = {device.compute_capability for device in jax.local_devices(backend="cuda")}
    except (ImportError, RuntimeError) as error:
        return str(error)
    return None if capabilities == {"9.0"} else f"compute capability 9.0 is needed, got {', '.join(capabilities)}"


def _lower_on_cuda(ctx: Any, *values: Any, form: Form, implementation: str, **how: str) -> Any:
    reason = None if implementation == "reference" else _reason_against_kernels(ctx, form)
    if reason and implementation == "native":
        raise NotImplementedError(f"grouped_matmul(implementation='native') on cuda: {reason}")
    run = _reference if reason or implementation == "reference" else _by_kernels
    params = {"form": form, "implementation": implementation, **how}
    return mlir.lower_fun(run, multiple_results=False)(ctx, *values, **params)


def _lower_elsewhere(ctx: Any, *values: Any, form: Form, implementation: str, **how: str) -> Any:
    if implementation == "native":
        raise NotImplementedError("grouped_matmul(implementation='native'): there are kernels for GPUs alone")
    return mlir.lower_fun(_reference, multiple_results=False)(ctx, *values, form=form)


# The rules of JAX


def _abstract_eval(lhs: Any, rhs: Any, group_sizes: Any, **params: Any) -> Any:
    (aval,) = jax.make_jaxpr(partial(_reference, **params))(lhs, rhs, group_sizes).out_avals
    return aval


def _transpose(cotangent: Any, lhs: Any, rhs: Any, group_sizes: Array, *, form: Form, **how: str):
    if isinstance(cotangent, ad.Zero):
        return [None] * 3

    def grouped(lhs: Array, rhs: Array, group_sizes: Array, form: Form) -> Array:
        return _grouped(lhs, rhs, group_sizes, form=form, **how)

    if ad.is_undefined_primal(lhs):
        if form is Form.GROUPS:
            of_lhs = grouped(rhs, cotangent, group_sizes, form=Form.ROWS_TRANSPOSED)
        else:
            back = Form.ROWS_TRANSPOSED if form is Form.ROWS else Form.ROWS
            of_lhs = grouped(cotangent, rhs, group_sizes, form=back)
        return [of_lhs, None, None]
    if form is Form.GROUPS:
        of_rhs = grouped(lhs, cotangent, group_sizes, form=Form.ROWS)
    else:
        rows = (lhs, cotangent) if form is Form.ROWS else (cotangent, lhs)
        of_rhs = grouped(*rows, group_sizes, form=Form.GROUPS)
    return [None, of_rhs, None]


def _batch(values: Any, dims: Any, **params: Any):
    """A loop; over a sharded axis, that of each device over its own part."""
    mapped = [index for index, dim in enumerate(dims) if dim is not None]
    moved = align([jnp.moveaxis(values[i], dims[i], 0) for i in mapped], [values[i].ndim - 1 for i in mapped])
    alike = dict(zip(mapped, moved))
    values = [alike.get(index, value) for index, value in enumerate(values)]
    axis = PartitionSpec(*jax.typeof(values[mapped[0]]).sharding.spec[:1])

    def loop(*values: Array) -> Array:
        def one(of_mapped: dict[int, Array]) -> Array:
            return _grouped(*(of_mapped.get(index, value) for index, value in enumerate(values)), **params)

        return lax.map(one, {index: values[index] for index in mapped})

    if any(axis):
        specs = tuple(axis if index in mapped else PartitionSpec() for index in range(len(values)))
        mesh, axes = explicit_mesh(*values), mesh_axes(*axis)
        # Under jit, because eagerly the oldest JAX takes no jax.checkpoint in it.
        loop = jax.jit(jax.shard_map(loop, mesh=mesh, in_specs=specs, out_specs=axis, axis_names=axes))
    return loop(*values), 0


_GROUPED = Primitive("jax_router.grouped_matmul")
_GROUPED.def_impl(partial(xla.apply_primitive, _GROUPED))
_GROUPED.def_abstract_eval(_abstract_eval)
ad.defjvp(
    _GROUPED,
    lambda tangent, lhs, rhs, group_sizes, **params: _grouped(tangent, rhs, group_sizes, **params),
    lambda tangent, lhs, rhs, group_sizes, **params: _grouped(lhs, tangent, group_sizes, **params),
    None,
)
ad.primitive_transposes[_GROUPED] = _transpose
batching.primitive_batchers[_GROUPED] = _batch
mlir.register_lowering(_GROUPED, _lower_elsewhere)
mlir.register_lowering(_GROUPED, _lower_on_cuda, platform="cuda")
