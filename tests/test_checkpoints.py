"""Routers from checkpoints: the names of families, what is read, what is wrong, and back."""

import ctypes
import json
import mmap
import os
import pickle
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors.numpy import save_file

import jax_router
from jax_router import HashTable, Router, RouterConfig, SelectionBias, models
from jax_router.checkpoints import CheckpointError

EXPERTS, HIDDEN, VOCABULARY = 16, 8, 30
SIGMOID = RouterConfig(HIDDEN, EXPERTS, 3, score_fn="sigmoid")
PLAIN = replace(SIGMOID, score_fn="softmax", selection_bias=False)
HASHED = RouterConfig(
    HIDDEN, EXPERTS, 3, mode="hash", vocab_size=VOCABULARY, hash_weights="scored", selection_bias=False
)
# Presets whose tensors' names are all known.
NAMED = [
    name
    for name in jax_router.presets()
    if "weight" in (tensors := models.preset(name).tensors)
    and ("bias" in tensors or not models.preset(name).router["selection_bias"])
]


def small(name, layer=None):
    """The configuration of a preset, with sizes that fit these files."""
    config = RouterConfig.from_preset(name, layer)
    groups = {"num_groups": 4, "top_groups": 2} if config.num_groups > 1 else {}
    hashed = {"vocab_size": VOCABULARY} if config.mode == "hash" else {}
    sizes = {"hidden_size": HIDDEN, "num_experts": EXPERTS, "top_k": 2, "num_null_experts": 0}
    return replace(config, **sizes, **groups, **hashed)


def arrays(config, seed=0):
    """Of each variable what a checkpoint may hold, the weight in bf16 and the table in int64."""
    rng = np.random.default_rng(seed)
    vectors = {name: rng.normal(0, 1, config.num_experts).astype(np.float32) for name in ("bias", "logit_bias")}
    return {
        "weight": rng.normal(0, 1, (config.num_experts, config.hidden_size)).astype(ml_dtypes.bfloat16),
        **vectors,
        "logit_bias": vectors["logit_bias"].astype(ml_dtypes.bfloat16),
        "per_expert_scale": rng.uniform(1, 2, config.num_experts).astype(ml_dtypes.bfloat16),
        "hash_lut": rng.integers(0, config.num_experts, (config.vocab_size or 1, config.top_k)),
    }


def variables(router):
    return {path[-1]: value[...] for path, value in nnx.to_flat_state(nnx.state(router))}


def assert_holds(router, values):
    for role, value in variables(router).items():
        np.testing.assert_array_equal(np.asarray(value, np.float32), np.asarray(values[role], np.float32), role)


def named(preset, config, values, layer, prefix=None):
    """Tensors by the names of a family; other ones before `layers.`, if asked."""
    tensors = {}
    for role, name in models.preset(preset).tensors.items():
        if role in variables(Router(config, rngs=nnx.Rngs(0))):
            name = name.format(i=layer)
            tensors[name if prefix is None else prefix + name[name.index("layers.") :]] = values[role]
    return tensors


@pytest.mark.parametrize("name", NAMED)
def test_names_of_every_family(name, tmp_path):
    """The router of layer 5, among two others and much else, with what comes before `layers.` or without it."""
    layer = next(i for i in (5, 7) if models.preset(name).layers.have_router(i))
    config = small(name, layer)
    values = arrays(config)
    tensors = named(name, config, values, layer) | named(name, config, arrays(config, 1), layer + 20)
    save_file(tensors | {"embed_tokens.weight": np.zeros((9, 9), np.float32)}, tmp_path / "model.safetensors")
    router = Router.from_checkpoint(tmp_path, config, layer)
    assert_holds(router, values)
    assert router.weight[...].dtype == router.config.param_dtype == jnp.bfloat16
    assert router.config == replace(config, param_dtype=jnp.bfloat16)
    if "layers." in next(iter(tensors)):
        for prefix in ("", "model.", "language_model.model.", "model.language_model."):
            assert_holds(Router.from_checkpoint(named(name, config, values, layer, prefix), config, layer), values)


