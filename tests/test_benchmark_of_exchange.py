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

    def call(*arguments, options=("--tiny", "--out", str(path))):
        monkeypatch.setattr(sys, "argv", ["benchmarks", "exchange", *options, *arguments])
        assert __main__.main() == 0
        return path

    return call


def test_records_picture_and_paper(run, devices, monkeypatch, tmp_path, capsys):
    path = run(
        "--tokens", "16", "--only", "*/experts/*_*/2x16/[bz]*/exchange-sized", "*/experts/*_*/1x16/balanced/share-of-2"
    )
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
    assert exchange.efficiency(zipf, layers) is None  # a device's share is that of an even load

    capsys.readouterr()
    run("--tokens", "16", "--paper")
    tables = [table.splitlines()[2:] for table in capsys.readouterr().out.strip().split("\n\n")]
    links, layer, _, paper = [[row.split("|")[1].strip() for row in table] for table in tables]
    assert links == ["2"]
    assert layer == [*exchange.WAYS, "a device's share, nothing moved"]
    assert paper == ["8", "64", "1024", "1024"]

    pytest.importorskip("matplotlib")
    monkeypatch.setattr(sweep, "IMAGES", tmp_path)
    run("--tokens", "16", "--draw")
    assert len([*tmp_path.glob("*-exchange.png")]) == 1


def test_the_page_has_the_tables_of_the_records(run, capsys):
    run("--device-kind", "NVIDIA H200", "--paper", options=())
    page = (ROOT / "docs" / "expert_parallel.md").read_text(encoding="utf-8")
    links, *layers, paper = capsys.readouterr().out.strip().split("\n\n")
    assert len(layers) == 3
    for table in (links, *layers, paper):
        assert table in page


def test_a_device_without_records(run):
    with pytest.raises(SystemExit, match="no records of an abacus"):
        run("--device-kind", "an abacus", "--paper")


def test_cases(run, devices, capsys):
    """What moves alone comes without the experts; what a device's share is, is timed for all sizes of several."""
    run("--list", "--exchange-only")
    ids = [line.split("/") for line in capsys.readouterr().out.split()]
    assert {parts[2] for parts in ids} == {"moved"}
    several = {tuple(parts[4].split("x")) for parts in ids if parts[4][:2] != "1x"}
    shares = {(parts[6][9:], parts[4][2:]) for parts in ids if parts[6].startswith("share-of-")}
    assert shares >= {(number, tokens) for number, tokens in several if 16 // int(number) >= 3}


def test_rows_that_must_move(run):
    """A token once to each other device; the busiest device counts."""
    from benchmarks import exchange

    sizes = exchange.Sizes("small", 4, 4, 4, 2, 2)
    ids = np.array([[0, 1], [2, 3], [0, 2], [1, 0]])  # two devices of two tokens and two experts
    assert exchange.rows_that_must_move(ids, sizes, 2) == 2
