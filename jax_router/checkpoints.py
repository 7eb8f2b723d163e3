"""Routers in checkpoints: safetensors files, by the names of each family. Nothing but a router's own bytes is read."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from . import _check, models
from .config import RouterConfig

Source = str | PathLike[str] | Mapping[str, Any]

# What may come before "layers.{i}." in a name, in the family's own files or in those of a model around it.
_PREFIX = r"(?:(?:model|language_model|text_model|transformer|backbone)\.)*"
_FLOATS = {np.dtype(np.float32): "F32", np.dtype(ml_dtypes.bfloat16): "BF16", np.dtype(np.float16): "F16"}
# Dtypes that a gate or a bias may have, and those of a table, as safetensors calls them.
FLOAT_NAMES = tuple(_FLOATS.values())
INTEGER_NAMES = ("I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64")
_MISSING = "checkpoints need safetensors: pip install 'jax-router[checkpoints]'"


class CheckpointError(ValueError):
    """A checkpoint does not hold the router that was asked for. The message lists everything that is wrong."""

    def __init__(self, where: str, problems: Sequence[str]):
        self.where, self.problems = where, tuple(problems)
        super().__init__(f"{where} does not hold this router:\n" + "\n".join(f"  - {problem}" for problem in problems))

    def __reduce__(self) -> tuple[Any, ...]:
        """So that a process can hand it to another one."""
        return type(self), (self.where, self.problems)


class Tensor(Protocol):
    """A tensor of which shape and dtype are known, and slices are read when they are asked for."""

    def get_shape(self) -> Sequence[int]: ...
    def get_dtype(self) -> str: ...
    def __getitem__(self, index: Any) -> np.ndarray: ...


class _InMemory:
    """An array as a Tensor."""

    def __init__(self, array: Any):
        self.array = np.asarray(array)

    def get_shape(self) -> Sequence[int]:
        return self.array.shape

    def get_dtype(self) -> str:
        kind = {"i": "I", "u": "U", "f": "F"}.get(self.array.dtype.kind)
        return _FLOATS.get(self.array.dtype) or (f"{kind}{8 * self.array.itemsize}" if kind else self.array.dtype.name)

    def __getitem__(self, index: Any) -> np.ndarray:
        return self.array[index]


class Checkpoint:
    """The tensors of a checkpoint by name, none of them read.

    Attributes:
        where: what it is, for messages.
        problems: what is wrong with the files themselves, such as a name in two of them.
    """

    def __init__(self, where: str, tensors: Mapping[str, Callable[[], Tensor]], problems: Sequence[str] = ()):
        self.where = where
        self.problems = list(problems)
        self._tensors = tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __getitem__(self, name: str) -> Tensor:
        """Raises CheckpointError where a file is not what an index says of it."""
        return self._tensors[name]()


@contextlib.contextmanager
def open_checkpoint(source: Source) -> Iterator[Checkpoint]:
    """A checkpoint from a dict of arrays, a safetensors file, an index of several, or a folder with either.

    Only headers are read; where there is an index, those of the files alone that have a tensor which is asked for.

    Raises:
        ImportError: the library safetensors is missing.
        OSError: there is no such file.
        CheckpointError: a file is no safetensors file, or no index of such.
    """
    if isinstance(source, Mapping):
        yield Checkpoint("the dict", {str(name): functools.partial(_InMemory, source[name]) for name in source})
        return
    if not isinstance(source, str | PathLike):
        raise TypeError(f"path must be a path or a dict of arrays, got {source!r}")
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError(_MISSING) from error
    path = Path(source)

    with contextlib.ExitStack() as stack:

        @functools.cache
        def opened(file: Path) -> Any:
            try:
                return stack.enter_context(safe_open(file, framework="np"))
            except FileNotFoundError as error:
                what = f"the index names {file.name}, and" if index else f"{file.name} is a link, and where it leads"
                raise CheckpointError(str(path), [f"{what} there is no such file"]) from error
            except (SafetensorError, OSError) as error:  # of the latter, what a folder is
                raise CheckpointError(str(path), [f"{file.name} is no safetensors file: {error}"]) from error

        def tensor(name: str, file: Path) -> Tensor:
            try:
                return opened(file).get_slice(name)
            except SafetensorError as error:
                raise CheckpointError(str(path), [f"{name} is not in {file.name}, where the index has it"]) from error

        problems: list[str] = []
        files, index = _files(path)
        places = {} if index is None else _places(index)
        for file in files:
            for name in opened(file).keys():  # noqa: SIM118, it is no dict
                if name in places:
                    problems.append(f"{name} is in two files, {file.name} the second")
                places.setdefault(name, file)
        tensors = {name: functools.partial(tensor, name, file) for name, file in places.items()}
        yield Checkpoint(str(path), tensors, problems)


def _files(path: Path) -> tuple[list[Path], Path | None]:
    """The safetensors files of a path, or the index of them."""
    if path.is_dir():
        indices, whole = sorted(path.glob("*.safetensors.index.json")), sorted(path.glob("*.safetensors"))
        if not indices and not whole:
            raise FileNotFoundError(f"no *.safetensors in {path}")
        return ([], indices[0]) if indices else (whole, None)
    if not path.exists():
        raise FileNotFoundError(f"no file {path}")
    return ([], path) if path.suffix == ".json" else ([path], None)


def _places(index: Path) -> dict[str, Path]:
    """Of each name in an index the file that has its tensor, in the folder of the index or below it."""
    try:
        places: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        outside = sorted({name for name in places.values() if Path(name).is_absolute() or ".." in Path(name).parts})
        for name in places.values():
            os.fsencode(name)  # half of a surrogate pair, which JSON can write, is in no file's name
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            str(index), [f"it is no index, a JSON object whose weight_map has a file for each name: {error!r}"]
        ) from error
    if outside:
        raise CheckpointError(str(index), [f"it names {name}, outside of its own folder" for name in outside])
    return {name: index.parent / file for name, file in places.items()}


class Found(NamedTuple):
    """The router of a layer in a checkpoint: by role the names of its tensors, more than one if a name is doubled."""

    layer: int | None
    names: dict[str, list[str]]


# The roles of a Router's variables, by which its own files name their tensors.
ROLES = ("weight", "bias", "logit_bias", "per_expert_scale", "hash_lut")


def _patterns(tensors: Mapping[str, str]) -> dict[str, re.Pattern[str]]:
    """Of each role, what its name looks like in a checkpoint."""

    def pattern(name: str) -> re.Pattern[str]:
        stem = re.sub(f"^{_PREFIX}", "", name)
        return re.compile(_PREFIX + re.escape(stem).replace(r"\{i\}", r"(?P<layer>[0-9]{1,9})"))

    return {role: pattern(name) for role, name in tensors.items()}


def find_routers(names: Sequence[str], tensors: Mapping[str, str]) -> dict[int, Found]:
    """By layer the routers in a checkpoint, of a family that names its tensors so."""
    found: dict[int, Found] = {}
    for role, pattern in _patterns(tensors).items():
        for name in names:
            match = pattern.fullmatch(name)
            if match:
                layer = int(match["layer"])
                found.setdefault(layer, Found(layer, {})).names.setdefault(role, []).append(name)
    return {layer: router for layer, router in sorted(found.items()) if "weight" in router.names}


def naming_schemes(preset: str | None) -> list[Mapping[str, str]]:
    """The ways in which tensors of routers are named, those of one preset or all that there are."""
    rows = [models.preset(preset)] if preset else list(models.all_presets().values())
    return [row.tensors for row in rows if "weight" in row.tensors]


def _find(checkpoint: Checkpoint, config: RouterConfig, preset: str | None, layer: int | None) -> Found:
    """The router that was asked for, by the names of its family or by those of a Router's own variables."""
    names = list(checkpoint)
    plain = {role: [role] for role in ROLES if role in names}
    if plain:
        return Found(None, plain)
    wanted = _shapes(config)
    best: Found | None = None
    layers: set[int] = set()
    for tensors in naming_schemes(preset):
        routers = find_routers(names, tensors)
        layers |= routers.keys()
        chosen: Found | None
        if layer is None and len(routers) == 1:
            (chosen,) = routers.values()
        else:
            chosen = None if layer is None else routers.get(layer)
        # The scheme that knows most of what is wanted.
        if chosen and (best is None or _known(chosen, wanted) > _known(best, wanted)):
            best = chosen
    if best is None:
        raise CheckpointError(checkpoint.where, [_not_found(layer, layers, preset), *checkpoint.problems])
    return best


