"""Constrained SFT: hold every token near the base, the first ones most."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastsafe.train.batches import RowSource
from fastsafe.train.loss import target_logprobs, token_loss
from fastsafe.train.objectives.objective import Batch, Objective

_LEAST_WEIGHT = 1e-3


@dataclass(frozen=True, kw_only=True)
class ConstrainedSft(Objective):
    """L = -sum_t (2/beta_t) log sigma(beta_t Delta_t).

    Delta_t = log pi_theta(y_t) - log pi_theta0(y_t), pi_theta0 with the adapter switched off. The
    gradient is that of the cross-entropy with the weight w_t = 2 (1 - sigma(beta_t Delta_t)) of
    each token, detached and at least 1e-3; the loss reported is this weighted cross-entropy.
    Qi et al. 2024, arXiv:2406.05946. (verified)

    Attributes:
        strength: Multiplies every beta; at least 0.
        first: beta_1, at least 0.
        next: beta_2 to beta_5, at least 0.
        later: beta of the tokens after, at least 0.
    """

    id: ClassVar[str] = "constrained_sft"
    needs_answers: ClassVar[bool] = True
    needs_base: ClassVar[frozenset[RowSource]] = frozenset({"all"})

    strength: float = 1.0
    first: float = 0.5
    next: float = 2.0
    later: float = 0.1

    def __post_init__(self) -> None:
        for name in ("strength", "first", "next", "later"):
            self._check(name, getattr(self, name) >= 0, "at least 0")

    def loss(self, batch: Batch) -> Tensor:
        """Compute the weighted cross-entropy."""
        assert batch.base is not None
        index, targets = batch.packed.answer_index, batch.packed.targets
        betas = torch.full(index.shape, self.later, device=index.device)
        betas[index < 5] = self.next
        betas[index == 0] = self.first
        tuned = target_logprobs(batch.hidden, targets, batch.model)
        base = target_logprobs(batch.base, targets, batch.base_model)
        weights = 2 * torch.sigmoid(-self.strength * betas * (tuned - base))
        weights = weights.clamp_min(_LEAST_WEIGHT)
        return token_loss(batch.hidden, targets, batch.model, weights) / batch.tile.num_trained
