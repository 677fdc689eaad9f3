"""Learning without forgetting: hold the final states near the base's."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastsafe.train.batches import RowSource
from fastsafe.train.objectives.objective import Batch, Objective


@dataclass(frozen=True, kw_only=True)
class Lwf(Objective):
    """CE + beta ||h_theta - h_theta0||^2, the mean over trained tokens.

    h is the state after the final norm where a trained token is predicted, h_theta0 the same with
    the adapter switched off. Li & Hoiem 2016, arXiv:1606.09282; as a defence arXiv:2512.10150.
    (method verified; formula unverified)

    Attributes:
        strength: beta, at least 0.
    """

    id: ClassVar[str] = "lwf"
    needs_base: ClassVar[frozenset[RowSource]] = frozenset({"all"})

    strength: float = 0.01

    def __post_init__(self) -> None:
        self._check("strength", self.strength >= 0, "at least 0")

    def loss(self, batch: Batch) -> Tensor:
        """Compute CE and the distance of the states."""
        assert batch.base is not None
        distance = (batch.hidden.float() - batch.base.float()).square().sum(-1)
        return torch.cat((super().loss(batch), distance * (self.strength / batch.tile.num_trained)))
