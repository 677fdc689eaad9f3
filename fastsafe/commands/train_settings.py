"""Settings of ``fastsafe train``: from the command line, a config file, a preset or the defaults.

The first of these that has a setting wins; where it is from is kept and shown.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fastsafe.errors import UsageError, nearest
from fastsafe.yaml_file import read_yaml

if TYPE_CHECKING:
    from fastsafe.train import TrainConfig
    from fastsafe.train.presets import Preset

DTYPES = ("float32", "bfloat16", "float16")
METHODS = ("lora", "full")

# Settings beside those of TrainConfig, and their defaults.
_OWN: dict[str, Any] = {
    "quantize": None,
    "dtype": None,
    "warmup_ratio": None,
    "max_length": None,
    "truncate": False,
    "checkpoint_every": 100,
    "share": 0.1,
    "drift_every": 0,
    "drift_probes": None,
    "drift_refusal": "I cannot help",
    "drift_affirmative": "Sure",
    "drift_stop_above": None,
}
# Of two that say the same in two ways the one with precedence resets the other.
_RIVALS = {"max_steps": "epochs", "warmup_steps": "warmup_ratio"}
_RIVALS |= {ratio: steps for steps, ratio in _RIVALS.items()}
_NUMBERS = ("alpha", "dropout", "learning_rate", "epochs", "weight_decay", "max_grad_norm", "share")


class Setting(NamedTuple):
    """One setting: its value, and where it is from."""

    value: Any
    origin: str


Settings = Mapping[str, Setting]


def settle(
    given: Mapping[str, Any],
    *,
    config_file: Path | None = None,
    preset: "Preset | None" = None,
    device: str = "cpu",
) -> dict[str, Setting]:
    """Decide every setting.

    Args:
        given: Of the command line; a None is not given.
        config_file: YAML mapping of settings.
        preset: A published set-up.
        device: "cpu" computes in float32 whatever the preset says.

    Raises:
        UsageError: A name is unknown, or a value has the wrong type or is none of those known.
    """
    defaults = _defaults()
    found = {key: Setting(value, "default") for key, value in defaults.items()}
    layers: list[tuple[str, Iterable[tuple[str, Setting]]]] = []
    if preset:
        items = [i for i in preset.items if not (i.key == "dtype" and device == "cpu")]
        origins = ((i.key, Setting(i.value, f"preset {preset.name} ({i.evidence})")) for i in items)
        layers.append((f"preset {preset.name}", origins))
    if config_file:
        where = str(config_file)
        values = read_yaml(config_file).items()
        layers.append((where, ((key, Setting(value, where)) for key, value in values)))
    told = {key: value for key, value in given.items() if value is not None}
    layers.append(("options", ((key, Setting(value, "given")) for key, value in told.items())))
    for where, settings in layers:
        for key, setting in settings:
            if key not in found:
                raise UsageError(f"{where}: {key!r} is not a setting; {nearest(key, found)}")
            found[key] = _over(found[key], setting._replace(value=_checked(key, setting, where)))
            if key in _RIVALS and setting.value is not None:
                found[_RIVALS[key]] = Setting(defaults[_RIVALS[key]], f"default, as {key} is set")
    if found["dtype"].value is None:
        dtype = "float32" if device == "cpu" else "bfloat16"
        found["dtype"] = Setting(dtype, f"default on {device}")
    return found


def names() -> tuple[str, ...]:
    """Return the names of all settings."""
    return tuple(_defaults())


def _defaults() -> dict[str, Any]:
    from fastsafe.train import TrainConfig

    # shuffle is for tests and benchmarks: an order of the rows that another trainer has, too
    fields = {f.name: f.default for f in dataclasses.fields(TrainConfig) if f.name != "shuffle"}
    return fields | _OWN


def train_config(settings: Settings, *, num_rows: int, seed: int) -> "TrainConfig":
    """Make the configuration of a job with ``num_rows`` rows; a warm-up share becomes steps.

    Raises:
        UsageError: A value is out of range.
    """
    from fastsafe.train import TrainConfig

    names = {f.name for f in dataclasses.fields(TrainConfig)}
    config = TrainConfig(**{k: s.value for k, s in settings.items() if k in names} | {"seed": seed})
    ratio = settings["warmup_ratio"].value
    if not ratio:
        return config
    steps = math.ceil(round(ratio * config.num_steps(num_rows), 6))  # as transformers rounds
    return dataclasses.replace(config, warmup_steps=steps)


def _over(old: Setting, new: Setting) -> Setting:
    """Say in the origin what is overridden."""
    if old.origin.startswith("default") or old.value == new.value:
        return new
    return new._replace(origin=f"{new.origin}; {old.origin} has {old.value}")


def _checked(key: str, setting: Setting, where: str) -> Any:
    value = setting.value
    known: dict[str, tuple[Any, ...]] = {
        "method": METHODS,
        "quantize": (None, "nf4"),
        "dtype": DTYPES,
        "truncate": (True, False),
    }
    wanted = ""
    if key in known and value not in known[key]:
        wanted = " or ".join(map(str, known[key]))
    elif key == "drift_every" and (type(value) is not int or value < 0):
        wanted = "a number of steps, 0 for none"
    elif key in ("drift_refusal", "drift_affirmative") and not isinstance(value, str):
        wanted = "a text"
    elif key in _NUMBERS or (key in ("warmup_ratio", "drift_stop_above") and value is not None):
        try:
            # YAML reads 2e-4 as a text
            value = float(value) if not isinstance(value, bool) else None
        except (TypeError, ValueError):
            value = None
        is_share = value is not None and 0 <= value < 1
        if value is None or (key == "warmup_ratio" and not is_share):
            wanted = "a number in [0, 1)" if key == "warmup_ratio" else "a number"
    elif key == "max_length" and value is not None and (type(value) is not int or value < 2):
        wanted = "a number of tokens from 2"
    elif key == "target_modules" and isinstance(value, list | tuple):
        value = tuple(value)
        if not value or not all(isinstance(name, str) for name in value):
            wanted = "names of linear modules"
    elif key == "target_modules" and not isinstance(value, str):
        wanted = "names of linear modules"
    if wanted:
        raise UsageError(f"{where}: {key} is {setting.value!r}, expected {wanted}")
    return value
