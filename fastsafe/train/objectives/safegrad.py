"""SafeGrad: remove from the user's gradient its component against the safety gradient."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastsafe.train.batches import RowSource
from fastsafe.train.objectives.objective import Objective


@dataclass(frozen=True, kw_only=True)
class SafeGrad(Objective):
    """If g_u . g_s < 0: g_u <- g_u - (g_u . g_s / ||g_s||^2) g_s.

    g_u and g_s are the gradients of a batch of the user's rows and of one of safety rows; g_u alone
    is what the step takes. (unverified)

    Attributes:
        strength: Share of the conflict that is taken away, in [0, 1]; 0 is plain fine-tuning on
            the user's rows.
    """

    id: ClassVar[str] = "safegrad"
    needs_safety_rows: ClassVar[bool] = True
    rows: ClassVar[RowSource] = "user"
    logged_sources: ClassVar[frozenset[RowSource]] = frozenset({"user"})

    strength: float = 1.0

    def __post_init__(self) -> None:
        self._check("strength", 0 <= self.strength <= 1, "in [0, 1]")

    def sources(self, step: int) -> tuple[RowSource, ...]:
        """Take a batch of the user's rows and one of safety rows."""
        return ("user", "safety")

    def combine(self, gradients: Mapping[RowSource, Tensor]) -> Tensor:
        """Project the user's gradient where the two conflict."""
        user, safety = gradients["user"], gradients["safety"]
        conflict, square = (user * safety).sum(), (safety * safety).sum()
        # torch.where rather than a branch, which would wait for the device; 0 changes no bit
        share = torch.where(conflict < 0, self.strength * conflict / square, 0.0)
        return user - share * safety
