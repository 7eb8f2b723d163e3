"""A mixture-of-experts router, native to JAX: CUDA and CPU kernels under jit, grad, vmap and sharding."""

from . import _primitive, balance, reference
from ._activation_topk import activation_topk
from ._dense_router import dense_router
from ._expert_counts import expert_counts
from ._expert_dispatch import block_experts, expert_dispatch
from ._grouped_matmul import grouped_matmul
from ._hash_router import hash_router
from ._native import custom_call_targets
from ._permute import combine, permute
from ._route_at import route_at, scored_hash_router
from ._topk_select import topk_select
from ._types import Dispatch, Routing
from ._version import __version__
from .config import RouterConfig
from .hash_tables import make_hash_table
from .models import presets
from .router import HashTable, Router, SelectionBias, null_experts_output, random_hash_table

__all__ = [
    "Dispatch",
    "HashTable",
    "Router",
    "RouterConfig",
    "Routing",
    "SelectionBias",
    "__version__",
    "activation_topk",
    "balance",
    "block_experts",
    "combine",
    "custom_call_targets",
    "dense_router",
    "expert_counts",
    "expert_dispatch",
    "grouped_matmul",
    "hash_router",
    "make_hash_table",
    "null_experts_output",
    "permute",
    "presets",
    "random_hash_table",
    "reference",
    "route_at",
    "scored_hash_router",
    "topk_select",
]

_primitive.use_kernels()  # here, where all ops exist
