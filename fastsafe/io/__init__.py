"""Files from outside: checkpoints, tokenizers, chat templates. Nothing in them is executed."""

from importlib import import_module
from typing import Any

_MODULES = ("atomic", "chat_template", "checkpoint", "hub", "json_file", "safetensors", "tokenizer")


def __getattr__(name: str) -> Any:
    """Import a module of this package on first use: some of them import torch."""
    if name in _MODULES:
        return import_module(f"fastsafe.io.{name}")
    raise AttributeError(f"module 'fastsafe.io' has no attribute {name!r}")
