"""Training-time defences, each an ``Objective`` in a file of its own."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, get_type_hints

from fastsafe.errors import UsageError, nearest
from fastsafe.train.objectives.constrained_sft import ConstrainedSft
from fastsafe.train.objectives.der import Der
from fastsafe.train.objectives.ema import Ema
from fastsafe.train.objectives.ewc import Ewc
from fastsafe.train.objectives.first_token_kl import FirstTokenKl
from fastsafe.train.objectives.freeze_layers import FreezeLayers
from fastsafe.train.objectives.lisa import Lisa
from fastsafe.train.objectives.lookahead import LookAhead
from fastsafe.train.objectives.lwf import Lwf
from fastsafe.train.objectives.objective import Objective
from fastsafe.train.objectives.safegrad import SafeGrad
from fastsafe.train.objectives.sft import Sft

__all__ = ["Objective", "make_objective", "objectives"]

_ALL: tuple[type[Objective], ...] = (
    Sft,
    FirstTokenKl,
    ConstrainedSft,
    Lisa,
    Ema,
    Ewc,
    Lwf,
    Der,
    SafeGrad,
    FreezeLayers,
    LookAhead,
)


def objectives() -> dict[str, type[Objective]]:
    """List every objective by id."""
    return {objective.id: objective for objective in _ALL}


def make_objective(spec: str | Mapping[str, Any]) -> Objective:
    """Make an objective from its id, or from ``{"name": id}`` with parameters beside it.

    Raises:
        UsageError: The name or a parameter is unknown, or a value has a wrong type or range.

    Example:
        >>> make_objective({"name": "ema", "strength": 0.5})
        Ema(strength=0.5)
    """
    parameters = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = parameters.pop("name", None)
    by_id = objectives()
    if name not in by_id:
        raise UsageError(
            f"TrainConfig: objective is {name!r}, expected one of fastsafe's; "
            f"{nearest(str(name), by_id)}"
        )
    cls = by_id[name]
    fields = {field.name for field in dataclasses.fields(cls)}
    types = get_type_hints(cls)
    for key, value in parameters.items():
        if key not in fields:
            raise UsageError(
                f"objective {name!r}: {key!r} is not one of its parameters; {nearest(key, fields)}"
            )
        parameters[key] = _typed(value, types[key], f"objective {name!r}: {key}")
    return cls(**parameters)


def _typed(value: Any, expected: Any, location: str) -> Any:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if expected is float and is_number and math.isfinite(value):
        return float(value)
    if expected is int and is_number and isinstance(value, int):
        return value
    if expected is str and isinstance(value, str):
        return value
    is_list = isinstance(value, list | tuple) and all(type(item) is int for item in value)
    if expected == tuple[int, ...] and is_list:
        return tuple(value)
    names = {float: "a finite number", int: "an integer", str: "a text"}
    raise UsageError(
        f"{location} is {value!r}, expected {names.get(expected, 'a list of integers')}"
    )
