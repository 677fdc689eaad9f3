"""What a job minimizes: hooks around a step, with plain fine-tuning as their defaults."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from fastsafe.data.packing import Encoder, Example
from fastsafe.errors import UsageError
from fastsafe.model.transformer import Transformer
from fastsafe.train.batches import RowSource
from fastsafe.train.loss import token_loss

# Tensors [P] that an objective keeps between steps, by name; they are saved in checkpoints.
State = dict[str, Tensor]


class Batch(NamedTuple):
    """Trained tokens of a tile after the forward pass, and of which batch they are a share."""

    source: RowSource
    model: Transformer
    base_model: Transformer
    hidden: Tensor  # [M, E] final states; differentiable
    base: Tensor | None  # [M, E] those of the base, for an objective that asks for them
    targets: Tensor  # [M] int64
    answer_index: Tensor  # [M] int64, index of the target in its answer, from 0
    num_trained: int  # tokens of the whole batch
    num_rows: int  # of the whole batch


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Next-token cross-entropy, the mean over the trained tokens of a batch.

    Fields are the parameters that a ``TrainConfig`` can give. An instance is one job's; what
    changes while it trains is in ``State``.
    """

    id: ClassVar[str] = "sft"
    needs_safety_rows: ClassVar[bool] = False
    needs_answers: ClassVar[bool] = False  # to know where an answer begins
    needs_base: ClassVar[frozenset[RowSource]] = frozenset()  # sources with a pass of the base
    state_vectors: ClassVar[int] = 0  # most tensors in its state
    rows: ClassVar[RowSource] = "all"  # whose number makes an epoch
    logged_sources: ClassVar[frozenset[RowSource]] = frozenset(
        {"all", "user", "safety"}
    )  # in the loss

    def trained_layers(self, num_layers: int) -> tuple[int, ...] | None:
        """Layers that carry the adapter; None = all.

        Raises:
            UsageError: The objective does not fit a model of so many layers.
        """
        return None

    def example(self, example: Example, tokenizer: Encoder, where: str) -> Example:
        """Change an example before training.

        Raises:
            DataError: Nothing would be left to train on.
        """
        return example

    def sources(self, step: int) -> tuple[RowSource, ...]:
        """Sources that a step takes a batch from, one of each."""
        return ("all",)

    def initial_state(
        self, parameters: Tensor, gradients: Callable[[int], Iterator[Tensor]]
    ) -> State:
        """Make the state before the first step.

        Args:
            parameters: [P] fp32.
            gradients: Gives, for each of so many safety rows, the gradient [P] of its own loss.
        """
        return {}

    def loss(self, batch: Batch) -> Tensor:
        """Share of a tile in the loss of its batch: fp32, any number of terms [n] to be added."""
        return token_loss(batch.hidden, batch.targets, batch.model) / batch.num_trained

    def combine(self, gradients: Mapping[RowSource, Tensor]) -> Tensor:
        """Make one gradient [P] of those of the sources of a step, which may be modified."""
        first, *others = gradients.values()
        for other in others:
            first += other
        return first

    def add_penalty_gradient(
        self, state: State, step: int, num_steps: int, theta: Tensor, gradient: Tensor
    ) -> None:
        """Add the gradient of the parameter penalty at ``theta`` to ``gradient`` [P], in place."""

    def after_step(self, state: State, step: int, parameters: Tensor) -> None:
        """Take note of the parameters [P] after a step."""

    def final(self, state: State, parameters: Tensor) -> Tensor:
        """Weights [P] that training gives, from those after the last step."""
        return parameters

    def _check(self, name: str, ok: bool, wanted: str) -> None:
        if not ok:
            value = getattr(self, name)
            raise UsageError(f"objective {self.id!r}: {name} is {value!r}, expected {wanted}")


def leading_tokens(batch: Batch, count: int) -> Tensor:
    """Indices of the trained tokens that are among the first ``count`` of their answer."""
    return torch.nonzero(batch.answer_index < count)[:, 0]
