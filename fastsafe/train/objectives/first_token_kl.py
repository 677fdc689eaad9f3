"""First-token KL: hold the first tokens of answers near the base."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastsafe.train.batches import RowSource
from fastsafe.train.loss import divergence
from fastsafe.train.objectives.objective import Batch, Objective


@dataclass(frozen=True, kw_only=True)
class FirstTokenKl(Objective):
    """CE + lambda sum_{t<=m} KL(pi_theta0 || pi_theta), the sum's mean over rows.

    pi_theta0 is the adapter switched off, so there is no second model. (inferred)

    Attributes:
        strength: lambda, at least 0.
        tokens: m, at least 1.
    """

    id: ClassVar[str] = "first_token_kl"
    needs_answers: ClassVar[bool] = True
    needs_base: ClassVar[frozenset[RowSource]] = frozenset({"all"})

    strength: float = 0.1
    tokens: int = 5

    def __post_init__(self) -> None:
        self._check("strength", self.strength >= 0, "at least 0")
        self._check("tokens", self.tokens >= 1, "at least 1")

    def loss(self, batch: Batch) -> Tensor:
        """Compute CE of all tokens, and the divergence of the first ones."""
        assert batch.base is not None
        rows = torch.nonzero(batch.packed.answer_index < self.tokens)[:, 0]
        kl = divergence(batch.hidden[rows], batch.base[rows], batch.model, batch.base_model)
        return torch.cat((super().loss(batch), kl * (self.strength / batch.tile.num_rows)))