def test_hash_layer_of_a_preset(tmp_path):
    """By the preset's own name, at its true sizes, from shards: layer 1 has a table, layer 3 a bias."""
    rng = np.random.default_rng(0)
    weight = rng.normal(0, 1, (256, 4096)).astype(ml_dtypes.bfloat16)
    table = rng.integers(0, 256, (129280, 6))
    bias = rng.normal(0, 1, 256).astype(np.float32)
    gate = "layers.{}.ffn.gate.{}".format
    shards = {
        "a.safetensors": {gate(1, "weight"): weight, gate(3, "bias"): bias},
        "b.safetensors": {gate(1, "tid2eid"): table, gate(3, "weight"): weight},
    }
    for shard, tensors in shards.items():
        save_file(tensors, tmp_path / shard)
    index = {"weight_map": {name: shard for shard, tensors in shards.items() for name in tensors}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for path in (tmp_path, tmp_path / "model.safetensors.index.json"):
        hashed = Router.from_checkpoint(path, "deepseek_v4_flash", layer=1)
        assert_holds(hashed, {"weight": weight, "hash_lut": table})
        assert hashed.hash_lut[...].dtype == jnp.int32
        assert_holds(Router.from_checkpoint(path, "deepseek_v4_flash", layer=3), {"weight": weight, "bias": bias})


def test_traps():
    """A gate that lies transposed, a bias of one row, and the two meanings of a bias beside a gate."""
    values = arrays(SIGMOID)
    ernie = {
        "model.layers.1.mlp.gate.weight": np.ascontiguousarray(values["weight"].T),
        "model.layers.1.mlp.moe_statics.e_score_correction_bias": values["bias"][None],
    }
    assert_holds(Router.from_checkpoint(ernie, SIGMOID, 1), values)
    gpt_oss = {
        "model.layers.1.mlp.router.weight": values["weight"],
        "model.layers.1.mlp.router.bias": values["logit_bias"],
    }
    router = Router.from_checkpoint(gpt_oss, replace(PLAIN, logit_bias=True))
    assert_holds(router, values)
    assert type(router.logit_bias) is nnx.Param
    v4 = {"layers.1.ffn.gate.weight": values["weight"], "layers.1.ffn.gate.bias": values["bias"]}
    assert type(Router.from_checkpoint(v4, SIGMOID).bias) is SelectionBias


def test_dtypes():
    values = arrays(SIGMOID)
    kept = Router.from_checkpoint(values_of(values, "weight", "bias"), SIGMOID)
    assert kept.weight[...].dtype == jnp.bfloat16
    cast = Router.from_checkpoint(values_of(values, "weight", "bias"), SIGMOID, dtype=jnp.float32)
    assert cast.weight[...].dtype == cast.config.param_dtype == jnp.float32
    assert_holds(cast, values)


def values_of(values, *roles):
    return {role: values[role] for role in roles}


@pytest.mark.parametrize("transposed", [False, True])
def test_onto_a_sharding(transposed, devices, tmp_path):
    """Each device's part is read for it alone."""
    values = arrays(SIGMOID)
    weight = np.ascontiguousarray(values["weight"].T) if transposed else values["weight"]
    save_file({"weight": weight, "bias": values["bias"]}, tmp_path / "router.safetensors")
    mesh = jax.make_mesh((2,), ("experts",), devices=devices[:2])
    sharding = NamedSharding(mesh, PartitionSpec("experts"))
    router = Router.from_checkpoint(tmp_path / "router.safetensors", SIGMOID, sharding=sharding)
    assert router.weight[...].sharding == sharding
    assert_holds(router, values)
    router.load_state(tmp_path / "router.safetensors")
    assert router.weight[...].sharding == sharding


@pytest.mark.parametrize("mode", [AxisType.Auto, AxisType.Explicit])
def test_state_onto_shardings(mode, devices):
    """Every variable stays where it is, and in its dtype; then the router routes."""
    config = replace(SIGMOID, logit_bias=True)
    values = values_of(arrays(config), "weight", "bias", "logit_bias")
    mesh = jax.make_mesh((2,), ("experts",), (mode,), devices=devices[:2])
    with jax.set_mesh(mesh):
        graph, state = nnx.split(Router(config, rngs=nnx.Rngs(0)))
        sharding = NamedSharding(mesh, PartitionSpec("experts"))
        router = nnx.merge(graph, jax.tree.map(lambda leaf: jax.device_put(leaf, sharding), state))
        router.load_state(values)
        for role, value in variables(router).items():
            assert (value.sharding, value.dtype) == (sharding, jnp.float32), role
        assert_holds(router, values)
        nnx.jit(Router.__call__)(router, jnp.ones((3, HIDDEN)))


def test_state_onto_one_device(devices):
    """Which need not be the default one; where nobody said which, it stays open."""
    values = values_of(arrays(SIGMOID), "weight", "bias")
    graph, state = nnx.split(Router(SIGMOID, rngs=nnx.Rngs(0)))
    router = nnx.merge(graph, jax.device_put(state, devices[1]))
    router.load_state(values)
    assert all(value.devices() == {devices[1]} for value in variables(router).values())
    assert_holds(router, values)
    router(jax.device_put(jnp.ones((3, HIDDEN)), devices[1]))
    router = Router(SIGMOID, rngs=nnx.Rngs(0))
    router.load_state(values)
    assert not any(value.committed for value in variables(router).values())


@pytest.mark.parametrize("config", [SIGMOID, HASHED])
def test_state_of_a_router_without_values(config):
    router = nnx.eval_shape(lambda: Router(config, rngs=nnx.Rngs(0)))
    values = values_of(arrays(config), *variables(Router(config, rngs=nnx.Rngs(0))))
    router.load_state(values)
    assert_holds(router, values)
    assert router.weight[...].dtype == jnp.float32


def test_counts_of_a_router_without_values():
    router = nnx.eval_shape(lambda: Router(replace(SIGMOID, count_experts=True), rngs=nnx.Rngs(0)))
    router.load_state(values_of(arrays(SIGMOID), "weight", "bias"))
    router(jnp.ones((3, HIDDEN)))
    assert router.counts[...].sum() == 3 * SIGMOID.top_k
    router.load_state(values_of(arrays(SIGMOID), "weight", "bias"))
    assert router.counts[...].sum() == 3 * SIGMOID.top_k  # a checkpoint has none


def resident_bytes(path):
    """How much of a file is in the page cache: what somebody read of it, and what the kernel read ahead."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        pages = -(-len(mapped) // mmap.PAGESIZE)
        resident = (ctypes.c_ubyte * pages)()
        view = (ctypes.c_char * len(mapped)).from_buffer(mapped)
        assert libc.mincore(ctypes.c_void_p(ctypes.addressof(view)), ctypes.c_size_t(len(mapped)), resident) == 0
        del view
        return mmap.PAGESIZE * int((np.frombuffer(resident, np.uint8) & 1).sum())


def drop_from_cache(path):
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def write_sparse(path, shapes):
    """A safetensors file of bf16 zeros that takes no room on the disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + end)


