"""fastsafe: measure, per task format, what fine-tuning does to a model's safety, and repair it.

Run: ``audit``, ``judge``, ``report``, ``Run``. Answer: ``LLM``, ``SamplingParams``, ``Completion``,
``Message``, ``Adapter``. Fine-tune: ``finetune``, ``FinetuneJob``, ``TrainConfig``,
``FinetuneResult``. Data and checks: ``lint``, ``mix``, ``verify``.
``fastsafe.organism.path()`` is the folder of the checkpoint that ships.

Progress and choices are logged to the logger ``fastsafe`` at the level INFO, which
``logging.basicConfig(level=logging.INFO)`` shows.
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastsafe import io, organism
    from fastsafe.audit import Run, audit
    from fastsafe.audit.run import judge, report
    from fastsafe.commands.lint import lint_file as lint
    from fastsafe.commands.mix import mix
    from fastsafe.data.conversation import Message
    from fastsafe.engine import LLM, Completion, SamplingParams
    from fastsafe.model import Adapter
    from fastsafe.train import FinetuneJob, FinetuneResult, TrainConfig, finetune
    from fastsafe.transformers_backend.verify import verify

__version__ = "0.1.0"

# Public name -> its module and its name there. Resolved on first use, so that `import fastsafe` and
# `fastsafe --help` do not import torch.
_HOME = {
    "LLM": ("fastsafe.engine", "LLM"),
    "Completion": ("fastsafe.engine", "Completion"),
    "SamplingParams": ("fastsafe.engine", "SamplingParams"),
    "Message": ("fastsafe.data.conversation", "Message"),
    "Adapter": ("fastsafe.model", "Adapter"),
    "FinetuneJob": ("fastsafe.train", "FinetuneJob"),
    "FinetuneResult": ("fastsafe.train", "FinetuneResult"),
    "TrainConfig": ("fastsafe.train", "TrainConfig"),
    "finetune": ("fastsafe.train", "finetune"),
    "audit": ("fastsafe.audit", "audit"),
    "Run": ("fastsafe.audit", "Run"),
    "judge": ("fastsafe.audit.run", "judge"),
    "report": ("fastsafe.audit.run", "report"),
    "lint": ("fastsafe.commands.lint", "lint_file"),
    "mix": ("fastsafe.commands.mix", "mix"),
    "verify": ("fastsafe.transformers_backend.verify", "verify"),
}
_PACKAGES = ("io", "organism")

__all__ = [
    "LLM",
    "Adapter",
    "Completion",
    "FinetuneJob",
    "FinetuneResult",
    "Message",
    "Run",
    "SamplingParams",
    "TrainConfig",
    "audit",
    "finetune",
    "io",
    "judge",
    "lint",
    "mix",
    "organism",
    "report",
    "verify",
]

logging.getLogger(__name__).addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    """Import a public name, or a subpackage such as ``fastsafe.organism``, on first use."""
    if name in _HOME:
        module, attribute = _HOME[name]
        return getattr(import_module(module), attribute)
    if name in _PACKAGES:
        return import_module(f"fastsafe.{name}")
    raise AttributeError(f"module 'fastsafe' has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the public names, which are not imported yet."""
    return sorted([*__all__, "__version__"])
