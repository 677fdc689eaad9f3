"""PEFT adapter directories: adapter_config.json + adapter_model.safetensors, read and written.

Only plain linear LoRA is accepted. Anything that would change the result and is not computed here
(DoRA, trained biases, replaced modules, ...) is refused by its name, never ignored.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fastsafe.errors import AdapterError
from fastsafe.io import safetensors
from fastsafe.io.atomic import publish_dir
from fastsafe.io.json_file import read_json
from fastsafe.io.weight_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS

_PREFIX = "base_model.model."
_MAX_RANK = 4096
_MAX_CONFIG_BYTES = 1 << 20
# Keys that carry information but do not change what the adapter computes at inference.
_INERT = {
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "eva_config",
    "inference_mode",
    "loftq_config",  # the switch is init_lora_weights
    "lora_dropout",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",  # the switch is use_qalora
    "revision",
    "runtime_config",
    "task_type",
}
_USED = {
    "alpha_pattern",
    "bias",
    "exclude_modules",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "r",
    "rank_pattern",
    "target_modules",
    "use_rslora",
}
# Initialisations that subtract the adapter from the base weights when PEFT loads them.
_REBASING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


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
        return int(_pattern_value(self.rank_pattern, module, self.rank))

    def scaling_of(self, module: str) -> float:
        """Return the factor of B A on ``module``."""
        rank = self.rank_of(module)
        alpha = _pattern_value(self.alpha_pattern, module, self.alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def modules(self, known: Iterable[str], location: str) -> tuple[str, ...]:
        """Return those of the ``known`` module paths that carry the adapter, in their order.

        Raises:
            AdapterError: A target names no known module.
        """
        known = tuple(known)
        chosen = [m for m in known if _is_target(self.target_modules, m, location)]
        if isinstance(self.target_modules, tuple):
            for target in self.target_modules:
                if not any(m == target or m.endswith("." + target) for m in known):
                    names = ", ".join(sorted({m.rpartition(".")[2] for m in known}))
                    raise AdapterError(
                        f"{location}: target_modules has {target!r}, which the base model lacks; "
                        f"its linear modules are {names}"
                    )
        if self.exclude_modules is not None:
            excluded = self.exclude_modules
            chosen = [m for m in chosen if not _is_target(excluded, m, location)]
        if self.layers_to_transform is not None:
            keep = set(self.layers_to_transform)
            chosen = [m for m in chosen if _layer_of(m) in keep]
        if not chosen:
            raise AdapterError(
                f"{location}: target_modules {self.target_modules!r} match no module of the base"
                " model"
            )
        return tuple(chosen)

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
        raise AdapterError(f"{location}: peft_type is {raw.get('peft_type')!r}, expected 'LORA'")
    if raw.get("bias", "none") != "none":
        raise AdapterError(
            f"{location}: bias is {raw['bias']!r}, expected 'none': trained biases are not"
            " supported"
        )
    init = raw.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_REBASING_INITS):
        raise AdapterError(
            f"{location}: init_lora_weights is {init!r}, which changes the base weights; "
            "convert the adapter to plain LoRA with PEFT first"
        )
    if raw.get("layers_pattern") not in (None, "layers", ["layers"]):
        raise AdapterError(
            f"{location}: layers_pattern is {raw['layers_pattern']!r}, expected null or 'layers'"
        )
    for key in sorted(raw.keys() - _INERT - _USED):
        if raw[key] not in (None, False, [], {}, "", 0):
            raise AdapterError(
                f"{location}: {key} is {raw[key]!r}, which is not supported; "
                "only plain linear LoRA is (no DoRA, no modules_to_save)"
            )
    rank = _integer(raw.get("r", 8), "r", location, 1, _MAX_RANK)
    layers = raw.get("layers_to_transform")
    if isinstance(layers, int) and not isinstance(layers, bool):
        layers = [layers]
    if layers is not None:
        if not isinstance(layers, list):
            raise AdapterError(f"{location}: layers_to_transform is {layers!r}, expected integers")
        layers = tuple(_integer(i, "layers_to_transform", location, 0, 10**6) for i in layers)
    excluded = raw.get("exclude_modules")
    return LoraConfig(
        rank=rank,
        alpha=_number(raw.get("lora_alpha", 8), "lora_alpha", location),
        target_modules=_targets(raw.get("target_modules"), "target_modules", location),
        dropout=_number(raw.get("lora_dropout", 0.0), "lora_dropout", location),
        use_rslora=bool(raw.get("use_rslora", False)),
        rank_pattern={
            k: _integer(v, f"rank_pattern[{k!r}]", location, 1, _MAX_RANK)
            for k, v in _patterns(raw, "rank_pattern", location)
        },
        alpha_pattern={
            k: _number(v, f"alpha_pattern[{k!r}]", location)
            for k, v in _patterns(raw, "alpha_pattern", location)
        },
        layers_to_transform=layers,
        exclude_modules=None if not excluded else _targets(excluded, "exclude_modules", location),
        base_model=str(raw.get("base_model_name_or_path") or ""),
    )


def read_dir(path: Path) -> tuple[LoraConfig, dict[str, Any]]:
    """Read the config and raw tensors of an adapter directory, keys without PEFT's prefix.

    Raises:
        AdapterError: A file is missing, is a pickle, or holds something else than LoRA weights.
    """
    location = str(path / ADAPTER_CONFIG)
    if not path.is_dir():
        missing = f"adapter {path}: no such directory; give the folder PEFT wrote"
        raise AdapterError(missing) from FileNotFoundError(str(path))
    if not (path / ADAPTER_CONFIG).is_file():
        raise AdapterError(
            f"adapter {path}: {ADAPTER_CONFIG} is missing; give the folder PEFT wrote"
        )
    if not (path / ADAPTER_WEIGHTS).is_file():
        pickles = sorted(p.name for p in path.glob("adapter_model.*"))
        found = f"found only {', '.join(pickles)}, which is refused" if pickles else "none found"
        raise AdapterError(
            f"adapter {path}: {ADAPTER_WEIGHTS} expected, {found}; save it with safe_serialization"
        )
    config = parse_config(read_json(path / ADAPTER_CONFIG, max_bytes=_MAX_CONFIG_BYTES), location)
    tensors = {}
    for key, tensor in safetensors.read(path / ADAPTER_WEIGHTS).items():
        if not key.startswith(_PREFIX):
            raise AdapterError(f"{path / ADAPTER_WEIGHTS}: tensor {key!r} lacks prefix {_PREFIX!r}")
        tensors[key.removeprefix(_PREFIX)] = tensor
    return config, tensors


def write_dir(
    path: Path,
    config: LoraConfig,
    tensors: Mapping[str, Any],
    notes: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write an adapter directory whole or not at all; an older one is replaced.

    ``notes`` are further files, name -> text, that say where the adapter comes from.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with publish_dir(path) as folder:
        safetensors.write(
            folder / ADAPTER_WEIGHTS,
            {_PREFIX + key: tensor.contiguous() for key, tensor in tensors.items()},
            {"format": "pt"},
        )
        text = json.dumps(config.to_json(), indent=2, sort_keys=True)
        (folder / ADAPTER_CONFIG).write_text(text + "\n", encoding="utf-8")
        for name, note in notes.items():
            (folder / name).write_text(note, encoding="utf-8")


def _integer(value: Any, key: str, location: str, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise AdapterError(
            f"{location}: {key} is {value!r}, expected an integer in [{low}, {high}]"
        )
    return value


def _number(value: Any, key: str, location: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise AdapterError(f"{location}: {key} is {value!r}, expected a finite number")
    return float(value)


def _patterns(raw: Mapping[str, Any], key: str, location: str) -> list[tuple[str, Any]]:
    value = raw.get(key) or {}
    if not isinstance(value, dict):
        raise AdapterError(f"{location}: {key} is {value!r}, expected an object")
    if len(value) > _MAX_PATTERNS:
        raise AdapterError(
            f"{location}: {key} has {len(value)} patterns, expected at most {_MAX_PATTERNS}"
        )
    for pattern in value:
        check_pattern(pattern, f"{location}: {key}")
    return list(value.items())


def _targets(value: Any, key: str, location: str) -> tuple[str, ...] | str:
    if isinstance(value, str) and value:
        if value != "all-linear":
            check_pattern(value, f"{location}: {key}")
        return value
    if isinstance(value, list) and value and all(isinstance(v, str) and v for v in value):
        return tuple(value)
    raise AdapterError(
        f"{location}: {key} is {value!r}, expected a list of module names or a regex"
    )


def _is_target(targets: tuple[str, ...] | str, module: str, location: str) -> bool:
    if targets == "all-linear":
        return True
    if isinstance(targets, str):
        return check_pattern(targets, location).fullmatch(module) is not None
    return any(module == t or module.endswith("." + t) for t in targets)


def _pattern_value(patterns: Mapping[str, float], module: str, default: float) -> float:
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _layer_of(module: str) -> int | None:
    match = re.search(r"\.layers\.([0-9]+)\.", module)
    return int(match.group(1)) if match else None


_MAX_PATTERN = 512
_MAX_REPEATS = 6
_MAX_PATTERNS = 256
_REPEAT = re.compile(r"(?<!\\)(?:[*+]|\{[0-9,]*\}|(?<![(*+?}])\?)")


def check_pattern(pattern: str, location: str) -> re.Pattern[str]:
    r"""Compile a regular expression from an untrusted adapter, or refuse it.

    A pattern whose groups repeat, such as ``(a+)+``, can take exponential time in a backtracking
    engine. Without them the time is polynomial in the number of repeats, which is bounded too.

    Raises:
        AdapterError: The pattern is too long, is no regular expression, repeats a group, uses a
            backreference, or has too many repeats.

    Example:
        >>> check_pattern(r".*\.(q_proj|v_proj)", "demo").pattern
        '.*\\.(q_proj|v_proj)'
    """
    if len(pattern) > _MAX_PATTERN:
        raise AdapterError(
            f"{location}: pattern has {len(pattern)} characters, expected at most {_MAX_PATTERN}"
        )
    repeats_group = re.search(r"\)\s*(?:[*+]|\{)", pattern) is not None
    if repeats_group or re.search(r"\\[1-9]|\(\?P=", pattern):
        raise AdapterError(
            f"{location}: pattern {pattern!r} repeats a group or refers back to one, which is "
            "refused from untrusted files; list the module names instead"
        )
    if len(_REPEAT.findall(pattern)) > _MAX_REPEATS:
        raise AdapterError(
            f"{location}: pattern {pattern!r} has more than {_MAX_REPEATS} repeats; "
            "list the module names instead"
        )
    try:
        return re.compile(pattern)
    except (re.error, RecursionError) as error:
        raise AdapterError(
            f"{location}: pattern {pattern!r} is no regular expression: {error}"
        ) from None