@pytest.mark.skipif(sys.platform != "linux", reason="counts pages as Linux does")
def test_little_else_is_read(tmp_path):
    """One layer of a checkpoint of 4 GB in two shards: under 1% of its bytes, as the kernel counts them."""
    config = RouterConfig(2048, 128, 8, score_fn="softmax", selection_bias=False)
    shards = []
    for shard in range(2):
        layers = range(2 * shard, 2 * shard + 2)
        shapes = {}
        for i in layers:
            shapes[f"model.layers.{i}.mlp.experts.up"] = (128, 2048, 2048)
            shapes[f"model.layers.{i}.mlp.gate.weight"] = (128, 2048)
        shards.append(tmp_path / f"{shard}.safetensors")
        write_sparse(shards[-1], shapes)
        drop_from_cache(shards[-1])
    total = sum(shard.stat().st_size for shard in shards)
    assert total > 4e9
    router = Router.from_checkpoint(tmp_path, config, layer=2)
    read = sum(map(resident_bytes, shards))
    gate = router.weight[...].nbytes
    assert gate <= read < 0.01 * total
    np.testing.assert_array_equal(router.weight[...], 0)


# What is wrong, each with all that the message names.

GATE, BIAS = "model.layers.3.mlp.gate.weight", "model.layers.3.mlp.gate.e_score_correction_bias"
RIGHT = {GATE: np.ones((16, 8), np.float32), BIAS: np.ones(16, np.float32)}
V4_GATE, TABLE = "layers.0.ffn.gate.weight", "layers.0.ffn.gate.tid2eid"
BROKEN = {
    "shapes": (SIGMOID, {GATE: np.ones((16, 9), np.float32), BIAS: np.ones(15, np.float32)}, [GATE, "(16, 8)", BIAS]),
    "missing": (SIGMOID, {GATE: RIGHT[GATE]}, ["bias is missing"]),
    "unexpected": (
        PLAIN,
        {**RIGHT, "model.layers.3.mlp.gate.weight_scale_inv": np.ones(1, np.float32)},
        [f"{BIAS} is unexpected: the configuration has no bias", "weight_scale_inv is unexpected"],
    ),
    "doubled": (SIGMOID, {**RIGHT, GATE.removeprefix("model."): RIGHT[GATE]}, ["weight has two names", GATE]),
    "dtypes": (
        SIGMOID,
        {GATE: RIGHT[GATE].astype(np.float64), BIAS: np.ones(16, np.int32)},
        [f"{GATE} must have one of the dtypes F32, BF16, F16, got F64", f"{BIAS}", "got I32"],
    ),
    "a table": (
        HASHED,
        {V4_GATE: RIGHT[GATE], TABLE: np.where(np.arange(90).reshape(30, 3) % 50 == 7, 16, 1)},
        [f"{TABLE} must hold experts from 0 to 15; 2 entries are outside, the first 16 at [2, 1]"],
    ),
    "everything of a hash layer": (
        HASHED,
        {V4_GATE: np.ones((16, 3), np.float32), TABLE: np.ones((30, 3)), "layers.0.ffn.gate.bias": np.ones(16)},
        [V4_GATE, f"{TABLE} must have one of the dtypes I8", "layers.0.ffn.gate.bias is unexpected"],
    ),
    "an unknown name among plain ones": (
        SIGMOID,
        {"weight": RIGHT[GATE], "bias": RIGHT[BIAS], "wieght": RIGHT[GATE]},
        ["wieght is unexpected"],
    ),
}


