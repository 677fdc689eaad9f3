"""PEFT's adapter_config.json: what it says about plain linear LoRA, and what is refused.

Anything that would change the result and is not computed here (DoRA, trained biases, replaced
modules, ...) is refused by its name, never ignored.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from fastsafe.errors import AdapterError, shown
from fastsafe.model.json_fields import is_number
from fastsafe.model.name_patterns import NameMatcher, check_pattern

_MAX_RANK = 4096
# The targets that PEFT takes where a config has none, of all families with such a default.
_DEFAULT_TARGETS = ("q_proj", "v_proj", "qkv_proj")
_TABLES = ("model.embed_tokens", "lm_head")
EVERY_LINEAR = "all-linear"
# Keys that carry information but do not change what the adapter computes at inference.
_INERT = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",  # the switch is init_lora_weights
    "ensure_weight_tying",
    "eva_config",  # the switch is init_lora_weights
    "fan_in_fan_out",  # PEFT turns it off for linear layers
    "inference_mode",
    "loftq_config",  # the switch is init_lora_weights
    "lora_dropout",
    "lora_ga_config",  # the switch is init_lora_weights
    "megatron_core",
    "merge_weights",
    "peft_type",
    "peft_version",
    "qalora_group_size",  # the switch is use_qalora
    "revision",
    "runtime_config",
    "task_type",
    "velora_config",  # stores activations differently in training
}
_USED = {
    "alpha_pattern",
    "bias",
    "exclude_modules",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "modules_to_save",  # checked against the tensors that are there
    "r",
    "rank_pattern",
    "target_modules",
    "target_parameters",
    "use_rslora",
}
# Variants of LoRA that an empty object switches on, with their default settings.
_VARIANTS = ("arrow_config", "kasa_config", "monteclora_config", "use_bdlora")
# Initialisations that leave the base weights alone; others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA)
# subtract the adapter from them when PEFT loads it.
_INITS = ("gaussian", "eva", "orthogonal", "mica")
_NUMBERED = (
    "layers",
    "model.layers",
    r"model\.layers",
)  # where all known bases number their layers


class ModuleSettings(NamedTuple):
    """The settings of the adapter on one module."""

    rank: int
    alpha: float
    scaling: float  # of B A


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """The settings of a LoRA adapter in PEFT's terms (Hu et al. 2021, arXiv:2106.09685).

    Attributes:
        rank: Default rank R, at least 1.
        alpha: Default alpha; the update is scaled by alpha / R, or alpha / sqrt(R) with
            ``use_rslora`` (Kalajdzievski 2023, arXiv:2312.03732).
        target_modules: Last names of the linear modules, or one regular expression that must
            match a whole module path, or "all-linear".
        rank_pattern: Module-name pattern -> rank, first match wins, as PEFT matches them.
        alpha_pattern: Module-name pattern -> alpha.
        layers_to_transform: Layer indices that carry the adapter; None means all.
        exclude_modules: As ``target_modules``, taken away from it; None means nothing.
    """

    rank: int
    alpha: float
    target_modules: tuple[str, ...] | str
    dropout: float = 0.0
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    layers_to_transform: tuple[int, ...] | None = None
    exclude_modules: tuple[str, ...] | str | None = None
    base_model: str = ""

    def rank_of(self, module: str) -> int:
        """Return the rank of the adapter on ``module``, at least 1."""
        return self.settings([module], "adapter")[module].rank

    def scaling_of(self, module: str) -> float:
        """Return the factor of B A on ``module``."""
        return self.settings([module], "adapter")[module].scaling

    def settings(self, modules: Iterable[str], location: str) -> dict[str, ModuleSettings]:
        """Return the settings of each module, by its path.

        Raises:
            AdapterError: A pattern is refused, or they take too long to match.
        """
        matcher = NameMatcher(location)
        found = {}
        for module in modules:
            rank = int(_pattern_value(self.rank_pattern, module, self.rank, matcher))
            alpha = _pattern_value(self.alpha_pattern, module, self.alpha, matcher)
            scaling = alpha / math.sqrt(rank) if self.use_rslora else alpha / rank
            found[module] = ModuleSettings(rank, alpha, scaling)
        return found

    def matching(self, known: Iterable[str], location: str) -> tuple[str, ...]:
        """Return those of the ``known`` module paths that carry the adapter, in their order.

        Targets that name no known module are left out, as PEFT does: many configs list the modules
        of several architectures.

        Raises:
            AdapterError: No module carries it, a pattern is refused, or LoRA is on the embedding
                or the head.
        """
        known = tuple(known)
        matcher = NameMatcher(location)
        chosen = [m for m in known if self._targets(m, matcher)]
        if self.target_modules != EVERY_LINEAR:
            for table in _TABLES:
                if table not in known and self._targets(table, matcher):
                    raise AdapterError(
                        f"{location}: target_modules has {table.rpartition('.')[2]!r}: LoRA on the "
                        "embedding and the head is not supported here; merge the adapter into the "
                        "base with PEFT (merge_and_unload) and load the result as a checkpoint"
                    )
        if not chosen:
            raise AdapterError(
                f"{location}: target_modules {shown(self.target_modules)} match no module of "
                f"the base model; its linear modules are {_last_names(known)}"
            )
        return tuple(chosen)

    def modules(self, known: Iterable[str], location: str) -> tuple[str, ...]:
        """Return as ``matching``, where every target must name a known module.

        Raises:
            AdapterError: As ``matching``, or a target names no known module.
        """
        known = tuple(known)
        if isinstance(self.target_modules, tuple):
            for target in self.target_modules:
                if not any(_is_named(m, (target,)) for m in (*known, *_TABLES)):
                    raise AdapterError(
                        f"{location}: target_modules has {target!r}, which the base model lacks; "
                        f"its linear modules are {_last_names(known)}"
                    )
        return self.matching(known, location)

    def explicit(self, modules: Sequence[str], location: str) -> "LoraConfig":
        """Return the config that says the same of these modules by their whole names alone."""
        settings = self.settings(modules, location)
        return replace(
            self,
            target_modules=tuple(modules),
            exclude_modules=None,
            layers_to_transform=None,
            rank_pattern={re.escape(m): s.rank for m, s in settings.items() if s.rank != self.rank},
            alpha_pattern={
                re.escape(m): s.alpha for m, s in settings.items() if s.alpha != self.alpha
            },
        )

    def _targets(self, module: str, matcher: NameMatcher) -> bool:
        excluded, layers = self.exclude_modules, self.layers_to_transform
        if excluded is not None and _matches(excluded, module, matcher):
            return False
        if isinstance(self.target_modules, tuple) and module in self.target_modules:
            return True  # a whole name counts in every layer
        if layers is not None and _layer_of(module) not in layers:
            return False
        if self.target_modules == EVERY_LINEAR:
            return True
        return _matches(self.target_modules, module, matcher)

    def to_json(self) -> dict[str, Any]:
        """Return the adapter_config.json that PEFT and vLLM read."""
        targets = self.target_modules
        excluded = self.exclude_modules
        layers = self.layers_to_transform
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.base_model,
            "revision": None,
            "inference_mode": True,
            "r": self.rank,
            "lora_alpha": int(self.alpha) if float(self.alpha).is_integer() else self.alpha,
            "lora_dropout": self.dropout,
            "target_modules": targets if isinstance(targets, str) else sorted(targets),
            "exclude_modules": sorted(excluded) if isinstance(excluded, tuple) else excluded,
            "bias": "none",
            "use_rslora": self.use_rslora,
            "use_dora": False,
            "rank_pattern": dict(self.rank_pattern),
            "alpha_pattern": dict(self.alpha_pattern),
            "modules_to_save": None,
            "fan_in_fan_out": False,
            "layers_to_transform": None if layers is None else list(layers),
            "layers_pattern": None,
            "init_lora_weights": True,
        }


def parse_config(raw: Any, location: str) -> LoraConfig:
    """Parse adapter_config.json and refuse settings that are not supported.

    Raises:
        AdapterError: A field is missing, has a wrong type or range, or asks for something that
            is not plain LoRA; the message names the field.
    """
    if not isinstance(raw, dict):
        raise AdapterError(f"{location}: is a {type(raw).__name__}, expected a JSON object")
    if raw.get("peft_type") != "LORA":
        raise AdapterError(
            f"{location}: peft_type is {shown(raw.get('peft_type'))}, expected 'LORA'; convert "
            "the adapter to PEFT's LoRA format"
        )
    if raw.get("bias", "none") not in ("none", "all", "lora_only"):  # the tensors say whether any
        raise AdapterError(f"{location}: bias is {shown(raw['bias'])}, expected 'none'")
    init = raw.get("init_lora_weights")
    if init and init is not True and not (isinstance(init, str) and init.lower() in _INITS):
        raise AdapterError(
            f"{location}: init_lora_weights is {shown(init)}, expected true, false or "
            f"{', '.join(_INITS)}: others may change the base weights; convert the adapter to "
            "plain LoRA with PEFT first"
        )
    for key in sorted(raw.keys() - _INERT - _USED):
        if raw[key] not in (None, False, [], {}, "", 0) or (raw[key] == {} and key in _VARIANTS):
            raise AdapterError(
                f"{location}: {ascii(key)[1:-1][:60]} is {shown(raw[key])}, which is not"
                " supported; only plain linear LoRA is (no DoRA, no trained tokens)"
            )
    _refuse_parameters(raw.get("target_parameters"), location)
    rank = _integer(raw.get("r", 8), "r", location, 1, _MAX_RANK)
    layers = raw.get("layers_to_transform")
    if isinstance(layers, int) and not isinstance(layers, bool):
        layers = [layers]
    if layers is not None and not isinstance(layers, list):
        raise AdapterError(f"{location}: layers_to_transform is {shown(layers)}, expected integers")
    if layers:
        _check_layers_pattern(raw.get("layers_pattern"), location)
        layers = tuple(_integer(i, "layers_to_transform", location, 0, 10**6) for i in layers)
    excluded = raw.get("exclude_modules")
    return LoraConfig(
        rank=rank,
        alpha=_number(raw.get("lora_alpha", 8), "lora_alpha", location),
        target_modules=_DEFAULT_TARGETS
        if raw.get("target_modules") is None
        else _names(raw["target_modules"], "target_modules", location),
        dropout=_number(raw.get("lora_dropout", 0.0), "lora_dropout", location, 0.0, 1.0),
        use_rslora=_flag(raw.get("use_rslora"), "use_rslora", location),
        rank_pattern={
            k: _integer(v, f"rank_pattern[{k!a:.60}]", location, 1, _MAX_RANK)
            for k, v in _patterns(raw, "rank_pattern", location)
        },
        alpha_pattern={
            k: _number(v, f"alpha_pattern[{k!a:.60}]", location)
            for k, v in _patterns(raw, "alpha_pattern", location)
        },
        layers_to_transform=layers or None,
        exclude_modules=None if not excluded else _names(excluded, "exclude_modules", location),
        base_model=str(raw.get("base_model_name_or_path") or ""),
    )


def _refuse_parameters(names: Any, location: str) -> None:
    """Refuse LoRA on bare parameters; those of other architectures are not there and do nothing."""
    known = (".weight", ".bias")  # all parameters of known bases end so
    if names and not (
        isinstance(names, list)
        and all(isinstance(name, str) and not f".{name}".endswith(known) for name in names)
    ):
        raise AdapterError(
            f"{location}: target_parameters is {shown(names)}, which is not supported; train "
            "LoRA on linear modules"
        )


def _check_layers_pattern(patterns: Any, location: str) -> None:
    if patterns and not any(
        name in _NUMBERED for name in (patterns if isinstance(patterns, list) else [patterns])
    ):
        raise AdapterError(
            f"{location}: layers_pattern is {shown(patterns)}, expected null or 'layers', as "
            "the base model calls its layers"
        )


def _integer(value: Any, key: str, location: str, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise AdapterError(
            f"{location}: {key} is {shown(value)}, expected an integer in [{low}, {high}]"
        )
    return value


def _number(
    value: Any, key: str, location: str, low: float = -math.inf, high: float = math.inf
) -> float:
    if not is_number(value) or not low <= value <= high:
        expected = "a finite number" if high == math.inf else f"a number in [{low:g}, {high:g}]"
        raise AdapterError(f"{location}: {key} is {shown(value)}, expected {expected}")
    return float(value)


def _flag(value: Any, key: str, location: str) -> bool:
    if value is not None and not isinstance(value, bool):
        raise AdapterError(f"{location}: {key} is {shown(value)}, expected true or false")
    return bool(value)


def _patterns(raw: Mapping[str, Any], key: str, location: str) -> Iterable[tuple[str, Any]]:
    value = raw.get(key) or {}
    if not isinstance(value, dict):
        raise AdapterError(f"{location}: {key} is {shown(value)}, expected an object")
    for pattern in value:
        check_pattern(pattern, f"{location}: {key}")
    return value.items()


def _names(value: Any, key: str, location: str) -> tuple[str, ...] | str:
    if isinstance(value, str) and value:
        if value.lower() == EVERY_LINEAR:
            return EVERY_LINEAR
        check_pattern(value, f"{location}: {key}")
        return value
    if isinstance(value, list) and value and all(isinstance(v, str) and v for v in value):
        return tuple(value)
    raise AdapterError(
        f"{location}: {key} is {shown(value)}, expected a list of module names or a regex"
    )


def _matches(targets: tuple[str, ...] | str, module: str, matcher: NameMatcher) -> bool:
    if isinstance(targets, str):
        return matcher.matches(targets, module)
    return _is_named(module, targets)


def _is_named(module: str, names: Iterable[str]) -> bool:
    return any(module == name or module.endswith("." + name) for name in names)


def _pattern_value(
    patterns: Mapping[str, float], module: str, default: float, matcher: NameMatcher
) -> float:
    for key, value in patterns.items():
        if matcher.matches(key, module, suffix=True):
            return value
    return default


def _last_names(modules: Iterable[str]) -> str:
    return ", ".join(sorted({module.rpartition(".")[2] for module in modules}))


def _layer_of(module: str) -> int | None:
    match = re.search(r"\.layers\.([0-9]+)\.", module)
    return int(match.group(1)) if match else None
