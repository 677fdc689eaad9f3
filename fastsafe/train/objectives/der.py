"""Dark experience replay: hold the logits on safety rows near the base's."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fastsafe.train.batches import RowSource
from fastsafe.train.loss import through_head
from fastsafe.train.objectives.objective import Batch, Objective
from fastsafe_kernels import token_logprobs


@dataclass(frozen=True, kw_only=True)
class Der(Objective):
    """CE_u + alpha ||z_theta(x_s) - z_theta0(x_s)||^2 (+ beta CE_s).

    Every step takes a batch of the user's rows and one of safety rows. The distance of the logits z
    is the mean over the vocabulary and over trained tokens. Buzzega et al. 2020, arXiv:2004.07211;
    as a defence arXiv:2512.10150. (method verified; formula unverified)

    Attributes:
        strength: Multiplies both terms on safety rows, at least 0; 0 is plain fine-tuning on the
            user's rows.
        alpha: Weight of the distance, at least 0.
        beta: Weight of the cross-entropy on safety rows, at least 0.
    """

    id: ClassVar[str] = "der"
    needs_safety_rows: ClassVar[bool] = True
    needs_base: ClassVar[frozenset[RowSource]] = frozenset({"safety"})
    rows: ClassVar[RowSource] = "user"

    strength: float = 1.0
    alpha: float = 0.5
    beta: float = 0.5

    def __post_init__(self) -> None:
        for name in ("strength", "alpha", "beta"):
            self._check(name, getattr(self, name) >= 0, "at least 0")

    def sources(self, step: int) -> tuple[RowSource, ...]:
        """Take a batch of the user's rows and one of safety rows."""
        return ("user", "safety")

    def loss(self, batch: Batch) -> Tensor:
        """Compute CE on the user's rows, distance and CE on safety rows."""
        if batch.tile.source == "user":
            return super().loss(batch)
        base, targets = batch.base, batch.packed.targets
        assert base is not None

        def losses(logits: Tensor, rows: slice) -> Tensor:
            distance = (logits - batch.base_model.logits(base[rows])).square().mean(-1)
            return self.alpha * distance - self.beta * token_logprobs(logits, targets[rows])

        terms = through_head(batch.hidden, batch.model, losses)
        return terms * (self.strength / batch.tile.num_trained)
