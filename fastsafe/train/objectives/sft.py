"""Plain supervised fine-tuning."""

from dataclasses import dataclass

from fastsafe.train.objectives.objective import Objective


@dataclass(frozen=True, kw_only=True)
class Sft(Objective):
    """CE, the mean of -log p(y_t) over the trained tokens of a batch."""
