"""The routers of models: presets, whose facts are in presets.json, and what a model's own config.json says."""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from os import PathLike
from pathlib import Path
from typing import Any

from . import _check


@dataclass(frozen=True)
class Layers:
    """Which of a model's layers have routers.

    Attributes:
        total: how many layers there are, or None if that is not known.
        experts: those with experts, hash layers among them, or None if they are not known.
        dense: those without, where only these are known.
        hashed: those whose experts are looked up by token id.
    """

    total: int | None = None
    experts: Sequence[int] | None = None
    dense: Sequence[int] = ()
    hashed: Sequence[int] = ()

    def have_router(self, layer: int) -> bool:
        """Whether a layer has a router, as far as is known."""
        if self.total is not None and layer >= self.total:
            return False
        return layer not in self.dense if self.experts is None else layer in self.experts

    def describe(self) -> str:
        """In words."""
        words = [] if self.experts is None else [f"experts in {_runs(self.experts)}"]
        words += [f"dense {_runs(self.dense)}"] if self.dense else []
        words += [f"hash {_runs(self.hashed)}"] if self.hashed else []
        count = "layers" if self.total is None else f"{self.total} layers"
        return f"{count}, {'; '.join(words) or 'which of them have experts is not known'}"


@dataclass(frozen=True)
class Preset:
    """A row of presets.json.

    Attributes:
        name: of the preset.
        models: that it is of.
        model_types: as their config.json has them.
        program: how it routes, one of `programs()`.
        router: options of `RouterConfig` for a layer of experts, or None where no options describe it.
        missing: what stands between this row and a `RouterConfig`; empty where nothing does.
        vocab_size: of the model, or None if that is not known.
        layers: which of the layers have routers.
        tensors: their names in checkpoints, by attribute of a `Router`; `{i}` is the layer.
        arithmetic: what the model's own code rounds, and where.
        shared_experts: how many experts every token has besides.
        caller: what is left to do around the router.
        note: what else is worth knowing.
        sources: where this was read.
        unverified: what was not seen in a released configuration or code.
    """

    name: str
    models: Sequence[str]
    model_types: Sequence[str]
    program: str
    router: Mapping[str, Any] | None
    vocab_size: int | None
    layers: Layers
    tensors: Mapping[str, str]
    arithmetic: str
    shared_experts: int
    caller: Sequence[str]
    note: str
    sources: Sequence[str]
    unverified: Sequence[str]
    missing: Sequence[str] = ()

    def options(self, layer: int | None = None) -> dict[str, Any]:
        """The arguments of `RouterConfig` for a layer; without one, for the usual layer of experts.

        Raises:
            TypeError: layer is no int.
            ValueError: no options describe the router, or the layer has none.
        """
        if self.router is None or self.missing:
            raise ValueError(f"{self.name} is no RouterConfig, since it needs {'; '.join(self.missing)}")
        if layer is None:
            return dict(self.router)
        layer = _check.static_int("layer", layer, 0, None)
        if not self.layers.have_router(layer):
            raise ValueError(f"layer {layer} of {self.name} has no router: {self.layers.describe()}")
        if layer not in self.layers.hashed:
            return dict(self.router)
        # The table takes the place of the selection, and of its bias.
        options = {**self.router, "mode": "hash", "hash_weights": "scored", "vocab_size": self.vocab_size}
        return {**options, "selection_bias": False}


def presets() -> tuple[str, ...]:
    """The names that `RouterConfig.from_preset` takes; `python -m jax_router presets` shows what they stand for.

    Example:
        >>> from jax_router import presets
        >>> [name for name in presets() if name.startswith("mixtral")]
        ['mixtral_8x7b', 'mixtral_8x22b']
    """
    return tuple(name for name, row in all_presets().items() if not row.missing)


def preset(name: str) -> Preset:
    """A preset by its name."""
    rows = all_presets()
    if not isinstance(name, str) or name not in rows:
        raise ValueError(f"name must be one of jax_router.presets(), got {name!r}; near it: {_near(name, rows)}")
    return rows[name]


