"""Presets and config.json: every model's router against one that is written from its formula, in float64."""

import functools
import json
import re
from dataclasses import fields, replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jax_router
import matrix
from jax_router import Router, RouterConfig, models
from jax_router._show_presets import markdown

TOKENS, HIDDEN, VOCABULARY = 64, 16, 500
PRESETS = jax_router.presets()
HASH_LAYERS = [name for name in PRESETS if models.preset(name).layers.hashed]


# The formulas that models publish, each as one reads it. z: logits, b: selection bias, all float64.


def best(keys, k):
    return np.argsort(-keys, axis=-1, kind="stable")[:, :k]


def at(values, ids):
    return np.take_along_axis(values, ids, -1)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def softmax(z):
    exps = np.exp(z - z.max(-1, keepdims=True))
    return exps / exps.sum(-1, keepdims=True)


def eligible(keys, row):
    """Keys, -inf outside of the best groups."""
    groups = row["num_groups"]
    grouped = keys.reshape(len(keys), groups, -1)
    ordered = np.sort(grouped, -1)
    group_score = ordered[..., -1] + (ordered[..., -2] if row["group_score"] == "top2_sum" else 0)
    keep = np.zeros((len(keys), groups), bool)
    np.put_along_axis(keep, best(group_score, row["top_groups"]), True, -1)
    return np.where(keep[..., None], grouped, -np.inf).reshape(keys.shape)


def biased_scores(score):
    def route(z, b, row, ids=None):
        s = score(z)
        keys = s + b
        keys = eligible(keys, row) if "num_groups" in row else keys
        ids = best(keys, row["top_k"]) if ids is None else ids
        w = at(s, ids)
        if row["renormalize"]:
            w = w / (w.sum(-1, keepdims=True) + row.get("eps", 1e-20))
        return w * row["scale"], ids, keys

    return route


def softmax_all_renorm(z, b, row):
    p = softmax(z)
    ids = best(z, row["top_k"])
    return at(p, ids) / at(p, ids).sum(-1, keepdims=True) * row["scale"], ids, z


def softmax_all(z, b, row):
    p = softmax(z)
    keys = eligible(p, row) if "num_groups" in row else z
    ids = best(keys, row["top_k"])
    return at(p, ids) * row["scale"], ids, keys


def softmax_chosen(z, b, row):
    ids = best(z, row["top_k"])
    return softmax(at(z, ids)) * row["scale"], ids, z


def softmax_bias(z, b, row):
    p = softmax(z)
    ids = best(p + b, row["top_k"])
    w = at(p, ids)
    w = w / np.maximum(w.sum(-1, keepdims=True), 1e-12) if row["renormalize"] else w
    return w * row["scale"], ids, p + b


def sigmoid_plain(z, b, row):
    ids = best(z, row["top_k"])
    w = at(sigmoid(z), ids)
    return (w / w.sum(-1, keepdims=True) if row["renormalize"] else w) * row["scale"], ids, z


def kolibri(z, b, row):
    ids = best(z + b, row["top_k"])
    return at(sigmoid(z), ids), ids, z + b


PROGRAMS = {
    "sigmoid_bias": biased_scores(sigmoid),
    "sqrtsoftplus_bias": biased_scores(lambda z: np.sqrt(np.log1p(np.exp(z)))),
    "softmax_all_renorm": softmax_all_renorm,
    "softmax_all": softmax_all,
    "softmax_chosen": softmax_chosen,
    "softmax_bias": softmax_bias,
    "sigmoid_plain": sigmoid_plain,
    "special": kolibri,
}


