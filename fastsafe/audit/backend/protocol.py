"""The protocol of a backend: what a run asks of the engine that trains and generates for it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from fastsafe.audit.backend.drift_watch import DriftRow, Watch
from fastsafe.audit.recipe.schema import Recipe, Sampling, Training

OnAnswer = Callable[[int, "Answer"], None]  # index into the requests, its answer
OnStep = Callable[[int, float], None]  # steps done by every job, mean loss


class ChatTokenizer(Protocol):
    """What planning needs of a tokenizer."""

    def encode_chat(self, messages: Sequence[Any]) -> list[int]:
        """Return the token ids of a conversation, ready for the assistant's turn."""

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, with the tokenizer's special tokens."""


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


class Backend(Protocol):
    """A base model that can be fine-tuned and that generates."""

    @property
    def tokenizer(self) -> ChatTokenizer:
        """Tokenizer of the checkpoint; it needs no loaded weights."""

    @property
    def engine(self) -> Mapping[str, str]:
        """Hashes of the model's files, ``device`` and ``dtype``: what answers depend on."""

    def check_training(self, recipe: Recipe, objectives: Sequence[str | Mapping[str, Any]]) -> None:
        """Raise a RecipeError where the recipe asks for training that this backend cannot do."""

    def load(self) -> None:
        """Put the weights on the device; a second call does nothing."""

    def facts(self) -> dict[str, Any]:
        """Return versions and settings for the manifest."""

    def train(
        self,
        jobs: Sequence[Job],
        training: Training,
        out_dir: Path,
        on_step: OnStep,
        watch: Watch | None = None,
    ) -> dict[str, Trained]:
        """Fine-tune all jobs together and monitor their drift; return the outcomes by name."""

    def change(self, defence: str, params: Mapping[str, Any], adapter: Path, out_dir: Path) -> None:
        """Apply a defence to a trained adapter and write the new adapter or checkpoint."""

    def generate(
        self,
        requests: Sequence[Request],
        adapters: Mapping[str, Path],
        sampling: Sampling,
        on_answer: OnAnswer,
    ) -> None:
        """Answer every request; ``on_answer`` may be called from another thread."""

    def release(self) -> None:
        """Unload the weights, so that judges have the device's memory; ``load`` takes it again."""
