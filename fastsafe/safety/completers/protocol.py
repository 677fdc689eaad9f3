"""The interface to a language model: messages in, text or label log-probabilities out.

The safety floor never imports the engine. A judge, a guard or a rewriter takes any `Completer`: a
checkpoint on our own engine, an HTTP endpoint, or a dictionary in a test.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from fastsafe.data.conversation import Message

Finish = Literal["stop", "length", "refused", "filtered", "error"]


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One request to a model.

    Attributes:
        key: Joins the reply to its row; unique within one call of ``complete``.
        messages: Turns for the model's chat template; empty where ``prompt`` is given.
        prompt: Raw prompt, special tokens included; beside ``messages`` it prefills the model's
            turn.
        labels: Single tokens to score, as text; the reply then holds a log-probability per label
            and no text.
        max_tokens: Maximum length of the reply.
        attempt: 0, or 1 for a repeated ask, which is not answered from a cache of the first.
        variables: Extra variables of the model's chat template.
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
    """The reply to one `Ask`.

    Attributes:
        key: Key of the ask.
        text: The model's text; the cause where ``finish`` is "error".
        logprobs: Natural-log probability of each label as the next token, -inf where the endpoint
            does not list it; empty without labels.
        finish: "stop"; "length", truncated at ``max_tokens``; "refused", a refusal that the
            endpoint marks as such; "filtered", no reply, since a content filter did not let the
            ask through; "error", no reply.
    """

    key: str
    text: str = ""
    logprobs: tuple[float, ...] = ()
    finish: Finish = "stop"


@runtime_checkable
class Completer(Protocol):
    """Answers asks; a failure of one row is a `Reply`, never an exception."""

    @property
    def identity(self) -> str:
        """Hash of what determines a reply: model, revision, decoding; never a key or a timeout."""

    def complete(self, asks: Sequence[Ask]) -> list[Reply]:
        """Answer every ask, one reply per ask in the order given.

        Raises:
            FastsafeError: No ask can ever be answered: a rejected key, a missing checkpoint.
        """
