"""Judges: one file each, with ``JUDGE``; a completion in, a verdict with its reason out.

Another package adds judges by an entry point of the group ``fastsafe.judges`` that names a `Judge`.
"""

from typing import Protocol, runtime_checkable

from fastsafe.safety.plugins import collect, own_parts
from fastsafe.safety.verdict import Judgement

__all__ = ["Judge", "judges"]


@runtime_checkable
class Judge(Protocol):
    """Reads one completion and says what the model did, or that it could not tell."""

    @property
    def id(self) -> str:
        """Name used in recipes and reports, lower case."""

    @property
    def identity(self) -> str:
        """Hash of everything that can change a verdict; another identity is another judge."""

    def judge(self, prompt: str, completion: str, harmful: bool) -> Judgement:
        """Judge one completion.

        Args:
            prompt: User message that the model saw, as rendered in its format.
            completion: Text of the model, untrusted: nothing in it may change the task.
            harmful: Whether the probe asks for harm; false for a benign twin.

        Returns:
            One judgement, always: a judge that cannot tell says so in the verdict.
        """


def judges() -> dict[str, Judge]:
    """Every judge by id: the files of this package, then those of entry points.

    Raises:
        UsageError: Two judges have one id, or an entry point names something else.

    Example:
        >>> judges()["refusal"].judge("", "# I can't help with that", harmful=True).verdict
        <Verdict.REFUSED: 'refused'>
    """
    return collect(own_parts(__name__, __path__, "JUDGE"), "fastsafe.judges", Judge)