@pytest.mark.parametrize("in_file", [False, True])
@pytest.mark.parametrize("name", BROKEN)
def test_one_error_lists_all(name, in_file, tmp_path):
    config, tensors, words = BROKEN[name]
    source = tensors
    if in_file:
        source = tmp_path / "model.safetensors"
        save_file(tensors, source)
    with pytest.raises(CheckpointError) as error:
        Router.from_checkpoint(source, config)
    for word in words:
        assert word in str(error.value)
    assert len(error.value.problems) >= len([word for word in words if " " in word])


def test_the_error_of_another_process():
    with pytest.raises(CheckpointError) as error:
        Router.from_checkpoint({}, SIGMOID)
    again = pickle.loads(pickle.dumps(error.value))
    assert str(again) == str(error.value)
    assert again.problems == error.value.problems != ()


@pytest.mark.parametrize(
    ("layer", "words"),
    [(None, "layer must be given, as it has experts in 3-4"), (9, "no router in layer 9; it has experts in 3-4")],
)
def test_which_layer(layer, words):
    tensors = {**RIGHT, **{name.replace(".3.", ".4."): value for name, value in RIGHT.items()}}
    with pytest.raises(CheckpointError, match=words):
        Router.from_checkpoint(tensors, SIGMOID, layer)


def test_files_that_are_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Router.from_checkpoint(tmp_path / "nowhere.safetensors", SIGMOID)
    with pytest.raises(FileNotFoundError, match="safetensors"):
        Router.from_checkpoint(tmp_path, SIGMOID)
    (tmp_path / "a.safetensors").write_bytes(b"no such thing")
    with pytest.raises(CheckpointError, match=r"a\.safetensors is no safetensors file"):
        Router.from_checkpoint(tmp_path, SIGMOID)
    save_file(RIGHT, tmp_path / "a.safetensors")
    save_file(RIGHT, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match=f"{GATE} is in two files, b.safetensors the second"):
        Router.from_checkpoint(tmp_path, SIGMOID)


