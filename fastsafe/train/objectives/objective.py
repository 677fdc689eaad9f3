"""The objective of a job: hooks around a training step; the defaults are plain fine-tuning."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor

from fastsafe.data.encoder import Encoder
from fastsafe.data.packing import TrainExample
from fastsafe.errors import UsageError
from fastsafe.model.transformer import Transformer
from fastsafe.train.batches import Packed, RowSource, Tile
from fastsafe.train.loss import token_loss

# Tensors [P] of an objective between steps, by name; checkpoints save them.
State = dict[str, Tensor]
# Called with a count, yields the gradient [P] of the loss of each of the first safety rows.
RowGradients = Callable[[int], Iterator[Tensor]]


class Batch(NamedTuple):
    """Trained tokens of a tile after the forward pass, and the counts of their whole batch."""

    tile: Tile
    packed: Packed
    model: Transformer
    base_model: Transformer
    hidden: Tensor  # [M, E] final states; differentiable
    base: Tensor | None  # [M, E] final states of the base, where ``needs_base`` asks for them


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Next-token cross-entropy, the mean over the trained tokens of a batch.

    A ``TrainConfig`` sets the fields. An instance belongs to one job and never changes; its state
    in training is a ``State``.
    """

    id: ClassVar[str] = "sft"
    needs_safety_rows: ClassVar[bool] = False
    needs_answers: ClassVar[bool] = False  # rows whose answers follow a prompt
    needs_base: ClassVar[frozenset[RowSource]] = frozenset()  # sources to run the base on, too
    state_vectors: ClassVar[int] = 0  # largest number of tensors in its state
    rows: ClassVar[RowSource] = "all"  # rows that make an epoch
    # sources whose loss is part of the loss that is logged
    logged_sources: ClassVar[frozenset[RowSource]] = frozenset({"all", "user", "safety"})

    def trained_layers(self, num_layers: int) -> tuple[int, ...] | None:
        """Return the layers that carry the adapter; None = all.

        Raises:
            UsageError: The objective does not fit a model with this number of layers.
        """
        return None

    def example(self, example: TrainExample, tokenizer: Encoder, location: str) -> TrainExample:
        """Return the example to train on in place of ``example``; ``location`` prefixes errors.

        Raises:
            DataError: Nothing would be left to train on.
        """
        return example

    def sources(self, step: int) -> tuple[RowSource, ...]:
        """Return the sources of a step, which takes one batch from each."""
        return ("all",)

    def initial_state(self, parameters: Tensor, gradients: RowGradients) -> State:
        """Make the state before the first step.

        Args:
            parameters: [P] fp32.
            gradients: See ``RowGradients``.
        """
        return {}

    def loss(self, batch: Batch) -> Tensor:
        """Compute the share of a tile in the loss of its batch: fp32 terms [n], to be added."""
        return token_loss(batch.hidden, batch.packed.targets, batch.model) / batch.tile.num_trained

    def combine(self, gradients: Mapping[RowSource, Tensor]) -> Tensor:
        """Combine the gradients of the sources of a step, which may be modified, to one [P]."""
        first, *others = gradients.values()
        for other in others:
            first += other
        return first

    def add_penalty_gradient(
        self, state: State, step: int, num_steps: int, theta: Tensor, gradient: Tensor
    ) -> None:
        """Add the gradient of the parameter penalty at ``theta`` to ``gradient`` [P], in place."""

    def after_step(self, state: State, step: int, parameters: Tensor) -> None:
        """Update the state with the parameters [P] after a step."""

    def final(self, state: State, parameters: Tensor) -> Tensor:
        """Return the weights [P] to save, from those after the last step."""
        return parameters

    def _check(self, name: str, is_valid: bool, expected: str) -> None:
        if not is_valid:
            value = getattr(self, name)
            raise UsageError(f"objective {self.id!r}: {name} is {value!r}, expected {expected}")
