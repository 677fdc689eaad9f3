"""Elastic weight consolidation: hold the weights that refusals depend on."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastsafe.train.batches import RowSource
from fastsafe.train.objectives.objective import Objective, RowGradients, State


@dataclass(frozen=True, kw_only=True)
class Ewc(Objective):
    """CE + sum_i (lambda/2) F_i (theta_i - theta_0,i)^2 on the user's rows.

    theta are the adapter's weights and theta_0 their start, where the adapter changes nothing. F is
    the diagonal of the empirical Fisher information there: the mean, over safety rows, of the
    squared gradient of a row's log-likelihood per trained token. It is zero for A, as B starts at
    zero. Kirkpatrick et al. 2017, arXiv:1612.00796; as a defence arXiv:2512.10150.
    (method verified; formula unverified)

    Attributes:
        strength: lambda, at least 0.
        fisher_rows: Safety rows that F is taken over, at least 1; at most all of them.
    """

    id: ClassVar[str] = "ewc"
    needs_safety_rows: ClassVar[bool] = True
    state_vectors: ClassVar[int] = 2
    rows: ClassVar[RowSource] = "user"

    strength: float = 1000.0
    fisher_rows: int = 64

    def __post_init__(self) -> None:
        self._check("strength", self.strength >= 0, "at least 0")
        self._check("fisher_rows", self.fisher_rows >= 1, "at least 1")

    def sources(self, step: int) -> tuple[RowSource, ...]:
        """Take the user's rows only."""
        return ("user",)

    def initial_state(self, parameters: Tensor, gradients: RowGradients) -> State:
        """Measure the Fisher information F."""
        fisher, count = torch.zeros_like(parameters), 0
        for gradient in gradients(self.fisher_rows):
            fisher.addcmul_(gradient, gradient)
            count += 1
        return {"fisher": fisher / count, "start": parameters.clone()}

    def add_penalty_gradient(
        self, state: State, step: int, num_steps: int, theta: Tensor, gradient: Tensor
    ) -> None:
        """Add lambda F (theta - theta_0)."""
        gradient.addcmul_(state["fisher"], theta - state["start"], value=self.strength)