def _known(found: Found, wanted: Iterable[str]) -> tuple[int, int]:
    return sum(role in found.names for role in wanted), len(found.names)


def _not_found(layer: int | None, layers: set[int], preset: str | None) -> str:
    if not layers:
        return f"no tensor has a name that a router of {preset or 'any preset'} has"
    said = models.Layers(experts=sorted(layers)).describe().partition(", ")[2]
    return f"layer must be given, as it has {said}" if layer is None else f"no router in layer {layer}; it has {said}"


def _shapes(config: RouterConfig) -> dict[str, tuple[int, ...]]:
    """The variables that a Router of a configuration has, by role."""
    experts = (config.num_experts,)
    shapes: dict[str, tuple[int, ...]] = {}
    if config.has_weight:
        shapes["weight"] = (config.num_experts, config.hidden_size)
    if config.has_selection_bias:
        shapes["bias"] = experts
    if config.logit_bias:
        shapes["logit_bias"] = experts
    if config.per_expert_scale:
        shapes["per_expert_scale"] = experts
    if config.vocab_size is not None and config.mode == "hash":
        shapes["hash_lut"] = (config.vocab_size, config.top_k)
    return shapes


def read_router(
    source: Source,
    config: RouterConfig,
    *,
    preset: str | None = None,
    layer: int | None = None,
    dtype: DTypeLike | None = None,
    sharding: jax.sharding.Sharding | None = None,
) -> dict[str, Array]:
    """The variables of a router, read from a checkpoint and from nothing but their own bytes.

    Args:
        source: see `open_checkpoint`.
        config: what the router is.
        preset: whose names the tensors have; default all that are known.
        layer: of the model; not needed where there is one router.
        dtype: of the weight; default that of the checkpoint.
        sharding: of the weight `[E, D]`; each device's part is read for it alone.

    Raises:
        TypeError: layer is no int.
        CheckpointError: names are missing, unexpected or doubled, shapes or dtypes are wrong, or entries of a table are
            out of range: all of them in one message.
    """
    layer = _layer(layer)
    with open_checkpoint(source) as checkpoint:
        found = _find(checkpoint, config, preset, layer)
        shapes = _shapes(config)
        problems = [*checkpoint.problems, *_unexpected(checkpoint, found, shapes)]
        tensors: dict[str, Tensor] = {}
        for role, shape in shapes.items():
            names = found.names.get(role, [])
            if len(names) != 1:
                problems.append(f"{role} has two names: {', '.join(names)}" if names else f"{role} is missing")
                continue
            try:
                tensor = checkpoint[names[0]]
            except CheckpointError as error:
                problems += [problem for problem in error.problems if problem not in problems]
                continue
            wrong = _wrong(names[0], role, tensor, shape)
            problems += wrong
            if not wrong:
                tensors[role] = tensor
        values: dict[str, Any] = {}
        if "hash_lut" in tensors:
            values["hash_lut"] = np.asarray(tensors["hash_lut"][:])
            problems += _out_of_range(found.names["hash_lut"][0], values["hash_lut"], config.num_experts)
        if problems:
            raise CheckpointError(checkpoint.where, problems)
        for role, tensor in tensors.items():
            if role == "weight":
                values[role] = _read_weight(tensor, shapes[role], dtype, sharding)
            elif role != "hash_lut":
                values[role] = np.asarray(tensor[:]).reshape(shapes[role]).astype(np.float32)
            else:
                values[role] = values[role].astype(np.int32)
        return {role: jnp.asarray(value) for role, value in values.items()}


