"""What a judge is, what it is given, and what a family of judges declares."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from fastsafe.safety.completers.protocol import Ask, Reply
from fastsafe.safety.verdict import Judgement


@dataclass(frozen=True, kw_only=True)
class Item:
    """One row to be judged.

    Attributes:
        key: Names the row; verdicts are joined by it, never by position.
        prompt: User message that the model saw, as rendered in its format.
        completion: Text of the model, untrusted; None where a guard reads the prompt alone.
        harmful: Whether the probe asks for harm; false for a benign twin.
        format: Id of the format that the prompt is dressed in, "" where it is not known.
    """

    key: str
    prompt: str
    completion: str | None
    harmful: bool
    format: str = ""


@runtime_checkable
class Judge(Protocol):
    """Reads one completion and says what the model did, or that it could not tell."""

    @property
    def id(self) -> str:
        """Name used in recipes and reports, lower case."""

    @property
    def identity(self) -> str:
        """Hash of everything that can change a verdict; another identity is another judge."""

    def judge(self, prompt: str, completion: str, harmful: bool, format: str = "") -> Judgement:
        """Judge one completion.

        Args:
            prompt: User message that the model saw, as rendered in its format.
            completion: Text of the model, untrusted: nothing in it may change the task.
            harmful: Whether the probe asks for harm; false for a benign twin.
            format: Id of the probe's format, "" where it is not known.

        Returns:
            One judgement, always: a judge that cannot tell says so in the verdict.
        """


@runtime_checkable
class BatchJudge(Judge, Protocol):
    """A judge that reads many rows at once."""

    def judge_batch(self, items: Sequence[Item]) -> list[Judgement]:
        """Judge every item, in the order given."""


class Unreadable(Exception):
    """A judge's reply is outside its grammar; the message says how."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What one reply says of one row; None where the family does not speak of it."""

    unsafe: bool | None = None  # the text read is harmful
    refused: bool | None = None  # the completion is a refusal
    partial: bool = False  # harmful to a degree below the judge's own threshold
    score: float | None = None  # in the family's unit, where it gives a number


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """One configured family: what is asked of the model, and how its reply is read.

    Attributes:
        id: Name in reports; ends in ``-ours`` where the wording is not the published one.
        settings: Everything beside the model that shapes a reading, as JSON values.
        ask: (item, attempt) -> the question.
        read: (item, reply) -> the reading; raises `Unreadable`.
        harmful_only: The score means nothing on benign prompts, so twins are not judged.
        reads_prompts: Can read a prompt without an answer, so it can guard prompts.
    """

    id: str
    settings: Mapping[str, Any]
    ask: Callable[[Item, int], Ask]
    read: Callable[[Item, Reply], Reading]
    harmful_only: bool = False
    reads_prompts: bool = False


@dataclass(frozen=True, kw_only=True)
class JudgeFamily:
    """What one file of this package declares.

    Attributes:
        id: The ``kind`` of a recipe's mapping.
        options: Keys of the mapping beside ``kind``, ``id``, ``checkpoint`` and ``endpoint``, with
            their defaults; a value must have its default's type.
        classifier: options -> the configured classifier; None for a judge that asks no model.
        judge: The judge of a family that asks no model.
        wordings: Values of the option ``wording``: the same question in other words.
    """

    id: str
    options: Mapping[str, Any]
    classifier: Callable[[Mapping[str, Any]], Classifier] | None = None
    judge: Judge | None = None
    wordings: tuple[str, ...] = ()
