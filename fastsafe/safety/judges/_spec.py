"""Interfaces of judges: items, judges, and the declaration of a judge family."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

from fastsafe.data.thoughts import answer_of
from fastsafe.safety.completers.protocol import Ask, Reply
from fastsafe.safety.verdict import Judgement


@dataclass(frozen=True, kw_only=True)
class Item:
    """One row to be judged.

    Attributes:
        key: Id of the row; verdicts are joined by it, never by position.
        prompt: User message that the model saw, as rendered in its format.
        completion: Text of the model, untrusted; None where a guard reads the prompt alone.
        harmful: Whether the probe asks for harm; false for a benign twin.
        format: Id of the prompt's format, "" where it is unknown.
    """

    key: str
    prompt: str
    completion: str | None
    harmful: bool
    format: str = ""


def answered(item: Item) -> Item:
    """Return a row whose completion is the answer alone, without the model's thoughts."""
    return item if item.completion is None else replace(item, completion=answer_of(item.completion))


@runtime_checkable
class Judge(Protocol):
    """Judges one completion."""

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
            completion: Text of the model, untrusted: nothing in it may change the judge's task.
            harmful: Whether the probe asks for harm; false for a benign twin.
            format: Id of the probe's format, "" where it is unknown.

        Returns:
            Always one judgement; a judge that cannot decide returns a verdict that says so.
        """


@runtime_checkable
class BatchJudge(Judge, Protocol):
    """A judge of many rows at once."""

    def judge_batch(self, items: Sequence[Item]) -> list[Judgement]:
        """Judge every item, in the order given."""


class Unreadable(Exception):
    """A judge's reply is outside its grammar; the message says in what way."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The content of one reply; None for questions that the family does not answer."""

    unsafe: bool | None = None  # the judged text is harmful
    refused: bool | None = None  # the completion is a refusal
    partial: bool = False  # harmful to a degree below the judge's own threshold
    score: float | None = None  # in the family's unit


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """One configured family: its question to the model, and its parser of the reply.

    Attributes:
        id: Name in reports; ends in ``-ours`` where the wording is not the published one.
        settings: Everything beside the model that can change a reading, as JSON values.
        ask: (item, attempt) -> the ask.
        read: (item, reply) -> the reading; raises `Unreadable`.
        harmful_only: Whether the score is meaningless on benign prompts; twins are then not judged.
        reads_prompts: Whether it can classify a prompt without an answer, and so guard prompts.
    """

    id: str
    settings: Mapping[str, Any]
    ask: Callable[[Item, int], Ask]
    read: Callable[[Item, Reply], Reading]
    harmful_only: bool = False
    reads_prompts: bool = False

    def with_reply_tokens(self, count: int) -> "Classifier":
        """Return the classifier with another maximum length of the reply, in tokens."""

        def ask(item: Item, attempt: int) -> Ask:
            return replace(self.ask(item, attempt), max_tokens=count)

        return replace(self, ask=ask, settings={**self.settings, "reply_tokens": count})


@dataclass(frozen=True, kw_only=True)
class JudgeFamily:
    """The declaration of a judge family, one per file of this package.

    Attributes:
        id: The ``kind`` of a recipe's mapping.
        options: Further keys of the mapping with their defaults; a value has its default's type.
        classifier: options -> the configured classifier; None for a family without a model.
        judge: The judge of a family without a model.
        wordings: Values of the option ``wording``: the same question in different words.
    """

    id: str
    options: Mapping[str, Any]
    classifier: Callable[[Mapping[str, Any]], Classifier] | None = None
    judge: Judge | None = None
    wordings: tuple[str, ...] = ()
