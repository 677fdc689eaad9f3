"""Settings, options, job and result of a fine-tuning. Imports no torch, for the command line."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

from fastsafe.data.conversation import Row
from fastsafe.errors import UsageError, names_its_fields
from fastsafe.train.typed_fields import typed

if TYPE_CHECKING:
    from fastsafe.model.peft import LoraConfig
    from fastsafe.train.drift_monitor import DriftMonitor


@names_its_fields
@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of one training.

    The command line takes its options from the fields, and their help from the lines below.

    Attributes:
        rank: Rank of the adapter.
        alpha: Updates are scaled by alpha / rank.
        target_modules: Linear modules that get an adapter: their last names, a regular expression,
            or all-linear.
        dropout: Dropout of the adapter's inputs.
        learning_rate: Peak learning rate.
        schedule: Learning rate after warm-up: constant, or linear or cosine decay to 0.
        warmup_steps: Steps over which the learning rate rises from 0.
        max_steps: Optimizer steps; sets the length instead of the epochs.
        epochs: Passes over the rows.
        batch_size: Rows per optimizer step; the last batch of an epoch may be smaller.
        seed: Seed of the initial weights, the row order and dropout.
        weight_decay: Decoupled weight decay of AdamW.
        max_grad_norm: Gradients are clipped to this L2 norm; 0 turns clipping off.
        loss_on: Tokens that the loss is computed on: completion, for answers only, or all.
        shuffle: Whether the rows have a new order in each epoch.
        objective: Name of a training objective, or a mapping of its name and parameters.
        method: lora trains an adapter; full trains a copy of all weights, where rank, alpha and
            target_modules have no effect and dropout must be 0.
    """

    rank: int = 8
    alpha: float = 16.0
    target_modules: Sequence[str] | str = "all-linear"
    dropout: float = 0.0
    learning_rate: float = 2e-4
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    max_steps: int | None = None
    epochs: float = 1.0
    batch_size: int = 16
    seed: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    loss_on: Literal["completion", "all"] = "completion"
    shuffle: bool = True
    objective: str | Mapping[str, Any] = "sft"
    method: Literal["lora", "full"] = "lora"

    def __post_init__(self) -> None:
        from fastsafe.train.objectives import make_objective

        for name, hint in get_type_hints(type(self)).items():
            typed(getattr(self, name), hint, name)
        for name, is_valid, expected in (
            ("rank", 1 <= self.rank <= 4096, "an integer in [1, 4096]"),
            ("alpha", math.isfinite(self.alpha), "a finite number"),
            ("dropout", 0 <= self.dropout < 1, "in [0, 1)"),
            ("learning_rate", 0 <= self.learning_rate <= 10, "in [0, 10]"),
            ("warmup_steps", self.warmup_steps >= 0, "at least 0"),
            ("max_steps", self.max_steps is None or self.max_steps >= 1, "at least 1 or None"),
            ("epochs", 0 < self.epochs < math.inf, "more than 0"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "at least 0"),
            ("max_grad_norm", self.max_grad_norm >= 0, "at least 0 (0 means off)"),
            ("dropout", self.method == "lora" or self.dropout == 0, "0 where method is 'full'"),
        ):
            if not is_valid:
                raise UsageError(f"{name} is {getattr(self, name)!r}, expected {expected}")
        objective = make_objective(self.objective)
        if objective.needs_answers and self.loss_on != "completion":
            raise UsageError(
                f"loss_on is {self.loss_on!r}, expected 'completion', as objective "
                f"{objective.id!r} needs the start of each answer"
            )
        if self.method == "full" and objective.trained_layers(1 << 20) is not None:
            raise UsageError(
                f"method is 'full', expected 'lora' for objective {objective.id!r}, "
                "which chooses the layers that carry the adapter"
            )

    def num_steps(self, num_rows: int) -> int:
        """Return the number of optimizer steps for a data set of ``num_rows`` rows."""
        if self.max_steps is not None:
            return self.max_steps
        # rounded first: 1.1 epochs of 50 batches are 55 steps, not 56
        batches = math.ceil(num_rows / self.batch_size)
        return max(1, math.ceil(round(self.epochs * batches, 6)))

    def lora(self, base_model: str = "") -> "LoraConfig":
        """Return the settings of the adapter in PEFT's terms."""
        from fastsafe.model.peft import LoraConfig

        targets = self.target_modules
        return LoraConfig(
            rank=self.rank,
            alpha=self.alpha,
            target_modules=targets if isinstance(targets, str) else tuple(targets),
            dropout=self.dropout,
            base_model=base_model,
        )

    def learning_rate_at(self, step: int, num_steps: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * step / self.warmup_steps
        if self.schedule == "constant":
            return self.learning_rate
        progress = (step - self.warmup_steps) / max(1, num_steps - self.warmup_steps)
        if self.schedule == "linear":
            return self.learning_rate * (1 - progress)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Options of running jobs; only ``max_kl`` of a monitor changes the trained weights.

    Attributes:
        max_jobs: Maximum number of jobs trained at once; "auto" is as many as fit into memory.
        memory_bytes: Memory limit of training, without the base; None is all free memory.
        checkpoint_every: Steps of a job between its checkpoints; 0 writes none.
        resume: Resume from the checkpoints in the output folder and keep finished jobs.
        monitor: Measures the drift of every job from the base.
    """

    max_jobs: int | Literal["auto"] = "auto"
    memory_bytes: int | None = None
    checkpoint_every: int = 0
    resume: bool = False
    monitor: "DriftMonitor | None" = None

    def __post_init__(self) -> None:
        for name, least, other in (
            ("max_jobs", 1, "auto"),
            ("memory_bytes", 1, None),
            ("checkpoint_every", 0, 0),
        ):
            value = getattr(self, name)
            if value != other and (type(value) is not int or value < least):
                raise UsageError(
                    f"{name} is {value!r}, expected an integer of at least {least}"
                    + ("" if other == 0 else f" or {other!r}")
                )


@dataclass(frozen=True)
class FinetuneJob:
    """One adapter to train.

    Attributes:
        name: Name of the adapter and of its directory.
        examples: Rows of {"prompt", "completion"}, {"messages"} or {"text"}. Some objectives treat
            rows differently by their "source": "user" or "safety".
        config: Settings of the training.
    """

    name: str
    examples: Sequence[Row]
    config: TrainConfig


@dataclass(frozen=True, kw_only=True)
class FinetuneResult:
    """Result of one job.

    Attributes:
        name: Name of the job.
        adapter_dir: PEFT directory of the trained adapter; None if the job failed.
        losses: Loss of each step, in nats: the mean over its trained tokens, with the terms of the
            objective except its penalty on the parameters.
        num_tokens: Tokens processed in training, prompts included.
        seconds: Seconds spent training, excluding time parked.
        error: Reason for a failure, in one sentence.
        stopped_early: Whether the job ended before its last step because of its drift.
    """

    name: str
    adapter_dir: Path | None
    losses: tuple[float, ...]
    num_tokens: int
    seconds: float
    error: str | None = None
    stopped_early: bool = False

    @property
    def steps(self) -> int:
        """Number of optimizer steps taken."""
        return len(self.losses)


def check_jobs(jobs: Sequence[FinetuneJob]) -> None:
    """Refuse what is no list of jobs, and names that clash or cannot name directories.

    Raises:
        UsageError: It is one of these.
    """
    if isinstance(jobs, FinetuneJob) or not isinstance(jobs, Sequence):
        raise UsageError(
            f"finetune: jobs is a {type(jobs).__name__}, expected a list of FinetuneJob; a single "
            "job goes into a list of its own"
        )
    for i, job in enumerate(jobs):
        if not isinstance(job, FinetuneJob):
            raise UsageError(f"finetune: job {i} is {job!r:.60}, expected a FinetuneJob")
    check_names([job.name for job in jobs])


def check_names(names: Sequence[str]) -> None:
    """Refuse names of jobs that cannot each name a directory of its own."""
    for name in names:
        if not re.fullmatch(r"[\w+-][\w.+-]{0,127}", name) or names.count(name) > 1:
            raise UsageError(
                f"job name {name!r} cannot name a directory of its own; use each once, "
                "of at most 128 letters, digits and . _ + - with no dot first"
            )