class Inputs:
    """Of E experts: hidden states and weights whose logits f32 holds exactly, and what else routers have."""

    def __init__(self, num_experts, top_k, seed=0):
        rng = np.random.default_rng(seed)
        self.x = rng.integers(-16, 17, (TOKENS, HIDDEN)).astype(np.float32) / 8
        self.weight = rng.integers(-64, 65, (num_experts, HIDDEN)).astype(np.float32) / 64
        self.bias = rng.normal(0, 0.1, num_experts).astype(np.float32)
        self.logit_bias = rng.integers(-64, 65, num_experts).astype(np.float32) / 64
        self.per_expert_scale = rng.uniform(0.5, 2, num_experts).astype(np.float32)
        self.hash_lut = rng.permuted(np.tile(np.arange(num_experts), (VOCABULARY, 1)), axis=1)[:, :top_k].astype(
            np.int32
        )
        self.token_ids = rng.integers(0, VOCABULARY, TOKENS).astype(np.int32)
        self.logits = self.x.astype(np.float64) @ self.weight.astype(np.float64).T


def expected(name, inputs, hashed=False):
    """Weights, ids, and whether a token's keys are far enough from each other for f32 to order them."""
    row = models.preset(name).router
    z = inputs.logits + (inputs.logit_bias.astype(np.float64) if row.get("logit_bias") else 0)
    z = z * row.get("logit_scale", 1)
    if "softcap" in row:
        z = row["softcap"] * np.tanh(z / row["softcap"])
    route = PROGRAMS[models.preset(name).program]
    bias = inputs.bias.astype(np.float64)
    if hashed:
        return *route(z, bias, row, ids=inputs.hash_lut[inputs.token_ids])[:2], np.ones(TOKENS, bool)
    weights, ids, keys = route(z, bias, row)
    ordered = -np.sort(-keys, -1)[:, : row["top_k"] + 1]
    gaps = -np.diff(ordered)
    exact_ties = gaps == 0 if keys is z else np.zeros_like(gaps, bool)
    clear = ((gaps > 2e-6) | exact_ties | np.isnan(gaps)).all(-1)
    if row.get("per_expert_scale"):
        weights = weights * inputs.per_expert_scale.astype(np.float64)[ids]
    return weights, ids, clear


@functools.cache
def routed(config):
    """What a Router of a configuration gives; models that differ in their hidden size alone share it."""
    inputs = Inputs(config.num_experts, config.top_k)
    router = Router(config, rngs=nnx.Rngs(0), weight_init=lambda *_: jnp.asarray(inputs.weight))
    for name in ("bias", "logit_bias", "per_expert_scale", "hash_lut"):
        if hasattr(router, name):
            getattr(router, name)[...] = jnp.asarray(getattr(inputs, name))
    token_ids = jnp.asarray(inputs.token_ids)
    return nnx.jit(lambda router, x: router(x, token_ids=token_ids))(router, jnp.asarray(inputs.x))


def check(name, layer, implementation):
    config = RouterConfig.from_preset(name, layer)
    hashed = config.mode == "hash"
    small = {"hidden_size": HIDDEN, "implementation": implementation, **({"vocab_size": VOCABULARY} if hashed else {})}
    weights, ids = routed(replace(config, **small))
    want_weights, want_ids, clear = expected(name, Inputs(config.num_experts, config.top_k), hashed)
    assert clear.mean() > 0.5
    np.testing.assert_array_equal(np.asarray(ids)[clear], want_ids[clear])
    np.testing.assert_allclose(np.asarray(weights)[clear], want_weights[clear], rtol=1e-5)


@pytest.mark.parametrize("name", PRESETS)
def test_routes_as_the_model_does(name, implementation):
    check(name, None, implementation if models.preset(name).router["num_experts"] <= 4096 else "reference")


@pytest.mark.parametrize("name", HASH_LAYERS)
def test_hash_layers_route_as_the_model_does(name, implementation):
    check(name, 0, implementation)


def test_all_rows_that_fit_are_presets():
    assert len(models.all_presets()) == 87
    assert len(PRESETS) == 81
    assert HASH_LAYERS == ["deepseek_v4_flash", "deepseek_v4_pro"]
    assert "phi_3_5_moe" not in PRESETS


