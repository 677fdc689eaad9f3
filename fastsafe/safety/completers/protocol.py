"""The border to a language model that is asked something: messages in, text or label odds out.

The safety floor never imports the engine. A judge, a guard or a rewriter takes any `Completer`: a
checkpoint on our own engine, an HTTP endpoint, or a dictionary in a test.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from fastsafe.data.conversation import Message

Finish = Literal["stop", "length", "refused", "error"]


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One question to a model.

    Attributes:
        key: Joins the reply to its row; unique within one call of ``complete``.
        messages: Turns for the model's chat template; empty where ``prompt`` is given.
        prompt: Raw text, sent as it is, special tokens written out; beside ``messages`` it is how
            the model's own turn begins.
        labels: Where one token decides, the tokens as text; the reply then holds a log-probability
            per label and no text.
        max_tokens: Most tokens of the reply.
        attempt: 0, or 1 when the same is asked again; another attempt is another question.
        variables: Further variables of the model's chat template.
    """

    key: str
    messages: tuple[Message, ...] = ()
    prompt: str = ""
    labels: tuple[str, ...] = ()
    max_tokens: int = 512
    attempt: int = 0
    variables: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What came back for one `Ask`.

    Attributes:
        key: That of the ask.
        text: The model's words; the cause where ``finish`` is "error".
        logprobs: Natural-log probability of each label as the next token, -inf where the model
            does not list it; empty where no label was asked.
        finish: "stop"; "length", cut at ``max_tokens``; "refused", said by the endpoint in a field
            of its own; "error", nobody answered.
    """

    key: str
    text: str = ""
    logprobs: tuple[float, ...] = ()
    finish: Finish = "stop"


@runtime_checkable
class Completer(Protocol):
    """Answers questions; a failure of one row is a `Reply`, never an exception."""

    @property
    def identity(self) -> str:
        """Hash of what decides a reply: model, revision, decoding. Never a key or a time limit."""

    def complete(self, asks: Sequence[Ask]) -> list[Reply]:
        """Answer every ask, one reply per ask in the order given.

        Raises:
            FastsafeError: No ask can ever be answered: a refused key, a missing checkpoint.
        """
