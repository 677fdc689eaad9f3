"""Training-time defences, each an ``Objective`` in a file of its own."""

from collections.abc import Mapping
from typing import Any

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
from fastsafe.train.typed_fields import from_mapping

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
            f"objective is {name!r}, expected one of fastsafe's; {nearest(str(name), by_id)}"
        )
    return from_mapping(by_id[name], parameters, f"objective {name!r}")