def test_facts():
    """As the models' own files have them."""
    config = RouterConfig.from_preset("deepseek_v3")
    assert (config.num_experts, config.top_k, config.num_groups, config.top_groups, config.scale) == (256, 8, 8, 4, 2.5)
    config = RouterConfig.from_preset("gpt_oss_120b")
    assert (config.num_experts, config.top_k, config.logit_bias, config.selection_bias) == (128, 4, True, False)
    config = RouterConfig.from_preset("longcat_flash")
    assert (config.num_experts, config.num_null_experts, config.num_real_experts) == (768, 256, 512)
    assert RouterConfig.from_preset("lfm2_8b_a1b").eps == 1e-6
    assert RouterConfig.from_preset("minimax_m2").eps == 0
    assert RouterConfig.from_preset("grok_1").softcap == 30
    flash = RouterConfig.from_preset("deepseek_v4_flash")
    assert RouterConfig.from_preset("deepseek_v4_flash", layer=3) == flash
    first = RouterConfig.from_preset("deepseek_v4_flash", layer=2)
    assert (first.mode, first.hash_weights, first.vocab_size) == ("hash", "scored", 129280)


def says(words):
    return ".*".join(words.split())


@pytest.mark.parametrize(
    ("name", "layer", "words"),
    [
        ("deepseek_v3", 2, "layer 2 deepseek_v3 no router 61 layers 3-60"),
        ("deepseek_v3", 61, "layer 61 no router"),
        ("llama4_maverick", 4, "layer 4 no router 1, 3, 5, ..., 47"),
        ("kolibri_1", 0, "layer 0 no router dense 0"),
        ("phi_3_5_moe", None, "phi_3_5_moe no RouterConfig sparsemixer"),
        ("gigachat_3_5", None, "gigachat_3_5 from_hf_config"),
        ("DeepSeek-V3.2", None, "name presets 'DeepSeek-V3.2' near deepseek_v3_2"),
        (["mixtral_8x7b"], None, "name presets ['mixtral_8x7b'] near mixtral_8x7b"),
    ],
)
def test_no_router(name, layer, words):
    with pytest.raises(ValueError, match=says(words)):
        RouterConfig.from_preset(name, layer)


def test_a_layer_is_an_int():
    with pytest.raises(TypeError, match="layer must be"):
        RouterConfig.from_preset("deepseek_v3", "3")


def test_rows_are_whole():
    """Every row says the same things, has its sources, and options that RouterConfig has."""
    known = {field.name for field in fields(RouterConfig)}
    for row in models.all_presets().values():
        assert row.sources or row.unverified, row.name
        assert row.program in models.programs(), row.name
        assert (row.router is None) <= bool(row.missing), row.name
        assert set(row.router or ()) <= known, row.name
        if row.router and not row.missing and "weight" not in row.tensors:
            assert "tensor names" in " ".join(row.unverified), row.name
        if row.router and row.tensors:
            config = RouterConfig.from_preset(row.name) if not row.missing else None
            assert config is None or config.logit_bias == ("logit_bias" in row.tensors), row.name


