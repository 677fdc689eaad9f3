"""What a run needs of whatever trains and answers: the border between it and the engine."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from fastsafe.audit.backend.drift_watch import DriftRow, Watch
from fastsafe.audit.plan.rendering import ChatTokenizer
from fastsafe.audit.recipe.schema import Sampling, Training

OnAnswer = Callable[[int, "Reply"], None]  # index into the requests, its reply
OnStep = Callable[[int, float], None]  # steps done by every job, mean loss


@dataclass(frozen=True)
class Job:
    """One adapter to train."""

    name: str
    rows: Sequence[Mapping[str, Any]]
    seed: int
    objective: str | Mapping[str, Any] = "sft"


class Trained(NamedTuple):
    """One adapter as training left it."""

    adapter_dir: Path | None
    losses: list[float]
    error: str | None = None  # why there is no directory
    drift: Sequence[DriftRow] = ()


class Request(NamedTuple):
    """One prompt for one model."""

    adapter: str | None  # None is the base
    token_ids: tuple[int, ...]
    seed: int
    max_tokens: int


class Reply(NamedTuple):
    """What the model said."""

    text: str
    token_ids: Sequence[int]
    finish_reason: str  # "stop", "length" or "error"


class Runtime(Protocol):
    """A base model that can be fine-tuned and asked."""

    @property
    def tokenizer(self) -> ChatTokenizer:
        """Tokenizer of the checkpoint, there before anything is loaded."""

    @property
    def engine(self) -> Mapping[str, str]:
        """Hashes of the model's files, ``device`` and ``dtype``: what answers depend on."""

    def load(self) -> None:
        """Put the weights on the device; a second call does nothing."""

    def facts(self) -> dict[str, Any]:
        """Return versions and choices for the manifest."""

    def train(
        self,
        jobs: Sequence[Job],
        training: Training,
        out_dir: Path,
        on_step: OnStep,
        watch: Watch | None = None,
    ) -> dict[str, Trained]:
        """Fine-tune all jobs together, and read their drift; returns name -> trained adapter."""

    def change(self, defence: str, params: Mapping[str, Any], adapter: Path, out_dir: Path) -> None:
        """Write what a defence makes of a trained adapter: an adapter, or a checkpoint."""

    def generate(
        self,
        requests: Sequence[Request],
        adapters: Mapping[str, Path],
        sampling: Sampling,
        on_answer: OnAnswer,
    ) -> None:
        """Answer every request; ``on_answer`` may be called from another thread."""

    def release(self) -> None:
        """Give the device back to whoever judges."""
