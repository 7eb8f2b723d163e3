"""The choice of CUDA kernels, on devices that are described: it takes no GPU."""

import functools
import json
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_router
from cases import DEVICES as SOME_DEVICES
from jax_router import _native
from jax_router._native import GPUS

CUDA = _native.load("cuda")
if isinstance(CUDA, ImportError):
    pytest.skip(f"there is no CUDA module here: {CUDA}", allow_module_level=True)


def described(compute_capability, multiprocessors, shared_kib):
    sizes = {"multiprocessors": multiprocessors, "shared_bytes": shared_kib * 1024}
    return {"compute_capability": compute_capability, **sizes}


# Those that the tables are made for, large and small, and the parts of them that a program may be given.
DEVICES = SOME_DEVICES | {
    "L40S": GPUS["L40S"],
    "A10": described(86, 72, 99),
    "a seventh of an A100": described(80, 14, 163),
    "H100 PCIe": described(90, 114, 227),
    "half of an H100": described(90, 60, 227),
    "a seventh of an H100": described(90, 16, 227),
    "a seventh of a B200": described(100, 18, 227),
    "RTX 5090": described(120, 170, 99),
}
H100 = DEVICES["H100"]
DTYPES = ("f32", "bf16", "f16")

# What was measured: where a table in csrc/cuda/plan changes, so does this list.
TAKEN_BY_AN_H100 = {
    "activation_topk/E256/k6/N1": "f32 logits tile 16x4",
    "activation_topk/E256/k6/N64": "f32 logits tile 16x4",
    "activation_topk/E256/k6/N4096": "f32 logits tile 16x4",
    "activation_topk/E256/k6/N16384": "f32 logits tile 16x4",
    "activation_topk/E256/k6/N65536": "f32 logits tile 16x4",
    "activation_topk/E384/k6/N1": "f32 logits tile 32x3",
    "activation_topk/E384/k6/N64": "f32 logits tile 32x3",
    "activation_topk/E384/k6/N4096": "f32 logits tile 16x6",
    "activation_topk/E384/k6/N16384": "f32 logits tile 16x6",
    "activation_topk/E384/k6/N65536": "f32 logits tile 16x6",
    "activation_topk/sigmoid/E256/k8/groups8-4/N8192": "f32 groups tile 16x4",
    "activation_topk_grad/E256/k6/N65536": "f32 few choices",
    "route_at/E256/k6/N65536": "f32 choices",
    "hash_router/V129280/k6/N65536": "width 2 past the L1",
    "hash_router/V129280/k6/N1048576": "width 2",
    "topk_select/B1/L4096/k512": "f32 many 512x2",
    "topk_select/B1/L65536/k512": "f32 streamed 512, 8 blocks a row",
    "topk_select/B1/L262144/k2048": "f32 streamed 512, 16 blocks a row",
    "topk_select/B16/L65536/k1024": "f32 streamed 512, 4 blocks a row",
    "topk_select/B64/L8192/k2048": "f32 many 512x4",
    "topk_select/B64/L65536/k2048": "f32 streamed 512, 2 blocks a row",
    "topk_select/B256/L65536/k2048": "f32 streamed 512, 1 blocks a row",
    "topk_select/B1024/L16384/k512": "f32 streamed 128, 1 blocks a row",
    "topk_select/B300/L65536/k512": "f32 streamed 256, 1 blocks a row",
    "topk_select/B256/L65536/k512": "f32 streamed 512, 1 blocks a row",  # two on a multiprocessor
    "topk_select/B128/L262144/k1024": "f32 streamed 512, 1 blocks a row",
    # With 256 threads a row three are under way for two, as many, two for one, and as many.
    "topk_select/B1024/L16384/k2000": "f32 streamed 256, 1 blocks a row",
    "topk_select/B1024/L16384/k2400": "f32 streamed 512, 1 blocks a row",
    "topk_select/B1024/L16384/k3000": "f32 streamed 256, 1 blocks a row",
    "topk_select/B1024/L16384/k5000": "f32 streamed 512, 1 blocks a row",
    "topk_select/B256/L16384/k2400": "f32 streamed 256, 1 blocks a row",  # all are
    "topk_select/B128/L16384/k3000": "f32 streamed 512, 1 blocks a row",  # each on a multiprocessor of its own
    "topk_select/B1024/L65536/k3000": "f32 streamed 512, 1 blocks a row",
    "topk_select/B4096/L4096/k64": "f32 sorting 32x32",
    "topk_select/B65536/L256/k6": "f32 tile 16x4",
    "dense_router/bf16/D4096/E256/k6/N1": "bf16 logits one of 256",
    "dense_router/bf16/D4096/E256/k6/N8": "bf16 logits few 16x8 of 256",
    "dense_router/bf16/D4096/E256/k6/N16": "bf16 logits few 16x8 of 256",
    "dense_router/bf16/D4096/E256/k6/N64": "bf16 logits few 64x16 of 256",
    "dense_router/bf16/D7168/E384/k6/N1": "bf16 logits one of 512",
    "dense_router/bf16/D7168/E384/k6/N8": "bf16 logits few 16x8 of 384",
    "dense_router/bf16/D7168/E384/k6/N16": "bf16 logits few 16x8 of 384",
    "dense_router/bf16/D7168/E384/k6/N64": "bf16 logits few 64x24 of 384",
    "dense_router/bf16/D4096/E256/k6/N512": "bf16 logits many 40 by 4",
    "dense_router/bf16/D4096/E256/k6/N4096": "bf16 logits many 144 by 2",
    "dense_router/bf16/D4096/E256/k6/N16384": "bf16 logits many 128 wide",
    "dense_router/bf16/D7168/E384/k6/N512": "unfused",
    "dense_router/bf16/D7168/E384/k6/N4096": "unfused",
    "dense_router/bf16/D7168/E384/k6/N16384": "unfused",
    "expert_dispatch/E256/k6/N4096": "cluster of 512 threads, 16 chunks",
    "expert_dispatch/E256/k6/N65536": "one wave of 512 threads",
    "expert_counts/E256/k6/N65536": "one cluster",
    "activation_topk/E256/k6/N1/bias": "f32 scores block of 256",
    "activation_topk/E256/k6/N64/bias": "f32 scores block of 256",
    "activation_topk/E256/k6/N65536/bias": "f32 scores tile 16x4",
    "activation_topk/E256/k6/N65536/bf16": "bf16 logits tile 8x8",
    "activation_topk/E256/k6/N65536/bf16/bias": "bf16 scores tile 8x8",
    "activation_topk/E384/k6/N1/bias": "f32 scores block of 512",
    "activation_topk/E384/k6/N65536/bias": "f32 scores tile 16x6",
    "activation_topk/sigmoid/E256/k8/groups8-4/N1": "f32 groups block of 256",
    "activation_topk/sigmoid/E256/k8/groups8-4/N64": "f32 groups block of 256",
    "activation_topk/sigmoid/E256/k8/groups8-4/N65536": "f32 groups tile 16x4",
    "activation_topk/softmax/E128/k8/N1": "f32 logits tile 16x2",
    "activation_topk/softmax/E128/k8/N4096": "f32 logits tile 16x2",
    "activation_topk/softmax/E128/k8/N65536": "f32 logits tile 8x4",
    "scored_hash_router/V129280/E256/k6/N1": "f32 ahead",
    "scored_hash_router/V129280/E256/k6/N64": "f32 ahead",
    "scored_hash_router/V129280/E256/k6/N65536": "f32 choices",
    "dense_router/bf16xf32/D4096/E256/k6/N1": "bf16xf32 logits one of 256",
    "dense_router/bf16xf32/D4096/E256/k6/N16": "bf16xf32 logits few 16x16 of 256",
    "dense_router/bf16xf32/D4096/E256/k6/N64": "bf16xf32 logits few 64x16 of 256",
    "dense_router/bf16xf32/D4096/E256/k6/N4096": "unfused",
    "permute/bf16/D2048/k8/N8192": "copy 16 bytes x4",
    "permute_grad/bf16/D2048/k8/N8192": "bf16 wide",
    "combine/bf16/D2048/k8/N8192": "bf16 wide",
    "combine_grad/bf16/D2048/k8/N8192": "bf16 wide of a token",
    "permute/bf16/D4096/k6/N8192": "copy 16 bytes x4",
    "permute_grad/bf16/D4096/k6/N8192": "bf16 wide",
    "combine/bf16/D4096/k6/N8192": "bf16 wide",
    "combine_grad/bf16/D4096/k6/N8192": "bf16 wide of a token",
    "permute/bf16/D7168/k8/N8192": "copy 16 bytes x4",
    "permute_grad/bf16/D7168/k8/N8192": "bf16 wide",
    "combine/bf16/D7168/k8/N8192": "bf16 wide",
    "combine_grad/bf16/D7168/k8/N8192": "bf16 wide of a token",
}

