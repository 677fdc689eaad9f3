"""The declaration of a defence, and the check of its parameters."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from fastsafe.errors import UsageError, nearest

Stage = Literal["data", "train", "post", "serve"]


@dataclass(frozen=True, kw_only=True)
class Defence:
    """One mitigation that needs no training.

    Attributes:
        id: Name in recipes and reports.
        stage: ``"post"`` edits tuned weights, ``"serve"`` edits prompts or answers; mitigations of
            the stages ``"data"`` and ``"train"`` are mixtures and objectives.
        acts_on: Arguments and result of ``apply``. ``"weights"``: (tuned, base, out, **params),
            three paths, writes a PEFT or checkpoint folder. ``"prompt"``: (messages, **params),
            returns messages. ``"answer"``: (prompts, answers, **params), returns one ``Screened``
            each.
        about: One line on what it does.
        evidence: Whether the formula was verified against the source, and the source.
        needs: Parameters without a default -> description of a valid value.
        params: Parameters with their defaults.
        apply: See ``acts_on``.
    """

    id: str
    stage: Stage
    acts_on: Literal["weights", "prompt", "answer"]
    about: str
    evidence: str
    needs: Mapping[str, str] = field(default_factory=dict)
    params: Mapping[str, Any] = field(default_factory=dict)
    apply: Callable[..., Any]

    def arguments(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of ``apply``: the defaults, overridden by the given parameters.

        Raises:
            UsageError: A parameter is unknown, or one without a default is missing.
        """
        for name in given:
            if name not in self.needs and name not in self.params:
                hint = nearest(name, [*self.needs, *self.params])
                raise UsageError(f"defence {self.id}: parameter {name!r} is unknown; {hint}")
        for name, need in self.needs.items():
            if given.get(name) is None:
                raise UsageError(f"defence {self.id}: parameter {name!r} is missing; give {need}")
        return {**self.params, **given}