def test_links_and_folders(tmp_path):
    """As a cache of downloads has them."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "model").mkdir()
    save_file(RIGHT, tmp_path / "blobs" / "1f3a")
    link = tmp_path / "model" / "a.safetensors"
    link.symlink_to(tmp_path / "blobs" / "1f3a")
    for path in (link, link.parent):
        assert_holds(Router.from_checkpoint(path, SIGMOID), {"weight": RIGHT[GATE], "bias": RIGHT[BIAS]})
    (tmp_path / "blobs" / "1f3a").unlink()
    with pytest.raises(CheckpointError, match=r"a\.safetensors is a link, and where it leads there is no such file"):
        Router.from_checkpoint(link.parent, SIGMOID)
    link.unlink()
    link.mkdir()
    with pytest.raises(CheckpointError, match=r"a\.safetensors is no safetensors file"):
        Router.from_checkpoint(link.parent, SIGMOID)


def header(tensors):
    text = (tensors if isinstance(tensors, str) else json.dumps(tensors)).encode()
    return len(text).to_bytes(8, "little") + text


def entry(start, end, *shape, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


WHOLE = {GATE: entry(0, 512, 16, 8), BIAS: entry(512, 576, 16)}
NO_FILES = {
    "empty": b"",
    "truncated header": header(WHOLE)[:50],
    "truncated": header(WHOLE) + bytes(500),
    "a header of 2^63 bytes": (1 << 63).to_bytes(8, "little") + header(WHOLE)[8:] + bytes(576),
    "a header of a gigabyte": (1 << 30).to_bytes(8, "little") + header(WHOLE)[8:] + bytes(576),
    "offsets behind the end": header({**WHOLE, BIAS: entry(5120, 5184, 16)}) + bytes(576),
    "negative offsets": header({**WHOLE, GATE: entry(-4, 508, 16, 8)}) + bytes(576),
    "overlapping tensors": header({**WHOLE, BIAS: entry(100, 164, 16)}) + bytes(576),
    "a shape that is not its bytes": header({**WHOLE, GATE: entry(0, 512, 16, 9)}) + bytes(576),
    "a shape of 2^65 elements": header({**WHOLE, GATE: entry(0, 512, 1 << 62, 8)}) + bytes(576),
    "an unknown dtype": header({**WHOLE, GATE: entry(0, 512, 16, 8, dtype="F99")}) + bytes(576),
    "one name twice": header(json.dumps(WHOLE).replace(BIAS, GATE)) + bytes(576),
}


@pytest.mark.parametrize("content", NO_FILES)
def test_what_is_no_safetensors_file(content, tmp_path):
    """An error that names the file: no crash, no array of that size."""
    (tmp_path / "a.safetensors").write_bytes(header(WHOLE) + bytes(576))
    Router.from_checkpoint(tmp_path, SIGMOID)
    (tmp_path / "a.safetensors").write_bytes(NO_FILES[content])
    with pytest.raises(CheckpointError, match=r"a\.safetensors is no safetensors file"):
        Router.from_checkpoint(tmp_path, SIGMOID)


def test_a_layer_of_many_digits():
    """More than Python makes a number of: no layer that a model has."""
    with pytest.raises(CheckpointError, match="no tensor has a name that a router"):
        Router.from_checkpoint({GATE.replace("3", "9" * 5000): RIGHT[GATE]}, SIGMOID)


def write_index(folder, content):
    path = folder / "model.safetensors.index.json"
    path.write_text(content if isinstance(content, str) else json.dumps({"weight_map": content}))


def test_only_the_files_of_a_router_are_needed(tmp_path):
    """By the index: those of other layers may be broken, or not there, as in a download of one layer."""
    other = GATE.replace(".3.", ".4.")
    save_file({GATE: RIGHT[GATE]}, tmp_path / "a.safetensors")
    save_file({BIAS: RIGHT[BIAS]}, tmp_path / "b.safetensors")
    (tmp_path / "c.safetensors").write_text("broken")
    files = {GATE: "a.safetensors", BIAS: "b.safetensors", other: "c.safetensors", "head": "d.safetensors"}
    write_index(tmp_path, files)
    assert_holds(Router.from_checkpoint(tmp_path, SIGMOID, 3), {"weight": RIGHT[GATE], "bias": RIGHT[BIAS]})
    with pytest.raises(CheckpointError, match=r"c\.safetensors is no safetensors file"):
        Router.from_checkpoint(tmp_path, SIGMOID, 4)
    write_index(tmp_path, {GATE: "d.safetensors", BIAS: "a.safetensors"})
    with pytest.raises(CheckpointError) as error:
        Router.from_checkpoint(tmp_path, SIGMOID, 3)
    assert error.value.problems == (
        "the index names d.safetensors, and there is no such file",
        f"{BIAS} is not in a.safetensors, where the index has it",
    )


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({GATE: "../outside.safetensors"}, r"names \.\./outside\.safetensors, outside of its own folder"),
        ({GATE: "a/../../outside.safetensors"}, "outside of its own folder"),
        ({GATE: "/outside.safetensors"}, "outside of its own folder"),
        ({GATE: 3}, "it is no index"),
        ({GATE: ["a.safetensors"]}, "it is no index"),
        ({GATE: "\ud800.safetensors"}, "it is no index"),
        (["a.safetensors"], "it is no index"),
        ("{", "it is no index"),
        ("[]", "it is no index"),
        ('{"metadata": {}}', "it is no index, a JSON object whose weight_map"),
        ("[" * 99999, "it is no index"),
        ({GATE: ""}, "is no safetensors file"),
        ({GATE: "."}, "is no safetensors file"),
    ],
)
def test_an_index_that_is_wrong(index, words, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for path in (tmp_path / "outside.safetensors", folder / "a.safetensors"):
        save_file(RIGHT, path)
    write_index(folder, index)
    with pytest.raises(CheckpointError, match=words):
        Router.from_checkpoint(folder, SIGMOID)


@pytest.mark.parametrize("layer", ["3", 3.0, True, -1])
def test_a_layer_is_an_int(layer, tmp_path):
    router = Router(SIGMOID, rngs=nnx.Rngs(0))
    for call in (
        lambda: Router.from_checkpoint(RIGHT, SIGMOID, layer),
        lambda: router.load_state(RIGHT, layer),
        lambda: router.save(tmp_path / "gate.safetensors", layer, preset="deepseek_v3"),
    ):
        with pytest.raises((TypeError, ValueError), match=rf"layer must be .* got {layer!r}"):
            call()
    assert not any(tmp_path.iterdir())


def test_no_path():
    with pytest.raises(TypeError, match="path must be a path or a dict of arrays, got None"):
        Router.from_checkpoint(None, SIGMOID)


def test_a_stack_of_layers(tmp_path):
    """A layer's tensors are not those of a stack, whose shapes they would change."""
    stack = nnx.vmap(lambda key: Router(SIGMOID, rngs=nnx.Rngs(key)))(jax.random.split(jax.random.key(0), 2))
    before = variables(stack)
    for call in (lambda: stack.load_state(RIGHT), lambda: stack.save(tmp_path / "gate.safetensors")):
        with pytest.raises(
            ValueError, match=r"weight of this router must have shape \(.*\), that of one layer, got \(2, "
        ):
            call()
    assert_holds(stack, before)


