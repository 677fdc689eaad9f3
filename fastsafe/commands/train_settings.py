"""Settings of ``fastsafe train``, merged from options, a config file, a preset and the defaults.

The first of these that has a setting wins. Its origin is recorded and shown by ``--dry-run``.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_type_hints

from fastsafe.errors import UsageError, nearest, shown
from fastsafe.train.config import TrainConfig
from fastsafe.train.typed_fields import typed

if TYPE_CHECKING:
    from fastsafe.train.presets import Preset


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Settings of a run that a ``TrainConfig`` does not hold.

    Attributes:
        quantize: nf4 holds the base in 4 bits.
        dtype: float32, bfloat16 or float16 [default: float32 on a CPU, else bfloat16].
        warmup_ratio: Warm-up as a fraction of the steps.
        chat_template_kwargs: Variables of the chat template, such as enable_thinking.
        max_length: Maximum number of tokens of a row [default: the model's].
        truncate: Cut longer rows instead of stopping.
        checkpoint_every: Steps between checkpoints; 0 writes none.
        share: Safety rows as a fraction of the mixture.
        drift_every: Steps between measurements of the drift from the base; 0 measures none.
        drift_probes: Behaviours that drift is measured on [default: 16 shipped].
        drift_refusal: Opening of an answer that refuses.
        drift_affirmative: Opening of an answer that complies.
        drift_stop_above: KL divergence, in nats, that ends a job early.
    """

    quantize: Literal["nf4"] | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    warmup_ratio: float | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    max_length: int | None = None
    truncate: bool = False
    checkpoint_every: int = 100
    share: float = 0.1
    drift_every: int = 0
    drift_probes: str | None = None
    drift_refusal: str = "I cannot help"
    drift_affirmative: str = "Sure"
    drift_stop_above: float | None = None


TYPES = get_type_hints(TrainConfig) | get_type_hints(RunSettings)
# shuffle is for tests and benchmarks, which need the order of rows of another trainer
del TYPES["shuffle"]
_DEFAULTS = {name: getattr(TrainConfig, name, getattr(RunSettings, name, None)) for name in TYPES}
OPTIONS = "options"  # layer of the command line, which errors do not name
_MINIMA = {
    "drift_every": (0, "a number of steps, 0 for none"),
    "max_length": (2, "2 tokens or more"),
}
# two ways to set one thing: setting one of them resets the other
_RIVALS = {"max_steps": "epochs", "warmup_steps": "warmup_ratio"}
_RIVALS |= {ratio: steps for steps, ratio in _RIVALS.items()}


class Setting(NamedTuple):
    """Value of a setting and its origin."""

    value: Any
    origin: str


Settings = Mapping[str, Setting]


def settle(
    options: Mapping[str, Any],
    *,
    config_file: Path | None = None,
    preset: "Preset | None" = None,
    device: str = "cpu",
) -> dict[str, Setting]:
    """Merge the settings of all origins.

    Args:
        options: Settings of the command line; None for those that are not given.
        config_file: YAML mapping of settings; the path in it is relative to its folder.
        preset: A published set-up.
        device: "cpu" computes in float32 whatever the preset names.

    Raises:
        UsageError: A setting is unknown, or its value has the wrong type or range.
    """
    settings = {name: Setting(value, "default") for name, value in _DEFAULTS.items()}
    layers: list[tuple[str, dict[str, Setting]]] = []
    if preset:
        name = f"preset {preset.name}"
        items = [i for i in preset.items if not (i.key == "dtype" and device == "cpu")]
        layers.append((name, {i.key: Setting(i.value, f"{name} ({i.evidence})") for i in items}))
    if config_file:
        from fastsafe.yaml_file import read_yaml

        name = str(config_file)
        values = read_yaml(config_file)
        if isinstance(probes := values.get("drift_probes"), str):
            values["drift_probes"] = str(config_file.parent / probes)
        layers.append((name, {key: Setting(value, name) for key, value in values.items()}))
    given = {key: Setting(value, "given") for key, value in options.items() if value is not None}
    layers.append((OPTIONS, given))
    for layer, new_settings in layers:
        for key, setting in new_settings.items():
            if key not in settings:
                raise UsageError(f"{layer}: {key!r} is not a setting; {nearest(key, settings)}")
            value = _checked(key, setting.value, layer)
            settings[key] = _overriding(settings[key], setting._replace(value=value))
            rival = _RIVALS.get(key)
            if rival and setting.value is not None:
                settings[rival] = Setting(_DEFAULTS[rival], f"default, as {key} is set")
    if settings["dtype"].value is None:
        dtype = "float32" if device == "cpu" else "bfloat16"
        settings["dtype"] = Setting(dtype, f"default on {device}")
    return settings


def train_config(settings: Settings, *, num_rows: int, seed: int) -> TrainConfig:
    """Return the configuration of a job with ``num_rows`` rows; a warm-up ratio becomes steps.

    Raises:
        UsageError: A value is out of range.
    """
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    config = TrainConfig(**{k: s.value for k, s in settings.items() if k in names} | {"seed": seed})
    ratio = settings["warmup_ratio"].value
    if not ratio:
        return config
    steps = math.ceil(round(ratio * config.num_steps(num_rows), 6))  # as transformers rounds
    return dataclasses.replace(config, warmup_steps=steps)


def _overriding(old: Setting, new: Setting) -> Setting:
    """Return the new setting, with the value that it overrides in its origin."""
    if old.origin.startswith("default") or old.value == new.value:
        return new
    return new._replace(origin=f"{new.origin}; {old.origin} has {old.value}")


def _checked(key: str, value: Any, layer: str) -> Any:
    hint = TYPES[key]
    place = key if layer == OPTIONS else f"{layer}: {key}"
    if isinstance(value, str) and hint in (float, float | None):
        with suppress(ValueError):
            value = float(value)  # YAML reads 2e-4 as a string
    value = typed(value, hint, place)
    minimum, expected = _MINIMA.get(key, (-math.inf, ""))
    if expected and value is not None and value < minimum:
        raise UsageError(f"{place} is {shown(value)}, expected {expected}")
    if key == "warmup_ratio" and value is not None and not 0 <= value < 1:
        raise UsageError(f"{place} is {shown(value)}, expected a number in [0, 1)")
    if key == "target_modules" and not value:
        raise UsageError(f"{place} is empty, expected names of linear modules")
    return value


def check_dependent(
    options: Mapping[str, Any], seeds: Sequence[int], safety_data: str | None
) -> None:
    """Refuse options that have no effect without another one."""
    for key, value in options.items():
        option = "--safety-data" if key == "share" else "--drift-every"
        is_set = safety_data if key == "share" else options.get("drift_every")
        if (key == "share" or key.startswith("drift_")) and value and not is_set:
            raise UsageError(f"--{key.replace('_', '-')}: expected {option} with it")
    if seeds and options.get("seed") is not None:
        raise UsageError("--seeds: --seed is set, too, expected one of them")