def _near(name: Any, names: Sequence[str] | Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(str(name).lower().replace("-", "_").replace(".", "_"), names, 4, 0.4)
    return ", ".join(near) or "none"


@functools.cache
def all_presets() -> Mapping[str, Preset]:
    """All rows of presets.json, also those that no options describe, by name."""
    return {row["name"]: _preset(row) for row in _data()["presets"]}


def programs() -> Mapping[str, str]:
    """The formula of each program."""
    return _data()["programs"]


@functools.cache
def _data() -> dict[str, Any]:
    return json.loads((resources.files(__package__) / "presets.json").read_text(encoding="utf-8"))


def _preset(row: Mapping[str, Any]) -> Preset:
    text = row["layers"]
    experts, dense, hashed = (
        None if text.get(kind) is None else _numbers(text[kind]) for kind in ("moe", "dense", "hash")
    )
    return Preset(**{**row, "layers": Layers(text["total"], experts, dense or (), hashed or ())})


def _numbers(text: str) -> range:
    """The layers of "first-last:step"."""
    span, _, step = text.partition(":")
    first, _, last = span.partition("-")
    return range(int(first), int(last or first) + 1, int(step or 1))


def _runs(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] as "0-2, 5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    words = [f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs]
    return ", ".join(words if len(words) < 6 else [*words[:3], "...", words[-1]]) or "none"


# A model's own config.json. The names of the fields, of which a family has one or none; the first that is there and not
# null counts.
_FIELDS = {
    "hidden_size": ("hidden_size", "d_model"),
    "num_experts": ("n_routed_experts", "num_local_experts", "moe_num_experts", "num_experts"),
    "top_k": (
        "num_experts_per_tok",
        "num_experts_per_token",
        "moe_topk",
        "moe_k",
        "moe_top_k",
        "top_k_experts",
    ),
    "score_fn": ("scoring_func", "score_function", "moe_router_activation_func", "expert_selection_fn"),
    "renormalize": ("norm_topk_prob", "moe_renormalize", "route_norm"),
    "scale": (
        "routed_scaling_factor",
        "route_scale",
        "router_scaling_factor",
        "moe_router_scaling_factor",
        "moe_routed_scaling_factor",
    ),
    "num_groups": ("n_group", "num_expert_group"),
    "top_groups": ("topk_group",),
    "softcap": ("moe_router_logit_softcapping",),
    "selection_bias": ("use_expert_bias",),
    "num_null_experts": ("zero_expert_num",),
}
# What null stands for, where a family writes it. Other fields are then as if they were not there.
_NULL = {"scale": 1.0, "num_groups": 1, "top_groups": 1, "softcap": None}


_ABSENT = object()


def hf_options(config: str | PathLike[str] | Mapping[str, Any], layer: int | None = None) -> dict[str, Any]:
    """The arguments of `RouterConfig` for a layer, from a config.json: see `RouterConfig.from_hf_config`."""
    config = _read(config)
    if layer is not None:
        layer = _check.static_int("layer", layer, 0, None)
    model_type, fields = _flatten(config)
    family = [row for row in all_presets().values() if model_type in row.model_types]
    if all(row.router is None for row in family):
        family[0].options()  # raises
    router = _agreed([row.router for row in family if row.router is not None])
    for option, names in _FIELDS.items():
        value = _field(option, names, fields, layer)
        if value is not _ABSENT:
            router[option] = value
    absent = [f"{' or '.join(_FIELDS[option])} ({option})" for option in _FIELDS if router.get(option) is _ABSENT]
    if absent:
        raise ValueError(f"config lacks what models of its model_type {model_type!r} differ in: {', '.join(absent)}")
    layers = _layers(fields, family[0].layers)
    vocab_size = _first(("vocab_size",), fields)[1] or family[0].vocab_size
    name = f"this {model_type} model"
    row = replace(
        family[0], name=name, router=_settled(router, fields), layers=layers, vocab_size=vocab_size, missing=()
    )
    return row.options(layer)


def _read(config: Any) -> Mapping[str, Any]:
    if isinstance(config, Mapping):
        return config
    if not isinstance(config, str | PathLike):
        raise TypeError(f"config must be a path or a dict (of an object of transformers its to_dict()), got {config!r}")
    path = Path(config)
    if path.is_dir():
        path /= "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"config must be a JSON file, got {path}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"config must hold a JSON object, got a {type(content).__name__} in {path}")
    return content


