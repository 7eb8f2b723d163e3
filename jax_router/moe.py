"""A mixture-of-experts layer: how router, dispatch, permutation, grouped products and combination fit together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple, get_args, overload

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from . import _check, expert_parallel
from ._expert_dispatch import expert_dispatch
from ._grouped_matmul import grouped_matmul
from ._permute import through_experts
from ._sharding import shard_as, with_results_as
from ._types import Implementation, Routing, Weigh, exportable
from .config import RouterConfig
from .router import Initializer, Router, Unset, null_experts_output

Activation = Callable[[Array], Array]
Product = Callable[[Array, Array], Array]
GroupedMatmul = Callable[[Array, Array, Array], Array]


def _of_used_rows(lhs: Array, rhs: Array, group_sizes: Array) -> Array:
    """Between permute and combine nobody reads the rows behind the last group.

    As a function of this module, and so is the activation, a copy of a layer has the same one, and pickle knows it by
    name: of a partial, and of `jax.nn.silu`, copies are others.
    """
    return grouped_matmul(lhs, rhs, group_sizes, unused_rows="undefined")


def _silu(gate: Array) -> Array:
    return jax.nn.silu(gate)


@exportable
class ExpertWeights(NamedTuple):
    """The weights of SwiGLU experts, input axis first as in `x @ w`: what `grouped_matmul` and `ragged_dot` take.

    Attributes:
        gate_proj: `[E, D, F]`.
        up_proj: `[E, D, F]`.
        down_proj: `[E, F, D]`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax_router.moe import ExpertWeights
        >>> of_checkpoint = jnp.ones((4, 3, 2))  # the gates of four experts, stacked, as they lie in a file
        >>> weights = ExpertWeights(of_checkpoint.mT, of_checkpoint.mT, jnp.ones((4, 3, 2)))
        >>> weights.gate_proj.shape, weights.down_proj.shape
        ((4, 2, 3), (4, 3, 2))
    """

    gate_proj: Array
    up_proj: Array
    down_proj: Array


def sum_of_experts(
    x: Array,
    routing: Routing,
    weights: ExpertWeights,
    *,
    activation: Activation = _silu,
    matmul: GroupedMatmul = _of_used_rows,
    align: int = 1,
    weigh: Weigh = "output",
    implementation: Implementation = "auto",
) -> Array:
    """What the experts of each token give, weighted and summed: a mixture-of-experts layer behind its router.

    `out[n] = sum over j of weights[n, j] * f_e(x[n])`, e being `expert_ids[n, j]`, with
    `f_e(x) = (activation(x @ gate_proj[e]) * (x @ up_proj[e])) @ down_proj[e]`. A choice whose id is outside `[0, E)`
    adds nothing, and no choice is dropped.

    Args:
        x: f32, bf16 or f16 `[..., D]`.
        routing: of the same tokens, `[..., k]`.
        weights: of E experts, in the dtype of x.
        activation: of the gate.
        matmul: `(lhs [S, D], rhs [E, D, F], group_sizes [E]) -> [S, F]`, as `grouped_matmul` and `jax.lax.ragged_dot`
            are called. What it leaves in rows behind the last group reaches no result, and must reach no gradient of
            its own.
        align: what the groups begin at a multiple of, and are filled up to with rows of zeros, as in
            `expert_dispatch`: for products in tiles.
        weigh: `"output"` (default), what the experts return, or `"input"`, what they read, as Llama 4 does.
        implementation: of dispatch, permutation and combination: `"auto"`, `"native"` or `"reference"`.

    Returns:
        `[..., D]` in the dtype of x, summed in f32.

    Differentiable in x, in the weights of the routing and in those of the experts.

    Raises:
        TypeError: an operand has a wrong dtype.
        ValueError: a wrong shape or option.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax_router import Routing
        >>> from jax_router.moe import ExpertWeights, sum_of_experts
        >>> x = jnp.ones((1, 2))
        >>> routing = Routing(jnp.array([[0.25, 0.75]]), jnp.array([[1, 0]]))
        >>> weights = ExpertWeights(jnp.ones((2, 2, 3)), jnp.ones((2, 2, 3)), jnp.ones((2, 3, 2)))
        >>> sum_of_experts(x, routing, weights, activation=lambda gate: gate)
        Array([[12., 12.]], dtype=float32)
    """
    x = _check.float_array("x", x, min_rank=2)
    routing = _check.routing_arrays("routing", routing)
    _check.instance("weights", weights, ExpertWeights, "ExpertWeights(gate_proj, up_proj, down_proj)")
    tokens = routing.expert_ids.shape[:-1]
    if x.shape[:-1] != tokens:
        raise ValueError(f"x must have shape {(*tokens, 'D')}, with the tokens of routing.expert_ids; got {x.shape}")
    _check.function("activation", activation, "jax.nn.silu")
    _check.function("matmul", matmul, "jax.lax.ragged_dot")
    _check.choice("weigh", weigh, get_args(Weigh))
    weights = ExpertWeights(*(_check.array(f"weights.{name}", value) for name, value in weights._asdict().items()))
    hidden_size = x.shape[-1]
    if weights.down_proj.ndim != 3 or weights.down_proj.shape[-1] != hidden_size:
        raise ValueError(f"weights.down_proj must have shape [E, F, {hidden_size}], got {weights.down_proj.shape}")
    num_experts, inner, _ = weights.down_proj.shape
    for name, value in (("gate_proj", weights.gate_proj), ("up_proj", weights.up_proj)):
        _check.same_shape(f"weights.{name}", value, (num_experts, hidden_size, inner))

    def compute(x: Array, routing: Routing, weights: ExpertWeights) -> Array:
        dispatch = expert_dispatch(routing.expert_ids, num_experts, align=align, implementation=implementation)
        experts = partial(experts_of_rows, weights, activation=activation, matmul=matmul)
        how: dict[str, Any] = {"weigh": weigh, "implementation": implementation}
        return through_experts(x, dispatch, routing.weights, experts, **how)

    return _sharded_as(x, *weights)(compute)(x, routing, weights)


def _sharded_as(x: Array, *weights: Array) -> Callable[[Callable[..., Array]], Callable[..., Array]]:
    """In meshes with Explicit axes: a function whose result is sharded as x, and in which XLA decides about the rest.

    JAX has no rule for products of groups there, not even for those of arrays that are whole on every device, and
    refuses products of weights that are sharded over the axes of the tokens.
    """
    return with_results_as(jax.typeof(x).sharding.spec, x, *weights)


def experts_of_rows(
    weights: ExpertWeights,
    rows: Array,
    group_sizes: Array,
    *,
    activation: Activation = _silu,
    matmul: GroupedMatmul = _of_used_rows,
) -> Array:
    """What experts give for rows that lie sorted by expert: the part of `sum_of_experts` between the permutations.

    Args:
        weights: of E experts, in the dtype of the rows.
        rows: `[S, D]`, those of expert 0 first.
        group_sizes: int32 `[E]`, how many rows each has.
        activation: of the gate.
        matmul: as in `sum_of_experts`.

    Returns:
        `[S, D]`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax_router.moe import ExpertWeights, experts_of_rows
        >>> weights = ExpertWeights(jnp.ones((2, 2, 3)), jnp.ones((2, 2, 3)), jnp.ones((2, 3, 2)))
        >>> experts_of_rows(weights, jnp.ones((1, 2)), jnp.array([0, 1]), activation=lambda gate: gate)
        Array([[12., 12.]], dtype=float32)
    """
    return _swiglu(rows, weights, activation, lambda lhs, rhs: matmul(lhs, rhs, group_sizes))


def _swiglu(x: Array, weights: ExpertWeights, activation: Activation, product: Product) -> Array:
    # The backward pass computes what lies between gate, up and inner again, rather than keep it.
    gated = jax.checkpoint(lambda gate, up: activation(gate) * up)
    inner = gated(product(x, weights.gate_proj), product(x, weights.up_proj))
    return product(inner, weights.down_proj)


class SwiGLU(nnx.Module):
    """The parameters of one SwiGLU, or of a stack of them: see `ExpertWeights`.

    Attributes:
        gate_proj, up_proj: Params `[*stack, D, F]`.
        down_proj: Param `[*stack, F, D]`.
    """

    def __init__(
        self,
        stack: tuple[int, ...],
        hidden_size: int,
        intermediate_size: int,
        *,
        kernel_init: Initializer,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        into, out = (*stack, hidden_size, intermediate_size), (*stack, intermediate_size, hidden_size)
        self.gate_proj = _param(kernel_init, into, param_dtype, rngs)
        self.up_proj = _param(kernel_init, into, param_dtype, rngs)
        self.down_proj = _param(kernel_init, out, param_dtype, rngs)

    def weights(self, dtype: DTypeLike) -> ExpertWeights:
        """The parameters, cast."""
        return ExpertWeights(
            self.gate_proj[...].astype(dtype), self.up_proj[...].astype(dtype), self.down_proj[...].astype(dtype)
        )


def _param(kernel_init: Initializer, shape: tuple[int, ...], dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Param[Array]:
    param = nnx.Param(kernel_init(rngs.params(), shape, dtype))
    _check.same_shape("the result of kernel_init", param.get_value(), shape)
    return param


def _lecun_normal(key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """Of matrices in the last two axes."""
    batch = tuple(range(len(shape) - 2))
    return nnx.initializers.lecun_normal(in_axis=-2, out_axis=-1, batch_axis=batch)(key, shape, dtype)


class MoE(nnx.Module):
    """A mixture-of-experts layer: a Router, SwiGLU experts, and an expert that all tokens share.

    No token is dropped, unless `expert_options` have limits.

    `y = sum over j of weights[j] * f_{expert_ids[j]}(x)`, plus `shared_expert(x)` where there is one, times
    `sigmoid(x @ shared_expert_gate)` where that has a gate. Null experts add `x` times their weights.

    *Cost.* Of N tokens, k choices each, E experts and hidden sizes D and F: `6 N k D F` operations forward, `2 N D E`
    for the router and `6 N D F'` for a shared expert of size F', and twice as much again backward. The dense
    computation has E in place of k. Parameters: `3 E D F + E D + 3 D F'`. The backward pass keeps, of every choice,
    what its expert read and returned, its gate, its up and their product: `N k (2 D + 3 F)` numbers in `dtype`, and
    `3 N F'` for the shared expert; under `nnx.remat` none of them. Neither depends on E (where the product of groups
    does not), nor on how the tokens lie on the experts.

    *Devices.* Under `jit` over sharded tokens the results are right, but one sort of all tokens is no work to be split:
    XLA gathers what it sorts. In `jax.shard_map` each device sorts its own tokens. With `expert_axis` the experts are
    spread over a mesh axis, and tokens go to those of theirs: see `jax_router.expert_parallel`. Parameters of the
    experts are then to be sharded over their first axis, `P(expert_axis)`, and those of the rest are whole.

    Attributes:
        router: the Router.
        experts: its `gate_proj` and `up_proj` are Params `[E, D, F]`, its `down_proj` `[E, F, D]`: the names that
            checkpoints have (`mlp.experts.0.gate_proj.weight`, which lies transposed there), stacked over the experts
            that compute something, `config.num_real_experts`. Gate and up are two parameters, so that either can be
            sharded over F.
        shared_expert: the same without the axis of experts, or None.
        shared_expert_gate: Param `[D, 1]`, or None.

    Example::

        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jax_router import MoE, RouterConfig
        >>> moe = MoE(RouterConfig(hidden_size=64, num_experts=16, top_k=2), 32, rngs=nnx.Rngs(0))
        >>> x = jnp.ones((3, 5, 64))
        >>> moe(x).shape
        (3, 5, 64)

    That is `moe.apply_experts(x, moe.router(x))`. Written so, what the router chose is at hand for a loss::

        >>> routing, logits = moe.router(x, return_logits=True)
        >>> y = moe.apply_experts(x, routing)

    Args:
        router: a RouterConfig, or a Router, from `Router.from_checkpoint` say.
        intermediate_size: F, of each expert.
        shared_intermediate_size: F' of the shared expert, as wide as several where the model has several; default None,
            no shared expert.
        shared_expert_gate: whether the shared expert has a gate (Qwen2-MoE, Qwen3-Next); default False.
        weigh: what the weights multiply, the `"output"` (default) or the `"input"` of the experts (Llama 4).
        activation: of the gates; default `jax.nn.silu`.
        matmul: product of groups; default `grouped_matmul` with `unused_rows="undefined"`. See `sum_of_experts`.
        align: what the groups begin at a multiple of; default 1. Products in tiles may ask for more.
        expert_axis: the mesh axis over which the experts are spread; default None, all on every device. The mesh is
            that of `jax.set_mesh`, or of a surrounding `jax.shard_map`.
        expert_options: how, with an `expert_axis`: of `expert_parallel.over_mesh`, such as `data_axes`, `way`, `slots`
            and `rows`. `apply_experts` says what the last two drop, with `return_dropped`.
        kernel_init: of the experts' matrices, called with (key, shape, dtype); default LeCun normal.
        dtype: in which the experts are computed; default that of the hidden states. The router has its own.
        param_dtype: of the experts' matrices; default float32.
        rngs: random streams; `params` draws all parameters.

    Raises:
        TypeError, ValueError: an argument has a wrong type or value.
    """

    def __init__(
        self,
        router: RouterConfig | Router,
        intermediate_size: int,
        *,
        shared_intermediate_size: int | None = None,
        shared_expert_gate: bool = False,
        weigh: Weigh = "output",
        activation: Activation = _silu,
        matmul: GroupedMatmul = _of_used_rows,
        align: int = 1,
        expert_axis: str | None = None,
        expert_options: Mapping[str, Any] | None = None,
        kernel_init: Initializer = _lecun_normal,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        _check.instance("rngs", rngs, nnx.Rngs, "nnx.Rngs(0)")
        _check.static_int("intermediate_size", intermediate_size, 1, None)
        has_gate = _check.static_bool("shared_expert_gate", shared_expert_gate)
        if shared_intermediate_size is not None:
            _check.static_int("shared_intermediate_size", shared_intermediate_size, 1, None)
        elif has_gate:
            raise ValueError("shared_expert_gate must be False without shared_intermediate_size, got True")
        _check.choice("weigh", weigh, get_args(Weigh))
        self.weigh = weigh
        _check.function("activation", activation, "jax.nn.silu")
        _check.function("matmul", matmul, "jax.lax.ragged_dot")
        self.activation, self.matmul, self.align = activation, matmul, _check.concrete_int("align", align, 1)
        given = {} if expert_options is None else expert_options
        _check.instance("expert_options", given, Mapping, "{'way': 'exchange'}")
        if given and expert_axis is None:
            raise ValueError(f"expert_options must be None without expert_axis, got {expert_options!r}")
        self.expert_axis = expert_axis
        # What a module holds must be hashable.
        options = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
        self.expert_options = tuple(options.items())
        self.dtype = None if dtype is None else _check.float_dtype("dtype", dtype)
        param_dtype = _check.float_dtype("param_dtype", param_dtype)
        _check.function("kernel_init", kernel_init, "nnx.initializers.lecun_normal()")
        _check.instance("router", router, (RouterConfig, Router), "RouterConfig(**options)")
        if isinstance(router, RouterConfig):
            router = Router(router, rngs=rngs)
        self.router = router
        config = router.config

        def swiglu(stack: tuple[int, ...], inner: int) -> SwiGLU:
            sizes = (stack, config.hidden_size, inner)
            return SwiGLU(*sizes, kernel_init=kernel_init, param_dtype=param_dtype, rngs=rngs)

        self.experts = swiglu((config.num_real_experts,), intermediate_size)
        self.shared_expert = None if shared_intermediate_size is None else swiglu((), shared_intermediate_size)
        gate_shape = (config.hidden_size, 1)
        self.shared_expert_gate = _param(kernel_init, gate_shape, param_dtype, rngs) if has_gate else None

    def __call__(
        self,
        x: Array,
        *,
        token_ids: Array | None = None,
        token_mask: Array | None = None,
        expert_ids: Array | None = None,
        unset: Unset = "none",
    ) -> Array:
        """Computes the layer.

        Args:
            x: hidden states f32, bf16 or f16 `[..., D]`.
            token_ids: integers `[...]`, for a hash router.
            token_mask: bool `[...]`; where False the result is 0, whatever the row holds.
            expert_ids: integers `[..., k]`: experts to replay.
            unset: what an id outside of `[0, E)` means in them. See `Router`.

        Returns:
            `[..., D]` in `dtype`, or in that of x.

        A token that has no expert, by the ids that are replayed or looked up, still has the shared one: mask what is
        padding.

        Raises:
            TypeError, ValueError: as of `Router`.
        """
        routing = self.router(x, token_ids=token_ids, token_mask=token_mask, expert_ids=expert_ids, unset=unset)
        # By its name, because nnx.tabulate fails at a NamedTuple among positional arguments.
        return self.apply_experts(x, routing=routing, token_mask=token_mask)

    @overload
    def apply_experts(
        self, x: Array, routing: Routing, *, token_mask: Array | None = None, return_dropped: Literal[False] = False
    ) -> Array: ...

    @overload
    def apply_experts(
        self, x: Array, routing: Routing, *, token_mask: Array | None = None, return_dropped: Literal[True]
    ) -> tuple[Array, Array]: ...

    def apply_experts(
        self, x: Array, routing: Routing, *, token_mask: Array | None = None, return_dropped: bool = False
    ) -> Array | tuple[Array, Array]:
        """The layer behind its router: what the experts give, those of the routing, null ones and the shared one.

        Args:
            x: as in a call of the layer.
            routing: of the same tokens.
            token_mask: the one that the router had; of use to a shared expert alone.
            return_dropped: whether to return, after the result, how many choices of all tokens found no place by
                the limits in `expert_options`: int32 `[]`, 0 without limits.

        Returns:
            as a call of the layer.

        Example:
            >>> import jax.numpy as jnp
            >>> from flax import nnx
            >>> from jax_router import MoE, RouterConfig
            >>> moe = MoE(RouterConfig(hidden_size=8, num_experts=4, top_k=2), 6, rngs=nnx.Rngs(0))
            >>> x = jnp.ones((3, 8))
            >>> routing = moe.router(x)
            >>> moe.apply_experts(x, routing).shape
            (3, 8)
        """
        config = self.router.config
        x = _check.hidden_states(x, config.hidden_size)
        x = x if self.dtype is None else x.astype(self.dtype)
        weights = self.experts.weights(x.dtype)
        options: dict[str, Any] = {"align": self.align, "weigh": self.weigh, "implementation": config.implementation}
        if self.expert_axis is None:
            y = sum_of_experts(x, routing, weights, activation=self.activation, matmul=self.matmul, **options)
            dropped = jnp.zeros((), jnp.int32)
        else:
            options |= {"expert_axis": self.expert_axis, **dict(self.expert_options)}
            experts = partial(experts_of_rows, activation=self.activation, matmul=self.matmul)
            y, dropped = expert_parallel.over_mesh(x, routing, experts, weights, **options)
        if config.num_null_experts:
            y = y + null_experts_output(x, routing, config.num_real_experts)
        if self.shared_expert is not None:
            y = y + self._shared(x, self.shared_expert, token_mask)
        return (y, dropped) if return_dropped else y

    def _shared(self, x: Array, expert: SwiGLU, token_mask: Array | None) -> Array:
        if token_mask is not None:  # what a masked row holds must not reach the gradients of products
            token_mask = _check.mask_array("token_mask", token_mask, x.shape[:-1])
            x = jnp.where(shard_as(x, token_mask)[..., None], x, 0)
        weights = expert.weights(x.dtype)
        gate = None if self.shared_expert_gate is None else self.shared_expert_gate[...].astype(x.dtype)

        def compute(x: Array, weights: ExpertWeights, gate: Array | None) -> Array:
            y = _swiglu(x, weights, self.activation, jnp.matmul)
            return y if gate is None else y * jax.nn.sigmoid(x @ gate)

        return _sharded_as(x, *weights)(compute)(x, weights, gate)