_KERNELS = {
    "activation_topk_grad": "route_cotangent",
    "permute_grad": "combine",
    "combine_grad": "combine_cotangent",
    "scored_hash_router": "route_at",
}
_SIZES = {"N": "rows", "B": "rows", "L": "length", "E": "experts", "D": "hidden", "k": "k", "groups": "num_groups"}


def sizes_of(case_id):
    """The op of a case of targets.json, and its sizes."""
    op, *parts = case_id.split("/")
    op = _KERNELS.get(op, op)
    sizes = {_SIZES[name]: int(value) for name, value in re.findall(r"/([A-Z]|k|groups)(\d+)", case_id) if name != "V"}
    if op in ("expert_dispatch", "expert_counts", "permute", "combine", "combine_cotangent"):
        sizes["tokens"] = sizes.pop("rows")
    if op not in ("expert_dispatch", "expert_counts", "hash_router"):
        sizes["dtype"], *weight_dtype = next((part for part in parts if "f16" in part), "f32").split("x")
        if weight_dtype:
            (sizes["weight_dtype"],) = weight_dtype
    if op == "topk_select":
        sizes["sorted"] = False
    if op == "activation_topk":
        sizes["bias"] = "bias" in parts or "num_groups" in sizes
    return op, sizes


def taken(device_name, case_id):
    op, sizes = sizes_of(case_id)
    chosen, _ = CUDA.plans(op, DEVICES[device_name], **sizes)
    return chosen if CUDA.pays(op, DEVICES[device_name], **sizes) else "unfused"


