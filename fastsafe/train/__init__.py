"""Fine-tuning: many LoRA adapters at once on one frozen base."""

from fastsafe.train.config import FinetuneJob, FinetuneResult, TrainConfig
from fastsafe.train.loop import finetune

__all__ = ["FinetuneJob", "FinetuneResult", "TrainConfig", "finetune"]
