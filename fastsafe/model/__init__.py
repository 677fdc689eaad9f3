"""The decoder, its adapters and their weights."""

from fastsafe.model.config import ModelConfig
from fastsafe.model.lora import Adapter, AdapterBank
from fastsafe.model.transformer import Transformer

__all__ = ["Adapter", "AdapterBank", "ModelConfig", "Transformer"]