# config.json of fine-tunes with other sizes, with the field names of their families.
CONFIGS = {
    "deepseek_v3": (
        {"hidden_size": 64, "n_routed_experts": 32, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2}
        | {"routed_scaling_factor": 1.5, "norm_topk_prob": True, "num_hidden_layers": 6, "first_k_dense_replace": 2}
        | {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1},
        RouterConfig(64, 32, 4, score_fn="sigmoid", num_groups=4, top_groups=2, scale=1.5),
        range(2, 6),
    ),
    "deepseek_v2": (
        {"hidden_size": 64, "n_routed_experts": 16, "num_experts_per_tok": 2, "n_group": 4, "topk_group": 2}
        | {"routed_scaling_factor": 1.0, "norm_topk_prob": False, "num_hidden_layers": 3, "topk_method": "greedy"}
        | {"first_k_dense_replace": 1},
        RouterConfig(64, 16, 2, score_fn="softmax", renormalize=False, selection_bias=False),
        range(1, 3),
    ),
    "kimi_linear": (
        {"hidden_size": 64, "num_experts": 16, "num_experts_per_token": 2, "num_expert_group": 1, "topk_group": 1}
        | {"routed_scaling_factor": 2.0, "moe_renormalize": True, "num_hidden_layers": 3}
        | {"moe_router_activation_func": "sigmoid", "first_k_dense_replace": 1},
        RouterConfig(64, 16, 2, score_fn="sigmoid", scale=2.0),
        range(1, 3),
    ),
    "longcat_flash": (
        {"hidden_size": 64, "n_routed_experts": 12, "zero_expert_num": 4, "moe_topk": 3, "num_layers": 2}
        | {"routed_scaling_factor": 3.0},
        RouterConfig(64, 16, 3, score_fn="softmax", renormalize=False, scale=3.0, num_null_experts=4),
        None,
    ),
    "qwen3_moe": (
        {"hidden_size": 64, "num_experts": 24, "num_experts_per_tok": 3, "norm_topk_prob": False}
        | {"num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]},
        RouterConfig(64, 24, 3, score_fn="softmax", renormalize=False, selection_bias=False),
        [1, 5],
    ),
    "qwen3_5_moe": (
        {"text_config": {"model_type": "qwen3_5_moe_text", "hidden_size": 64, "num_experts": 24}
         | {"num_experts_per_tok": 3, "num_hidden_layers": 2}, "hidden_size": 7},
        RouterConfig(64, 24, 3, score_fn="softmax", selection_bias=False),
        None,
    ),
    "dbrx": (
        {"d_model": 64, "n_layers": 2, "ffn_config": {"moe_num_experts": 8, "moe_top_k": 2, "ffn_hidden_size": 9}},
        RouterConfig(64, 8, 2, score_fn="softmax", selection_bias=False),
        None,
    ),
    "llama4": (
        {"text_config": {"model_type": "llama4_text", "hidden_size": 64, "num_local_experts": 8}
         | {"num_experts_per_tok": 1, "num_hidden_layers": 4, "interleave_moe_layer_step": 2}},
        RouterConfig(64, 8, 1, score_fn="sigmoid", renormalize=False, selection_bias=False),
        [1, 3],
    ),
    "ernie4_5_moe": (
        {"hidden_size": 64, "moe_num_experts": 8, "moe_k": 2, "num_hidden_layers": 4, "moe_layer_start_index": 1}
        | {"moe_layer_end_index": -1, "moe_layer_interval": 1},
        RouterConfig(64, 8, 2, score_fn="softmax"),
        range(1, 4),
    ),
    "jamba": (
        {"hidden_size": 64, "num_experts": 8, "num_experts_per_tok": 2, "num_hidden_layers": 4}
        | {"expert_layer_period": 2, "expert_layer_offset": 1},
        RouterConfig(64, 8, 2, score_fn="softmax", renormalize=False, selection_bias=False),
        [1, 3],
    ),
    "nemotron_h": (
        {"hidden_size": 64, "n_routed_experts": 8, "num_experts_per_tok": 2, "num_hidden_layers": 5}
        | {"hybrid_override_pattern": "MEM*E", "routed_scaling_factor": 5.0, "n_group": 1, "topk_group": 1}
        | {"norm_topk_prob": True},
        RouterConfig(64, 8, 2, score_fn="sigmoid", scale=5.0),
        [1, 4],
    ),
    "step3p7": (
        {"hidden_size": 64, "moe_num_experts": 8, "moe_top_k": 2, "num_hidden_layers": 4}
        | {"moe_layers_enum": "1,3", "moe_router_scaling_factor": 3.0},
        RouterConfig(64, 8, 2, score_fn="sigmoid", scale=3.0, eps=0.0),
        [1, 3],
    ),
    "laguna": (
        {"hidden_size": 64, "num_experts": 8, "num_experts_per_tok": 2, "num_hidden_layers": 2}
        | {"moe_router_logit_softcapping": 20.0, "mlp_layer_types": ["dense", "sparse"]},
        RouterConfig(64, 8, 2, score_fn="sigmoid", eps=0.0, softcap=20.0),
        [1],
    ),
    "mimo_v2_flash": (
        {"hidden_size": 64, "n_routed_experts": 8, "num_experts_per_tok": 2, "num_hidden_layers": 3}
        | {"routed_scaling_factor": None, "n_group": None, "moe_layer_freq": [0, 1, 1]},
        RouterConfig(64, 8, 2, score_fn="sigmoid"),
        [1, 2],
    ),
}  # fmt: skip


@pytest.mark.parametrize("model_type", CONFIGS)
def test_config_json(model_type, tmp_path):
    """From what is in it, from the file and from its folder; and which layers have routers."""
    content, want, with_router = CONFIGS[model_type]
    content = {"model_type": model_type, **content}
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert RouterConfig.from_hf_config(content) == want
    assert RouterConfig.from_hf_config(tmp_path) == RouterConfig.from_hf_config(str(tmp_path / "config.json")) == want
    for layer in range(7) if with_router is not None else ():
        if layer in with_router:
            assert RouterConfig.from_hf_config(content, layer) == want
        else:
            with pytest.raises(ValueError, match=f"layer {layer} of this {model_type} model has no router"):
                RouterConfig.from_hf_config(content, layer)


V4 = {
    "model_type": "deepseek_v4",
    "hidden_size": 64,
    "n_routed_experts": 16,
    "num_experts_per_tok": 2,
    "vocab_size": 99,
    "routed_scaling_factor": 1.5,
    "norm_topk_prob": True,
    "num_hidden_layers": 4,
}


@pytest.mark.parametrize("said", [{"num_hash_layers": 2}, {"mlp_layer_types": ["hash_moe", "hash_moe", "moe", "moe"]}])
def test_hash_layers_of_a_config_json(said):
    dense = RouterConfig(64, 16, 2, scale=1.5)
    hashed = RouterConfig(64, 16, 2, scale=1.5, mode="hash", vocab_size=99, hash_weights="scored", selection_bias=False)
    got = [RouterConfig.from_hf_config(V4 | said, layer) for layer in range(4)]
    assert got == [hashed, hashed, dense, dense]


def test_a_list_of_experts_a_layer():
    """Hunyuan's configuration has one value a layer."""
    content = {"model_type": "hunyuan_v1_moe", "hidden_size": 64, "num_hidden_layers": 2, "num_experts": 16}
    assert RouterConfig.from_hf_config(content | {"moe_topk": [2, 2]}).top_k == 2
    assert RouterConfig.from_hf_config(content | {"moe_topk": [2, 4]}, layer=1).top_k == 4
    with pytest.raises(ValueError, match=says("layer between 0 and 1 moe_topk")):
        RouterConfig.from_hf_config(content | {"moe_topk": [2, 4]})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"model_type": "bert"}, "model_type deepseek_v3, .* zaya; got 'bert'"),
        ({}, "model_type deepseek_v3, got None"),
        ({"model_type": "phimoe"}, "phi_3_5_moe sparsemixer"),
        ({"model_type": "qwen3_moe", "hidden_size": 8}, "lacks 'qwen3_moe' num_local_experts num_experts"),
        ({"model_type": "mixtral", "hidden_size": 8, "num_local_experts": 8.5}, "num_experts int 8.5"),
    ],
)
def test_wrong_config_json(content, words):
    with pytest.raises((ValueError, TypeError), match=says(words)):
        RouterConfig.from_hf_config(content)


