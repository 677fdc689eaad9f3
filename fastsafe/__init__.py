"""fastsafe: measure, per task format, what fine-tuning does to a model's safety, and repair it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastsafe.audit import audit
    from fastsafe.engine import LLM, Completion, SamplingParams
    from fastsafe.model import Adapter
    from fastsafe.train import FinetuneJob, FinetuneResult, TrainConfig, finetune

__version__ = "0.1.0"

# Public name -> its module. Resolved on first use, so that `import fastsafe` and
# `fastsafe --help` do not import torch.
_HOME = {
    "LLM": "fastsafe.engine",
    "Completion": "fastsafe.engine",
    "SamplingParams": "fastsafe.engine",
    "Adapter": "fastsafe.model",
    "FinetuneJob": "fastsafe.train",
    "FinetuneResult": "fastsafe.train",
    "TrainConfig": "fastsafe.train",
    "finetune": "fastsafe.train",
    "audit": "fastsafe.audit",
}

__all__ = [
    "LLM",
    "Adapter",
    "Completion",
    "FinetuneJob",
    "FinetuneResult",
    "SamplingParams",
    "TrainConfig",
    "audit",
    "finetune",
]


def __getattr__(name: str) -> Any:
    """Import a public name, or a subpackage such as ``fastsafe.organism``, on first use."""
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    if name in ("io", "organism"):
        return import_module(f"fastsafe.{name}")
    raise AttributeError(f"module 'fastsafe' has no attribute {name!r}")