def _unexpected(checkpoint: Checkpoint, found: Found, wanted: Container[str]) -> list[str]:
    """Tensors of the router that nobody reads: others of its roles, and neighbours of its gate in the same module."""
    problems = [
        f"{name} is unexpected: the configuration has no {role}"
        for role, names in found.names.items()
        if role in ROLES and role not in wanted
        for name in names
    ]
    taken = {name for names in found.names.values() for name in names}
    module = found.names["weight"][0].rpartition(".")[0] + "." if found.layer is not None else ""
    return problems + [f"{name} is unexpected" for name in checkpoint if name.startswith(module) and name not in taken]


def _wrong(name: str, role: str, tensor: Tensor, shape: tuple[int, ...]) -> list[str]:
    """What is wrong with the dtype and the shape of a tensor."""
    dtypes = INTEGER_NAMES if role == "hash_lut" else FLOAT_NAMES
    # Some files have the gate transposed, and a bias as one row.
    shapes = {"weight": (shape, shape[::-1]), "hash_lut": (shape,)}.get(role, (shape, (1, *shape)))
    got, dtype = tuple(tensor.get_shape()), tensor.get_dtype()
    problems = [] if dtype in dtypes else [f"{name} must have one of the dtypes {', '.join(dtypes)}, got {dtype}"]
    return problems if got in shapes else [*problems, f"{name} must have shape {shape}, got {got}"]