MIXTRAL = {"model_type": "mixtral", "hidden_size": 8, "num_local_experts": 8, "num_experts_per_tok": 2}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_hidden_layers": "6"}, "num_hidden_layers of config must be a Python int .*, got '6'"),
        ({"num_hidden_layers": -1}, "num_hidden_layers of config must be at least 0, got -1"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step of config must say whether layer 0 has experts, got 0"),
        ({"first_k_dense_replace": "2"}, "first_k_dense_replace of config must say whether layer 0 .* got '2'"),
        ({"moe_layer_freq": [0, 1]}, r"moe_layer_freq of config must say whether layer 2 has experts, got \[0, 1\]"),
        ({"mlp_only_layers": 3}, "mlp_only_layers of config must say"),
        ({"moe_layers_enum": "1,,3"}, "moe_layers_enum of config must say whether layer 0 has experts, got '1,,3'"),
        ({"mlp_layer_types": 3}, "mlp_layer_types of config must be a list of strings"),
        ({"layers_block_type": [["moe"]]}, "layers_block_type of config must be a list of strings"),
        ({"num_hash_layers": 1.5}, "num_hash_layers of config must be a Python int .*, got 1.5"),
        ({"num_local_experts": []}, "num_local_experts of config must be a number or a list"),
        ({"num_local_experts": [[8], [9]]}, "layer must be between 0 and 1, .* got 3"),
        ({"num_local_experts": {"a": 8}}, "num_experts must be a Python int"),
        ({"hidden_size": None}, "config lacks .* hidden_size or d_model"),
        ({"zero_expert_num": "4"}, "num_null_experts of config must be a Python int .*, got '4'"),
        ({"hidden_size": 0}, "hidden_size must be at least 1, got 0"),
        ({"n_group": 3, "topk_group": 1}, "num_groups must"),
        ({"model_type": ["mixtral"]}, "model_type of config must be one of"),
    ],
)
def test_wrong_fields_of_a_config_json(fields, words):
    """Each is an error that names the field, or the option, and what it got; none is an error of the arithmetic."""
    with pytest.raises((ValueError, TypeError), match=words):
        RouterConfig.from_hf_config({**MIXTRAL, "num_hidden_layers": 4, **fields}, layer=3)


