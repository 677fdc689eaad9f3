"""Lisa: phases of safety rows and of user rows, each held near the end of the other."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fastsafe.train.batches import RowSource
from fastsafe.train.objectives.objective import Objective, State


@dataclass(frozen=True, kw_only=True)
class Lisa(Objective):
    """Alternate K1 steps on D_s and K2 on D_u, each with + (rho/2) ||theta - theta_other||^2.

    theta_other are the weights at the last switch of the other phase; the term is off before there
    are any, and for the first steps. Huang et al. 2024, arXiv:2405.18641. (verified)

    Attributes:
        strength: rho, at least 0; with 0 the phases only alternate.
        safety_steps: K1, at least 1.
        user_steps: K2, at least 1.
        free: Share of all steps at the start without the term, in [0, 1].
    """

    id: ClassVar[str] = "lisa"
    needs_safety_rows: ClassVar[bool] = True
    state_vectors: ClassVar[int] = 2

    strength: float = 1.0
    safety_steps: int = 100
    user_steps: int = 900
    free: float = 0.1

    def __post_init__(self) -> None:
        self._check("strength", self.strength >= 0, "at least 0")
        self._check("safety_steps", self.safety_steps >= 1, "at least 1")
        self._check("user_steps", self.user_steps >= 1, "at least 1")
        self._check("free", 0 <= self.free <= 1, "in [0, 1]")

    def sources(self, step: int) -> tuple[RowSource, ...]:
        """Alternate phases of safety rows and of the user's, beginning with safety."""
        offset = step % (self.safety_steps + self.user_steps)
        return ("safety",) if offset < self.safety_steps else ("user",)

    def add_penalty_gradient(
        self, state: State, step: int, num_steps: int, theta: Tensor, gradient: Tensor
    ) -> None:
        """Add rho (theta - theta_other)."""
        (phase,) = self.sources(step)
        other = state.get("user" if phase == "safety" else "safety")
        if other is not None and step >= self.free * num_steps:
            gradient.add_(theta - other, alpha=self.strength)

    def after_step(self, state: State, step: int, parameters: Tensor) -> None:
        """Store the weights at the end of a phase."""
        (phase,) = self.sources(step)
        if self.sources(step + 1) != (phase,):
            state[phase] = parameters.clone()
