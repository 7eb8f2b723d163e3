"""`python -m jax_router inspect`: the routers in a checkpoint, as a person would look at them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

from . import models
from ._load_bars import rows_of_blocks
from .checkpoints import (
    FLOAT_NAMES,
    INTEGER_NAMES,
    Checkpoint,
    CheckpointError,
    Found,
    find_routers,
    naming_schemes,
    open_checkpoint,
)
from .config import RouterConfig


def run(path: Path) -> int:
    """Shows the routers of a checkpoint. Returns 0, or 1 if there are none."""
    console, progress = Console(highlight=False, markup=False, soft_wrap=True), Console(stderr=True)
    with open_checkpoint(path) as checkpoint:
        routers = _routers(list(checkpoint))
        if not routers:
            console.print(f"{path}: no tensor has a name that a router of any preset has")
            return 1
        lines = []
        read = 0
        layers = track(
            routers.items(), "reading gates", console=progress, transient=True, disable=not progress.is_terminal
        )
        for layer, found in layers:
            try:
                lines.append(_describe(checkpoint, layer, found, console.options.ascii_only))
                read += sum(_bytes(checkpoint, name) for names in found.names.values() for name in names)
            except CheckpointError as error:
                lines.append(f"{layer:>5}  {'; '.join(error.problems)}")
        first = next(iter(routers.values()))
        console.print(f"{path}")
        console.print(f"{len(routers)} layers have routers: {models.Layers(experts=list(routers)).describe()[8:]}")
        console.print(f"family: {_family(path, checkpoint, first)}")
        console.print(f"read: {read / 1e6:,.1f} MB\n")
        for problem in checkpoint.problems:
            console.print(f"wrong: {problem}")
        console.print(f"{'layer':>5}  {'gate':<12} {'dtype':<5} {'mean':>9} {'std':>8} {'rows, rms':>17}  bias")
        for line in lines:
            console.print(line)
    return 0


def _routers(names: list[str]) -> dict[int, Found]:
    """Of each layer what the scheme says that knows most of its tensors."""
    best: dict[int, Found] = {}
    for tensors in naming_schemes(None):
        for layer, found in find_routers(names, tensors).items():
            if layer not in best or len(found.names) > len(best[layer].names):
                best[layer] = found
    return dict(sorted(best.items()))


def _bytes(checkpoint: Checkpoint, name: str) -> int:
    tensor = checkpoint[name]
    bits = "".join(filter(str.isdecimal, tensor.get_dtype().partition("_")[0]))
    return int(np.prod(tensor.get_shape(), dtype=np.int64)) * int(bits or 8) // 8


def _family(path: Path, checkpoint: Checkpoint, found: Found) -> str:
    """By the config.json beside the files, or by the sizes of a gate among presets that name it so."""
    folder = path if path.is_dir() else path.parent
    if (folder / "config.json").exists():
        try:
            config = RouterConfig.from_hf_config(folder)
        except (ValueError, TypeError) as error:
            return f"config.json says: {error}"
        return f"as config.json says, {config.num_experts} experts, {config.top_k} a token, {config.score_fn} scores"
    try:
        shape = sorted(checkpoint[found.names["weight"][0]].get_shape())
    except CheckpointError:
        return "not known, without its first gate"
    fitting = []
    for name in models.presets():
        row = models.preset(name)
        sizes = sorted((row.options()["num_experts"], row.options()["hidden_size"]))
        known = find_routers(list(checkpoint), row.tensors) if "weight" in row.tensors else {}
        if sizes == shape and found.layer in known and known[found.layer].names.keys() == found.names.keys():
            fitting.append(name)
    return f"the names and sizes of {', '.join(fitting)}" if fitting else "of no preset, by its sizes"


def _describe(checkpoint: Checkpoint, layer: int, found: Found, ascii_only: bool) -> str:
    """A line of a layer, and the load of each expert where it has a table."""
    tensor = checkpoint[found.names["weight"][0]]
    size, dtype = tensor.get_shape(), tensor.get_dtype()
    line = f"{layer:>5}  {'x'.join(map(str, size)):<12} {dtype:<5}"
    if len(size) != 2 or 0 in size or dtype in INTEGER_NAMES:
        line += " no gate"
    elif dtype in FLOAT_NAMES:
        gate = np.asarray(tensor[:]).astype(np.float32)
        rms = np.sqrt((gate**2).mean(axis=1))
        line += f" {gate.mean():>9.2g} {gate.std():>8.3g} {rms.min():>8.3g}-{rms.max():<8.3g}"
    for role in ("bias", "logit_bias"):
        for name in found.names.get(role, []):
            vector = checkpoint[name]
            if vector.get_dtype() in FLOAT_NAMES and 0 not in vector.get_shape():
                bias = np.asarray(vector[:]).astype(np.float32)
                line += f"  {bias.min():.3g} to {bias.max():.3g}" + " (logits)" * (role == "logit_bias")
            else:
                line += f"  {name} is {vector.get_dtype()} {tuple(vector.get_shape())}, no bias"
    doubled = [role for role, names in found.names.items() if len(names) > 1]
    line += f"  {', '.join(doubled)}: two names" if doubled else ""
    for name in found.names.get("hash_lut", []):
        table = checkpoint[name]
        if table.get_dtype() in INTEGER_NAMES and len(table.get_shape()) == 2 and size:
            line += "\n" + _load(np.asarray(table[:]), size[0], ascii_only)
        else:
            line += f"\n       {name} is {table.get_dtype()} {tuple(table.get_shape())}, no table"
    return line


def _load(table: np.ndarray, num_experts: int, ascii_only: bool) -> str:
    inside = table[(table >= 0) & (table < num_experts)]
    load = np.bincount(inside, minlength=num_experts)
    rows = [f"{first:>6} {blocks}" for first, blocks in rows_of_blocks(load, ascii_only)]
    wrong = f"\n       {table.size - inside.size} entries are no experts" if inside.size < table.size else ""
    rows.append(
        f"       table {table.shape[0]}x{table.shape[1]}: an expert has {load.min()} to {load.max()} token ids, "
        f"mean {load.mean():.1f}{wrong}"
    )
    return "\n".join(rows)