def test_null_in_a_config_json():
    """Null is what a field is worth that is not there; another name of the same may still have the value."""
    want = RouterConfig.from_hf_config(MIXTRAL)
    nulls = dict.fromkeys(["num_hidden_layers", "n_routed_experts", "norm_topk_prob", "scoring_func", "text_config"])
    nulls |= dict.fromkeys(["first_k_dense_replace", "num_hash_layers", "vocab_size", "zero_expert_num"])
    assert RouterConfig.from_hf_config({**MIXTRAL, **nulls}) == want
    assert RouterConfig.from_hf_config({**MIXTRAL, **nulls}, layer=3) == want


@pytest.mark.parametrize("layer", ["3", 2.0, True, -1])
def test_a_layer_of_a_config_json_is_an_int(layer):
    with pytest.raises((TypeError, ValueError), match="layer must be"):
        RouterConfig.from_hf_config({**MIXTRAL, "moe_topk": [1, 2]}, layer)


def test_no_config_json():
    with pytest.raises(TypeError, match=r"config must be a path or a dict .* got <object"):
        RouterConfig.from_hf_config(object())


def test_unreadable_config_json(tmp_path):
    with pytest.raises(FileNotFoundError):
        RouterConfig.from_hf_config(tmp_path / "nowhere")
    for text in ("{", "[" * 99999):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match="JSON"):
            RouterConfig.from_hf_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="list"):
        RouterConfig.from_hf_config(tmp_path)


DOCUMENT = Path(__file__).parents[1] / "docs" / "models.md"


def test_documented_presets():
    """The table of the document is that of the presets; `pytest --write-docs` writes it."""
    text = DOCUMENT.read_text()
    head, table, tail = re.split(
        r"(?<=presets, written by tests -->\n\n)(.*?)(?=\n\n<!-- end -->)", text, flags=re.DOTALL
    )
    if matrix.writing:
        DOCUMENT.write_text(head + markdown() + tail)
    else:
        assert table == markdown(), "see pytest --write-docs"
