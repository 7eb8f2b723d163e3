"""The named cases of the tests: the routers of real models, and the sizes that broke other kernels."""

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

DTYPES = {"f32": np.dtype(np.float32), "bf16": np.dtype(ml_dtypes.bfloat16), "f16": np.dtype(np.float16)}


@dataclass(frozen=True)
class Model:
    """The router of a model, as its configuration file has it."""

    hidden_size: int
    num_experts: int
    top_k: int
    score_fn: str
    renormalize: bool = True
    scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    group_score: str = "top2_sum"
    has_bias: bool = False
    has_logit_bias: bool = False
    vocab_size: int | None = None  # of a model with hash layers

    @property
    def scoring(self) -> dict[str, Any]:
        return {"score_fn": self.score_fn, "renormalize": self.renormalize, "scale": self.scale}

    @property
    def options(self) -> dict[str, Any]:
        """The options of activation_topk."""
        return {
            **self.scoring,
            "top_k": self.top_k,
            "num_groups": self.num_groups,
            "top_groups": self.top_groups,
            "group_score": self.group_score,
        }

    def logits(self, rng: np.random.Generator, *leading: int, dtype: Any = np.float32) -> np.ndarray:
        """Logits as a trained gate has them: a few units wide."""
        return rng.normal(0, 2, (*leading, self.num_experts)).astype(np.float32).astype(dtype)

    def bias(self, rng: np.random.Generator) -> np.ndarray | None:
        return rng.normal(0, 0.1, self.num_experts).astype(np.float32) if self.has_bias else None


MODELS = {
    "deepseek-v2": Model(5120, 160, 6, "softmax", False, 16.0, num_groups=8, top_groups=3, group_score="max"),
    "deepseek-v3": Model(7168, 256, 8, "sigmoid", True, 2.5, num_groups=8, top_groups=4, has_bias=True),
    "deepseek-v4-flash": Model(4096, 256, 6, "sqrtsoftplus", True, 1.5, has_bias=True, vocab_size=129280),
    "deepseek-v4-pro": Model(7168, 384, 6, "sqrtsoftplus", True, 2.5, has_bias=True, vocab_size=129280),
    "glm-4.5": Model(5120, 160, 8, "sigmoid", True, 2.5, has_bias=True),
    "gpt-oss-120b": Model(2880, 128, 4, "softmax", has_logit_bias=True),
    "kimi-k2": Model(7168, 384, 8, "sigmoid", True, 2.827, has_bias=True),
    "llama-4-maverick": Model(5120, 128, 1, "sigmoid", False),
    "mixtral-8x7b": Model(4096, 8, 2, "softmax"),
    "olmoe": Model(2048, 64, 8, "softmax", False),
    "qwen3-30b-a3b": Model(2048, 128, 8, "softmax"),
}

EXPERT_COUNTS = (36, 72, 108, 132, 144, 160, 192, 288, 320, 384, 448, 512, 576, 896, 1024)
ODD_EXPERT_COUNTS = (1, 3, 7, 17, 33, 65, 129, 255, 257, 1023)
TOKEN_COUNTS = (1, 17, 33, 63, 64, 65)

# (rows, length, k) of topk_select.
ROWS = {
    "one short row": (1, 100, 7),
    "all of a row": (3, 65, 65),
    "k is one": (5, 1000, 1),
    "router rows": (64, 256, 6),
    "many short rows": (4100, 64, 3),
    "more of a short row": (6, 500, 40),
    "few of a medium row": (3, 4096, 64),
    "more of a medium row": (3, 3001, 100),
    "medium rows": (4, 4096, 512),
    "a quarter of a row": (2, 8191, 2048),
    "no tile multiple": (2, 5003, 77),
    "all of a medium row": (2, 8192, 8192),
    "as many as a kernel takes": (2, 20000, 8192),
    "few long rows": (2, 65536, 1024),
    "one long row": (1, 262209, 2048),
}

# The bounds of integer operands, ids outside of [0, 16) or of a table of 12 rows among them.
INTEGERS = {"token_ids": (-1, 13), "lut": (-1, 16), "ids": (-1, 17), "lengths": (-1, 18)}


def draw(rng: np.random.Generator, name: str, *shape: int) -> np.ndarray:
    """A random operand of an op on 16 experts, by its name."""
    if name == "mask":
        return rng.random(shape) < 0.7
    if name in INTEGERS:
        return rng.integers(*INTEGERS[name], shape).astype(np.int32)
    return rng.normal(0, 1, shape).astype(np.float32)