def test_a_failed_load_changes_nothing():
    router = Router(SIGMOID, rngs=nnx.Rngs(0))
    before = variables(router)
    with pytest.raises(CheckpointError):
        router.load_state({GATE: RIGHT[GATE]})
    assert_holds(router, before)


@pytest.mark.parametrize("config", [SIGMOID, PLAIN, HASHED, replace(PLAIN, logit_bias=True, per_expert_scale=True)])
def test_save_and_load(config, tmp_path):
    roles = variables(Router(config, rngs=nnx.Rngs(0)))
    router = Router.from_checkpoint(values_of(arrays(config), *roles), config)
    router.save(tmp_path / "router.safetensors")
    again = Router.from_checkpoint(tmp_path / "router.safetensors", config)
    assert_holds(again, variables(router))
    assert again.config == router.config
    other = Router(config, rngs=nnx.Rngs(3))
    other.load_state(tmp_path / "router.safetensors")
    assert_holds(other, variables(router))
    assert other.weight[...].dtype == jnp.float32


def test_where_nothing_can_be_saved(tmp_path):
    router = Router(SIGMOID, rngs=nnx.Rngs(0))
    for path in (tmp_path, tmp_path / "no" / "gate.safetensors"):
        with pytest.raises(OSError, match=f"{path} cannot be written"):
            router.save(path)
    for path in (None, 3, b"gate.safetensors"):
        with pytest.raises(TypeError, match=f"path must be a path, got {path!r}"):
            router.save(path)