@pytest.mark.parametrize("case_id", TAKEN_BY_AN_H100)
def test_an_h100_takes_what_was_measured(case_id):
    assert taken("H100", case_id) == TAKEN_BY_AN_H100[case_id]


# What follows from the data sheets of other GPUs, where it is not what an H100 takes.
TAKEN_ELSEWHERE = {
    # One block counts and sorts alone where there are no clusters.
    ("A100", "expert_counts/E256/k6/N65536"): "several clusters",
    ("A100", "expert_dispatch/E256/k6/N4096"): "longer of 512 threads",
    ("A100", "expert_dispatch/E256/k6/N65536"): "longer of 512 threads",
    ("A100", "topk_select/B1/L65536/k512"): "f32 streamed 512, 1 blocks a row",
    # Shared memory has room for one row of 512 threads and two of 256, and then for one of either.
    ("A100", "topk_select/B1024/L16384/k2400"): "f32 streamed 256, 1 blocks a row",
    ("A100", "topk_select/B1024/L16384/k3000"): "f32 streamed 512, 1 blocks a row",
    # 128 blocks of 64 tokens do not all run at once, which those of 16 tokens need not.
    ("A100", "dense_router/bf16/D4096/E256/k6/N64"): "unfused",
    ("A100", "dense_router/bf16/D4096/E256/k6/N16"): "bf16 logits few 16x8 of 256",
    ("a seventh of an H100", "dense_router/bf16/D4096/E256/k6/N64"): "unfused",
    ("H100 PCIe", "dense_router/bf16/D4096/E256/k6/N64"): "unfused",
    ("B200", "dense_router/bf16/D7168/E384/k6/N64"): "bf16 logits few 64x24 of 384",
    # The products of many tokens are Hopper's.
    ("B200", "dense_router/bf16/D4096/E256/k6/N4096"): "unfused",
    # As many rows a multiprocessor are fewer.
    ("a seventh of an H100", "activation_topk/E384/k6/N64"): "f32 logits tile 16x6",
    ("half of an H100", "topk_select/B64/L65536/k2048"): "f32 streamed 512, 1 blocks a row",
}


@pytest.mark.parametrize(("device_name", "case_id"), TAKEN_ELSEWHERE)
def test_other_gpus_take_what_their_data_sheets_ask_for(device_name, case_id):
    assert taken(device_name, case_id) == TAKEN_ELSEWHERE[device_name, case_id]


