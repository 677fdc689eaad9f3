"""Fine-tuning: many LoRA adapters at once on one frozen base."""

from fastsafe.train.config import FinetuneJob, FinetuneResult, TrainConfig, TrainOptions
from fastsafe.train.drift_monitor import DriftMonitor, DriftReading
from fastsafe.train.loop import finetune, plan_training
from fastsafe.train.memory import TrainMemory
from fastsafe.train.objectives import objectives

__all__ = [
    "DriftMonitor",
    "DriftReading",
    "FinetuneJob",
    "FinetuneResult",
    "TrainConfig",
    "TrainMemory",
    "TrainOptions",
    "finetune",
    "objectives",
    "plan_training",
]
