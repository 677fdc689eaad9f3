"""The settings of a fine-tuning job, the job itself and its result."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, Literal

from fastsafe.data.conversation import Row
from fastsafe.errors import UsageError
from fastsafe.train.drift_monitor import DriftMonitor
from fastsafe.train.objectives import make_objective


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How one adapter is trained.

    Attributes:
        rank: LoRA rank R, at least 1.
        alpha: The update is scaled by alpha / rank.
        target_modules: Last names of linear modules, a regular expression, or "all-linear".
        dropout: Share of the adapter's inputs set to 0 while training, in [0, 1).
        learning_rate: Peak learning rate.
        schedule: Learning rate after warm-up: constant, or to 0 on a line or a cosine.
        warmup_steps: Steps over which the learning rate rises from 0.
        max_steps: Optimizer steps; None trains for ``epochs``.
        epochs: Passes over the rows when ``max_steps`` is None, more than 0.
        batch_size: Rows per optimizer step; the last batch of an epoch may be smaller.
        seed: Seed of the initial weights, the data order and dropout.
        weight_decay: Decoupled weight decay of AdamW.
        max_grad_norm: Gradients are scaled down to this L2 norm; 0 means never.
        loss_on: "completion" trains on answers only, "all" on every token but the first.
        shuffle: Whether each epoch has its own order of rows.
        objective: What is minimized: an id of ``fastsafe.train.objectives``, "sft" for plain
            cross-entropy, or {"name": id} with the objective's parameters beside it.
        method: "lora" trains an adapter, "full" a copy of all weights, which gives a checkpoint;
            rank, alpha and target_modules then mean nothing, and dropout must be 0.
    """

    rank: int = 8
    alpha: float = 16.0
    target_modules: tuple[str, ...] | Sequence[str] | str = "all-linear"
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
        for name in ("rank", "warmup_steps", "batch_size", "seed", "max_steps"):
            value = getattr(self, name)
            is_unset = name == "max_steps" and value is None
            if not is_unset and (isinstance(value, bool) or not isinstance(value, int)):
                raise UsageError(f"TrainConfig: {name} is {value!r}, expected an integer")
        for name in (
            "alpha",
            "dropout",
            "learning_rate",
            "epochs",
            "weight_decay",
            "max_grad_norm",
        ):
            value = getattr(self, name)
            if not isinstance(value, Real):
                raise UsageError(f"TrainConfig: {name} is {value!r}, expected a number")
        for name, ok, wanted in (
            ("rank", 1 <= self.rank <= 4096, "an integer in [1, 4096]"),
            ("alpha", math.isfinite(self.alpha), "a finite number"),
            ("dropout", 0 <= self.dropout < 1, "in [0, 1)"),
            ("learning_rate", 0 <= self.learning_rate <= 10, "in [0, 10]"),
            ("schedule", self.schedule in ("constant", "linear", "cosine"), "a known schedule"),
            ("warmup_steps", self.warmup_steps >= 0, "at least 0"),
            ("max_steps", self.max_steps is None or self.max_steps >= 1, "at least 1 or None"),
            ("epochs", 0 < self.epochs < math.inf, "more than 0"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "at least 0"),
            ("max_grad_norm", self.max_grad_norm >= 0, "at least 0 (0 means off)"),
            ("loss_on", self.loss_on in ("completion", "all"), "'completion' or 'all'"),
            ("method", self.method in ("lora", "full"), "'lora' or 'full'"),
            ("dropout", self.method == "lora" or self.dropout == 0, "0 where method is 'full'"),
        ):
            if not ok:
                raise UsageError(
                    f"TrainConfig: {name} is {getattr(self, name)!r}, expected {wanted}"
                )
        objective = make_objective(self.objective)
        if objective.needs_answers and self.loss_on != "completion":
            raise UsageError(
                f"TrainConfig: loss_on is {self.loss_on!r}, expected 'completion', as objective "
                f"{objective.id!r} has to know where an answer begins"
            )
        if self.method == "full" and objective.trained_layers(1 << 20) is not None:
            raise UsageError(
                f"TrainConfig: method is 'full', expected 'lora' for objective {objective.id!r}, "
                "which chooses the layers that carry the adapter"
            )

    def num_steps(self, num_rows: int) -> int:
        """Return the number of optimizer steps for ``num_rows`` rows."""
        if self.max_steps is not None:
            return self.max_steps
        # rounded first: 1.1 epochs of 50 batches are 55 steps, not 56
        batches = math.ceil(num_rows / self.batch_size)
        return max(1, math.ceil(round(self.epochs * batches, 6)))

    def learning_rate_at(self, step: int, num_steps: int) -> float:
        """Return the learning rate of the step with this index, counted from 0."""
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
    """How jobs are scheduled; only a monitor's ``max_kl`` can change a result.

    Attributes:
        max_jobs: Limit of jobs trained at once; "auto" is as many as fit into memory.
        memory_bytes: Memory for training beside the base; None is all free memory.
        checkpoint_every: Steps of a job between its checkpoints; 0 writes none.
        resume: Continue from the checkpoints in the output folder, and keep finished jobs.
        monitor: Measures the drift of every job from the base.
    """

    max_jobs: int | Literal["auto"] = "auto"
    memory_bytes: int | None = None
    checkpoint_every: int = 0
    resume: bool = False
    monitor: DriftMonitor | None = None

    def __post_init__(self) -> None:
        for name, least, other in (
            ("max_jobs", 1, "auto"),
            ("memory_bytes", 1, None),
            ("checkpoint_every", 0, 0),
        ):
            value = getattr(self, name)
            if value != other and (type(value) is not int or value < least):
                raise UsageError(
                    f"TrainOptions: {name} is {value!r}, expected an integer of at least {least}"
                    + ("" if other == 0 else f" or {other!r}")
                )


@dataclass(frozen=True)
class FinetuneJob:
    """One adapter to train.

    Attributes:
        name: Name of the adapter and of its directory.
        examples: Rows of {"prompt", "completion"}, {"messages"} or {"text"}; the key "source",
            "user" or "safety", is read by objectives that treat the two apart.
        config: How to train it.
    """

    name: str
    examples: Sequence[Row]
    config: TrainConfig


@dataclass(frozen=True, kw_only=True)
class FinetuneResult:
    """Result of one fine-tuning job.

    Attributes:
        name: Name of the job.
        adapter_dir: PEFT directory of the trained adapter, or checkpoint; None after an error.
        losses: Loss of each step, in nats: the mean over its trained tokens, with the
            objective's own terms but without those in the parameters.
        num_tokens: Tokens of all batches, prompts included.
        seconds: Seconds spent training, excluding time parked.
        error: Why the job failed, in one sentence.
        stopped_early: Whether the drift monitor ended it before its last step.
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