def test_the_list_has_every_target():
    targets = json.loads((Path(__file__).parents[1] / "benchmarks" / "targets.json").read_text())
    by_kernels = {target["id"] for target in targets if not target["id"].startswith("dense_router_grad")}  # XLA's
    assert set(TAKEN_BY_AN_H100) >= by_kernels


class Draw:
    """Random sizes of every op, as large as the kernels take."""

    def __init__(self, device):
        self._rng = np.random.default_rng(13)
        self._max_select_k = 8192 if device["shared_bytes"] >= 163 * 1024 else 4096

    def _size(self, most):
        """From 1 to `most`, in equal ratios; half of them beside powers of two, where thresholds lie."""
        if self._rng.random() < 0.5:
            return round(most ** self._rng.random())
        power = 2 ** int(self._rng.integers(most.bit_length()))
        return min(max(power + int(self._rng.integers(-1, 2)), 1), most)

    def _flag(self):
        return bool(self._rng.integers(2))

    def _dtype(self):
        return DTYPES[self._rng.integers(3)]

    def activation_topk(self):
        num_groups, experts = 1, self._size(4096)
        if self._flag():
            num_groups = self._size(64)
            experts = num_groups * self._size(4096 // num_groups)
        k = min(self._size(64), experts)
        sizes = {"rows": self._size(2**20), "experts": experts, "k": k, "num_groups": num_groups}
        return sizes | {"bias": self._flag(), "dtype": self._dtype()}

    def dense_router(self):
        sizes = self.activation_topk() | {"hidden": self._size(16384)}
        is_mixed = sizes["dtype"] == "bf16" and self._flag()
        return sizes | ({"weight_dtype": "f32"} if is_mixed else {})

    def topk_select(self):
        length = self._size(2**22)
        k = min(self._size(self._max_select_k), length)
        sizes = {"rows": self._size(2**17), "length": length, "k": k}
        return sizes | {"sorted": self._flag(), "dtype": self._dtype()}

    def expert_counts(self):
        sizes = {"tokens": self._size(2**20), "k": self._size(64), "experts": self._size(4096)}
        return sizes | ({"batch": self._size(64)} if self._flag() else {})

    def expert_dispatch(self):
        return self.expert_counts() | ({"align": self._size(256)} if self._flag() else {})

    def _moved(self):
        sizes = {"tokens": self._size(2**17), "k": self._size(64), "hidden": self._size(2**15), "dtype": self._dtype()}
        sizes |= {"batch": self._size(64)} if self._flag() else {}
        return sizes | ({"slots": self._size(2**20)} if self._flag() else {})

    def permute(self):
        sizes = self._moved()
        return sizes | ({"weights": True} if self._flag() else {"element_bytes": int(2 ** self._rng.integers(3))})

    combine = permute_cotangent = combine_cotangent = _moved

    def hash_router(self):
        return {"rows": self._size(2**20), "k": self._size(64)}

    def route_at(self):
        sizes = {"rows": self._size(2**20), "experts": self._size(4096), "k": self._size(64)}
        return sizes | {"whole_row": self._flag(), "dtype": self._dtype()}

    def route_cotangent(self):
        if self._flag():  # the gradient of topk_select
            length = self._size(2**17)
            k = min(self._size(self._max_select_k), length)
            return {"rows": self._size(2**14), "experts": length, "k": k, "identity": True, "dtype": self._dtype()}
        return self.route_at()

    def routed_cotangent(self):
        return {"rows": self._size(2**20), "experts": self._size(4096), "k": self._size(64)}

    def routed_gradients(self):
        return self.routed_cotangent() | {"hidden": self._size(2**15)}


OPS = [name for name in vars(Draw) if not name.startswith("_")]
COMPOSED = ("dense_router", "routed_gradients")


@functools.cache
def answers(op, device_name):
    """Many sizes: each with the chosen plan, all plans, and what these need."""
    device = DEVICES[device_name]
    draw = getattr(Draw(device), op)
    drawn = [draw() for _ in range(1500)]
    return [(sizes, *CUDA.plans(op, device, **sizes), CUDA.needs(op, device, **sizes)) for sizes in drawn]


over_all = pytest.mark.parametrize(("op", "device_name"), [(op, name) for op in OPS for name in DEVICES])


def test_every_op_with_plans_is_drawn():
    assert {*OPS, "scored_hash_router"} == set(CUDA.targets())
    for op in OPS:
        assert CUDA.instances(op, H100)


@over_all
def test_the_chosen_plan_is_one_of_all(op, device_name):
    for sizes, chosen, plans, _ in answers(op, device_name):
        assert chosen is None or chosen in plans, sizes


@over_all
def test_a_name_has_one_plan(op, device_name):
    for sizes, _, plans, _ in answers(op, device_name):
        assert len(set(plans)) == len(plans), sizes


@over_all
def test_plans_are_of_known_kernels(op, device_name):
    kernels = set(CUDA.instances(op, DEVICES[device_name]))
    for sizes, _, plans, _ in answers(op, device_name):
        assert kernels.issuperset(plan.split(",")[0] for plan in plans), sizes


@pytest.mark.parametrize("device_name", DEVICES)
@pytest.mark.parametrize("op", [op for op in OPS if op not in COMPOSED])  # which other kernels can compute, too
def test_there_is_a_plan_wherever_the_kernels_are_said_to_be(op, device_name):
    for sizes, chosen, _, _ in answers(op, device_name):
        assert chosen is not None, sizes


@over_all
def test_no_plan_needs_more_than_the_device_has(op, device_name):
    device = DEVICES[device_name]
    capability, multiprocessors = device["compute_capability"], device["multiprocessors"]
    is_whole = capability in (90, 100) and multiprocessors >= 132
    most_blocks = 1 if capability < 90 else 16 if is_whole else 8
    for sizes, _, plans, needs in answers(op, device_name):
        assert set(needs) == set(plans), sizes
        for plan, (shared_bytes, cluster_blocks, is_for_hopper, blocks) in needs.items():
            assert 0 <= shared_bytes <= device["shared_bytes"], (plan, sizes)
            assert 1 <= cluster_blocks <= min(most_blocks, multiprocessors), (plan, sizes)
            assert 0 <= blocks < 2**31, (plan, sizes)
            assert blocks % cluster_blocks == 0, (plan, sizes)
            assert not is_for_hopper or capability == 90, (plan, sizes)


@pytest.mark.parametrize(
    ("op", "most_blocks"), [("topk_select", 16), ("expert_dispatch", 16), ("expert_counts", 16), ("dense_router", 8)]
)
def test_an_h100_has_clusters_and_kernels_of_its_own(op, most_blocks):
    """So that the test above has something to see."""
    needs = [need for *_, all_needs in answers(op, "H100") for need in all_needs.values()]
    assert max(cluster_blocks for _, cluster_blocks, *_ in needs) == most_blocks
    assert any(is_for_hopper for _, _, is_for_hopper, _ in needs) == (op == "dense_router")


# GPUs with clusters, and how many groups (GPCs) their multiprocessors lie in at most, by data sheets.
GROUPS = {
    "H100": (H100, 8),
    "H100 PCIe": (DEVICES["H100 PCIe"], 8),
    "H20": (described(90, 78, 227), 8),
    "half of an H100": (DEVICES["half of an H100"], 4),
    "a seventh of an H100": (DEVICES["a seventh of an H100"], 1),
    "B200": (DEVICES["B200"], 8),
    "a seventh of a B200": (DEVICES["a seventh of a B200"], 1),
    "Jetson Thor": (described(110, 20, 227), 3),
    "RTX 5090": (DEVICES["RTX 5090"], 12),
    "RTX 5060": (described(120, 30, 99), 3),
    "RTX 5050": (described(120, 20, 99), 2),
    "DGX Spark": (described(121, 48, 99), 6),
}


@pytest.mark.parametrize("name", GROUPS)
def test_a_cluster_fits_into_a_group_of_multiprocessors(name):
    """It lies in one group, and each of its blocks may fill a multiprocessor. A group has them in pairs."""
    device, groups = GROUPS[name]
    largest = 2 * math.ceil(device["multiprocessors"] / (2 * groups))
    for op, sizes in {
        "topk_select": {"rows": 1, "length": 2**20, "k": 512, "dtype": "f32"},
        "expert_dispatch": {"tokens": 2**16, "k": 8, "experts": 256},
        "expert_counts": {"tokens": 2**20, "k": 8, "experts": 256},
        "dense_router": {"rows": 4096, "experts": 256, "k": 8, "hidden": 4096, "dtype": "bf16"},
    }.items():
        clusters = [blocks for _, blocks, *_ in CUDA.needs(op, device, **sizes).values()]
        assert op == "dense_router" or max(clusters) > 1
        assert max(clusters, default=1) <= largest, op


@pytest.mark.parametrize("op", ["activation_topk", "topk_select", "permute", "combine_cotangent"])
@pytest.mark.parametrize("device", [described(80, 108, 163), described(90, 132, 227), described(100, 148, 227)])
def test_twice_the_multiprocessors_take_twice_the_rows_alike(op, device):
    draw = getattr(Draw(device), op)
    twice = device | {"multiprocessors": 2 * device["multiprocessors"]}
    for _ in range(1500):
        sizes = draw()
        rows = "rows" if "rows" in sizes else "tokens"
        sizes[rows] = 8 * sizes[rows]  # whole blocks of tokens
        more = sizes | {name: 2 * sizes[name] for name in (rows, "slots") if name in sizes}
        assert CUDA.plans(op, device, **sizes)[0] == CUDA.plans(op, twice, **more)[0], sizes


def lanes_of_row(plan):
    return 64 if "shared memory" in plan else int(re.search(r"(?:tile|block of) (\d+)", plan)[1])


def blocks_of_row(plan):
    return int(match[1]) if (match := re.search(r"(\d+) blocks a row", plan)) else 1


# How finely a plan shares out its work.
FINENESS = {
    "activation_topk": lanes_of_row,
    "topk_select": blocks_of_row,
    "permute": lambda plan: 0 if plan.endswith("of a slot") else -int(plan.rpartition("x")[2]),
    "combine_cotangent": lambda plan: plan.endswith("of a choice"),
}


@pytest.mark.parametrize("op", FINENESS)
@pytest.mark.parametrize("device", [DEVICES["A100"], DEVICES["B200"]])
def test_more_multiprocessors_share_out_more_finely(op, device):
    draw = getattr(Draw(device), op)
    for _ in range(150):
        sizes = draw()
        if op == "topk_select":
            sizes["length"] += 8192  # registers hold no such row
        plans = [CUDA.plans(op, device | {"multiprocessors": n}, **sizes)[0] for n in range(14, 200, 3)]
        fineness = [FINENESS[op](plan) for plan in plans]
        assert fineness == sorted(fineness), (sizes, plans)


@pytest.mark.parametrize("device", [DEVICES["A100"], DEVICES["B200"]])
def test_dense_router_of_few_tokens_pays_from_some_number_of_multiprocessors_on(device):
    draw = Draw(device).dense_router
    some_pay = False
    for _ in range(150):
        sizes = draw()
        sizes["rows"] = sizes["rows"] % 128 + 1
        pays = [CUDA.pays("dense_router", device | {"multiprocessors": n}, **sizes) for n in range(14, 200, 3)]
        assert pays == sorted(pays), sizes
        some_pay |= len(set(pays)) == 2
    assert some_pay


def test_only_what_has_matrix_products_may_not_pay():
    unfused = {"rows": 65536, "hidden": 4096, "experts": 256, "k": 6, "dtype": "bf16"}
    assert CUDA.plans("dense_router", H100, **unfused)[0] is not None
    assert not CUDA.pays("dense_router", H100, **unfused)
    few = {"rows": 512, "hidden": 2048, "experts": 128, "k": 8}
    assert CUDA.plans("routed_gradients", H100, **few)[0] is not None
    assert not CUDA.pays("routed_gradients", H100, **few)
    assert CUDA.pays("routed_gradients", H100, **few | {"rows": 8192})
    for op in set(OPS) - {*COMPOSED}:
        assert all(CUDA.pays(op, H100, **sizes) for sizes, *_ in answers(op, "H100")[:100])


@pytest.mark.parametrize("size", ["rows", "hidden", "experts", "k"])
def test_no_kernel_finds_gradients_of_nothing(size):
    sizes = {"rows": 8192, "hidden": 2048, "experts": 128, "k": 8} | {size: 0}
    assert CUDA.plans("routed_gradients", H100, **sizes) == (None, [])
    assert not CUDA.pays("routed_gradients", H100, **sizes)


@pytest.mark.parametrize("op", OPS)
def test_no_rows_are_no_harm(op):
    for sizes, *_ in answers(op, "H100")[:300]:
        for name in {"rows", "tokens", "batch"} & {*sizes}:
            CUDA.plans(op, H100, **(sizes | {name: 0}))


@pytest.mark.parametrize("op", OPS)
def test_no_plan_has_more_blocks_than_a_grid(op):
    for sizes, *_ in answers(op, "H100")[:300]:
        many = sizes | dict.fromkeys({"rows", "batch"} & {*sizes}, 2**36)
        for plan, (*_, blocks) in CUDA.needs(op, H100, **many).items():
            assert 0 <= blocks < 2**31, (plan, many)


@pytest.mark.parametrize("tokens", [64, 4096, 2**20])
@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("op", [jax_router.expert_dispatch, jax_router.expert_counts])
def test_an_exported_program_has_memory_for_every_gpu(op, batch, tokens):
    """Which the devices of the exporting process may not need: one cluster of theirs may hold the whole sort."""
    ids = jax.ShapeDtypeStruct((batch, tokens, 8), jnp.int32)
    safe = [jax.export.DisabledSafetyCheck.custom_call(target) for target in jax_router.custom_call_targets()]
    program = jax.jit(jax.vmap(functools.partial(op, num_experts=256)))
    text = jax.export.export(program, platforms=("cuda",), disabled_checks=safe)(ids).mlir_module()
    (shape,) = re.findall(r"-> .*tensor<([0-9x]+)xui8>", text)
    nbytes = math.prod(map(int, shape.split("x")))
    for name, device in DEVICES.items():
        sizes = {"batch": batch, "tokens": tokens, "k": 8, "experts": 256}
        assert nbytes >= CUDA.workspace_bytes(op.__name__, device, **sizes), name


def test_sizes_are_checked():
    with pytest.raises(ValueError, match="no op is called softmax"):
        CUDA.plans("softmax", H100, rows=1)
    with pytest.raises(ValueError, match="missing size: k"):
        CUDA.plans("hash_router", H100, rows=1)
    with pytest.raises(ValueError, match="sizes that the op does not have"):
        CUDA.plans("hash_router", H100, rows=1, k=1, experts=8)


ROWS = {"rows": 2, "length": 4096, "k": 100, "sorted": True, "dtype": "f32"}


def test_a_forced_plan_is_taken_until_the_end_of_the_block():
    free, plans = CUDA.plans("topk_select", H100, **ROWS)
    other = next(plan for plan in plans if plan != free)
    with _native.forced_plan("topk_select", other):
        assert CUDA.plans("topk_select", H100, **ROWS) == (other, plans)
    assert CUDA.plans("topk_select", H100, **ROWS)[0] == free


def test_a_forced_plan_is_undone_after_an_error():
    free, plans = CUDA.plans("topk_select", H100, **ROWS)
    with pytest.raises(KeyError), _native.forced_plan("topk_select", plans[-1]):
        raise KeyError
    assert CUDA.plans("topk_select", H100, **ROWS)[0] == free


def test_a_forced_plan_that_is_impossible_leaves_none():
    dense = {"rows": 64, "hidden": 4096, "experts": 256, "k": 6, "dtype": "bf16"}
    assert CUDA.pays("dense_router", H100, **dense)
    for op, sizes in (("topk_select", ROWS), ("dense_router", dense)):
        with _native.forced_plan(op, "no such plan"):
            assert CUDA.plans(op, H100, **sizes)[0] is None
            assert not CUDA.pays(op, H100, **sizes)


def test_an_unknown_op_cannot_be_forced():
    with pytest.raises(ValueError, match="no op is called softmax"), _native.forced_plan("softmax", "f32"):
        pass


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="launches kernels")
def test_a_launch_takes_the_forced_plan_or_fails():
    select = jax.jit(functools.partial(jax_router.topk_select, k=100, implementation="native"))
    scores = jax.random.normal(jax.random.key(0), (2, 4096), jnp.float32)
    want = jax.block_until_ready(select(scores))
    for plan in CUDA.plans("topk_select", **ROWS)[1]:
        with _native.forced_plan("topk_select", plan):
            for got, wanted in zip(select(scores), want):
                np.testing.assert_array_equal(got, wanted)
    with _native.forced_plan("topk_select", "no such plan"), pytest.raises(Exception, match="jax_router"):
        jax.block_until_ready(select(scores))
    jax.block_until_ready(select(scores))