def _flatten(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The model_type that presets know it by, and the fields of the model and of the parts that have its router."""
    known = {model_type for row in all_presets().values() for model_type in row.model_types}
    parts = [config, *(config[part] for part in ("text_config", "ffn_config") if isinstance(config.get(part), Mapping))]
    found = [str(part.get("model_type")) for part in parts]
    for model_type in [*found, *(name.removesuffix("_text") for name in found)]:
        if model_type in known:
            return model_type, {name: value for part in parts for name, value in part.items()}
    raise ValueError(
        f"model_type of config must be one of {', '.join(sorted(known))}; got {config.get('model_type')!r}"
    )


def _agreed(routers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The options of a family: _ABSENT where its models differ in what a config.json says."""
    result = {}
    for option in {option: None for router in routers for option in router}:
        values = {router.get(option) for router in routers}
        differ = len(values) > 1 and option in _FIELDS
        result[option] = _ABSENT if differ else next(router[option] for router in routers if option in router)
    return result


def _first(names: Sequence[str], fields: Mapping[str, Any]) -> tuple[str, Any]:
    """The first of the names that has a value, and that; None if none has."""
    return next(((name, fields[name]) for name in names if fields.get(name) is not None), (names[0], None))


def _field(option: str, names: Sequence[str], fields: Mapping[str, Any], layer: int | None) -> Any:
    name, value = _first(names, fields)
    if value is None:
        return _NULL.get(option, _ABSENT) if any(name in fields for name in names) else _ABSENT
    if not isinstance(value, Sequence) or isinstance(value, str):
        return value
    if not value:
        raise ValueError(f"{name} of config must be a number or a list of one a layer, got {value!r}")
    if all(other == value[0] for other in value):
        return value[0]
    if layer is None or layer >= len(value):
        raise ValueError(
            f"layer must be between 0 and {len(value) - 1}, since {name} of config has a value for each, got {layer}"
        )
    return value[layer]


def _settled(router: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """The options, where one field depends on another."""
    router = dict(router)
    if fields.get("zero_expert_num") is not None:
        for option in ("num_experts", "num_null_experts"):
            _check.static_int(f"{option} of config", router[option], 0, None)
        router["num_experts"] += router["num_null_experts"]
    if not router.get("softcap"):
        router.pop("softcap", None)
    if router.get("num_groups", 1) == 1 or fields.get("topk_method") == "greedy":
        for option in ("num_groups", "top_groups", "group_score"):
            router.pop(option, None)
    return router


def _layers(fields: Mapping[str, Any], usual: Layers) -> Layers:
    """Which layers have experts, by the fields that families say it with."""
    name, total = _first(("num_hidden_layers", "n_layers"), fields)
    if total is None:
        return Layers()
    total = _check.static_int(f"{name} of config", total, 0, None)
    name, count = _first(("num_hash_layers",), fields)
    hashed = usual.hashed if count is None else range(_check.static_int(f"{name} of config", count, 0, None))
    name, kinds = _first(("mlp_layer_types", "layers_block_type", "hybrid_override_pattern"), fields)
    if kinds:
        experts = _kinds(name, kinds, ("dense",) if name == "mlp_layer_types" else None)
        return Layers(total, experts, hashed=[i for i, kind in enumerate(kinds) if kind == "hash_moe"])
    rules = [name for name in _LAYER_RULES if fields.get(name) is not None]
    if rules:
        experts = [i for i in range(total) if all(_has_experts(name, fields, i) for name in rules)]
        return Layers(total, experts, hashed=hashed)
    return Layers(total, usual.experts if usual.total == total else None, hashed=hashed)


def _kinds(name: str, kinds: Any, dense: Sequence[str] | None) -> list[int]:
    """The layers with experts, from the kind of each: those that are not dense, or, by default, that say so."""
    if not isinstance(kinds, Sequence) or not all(isinstance(kind, str) for kind in kinds):
        raise TypeError(f"{name} of config must be a list of strings, or a string, got {kinds!r}")
    return [i for i, kind in enumerate(kinds) if (kind in ("E", "moe") if dense is None else kind not in dense)]


def _has_experts(name: str, fields: Mapping[str, Any], layer: int) -> bool:
    """What one field says of a layer."""
    try:
        return _LAYER_RULES[name](fields[name], fields)(layer)
    except (TypeError, ValueError, LookupError, ArithmeticError) as error:
        raise ValueError(
            f"{name} of config must say whether layer {layer} has experts, got {fields[name]!r}"
        ) from error


def _listed(value: Any, _: Any) -> Callable[[int], bool]:
    listed = {int(i) for i in (value.split(",") if isinstance(value, str) else value)}
    return listed.__contains__


def _every(value: Any, _: Any) -> Callable[[int], bool]:
    return lambda i: (i + 1) % value == 0


def _from(value: Any, _: Any) -> Callable[[int], bool]:
    return lambda i: i >= value


def _frequency(value: Any, _: Any) -> Callable[[int], bool]:
    return lambda i: bool(value[i]) if isinstance(value, Sequence) else i % value == 0


# Of each field, from its value and all fields to whether a layer has experts. All that are there must agree.
_LAYER_RULES: Mapping[str, Callable[[Any, Mapping[str, Any]], Callable[[int], bool]]] = {
    "first_k_dense_replace": _from,
    "moe_layer_freq": _frequency,
    "num_dense_layers": _from,
    "decoder_sparse_step": _every,
    "mlp_only_layers": lambda value, _: lambda i: i not in value,
    "moe_layers": _listed,
    "interleave_moe_layer_step": _every,
    "moe_layers_enum": _listed,
    "expert_layer_period": lambda value, fields: lambda i: i % value == fields.get("expert_layer_offset", 0),
    "moe_layer_start_index": _from,
    "moe_layer_end_index": lambda value, _: lambda i: value < 0 or i <= value,
    "moe_layer_interval": _every,
}
