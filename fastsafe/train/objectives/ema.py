"""Weight EMA: save a moving average of the weights."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fastsafe.train.objectives.objective import Objective, RowGradients, State


@dataclass(frozen=True, kw_only=True)
class Ema(Objective):
    """theta_mean <- eta theta_mean + (1 - eta) theta after every step; training gives theta_mean.

    The average begins at the initial weights. arXiv:2508.12531. (verified)

    Attributes:
        strength: eta, in [0, 1); 0 gives theta.
    """

    id: ClassVar[str] = "ema"
    state_vectors: ClassVar[int] = 1

    strength: float = 0.9

    def __post_init__(self) -> None:
        self._check("strength", 0 <= self.strength < 1, "in [0, 1)")

    def initial_state(self, parameters: Tensor, gradients: RowGradients) -> State:
        """Start at the initial weights."""
        return {"mean": parameters.clone()}

    def after_step(self, state: State, step: int, parameters: Tensor) -> None:
        """Update the average."""
        state["mean"].mul_(self.strength).add_(parameters, alpha=1 - self.strength)

    def final(self, state: State, parameters: Tensor) -> Tensor:
        """Return the average."""
        return state["mean"]
