"""`python -m benchmarks exchange` on a machine without GPUs."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(monkeypatch, tmp_path):
    """The command with arguments; its records go to a file, which is returned."""
    pytest.importorskip("rich")
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import __main__

    path = tmp_path / "records.json"

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["benchmarks", "exchange", "--tiny", "--out", str(path), *arguments])
        assert __main__.main() == 0
        return path

    return call


def test_records_picture_and_paper(run, devices, monkeypatch, tmp_path, capsys):
    path = run("--tokens", "16", "--only", "*/experts/*_*/2x16/[bz]*/exchange-sized", "*/experts/*_*/1x16/balanced/*")
    from benchmarks import exchange, sweep

    layers, links = exchange.read(path)
    assert set(links) == {2}
    assert all(value > 0 for value in list(dataclasses.asdict(links[2]).values())[1:6])
    assert len(layers) == 2 + 1
    for record in layers.values():
        assert record.us > 0
        assert record.temporary > 0
    balanced, zipf = (
        layers[f"exchange/tiny/experts/forward_and_backward/2x16/{load}/exchange-sized"]
        for load in ("balanced", "zipf")
    )
    assert 0 < zipf.dropped < 1
    assert exchange.efficiency(balanced, layers) > 0
    assert exchange.efficiency(zipf, layers) is None  # one device was not timed with this load

    capsys.readouterr()
    run("--tokens", "16", "--paper")
    assert [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines()[2:]] == [
        "8",
        "64",
        "1024",
        "1024",
    ]

    pytest.importorskip("matplotlib")
    monkeypatch.setattr(sweep, "IMAGES", tmp_path)
    run("--tokens", "16", "--draw")
    assert len([*tmp_path.glob("*-exchange.png")]) == 1


def test_cases(run, devices, capsys):
    """What moves alone comes without the experts; one device computes as many tokens as each of the others."""
    run("--list", "--exchange-only")
    ids = [line.split("/") for line in capsys.readouterr().out.split()]
    assert {parts[2] for parts in ids} == {"moved"}
    alone, others = (
        {parts[4].split("x")[1] for parts in ids if (parts[4][:2] == "1x") == one} for one in (True, False)
    )
    assert others <= alone


def test_rows_that_must_move(run):
    """A token once to each other device; the busiest device counts."""
    from benchmarks import exchange

    sizes = exchange.Sizes("small", 4, 4, 4, 2, 2)
    ids = np.array([[0, 1], [2, 3], [0, 2], [1, 0]])  # two devices of two tokens and two experts
    assert exchange.rows_that_must_move(ids, sizes, 2) == 2