def test_save_by_the_names_of_a_model(tmp_path):
    path = tmp_path / "gate.safetensors"
    router = Router(SIGMOID, rngs=nnx.Rngs(0))
    router.save(path, 3, preset="deepseek_v3")
    assert_holds(Router.from_checkpoint(path, SIGMOID, 3), variables(router))
    with pytest.raises(ValueError, match="name for bias; 'mixtral_8x7b' has none"):
        router.save(path, 3, preset="mixtral_8x7b")
    with pytest.raises(ValueError, match="layer and preset must be given together"):
        router.save(path, 3)


def test_without_the_library(monkeypatch, tmp_path):
    (tmp_path / "a.safetensors").touch()
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"pip install 'jax-router\[checkpoints\]'"):
        Router.from_checkpoint(tmp_path, SIGMOID)
    Router.from_checkpoint(RIGHT, SIGMOID)  # a dict needs none


@pytest.mark.parametrize("config", [SIGMOID, HASHED])
def test_orbax(config, tmp_path):
    """The state of a Router, its SelectionBias and HashTable too, through a checkpoint of Orbax."""
    ocp = pytest.importorskip("orbax.checkpoint")
    router = Router(config, rngs=nnx.Rngs(0))
    if config.mode == "dense":
        router.bias[...] = jnp.arange(16.0)
    state = nnx.state(router)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "router", nnx.to_pure_dict(state))
        checkpointer.wait_until_finished()
        graph, empty = nnx.split(Router(config, rngs=nnx.Rngs(7)))
        nnx.replace_by_pure_dict(empty, checkpointer.restore(tmp_path / "router", nnx.to_pure_dict(empty)))
    restored = nnx.merge(graph, empty)
    assert_holds(restored, variables(router))
    kind = {"dense": ("bias", SelectionBias), "hash": ("hash_lut", HashTable)}[config.mode]
    assert type(getattr(restored, kind[0])) is kind[1]