def _out_of_range(name: str, table: np.ndarray, num_experts: int) -> list[str]:
    wrong = (table < 0) | (table >= num_experts)
    if not wrong.any():
        return []
    row, column = np.argwhere(wrong)[0]
    return [
        f"{name} must hold experts from 0 to {num_experts - 1}; {wrong.sum()} entries are outside, the first "
        f"{table[row, column]} at [{row}, {column}]"
    ]


def _read_weight(
    tensor: Tensor, shape: tuple[int, ...], dtype: DTypeLike | None, sharding: jax.sharding.Sharding | None
) -> Array:
    transposed = tuple(tensor.get_shape()) != shape

    def part(index: Any) -> np.ndarray:
        values = tensor[index[::-1]].T if transposed else tensor[index]
        return np.ascontiguousarray(values if dtype is None else values.astype(dtype))

    if sharding is None:
        return jnp.asarray(part((slice(None), slice(None))))
    return jax.make_array_from_callback(shape, sharding, part)


def variables_of(router: Any) -> dict[str, Any]:
    """By role the values of a Router's variables that checkpoints have.

    Raises:
        ValueError: it is a stack of layers, as `nnx.vmap` makes them, of which a checkpoint has each by itself.
    """
    values = {role: getattr(router, role).get_value() for role in _shapes(router.config)}
    for role, shape in _shapes(router.config).items():
        if values[role].shape != shape:
            raise ValueError(
                f"{role} of this router must have shape {shape}, that of one layer, got {values[role].shape}"
            )
    return values


def _layer(layer: Any) -> int | None:
    return None if layer is None else _check.static_int("layer", layer, 0, None)


def save_router(path: str | PathLike[str], variables: Mapping[str, Any], layer: int | None, preset: str | None) -> None:
    """Writes the variables of a router, by role, under the names of a preset's layer or of the roles."""
    if not isinstance(path, str | PathLike):
        raise TypeError(f"path must be a path, got {path!r}")
    layer = _layer(layer)
    if (layer is None) != (preset is None):
        raise ValueError(f"layer and preset must be given together, got layer={layer!r} and preset={preset!r}")
    names = {role: role for role in ROLES} if preset is None else models.preset(preset).tensors
    missing = [role for role in variables if role not in names]
    if missing:
        raise ValueError(f"preset must have a name for {', '.join(missing)}; {preset!r} has none")
    try:
        from safetensors import SafetensorError
        from safetensors.numpy import save_file
    except ImportError as error:
        raise ImportError(_MISSING) from error
    arrays = {names[role].format(i=layer): np.ascontiguousarray(value) for role, value in variables.items()}
    try:
        save_file(arrays, path, metadata={"format": "jax_router"})
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
