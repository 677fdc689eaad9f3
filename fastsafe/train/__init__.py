"""Fine-tuning: many LoRA adapters at once on one frozen base."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastsafe.train.config import FinetuneJob, FinetuneResult, TrainConfig, TrainOptions

if TYPE_CHECKING:
    from fastsafe.train.drift_monitor import DriftMonitor, DriftReading
    from fastsafe.train.loop import finetune, plan_training
    from fastsafe.train.memory import TrainMemory

# Public names of modules that import torch, resolved on first use: the command line reads the
# fields of `TrainConfig` without it.
_HOME = {
    "DriftMonitor": "drift_monitor",
    "DriftReading": "drift_monitor",
    "TrainMemory": "memory",
    "finetune": "loop",
    "plan_training": "loop",
}

__all__ = [
    "DriftMonitor",
    "DriftReading",
    "FinetuneJob",
    "FinetuneResult",
    "TrainConfig",
    "TrainMemory",
    "TrainOptions",
    "finetune",
    "plan_training",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name in _HOME:
        return getattr(import_module(f"fastsafe.train.{_HOME[name]}"), name)
    raise AttributeError(f"module 'fastsafe.train' has no attribute {name!r}")
