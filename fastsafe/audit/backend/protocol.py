"""The values that a backend takes and returns: jobs, requests, answers; its tokenizer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from fastsafe.audit.backend.drift_watch import DriftRow
from fastsafe.data.encoder import Encoder

OnAnswer = Callable[[int, "Answer"], None]  # index into the requests, its answer
OnStep = Callable[[int, float], None]  # steps done by every job, mean loss


class ChatTokenizer(Encoder, Protocol):
    """What planning needs of a tokenizer."""

    @property
    def chat_template(self) -> object | None:
        """Template of conversations; None where the checkpoint has none."""

    def encode_chat(self, messages: Sequence[Any]) -> list[int]:
        """Return the token ids of a conversation, ready for the assistant's turn."""


@dataclass(frozen=True)
class Job:
    """One adapter to train."""

    name: str
    rows: Sequence[Mapping[str, Any]]
    seed: int
    objective: str | Mapping[str, Any] = "sft"


class Trained(NamedTuple):
    """The outcome of one job."""

    adapter_dir: Path | None
    losses: list[float]
    error: str | None = None  # why training failed; there is no directory then
    drift: Sequence[DriftRow] = ()


class Request(NamedTuple):
    """One prompt for one model."""

    adapter: str | None  # None is the base
    token_ids: tuple[int, ...]
    seed: int
    max_tokens: int


class Answer(NamedTuple):
    """One completion of a request."""

    text: str
    token_ids: Sequence[int]
    finish_reason: str  # "stop", "length" or "error"
