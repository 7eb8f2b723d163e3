"""The routers of real models, and the dtypes that the ops take."""

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from jax_router import RouterConfig

DTYPES = {"f32": np.dtype(np.float32), "bf16": np.dtype(ml_dtypes.bfloat16), "f16": np.dtype(np.float16)}


@dataclass(frozen=True, kw_only=True)
class Model(RouterConfig):
    """The router of a model, as its configuration file has it: a RouterConfig, and what that does not say.

    Attributes:
        has_bias: whether a bias steers the selection.
        has_logit_bias: whether a bias is part of the logits.
    """

    has_bias: bool = False
    has_logit_bias: bool = False

    def logits(self, rng: np.random.Generator, *leading: int, dtype: Any = np.float32) -> np.ndarray:
        """Logits as a trained gate has them: a few units wide."""
        return rng.normal(0, 2, (*leading, self.num_experts)).astype(np.float32).astype(dtype)

    def bias(self, rng: np.random.Generator) -> np.ndarray | None:
        """A random selection bias, where the model has one."""
        return rng.normal(0, 0.1, self.num_experts).astype(np.float32) if self.has_bias else None


MODELS = {
    "deepseek-v2": Model(
        5120, 160, 6, score_fn="softmax", renormalize=False, scale=16.0, num_groups=8, top_groups=3, group_score="max"
    ),
    "deepseek-v3": Model(7168, 256, 8, score_fn="sigmoid", scale=2.5, num_groups=8, top_groups=4, has_bias=True),
    "deepseek-v4-flash": Model(4096, 256, 6, scale=1.5, vocab_size=129280, has_bias=True),
    "deepseek-v4-pro": Model(7168, 384, 6, scale=2.5, vocab_size=129280, has_bias=True),
    "glm-4.5": Model(5120, 160, 8, score_fn="sigmoid", scale=2.5, has_bias=True),
    "gpt-oss-120b": Model(2880, 128, 4, score_fn="softmax", has_logit_bias=True),
    "kimi-k2": Model(7168, 384, 8, score_fn="sigmoid", scale=2.827, has_bias=True),
    "llama-4-maverick": Model(5120, 128, 1, score_fn="sigmoid", renormalize=False),
    "mixtral-8x7b": Model(4096, 8, 2, score_fn="softmax"),
    "olmoe": Model(2048, 64, 8, score_fn="softmax", renormalize=False),
    "qwen3-30b-a3b": Model(2048, 128, 8, score_fn="softmax"),
}
